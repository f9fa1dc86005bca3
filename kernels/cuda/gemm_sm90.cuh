// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernel of gemm_sm90.cu, which says what it does and how fast.
#pragma once

#include <type_traits>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::sm90 {

constexpr int kTileM = 128;
constexpr int kStepK = 64;           ///< elements of a 128-byte swizzled row
constexpr int kThreads = 384;        ///< producer, two consumers
constexpr int kBoxBytes = 8192;      ///< 64 x 64 elements
constexpr int kWarpBoxBytes = 2048;  ///< 16 rows of results x 64
constexpr int kMaxPairs = GemmGroup::kMaxProblems * GemmProblem::kMaxPairs;
constexpr int kShrinkTileN =
    256;  ///< the tile width whose stages hold two of a narrow tile's steps
constexpr int kMaxShrinks = GemmGroup::kMaxShrinks;
constexpr int kMaxParts = GemmShrink::kMaxParts;
constexpr int kMaxMaps = 2 * kMaxPairs + GemmGroup::kMaxProblems + kMaxShrinks * (1 + kMaxParts);

struct PairArgs {
  uint32_t begin = 0, k = 0;  ///< columns of left; begin > 0: beyond the maps, so all zeros
  uint16_t left_map = 0, right_map = 0;
};
struct ProblemArgs {
  uint32_t n = 0;
  uint32_t tiles_n = 0;  ///< in tiles of a cluster
  uint32_t first_pair = 0, end_pair = 0;
  uint32_t steps = 0;  ///< of 64 along k, of all pairs
  uint32_t out_map = 0;
  void* out = nullptr;
  size_t out_stride = 0;
  const float* bias = nullptr;
  const void* residual = nullptr;
  size_t residual_stride = 0;
};
struct ShrinkArgs {
  uint32_t k = 0;
  uint32_t bytes = 0;  ///< of a stage
  uint16_t left_map = 0;
  uint16_t parts = 0;
  uint16_t right_map[kMaxParts];
  uint16_t first_block[kMaxParts];  ///< of 8 columns
  uint8_t part_of_block[8];         ///< kMaxParts: none
  GemmShrink::Part part[kMaxParts];
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
  ShrinkArgs shrink[kMaxShrinks];
  uint32_t shrinks = 0;
  uint32_t shrink_clusters = 0;  ///< the last clusters, which have fewest tiles, make u
  uint32_t* flags = nullptr;     ///< of each 128 rows: shrinks done; then tiles that have seen it
  uint32_t flag_count = 0;
  bool pair0_ready = false;
  bool out_f32 = false;
};

