// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the forms of lora_grad share: its products as the kernels see them, grouped by what they
// read, and where results go.
#pragma once

#include <cmath>

#include "kernels/cuda/lora_kernels.h"
#include "kernels/cuda/skinny.cuh"

namespace metal_lora::cuda::grads {

using namespace skinny;

constexpr uint32_t kMaxGrads = 16;
constexpr uint32_t kMaxParts = 4;  ///< products that share `large`
constexpr uint32_t kRanks = 64;    ///< of a block, all parts together

struct Part {
  const void* small = nullptr;
  uint32_t small_stride = 0;
  uint32_t rank = 0;
  uint32_t first = 0;  ///< rank of the tile: a multiple of 8
  float factor = 1.0f;
  float* grad = nullptr;
  bool transposed = false;
};

/// Products that share `large`.
struct Group {
  const void* large = nullptr;
  size_t large_stride = 0;
  uint32_t columns = 0;
  uint32_t ranks = 0;     ///< of the tiles, parts padded
  uint32_t chunks = 1;    ///< of 64 ranks
  uint32_t end_tile = 0;  ///< tiles of this group and all before it
  uint16_t first_part = 0, parts = 0;
  bool large_vectors = false, small_vectors = false, drop = false;
  DType small_dtype = DType::f32;
  DropMask mask;
};

struct Args {
  uint32_t m = 0, splits = 1, stages = 2;
  uint32_t pairs = 1;  ///< sixteens of ranks that shared memory is laid out for
  uint32_t groups = 0;
  DType large_dtype = DType::bf16;
  Group group[kMaxGrads];
  Part part[kMaxGrads];

  /// Parts of all groups so far.
  uint32_t used_parts() const {
    return groups == 0 ? 0 : uint32_t{group[groups - 1].first_part} + group[groups - 1].parts;
  }
};

/// What a block works on: blocks of a cluster share all but the tokens.
struct Place {
  uint32_t split, group, column0, rank0;
};
__device__ __forceinline__ Place place_of(const Args& args, uint32_t width) {
  const uint32_t tile = blockIdx.x / args.splits;
  uint32_t g = 0, before = 0;
  while (tile >= args.group[g].end_tile) before = args.group[g++].end_tile;
  const uint32_t chunks = args.group[g].chunks;
  return {
      blockIdx.x % args.splits,
      g,
      (tile - before) / chunks * width,
      (tile - before) % chunks * kRanks};
}

/// The part of a group that a rank of its tiles belongs to, or null: padding.
__device__ __forceinline__ const Part* part_of(
    const Args& args, const Group& group, uint32_t rank) {
  for (uint32_t p = group.first_part; p < group.first_part + group.parts; ++p) {
    const Part& part = args.part[p];
    if (rank >= part.first && rank - part.first < part.rank) return &part;
  }
  return nullptr;
}

/// Four neighbouring columns of one rank.
__device__ __forceinline__ void put(
    const Args& args, const Group& group, uint32_t rank, uint32_t column, float4 sum) {
  const Part* part = part_of(args, group, rank);
  if (!part) return;
  const uint32_t r = rank - part->first;
  const float v[4] = {
      part->factor * sum.x, part->factor * sum.y, part->factor * sum.z, part->factor * sum.w};
  if (!part->transposed && group.columns % 4 == 0) {
    float* to = part->grad + size_t{r} * group.columns + column;
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    return;
  }
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (column + i >= group.columns) return;
    part->grad
        [part->transposed ? size_t{column + i} * part->rank + r
                          : size_t{r} * group.columns + column + i] = v[i];
  }
}

/// Sums the block's and the cluster's partial sums [ranks][pitch] and writes them where they
/// belong, along the side on which the results are contiguous.
template <uint32_t kWidth, uint32_t kRowPitch>
__device__ __forceinline__ void finish(
    const Args& args, const Place& place, float* partial, uint32_t warp_groups) {
  const Group& group = args.group[place.group];
  const uint32_t ranks = min(kRanks, group.ranks - place.rank0);
  const uint32_t columns = min(kWidth, group.columns - place.column0);
  const bool by_rank = args.part[group.first_part].transposed;
  const uint32_t ranks_log2 = 32 - __clz(ranks - 1);  // ranks is 8 or more
  constexpr uint32_t kQuads = kWidth / 4;
  const auto rank_of = [&](uint32_t i) {
    return by_rank ? i & ((1u << ranks_log2) - 1) : i / kQuads;
  };
  const auto column_of = [&](uint32_t i) { return (by_rank ? i >> ranks_log2 : i % kQuads) * 4; };
  reduce_tile(
      partial,
      warp_groups,
      kRanks * kRowPitch,
      kQuads << ranks_log2,
      args.splits,
      place.split,
      [&](uint32_t i) {
        return rank_of(i) < ranks && column_of(i) < columns
                   ? static_cast<int>(rank_of(i) * kRowPitch + column_of(i))
                   : -1;
      },
      [&](uint32_t i, float4 sum) {
        put(args, group, place.rank0 + rank_of(i), place.column0 + column_of(i), sum);
      });
}

constexpr uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

/// Gives the groups their tiles of `width` columns of large; how many there are.
inline uint32_t count_tiles(Args& args, uint32_t width) {
  uint32_t tiles = 0;
  for (uint32_t g = 0; g < args.groups; ++g) {
    Group& group = args.group[g];
    group.chunks = ceil_div(group.ranks, kRanks);
    tiles += ceil_div(group.columns, width) * group.chunks;
    group.end_tile = tiles;
  }
  return tiles;
}

/// Splits of the tokens that leave the multiprocessors the least to do one after the other; each
/// doubling has to win 3 % for its sums.
inline uint32_t splits_for(const Context& context, uint32_t tiles, uint32_t steps) {
  uint32_t best = 1;
  double least = 1e30;
  const uint32_t most = context.capability >= 90 ? 8 : 1;
  for (uint32_t splits = 1; splits <= most && splits <= std::max(1u, steps); splits *= 2) {
    const double turns = std::ceil(double(tiles) * splits / context.multiprocessors);
    const double time = turns * ceil_div(steps, splits) * (1.0 + 0.03 * std::log2(splits));
    if (time >= least) continue;
    least = time;
    best = splits;
  }
  return best;
}

/// FFMA: f32, and storage types that do not go together.
void grad_exact(const Context& context, Args& args);

}  // namespace metal_lora::cuda::grads
