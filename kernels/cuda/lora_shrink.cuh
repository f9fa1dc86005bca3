// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the forms of lora_shrink share: the call as its kernels see it and where results go.
#pragma once

#include "kernels/cuda/lora_kernels.h"
#include "kernels/cuda/skinny.cuh"

namespace metal_lora::cuda::shrink {

using namespace skinny;

constexpr uint32_t kMaxParts = 4;
constexpr uint32_t kColumns = 64;  ///< of a warp

struct Part {
  const void* right = nullptr;
  float* plain = nullptr;
  float plain_factor = 1.0f, factor = 1.0f;  ///< both with dropout's 1/(1-p)
  uint32_t rank = 0;
  uint32_t first = 0;       ///< column of the tiles: a multiple of 8 (dropout: of 64)
  uint32_t out_column = 0;  ///< Σ ranks before it
  DropMask mask;
  bool drop = false;
};

struct Args {
  uint32_t m = 0, k = 0;
  const void* x = nullptr;
  size_t x_stride = 0;
  DType x_dtype = DType::bf16, right_dtype = DType::bf16, out_dtype = DType::bf16;
  bool right_is_kn = false, x_vectors = false, right_vectors = false, drop = false;
  uint32_t parts = 0;
  Part part[kMaxParts];
  void* out = nullptr;
  size_t out_stride = 0;
  uint32_t out_columns = 0;  ///< Σ ranks
  // How the work is divided.
  uint32_t columns = 0;  ///< of the tiles, parts padded
  uint32_t chunks = 1;   ///< blocks side by side that share the columns
  uint32_t row_warps_log2 = 0;
  uint32_t splits = 1;  ///< of k: blocks of a cluster
  uint32_t stages = 2;
};

/// The part of a column of the tiles; args.parts where it is padding.
__device__ __forceinline__ uint32_t part_of(const Args& args, uint32_t column) {
  for (uint32_t p = 0; p < args.parts; ++p) {
    if (column >= args.part[p].first && column - args.part[p].first < args.part[p].rank) return p;
  }
  return args.parts;
}

/// Writes four neighbours of a row, columns of the tiles, to where they belong.
__device__ __forceinline__ void put(const Args& args, uint32_t row, uint32_t column, float4 sum) {
  const uint32_t p = part_of(args, column);
  if (p == args.parts) return;
  const Part& part = args.part[p];
  const uint32_t r = column - part.first;
  const float v[4] = {sum.x, sum.y, sum.z, sum.w};
  if (part.plain) {
    float* to = part.plain + size_t{row} * part.rank + r;
    const float f = part.plain_factor;
    if (part.rank % 4 == 0) {
      *reinterpret_cast<float4*>(to) = make_float4(f * v[0], f * v[1], f * v[2], f * v[3]);
    } else {
      for (uint32_t i = 0; i < min(4u, part.rank - r); ++i) to[i] = f * v[i];
    }
  }
  if (!args.out) return;
  const size_t at = row * args.out_stride + part.out_column + r;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (r + i < part.rank) store_from_float(args.out, args.out_dtype, at + i, part.factor * v[i]);
  }
}

/// What reduce_tile needs: a quad's row and column of the tile.
struct Quads {
  uint32_t log2;  ///< of the quads of a row
  uint32_t pitch, rows, width;
  __device__ uint32_t row(uint32_t i) const { return i >> log2; }
  __device__ uint32_t column(uint32_t i) const { return (i & ((1u << log2) - 1)) * 4; }
  __device__ uint32_t count() const { return rows << log2; }
  __device__ int place(uint32_t i) const {
    return column(i) < width ? static_cast<int>(row(i) * pitch + column(i)) : -1;
  }
};

/// Zeros beyond Σ ranks; for the blocks of the first columns and share of k.
__device__ __forceinline__ void put_zeros(const Args& args, uint32_t row0, uint32_t rows) {
  if (!args.out || args.out_stride <= args.out_columns) return;
  const auto width = static_cast<uint32_t>(args.out_stride - args.out_columns);
  const uint32_t end = min(args.m, row0 + rows) - row0;
  for (uint32_t i = threadIdx.x; i < end * width; i += blockDim.x) {
    const size_t row = row0 + i / width;
    store_from_float(
        args.out, args.out_dtype, row * args.out_stride + args.out_columns + i % width, 0.0f);
  }
}

/// Where a block stands: blocks of a cluster share rows and columns and split k.
struct Place {
  uint32_t split, column0, row0;
};
__device__ __forceinline__ Place place_of(const Args& args, uint32_t chunk_columns, uint32_t rows) {
  const uint32_t tile = blockIdx.x / args.splits;
  return {blockIdx.x % args.splits, tile % args.chunks * chunk_columns, tile / args.chunks * rows};
}

constexpr uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

/// The copy engine, Hopper. Whether it takes the call: aligned operands of one type, k % 64 == 0.
bool can_shrink_sm90(const Context& context, const Args& args);
void shrink_sm90(const Context& context, Args args);
/// FFMA: f32, and storage types that do not go together.
void shrink_exact(const Context& context, Args args);

}  // namespace metal_lora::cuda::shrink
