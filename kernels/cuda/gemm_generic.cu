// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The tensor-core product of gemm.h for every device since compute capability 8.0 and for every
// shape, stride and alignment: a ring of shared-memory stages filled by cp.async and multiplied by
// mma.sync. An element's sum is the same chain of mma whatever the tile, so that a row's result
// does not depend on m.
//
// Ladder (H100, bf16, beside cuBLAS of the same run, which uses wgmma; medians, clocks fall under
// load):
//   m = n = k = 4096: 128x128, 4 stages of 32: 376 TFLOP/s, 0.47 of cuBLAS (another run 327, 0.43)
//   the same, right [k, n]: 348, 0.46;  n = 11008: 362, 0.51
//   m = 512, n = k = 4096: 64x64 tiles 241, 0.35; in a build with the loads below 209 and, with
//   128x128 tiles, 249: so large ones from 3/4 of the machine on
//   tried and dropped: 128x256 tiles of 8 warps (358, 0.46; n = 11008: 314, 0.43), loads of
//   fragments between the products (329, 0.43)
//   rows of odd length, 4095 cubed: 58 TFLOP/s; by way of gemm_stage.cu 537, 4.0 of cuBLAS
// A100, for which it is meant, is not measured. On H100 mma.sync cannot reach wgmma's rate; the
// next tenth would take knowing what its warps wait for (not profiled).
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_stage.h"
#include "kernels/cuda/gemm_tiles.cuh"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kStep = 32;      ///< elements of k in a stage
constexpr uint32_t kChunk = 8;      ///< elements of 16 bytes
constexpr uint32_t kThreads = 128;  ///< 2 x 2 warps
constexpr int kStages = 4;

/// A square tile; each warp holds a quarter.
template <uint32_t kTile>
struct Shape {
  static constexpr uint32_t kWarpTile = kTile / 2;
  static constexpr int kRows = kWarpTile / 16;     ///< 16-row fragments of a warp
  static constexpr int kColumns = kWarpTile / 16;  ///< 16-column pairs of fragments
  static constexpr uint32_t kSideBytes = kTile * kStep * 2;
  static constexpr uint32_t kStageBytes = 2 * kSideBytes;
  static constexpr uint32_t kBytes = kStages * kStageBytes;
  static constexpr int kCopies = kTile * kStep / kChunk / kThreads;  ///< chunks of a side a thread
};

/// Where 16 bytes lie in a side of a stage. Rows of 64 bytes (k inside): two rows share the 32
/// banks, so the chunk turns with every second row. Rows along n: with every row.
__device__ __forceinline__ uint32_t row_place(uint32_t row, uint32_t chunk) {
  return row * (kStep * 2) + ((chunk ^ (row / 2 % 4)) * 16);
}
template <uint32_t kTile>
__device__ __forceinline__ uint32_t column_place(uint32_t k, uint32_t chunk) {
  return k * (kTile * 2) + ((chunk ^ (k % 8)) * 16);
}

/// 8 elements to shared memory of which the first `valid` exist; `unit` at a time.
template <typename T, bool kAligned>
__device__ __forceinline__ void copy_chunk(uint32_t to, const T* from, int valid, uint32_t unit) {
  valid = max(0, min(valid, static_cast<int>(kChunk)));
  if constexpr (kAligned) {
    mma::copy_async<16>(to, from, 2 * valid);
  } else if (unit == 8) {
    mma::copy_async<16>(to, from, 2 * valid);
  } else if (unit == 4) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      mma::copy_async<8>(to + 2 * i, from + i, 2 * max(0, min(valid - i, 4)));
    }
  } else if (unit == 2) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      mma::copy_async<4>(to + 2 * i, from + i, 2 * max(0, min(valid - i, 2)));
    }
  } else {
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    uint32_t v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < valid ? bits[i] : 0;
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to),
                 "r"(v[0] | v[1] << 16),
                 "r"(v[2] | v[3] << 16),
                 "r"(v[4] | v[5] << 16),
                 "r"(v[6] | v[7] << 16)
                 : "memory");
  }
}

