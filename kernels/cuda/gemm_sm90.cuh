// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernel of gemm_sm90.cu, which says what it does and how fast: producer, consumers that share
// a tile, and the narrow tiles that make u.
#pragma once

#include "kernels/cuda/gemm_sm90_end.cuh"

namespace metal_lora::cuda::sm90 {

__device__ __forceinline__ void load_box(
    uint32_t shared,
    const CUtensorMap* map,
    uint32_t barrier,
    uint32_t column,
    uint32_t row,
    uint16_t mask) {
  if ((mask & (mask - 1)) == 0) {
    tensor_load(shared, map, barrier, column, row);
  } else {
    tensor_load_multicast(shared, map, barrier, column, row, mask);
  }
}

/// Calls f(shrink, 128-row block) for this block's share of the narrow tiles that make u.
template <typename F>
__device__ __forceinline__ void for_each_shrink(const Args& args, const Cluster& cluster, F&& f) {
  const uint32_t items = args.shrinks * args.tiles_m;
  const uint32_t from_last = cluster.count() - 1 - cluster.index();
  if (from_last >= args.shrink_clusters) return;
  for (uint32_t item = from_last; item < items; item += args.shrink_clusters) {
    f(args.shrink[item % args.shrinks], item / args.shrinks * args.cluster_m + cluster.rank_m);
  }
}

/// The producer's view of u: waits until that of a tile's 128 rows is there, once for each of the
/// first 64 blocks of rows; the last tile that saw it clears the flags for the next launch. An
/// answer is looked at a tile later, since a round trip would drain the ring.
class SeenShrinks {
 public:
  __device__ __forceinline__ explicit SeenShrinks(const Args& args) : args_(args) {}
  __device__ __forceinline__ void wait(uint32_t block) {
    if (block < 64 && (ready_ >> block & 1) != 0) return;
    while (flag_load_acquire(args_.flags + block) < args_.shrinks) __nanosleep(64);
    async_proxy_fence_global();
    if (block < 64) ready_ |= uint64_t{1} << block;
  }
  __device__ __forceinline__ void count_tile(uint32_t block) {
    finish();
    block_ = block;
    seen_ = atomicAdd(args_.flags + args_.flag_count + block, 1) + 1;
  }
  __device__ __forceinline__ void finish() const {
    if (seen_ < args_.tiles_n) return;
    args_.flags[args_.flag_count + block_] = 0;
    args_.flags[block_] = 0;
  }

