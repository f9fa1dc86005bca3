// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The CUDA twins of kernels/cpu/lora_kernels.h: the same views and formulas over device pointers.
// All weights are row_major. Sums are f32 in a fixed order, without float atomics.
#pragma once

#include <span>

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// A base weight, as cpu::WeightView.
struct WeightView {
  WeightParams params;
  const void* data = nullptr;
  const void* scales = nullptr;
  const void* biases = nullptr;
};

/// An adapter: A [rank, k], B [n, rank] in params.dtype. rank 0: none.
struct LoraView {
  LoraParams params;
  const void* a = nullptr;
  const void* b = nullptr;
};

/// One of the projections that share an input x, as cpu::LoraBranch.
struct LoraBranch {
  WeightView weight;
  LoraView lora;
  const float* bias = nullptr;     ///< [n] or null
  const void* residual = nullptr;  ///< forward: added to y, [m, n] of y's dtype, or null
  void* y = nullptr;               ///< forward out [m, n]
  float* u = nullptr;              ///< forward out drop(x)·Aᵀ [m, rank] f32, or null
  const void* dy = nullptr;        ///< backward in [m, n] of x's dtype
  const float* u_saved = nullptr;  ///< backward in: u of the forward pass
  /// Instead of u and u_saved, where keeps_low: scale·u in x's dtype, [m, low_stride(rank)], which
  /// the products of both directions read, so that keeping it costs nothing. Aligned to 16 bytes;
  /// what columns beyond the rank hold is undefined.
  void* low = nullptr;
  float* da = nullptr;  ///< backward out [rank, k] f32, or null
  float* db = nullptr;  ///< backward out [n, rank] f32, or null
};

/// From here on the gradients of a bf16 call read u and v in bf16, as the products do: a quarter
/// of lora_grad's time (33 µs instead of 44 of 4096 tokens, k = n = 4096).
constexpr uint32_t kNarrowTokens = 512;
/// Whether a branch may keep LoraBranch::low between its two directions.
constexpr bool keeps_low(uint32_t m, DType dtype, uint32_t rank) {
  return dtype == DType::bf16 && m >= kNarrowTokens && rank > 0;
}
/// Rows of whole 32-byte sectors: others come slowly.
constexpr uint32_t low_stride(uint32_t rank) {
  return (rank + 15) / 16 * 16;
}

/// Which kernels a linear takes, and why: what `bench --explain` prints.
struct LinearPlan {
  enum class Form { vector, skinny, tiled, generic };
  Form form = Form::generic;
  bool dequantize_first = false;  ///< a quantised W goes through a 16-bit copy in scratch
  bool reads_codes = false;       ///< the tiled product decodes a quantised W itself
  bool fused_shrink = false;      ///< u is worked out inside the one dispatch
  int dispatches = 1;
  const char* why = "";
};
LinearPlan plan_linear(const Context& context, uint32_t m, DType dtype, const LoraBranch& branch);

/// y = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ (+ residual) of every branch; x [m, k] contiguous.
/// Any m, n, k ≥ 0; rank ≤ 1024; count ≤ 4.
void lora_linear_forward(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count);

/// dx = Σ_branches dy·W + mask·(scale·(dy·B)·A)/(1-p) (may be null), dA = scale·(dy·B)ᵀ·drop(x),
/// dB = scale·dyᵀ·u.
void lora_linear_backward(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    void* dx);

// ---- the parts, which the fused steps put together themselves ----

/// out [m, stride ≥ Σ ranks] = factor_i · drop_i(x)·right_i, columns of the branches side by side,
/// rounded once to out_dtype; `plain` [m, rank_i] f32 each (or null) without the factor.
/// right_is_kn = false: right_i [rank_i, k] (A); true: right_i [k, rank_i] (B, of x = dy).
struct ShrinkPart {
  const void* right = nullptr;
  uint32_t rank = 0;
  float factor = 1.0f;
  float dropout = 0.0f;
  uint64_t dropout_seed = 0;
  float* plain = nullptr;
};
struct ShrinkCall {
  uint32_t m = 0, k = 0;
  DType dtype = DType::bf16;        ///< of x
  DType right_dtype = DType::bf16;  ///< of every `right`
  DType out_dtype = DType::bf16;
  bool right_is_kn = false;
  const void* x = nullptr;
  size_t x_stride = 0;
  int parts = 0;
  ShrinkPart part[4];
  void* out = nullptr;
  size_t out_stride = 0;  ///< columns beyond Σ ranks are written as zeros
};
void lora_shrink(const Context& context, const ShrinkCall& call);

