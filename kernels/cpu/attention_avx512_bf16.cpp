// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#if defined(__x86_64__)
#include "kernels/cpu/attention_impl.h"

namespace metal_lora::cpu {

extern const AttentionTiles attention_tiles_avx512_bf16;
const AttentionTiles attention_tiles_avx512_bf16 = METAL_LORA_SIMD::kAttentionTiles;

}  // namespace metal_lora::cpu
#endif
