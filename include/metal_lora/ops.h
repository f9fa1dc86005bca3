// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The operations of a LoRA model as MLX arrays: lazy, differentiable where said, dispatched by the
// launch layer. Activations are f32, f16 or bf16; sums are f32. Shapes are checked at the call and
// wrong ones throw Error "[op] x must be …, but is …". Thread-safe as MLX is: one graph, one
// thread. Costs and bad ids are the CPU's here; docs/metal.md says what Metal does otherwise.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

#include "kernels/params.h"
#include "metal_lora/weight.h"

namespace metal_lora {

/// One adapter of one linear: A [rank, in], B [out, rank] (PEFT's shapes), f32, f16 or bf16.
struct Lora {
  mlx::core::array a;
  mlx::core::array b;
  float scale = 1.0f;
  float dropout = 0.0f;
  uint64_t dropout_seed = 0;
};

/// A frozen linear with an optional adapter. bias: f32 [out].
struct LoraLinear {
  Weight weight;
  std::optional<Lora> lora;
  std::optional<mlx::core::array> bias;
};

namespace ops {

/// The device of the active backend's graph nodes: what lies between ops (a reshape, a sum) must be
/// built there too, or a step exported for a GPU would leave it.
mlx::core::StreamOrDevice stream();

/// Memory of the GPU that the active backend works in.
struct DeviceMemory {
  size_t total_bytes = 0;
  size_t peak_bytes = 0;  ///< the most in use so far: weights, activations, scratch
};
/// Nothing where the model lies in the process's own memory (CPU, Metal).
std::optional<DeviceMemory> device_memory();

/// y = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ for each linear; all share x [tokens, in] (q, k, v;
/// gate, up), which is read and converted once. Returns [tokens, out] in x's dtype for each.
/// Differentiable in x, A, B. dA, dB have A's dtype.
std::vector<mlx::core::array> lora_linear(
    const mlx::core::array& x, std::span<const LoraLinear> linears);
mlx::core::array lora_linear(const mlx::core::array& x, const LoraLinear& linear);

/// Adapters of one linear packed for one dispatch: many tenants on one base.
struct LoraBank {
  mlx::core::array a;       ///< [adapters, max_rank, in], f32, f16 or bf16
  mlx::core::array b;       ///< [adapters, out, max_rank], of a's dtype
  mlx::core::array ranks;   ///< int32 [adapters], 0 … max_rank; what lies beyond is not read
  mlx::core::array scales;  ///< f32 [adapters]
};

/// y[t] = W·x[t] + bias + scales[i]·B_i·(A_i·x[t]), i = adapter_index[t] (int32 [tokens]); −1: the
/// base only, at no cost. x [tokens, in], bias f32 [out]; returns [tokens, out] in x's dtype.
/// A token's result depends neither on its neighbours nor on their adapters (bitwise, within the
/// form that the number of tokens chooses: at most 8 tokens, or more). Indices and ranks are
/// checked when the kernel runs. Differentiable in x, A and B; gradients beyond the true rank are
/// 0.
mlx::core::array lora_linear_multi(
    const mlx::core::array& x,
    const Weight& weight,
    const LoraBank& bank,
    const mlx::core::array& adapter_index,
    const std::optional<mlx::core::array>& bias = std::nullopt);

struct Verification {
  mlx::core::array accepted;    ///< int32 [batch]: leading drafts kept, 0 … drafts
  mlx::core::array next_token;  ///< int32 [batch]: the token after them
};
/// Speculative verification: how many drafted tokens the target keeps, and the token that follows.
/// target_logits [batch, drafts + 1, vocab], draft_tokens int32 [batch, drafts], draft_probs f32
/// [batch, drafts, vocab] the distributions they were drawn from (absent: each taken as certain).
/// temperature 0: greedy, drafts are kept while they are the target's argmax (the lowest token of
/// equals). Otherwise rejection sampling (Leviathan et al., arXiv:2211.17192): what comes out is
/// distributed as the target's softmax(logits / temperature). Where a row is no distribution (NaN,
/// +infinity, nothing above -infinity) its sequence ends with next_token −1. Same seed, same
/// result. Not differentiable.
Verification verify_tokens(
    const mlx::core::array& target_logits,
    const mlx::core::array& draft_tokens,
    const std::optional<mlx::core::array>& draft_probs,
    float temperature,
    uint64_t seed);

/// Rows of `table` [vocab, dims] (+ adapter: A [rank, vocab], B [dims, rank]) for ids int32
/// [tokens]; result [tokens, dims] of `dtype`. ids must be in range (checked when the kernel runs).
/// Differentiable in A and B.
mlx::core::array lora_embedding(
    const mlx::core::array& ids, const LoraLinear& table, mlx::core::Dtype dtype);

/// A dense w [out, in] in MLX's affine format; Weight::affine() takes the parts.
struct QuantizedAffine {
  mlx::core::array q;       ///< uint32 [out, in·bits/32]
  mlx::core::array scales;  ///< [out, in/group_size], of w's dtype
  mlx::core::array biases;  ///< as scales
};
/// As mx.quantize's affine mode on MLX's CPU backend, bit for bit on every backend: bits 4 or 8,
/// group_size 32, 64 or 128, a divisor of `in`. w f32, f16 or bf16 and finite. Reads w once. Not
/// differentiable.
QuantizedAffine quantize(const mlx::core::array& w, int bits, int group_size);

/// A dense w [out, in] in NF4 (Dettmers et al., QLoRA, arXiv:2305.14314); Weight::nf4() takes the
/// parts.
struct QuantizedNf4 {
  mlx::core::array q;       ///< uint32 [out, in/8]
  mlx::core::array absmax;  ///< f32 [out, in/64]
};
/// Each block of 64 by its largest magnitude, each weight to the nearest level (of two equally near
/// the lower one), the same bits on every backend. w f32, f16 or bf16 and finite, `in` a multiple
/// of 64. Reads w once. Not differentiable.
QuantizedNf4 quantize_nf4(const mlx::core::array& w);

/// W [out, in] dense: each weight's formula in f32 (affine: one fused multiply-add), rounded once
/// to `dtype`. Reads the weight once. Not differentiable. Row-major weights only where Metal
/// kernels run (Error unsupported for one that was prepared for the CPU).
mlx::core::array dequantize(const Weight& weight, mlx::core::Dtype dtype);

/// The tokens of a batch laid end to end ("packed"): no padding, no leaking between segments.
struct Segments {
  mlx::core::array positions;      ///< int32 [tokens], from 0 in each segment
  mlx::core::array segment_start;  ///< int32 [tokens], index of the segment's first token
};

/// Causal grouped-query attention: q [tokens, q_heads, head_dim], k, v [tokens, kv_heads,
/// head_dim]; token i sees tokens segment_start[i] … i, at most `window` of them (0: all).
/// Flash-style, no [tokens, tokens] matrix. Differentiable in q, k, v.
mlx::core::array attention(
    const mlx::core::array& q,
    const mlx::core::array& k,
    const mlx::core::array& v,
    const mlx::core::array& segment_start,
    float scale,
    int window = 0);

/// Writes k, v [tokens, kv_heads, head_dim] into a layer of the cache [layers, 2, capacity,
/// kv_heads, head_dim] at `position` (int32 scalar: one graph serves all steps), then attends over
/// its first position + tokens entries, which must be at most `capacity` (checked when the kernel
/// runs; Metal cannot refuse and shifts the write into the cache). Returns {out, cache}; the
/// cache's buffer is reused when the caller lets go of it. Inference only.
std::pair<mlx::core::array, mlx::core::array> cached_attention(
    const mlx::core::array& q,
    const mlx::core::array& k,
    const mlx::core::array& v,
    const mlx::core::array& cache,
    int layer,
    const mlx::core::array& position,
    float scale,
    int window = 0);

/// rms_norm(x)·weight over the last axis. Differentiable in x and weight.
mlx::core::array rms_norm(const mlx::core::array& x, const mlx::core::array& weight, float eps);
/// {h, y}: h = x + residual, y = rms_norm(h)·weight. Differentiable in x, residual and weight.
std::pair<mlx::core::array, mlx::core::array> add_rms_norm(
    const mlx::core::array& x,
    const mlx::core::array& residual,
    const mlx::core::array& weight,
    float eps);

/// [tokens, head_dim] f32 of cosines then sines; see cpu::rope_table.
mlx::core::array rope_table(
    const mlx::core::array& positions, const mlx::core::array& inv_freq, float factor = 1.0f);
/// Rotary embedding in NeoX order of x [tokens, heads, head_dim]. Differentiable in x.
mlx::core::array rope(const mlx::core::array& x, const mlx::core::array& table);

/// silu(gate)·up. Differentiable in both.
mlx::core::array swiglu(const mlx::core::array& gate, const mlx::core::array& up);

/// Σ_t weights[t]·(−log softmax(x_t·Wᵀ)[targets[t]]), f32 scalar, without the [tokens, vocab]
/// logits. x [tokens, dims], targets int32 [tokens], weights f32 [tokens]; tokens of weight 0 cost
/// nothing. Differentiable in x (the gradient is made in the same pass; pass needs_grad = false to
/// skip it).
mlx::core::array linear_cross_entropy(
    const mlx::core::array& x,
    const Weight& head,
    const mlx::core::array& targets,
    const mlx::core::array& weights,
    bool needs_grad = true);
/// The unweighted −log softmax of each target [tokens] f32. Not differentiable.
mlx::core::array token_losses(
    const mlx::core::array& x, const Weight& head, const mlx::core::array& targets);

struct AdamWOutput {
  mlx::core::array param, m, v;  ///< f32 [count]
  mlx::core::array grad_norm;    ///< f32 scalar, before clipping
  mlx::core::array skipped;  ///< int32 scalar: 1 when a gradient was not finite, nothing changed
};
/// One AdamW step over one flat f32 buffer, in place where the caller lets go of the inputs.
AdamWOutput adamw(
    const mlx::core::array& param,
    const mlx::core::array& grad,
    const mlx::core::array& m,
    const mlx::core::array& v,
    AdamWParams params);

/// Plain-MLX versions of the above, the truth that tests compare with. Slow on a CPU.
namespace reference {
mlx::core::array lora_linear(const mlx::core::array& x, const LoraLinear& linear);
mlx::core::array lora_linear_multi(
    const mlx::core::array& x,
    const Weight& weight,
    const LoraBank& bank,
    const mlx::core::array& adapter_index,
    const std::optional<mlx::core::array>& bias = std::nullopt);
mlx::core::array lora_embedding(
    const mlx::core::array& ids, const LoraLinear& table, mlx::core::Dtype dtype);
mlx::core::array attention(
    const mlx::core::array& q,
    const mlx::core::array& k,
    const mlx::core::array& v,
    const mlx::core::array& segment_start,
    float scale,
    int window = 0);
mlx::core::array rms_norm(const mlx::core::array& x, const mlx::core::array& weight, float eps);
mlx::core::array rope(const mlx::core::array& x, const mlx::core::array& table);
mlx::core::array swiglu(const mlx::core::array& gate, const mlx::core::array& up);
mlx::core::array linear_cross_entropy(
    const mlx::core::array& x,
    const Weight& head,
    const mlx::core::array& targets,
    const mlx::core::array& weights);
AdamWOutput adamw(
    const mlx::core::array& param,
    const mlx::core::array& grad,
    const mlx::core::array& m,
    const mlx::core::array& v,
    AdamWParams params);
}  // namespace reference

}  // namespace ops
}  // namespace metal_lora
