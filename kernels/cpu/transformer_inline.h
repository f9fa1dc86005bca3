// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The single-row building blocks of transformer_kernels.h, for kernels that run several steps
// inside one parallel region (decode_layer). They use no thread pool and allocate nothing; they
// are thread-safe, follow active_isa(), and the whole-tensor kernels are made of the same code.
// Buffers that are read and written may be the same where the element types are the same.
#pragma once

#include <limits>

#include "kernels/params.h"

namespace metal_lora::cpu {

/// y[i] = to(from(x[i])), round to nearest even.
void convert_range(size_t count, DType x_dtype, const void* x, DType y_dtype, void* y);

/// y = x / sqrt(mean(x²) + eps) · weight over one row of f32 x [dims].
void rms_norm_row(
    uint32_t dims,
    float eps,
    const float* x,
    DType weight_dtype,
    const void* weight,
    DType y_dtype,
    void* y);

/// One head turned by one row [head_dim] of rope_table's output; NeoX order. y may be x.
void rope_head(
    uint32_t head_dim,
    const float* cos_sin,
    bool inverse,
    DType x_dtype,
    const void* x,
    DType y_dtype,
    void* y);

/// y = gate·sigmoid(gate)·up. y may be gate or up.
void swiglu_range(
    size_t count, DType x_dtype, const void* gate, const void* up, DType y_dtype, void* y);

/// Where the softmax of one query head stands after some keys: weights are exp(s - max).
struct SoftmaxState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;
};

/// Adds `keys` keys to the attention of `heads` query heads that share one kv head:
/// s_j = scale·q·k_j; acc = Σ exp(s_j - max)·v_j (not divided by sum). Starts from state and acc as
/// they are (a fresh SoftmaxState and acc = 0 for the first range); the order of sums is that of
/// the keys, in blocks of 64. q [heads, head_dim] f32; k, v: keys at k_stride, v_stride elements,
/// of kv_dtype; acc [heads, head_dim] f32. head_dim ≤ 256. Each head's result is the same whatever
/// `heads` is.
void attend_keys(
    uint32_t heads,
    uint32_t head_dim,
    float scale,
    const float* q,
    DType kv_dtype,
    const void* k,
    size_t k_stride,
    const void* v,
    size_t v_stride,
    uint32_t keys,
    SoftmaxState* state,
    float* acc);

/// y [head_dim] = the attention of one head from `parts` key ranges, combined in the order given:
/// part p has states[p · state_stride] and accs + p · acc_stride. No key at all gives zeros.
/// Returns the logsumexp (-inf without keys). head_dim ≤ 256.
float combine_attention(
    uint32_t head_dim,
    uint32_t parts,
    const SoftmaxState* states,
    size_t state_stride,
    const float* accs,
    size_t acc_stride,
    DType y_dtype,
    void* y);

}  // namespace metal_lora::cpu
