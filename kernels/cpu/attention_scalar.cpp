// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT

#include "kernels/cpu/attention_impl.h"

namespace metal_lora::cpu {

extern const AttentionTiles attention_tiles_scalar;
const AttentionTiles attention_tiles_scalar = METAL_LORA_SIMD::kAttentionTiles;

}  // namespace metal_lora::cpu
