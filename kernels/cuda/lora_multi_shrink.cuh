// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// u[t] = A_i·x[t] of a tile of tokens and a slice of k, by 256 threads: the tokens' x goes to shared
// memory, a warp takes two rows of A at a time, its lanes 16 bytes each, so that every byte of A is
// asked for once and all of a tile's at once. A lane's sum runs along k and the lanes meet in a
// fixed tree, the same whatever else is in the tile and whichever kernel does it.
#pragma once

#include <cstring>

#include "kernels/cuda/lora_multi.cuh"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda::multi {

constexpr uint32_t kShrinkThreads = 256;

struct Shrink {
  Bank a;
  const void* x = nullptr;
  float* out = nullptr;  ///< [slices, m, max_rank]
  uint32_t m = 0, slices = 0;
};

/// The tile's slices of x to shared memory, zeros beyond k.
template <typename X, bool kVector>
__device__ __forceinline__ void stage_x(
    const Shrink& args, const Tile& tile, uint32_t slice, uint32_t thread, X (*to)[kSlice]) {
  const uint32_t k = args.a.columns, k0 = slice * kSlice;
  const X* x = static_cast<const X*>(args.x) + k0;
  constexpr uint32_t kCount = kVector ? Vec16<X>::kCount : 1;
  for (uint32_t i = thread; i < tile.count * (kSlice / kCount); i += kShrinkThreads) {
    const uint32_t row = i / (kSlice / kCount), at = i % (kSlice / kCount) * kCount;
    const X* from = x + size_t{tile.token[row]} * k + at;
    if constexpr (kVector) {
      mma::copy_async<16>(
          mma::shared_address(&to[row][at]), k0 + at < k ? from : x, k0 + at < k ? 16 : 0);
    } else {
      to[row][at] = k0 + at < k ? *from : from_float<X>(0.0f);
    }
  }
}

/// One warp's rows of a slice of A, all asked for at once: in each step a lane's 16 bytes or 32.
template <typename A>
struct Rows {
  static constexpr uint32_t kSteps = kSlice / 256, kCount = sizeof(A) == 4 ? 1 : 2;
  static constexpr uint32_t kStride = kShrinkThreads / 32 * kCount;  ///< rows of all warps
  static constexpr uint32_t kWords = 8 / Vec16<A>::kCount;
  uint4 a[kSteps][kCount][kWords];  ///< packed: registers are few

  template <bool kVector>
  __device__ __forceinline__ void load(
      const Bank& bank, const Tile& tile, uint32_t rank, uint32_t slice, uint32_t j0) {
    const uint32_t lane = threadIdx.x % 32, k = bank.columns, k0 = slice * kSlice;
    const A* rows = static_cast<const A*>(bank.right) + size_t{tile.key} * bank.max_rank * k;
#pragma unroll
    for (uint32_t s = 0; s < kSteps; ++s) {
      const uint32_t p = k0 + 256 * s + 8 * lane, there = p < k ? min(k - p, 8u) : 0;
#pragma unroll
      for (uint32_t r = 0; r < kCount; ++r) {
        // Beyond the last row: that again.
        A v[8];
        load8<A, kVector>(v, rows + size_t{min(j0 + r, rank - 1)} * k + p, there);
        memcpy(a[s][r], v, sizeof(v));
      }
    }
  }

  /// By the tile's tokens' slices of x.
  template <typename X>
  __device__ __forceinline__ void multiply(
      const Shrink& args,
      const X (*x)[kSlice],
      const Tile& tile,
      uint32_t rank,
      uint32_t slice,
      uint32_t j0) const {
    const uint32_t lane = threadIdx.x % 32, max_rank = args.a.max_rank;
    float* out = args.out + size_t{slice} * args.m * max_rank;
    for (uint32_t i = 0; i < tile.count; ++i) {
      float sum[kCount] = {};
#pragma unroll
      for (uint32_t s = 0; s < kSteps; ++s) {
        X v[8];
        load8<X, true>(v, x[i] + 256 * s + 8 * lane, 8);
#pragma unroll
        for (uint32_t r = 0; r < kCount; ++r) {
          A row[8];
          memcpy(row, a[s][r], sizeof(row));
#pragma unroll
          for (uint32_t e = 0; e < 8; ++e) sum[r] = fmaf(to_float(v[e]), to_float(row[e]), sum[r]);
        }
      }
#pragma unroll
      for (uint32_t r = 0; r < kCount; ++r) {
        sum[r] = warp_sum(sum[r]);
        if (lane == 0 && j0 + r < rank) out[size_t{tile.token[i]} * max_rank + j0 + r] = sum[r];
      }
    }
  }
};

