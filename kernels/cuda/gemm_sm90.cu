// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The tensor-core product of gemm.h on Hopper: persistent blocks of one warp that feeds a ring of
// swizzled shared-memory stages through the copy engine, and two warpgroups that each hold a
// 64-row half of a tile in registers and multiply straight from the ring (wgmma). The ring does
// not stop between tiles or between the pairs of a tile: the low-rank pair is a few more
// instructions on the same sums, not another kernel.
//
// Ladder: not measured yet.
#include <algorithm>
#include <array>
#include <type_traits>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda {
namespace {

constexpr int kTileM = 128;
constexpr int kStepK = 64;           ///< elements of a 128-byte swizzled row
constexpr int kThreads = 384;        ///< producer, two consumers
constexpr int kBoxBytes = 8192;      ///< 64 x 64 elements
constexpr int kWarpBoxBytes = 2048;  ///< 16 rows of results x 64
constexpr int kMaxPairs = GemmGroup::kMaxProblems * GemmProblem::kMaxPairs;
constexpr int kMaxMaps = 2 * kMaxPairs + GemmGroup::kMaxProblems;

/// The second consumer starts a tile this many steps after the first, so that the matrix unit has
/// the work of the one while the other stores its sums.
#ifndef BAND
#define BAND 8
#endif
#ifndef LEAD
#define LEAD 2
#endif
constexpr uint32_t kLead = LEAD;
constexpr int kLeadBarrier = 3;

struct PairArgs {
  uint32_t begin = 0, k = 0;  ///< columns of left; begin > 0: beyond the maps, so all zeros
  uint16_t left_map = 0, right_map = 0;
};
struct ProblemArgs {
  uint32_t n = 0;
  uint32_t tiles_n = 0;  ///< in tiles of a cluster
  uint32_t first_pair = 0, end_pair = 0;
  uint32_t steps = 0;  ///< of 64 along k, of all pairs
  bool plain = true;   ///< out is the sums alone, 16-bit, in whole 16-byte units
  uint32_t out_map = 0;
  void* out = nullptr;
  size_t out_stride = 0;
  const float* bias = nullptr;
  const void* residual = nullptr;
  size_t residual_stride = 0;
};
struct Args {
  CUtensorMap maps[kMaxMaps];
  PairArgs pair[kMaxPairs];
  ProblemArgs problem[GemmGroup::kMaxProblems];
  uint32_t m = 0;
  uint32_t tiles_m = 0, tiles_n = 0;      ///< in tiles of a cluster; n of all problems
  uint32_t band = 1;                      ///< rows of tiles that are swept together along n
  uint32_t cluster_m = 1, cluster_n = 1;  ///< blocks of a cluster that share columns, rows
  uint32_t cluster_k = 1;                 ///< or parts of the sums; then one tile a cluster
  uint32_t map_count = 0;
  bool pair0_ready = false;
  bool out_f32 = false;
};

template <int kTileN>
struct Layout {
  static constexpr int kLeftBytes = kTileM * kStepK * 2;
  static constexpr int kRightBytes = kTileN * kStepK * 2;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kStages = kTileN == 256 ? 4 : kTileN == 128 ? 6 : 8;
  static constexpr int kStoreOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kStoreOffset + 8 * 2 * kWarpBoxBytes;  ///< 2 of each warp
  static constexpr int kBytes = kBarrierOffset + 2 * kStages * 8 + 1024;       ///< 1024: alignment
};

/// The steps of a tile that this block sums: all, or its part where the cluster splits k.
struct Share {
  uint32_t begin, end;  ///< steps, counted from the one that comes next
  /// The part of the next pair's steps that lies in the share: [first, last).
  __device__ __forceinline__ void take(uint32_t steps, uint32_t& first, uint32_t& last) {
    first = min(begin, steps);
    last = min(end, steps);
    begin -= first;
    end -= last;
  }
};

/// Where a tile of a cluster lies.
struct Tile {
  uint32_t problem, m, n;  ///< the tile's first row and column in units of cluster tiles
};
__device__ __forceinline__ Tile find_tile(const Args& args, uint32_t index) {
  const uint32_t band_tiles = args.band * args.tiles_n;
  const uint32_t band = index / band_tiles;
  const uint32_t rest = index - band * band_tiles;
  const uint32_t height = min(args.band, args.tiles_m - band * args.band);
  Tile tile;
  tile.n = rest / height;
  tile.m = band * args.band + rest - tile.n * height;
  tile.problem = 0;
  while (tile.n >= args.problem[tile.problem].tiles_n) {
    tile.n -= args.problem[tile.problem].tiles_n;
    ++tile.problem;
  }
  return tile;
}

/// The place in the ring: which stage, and the parity of its current round.
template <int kStages>
struct Ring {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// What a block knows of its cluster.
struct Cluster {
  uint32_t rank_m, rank_n, rank_k, parts_k, blocks;
  uint16_t row_mask, column_mask;  ///< blocks with the same rows (left), columns (right)
  __device__ __forceinline__ explicit Cluster(const Args& args) {
    parts_k = args.cluster_k;
    blocks = args.cluster_m * args.cluster_n * parts_k;
    // %cluster_ctarank, but known to the compiler as the same for all threads: it orders wgmma one
    // by one where a branch might diverge.
    const uint32_t rank = blockIdx.x % blocks;
    rank_k = parts_k > 1 ? rank : 0;
    rank_m = parts_k > 1 ? 0 : rank % args.cluster_m;
    rank_n = parts_k > 1 ? 0 : rank / args.cluster_m;
    row_mask = column_mask = 1u << rank;
    for (uint32_t i = 0; parts_k == 1 && i < blocks; ++i) {
      if (i % args.cluster_m == rank_m) row_mask |= 1u << i;
      if (i / args.cluster_m == rank_n) column_mask |= 1u << i;
    }
  }
  __device__ __forceinline__ Share share(uint32_t steps) const {
    const uint32_t half = (steps + 1) / 2;
    if (parts_k == 1) return {0, steps};
    return rank_k == 0 ? Share{0, half} : Share{half, steps};
  }
  __device__ __forceinline__ uint32_t index() const {
    return blocks == 1 ? blockIdx.x : blockIdx.x / blocks;
  }
  __device__ __forceinline__ uint32_t count() const {
    return blocks == 1 ? gridDim.x : gridDim.x / blocks;
  }
};

__device__ __forceinline__ void load_box(
    uint32_t shared,
    const CUtensorMap* map,
    uint32_t barrier,
    uint32_t column,
    uint32_t row,
    uint16_t mask) {
  if ((mask & (mask - 1)) == 0) {
    sm90::tensor_load(shared, map, barrier, column, row);
  } else {
    sm90::tensor_load_multicast(shared, map, barrier, column, row, mask);
  }
}

/// One thread: every stage of every tile of this block. Blocks of a cluster that share an operand
/// load a part each and send it to all.
template <int kTileN, bool kRightIsKn>
__device__ __forceinline__ void produce(
    const Args& args, const Cluster& cluster, uint32_t shared, uint32_t full, uint32_t empty) {
  using L = Layout<kTileN>;
  Ring<L::kStages> ring;
  bool waited = false;
  const uint32_t left_rows = kTileM / args.cluster_n;
  const uint32_t right_rows = (kRightIsKn ? kStepK : kTileN) / args.cluster_m;
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  for (uint32_t index = cluster.index(); index < tiles; index += cluster.count()) {
    const Tile tile = find_tile(args, index);
    const ProblemArgs& problem = args.problem[tile.problem];
    const uint32_t m0 =
        (tile.m * args.cluster_m + cluster.rank_m) * kTileM + cluster.rank_n * left_rows;
    const uint32_t n0 = (tile.n * args.cluster_n + cluster.rank_n) * kTileN;
    Share share = cluster.share(problem.steps);
    for (uint32_t p = problem.first_pair; p < problem.end_pair; ++p) {
      if (!waited && !(args.pair0_ready && p == problem.first_pair)) {
        sm90::dependency_wait();
        waited = true;
      }
      const CUtensorMap* left_map = &args.maps[args.pair[p].left_map];
      const CUtensorMap* right_map = &args.maps[args.pair[p].right_map];
      uint32_t first, last;
      share.take((args.pair[p].k + kStepK - 1) / kStepK, first, last);
      const uint32_t end = args.pair[p].begin + last * kStepK;
      for (uint32_t k0 = args.pair[p].begin + first * kStepK; k0 < end; k0 += kStepK) {
        sm90::barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        const uint32_t barrier = full + 8 * ring.stage;
        const uint32_t left = shared + ring.stage * L::kStageBytes;
        const uint32_t right = left + L::kLeftBytes;
        sm90::barrier_expect(barrier, L::kStageBytes);
        load_box(
            left + cluster.rank_n * left_rows * 128, left_map, barrier, k0, m0, cluster.row_mask);
        const uint32_t part = cluster.rank_m * right_rows;
        if constexpr (kRightIsKn) {
#pragma unroll
          for (int j = 0; j < kTileN / 64; ++j) {
            load_box(
                right + j * kBoxBytes + part * 128,
                right_map,
                barrier,
                n0 + 64 * j,
                k0 + part,
                cluster.column_mask);
          }
        } else {
          load_box(right + part * 128, right_map, barrier, k0, n0 + part, cluster.column_mask);
        }
        ring.advance();
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T low, high;
};

/// Adds bias and residual to the sums of one box of 64 columns: 8 blocks of 8 columns.
template <typename Out>
__device__ __forceinline__ void add_terms(
    float* d, const ProblemArgs& problem, uint32_t m, uint32_t row, uint32_t column) {
  if (problem.bias != nullptr) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t c = column + 8 * j;
      const float low = c < problem.n ? __ldg(problem.bias + c) : 0.0f;
      const float high = c + 1 < problem.n ? __ldg(problem.bias + c + 1) : 0.0f;
      d[4 * j] += low;
      d[4 * j + 1] += high;
      d[4 * j + 2] += low;
      d[4 * j + 3] += high;
    }
  }
  if (problem.residual == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= m) continue;
    const Out* from =
        static_cast<const Out*>(problem.residual) + (row + 8 * half) * problem.residual_stride;
    Two<Out> two[8] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t c = column + 8 * j;
      if (c + 1 < problem.n) {
        two[j] = *reinterpret_cast<const Two<Out>*>(from + c);
      } else if (c < problem.n) {
        two[j].low = from[c];
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      d[4 * j + 2 * half] += to_float(two[j].low);
      d[4 * j + 2 * half + 1] += to_float(two[j].high);
    }
  }
}

/// One box of sums straight to memory, where it is f32 (a quad of lanes writes whole 32-byte
/// sectors) or ends between 16-byte units (the copy engine would write past n).
template <typename Out>
__device__ __forceinline__ void store_direct(
    const float* d, const ProblemArgs& problem, uint32_t m, uint32_t row, uint32_t column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= m) continue;
    Out* to = static_cast<Out*>(problem.out) + (row + 8 * half) * problem.out_stride;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t c = column + 8 * j;
      const Two<Out> two = {
          from_float<Out>(d[4 * j + 2 * half]), from_float<Out>(d[4 * j + 2 * half + 1])};
      if (c + 1 < problem.n) {
        *reinterpret_cast<Two<Out>*>(to + c) = two;
      } else if (c < problem.n) {
        to[c] = two.low;
      }
    }
  }
}

