// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the kernel of gemm_sm90.cu is given, and where a block finds its tiles, its stages and its
// part of a cluster's work.
#pragma once

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::sm90 {

constexpr int kTileM = 128;
constexpr int kStepK = 64;           ///< elements of a 128-byte swizzled row
constexpr int kThreads = 384;        ///< producer, two consumers
constexpr int kBoxBytes = 8192;      ///< 64 x 64 elements
constexpr int kRowsBytes = 1024;     ///< 64 rows of 8 elements
constexpr int kWarpBoxBytes = 2048;  ///< 16 rows of results x 64
/// Less than a group may hold: arguments of 15 KB cost a launch up to 1 us.
constexpr int kMaxPairs = 16;
constexpr int kMaxShrinks = GemmGroup::kMaxShrinks;
constexpr int kMaxParts = GemmShrink::kMaxParts;
constexpr int kMaxMaps = 36;
constexpr uint32_t kGateColumns = kGemmActColumns;  ///< of gate, and of up, in a tile of both
constexpr uint32_t kBeyond = 1u << 30;              ///< a row of no matrix: zeros

struct PairArgs {
  uint32_t begin = 0, k = 0;  ///< columns of left; begin > 0: beyond the maps, so all zeros
  uint16_t left_map = 0, right_map = 0;
  uint16_t up_map = 0;  ///< GemmEnd::swiglu: right of up
  bool has_gate = true, has_up = true;
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
  const float* up_bias = nullptr;  ///< GemmEnd::swiglu
  const float* rope = nullptr;
  uint32_t head_dim = 0;
  const float* row_factors = nullptr;
  /// What the tile's end reads, on its way to the second-level cache meanwhile.
  uint16_t residual_map = 0;
  bool reads_ahead = false;
};
struct ShrinkArgs {
  uint32_t k = 0;
  uint32_t bytes = 0;  ///< of a step
  /// right [k, 8] in one piece, which is copied as it lies, or null: boxes of rows of 16 bytes come
  /// so slowly that u is late.
  const void* rows = nullptr;
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
  uint32_t tile_rows = kTileM;        ///< that are loaded: zeros beyond m cost as much as rows
  uint32_t tiles_m = 0, tiles_n = 0;  ///< in tiles of a cluster; n of all problems
  uint32_t band = 1;                  ///< rows of tiles that are swept together along n
  uint32_t run_log2 = 0;              ///< tiles side by side that a cluster takes one after another
  uint32_t cluster_m = 1, cluster_n = 1;  ///< blocks of a cluster that share columns, rows
  uint32_t cluster_k = 1;                 ///< or parts of the sums; then one tile a cluster
  uint32_t clusters = 0;
  uint32_t map_count = 0;
  GemmSwiglu swiglu;
  GemmSoftmax softmax;
  uint32_t gate_map = 0, up_map = 0, act_map = 0, shrink_map = 0;
  ShrinkArgs shrink[kMaxShrinks];
  uint32_t shrinks = 0;
  uint32_t shrink_clusters = 0;  ///< the last clusters, which have fewest tiles or none, make u
  uint32_t* flags = nullptr;     ///< of each 128 rows: shrinks done; then tiles that have seen it
  uint32_t flag_count = 0;
  bool pair0_ready = false;
  bool late_dependents = false;
  bool out_f32 = false;
};

template <int kTileN, GemmEnd kEnd = GemmEnd::plain>
struct Layout {
  /// Boxes of the residual, or of gate and up, come to shared memory while the products run, and
  /// leave it as results.
  static constexpr int kEndBoxes = kEnd == GemmEnd::residual          ? kTileN / 64
                                   : kEnd == GemmEnd::swiglu_backward ? kTileN / 32
                                                                      : 0;
  static constexpr int kLeftBytes = kTileM * kStepK * 2;
  static constexpr int kRightBoxes = (kTileN + 63) / 64;  ///< of 64 columns, whole ones
  static constexpr int kRightBytes = kRightBoxes * kBoxBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  /// Steps of a narrow tile (128 x 64) in a stage.
  static constexpr int kShrinkSteps = kTileN == 256 ? 2 : 1;
  static constexpr int kStages = kEndBoxes == 4 ? 5 : kTileN > 128 ? 4 : kTileN == 128 ? 6 : 8;
  /// Boxes of results of each warp: a tile's, less where there is no room. Then one more lies in
  /// the tile's last stage, see store_tile.
  static constexpr int kStoreBoxes = kEndBoxes > 0 ? kEndBoxes : kTileN == 256 ? 2 : kTileN / 64;
  static constexpr bool kStoreInRing = kTileN == 256;
  static constexpr int kStoreOffset = kStages * kStageBytes;
  static constexpr int kBarrierOffset = kStoreOffset + 8 * kStoreBoxes * kWarpBoxBytes;
  static constexpr int kBytes =
      kBarrierOffset + (2 * kStages + 8 * (kEndBoxes > 0)) * 8 + 1024;  ///< 1024: alignment
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
  const uint32_t run = index >> args.run_log2;
  const uint32_t band_runs = args.band * (args.tiles_n >> args.run_log2);
  const uint32_t band = run / band_runs;
  const uint32_t rest = run - band * band_runs;
  const uint32_t height = min(args.band, args.tiles_m - band * args.band);
  const uint32_t column = rest / height;
  Tile tile;
  tile.n = (column << args.run_log2) + (index & ((1u << args.run_log2) - 1));
  tile.m = band * args.band + rest - column * height;
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

/// What a block knows of its cluster, which has one or two blocks.
struct Cluster {
  uint32_t rank_m, rank_n, rank_k, parts_k, blocks;
  uint32_t other_part;             ///< the block with the other part of the sums
  uint16_t row_mask, column_mask;  ///< blocks with the same rows (left), columns (right)
  __device__ __forceinline__ explicit Cluster(const Args& args) {
    parts_k = args.cluster_k;
    blocks = args.cluster_m * args.cluster_n * parts_k;
    // %cluster_ctarank, but known to the compiler as the same for all threads: it orders wgmma one
    // by one where a branch might diverge.
    const uint32_t rank = blockIdx.x & (blocks - 1);
    rank_m = args.cluster_m > 1 ? rank : 0;
    rank_n = args.cluster_n > 1 ? rank : 0;
    rank_k = parts_k > 1 ? rank : 0;
    other_part = rank ^ 1;
    row_mask = args.cluster_n > 1 ? 3 : 1 << rank;
    column_mask = args.cluster_m > 1 ? 3 : 1 << rank;
  }
  __device__ __forceinline__ Share share(uint32_t steps) const {
    const uint32_t half = (steps + 1) / 2;
    if (parts_k == 1) return {0, steps};
    return rank_k == 0 ? Share{0, half} : Share{half, steps};
  }
  __device__ __forceinline__ uint32_t index() const {
    return blockIdx.x >> (blocks - 1);
  }
  __device__ __forceinline__ uint32_t count() const {
    return gridDim.x >> (blocks - 1);
  }
  /// This cluster's tiles: runs in turn with the other clusters.
  __device__ __forceinline__ uint32_t first_tile(const Args& args) const {
    return index() << args.run_log2;
  }
  __device__ __forceinline__ uint32_t next_tile(const Args& args, uint32_t tile) const {
    const uint32_t run = 1u << args.run_log2;
    return ++tile % run != 0 ? tile : tile + (count() - 1) * run;
  }
};

}  // namespace metal_lora::cuda::sm90
