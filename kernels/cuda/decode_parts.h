// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The small kernels of a decode step: what lies between its linears.
#pragma once

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// The step's inputs in device memory, written once a step.
struct DecodeInputs {
  static constexpr int kMaxTokens = 16;
  int32_t ids[kMaxTokens];
  int32_t positions[kMaxTokens];
};

/// y [rows, dims] of dtype = rms_norm(x [rows, dims] f32)·weight. weight is read before the kernel
/// waits for its predecessor: no kernel that may still run writes it.
void decode_norm(
    const Context& context,
    uint32_t rows,
    uint32_t dims,
    float eps,
    const float* x,
    const float* weight,
    DType dtype,
    void* y);

struct DecodeAttentionParams {
  uint32_t tokens = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
  uint32_t capacity = 0;  ///< rows of the cache
  uint32_t window = 0;
  float eps = 1e-5f;  ///< of the heads' norms
  float scale = 0.0f;
  DType dtype = DType::bf16;
};
/// q and k are normed per head where q_norm and k_norm are not null, q is rotated in place, k is
/// rotated into the cache's rows positions[t] and v copied there. q [tokens, q_heads, head_dim], k
/// and v [tokens, kv_heads, head_dim]; cos_sin [tokens, head_dim]; head_dim ≤ 256, even.
void decode_rope_cache(
    const Context& context,
    const DecodeAttentionParams& p,
    const int32_t* positions,
    const float* cos_sin,
    const float* q_norm,
    const float* k_norm,
    void* q,
    const void* k,
    const void* v,
    void* k_cache,
    void* v_cache);

/// decode_rope_cache and the attention of its queries over the cache's rows 0 … positions[tokens-1]
/// into out [tokens, q_heads, head_dim]; positions follow each other. One launch, which leaves q as
/// it is, where 16 bytes divide rows and pointers of a 16-bit type; else two. Positions, cos_sin
/// and the cache's rows before the first position are read before the kernel waits for its
/// predecessor: the caller promises that no kernel which may still run writes them.
void decode_attention(
    const Context& context,
    const DecodeAttentionParams& p,
    const int32_t* positions,
    const float* cos_sin,
    const float* q_norm,
    const float* k_norm,
    void* q,
    const void* k,
    const void* v,
    void* k_cache,
    void* v_cache,
    void* out);

}  // namespace metal_lora::cuda