template <int kTileN>
struct Layout {
  static constexpr int kLeftBytes = kTileM * kStepK * 2;
  static constexpr int kRightBytes = kTileN * kStepK * 2;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kStages = kTileN >= 192 ? 4 : kTileN == 128 ? 6 : 8;
  /// Boxes of results of each warp: a tile's, less where there is no room. Then one more lies in
  /// the tile's last stage, see store_tile.
  static constexpr int kStoreBoxes = kTileN == 256 ? 2 : kTileN / 64;
  static constexpr bool kStoreInRing = kTileN == 256;
  static constexpr int kStoreOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kStoreOffset + 8 * kStoreBoxes * kWarpBoxBytes;
  static constexpr int kBytes = kBarrierOffset + 2 * kStages * 8 + 1024;  ///< 1024: alignment
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
  uint32_t other_part;             ///< the block with the other part of the sums
  uint16_t row_mask, column_mask;  ///< blocks with the same rows (left), columns (right)
  __device__ __forceinline__ explicit Cluster(const Args& args) {
    parts_k = args.cluster_k;
    const uint32_t plane = args.cluster_m * args.cluster_n;
    blocks = plane * parts_k;
    // %cluster_ctarank, but known to the compiler as the same for all threads: it orders wgmma one
    // by one where a branch might diverge.
    const uint32_t rank = blockIdx.x % blocks;
    rank_k = rank / plane;
    rank_m = rank % plane % args.cluster_m;
    rank_n = rank % plane / args.cluster_m;
    other_part = (rank + plane) % blocks;
    row_mask = column_mask = 0;
    for (uint32_t i = 0; i < plane; ++i) {
      const uint32_t bit = 1u << (rank_k * plane + i);
      if (i % args.cluster_m == rank_m) row_mask |= bit;
      if (i / args.cluster_m == rank_n) column_mask |= bit;
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

/// Until u of these 128 rows is there; the last tile that saw it clears the flags for the next
/// launch.
__device__ __forceinline__ void wait_for_shrinks(const Args& args, uint32_t block) {
  while (flag_load_acquire(args.flags + block) < args.shrinks) __nanosleep(64);
  async_proxy_fence_global();
}
__device__ __forceinline__ void count_tile(const Args& args, uint32_t block) {
  uint32_t* seen = args.flags + args.flag_count + block;
  if (atomicAdd(seen, 1) + 1 < args.tiles_n) return;
  *seen = 0;
  args.flags[block] = 0;
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
  if (kTileN == kShrinkTileN)
    for_each_shrink(args, cluster, [&](const ShrinkArgs& shrink, uint32_t block) {
      if (!waited) dependency_wait();
      waited = true;
      for (uint32_t k0 = 0; k0 < shrink.k; k0 += 2 * kStepK) {
        barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        const uint32_t barrier = full + 8 * ring.stage;
        const uint32_t stage = shared + ring.stage * L::kStageBytes;
        barrier_expect(barrier, 2 * shrink.bytes);
        for (uint32_t half = 0; half < 2; ++half) {
          const uint32_t k = k0 + half * kStepK;
          const uint32_t left = stage + half * L::kLeftBytes;
          const uint32_t right = stage + 2 * L::kLeftBytes + half * kBoxBytes;
          tensor_load(left, &args.maps[shrink.left_map], barrier, k, block * kTileM);
          for (uint32_t i = 0; i < shrink.parts; ++i) {
            const CUtensorMap* map = &args.maps[shrink.right_map[i]];
            const uint32_t to = right + shrink.first_block[i] * 1024;
            tensor_load(to, map, barrier, kRightIsKn ? 0 : k, kRightIsKn ? k : 0);
          }
        }
        ring.advance();
      }
    });
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
        dependency_wait();
        waited = true;
      }
      if (kTileN == kShrinkTileN && args.shrinks > 0 && p == problem.first_pair + 1)
        wait_for_shrinks(args, m0 / kTileM);
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
        barrier_expect(barrier, L::kStageBytes);
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
    if (kTileN == kShrinkTileN && args.shrinks > 0) count_tile(args, m0 / kTileM);
  }
  // The block stays until the others of its cluster have arrived at its barriers for the last time.
  if (cluster.blocks == cluster.parts_k) return;
  for (int i = 0; i < L::kStages; ++i, ring.advance()) {
    barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
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

/// One warp's box of 16 rows x 64 columns of 16-bit results, swizzled, to shared memory.
template <typename T>
__device__ __forceinline__ void put_box(const float* d, uint32_t to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const int chunk = (j + lane / 16) ^ (lane % 8);
    store_matrix_x4(
        to + lane % 16 * 128 + chunk * 16,
        pack2<T>(d[4 * j], d[4 * j + 1]),
        pack2<T>(d[4 * j + 2], d[4 * j + 3]),
        pack2<T>(d[4 * j + 4], d[4 * j + 5]),
        pack2<T>(d[4 * j + 6], d[4 * j + 7]));
  }
}

/// The same box straight to memory: pairs of lanes trade halves, so that each quad writes whole
/// 32-byte sectors. n is a multiple of 8.
template <typename T>
__device__ __forceinline__ void store_sectors(
    const float* d, const ProblemArgs& problem, uint32_t m, uint32_t warp_row, uint32_t column) {
  const uint32_t lane = threadIdx.x % 32, odd = lane % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = warp_row + lane / 4 + 8 * half;
    const uint32_t first = column + 8 * odd + lane % 4 / 2 * 4;
    T* to = static_cast<T*>(problem.out) + row * problem.out_stride + first;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t a = pack2<T>(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
      const uint32_t b = pack2<T>(d[4 * j + 4 + 2 * half], d[4 * j + 5 + 2 * half]);
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
      if (row < m && first + 8 * j < problem.n) {
        *reinterpret_cast<uint2*>(to + 8 * j) = odd ? make_uint2(got, b) : make_uint2(a, got);
      }
    }
  }
}

/// One warp's 16 rows of a tile to `out`, 16-bit, n a multiple of 8: through shared memory by the
/// copy engine, without a wait for it, so that the matrix unit does not wait either. The box of
/// columns 0 … 63 of a 256-wide tile lies in the tile's last stage, where it takes the rows of the
/// left operand that this warp alone multiplied; columns 192 … 255 have no room and go directly.
/// One fence for all boxes: a fence a box was a third of the epilogue's 2300 cycles.
template <typename T, int kTileN>
__device__ __forceinline__ void store_tile(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t in_ring) {
  using L = Layout<kTileN>;
  constexpr int kBoxes = L::kStoreInRing + L::kStoreBoxes;
  const bool first_lane = threadIdx.x % 32 == 0;
  const auto address = [&](int b) {
    return L::kStoreInRing && b == 0 ? in_ring : boxes + (b - L::kStoreInRing) * kWarpBoxBytes;
  };
  if (first_lane) tensor_store_wait_read<0>();  // the tile before
  __syncwarp();
#pragma unroll
  for (int b = 0; b < kBoxes; ++b) put_box<T>(&d[32 * b], address(b));
  async_proxy_fence();
  __syncwarp();
  if (first_lane) {
    const CUtensorMap* map = &args.maps[problem.out_map];
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      if (n0 + 64 * b < problem.n) tensor_store(map, address(b), n0 + 64 * b, warp_row);
    }
  }
  if constexpr (kBoxes < kTileN / 64) {
    static_assert(kBoxes + 1 == kTileN / 64);
    store_sectors<T>(&d[32 * kBoxes], problem, args.m, warp_row, n0 + 64 * kBoxes);
  }
  if constexpr (L::kStoreInRing) {  // before the stage is released
    if (first_lane) {
      if (n0 + 128 < problem.n) {  // three stores, the first from the stage
        tensor_store_wait_read<2>();
      } else {
        tensor_store_wait_read<0>();
      }
    }
    __syncwarp();
  }
}

