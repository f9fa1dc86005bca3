// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Consumers of gemm_sm90.cu that take turns: each warpgroup multiplies a whole 128x128 tile while
// the other ends its own, so that an end of many loads and stores costs the matrix unit nothing. A
// step of a tile costs 3 % more than one of 128x256.
#pragma once

#include "kernels/cuda/gemm_sm90.cuh"

namespace metal_lora::cuda::sm90 {

/// The block's narrow tiles and tiles, one after the other, dealt out to the two warpgroups. One
/// starts to multiply when the other has seen the last stage of the tile before: a barrier that is
/// a whole round behind would look like a full one.
class Turns {
 public:
  __device__ __forceinline__ Turns(const Args& args, const Cluster& cluster, uint32_t warpgroup)
      : warpgroup_(warpgroup) {
    const uint32_t narrow = args.shrinks * args.tiles_m, tiles = args.tiles_m * args.tiles_n;
    const uint32_t from_last = cluster.count() - 1 - cluster.index();
    if (from_last < args.shrink_clusters) left_ += share(narrow, from_last, args.shrink_clusters);
    left_ += share(tiles, cluster.index(), cluster.count());
  }
  /// Whether the next tile is this warpgroup's; then it is its turn.
  __device__ __forceinline__ bool begin() {
    const bool own = turn_ % 2 == warpgroup_;
    if (own && turn_ > 0) named_barrier(1 + warpgroup_, 256);
    ++turn_;
    --left_;
    return own;
  }
  /// The own tile's last stage has been seen.
  __device__ __forceinline__ void end() const {
    if (left_ > 0) named_barrier_arrive(2 - warpgroup_, 256);
  }

 private:
  static __device__ __forceinline__ uint32_t share(uint32_t items, uint32_t first, uint32_t step) {
    return items > first ? (items - first + step - 1) / step : 0;
  }
  uint32_t warpgroup_, turn_ = 0, left_ = 0;
};

/// One 16-wide slice of a stage, into both halves of the rows.
template <typename T, int kWidth, bool kRightIsKn>
__device__ __forceinline__ void multiply_rows(
    float (&d)[2][kWidth / 2], uint32_t stage, int slice, int accumulate) {
  using L = Layout<kTurnTileN, true>;
  const uint64_t right = wgmma_descriptor(stage + L::kLeftBytes, kBoxBytes);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint64_t left = wgmma_descriptor(stage + h * 64 * 128, 16);
    multiply<T, kWidth, kRightIsKn>(d[h], left, right, slice, accumulate);
  }
}

/// One warpgroup, its place in the ring, and how it gives stages back.
template <typename T, bool kRightIsKn>
struct Turner {
  using L = Layout<kTurnTileN, true>;
  Ring<L::kStages> ring;
  uint32_t shared, full, empty, lane, reading = 0;
  bool releases;
  int accumulate = 0;

  __device__ __forceinline__ void skip(uint32_t steps) {
    const uint32_t at = ring.stage + steps;
    ring.stage = at % L::kStages;
    ring.parity ^= at / L::kStages & 1;
  }
  __device__ __forceinline__ void release() const {
    if (releases) barrier_arrive_remote(empty + 8 * reading, lane);
  }
  /// The next stage's first `slices` slices of 16.
  template <int kWidth>
  __device__ __forceinline__ void step(float (&d)[2][kWidth / 2]) {
    const uint32_t stage = begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply_rows<T, kWidth, kRightIsKn>(d, stage, i, i == 0 ? accumulate : 1);
    }
    end();
  }
  template <int kWidth>
  __device__ __forceinline__ void step_partly(float (&d)[2][kWidth / 2], uint32_t slices) {
    const uint32_t stage = begin();
    for (uint32_t i = 0; i < slices; ++i) {
      wgmma_fence();
      multiply_rows<T, kWidth, kRightIsKn>(d, stage, i, accumulate | i);
    }
    end();
  }
  template <int kWidth>
  __device__ __forceinline__ void finish(float (&d)[2][kWidth / 2]) {
    wgmma_wait<0>();
    wgmma_sums_fence(d[0]);
    wgmma_sums_fence(d[1]);
    release();
    accumulate = 0;
  }

 private:
  __device__ __forceinline__ uint32_t begin() {
    barrier_wait(full + 8 * ring.stage, ring.parity);
    wgmma_fence();
    return shared + ring.stage * L::kStageBytes;
  }
  __device__ __forceinline__ void end() {
    wgmma_commit();
    wgmma_wait<1>();
    if (accumulate != 0) release();
    reading = ring.stage;
    accumulate = 1;
    ring.advance();
  }
};

