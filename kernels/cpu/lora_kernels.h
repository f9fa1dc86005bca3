// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/params.h"

namespace metal_lora::cpu {

/// A base weight. row_major affine: data uint32 [n, k·bits/32], scales and biases [n, k/group].
/// cpu_packed: data is the block of pack_weight; scales and biases are null.
struct WeightView {
  WeightParams params;
  const void* data = nullptr;
  const void* scales = nullptr;
  const void* biases = nullptr;
};

/// An adapter: A [rank, k], B [n, rank], both contiguous in params.dtype. rank 0: none.
struct LoraView {
  LoraParams params;
  const void* a = nullptr;
  const void* b = nullptr;
  uint32_t b_stride = 0;  ///< elements between rows of B where not rank (gemv's expansion only)
};

/// One of the projections that share an input x (q, k, v or gate, up).
struct LoraBranch {
  WeightView weight;
  LoraView lora;
  const float* bias = nullptr;     ///< [n] or null
  const void* residual = nullptr;  ///< forward: added to y, [m, n] of y's dtype, or null
  void* y = nullptr;               ///< forward out [m, n] of x's dtype
  float* u = nullptr;  ///< forward out drop(x)·Aᵀ [m, rank] f32, kept for backward; may be null
  const void* dy = nullptr;        ///< backward in [m, n] of x's dtype
  const float* u_saved = nullptr;  ///< backward in: u of the forward pass
  float* da = nullptr;             ///< backward out [rank, k] f32, or null
  float* db = nullptr;             ///< backward out [n, rank] f32, or null
};

/// Forward of every branch: y = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ (+ residual).
/// x [m, k] contiguous, of `dtype`. Any m, n, k ≥ 0, rank ≤ 1024. m ≤ 8 takes the
/// bandwidth-bound form (gemv), more the tiled one (gemm). Sums are f32 in a fixed order.
/// Formula: Hu et al., LoRA (arXiv:2106.09685). Thread-safe.
void lora_linear_forward(
    uint32_t m, uint32_t k, DType dtype, const void* x, const LoraBranch* branches, size_t count);

/// Backward of every branch: dx = Σ_branches dy·W + mask·(scale·(dy·B)·A)/(1-p) (dx may be null),
/// dA = scale·(dy·B)ᵀ·drop(x), dB = scale·dyᵀ·u. dx [m, k] of `dtype`, overwritten.
void lora_linear_backward(
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    void* dx);

/// Rows of an embedding table: out[i] = W[ids[i]] (+ scale·(A[:, ids[i]])ᵀ·Bᵀ when lora.rank > 0:
/// PEFT's lora_embedding_A [rank, vocab], lora_embedding_B [dims, rank]). W [vocab, dims].
/// ids must be in [0, n): the caller checks.
void lora_embedding_forward(
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightView& table,
    const LoraView& lora,
    void* out);

/// Gradients of the adapter of lora_embedding_forward: da [rank, vocab], db [dims, rank], f32,
/// overwritten.
void lora_embedding_backward(
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightParams& table,
    const LoraView& lora,
    const void* dy,
    float* da,
    float* db);

/// Adapters packed side by side: A [adapters, max_rank, k], B [adapters, n, max_rank] in
/// params.dtype, of which adapter i uses its first ranks[i] ≤ max_rank rows and columns; the rest
/// is not read.
struct LoraBankView {
  LoraMultiParams params;
  const void* a = nullptr;
  const void* b = nullptr;
  const int32_t* ranks = nullptr;
  const float* scales = nullptr;
};

/// y[t] = W·x[t] + bias + scales[i]·B_i·(A_i·x[t]), i = adapter_index[t], −1: the base only.
/// x [m, k], y [m, n] of `dtype`; bias [n] or null. m ≤ kGemvMaxTokens takes the bandwidth-bound
/// form, more the tiled one; within a form a token's result is bitwise independent of all others
/// and of the thread count. Indices in [−1, adapters) and ranks in [0, max_rank]: the caller
/// checks. After Chen et al., Punica (arXiv:2310.18547) and Sheng et al., S-LoRA
/// (arXiv:2311.03285). Thread-safe.
void lora_linear_multi_forward(
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& bank,
    const int32_t* adapter_index,
    const float* bias,
    void* y);

/// Its gradients: dx [m, k] of `dtype`; da [adapters, max_rank, k], db [adapters, n, max_rank] f32,
/// summed over each adapter's tokens in order, 0 beyond its rank and for adapters without tokens.
/// Each may be null. A_i·x[t], which dB needs, is worked out again: rank/n of the base's work.
void lora_linear_multi_backward(
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& bank,
    const int32_t* adapter_index,
    const void* dy,
    void* dx,
    float* da,
    float* db);

/// The largest m that takes the gemv form.
inline constexpr uint32_t kGemvMaxTokens = 8;

}  // namespace metal_lora::cpu