/// The same for f32 results, and for n that ends between 16-byte units (the copy engine would write
/// past it).
template <typename Out, int kTileN>
__device__ __forceinline__ void store_tile_direct(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t row,
    uint32_t n0) {
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    const uint32_t column = n0 + 64 * b + threadIdx.x % 4 * 2;
    store_direct<Out>(&d[32 * b], problem, args.m, row, column);
  }
}

/// Bias and residual, then one of the above.
template <typename T, int kTileN>
__device__ __forceinline__ void finish_tile(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t in_ring) {
  if (warp_row >= args.m) return;
  const uint32_t row = warp_row + threadIdx.x % 32 / 4;
  if (problem.bias != nullptr || problem.residual != nullptr) {
#pragma unroll
    for (int b = 0; b < kTileN / 64; ++b) {
      const uint32_t column = n0 + 64 * b + threadIdx.x % 4 * 2;
      if (args.out_f32) {
        add_terms<float>(&d[32 * b], problem, args.m, row, column);
      } else {
        add_terms<T>(&d[32 * b], problem, args.m, row, column);
      }
    }
  }
  if (args.out_f32) {
    store_tile_direct<float, kTileN>(d, args, problem, row, n0);
  } else if (problem.n % 8 != 0) {
    store_tile_direct<T, kTileN>(d, args, problem, row, n0);
  } else {
    store_tile<T, kTileN>(d, args, problem, warp_row, n0, boxes, in_ring);
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

/// One thread's part of a warpgroup's 64 rows of u: 8 blocks of 8 columns.
template <typename T>
__device__ __forceinline__ void store_shrink(
    const float (&d)[32], const ShrinkArgs& shrink, uint32_t m, uint32_t row) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (shrink.part_of_block[j] == kMaxParts) continue;
    const GemmShrink::Part& part = shrink.part[shrink.part_of_block[j]];
    const uint32_t c = (j - shrink.first_block[shrink.part_of_block[j]]) * 8 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t r = row + i / 2 * 8, column = c + i % 2;
      if (r >= m || column >= part.rank) continue;
      static_cast<T*>(part.out)[r * part.out_stride + column] =
          from_float<T>(d[4 * j + i] * part.factor);
      if (part.plain) part.plain[size_t{r} * part.rank + column] = d[4 * j + i];
    }
  }
}

