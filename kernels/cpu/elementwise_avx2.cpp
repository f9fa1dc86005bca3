// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#if defined(__x86_64__)
#include "kernels/cpu/elementwise_impl.h"

namespace metal_lora::cpu {

extern const Elementwise elementwise_avx2;
const Elementwise elementwise_avx2 = METAL_LORA_SIMD::kElementwise;

}  // namespace metal_lora::cpu
#endif
