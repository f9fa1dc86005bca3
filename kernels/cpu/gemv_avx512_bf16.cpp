// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemv_kernels_inl.h"

#if defined(__x86_64__)
namespace metal_lora::cpu {

const GemvKernels& gemv_kernels_avx512_bf16() {
  return simd_avx512_bf16::kGemvKernels;
}

}  // namespace metal_lora::cpu
#endif