 private:
  const Args& args_;
  uint64_t ready_ = 0;
  uint32_t block_ = 0, seen_ = 0;
};

/// Columns of a tile in its problem: gate and up lie in one tile side by side.
template <int kTileN, GemmEnd kEnd>
constexpr uint32_t kColumns = kEnd == GemmEnd::swiglu ? kTileN / 2 : kTileN;

/// A stage more for a tile that is shrunk at its end: its columns of the [rank, n] operand.
template <int kTileN>
__device__ __forceinline__ void produce_shrink(
    const Args& args,
    const Cluster& cluster,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    Ring<Layout<kTileN, GemmEnd::swiglu>::kStages>& ring,
    uint32_t n0) {
  using L = Layout<kTileN, GemmEnd::swiglu>;
  barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
  const uint32_t barrier = full + 8 * ring.stage;
  barrier_expect(barrier, 2 * 128 * args.swiglu.shrink_rank);
  for (uint32_t half = 0; half < 2; ++half) {
    if (args.cluster_m == 2 && half != cluster.rank_m) continue;
    load_box(
        shared + ring.stage * L::kStageBytes + L::kLeftBytes + half * kBoxBytes,
        &args.maps[args.shrink_map],
        barrier,
        n0 + 64 * half,
        0,
        cluster.column_mask);
  }
  ring.advance();
}

/// The producer's wait.
__device__ __forceinline__ void wait_ahead(const Args& args) {
  dependency_wait();
  if (args.late_dependents) dependents_launch();
}

/// One thread: every stage of every tile of this block. Blocks of a cluster that share an operand
/// load a part each and send it to all.
template <int kTileN, bool kRightIsKn, GemmEnd kEnd>
__device__ __forceinline__ void produce(
    const Args& args, const Cluster& cluster, uint32_t shared, uint32_t full, uint32_t empty) {
  using L = Layout<kTileN, kEnd>;
  Ring<L::kStages> ring;
  bool waited = false;
  const uint32_t left_rows = args.tile_rows / args.cluster_n;
  const uint32_t stage_bytes = (kRightIsKn ? L::kRightBytes : kTileN * 128) + args.tile_rows * 128;
  const uint32_t right_rows = (kRightIsKn ? kStepK : kTileN) / args.cluster_m;
  for_each_shrink(args, cluster, [&](const ShrinkArgs& shrink, uint32_t block) {
    if (!waited) wait_ahead(args);
    waited = true;
    for (uint32_t k0 = 0; k0 < shrink.k; k0 += L::kShrinkSteps * kStepK) {
      barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
      const uint32_t barrier = full + 8 * ring.stage;
      const uint32_t stage = shared + ring.stage * L::kStageBytes;
      barrier_expect(barrier, L::kShrinkSteps * shrink.bytes);
      for (uint32_t step = 0; step < L::kShrinkSteps; ++step) {
        const uint32_t k = k0 + step * kStepK;
        const uint32_t left = stage + step * L::kLeftBytes;
        const uint32_t right = stage + L::kShrinkSteps * L::kLeftBytes + step * kBoxBytes;
        tensor_load(left, &args.maps[shrink.left_map], barrier, k, block * kTileM);
        if (kRightIsKn && shrink.rows) {
          const auto* from = static_cast<const uint8_t*>(shrink.rows) + size_t{k} * 16;
          bulk_load(right, from, kRowsBytes, barrier);
          continue;
        }
        for (uint32_t i = 0; i < shrink.parts; ++i) {
          const CUtensorMap* map = &args.maps[shrink.right_map[i]];
          const uint32_t to = right + shrink.first_block[i] * 1024;
          tensor_load(to, map, barrier, kRightIsKn ? 0 : k, kRightIsKn ? k : 0);
        }
      }
      ring.advance();
    }
  });
  SeenShrinks seen(args);
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  for (uint32_t index = cluster.first_tile(args); index < tiles;
       index = cluster.next_tile(args, index)) {
    const Tile tile = find_tile(args, index);
    const ProblemArgs& problem = args.problem[tile.problem];
    const uint32_t m0 =
        (tile.m * args.cluster_m + cluster.rank_m) * kTileM + cluster.rank_n * left_rows;
    const uint32_t n0 = (tile.n * args.cluster_n + cluster.rank_n) * kColumns<kTileN, kEnd>;
    for (uint32_t b = 0; problem.reads_ahead && b < kTileN / 64; ++b) {
      const CUtensorMap* map = &args.maps[problem.residual_map];
      tensor_prefetch(map, n0 + 64 * b, m0 - cluster.rank_n * left_rows);
    }
    Share share = cluster.share(problem.steps);
    for (uint32_t p = problem.first_pair; p < problem.end_pair; ++p) {
      if (!waited && !(args.pair0_ready && p == problem.first_pair)) {
        wait_ahead(args);
        waited = true;
      }
      if (args.shrinks > 0 && p == problem.first_pair + 1) seen.wait(m0 / kTileM);
      const CUtensorMap* left_map = &args.maps[args.pair[p].left_map];
      const CUtensorMap* right_map = &args.maps[args.pair[p].right_map];
      uint32_t first, last;
      share.take((args.pair[p].k + kStepK - 1) / kStepK, first, last);
      const uint32_t end = args.pair[p].begin + last * kStepK;
      for (uint32_t k0 = args.pair[p].begin + first * kStepK; k0 < end; k0 += kStepK) {
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        const uint32_t barrier = full + 8 * ring.stage;
        const uint32_t left = shared + ring.stage * L::kStageBytes;
        const uint32_t right = left + L::kLeftBytes;
        barrier_expect(barrier, stage_bytes);
        load_box(
            left + cluster.rank_n * left_rows * 128, left_map, barrier, k0, m0, cluster.row_mask);
        const uint32_t part = cluster.rank_m * right_rows;
        if constexpr (kRightIsKn) {
#pragma unroll
          for (int j = 0; j < L::kRightBoxes; ++j) {
            load_box(
                right + j * kBoxBytes + part * 128,
                right_map,
                barrier,
                n0 + 64 * j,
                k0 + part,
                cluster.column_mask);
          }
        } else if constexpr (kEnd == GemmEnd::swiglu) {
          const PairArgs& pair = args.pair[p];
          for (uint32_t up = 0; up < 2; ++up) {
            if (args.cluster_m == 2 && up != cluster.rank_m) continue;
            load_box(
                right + up * kTileN / 2 * 128,
                up ? &args.maps[pair.up_map] : right_map,
                barrier,
                k0,
                (up ? pair.has_up : pair.has_gate) ? n0 : kBeyond,
                cluster.column_mask);
          }
        } else {
          load_box(right + part * 128, right_map, barrier, k0, n0 + part, cluster.column_mask);
        }
        ring.advance();
      }
    }
    if constexpr (kEnd == GemmEnd::swiglu) {
      if (args.swiglu.parts) {
        produce_shrink<kTileN>(args, cluster, shared, full, empty, ring, n0);
      }
    }
    if (args.shrinks > 0) seen.count_tile(m0 / kTileM);
  }
  seen.finish();
  // The block stays until the others of its cluster have arrived at its barriers for the last time.
  if (cluster.blocks == cluster.parts_k) return;
  for (int i = 0; i < L::kStages; ++i, ring.advance()) {
    barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
  }
}

/// One 16-wide slice of a stage.
template <typename T, int kTileN, bool kRightIsKn>
__device__ __forceinline__ void multiply(
    float (&d)[kTileN / 2], uint64_t left, uint64_t right, int slice, int accumulate) {
  constexpr int kRightSlice = kRightIsKn ? 16 * 128 : 32;  // bytes
  wgmma<T, kRightIsKn ? 1 : 0>(
      d, left + slice * (32 >> 4), right + slice * (kRightSlice >> 4), accumulate);
}

/// Adds up the two blocks' parts of the sums: each block ends with the rows of the warpgroup of its
/// own number. True for that warpgroup. The ring is over: its memory takes the other block's part.
template <int kTileN>
__device__ __forceinline__ bool add_parts(
    float (&d)[kTileN / 2], const Cluster& cluster, uint32_t shared, uint32_t warpgroup) {
  const uint32_t at = shared + threadIdx.x % 128 * 16;
  cluster_sync_relaxed();  // both blocks have read their stages
  if (warpgroup != cluster.rank_k) {
#pragma unroll
    for (int i = 0; i < kTileN / 8; ++i) {
      store_remote(at + i * 2048, cluster.other_part, &d[4 * i]);
    }
  }
  cluster_sync();
  if (warpgroup != cluster.rank_k) return false;
#pragma unroll
  for (int i = 0; i < kTileN / 8; ++i) add_shared(&d[4 * i], at + i * 2048);
  return true;
}

/// A warp's 16 rows of u, half of their 64 columns at a time through its box, where a lane finds
/// those of one column: a loop, since instructions that run once a launch cost the time of a fetch.
template <typename T>
__device__ __forceinline__ void store_shrink(
    const float (&d)[32], const ShrinkArgs& shrink, uint32_t m, uint32_t warp_row, uint32_t box) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4;
  const uint32_t rows = warp_row < m ? min(m - warp_row, 16u) : 0;
  // Row r, 8 columns of block b: no bank conflicts but of two rows.
  const auto place = [&](uint32_t r, uint32_t b) { return box + r * 128 + (b ^ r % 4) * 32; };
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
    __syncwarp();
#pragma unroll
    for (uint32_t b = 0; b < 4; ++b) {
      const float* of = &d[16 * half + 4 * b];
      const uint32_t to = place(g, b) + lane % 4 * 8;
      store_shared2(to, of[0], of[1]);
      store_shared2(to + 8 * 128, of[2], of[3]);
    }
    __syncwarp();
    const uint32_t block = 4 * half + lane / 8, p = shrink.part_of_block[block];
    if (p == kMaxParts) continue;
    const GemmShrink::Part& part = shrink.part[p];
    const uint32_t column = (block - shrink.first_block[p]) * 8 + lane % 8;
    if (column >= part.rank) continue;
    T* out = static_cast<T*>(part.out) + warp_row * part.out_stride + column;
    float* plain = part.plain ? part.plain + size_t{warp_row} * part.rank + column : nullptr;
#pragma unroll 4
    for (uint32_t r = 0; r < rows; ++r) {
      const float v = load_shared(place(r, lane / 8) + lane % 8 * 4);
      out[r * part.out_stride] = from_float<T>(v * part.factor);
      if (plain) plain[r * part.rank] = v;
    }
  }
}

