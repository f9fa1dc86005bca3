// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The tensor-core product that every tiled LoRA form is made of: one output tile goes on summing
// over several pairs of operands, as if their inner dimensions lay end to end. Forward:
// {x, W} then {u, B}; backward: {dy_i, W_i} of each branch, then {v_i, A_i}.
#pragma once

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// One pair: left [m, k], row-major, and right. right_is_kn = false: right [n, k] row-major (y =
/// left·rightᵀ: W and B of a forward pass); true: right [k, n] row-major (dy·W, v·A). Leading
/// dimensions in elements.
struct GemmPair {
  const void* left = nullptr;
  size_t left_stride = 0;
  const void* right = nullptr;
  size_t right_stride = 0;
  uint32_t k = 0;
};

/// out [m, n] = Σ pairs + bias + residual, rounded once.
struct GemmProblem {
  static constexpr int kMaxPairs = 8;
  uint32_t n = 0;
  int pairs = 0;
  GemmPair pair[kMaxPairs];
  void* out = nullptr;
  size_t out_stride = 0;
  const float* bias = nullptr;     ///< f32 [n] or null
  const void* residual = nullptr;  ///< [m, n] of out's type, or null; may be `out`
  size_t residual_stride = 0;
  /// gemm_sm90 only, 16-bit: f32 [m, head_dim] of rope_table, by which the sums' heads are rotated
  /// before they are rounded; or null. n is a multiple of head_dim, 64 or 128.
  const float* rope = nullptr;
  uint32_t head_dim = 0;
  /// gemm_sm90 only, GemmEnd::plain: f32 [m], by which a row's sums are multiplied; or null.
  const float* row_factors = nullptr;
};

/// gemm_sm90 only, 16-bit: what the next kernel would do to a product, at the end of its tiles.
/// SwiGLU's do not write the problem's own `out`.
enum class GemmEnd : uint8_t {
  plain,
  // What is plain and of 16 bits, n a multiple of 8, in fewer instructions: gemm_sm90 itself
  // chooses them.
  store,     ///< no other terms
  terms,     ///< row factors, biases and rotations
  residual,  ///< biases, and every problem with a residual
  /// Two problems of one n, whose sums are gate and up; their first pairs share left and k. act =
  /// silu(gate)·up of the rounded ones. right_is_kn = false.
  swiglu,
  /// One problem, whose sums are d_act: gate and up become their gradients. right_is_kn = true.
  swiglu_backward,
  /// One problem, whose sums z are logits: out (or null) = exp(z − largest), largest of the row in
  /// the tile's kGemmSoftmaxColumns columns. right_is_kn = false.
  softmax,
  /// The same with one reference for a whole row, whose exponentials need no other factor: out (or
  /// null) = exp(z − reference), infinite where that is more than f32 holds. bf16.
  exponential,
};
constexpr uint32_t kGemmSoftmaxColumns = 256;
struct GemmSoftmax {
  /// f32 [m, ⌈n / kGemmSoftmaxColumns⌉, 2]: largest and Σ exp(z − largest) of unrounded terms;
  /// exponential: [m, ⌈n / kGemmSoftmaxColumns⌉], the sums.
  float* tiles = nullptr;
  const int32_t* targets = nullptr;  ///< [m]; what is not in [0, n) is nobody's
  float* target_logits = nullptr;    ///< f32 [m]
  /// exponential: f32 [m]; +∞: the row's are 0, whatever its logits.
  const float* references = nullptr;
  /// softmax: a word that tells, when the kernel begins, to write nothing (0); or null.
  const uint32_t* only_if = nullptr;
};
struct GemmSwiglu {
  void* gate = nullptr;  ///< swiglu: with up, out or null (both); swiglu_backward: in and out
  void* up = nullptr;
  size_t stride = 0;    ///< of gate and up
  void* act = nullptr;  ///< [m, n] out; swiglu_backward: made again, or null
  size_t act_stride = 0;
  /// swiglu: act·shrinkᵀ of the rounded act, the low-rank half of the linear that reads act, in
  /// gemm_act_parts parts that add_act_parts adds up; or null, and nothing of it.
  float* parts = nullptr;        ///< f32 [parts][m, shrink_rank], room for kGemmActColumns' parts
  const void* shrink = nullptr;  ///< [shrink_rank, n] of the group's dtype
  size_t shrink_stride = 0;
  uint32_t shrink_rank = 0;  ///< a multiple of 8, at most 64
};
/// There are at most ⌈n / kGemmActColumns⌉ parts.
constexpr uint32_t kGemmActColumns = 128;