/// The same through shared memory, by which copies pass L1 by: each thread's own words.
template <typename A>
struct RowsRoom {
  static constexpr uint32_t kSteps = kSlice / 256, kCount = sizeof(A) == 4 ? 1 : 2;
  static constexpr uint32_t kStride = kShrinkThreads / 32 * kCount;
  static constexpr uint32_t kWords = 8 / Vec16<A>::kCount;
  static constexpr uint32_t kSize = kSteps * kCount * kWords * kShrinkThreads;

  static __device__ __forceinline__ void load(
      const Bank& bank, const Tile& tile, uint32_t rank, uint32_t slice, uint32_t j0, uint4* to) {
    const uint32_t lane = threadIdx.x % 32, k = bank.columns, k0 = slice * kSlice;
    const A* rows = static_cast<const A*>(bank.right) + size_t{tile.key} * bank.max_rank * k;
#pragma unroll
    for (uint32_t s = 0; s < kSteps; ++s) {
      const uint32_t p = k0 + 256 * s + 8 * lane;
#pragma unroll
      for (uint32_t r = 0; r < kCount; ++r) {
        const A* from = rows + size_t{min(j0 + r, rank - 1)} * k + (p < k ? p : 0);
#pragma unroll
        for (uint32_t w = 0; w < kWords; ++w) {
          mma::copy_async<16>(
              mma::shared_address(to + ((s * kCount + r) * kWords + w) * kShrinkThreads),
              from + w * Vec16<A>::kCount,
              p < k ? 16 : 0);
        }
      }
    }
  }

  template <typename X>
  static __device__ __forceinline__ void multiply(
      const Shrink& args,
      const X (*x)[kSlice],
      const Tile& tile,
      uint32_t rank,
      uint32_t slice,
      uint32_t j0,
      const uint4* a) {
    const uint32_t lane = threadIdx.x % 32, max_rank = args.a.max_rank;
    float* out = args.out + size_t{slice} * args.m * max_rank;
    for (uint32_t i = 0; i < tile.count; ++i) {
      float sum[kCount] = {};
#pragma unroll
      for (uint32_t s = 0; s < kSteps; ++s) {
        X v[8];
        load8<X, true>(v, x[i] + 256 * s + 8 * lane, 8);
#pragma unroll
        for (uint32_t r = 0; r < kCount; ++r) {
#pragma unroll
          for (uint32_t w = 0; w < kWords; ++w) {
            const auto row = *reinterpret_cast<const Vec16<A>*>(
                a + ((s * kCount + r) * kWords + w) * kShrinkThreads);
#pragma unroll
            for (uint32_t e = 0; e < Vec16<A>::kCount; ++e) {
              sum[r] = fmaf(to_float(v[w * Vec16<A>::kCount + e]), to_float(row.v[e]), sum[r]);
            }
          }
        }
      }
#pragma unroll
      for (uint32_t r = 0; r < kCount; ++r) {
        sum[r] = warp_sum(sum[r]);
        if (lane == 0 && j0 + r < rank) out[size_t{tile.token[i]} * max_rank + j0 + r] = sum[r];
      }
    }
  }
};

/// A tile and its slice.
struct Unit {
  const Tile* tile;
  uint32_t rank, slice;
};

/// kUnits at once, those with rank 0 not at all, by kShrinkThreads threads, whose barrier meet() is.
template <typename X, typename A, bool kVector, uint32_t kUnits, typename Meet>
__device__ __forceinline__ void shrink_units(
    const Shrink& args,
    const Unit (&unit)[kUnits],
    uint32_t thread,
    X (*x)[kTileTokens][kSlice],
    const Meet& meet) {
  uint32_t rank = 0;
#pragma unroll
  for (uint32_t u = 0; u < kUnits; ++u) {
    rank = max(rank, unit[u].rank);
    if (unit[u].rank > 0) stage_x<X, kVector>(args, *unit[u].tile, unit[u].slice, thread, x[u]);
  }
  mma::copies_commit();
  for (uint32_t j = 0; j < rank; j += Rows<A>::kStride) {  // the same for all warps: they meet
    const uint32_t j0 = j + thread / 32 * Rows<A>::kCount;
    Rows<A> rows[kUnits];
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      const Unit& v = unit[u];
      if (j < v.rank) rows[u].template load<kVector>(args.a, *v.tile, v.rank, v.slice, j0);
    }
    mma::copies_wait<0>();
    meet();  // x is there
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      const Unit& v = unit[u];
      if (j < v.rank) rows[u].multiply(args, x[u], *v.tile, v.rank, v.slice, j0);
    }
  }
}

}  // namespace metal_lora::cuda::multi