/// Fills the ring, step by step through the pairs.
template <typename T, bool kRightIsKn, bool kAligned, uint32_t kTile>
class Feed {
  using S = Shape<kTile>;
  static constexpr uint32_t kRowChunks = kStep / kChunk;
  static constexpr uint32_t kRowsAtOnce = kThreads / kRowChunks;
  static constexpr uint32_t kLineChunks = kTile / kChunk;

 public:
  __device__ __forceinline__ Feed(const TiledGroup& tiled, const TilePlace& place)
      : tiled_(tiled), problem_(tiled.group.problem[place.problem]), place_(place) {
    rows_left_ =
        static_cast<int>(tiled.group.m - place.row0) - static_cast<int>(threadIdx.x / kRowChunks);
    columns_left_ = static_cast<int>(problem_.n - place.column0) -
                    static_cast<int>(
                        kRightIsKn ? threadIdx.x % kLineChunks * kChunk : threadIdx.x / kRowChunks);
    begin_pair();
  }

  /// The next step into the stage at `shared`; nothing after the last.
  __device__ __forceinline__ void copy(uint32_t shared) {
    if (pair_ >= problem_.pairs) return;
    copy_rows(shared, left_, left_stride_, rows_left_, left_unit_);
    if constexpr (kRightIsKn) {
      copy_lines(shared + S::kSideBytes);
    } else {
      copy_rows(shared + S::kSideBytes, right_, right_stride_, columns_left_, right_unit_);
    }
    left_ += kStep;
    right_ += kRightIsKn ? kStep * right_stride_ : kStep;
    k_left_ -= static_cast<int>(kStep);
    if (k_left_ <= 0) {
      ++pair_;
      begin_pair();
    }
  }

 private:
  __device__ __forceinline__ void begin_pair() {
    while (pair_ < problem_.pairs && problem_.pair[pair_].k == 0) ++pair_;
    if (pair_ >= problem_.pairs) return;
    const GemmPair& pair = problem_.pair[pair_];
    const uint32_t row = threadIdx.x / kRowChunks, column = threadIdx.x % kRowChunks * kChunk;
    left_stride_ = pair.left_stride;
    right_stride_ = pair.right_stride;
    k_left_ = static_cast<int>(pair.k);
    left_ = static_cast<const T*>(pair.left) + (place_.row0 + row) * left_stride_ + column;
    right_ = static_cast<const T*>(pair.right);
    if constexpr (kRightIsKn) {
      right_ += threadIdx.x / kLineChunks * right_stride_ + place_.column0 +
                threadIdx.x % kLineChunks * kChunk;
    } else {
      right_ += (place_.column0 + row) * right_stride_ + column;
    }
    if constexpr (!kAligned) {
      left_unit_ = tiled_.left_unit[place_.problem][pair_];
      right_unit_ = tiled_.right_unit[place_.problem][pair_];
    }
  }

  /// A side whose rows run along k.
  __device__ __forceinline__ void copy_rows(
      uint32_t shared, const T* from, size_t stride, int rows_left, uint32_t unit) const {
    const uint32_t row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    const int valid = k_left_ - static_cast<int>(chunk * kChunk);
    const uint32_t to = shared + row_place(row, chunk);
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const int rows = i * static_cast<int>(kRowsAtOnce);
      copy_chunk<T, kAligned>(
          to + rows * kStep * 2, from + rows * stride, rows < rows_left ? valid : 0, unit);
    }
  }

  /// A right side [k, n].
  __device__ __forceinline__ void copy_lines(uint32_t shared) const {
    constexpr uint32_t kLinesAtOnce = kThreads / kLineChunks;
    const uint32_t line = threadIdx.x / kLineChunks, chunk = threadIdx.x % kLineChunks;
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const uint32_t k = line + i * kLinesAtOnce;
      copy_chunk<T, kAligned>(
          shared + column_place<kTile>(k, chunk),
          right_ + i * kLinesAtOnce * right_stride_,
          static_cast<int>(k) < k_left_ ? columns_left_ : 0,
          right_unit_);
    }
  }

  const TiledGroup& tiled_;
  const GemmProblem& problem_;
  const TilePlace place_;
  int pair_ = 0;
  int k_left_ = 0, rows_left_ = 0, columns_left_ = 0;
  const T *left_ = nullptr, *right_ = nullptr;
  size_t left_stride_ = 0, right_stride_ = 0;
  uint32_t left_unit_ = kChunk, right_unit_ = kChunk;
};