/// One warp's box of 16 rows x 64 columns of 16-bit results through swizzled shared memory: one is
/// filled while the copy engine reads the other.
template <typename T>
__device__ __forceinline__ void store_box(
    const float* d, const CUtensorMap* map, uint32_t to, uint32_t row, uint32_t column) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) sm90::tensor_store_wait_read<1>();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const int chunk = (j + lane / 16) ^ (lane % 8);
    sm90::store_matrix_x4(
        to + lane % 16 * 128 + chunk * 16,
        pack2<T>(d[4 * j], d[4 * j + 1]),
        pack2<T>(d[4 * j + 2], d[4 * j + 3]),
        pack2<T>(d[4 * j + 4], d[4 * j + 5]),
        pack2<T>(d[4 * j + 6], d[4 * j + 7]));
  }
  sm90::async_proxy_fence();
  __syncwarp();
  if (lane == 0) sm90::tensor_store(map, to, column, row);
}

/// One warp's 16 rows of a tile to `out`; `box` counts the boxes it has used. The plain case is
/// apart from the others, so that it is short, straight code: at every tile the instructions come
/// from far away.
template <typename T, int kTileN>
__device__ __forceinline__ void store_tile(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t& box) {
  if (warp_row >= args.m) return;
  const CUtensorMap* map = &args.maps[problem.out_map];
  if (problem.plain) {
#pragma unroll
    for (int b = 0; b < kTileN / 64; ++b) {
      if (n0 + 64 * b >= problem.n) return;
      store_box<T>(&d[32 * b], map, boxes + box * kWarpBoxBytes, warp_row, n0 + 64 * b);
      box ^= 1;
    }
    return;
  }
  const uint32_t row = warp_row + threadIdx.x % 32 / 4;
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    if (n0 + 64 * b >= problem.n) return;
    float* sums = &d[32 * b];
    const uint32_t column = n0 + 64 * b + threadIdx.x % 4 * 2;
    if (args.out_f32) {
      add_terms<float>(sums, problem, args.m, row, column);
      store_direct<float>(sums, problem, args.m, row, column);
      continue;
    }
    add_terms<T>(sums, problem, args.m, row, column);
    if (n0 + 64 * b + 64 > problem.n && problem.n % 8 != 0) {
      store_direct<T>(sums, problem, args.m, row, column);
      continue;
    }
    store_box<T>(sums, map, boxes + box * kWarpBoxBytes, warp_row, n0 + 64 * b);
    box ^= 1;
  }
}

