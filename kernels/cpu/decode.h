// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cpu/transformer_kernels.h"

namespace metal_lora {

/// Pre-norm decoder layers for a few tokens of one sequence (decode, or verification of a draft).
struct DecodeLayerParams {
  uint32_t tokens = 1;                                                  ///< 1 … 8, consecutive
  uint32_t dims = 0, q_heads = 0, kv_heads = 0, head_dim = 0, ffn = 0;  ///< head_dim ≤ 256
  uint32_t position = 0;     ///< of the first token = keys already in the cache
  uint32_t kv_capacity = 0;  ///< tokens the cache has room for
  uint32_t window = 0;
  float eps = 1e-5f;
  float attention_scale = 0.0f;
  DType dtype = DType::f32;       ///< of the cache and of the inputs of every linear
  DType norm_dtype = DType::f32;  ///< of the norm weights
};

namespace cpu {

struct LinearView {
  WeightView weight;
  LoraView lora;
  const float* bias = nullptr;
};

struct DecodeLayerView {
  const void* input_norm = nullptr;
  const void* post_norm = nullptr;
  const void* q_norm = nullptr;  ///< Qwen3: per-head norms [head_dim], or null
  const void* k_norm = nullptr;
  LinearView q, k, v, o, gate, up, down;
};

/// x [tokens, dims] f32 in and out (the residual stream stays f32 between layers);
/// k_cache, v_cache [kv_capacity, kv_heads, head_dim] of p.dtype: rows position … are written;
/// cos_sin [tokens, head_dim] as rope_table makes it. Same formulas as the separate kernels; the
/// layer is one entry because on a CPU the cost of a decode step's many small launches is real.
/// What is read by a linear or kept in the cache is rounded to p.dtype; q, the attention's sums,
/// gate and up stay f32. Each token's results are bitwise independent of `tokens` and of the
/// thread count. Adapters' dropout is not applied. Thread-safe.
void decode_layer(
    const DecodeLayerParams& p,
    const DecodeLayerView& w,
    const float* cos_sin,
    float* x,
    void* k_cache,
    void* v_cache);

/// `count` layers in a row, with one trip to the thread pool for all of them: between steps the
/// threads meet at counters (5 per layer) instead of going to sleep. The same bits as `count`
/// calls of decode_layer, each of which would be a trip of its own.
void decode_layers(
    const DecodeLayerParams& p,
    const DecodeLayerView* layers,
    size_t count,
    const float* cos_sin,
    float* x,
    void* const* k_caches,
    void* const* v_caches);

}  // namespace cpu
}  // namespace metal_lora