/// One warp's fragments of 16 steps along k.
template <uint32_t kTile>
struct Fragments {
  uint32_t left[Shape<kTile>::kRows][4];
  uint32_t right[Shape<kTile>::kColumns][4];
};

template <bool kRightIsKn, uint32_t kTile>
class Reader {
  using S = Shape<kTile>;

 public:
  __device__ __forceinline__ Reader() {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row = warp / 2 * S::kWarpTile, column = warp % 2 * S::kWarpTile;
    left_ = row_place(row + lane % 16, lane / 16);
    right_ = S::kSideBytes;
    if constexpr (kRightIsKn) {
      right_ += column_place<kTile>(lane % 16, column / kChunk + lane / 16);
    } else {
      right_ += row_place(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    }
  }
  /// Part 0 or 1 of the stage at `shared`.
  __device__ __forceinline__ void load(uint32_t shared, uint32_t part, Fragments<kTile>& f) const {
#pragma unroll
    for (int i = 0; i < S::kRows; ++i) {
      mma::load_x4(f.left[i], ((shared + left_) ^ (part * 32)) + i * 16 * kStep * 2);
    }
#pragma unroll
    for (int j = 0; j < S::kColumns; ++j) {
      if constexpr (kRightIsKn) {
        mma::load_x4_across(f.right[j], ((shared + right_) ^ (j * 32)) + part * 16 * kTile * 2);
      } else {
        mma::load_x4(f.right[j], ((shared + right_) ^ (part * 32)) + j * 16 * kStep * 2);
      }
    }
  }

 private:
  uint32_t left_, right_;
};

template <typename T, uint32_t kTile>
using Sums = float[Shape<kTile>::kRows][2 * Shape<kTile>::kColumns][4];

template <typename T, uint32_t kTile>
__device__ __forceinline__ void multiply_all(Sums<T, kTile>& sums, const Fragments<kTile>& f) {
#pragma unroll
  for (int i = 0; i < Shape<kTile>::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * Shape<kTile>::kColumns; ++j) {
      mma::multiply<T>(
          sums[i][j], f.left[i], f.right[j / 2][j % 2 * 2], f.right[j / 2][j % 2 * 2 + 1]);
    }
  }
}

template <typename Out>
__device__ __forceinline__ void store_two(
    const TiledGroup& tiled,
    const GemmProblem& problem,
    uint32_t row,
    uint32_t column,
    float v0,
    float v1) {
  if (row >= tiled.group.m || column >= problem.n) return;
  Out* out = static_cast<Out*>(problem.out) + row * problem.out_stride + column;
  v0 = with_extras<Out>(problem, v0, row, column);
  if (column + 1 >= problem.n) {
    *out = from_float<Out>(v0);
    return;
  }
  v1 = with_extras<Out>(problem, v1, row, column + 1);
  if (!tiled.pairs_out) {
    out[0] = from_float<Out>(v0);
    out[1] = from_float<Out>(v1);
  } else if constexpr (sizeof(Out) == 4) {
    *reinterpret_cast<float2*>(out) = make_float2(v0, v1);
  } else {
    *reinterpret_cast<uint32_t*>(out) = mma::pack2<Out>(v0, v1);
  }
}

template <typename T, typename Out, uint32_t kTile>
__device__ __forceinline__ void store_tile(
    const TiledGroup& tiled, const TilePlace& place, const Sums<T, kTile>& sums) {
  const GemmProblem& problem = tiled.group.problem[place.problem];
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t row0 = place.row0 + warp / 2 * Shape<kTile>::kWarpTile + lane / 4;
  const uint32_t column0 = place.column0 + warp % 2 * Shape<kTile>::kWarpTile + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Shape<kTile>::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * Shape<kTile>::kColumns; ++j) {
      const float(&s)[4] = sums[i][j];
      const uint32_t row = row0 + i * 16, column = column0 + j * 8;
      store_two<Out>(tiled, problem, row, column, s[0], s[1]);
      store_two<Out>(tiled, problem, row + 8, column, s[2], s[3]);
    }
  }
}