/// gemm_sm90 only: u = factor · left·rightᵀ inside the launch whose low-rank pairs read it, as a
/// few more, narrow tiles; a tile's first pair runs meanwhile. left and right as in a pair. Parts
/// side by side share left (right_is_kn: one part).
struct GemmShrink {
  static constexpr int kMaxParts = 4;
  struct Part {
    const void* right = nullptr;  ///< [rank, k], or right_is_kn: [k, rank]
    size_t right_stride = 0;
    uint32_t rank = 0;  ///< the ranks' sum, each rounded up to 8, is at most 64
    float factor = 1.0f;
    void* out = nullptr;  ///< [m, rank] of the group's dtype: the left of a second or later pair
    size_t out_stride = 0;
    float* plain = nullptr;  ///< [m, rank] f32 without the factor, or null
  };
  const void* left = nullptr;
  size_t left_stride = 0;
  uint32_t k = 0;
  int parts = 0;
  Part part[kMaxParts];
};

/// Problems of one launch: the same m, dtype and direction, any n.
struct GemmGroup {
  static constexpr int kMaxProblems = 4;
  uint32_t m = 0;
  DType dtype = DType::bf16;      ///< of left and right: bf16 or f16
  DType out_dtype = DType::bf16;  ///< dtype or f32
  bool right_is_kn = false;
  /// gemm_sm90 only: the first pair's operands were written before the kernel that the stream ran
  /// last, so their product may begin while that kernel (say, the shrink that makes the second
  /// pair's left) still runs. A promise about that kernel, too: it was not launched as a
  /// programmatic dependent, or lets its dependents start only after its own griddepcontrol.wait,
  /// or the kernel before it does and the operands are older than that one, too.
  bool pair0_ready = false;
  /// lora_skinny only: no kernel that may still run writes the first pairs' right (W), so that a
  /// block may fill its stages with it before it waits for the kernels ahead.
  bool right0_ready = false;
  /// gemm_sm90 only: the next kernel may be placed when every block of this one has waited for
  /// those ahead, not before: what they wrote, it may read without a wait of its own.
  bool late_dependents = false;
  int problems = 0;
  GemmProblem problem[kMaxProblems];
  GemmEnd end = GemmEnd::plain;
  GemmSwiglu swiglu;
  GemmSoftmax softmax;
  static constexpr int kMaxShrinks = 4;
  int shrinks = 0;  ///< then some problem has a second pair
  GemmShrink shrink[kMaxShrinks];
  /// With shrinks: gemm_flag_count(m) words that are zero and are left so, of no launch that may
  /// run at the same time; or null: scratch that a memset clears, one more node.
  uint32_t* flags = nullptr;
};
constexpr size_t gemm_flag_count(uint32_t m) {
  return 2 * (size_t{m} / 128 + 2);
}

/// Whether gemm_sm90 takes the group: compute capability 9.0, 16-bit storage, every pointer
/// aligned to 16 bytes and every stride (and n of a rotated head, SwiGLU or softmax) a multiple of
/// 8 elements, at most 16 pairs and 36 operands. Otherwise gemm_generic does, but no shrinks,
/// rotation, factors, SwiGLU (nor act·shrinkᵀ) or softmax.
bool can_gemm_sm90(const Context& context, const GemmGroup& group);
/// Whether the group's shrinks cost less inside the launch than before it: there are tiles enough
/// (two waves of 256 columns) and blocks with a tile fewer than others.
bool gemm_hides_shrinks(const Context& context, const GemmGroup& group);
/// How many parts of act·shrinkᵀ gemm_sm90 writes for a group of GemmEnd::swiglu.
uint32_t gemm_act_parts(const Context& context, const GemmGroup& group);
struct ActParts {
  const float* parts = nullptr;  ///< f32 [count][m, rank]
  uint32_t count = 0;
  uint32_t m = 0, rank = 0;  ///< a multiple of 4
  float factor = 1.0f;
  DType dtype = DType::bf16;  ///< of out, 16 bits
  void* out = nullptr;        ///< aligned to 8 bytes
  size_t out_stride = 0;      ///< a multiple of 4
};
/// out [m, rank] = factor · Σ parts, in order.
void add_act_parts(const Context& context, const ActParts& parts);
/// TMA + wgmma, warp-specialised, persistent over the tiles of all problems. m, n, k of any size.
void gemm_sm90(const Context& context, const GemmGroup& group);
/// mma.sync over any shape, stride and alignment (bf16, f16); f32 dtype by FFMA.
void gemm_generic(const Context& context, const GemmGroup& group);
/// The faster of those that take it.
void gemm(const Context& context, const GemmGroup& group);

}  // namespace metal_lora::cuda