/// One 16-wide slice of a stage.
template <typename T, int kTileN, bool kRightIsKn>
__device__ __forceinline__ void multiply(
    float (&d)[kTileN / 2], uint64_t left, uint64_t right, int slice, int accumulate) {
  constexpr int kRightSlice = kRightIsKn ? 16 * 128 : 32;  // bytes
  sm90::wgmma<T, kRightIsKn ? 1 : 0>(
      d, left + slice * (32 >> 4), right + slice * (kRightSlice >> 4), accumulate);
}

/// Adds up the two blocks' parts of the sums: each block ends with the rows of the warpgroup of its
/// own number. True for that warpgroup. The ring is over: its memory takes the other block's part.
template <int kTileN>
__device__ __forceinline__ bool add_parts(
    float (&d)[kTileN / 2], const Cluster& cluster, uint32_t shared, uint32_t warpgroup) {
  const uint32_t at = shared + threadIdx.x % 128 * 16;
  sm90::cluster_sync();  // both blocks have read their stages
  if (warpgroup != cluster.rank_k) {
#pragma unroll
    for (int i = 0; i < kTileN / 8; ++i) {
      sm90::store_remote(at + i * 2048, cluster.rank_k ^ 1, &d[4 * i]);
    }
  }
  sm90::cluster_sync();
  if (warpgroup != cluster.rank_k) return false;
#pragma unroll
  for (int i = 0; i < kTileN / 8; ++i) sm90::add_shared(&d[4 * i], at + i * 2048);
  return true;
}