template <typename T, bool kRightIsKn, bool kAligned, uint32_t kTile>
__global__ void __launch_bounds__(kThreads, kTile == 128 ? 2 : 4)
    gemm_kernel(const __grid_constant__ TiledGroup tiled) {
  using S = Shape<kTile>;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  const uint32_t shared = mma::shared_address(shared_bytes);
  const TilePlace place = find_tile<kTile>(tiled, blockIdx.x);
  const uint32_t steps = count_steps<kStep>(tiled.group.problem[place.problem]);
  Feed<T, kRightIsKn, kAligned, kTile> feed(tiled, place);
  const Reader<kRightIsKn, kTile> reader;
  Sums<T, kTile> sums = {};

  for (int s = 0; s < kStages - 1; ++s) {
    feed.copy(shared + s * S::kStageBytes);
    mma::copies_commit();
  }
  mma::copies_wait<kStages - 2>();
  __syncthreads();
  Fragments<kTile> fragments[2];
  if (steps > 0) reader.load(shared, 0, fragments[0]);
  uint32_t stage = 0, free_stage = (kStages - 1) * S::kStageBytes;
  for (uint32_t step = 0; step < steps; ++step) {
    // The loads of the second half, and the copies of a later stage, run under the first half's
    // products; the next stage's first loads under the second half's.
    reader.load(shared + stage, 1, fragments[1]);
    feed.copy(shared + free_stage);
    mma::copies_commit();
    multiply_all<T, kTile>(sums, fragments[0]);
    free_stage = stage;
    stage = stage + S::kStageBytes == S::kBytes ? 0 : stage + S::kStageBytes;
    mma::copies_wait<kStages - 2>();
    __syncthreads();
    reader.load(shared + stage, 0, fragments[0]);
    multiply_all<T, kTile>(sums, fragments[1]);
  }
  mma::copies_wait<0>();
  if (tiled.group.out_dtype == DType::f32) {
    store_tile<T, float, kTile>(tiled, place, sums);
  } else {
    store_tile<T, T, kTile>(tiled, place, sums);
  }
}

template <typename T, bool kRightIsKn, bool kAligned, uint32_t kTile>
void launch(const Context& context, const TiledGroup& tiled) {
  const auto kernel = gemm_kernel<T, kRightIsKn, kAligned, kTile>;
  constexpr uint32_t kBytes = Shape<kTile>::kBytes;
  if (kBytes > 48 * 1024) {
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "gemm_generic");
  }
  kernel<<<tiled.tiles_m * tiled.tiles_n, kThreads, kBytes, context.stream>>>(tiled);
  check_launch("gemm_generic");
}

/// Fills the units; whether all of them are 16 bytes.
bool find_units(TiledGroup& tiled) {
  bool all = true;
  for (int i = 0; i < tiled.group.problems; ++i) {
    const GemmProblem& problem = tiled.group.problem[i];
    for (int p = 0; p < problem.pairs; ++p) {
      const GemmPair& pair = problem.pair[p];
      const auto left = copy_unit(pair.left, pair.left_stride, 2, kChunk);
      const auto right = copy_unit(pair.right, pair.right_stride, 2, kChunk);
      tiled.left_unit[i][p] = static_cast<uint8_t>(left);
      tiled.right_unit[i][p] = static_cast<uint8_t>(right);
      all = all && left == kChunk && right == kChunk;
    }
  }
  return all;
}

bool stores_pairs(const GemmGroup& group) {
  const size_t bytes = group.out_dtype == DType::f32 ? 4 : 2;
  for (int i = 0; i < group.problems; ++i) {
    if (copy_unit(group.problem[i].out, group.problem[i].out_stride, bytes, 2) != 2) return false;
  }
  return true;
}

