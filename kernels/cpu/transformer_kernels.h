// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What a decoder layer needs beside its linears. Every entry: raw pointers, POD params, contiguous
// unless a stride is given, f32 sums in a fixed order, runs on the thread pool, thread-safe.
#pragma once

#include "kernels/cpu/lora_kernels.h"

namespace metal_lora::cpu {

/// Flash attention (Dao et al., arXiv:2205.14135): softmax(scale·q·kᵀ)·v without a [q, kv] matrix.
/// q [q_tokens, q_heads, head_dim], k and v [kv_tokens, kv_heads, head_dim] at the given strides;
/// segment_start [q_tokens] (key index) or null = 0; logsumexp [q_heads, q_tokens] f32 or null.
/// A query that sees no key gets zeros.
void attention_forward(
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    void* out,
    float* logsumexp);

/// dq, dk, dv (strides as q, k, v) from dout, out (stride o_stride) and logsumexp.
void attention_backward(
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    const void* out,
    const float* logsumexp,
    const void* dout,
    void* dq,
    void* dk,
    void* dv);

/// h = x + residual (residual may be null: then h may be null too and h = x);
/// y = h / sqrt(mean(h²) + eps) · weight. Zhang & Sennrich, arXiv:1910.07467.
void add_rms_norm_forward(
    const NormParams& p, const void* x, const void* residual, const void* weight, void* h, void* y);
/// dh_total = dh (may be null) + d/dh of the norm; gradient of x and of residual alike.
/// dweight f32 [dims] or null.
void add_rms_norm_backward(
    const NormParams& p,
    const void* h,
    const void* weight,
    const void* dy,
    const void* dh,
    void* dx,
    float* dweight);

/// cos_sin [tokens, head_dim] f32: cos in the first half, sin in the second, of
/// positions[t]·inv_freq[i], times `factor` (YaRN's attention factor; 1 otherwise). Angles in f64.
void rope_table(
    uint32_t tokens,
    uint32_t head_dim,
    const int32_t* positions,
    const float* inv_freq,
    float factor,
    float* cos_sin);
/// x, y [tokens, heads, head_dim]; y may be x.
void rope(const RopeParams& p, const void* x, const float* cos_sin, void* y);

/// y = gate·sigmoid(gate)·up over `count` elements.
void swiglu_forward(size_t count, DType dtype, const void* gate, const void* up, void* y);
void swiglu_backward(
    size_t count, DType dtype, const void* gate, const void* up, const void* dy, void* dgate, void* dup);

/// Head and loss in one, without the [tokens, vocab] logits in memory (after Liger, arXiv:2410.10989):
/// loss_sum = Σ_t weights[t]·(logsumexp(W·x_t) − (W·x_t)[targets[t]]) as one f32 (summed in f64).
/// Tokens with weight 0 cost nothing. dx [tokens, dims] = d loss_sum / dx, or null for no gradient.
/// token_losses [tokens] f32 (unweighted; 0 where skipped), or null. At most 64 MiB of scratch.
void linear_cross_entropy(
    const LinearCrossEntropyParams& p,
    const void* x,
    const WeightView& head,
    const int32_t* targets,
    const float* weights,
    float* loss_sum,
    void* dx,
    float* token_losses);

struct AdamWResult {
  float grad_norm;   ///< of the scaled gradient, before clipping
  bool skipped;      ///< a gradient was not finite: nothing was changed
};
/// Decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101) over one flat buffer, in place.
/// param, grad, m, v f32 [count]. Clipping as torch.nn.utils.clip_grad_norm_ (norm + 1e-6).
AdamWResult adamw(const AdamWParams& p, float* param, const float* grad, float* m, float* v);

}  // namespace metal_lora::cpu