/// One warpgroup: 64 rows of every tile of this block.
template <typename T, int kTileN, bool kRightIsKn>
__device__ __forceinline__ void consume(
    const Args& args,
    const Cluster& cluster,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    uint32_t warp) {
  using L = Layout<kTileN>;
  const uint32_t warpgroup = warp / 4;
  Ring<L::kStages> ring;
  bool waited = false;
  uint32_t box = 0;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t boxes = shared + L::kStoreOffset + warp * 2 * kWarpBoxBytes;
  // Lane i of each warp tells block i that its part of a stage has been read.
  const bool releases =
      lane < cluster.blocks && (((cluster.row_mask | cluster.column_mask) >> lane) & 1) != 0;
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  uint32_t index = cluster.index();
  Tile tile = index < tiles ? find_tile(args, index) : Tile{};
  while (index < tiles) {
    const ProblemArgs& problem = args.problem[tile.problem];
    const uint32_t m0 = (tile.m * args.cluster_m + cluster.rank_m) * kTileM + warpgroup * 64;
    const uint32_t n0 = (tile.n * args.cluster_n + cluster.rank_n) * kTileN;
    float d[kTileN / 2];
    int accumulate = 0;
    uint32_t reading = 0;
    Share share = cluster.share(problem.steps);
    // Only where the first consumer cannot be a whole tile ahead: the ring has at most 8 stages.
    uint32_t until_lead = share.end - share.begin > 8 ? kLead : 0;
    if (warpgroup == 1) {
      if (until_lead > 0) sm90::named_barrier(kLeadBarrier, 256);
      until_lead = 0;
    }
    const auto release_previous = [&] {
      sm90::wgmma_wait<1>();
      if (accumulate != 0 && releases) sm90::barrier_arrive_remote(empty + 8 * reading, lane);
      reading = ring.stage;
      accumulate = 1;
      ring.advance();
      if (until_lead > 0 && --until_lead == 0) sm90::named_barrier_arrive(kLeadBarrier, 256);
    };
    for (uint32_t p = problem.first_pair; p < problem.end_pair; ++p) {
      const uint32_t k = args.pair[p].k;
      uint32_t first, last;
      share.take((k + kStepK - 1) / kStepK, first, last);
      // A small rank, or what is left of k: no instruction on slices that are only zeros.
      const uint32_t slices = last * kStepK > k ? (k % kStepK + 15) / 16 % 4 : 0;
      for (uint32_t step = last - first - (slices > 0); step > 0; --step) {
        sm90::barrier_wait(full + 8 * ring.stage, ring.parity);
        const uint32_t stage = shared + ring.stage * L::kStageBytes;
        const uint64_t left = sm90::wgmma_descriptor(stage + warpgroup * 64 * 128, 16);
        const uint64_t right = sm90::wgmma_descriptor(stage + L::kLeftBytes, kBoxBytes);
        sm90::wgmma_fence();
        multiply<T, kTileN, kRightIsKn>(d, left, right, 0, accumulate);
        multiply<T, kTileN, kRightIsKn>(d, left, right, 1, 1);
        multiply<T, kTileN, kRightIsKn>(d, left, right, 2, 1);
        multiply<T, kTileN, kRightIsKn>(d, left, right, 3, 1);
        sm90::wgmma_commit();
        release_previous();
      }
      if (slices == 0) continue;
      sm90::barrier_wait(full + 8 * ring.stage, ring.parity);
      const uint32_t stage = shared + ring.stage * L::kStageBytes;
      const uint64_t left = sm90::wgmma_descriptor(stage + warpgroup * 64 * 128, 16);
      const uint64_t right = sm90::wgmma_descriptor(stage + L::kLeftBytes, kBoxBytes);
      for (uint32_t slice = 0; slice < slices; ++slice) {
        sm90::wgmma_fence();
        multiply<T, kTileN, kRightIsKn>(d, left, right, slice, accumulate | slice);
      }
      sm90::wgmma_commit();
      release_previous();
    }
    index += cluster.count();
    if (index < tiles) tile = find_tile(args, index);  // while the last products run
    sm90::wgmma_wait<0>();
    sm90::wgmma_sums_fence(d);
    if (accumulate != 0 && releases) sm90::barrier_arrive_remote(empty + 8 * reading, lane);
    if (!waited) {  // the kernels before this one may still read or write `out`
      sm90::dependency_wait();
      waited = true;
    }
    if (cluster.parts_k > 1) {
      if (accumulate == 0) {
#pragma unroll
        for (int i = 0; i < kTileN / 2; ++i) d[i] = 0.0f;
      }
      if (!add_parts<kTileN>(d, cluster, shared, warpgroup)) continue;
    }
    store_tile<T, kTileN>(d, args, problem, m0 + warp % 4 * 16, n0, boxes, box);
  }
  if (lane == 0) sm90::tensor_store_wait();
}

