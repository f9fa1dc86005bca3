// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// gemm_generic's f32 form: full f32 (no tf32), each value one chain of FFMAs in the order of k and
// of the pairs, whatever the tile. Operands are turned in shared memory so that a thread reads its
// rows and columns as float4; the next step's values wait in registers meanwhile.
//
// Ladder (H100, beside cuBLAS's f32 without tf32 in the same run):
//   4096 cubed: 42.5 TFLOP/s, 0.84 of cuBLAS, 0.64 of 67 (128 FFMA a cycle at the highest clock);
//   right [k, n]: 43.9, 0.84
//   m = 512, n = k = 4096: 64x64 tiles 29.1, 0.59; 128x128 36.0, 0.73
// 80 % of the inner loop's instructions are FFMA; the rest of the distance is not profiled.
#include "kernels/cuda/gemm_tiles.cuh"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kStep = 16;
constexpr uint32_t kThreads = 256;

/// A square tile. A thread holds kValues x kValues sums, in groups of four rows and columns that
/// lie kTile / kGroups apart.
template <uint32_t kTile>
struct Shape {
  static constexpr int kGroups = kTile / 64;
  static constexpr int kValues = 4 * kGroups;
  static constexpr uint32_t kPitch = kTile + 4;
  static constexpr int kLoads = kTile * kStep / 4 / kThreads;  ///< of four values, each side
};

template <uint32_t kTile>
struct Stage {
  float left[kStep][Shape<kTile>::kPitch];
  float right[kStep][Shape<kTile>::kPitch];
};

/// Four neighbours of which the first `valid` exist.
__device__ __forceinline__ float4 load_four(const float* from, int valid, bool vector) {
  if (vector && valid >= 4) return *reinterpret_cast<const float4*>(from);
  return make_float4(
      valid > 0 ? from[0] : 0.0f,
      valid > 1 ? from[1] : 0.0f,
      valid > 2 ? from[2] : 0.0f,
      valid > 3 ? from[3] : 0.0f);
}

/// One side of the product, walked along k: rows along k (turned on the way), or lines along n.
template <uint32_t kTile, bool kLines>
class Side {
  static constexpr int kLoads = Shape<kTile>::kLoads;
  static constexpr uint32_t kAtOnce = kLines ? kThreads / (kTile / 4) : kThreads / (kStep / 4);

 public:
  __device__ __forceinline__ Side(uint32_t first, uint32_t count) : first_(first), count_(count) {}

  __device__ __forceinline__ void begin(const void* data, size_t stride, uint32_t k, bool vector) {
    from_ = static_cast<const float*>(data) +
            (kLines ? line() * stride + first_ + column() : (first_ + line()) * stride + column());
    stride_ = stride;
    k_left_ = static_cast<int>(k);
    vector_ = vector;
  }
  __device__ __forceinline__ void load(float4 (&v)[kLoads]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t row = line() + i * kAtOnce;
      const int inside = kLines ? static_cast<int>(row) < k_left_ : first_ + row < count_;
      const int valid = kLines ? static_cast<int>(count_ - first_) - static_cast<int>(column())
                               : k_left_ - static_cast<int>(column());
      v[i] = load_four(from_ + i * kAtOnce * stride_, inside ? valid : 0, vector_);
    }
    from_ += kLines ? kStep * stride_ : kStep;
    k_left_ -= static_cast<int>(kStep);
  }
  __device__ __forceinline__ void store(
      float (&to)[kStep][Shape<kTile>::kPitch], const float4 (&v)[kLoads]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t row = line() + i * kAtOnce;
      if constexpr (kLines) {
        *reinterpret_cast<float4*>(&to[row][column()]) = v[i];
      } else {
        to[column()][row] = v[i].x;
        to[column() + 1][row] = v[i].y;
        to[column() + 2][row] = v[i].z;
        to[column() + 3][row] = v[i].w;
      }
    }
  }

 private:
  static constexpr uint32_t kAcross = kLines ? kTile / 4 : kStep / 4;
  static __device__ __forceinline__ uint32_t line() {
    return threadIdx.x / kAcross;
  }
  static __device__ __forceinline__ uint32_t column() {
    return threadIdx.x % kAcross * 4;
  }

  const uint32_t first_, count_;  ///< rows of left, or columns of the product: the tile's, all
  const float* from_ = nullptr;
  size_t stride_ = 0;
  int k_left_ = 0;
  bool vector_ = false;
};

template <uint32_t kTile>
__device__ __forceinline__ void load_values(
    const float (&line)[Shape<kTile>::kPitch], uint32_t first, float (&v)[Shape<kTile>::kValues]) {
#pragma unroll
  for (int g = 0; g < Shape<kTile>::kGroups; ++g) {
    const float4 four = *reinterpret_cast<const float4*>(&line[first + g * 64]);
    v[4 * g] = four.x;
    v[4 * g + 1] = four.y;
    v[4 * g + 2] = four.z;
    v[4 * g + 3] = four.w;
  }
}

template <uint32_t kTile>
using Sums = float[Shape<kTile>::kValues][Shape<kTile>::kValues];

