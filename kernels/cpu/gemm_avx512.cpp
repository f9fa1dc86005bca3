// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm_kernels.h"

#if defined(__AVX512F__)
#define METAL_LORA_VECTOR_BYTES 64
#define METAL_LORA_MAX_ROWS 14
#define METAL_LORA_BF16 0
#include "kernels/cpu/gemm_kernels-inl.h"
#endif

namespace metal_lora::cpu {

const GemmKernels* gemm_kernels_avx512() {
#if defined(__AVX512F__)
  return &kKernels;
#else
  return nullptr;
#endif
}

}  // namespace metal_lora::cpu