template <typename T, int kTileN, bool kRightIsKn>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kTileN>;
  extern __shared__ uint8_t raw[];
  const uint32_t shared = (sm90::shared_address(raw) + 1023) & ~1023u;
  const uint32_t full = shared + L::kBarrierOffset;
  const uint32_t empty = full + 8 * L::kStages;
  const Cluster cluster(args);
  if (threadIdx.x == 0) {
    sm90::dependents_launch();
    // A stage is free when each warp of every block that shares a part of it has said so.
    const uint32_t readers = __popc(cluster.row_mask | cluster.column_mask) * 8;
    for (int i = 0; i < L::kStages; ++i) {
      sm90::barrier_init(full + 8 * i, 1);
      sm90::barrier_init(empty + 8 * i, readers);
    }
    sm90::barrier_init_fence();
  } else if (threadIdx.x >= 32 && threadIdx.x < 32 + args.map_count) {
    sm90::tensor_map_prefetch(&args.maps[threadIdx.x - 32]);
  }
  __syncthreads();
  if (cluster.blocks > 1) sm90::cluster_sync_relaxed();
  // Broadcast: the compiler must know that whole warps take a branch, or it orders wgmma one by
  // one.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int role = warp / 4;
  if (role == 0) {
    sm90::registers_shrink<40>();
    if (threadIdx.x == 0) {
      produce<kTileN, kRightIsKn>(args, cluster, shared, full, empty);
    }
    __syncwarp();
    if (cluster.parts_k > 1) {  // the consumers' add_parts
      sm90::cluster_sync();
      sm90::cluster_sync();
    }
  } else {
    sm90::registers_grow<232>();
    consume<T, kTileN, kRightIsKn>(args, cluster, shared, full, empty, warp - 4);
  }
  // No block leaves while another may still arrive at its barriers.
  if (cluster.blocks > 1) sm90::cluster_sync_relaxed();