/// One warpgroup: 64 rows of this block's narrow tiles, before its others.
template <typename T, int kTileN, bool kRightIsKn, GemmEnd kEnd>
__device__ __forceinline__ void consume_shrinks(
    const Args& args,
    const Cluster& cluster,
    Ring<Layout<kTileN, kEnd>::kStages>& ring,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    uint32_t warp,
    uint32_t box,
    bool releases) {
  using L = Layout<kTileN, kEnd>;
  const uint32_t warpgroup = warp / 4, lane = threadIdx.x % 32;
  for_each_shrink(args, cluster, [&](const ShrinkArgs& shrink, uint32_t block) {
    float d[32];
    int accumulate = 0;
    uint32_t reading = 0;
    constexpr uint32_t kStageK = L::kShrinkSteps * kStepK;
    const bool rows = kRightIsKn && shrink.rows != nullptr;
    const uint32_t right_slice = (rows ? 16 * 16 : kRightIsKn ? 16 * 128 : 32) >> 4;
    for (uint32_t step = (shrink.k + kStageK - 1) / kStageK; step > 0; --step) {
      barrier_wait(full + 8 * ring.stage, ring.parity);
      const uint32_t stage = shared + ring.stage * L::kStageBytes;
      const uint64_t left = wgmma_descriptor(stage + warpgroup * 64 * 128, 16);
      const uint32_t right_at = stage + L::kShrinkSteps * L::kLeftBytes;
      const uint64_t right =
          rows ? wgmma_rows_descriptor(right_at) : wgmma_descriptor(right_at, kBoxBytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4 * L::kShrinkSteps; ++i) {
        wgmma<T, kRightIsKn ? 1 : 0>(
            d,
            left + i / 4 * (L::kLeftBytes >> 4) + i % 4 * (32 >> 4),
            right + i / 4 * (kBoxBytes >> 4) + i % 4 * right_slice,
            i == 0 ? accumulate : 1);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (accumulate != 0 && releases) barrier_arrive_remote(empty + 8 * reading, lane);
      reading = ring.stage;
      accumulate = 1;
      ring.advance();
    }
    wgmma_wait<0>();
    wgmma_sums_fence(d);
    if (releases) barrier_arrive_remote(empty + 8 * reading, lane);
    dependency_wait();  // the kernels before this one may still read `out`
    store_shrink<T>(d, shrink, args.m, block * kTileM + warpgroup * 64 + warp % 4 * 16, box);
    async_proxy_fence();
    async_proxy_fence_global();
    __threadfence();
    named_barrier(3, 256);
    if (threadIdx.x == 128) flag_add_release(args.flags + block, 1);
  });
}

/// One lane: its warp's boxes for the tile's end, when the stores before have read them.
template <int kTileN, GemmEnd kEnd>
__device__ __forceinline__ void load_end_boxes(
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t barrier) {
  constexpr uint32_t kBytes = kTileN / 64 * kWarpBoxBytes;
  constexpr bool kResidual = kEnd == GemmEnd::residual;
  tensor_store_wait_read<0>();
  barrier_expect(barrier, kResidual ? kBytes : 2 * kBytes);
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    const uint32_t to = boxes + b * kWarpBoxBytes, column = n0 + 64 * b;
    const uint32_t map = kResidual ? problem.residual_map : args.gate_map;
    tensor_load(to, &args.maps[map], barrier, column, warp_row);
    if (kResidual) continue;
    tensor_load(to + kBytes, &args.maps[args.up_map], barrier, column, warp_row);
  }
}

