// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#define METAL_LORA_SIMD_PLAIN 1
#include "kernels/cpu/gemv_kernels_inl.h"

namespace metal_lora::cpu {

const GemvKernels& gemv_kernels_scalar() {
  return simd_scalar::kGemvKernels;
}

}  // namespace metal_lora::cpu
