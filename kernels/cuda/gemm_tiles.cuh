// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the portable products (gemm_generic.cu, gemm_f32.cu) share: which block makes which tile of
// which problem, the walk over the pairs of a tile, and the end of a value.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"

namespace metal_lora::cuda {

struct TiledGroup {
  GemmGroup group;
  uint32_t tiles_m = 0, tiles_n = 0;  ///< n of all problems
  uint32_t problem_tiles_n[GemmGroup::kMaxProblems] = {};
  bool pairs_out = false;  ///< two neighbouring columns may be stored at once
  /// Elements that one copy may move, of each pair's left and right.
  uint8_t left_unit[GemmGroup::kMaxProblems][GemmProblem::kMaxPairs] = {};
  uint8_t right_unit[GemmGroup::kMaxProblems][GemmProblem::kMaxPairs] = {};
};

struct TilePlace {
  uint32_t problem, row0, column0;
};

/// Bands of 8 tiles along m are swept along n together, so that the blocks that run at one time
/// share rows and columns in L2.
template <uint32_t kTile>
__device__ __forceinline__ TilePlace find_tile(const TiledGroup& tiled, uint32_t index) {
  constexpr uint32_t kBand = 8;
  const uint32_t band = index / (kBand * tiled.tiles_n);
  const uint32_t rest = index - band * kBand * tiled.tiles_n;
  const uint32_t height = min(kBand, tiled.tiles_m - band * kBand);
  uint32_t n = rest / height;
  const uint32_t m = band * kBand + rest - n * height;
  uint32_t problem = 0;
  while (n >= tiled.problem_tiles_n[problem]) n -= tiled.problem_tiles_n[problem++];
  return {problem, m * kTile, n * kTile};
}

/// The steps of kStep along k of all pairs of a problem, one after the other. No step crosses from
/// one pair to the next.
template <uint32_t kStep>
__device__ __forceinline__ uint32_t count_steps(const GemmProblem& problem) {
  uint32_t steps = 0;
  for (int p = 0; p < problem.pairs; ++p) steps += (problem.pair[p].k + kStep - 1) / kStep;
  return steps;
}

template <typename T>
__device__ __forceinline__ float with_extras(
    const GemmProblem& problem, float v, uint32_t row, uint32_t column) {
  if (problem.bias) v += problem.bias[column];
  if (problem.residual) {
    v += to_float(static_cast<const T*>(problem.residual)[row * problem.residual_stride + column]);
  }
  return v;
}

/// Tiles of a group; problems of no columns have none.
inline TiledGroup tile_group(const GemmGroup& group, uint32_t tile) {
  TiledGroup tiled;
  tiled.group = group;
  tiled.tiles_m = (group.m + tile - 1) / tile;
  for (int i = 0; i < group.problems; ++i) {
    tiled.problem_tiles_n[i] = (group.problem[i].n + tile - 1) / tile;
    tiled.tiles_n += tiled.problem_tiles_n[i];
  }
  return tiled;
}

/// The most elements (a power of two up to `most`) that one copy of a row-major matrix may move
/// from any multiple of as many columns.
inline uint32_t copy_unit(const void* p, size_t stride, size_t element_bytes, uint32_t most) {
  uint32_t unit = most;
  while (unit > 1 && (stride % unit != 0 || !is_aligned(p, unit * element_bytes))) unit /= 2;
  return unit;
}

/// gemm_generic's f32 form.
void gemm_f32(const Context& context, const GemmGroup& group);

}  // namespace metal_lora::cuda
