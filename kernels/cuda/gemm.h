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
  /// programmatic dependent, or lets its dependents start only after its own griddepcontrol.wait.
  bool pair0_ready = false;
  int problems = 0;
  GemmProblem problem[kMaxProblems];
};

/// Whether gemm_sm90 takes the group: compute capability 9.0, 16-bit storage, every pointer
/// aligned to 16 bytes and every stride a multiple of 8 elements. Otherwise gemm_generic does.
bool can_gemm_sm90(const Context& context, const GemmGroup& group);
/// TMA + wgmma, warp-specialised, persistent over the tiles of all problems. m, n, k of any size.
void gemm_sm90(const Context& context, const GemmGroup& group);
/// mma.sync over any shape, stride and alignment (bf16, f16); f32 dtype by FFMA.
void gemm_generic(const Context& context, const GemmGroup& group);
/// The faster of those that take it.
void gemm(const Context& context, const GemmGroup& group);

}  // namespace metal_lora::cuda