/// One warpgroup: 64 rows of every tile of this block.
template <typename T, int kTileN, bool kRightIsKn, GemmEnd kEnd, bool kSplits>
__device__ __forceinline__ void consume(
    const Args& args,
    const Cluster& cluster,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    uint32_t warp) {
  using L = Layout<kTileN, kEnd>;
  const uint32_t warpgroup = warp / 4;
  Ring<L::kStages> ring;
  bool waited = false;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t boxes = shared + L::kStoreOffset + warp * L::kStoreBoxes * kWarpBoxBytes;
  const uint32_t boxes_full = empty + 8 * (L::kStages + warp);
  uint32_t boxes_parity = 0;
  // Lane i of each warp tells block i that its part of a stage has been read.
  const bool releases =
      lane < cluster.blocks && (((cluster.row_mask | cluster.column_mask) >> lane) & 1) != 0;
  if (!kSplits && args.shrinks > 0) {
    consume_shrinks<T, kTileN, kRightIsKn, kEnd>(
        args, cluster, ring, shared, full, empty, warp, boxes, releases);
  }
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  [[maybe_unused]] ActShrink shrink(args);
  bool shrinks_act = false;
  if constexpr (kEnd == GemmEnd::swiglu) shrinks_act = args.swiglu.parts != nullptr;
  uint32_t index = cluster.first_tile(args);
  Tile tile = index < tiles ? find_tile(args, index) : Tile{};
  while (index < tiles) {
    const ProblemArgs& problem = args.problem[tile.problem];
    const uint32_t m0 = (tile.m * args.cluster_m + cluster.rank_m) * kTileM + warpgroup * 64;
    const uint32_t n0 = (tile.n * args.cluster_n + cluster.rank_n) * kColumns<kTileN, kEnd>;
    const uint32_t warp_row = m0 + warp % 4 * 16;
    float d[kTileN / 2];
    int accumulate = 0;
    uint32_t reading = 0;
    Share share = cluster.share(problem.steps);
    const auto release_previous = [&] {
      wgmma_wait<1>();
      if (accumulate != 0 && releases) barrier_arrive_remote(empty + 8 * reading, lane);
      reading = ring.stage;
      accumulate = 1;
      ring.advance();
    };
    for (uint32_t p = problem.first_pair; p < problem.end_pair; ++p) {
      const uint32_t k = args.pair[p].k;
      uint32_t first, last;
      share.take((k + kStepK - 1) / kStepK, first, last);
      // A small rank, or what is left of k: no instruction on slices that are only zeros.
      const uint32_t slices = last > first && last * kStepK > k ? (k % kStepK + 15) / 16 % 4 : 0;
      const auto run_steps = [&](uint32_t steps) {
        for (; steps > 0; --steps) {
          barrier_wait(full + 8 * ring.stage, ring.parity);
          const uint32_t stage = shared + ring.stage * L::kStageBytes;
          const uint64_t left = wgmma_descriptor(stage + warpgroup * 64 * 128, 16);
          const uint64_t right = wgmma_descriptor(stage + L::kLeftBytes, kBoxBytes);
          wgmma_fence();
          multiply<T, kTileN, kRightIsKn>(d, left, right, 0, accumulate);
          multiply<T, kTileN, kRightIsKn>(d, left, right, 1, 1);
          multiply<T, kTileN, kRightIsKn>(d, left, right, 2, 1);
          multiply<T, kTileN, kRightIsKn>(d, left, right, 3, 1);
          wgmma_commit();
          release_previous();
        }
      };
      uint32_t steps = last - first - (slices > 0);
      if (L::kEndBoxes > 0 && p == problem.first_pair) {
        const uint32_t early = min(steps, 4u);
        run_steps(early);
        steps -= early;
        if (!waited) dependency_wait();
        waited = true;
        if (lane == 0) {
          load_end_boxes<kTileN, kEnd>(args, problem, warp_row, n0, boxes, boxes_full);
        }
      }
      run_steps(steps);
      if (slices == 0) continue;
      barrier_wait(full + 8 * ring.stage, ring.parity);
      const uint32_t stage = shared + ring.stage * L::kStageBytes;
      const uint64_t left = wgmma_descriptor(stage + warpgroup * 64 * 128, 16);
      const uint64_t right = wgmma_descriptor(stage + L::kLeftBytes, kBoxBytes);
      for (uint32_t slice = 0; slice < slices; ++slice) {
        wgmma_fence();
        multiply<T, kTileN, kRightIsKn>(d, left, right, slice, accumulate | slice);
      }
      wgmma_commit();
      release_previous();
    }
    if (shrinks_act) shrink.begin_tile(tile.n, warp_row);
    index = cluster.next_tile(args, index);
    if (index < tiles) tile = find_tile(args, index);  // while the last products run
    wgmma_wait<0>();
    wgmma_sums_fence(d);
    const auto release_last = [&] {
      if (releases) barrier_arrive_remote(empty + 8 * reading, lane);
    };
    if (!L::kStoreInRing && accumulate != 0) release_last();
    if (!waited) {  // the kernels before this one may still read or write `out`
      dependency_wait();
      waited = true;
    }
    if constexpr (kSplits) {
      if (accumulate == 0) {
#pragma unroll
        for (int i = 0; i < kTileN / 2; ++i) d[i] = 0.0f;
      }
      if (!add_parts<kTileN>(d, cluster, shared, warpgroup)) continue;
    }
    if (shrinks_act) {  // one more stage, whose left half nobody reads
      release_last();
      barrier_wait(full + 8 * ring.stage, ring.parity);
      reading = ring.stage;
      ring.advance();
    } else if (L::kStoreInRing) {
      named_barrier(1 + warpgroup, 128);  // the warpgroup has read its rows
    }
    const uint32_t in_ring = shared + reading * L::kStageBytes + warp * kWarpBoxBytes;
    if constexpr (L::kEndBoxes > 0) {
      barrier_wait(boxes_full, boxes_parity);
      boxes_parity ^= 1;
    }
    if constexpr (kEnd == GemmEnd::store) {
      if (warp_row < args.m) store_tile<T, kTileN>(d, args, problem, warp_row, n0, boxes, in_ring);
    } else if constexpr (kEnd == GemmEnd::terms) {
      finish_terms<T, kTileN>(d, args, problem, warp_row, n0, boxes, in_ring);
    } else if constexpr (kEnd == GemmEnd::plain) {
      finish_tile<T, kTileN>(d, args, problem, warp_row, n0, boxes, in_ring);
    } else if constexpr (kEnd == GemmEnd::residual) {
      finish_residual<T, kTileN>(d, args, problem, warp_row, n0, boxes);
    } else if constexpr (kEnd == GemmEnd::softmax || kEnd == GemmEnd::exponential) {
      finish_softmax<T, kTileN, kEnd>(d, args, problem, warp_row, n0, boxes, in_ring);
    } else if constexpr (kEnd == GemmEnd::swiglu) {
      const uint32_t right = shared + reading * L::kStageBytes + L::kLeftBytes;
      finish_swiglu<T>(d, args, problem, warp_row, n0, boxes, in_ring, shrink, right);
    } else {
      finish_swiglu_backward<T, kTileN>(d, args, problem, warp_row, n0, boxes);
    }
    if (L::kStoreInRing) release_last();
  }
  if (lane == 0) tensor_store_wait_read<0>();
}