template <typename T, bool kRightIsKn>
void run(const Context& context, const GemmGroup& group) {
  TiledGroup tiled = tile_group(group, 128);
  const bool aligned = find_units(tiled);
  // A large tile reads half as much; small ones fill the machine.
  const bool large = group.m > 64 && 4 * tiled.tiles_m * tiled.tiles_n >=
                                         3 * static_cast<uint32_t>(context.multiprocessors);
  if (!large || !aligned) {
    tiled = tile_group(group, 64);
    find_units(tiled);
  }
  tiled.pairs_out = stores_pairs(group);
  if (!aligned) return launch<T, kRightIsKn, false, 64>(context, tiled);
  if (!large) return launch<T, kRightIsKn, true, 64>(context, tiled);
  launch<T, kRightIsKn, true, 128>(context, tiled);
}

template <typename T>
void run(const Context& context, const GemmGroup& group) {
  group.right_is_kn ? run<T, true>(context, group) : run<T, false>(context, group);
}

void check_group(const GemmGroup& group) {
  if (group.problems < 0 || group.problems > GemmGroup::kMaxProblems) {
    throw std::invalid_argument(
        "[gemm] problems must be at most 4 but is " + std::to_string(group.problems));
  }
  for (int i = 0; i < group.problems; ++i) {
    const int pairs = group.problem[i].pairs;
    if (pairs < 0 || pairs > GemmProblem::kMaxPairs) {
      throw std::invalid_argument("[gemm] pairs must be at most 8 but is " + std::to_string(pairs));
    }
  }
  if (group.out_dtype != group.dtype && group.out_dtype != DType::f32) {
    throw std::invalid_argument("[gemm] out_dtype must be dtype or f32");
  }
}

bool is_empty(const GemmGroup& group) {
  if (group.m == 0) return true;
  for (int i = 0; i < group.problems; ++i) {
    if (group.problem[i].n > 0) return false;
  }
  return true;
}

/// What only gemm_sm90 does to a tile.
bool ends_otherwise(const GemmGroup& group) {
  return group.end != GemmEnd::plain ||
         std::any_of(group.problem, group.problem + group.problems, [](const GemmProblem& p) {
           return p.rope != nullptr || p.row_factors != nullptr;
         });
}

}  // namespace

void gemm_generic(const Context& context, const GemmGroup& group) {
  check_group(group);
  if (is_empty(group)) return;
  switch (group.dtype) {
    case DType::f32:
      return gemm_f32(context, group);
    case DType::f16:
      return run<f16>(context, group);
    case DType::bf16:
      return run<bf16>(context, group);
  }
}

void gemm(const Context& context, const GemmGroup& group) {
  check_group(group);
  if (is_empty(group)) return;
  if (can_gemm_sm90(context, group)) return gemm_sm90(context, group);
  if (ends_otherwise(group) || group.shrinks > 0) {
    throw std::invalid_argument("[gemm] end and shrinks must be what can_gemm_sm90 takes");
  }
  const StagePlan plan = plan_staging(context, group);
  if (!plan.pairs && !plan.result) return gemm_generic(context, group);
  Staging staging = make_staging(context, group, plan);
  staging.group.pair0_ready = false;  // the copies are new
  copy_staged(context, staging.in);
  can_gemm_sm90(context, staging.group) ? gemm_sm90(context, staging.group)
                                        : gemm_generic(context, staging.group);
  copy_staged(context, staging.out);
}

int gemm_dispatches(const Context& context, const GemmGroup& group) {
  if (is_empty(group)) return 0;
  if (can_gemm_sm90(context, group)) return 1;
  // Nothing is copied: the addresses need only be aligned.
  struct NoMemory final : Scratch {
    void* take(size_t) override { return reinterpret_cast<void*>(256); }
  } none;
  Context dry = context;
  dry.scratch = &none;
  const Staging staging = make_staging(dry, group, plan_staging(dry, group));
  return 1 + (staging.in.jobs > 0) + (staging.out.jobs > 0);
}

}  // namespace metal_lora::cuda
