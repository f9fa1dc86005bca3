// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The CUDA twins of kernels/cpu/transformer_kernels.h: what a decoder layer needs beside its
// linears. Contiguous unless a stride is given; f32 sums in a fixed order, no float atomics.
#pragma once

#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {

/// Flash attention (Dao et al., arXiv:2205.14135; its second form arXiv:2307.08691). Arguments as
/// the CPU twin's; segment_start [q_tokens] or null. `kv_offset`, where not null, is read on the
/// device and replaces p.kv_offset (p.kv_tokens is then the capacity; the keys are the first
/// *kv_offset + q_tokens): one captured graph serves every position.
void attention_forward(
    const Context& context,
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    void* out,
    float* logsumexp,
    const int32_t* kv_offset = nullptr);
/// rope: rope_table's values for as many keys as queries, by which dq and dk are turned back (q and
/// k have been rotated by them), or null.
void attention_backward(
    const Context& context,
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
    void* dv,
    const float* rope = nullptr);

/// h = x + residual; y = h / sqrt(mean(h²) + eps)·weight. residual and h may be null. y_stride:
/// elements between rows of y (0: dims).
void add_rms_norm_forward(
    const Context& context,
    const NormParams& p,
    const void* x,
    const void* residual,
    const void* weight,
    void* h,
    void* y);
/// dx = dh (may be null) + d/dh of the norm; dweight f32 [dims] or null. dx may be dh or dy.
void add_rms_norm_backward(
    const Context& context,
    const NormParams& p,
    const void* h,
    const void* weight,
    const void* dy,
    const void* dh,
    void* dx,
    float* dweight);

/// [tokens, head_dim] f32: cosines, then sines. Angles in f64, as the CPU twin's.
void rope_table(
    const Context& context,
    uint32_t tokens,
    uint32_t head_dim,
    const int32_t* positions,
    const float* inv_freq,
    float factor,
    float* cos_sin);
/// y may be x.
void rope(
    const Context& context, const RopeParams& p, const void* x, const float* cos_sin, void* y);

/// Rotates q [tokens, q_heads, head_dim] and k [tokens, kv_heads, head_dim] in place in one launch,
/// at the given elements between tokens (both may lie in one [tokens, q|k|v] buffer). cos_sin as
/// rope_table makes it.
struct RopePairParams {
  uint32_t tokens = 0, q_heads = 0, kv_heads = 0, head_dim = 0;
  size_t q_stride = 0, k_stride = 0;
  DType dtype = DType::bf16;
  bool inverse = false;  ///< the backward pass turns the other way
};
void rope_pair(
    const Context& context, const RopePairParams& p, void* q, void* k, const float* cos_sin);

/// SwiGLU of gate_up [tokens, gate (ffn) | up (ffn)]: act [tokens, ffn].
void swiglu_pair_forward(
    const Context& context,
    uint32_t tokens,
    uint32_t ffn,
    DType dtype,
    const void* gate_up,
    void* act);
/// gate_up is overwritten by its gradient, from d_act [tokens, ffn]; act [tokens, ffn] is made
/// again beside it where not null (so that nobody need keep it).
void swiglu_pair_backward(
    const Context& context,
    uint32_t tokens,
    uint32_t ffn,
    DType dtype,
    void* gate_up,
    const void* d_act,
    void* act);

/// y = silu(gate)·up; dgate and dup may be gate and up.
void swiglu_forward(
    const Context& context, size_t count, DType dtype, const void* gate, const void* up, void* y);
void swiglu_backward(
    const Context& context,
    size_t count,
    DType dtype,
    const void* gate,
    const void* up,
    const void* dy,
    void* dgate,
    void* dup);

/// As the CPU twin: loss_sum f32 [1], dx or null, token_losses or null. Works through blocks of
/// tokens whose logits fit `scratch` (at most ≈ 256 MiB). Tokens of weight 0 get loss and dx 0 and
/// may hold anything. Targets of tokens that count must be in range: the caller checks.
void linear_cross_entropy(
    const Context& context,
    const LinearCrossEntropyParams& p,
    const void* x,
    const WeightView& head,
    const int32_t* targets,
    const float* weights,
    float* loss_sum,
    void* dx,
    float* token_losses);

/// In place over one flat buffer; grad_norm f32 [1] and skipped int32 [1] are device memory. Where
/// a scaled gradient is not finite nothing changes and *skipped = 1.
void adamw(
    const Context& context,
    const AdamWParams& p,
    float* param,
    const float* grad,
    float* m,
    float* v,
    float* grad_norm,
    int32_t* skipped);

/// Speculative verification: the same bits as cpu::verify_tokens.
void verify_tokens(
    const Context& context,
    const VerifyParams& p,
    const void* logits,
    const int32_t* draft_tokens,
    const float* draft_probs,
    int32_t* accepted,
    int32_t* next_token);

/// to[i] = from[i] in another storage type.
void cast(
    const Context& context,
    size_t count,
    const void* from,
    DType from_dtype,
    void* to,
    DType to_dtype);

}  // namespace metal_lora::cuda