/// kSplits: the blocks of a cluster share a tile's k.
template <typename T, int kTileN, bool kRightIsKn, GemmEnd kEnd, bool kSplits>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kTileN, kEnd>;
  if constexpr (kEnd == GemmEnd::softmax) {
    if (args.softmax.only_if != nullptr) {
      dependency_wait();
      if (*args.softmax.only_if == 0) return;
    }
  }
  extern __shared__ uint8_t raw[];
  const uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t full = shared + L::kBarrierOffset;
  const uint32_t empty = full + 8 * L::kStages;
  const Cluster cluster(args);
  if (threadIdx.x == 0) {
    if (!args.late_dependents) dependents_launch();
    // A stage is free when each warp of every block that shares a part of it has said so.
    const uint32_t readers = __popc(cluster.row_mask | cluster.column_mask) * 8;
    for (int i = 0; i < L::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, readers);
    }
    for (int i = 0; L::kEndBoxes > 0 && i < 8; ++i) {
      barrier_init(empty + 8 * (L::kStages + i), 1);
    }
    barrier_init_fence();
  } else if (threadIdx.x >= 32 && threadIdx.x < 32 + args.map_count) {
    tensor_map_prefetch(&args.maps[threadIdx.x - 32]);
  }
  __syncthreads();
  if (cluster.blocks > 1) cluster_sync_relaxed();
  // Broadcast: the compiler must know that whole warps take a branch, or it orders wgmma one by
  // one.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int role = warp / 4;
  if (role == 0) {
    registers_shrink<56>();
    if (warp == 0 && elect_lane()) {
      produce<kTileN, kRightIsKn, kEnd>(args, cluster, shared, full, empty);
    }
    __syncwarp();
    if constexpr (kSplits) {  // the consumers' add_parts
      cluster_sync_relaxed();
      cluster_sync();
    }
  } else {
    registers_grow<224>();
    consume<T, kTileN, kRightIsKn, kEnd, kSplits>(args, cluster, shared, full, empty, warp - 4);
  }
#endif
}

}  // namespace metal_lora::cuda::sm90