#endif
}

// ---- host ----

/// A tile width and cluster, and what a step of 64 along k costs a block (cycles).
struct Form {
  const char* name;
  int tile_n;
  uint32_t cluster_m, cluster_n, cluster_k;
  float step_cycles;
  float tile_cycles;  ///< fill, drain and epilogue of a tile
};
constexpr Form kForms[] = {
    {"128x256, cluster 2x1", 256, 2, 1, 1, 1060, 2500},
    {"128x256", 256, 1, 1, 1, 1150, 2500},
    {"128x128, cluster 2x1", 128, 2, 1, 1, 590, 2000},
    {"128x128, cluster 1x2", 128, 1, 2, 1, 590, 2000},
    {"128x128", 128, 1, 1, 1, 650, 2000},
    {"128x64, cluster 1x2", 64, 1, 2, 1, 420, 1800},
    {"128x64", 64, 1, 1, 1, 400, 1800},
    {"128x256, k in two", 256, 1, 1, 2, 1150, 5000},
    {"128x128, k in two", 128, 1, 1, 2, 650, 4000},
};

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

uint32_t tiles_of(const GemmGroup& group, const Form& form) {
  uint32_t columns = 0;
  for (int i = 0; i < group.problems; ++i) {
    columns += ceil_div(group.problem[i].n, form.tile_n * form.cluster_n);
  }
  return columns * ceil_div(group.m, kTileM * form.cluster_m);
}

/// Blocks that split k have one tile each.
bool fits(const Context& context, const GemmGroup& group, const Form& form) {
  return form.cluster_k == 1 ||
         tiles_of(group, form) * form.cluster_k <= static_cast<uint32_t>(context.multiprocessors);
}