/// grad [rank, columns] f32 (transposed = false) or [columns, rank] (true) = factor · smallᵀ·large,
/// small [m, rank] (f32 or 16-bit), large [m, columns] (dA: v and drop(x); dB: u and dy).
struct AdapterGrad {
  const void* small = nullptr;
  size_t small_stride = 0;
  DType small_dtype = DType::f32;
  uint32_t rank = 0;
  const void* large = nullptr;
  size_t large_stride = 0;
  uint32_t columns = 0;
  float factor = 1.0f;
  float dropout = 0.0f;  ///< of large
  uint64_t dropout_seed = 0;
  float* grad = nullptr;
  bool transposed = false;
  bool small_is_new = false;  ///< of the kernel that the stream ran last
};
/// All of one layer's in one launch (two where m is split): count ≤ 16, the same m and dtype.
/// read_early: the kernel that the stream ran last lets its dependents start late
/// (GemmGroup::late_dependents), and wrote no operand but AdapterGrad::small_is_new.
void lora_grad(
    const Context& context,
    uint32_t m,
    DType large_dtype,
    const AdapterGrad* grads,
    size_t count,
    bool read_early = false);

/// v [m, padded_rank] = factor·dy·B, rounded once, and dB [n, rank] f32 = dyᵀ·u of linears whose dy
/// [m, n] is read once for both. B [n, padded_rank] and u [m, padded_rank] are of dy's type; their
/// columns beyond `rank` are zeros.
struct ShrinkGrad {
  const void* dy = nullptr;
  size_t dy_stride = 0;
  uint32_t n = 0, rank = 0, padded_rank = 0;
  float factor = 1.0f;
  const void* b = nullptr;
  const void* u = nullptr;
  size_t u_stride = 0;
  void* v = nullptr;
  float* grad_b = nullptr;
};
/// Hopper, 16-bit types, n a multiple of 64, ranks to 32, one to four linears, all aligned to 16
/// bytes and with strides that are multiples of 8; the sums that the blocks leave within 48 MiB.
bool can_shrink_grad(
    const Context& context, uint32_t m, DType dtype, std::span<const ShrinkGrad> linears);
/// Two launches. Throws std::invalid_argument for what can_shrink_grad does not take.
void lora_shrink_grad(
    const Context& context, uint32_t m, DType dtype, std::span<const ShrinkGrad> linears);

/// Rows of an embedding table and its adapter's gradients; see the CPU twin. ids in [0, n).
void lora_embedding_forward(
    const Context& context,
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightView& table,
    const LoraView& lora,
    void* out);
void lora_embedding_backward(
    const Context& context,
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightParams& table,
    const LoraView& lora,
    const void* dy,
    float* da,
    float* db);

/// Adapters packed side by side, as cpu::LoraBankView.
struct LoraBankView {
  LoraMultiParams params;
  const void* a = nullptr;
  const void* b = nullptr;
  const int32_t* ranks = nullptr;
  const float* scales = nullptr;
};
/// y[t] = W·x[t] + bias + scales[i]·B_i·(A_i·x[t]), i = adapter_index[t]; outside [0, adapters):
/// the base only. A token's result does not depend on the others.
void lora_linear_multi_forward(
    const Context& context,
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& bank,
    const int32_t* adapter_index,
    const float* bias,
    void* y);
void lora_linear_multi_backward(
    const Context& context,
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

/// The largest m of the vector form, which reads W once for all tokens at streaming speed.
inline constexpr uint32_t kVectorMaxTokens = 16;
/// y = x·Wᵀ + … for 1 … kVectorMaxTokens tokens of every branch in one dispatch (with an adapter
/// too); x and y of `dtype`, any weight format. y_dtype: dtype or f32.
void lora_gemv(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype);

}  // namespace metal_lora::cuda
