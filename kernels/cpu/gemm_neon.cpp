// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm_kernels.h"

#if defined(__aarch64__)
#define METAL_LORA_VECTOR_BYTES 16
#define METAL_LORA_MAX_ROWS 6
#define METAL_LORA_BF16 0
#include "kernels/cpu/gemm_kernels-inl.h"
#endif

namespace metal_lora::cpu {

const GemmKernels* gemm_kernels_neon() {
#if defined(__aarch64__)
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace metal_lora::cpu
