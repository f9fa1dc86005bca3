// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT

#include "kernels/cpu/elementwise_impl.h"

namespace metal_lora::cpu {

extern const Elementwise elementwise_scalar;
const Elementwise elementwise_scalar = METAL_LORA_SIMD::kElementwise;

}  // namespace metal_lora::cpu