/// One warpgroup: 64 rows of this block's narrow tiles, before its others.
template <typename T, int kTileN, bool kRightIsKn>
__device__ __forceinline__ void consume_shrinks(
    const Args& args,
    const Cluster& cluster,
    Ring<Layout<kTileN>::kStages>& ring,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    uint32_t warp,
    bool releases) {
  using L = Layout<kTileN>;
  const uint32_t warpgroup = warp / 4, lane = threadIdx.x % 32;
  for_each_shrink(args, cluster, [&](const ShrinkArgs& shrink, uint32_t block) {
    float d[32];
    int accumulate = 0;
    uint32_t reading = 0;
    for (uint32_t step = (shrink.k + 2 * kStepK - 1) / (2 * kStepK); step > 0; --step) {
      barrier_wait(full + 8 * ring.stage, ring.parity);
      const uint32_t stage = shared + ring.stage * L::kStageBytes;
      const uint64_t left = wgmma_descriptor(stage + warpgroup * 64 * 128, 16);
      const uint64_t right = wgmma_descriptor(stage + 2 * L::kLeftBytes, kBoxBytes);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // two steps of 64 lie in one stage
        multiply<T, 64, kRightIsKn>(
            d,
            left + i / 4 * (L::kLeftBytes >> 4),
            right + i / 4 * (kBoxBytes >> 4),
            i % 4,
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
    store_shrink<T>(d, shrink, args.m, block * kTileM + warpgroup * 64 + warp % 4 * 16 + lane / 4);
    async_proxy_fence_global();
    __threadfence();
    named_barrier(3, 256);
    if (threadIdx.x == 128) flag_add_release(args.flags + block, 1);
  });
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
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t boxes = shared + L::kStoreOffset + warp * L::kStoreBoxes * kWarpBoxBytes;
  // Lane i of each warp tells block i that its part of a stage has been read.
  const bool releases =
      lane < cluster.blocks && (((cluster.row_mask | cluster.column_mask) >> lane) & 1) != 0;
  if (kTileN == kShrinkTileN && args.shrinks > 0) {
    consume_shrinks<T, kTileN, kRightIsKn>(
        args, cluster, ring, shared, full, empty, warp, releases);
  }
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
      for (uint32_t step = last - first - (slices > 0); step > 0; --step) {
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
    index += cluster.count();
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
    if (cluster.parts_k > 1) {
      if (accumulate == 0) {
#pragma unroll
        for (int i = 0; i < kTileN / 2; ++i) d[i] = 0.0f;
      }
      if (!add_parts<kTileN>(d, cluster, shared, warpgroup)) continue;
    }
    if (L::kStoreInRing) named_barrier(1 + warpgroup, 128);  // the warpgroup has read its rows
    const uint32_t in_ring = shared + reading * L::kStageBytes + warp * kWarpBoxBytes;
    finish_tile<T, kTileN>(d, args, problem, m0 + warp % 4 * 16, n0, boxes, in_ring);
    if (L::kStoreInRing) release_last();
  }
  if (lane == 0) tensor_store_wait_read<0>();
}

template <typename T, int kTileN, bool kRightIsKn>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kTileN>;
  extern __shared__ uint8_t raw[];
  const uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t full = shared + L::kBarrierOffset;
  const uint32_t empty = full + 8 * L::kStages;
  const Cluster cluster(args);
  if (threadIdx.x == 0) {
    dependents_launch();
    // A stage is free when each warp of every block that shares a part of it has said so.
    const uint32_t readers = __popc(cluster.row_mask | cluster.column_mask) * 8;
    for (int i = 0; i < L::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, readers);
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
    registers_shrink<40>();
    if (threadIdx.x == 0) {
      produce<kTileN, kRightIsKn>(args, cluster, shared, full, empty);
    }
    __syncwarp();
    if (cluster.parts_k > 1) {  // the consumers' add_parts
      cluster_sync_relaxed();
      cluster_sync();
    }
  } else {
    registers_grow<232>();
    consume<T, kTileN, kRightIsKn>(args, cluster, shared, full, empty, warp - 4);
  }
#endif
}

}  // namespace metal_lora::cuda::sm90