/// The form with the least waves · (steps · cost + fixed cost).
const Form& choose_form(const Context& context, const GemmGroup& group) {
  float steps = 0.0f;  // of a tile, weighted by n
  float columns = 0.0f;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    float k = 0.0f;
    for (int p = 0; p < problem.pairs; ++p) k += problem.pair[p].k;
    steps += k / kStepK * problem.n;
    columns += problem.n;
  }
  steps /= columns;
  const Form* best = nullptr;
  float best_cycles = 0.0f;
  for (const Form& form : kForms) {
    if (!fits(context, group, form)) continue;
    const uint32_t slots =
        context.multiprocessors / (form.cluster_m * form.cluster_n * form.cluster_k);
    const float waves = ceil_div(tiles_of(group, form), slots);
    const float cycles = waves * (steps / form.cluster_k * form.step_cycles + form.tile_cycles);
    if (best == nullptr || cycles < best_cycles) {
      best = &form;
      best_cycles = cycles;
    }
  }
  return *best;
}

/// Puts maps into the arguments; an operand that several problems share has one.
class Maps {
 public:
  Maps(Args& args, DType dtype) : args_(args), dtype_(dtype) {}
  uint16_t add(const void* data, uint32_t rows, uint32_t columns, size_t stride, uint32_t box) {
    const TensorMapRequest request{data, dtype_, rows, columns, stride, box};
    for (uint16_t i = 0; i < count_; ++i) {
      const TensorMapRequest& other = requests_[i];
      if (other.data == data && other.rows == rows && other.columns == columns &&
          other.stride == stride && other.box_rows == box) {
        return i;
      }
    }
    requests_[count_] = request;
    args_.maps[count_] = make_tensor_map(request);
    args_.map_count = ++count_;
    return count_ - 1;
  }

 private:
  Args& args_;
  DType dtype_;
  uint16_t count_ = 0;
  std::array<TensorMapRequest, kMaxMaps> requests_;
};

void fill_args(Args& args, const GemmGroup& group, const Form& form) {
  Maps maps(args, group.dtype);
  args.m = group.m;
  args.cluster_m = form.cluster_m;
  args.cluster_n = form.cluster_n;
  args.cluster_k = form.cluster_k;
  args.tiles_m = ceil_div(group.m, kTileM * form.cluster_m);
  args.pair0_ready = group.pair0_ready;
  args.out_f32 = group.out_dtype == DType::f32;
  const uint32_t left_box = kTileM / form.cluster_n;
  const uint32_t right_box = (group.right_is_kn ? kStepK : form.tile_n) / form.cluster_m;
  int problems = 0;
  uint32_t pairs = 0;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& from = group.problem[i];
    if (from.n == 0) continue;
    ProblemArgs& to = args.problem[problems++];
    to.n = from.n;
    to.tiles_n = ceil_div(from.n, form.tile_n * form.cluster_n);
    args.tiles_n += to.tiles_n;
    to.first_pair = pairs;
    for (int p = 0; p < from.pairs; ++p) {
      const GemmPair& pair = from.pair[p];
      if (pair.k == 0) continue;
      PairArgs& pair_args = args.pair[pairs++];
      pair_args.k = pair.k;
      to.steps += ceil_div(pair.k, kStepK);
      pair_args.left_map = maps.add(pair.left, group.m, pair.k, pair.left_stride, left_box);
      pair_args.right_map =
          group.right_is_kn ? maps.add(pair.right, pair.k, from.n, pair.right_stride, right_box)
                            : maps.add(pair.right, from.n, pair.k, pair.right_stride, right_box);
    }
    if (pairs == to.first_pair) {  // no products: one slice of zeros
      const uint16_t nowhere = maps.add(from.out, 1, 8, 8, left_box);
      const uint16_t right_nowhere = maps.add(from.out, 1, 8, 8, right_box);
      args.pair[pairs++] = {kStepK, 1, nowhere, right_nowhere};
      to.steps = 1;
    }
    to.end_pair = pairs;
    to.out = from.out;
    to.out_stride = from.out_stride;
    to.bias = from.bias;
    to.residual = from.residual;
    to.residual_stride = from.residual_stride;
    to.plain = !args.out_f32 && from.bias == nullptr && from.residual == nullptr && from.n % 8 == 0;
    if (!args.out_f32) to.out_map = maps.add(from.out, group.m, from.n, from.out_stride, 16);
  }
  // About as many rows as columns of tiles are in flight: each operand is read from memory once.
  args.band = std::min<uint32_t>(args.tiles_m, BAND);
}

