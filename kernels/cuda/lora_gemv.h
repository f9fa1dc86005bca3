// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the forms of lora_gemv share on the host's side: one call, prepared, and who runs it.
#pragma once

#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda::gemv {

inline constexpr uint32_t kMaxBranches = 4;
inline constexpr uint32_t kChunk = 32;     ///< columns that one step of the tensor cores takes
inline constexpr uint32_t kMaxParts = 8;   ///< of a tile of A
inline constexpr uint32_t kTileRows = 16;  ///< rows of W (or of A) that a warp works on

/// A branch as the kernels read it.
struct Branch {
  const char* w = nullptr;
  const char* scales = nullptr;
  const char* biases = nullptr;
  const char* a = nullptr;
  const char* b = nullptr;
  const float* bias = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
  float* u = nullptr;
  uint32_t n = 0, rank = 0;
  uint32_t tile0 = 0;       ///< of its rows among all branches' tiles
  uint32_t rank_tile0 = 0;  ///< of its ranks, padded to tiles
  float scale = 0.0f;       ///< of (x·Aᵀ)·Bᵀ
};

/// Branches of one weight format in one dispatch.
struct Call {
  const void* x = nullptr;
  uint32_t m = 0, k = 0;
  uint32_t branches = 0;
  uint32_t tiles = 0, rank_tiles = 0;
  uint32_t u_parts = 1;                 ///< blocks that share a tile of A, each some columns
  uint32_t u_tiles = 0, all_tiles = 0;  ///< such parts, that come first; none where u is given
  uint32_t chunks = 0;                  ///< k / 32
  uint32_t unit = 1, units = 0;         ///< chunks that stay in one warp, and how many such
  bool x_stays = false;                 ///< x is kept in shared memory; else read from L2
  uint64_t* u = nullptr;     ///< [u_parts, m, 16 rank_tiles], zero: {1, sum} once it is there
  uint32_t* left = nullptr;  ///< blocks that have left
  DType y_dtype = DType::bf16, scales_dtype = DType::f32, adapter_dtype = DType::bf16;
  bool u_given = false;  ///< by an earlier kernel, in every branch's u
  bool wide_b = false;   ///< every B is of x's type, 16-byte aligned, of a rank in eights
  bool double_quant = false;
  bool weights_ready = false;  ///< Context's
  bool only_ask = false;       ///< whether it could be launched
  Branch branch[kMaxBranches];
};

/// x is 16-bit, W of its type or quantised, and columns and pointers are aligned as copies want.
bool can_stream(
    const Context& context, uint32_t k, DType dtype, const void* x, const LoraBranch& branch);
/// Whether the streaming form makes u of this branch in its own dispatch, the branch being alone.
bool fuses_shrink(uint32_t m, DType dtype, const LoraBranch& branch);
/// Whether two branches may share a dispatch of the streaming form.
bool alike(const LoraBranch& a, const LoraBranch& b);
using Launch = bool (*)(const Context&, const Call&, DType, const WeightParams&);
/// The streaming form of branches that are alike, after a shrink of its own where that cannot be in
/// it; false: they need more shared memory than there is. only_ask: launches nothing.
bool stream(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype,
    Launch launch,
    bool only_ask = false);

/// Each: whether the form could take the call (else nothing was launched).
bool launch_dense(const Context& context, const Call& call, DType dtype);
bool launch_int4(const Context& context, const Call& call, DType dtype, uint32_t group_size);
bool launch_int8(const Context& context, const Call& call, DType dtype, uint32_t group_size);
bool launch_nf4(const Context& context, const Call& call, DType dtype);

/// u = drop(x)·Aᵀ/(1-p) of any types, a warp a rank, for the branches that have a rank.
void launch_generic_shrink(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count);
/// Any types, shapes and alignment: two dispatches, a warp a row.
void launch_generic(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype);

}  // namespace metal_lora::cuda::gemv
