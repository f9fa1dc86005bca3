// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm_kernels.h"

#if 1
#define METAL_LORA_SIMD_PLAIN
#define METAL_LORA_VECTOR_BYTES 16
#define METAL_LORA_MAX_ROWS 2
#define METAL_LORA_BF16 0
#include "kernels/cpu/gemm_kernels-inl.h"
#endif

namespace metal_lora::cpu {

const GemmKernels* gemm_kernels_scalar() {
#if 1
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace metal_lora::cpu