template <typename T, int kTileN, bool kRightIsKn>
void launch(const Context& context, const Args& args) {
  const auto kernel = gemm_kernel<T, kTileN, kRightIsKn>;
  constexpr int kBytes = Layout<kTileN>::kBytes;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "gemm_sm90");
  const uint32_t blocks = args.cluster_m * args.cluster_n * args.cluster_k;
  const uint32_t slots = context.multiprocessors / blocks;
  cudaLaunchConfig_t config = {};
  config.gridDim = std::min(slots, args.tiles_m * args.tiles_n) * blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = blocks;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, args), "gemm_sm90");
  check_launch("gemm_sm90");
}

template <typename T, bool kRightIsKn>
void launch_width(const Context& context, int tile_n, const Args& args) {
  switch (tile_n) {
    case 256:
      return launch<T, 256, kRightIsKn>(context, args);
    case 128:
      return launch<T, 128, kRightIsKn>(context, args);
    default:
      return launch<T, 64, kRightIsKn>(context, args);
  }
}

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace

bool can_gemm_sm90(const Context& context, const GemmGroup& group) {
  if (context.capability != 90 || group.dtype == DType::f32) return false;
  if (group.out_dtype != group.dtype && group.out_dtype != DType::f32) return false;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    if (!aligned(problem.out) || !aligned(problem.bias) || !aligned(problem.residual) ||
        problem.out_stride % 8 != 0 || problem.residual_stride % 8 != 0) {
      return false;
    }
    for (int p = 0; p < problem.pairs; ++p) {
      const GemmPair& pair = problem.pair[p];
      if (!aligned(pair.left) || !aligned(pair.right) || pair.left_stride % 8 != 0 ||
          pair.right_stride % 8 != 0) {
        return false;
      }
    }
  }
  return true;
}

namespace sm90 {
/// For the bench and the tests: takes form `form` of the table (-1: the cheapest).
int form_count() {
  return static_cast<int>(std::size(kForms));
}
const char* form_name(int form) {
  return kForms[form].name;
}
bool form_fits(const Context& context, const GemmGroup& group, int form) {
  return fits(context, group, kForms[form]);
}
int chosen_form(const Context& context, const GemmGroup& group) {
  return static_cast<int>(&choose_form(context, group) - kForms);
}
void gemm_with_form(const Context& context, const GemmGroup& group, int form_index) {
  uint32_t columns = 0;
  for (int i = 0; i < group.problems; ++i) columns += group.problem[i].n;
  if (group.m == 0 || columns == 0) return;
  const Form& form = form_index < 0 ? choose_form(context, group) : kForms[form_index];
  Args args;
  fill_args(args, group, form);
  if (group.dtype == DType::bf16) {
    group.right_is_kn ? launch_width<bf16, true>(context, form.tile_n, args)
                      : launch_width<bf16, false>(context, form.tile_n, args);
  } else {
    group.right_is_kn ? launch_width<f16, true>(context, form.tile_n, args)
                      : launch_width<f16, false>(context, form.tile_n, args);
  }
}
}  // namespace sm90

void gemm_sm90(const Context& context, const GemmGroup& group) {
  if (!can_gemm_sm90(context, group)) {
    throw std::invalid_argument(
        "[gemm] group must be 16-bit on compute capability 9.0 with pointers aligned to 16 bytes "
        "and strides that are multiples of 8, but is not");
  }
  sm90::gemm_with_form(context, group, -1);
}

}  // namespace metal_lora::cuda
