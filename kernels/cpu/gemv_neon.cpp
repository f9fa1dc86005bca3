// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemv_kernels_inl.h"

#if defined(__aarch64__)
namespace metal_lora::cpu {

const GemvKernels& gemv_kernels_neon() {
  return simd_neon::kGemvKernels;
}

}  // namespace metal_lora::cpu
#endif
