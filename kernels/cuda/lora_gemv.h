// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the forms of lora_gemv share on the host's side: one call, prepared, and who runs it.
#pragma once

#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda::gemv {

inline constexpr uint32_t kMaxBranches = 4;
inline constexpr uint32_t kChunk = 32;     ///< columns that one step of the tensor cores takes
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
  DropMask mask;
};

/// Branches of one weight format in one dispatch.
struct Call {
  const void* x = nullptr;
  uint32_t m = 0, k = 0;
  uint32_t branches = 0;
  uint32_t tiles = 0, rank_tiles = 0;
  uint32_t chunks = 0;       ///< k / 32
  uint32_t unit = 1;         ///< chunks that stay in one block
  uint32_t rank_splits = 1;  ///< warps that share a tile of ranks, each a part of the columns
  uint32_t slice_chunks = 0; ///< the most that a block gets
  uint32_t passes = 0;
  DType y_dtype = DType::bf16, scales_dtype = DType::f32, adapter_dtype = DType::bf16;
  bool shrink_by_fma = false;  ///< adapters of another type than x, or dropout
  bool double_quant = false;
  Branch branch[kMaxBranches];
};

/// Each: whether the form could take the call (else nothing was launched).
bool launch_dense(const Context& context, const Call& call, DType dtype);
bool launch_int4(const Context& context, const Call& call, DType dtype, uint32_t group_size);
bool launch_int8(const Context& context, const Call& call, DType dtype, uint32_t group_size);
bool launch_nf4(const Context& context, const Call& call, DType dtype);

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