/// 128 rows of a narrow tile.
template <typename T, bool kRightIsKn>
__device__ __forceinline__ void take_shrink(
    const Args& args,
    const ShrinkArgs& shrink,
    Turner<T, kRightIsKn>& turner,
    const Turns& turns,
    uint32_t block,
    uint32_t warp) {
  float d[2][32];
  for (uint32_t step = (shrink.k + kStepK - 1) / kStepK; step > 0; --step) {
    turner.template step<64>(d);
  }
  turns.end();
  turner.template finish<64>(d);
  dependency_wait();  // the kernels before this one may still read `out`
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = block * kTileM + h * 64 + warp % 4 * 16 + turner.lane / 4;
    store_shrink<T>(d[h], shrink, args.m, row);
  }
  async_proxy_fence_global();
  __threadfence();
  named_barrier(3 + warp / 4, 128);
  if (threadIdx.x % 128 == 0) flag_add_release(args.flags + block, 1);
}

template <typename T, bool kRightIsKn, End kEnd>
__device__ __forceinline__ void consume_in_turns(
    const Args& args,
    const Cluster& cluster,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    uint32_t warp) {
  Turner<T, kRightIsKn> turner;
  turner.shared = shared;
  turner.full = full;
  turner.empty = empty;
  turner.lane = threadIdx.x % 32;
  turner.releases = turner.lane < cluster.blocks &&
                    (((cluster.row_mask | cluster.column_mask) >> turner.lane) & 1) != 0;
  Turns turns(args, cluster, warp / 4);
  for_each_shrink(args, cluster, [&](const ShrinkArgs& shrink, uint32_t block) {
    if (turns.begin()) {
      take_shrink<T, kRightIsKn>(args, shrink, turner, turns, block, warp);
    } else {
      turner.skip((shrink.k + kStepK - 1) / kStepK);
    }
  });
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  for (uint32_t index = cluster.index(); index < tiles; index += cluster.count()) {
    const Tile tile = find_tile(args, index);
    const ProblemArgs& problem = args.problem[tile.problem];
    if (!turns.begin()) {
      turner.skip(problem.steps);
      continue;
    }
    float d[2][kTurnTileN / 2];
    for (uint32_t p = problem.first_pair; p < problem.end_pair; ++p) {
      const uint32_t k = args.pair[p].k;
      for (uint32_t step = k / kStepK; step > 0; --step) turner.template step<kTurnTileN>(d);
      // A small rank, or what is left of k: no instruction on slices that are only zeros.
      const uint32_t slices = (k % kStepK + 15) / 16;
      if (slices > 0) turner.template step_partly<kTurnTileN>(d, slices);
    }
    turns.end();
    turner.template finish<kTurnTileN>(d);
    dependency_wait();  // the kernels before this one may still read or write `out`
    const uint32_t m0 = (tile.m * args.cluster_m + cluster.rank_m) * kTileM + warp % 4 * 16;
    const uint32_t n0 =
        (tile.n * args.cluster_n + cluster.rank_n) * kColumns<kTurnTileN, kEnd>;
#pragma unroll
    for (int h = 0; h < 2; ++h) end_rows<T, kEnd>(d[h], args, problem, m0 + 64 * h, n0);
  }
}

}  // namespace metal_lora::cuda::sm90