/// A warp's threads are 4 by 8, so that a read of shared memory is at most 128 different bytes.
struct ThreadPlace {
  uint32_t row, column;
  __device__ __forceinline__ ThreadPlace() {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    row = (warp / 2 * 4 + lane / 8) * 4;
    column = (warp % 2 * 8 + lane % 8) * 4;
  }
};

template <uint32_t kTile>
__device__ __forceinline__ void multiply_stage(
    const Stage<kTile>& stage, const ThreadPlace& at, Sums<kTile>& sums) {
  constexpr int kValues = Shape<kTile>::kValues;
#pragma unroll
  for (uint32_t p = 0; p < kStep; ++p) {
    float a[kValues], b[kValues];
    load_values<kTile>(stage.left[p], at.row, a);
    load_values<kTile>(stage.right[p], at.column, b);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
    }
  }
}

template <uint32_t kTile>
__device__ __forceinline__ void store_tile(
    const TiledGroup& tiled, const TilePlace& place, const ThreadPlace& at, Sums<kTile>& sums) {
  const GemmProblem& problem = tiled.group.problem[place.problem];
#pragma unroll
  for (int i = 0; i < Shape<kTile>::kValues; ++i) {
    const uint32_t row = place.row0 + at.row + i / 4 * 64 + i % 4;
    if (row >= tiled.group.m) continue;
    float* out = static_cast<float*>(problem.out) + row * problem.out_stride;
#pragma unroll
    for (int j = 0; j < Shape<kTile>::kValues; j += 4) {
      const uint32_t column = place.column0 + at.column + j / 4 * 64;
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v[e] = column + e < problem.n ? with_extras<float>(problem, sums[i][j + e], row, column + e)
                                      : 0.0f;
      }
      if (tiled.pairs_out && column + 3 < problem.n) {
        *reinterpret_cast<float4*>(out + column) = make_float4(v[0], v[1], v[2], v[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (column + e < problem.n) out[column + e] = v[e];
        }
      }
    }
  }
}

template <bool kRightIsKn, uint32_t kTile>
__global__ void __launch_bounds__(kThreads, 2)
    gemm_f32_kernel(const __grid_constant__ TiledGroup tiled) {
  __shared__ __align__(16) Stage<kTile> stages[2];
  const TilePlace place = find_tile<kTile>(tiled, blockIdx.x);
  const GemmProblem& problem = tiled.group.problem[place.problem];
  const uint32_t steps = count_steps<kStep>(problem);
  const ThreadPlace at;
  Side<kTile, false> left(place.row0, tiled.group.m);
  Side<kTile, kRightIsKn> right(place.column0, problem.n);
  float4 left_next[Shape<kTile>::kLoads], right_next[Shape<kTile>::kLoads];
  int pair = -1;
  uint32_t pair_steps = 0;
  const auto load_next = [&] {
    while (pair_steps == 0) {  // there is a step left
      const GemmPair& next = problem.pair[++pair];
      pair_steps = (next.k + kStep - 1) / kStep;
      left.begin(next.left, next.left_stride, next.k, tiled.left_unit[place.problem][pair] == 4);
      right.begin(
          next.right, next.right_stride, next.k, tiled.right_unit[place.problem][pair] == 4);
    }
    --pair_steps;
    left.load(left_next);
    right.load(right_next);
  };

  Sums<kTile> sums = {};
  if (steps > 0) {
    load_next();
    left.store(stages[0].left, left_next);
    right.store(stages[0].right, right_next);
  }
  __syncthreads();
  for (uint32_t step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) load_next();
    multiply_stage<kTile>(stages[step % 2], at, sums);
    if (more) {
      left.store(stages[(step + 1) % 2].left, left_next);
      right.store(stages[(step + 1) % 2].right, right_next);
    }
    __syncthreads();
  }
  store_tile<kTile>(tiled, place, at, sums);
}

template <uint32_t kTile>
void launch(const Context& context, TiledGroup tiled) {
  const auto kernel =
      tiled.group.right_is_kn ? gemm_f32_kernel<true, kTile> : gemm_f32_kernel<false, kTile>;
  kernel<<<tiled.tiles_m * tiled.tiles_n, kThreads, 0, context.stream>>>(tiled);
  check_launch("gemm_f32");
}

}  // namespace

void gemm_f32(const Context& context, const GemmGroup& group) {
  TiledGroup tiled = tile_group(group, 128);
  const bool large = group.m > 64 && 4 * tiled.tiles_m * tiled.tiles_n >=
                                         3 * static_cast<uint32_t>(context.multiprocessors);
  if (!large) tiled = tile_group(group, 64);
  tiled.pairs_out = true;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    tiled.pairs_out = tiled.pairs_out && copy_unit(problem.out, problem.out_stride, 4, 4) == 4;
    for (int p = 0; p < problem.pairs; ++p) {
      const GemmPair& pair = problem.pair[p];
      tiled.left_unit[i][p] = static_cast<uint8_t>(copy_unit(pair.left, pair.left_stride, 4, 4));
      tiled.right_unit[i][p] = static_cast<uint8_t>(copy_unit(pair.right, pair.right_stride, 4, 4));
    }
  }
  large ? launch<128>(context, tiled) : launch<64>(context, tiled);
}

}  // namespace metal_lora::cuda
