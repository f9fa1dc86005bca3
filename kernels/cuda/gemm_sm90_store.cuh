// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A tile of gemm_sm90.cu: bias, rounding, and the way to memory.
#pragma once

#include <type_traits>

#include "kernels/cuda/gemm_sm90_args.cuh"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda::sm90 {

using mma::pack2;

template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T low, high;
};

/// To the sums of one box of 64 columns: 8 blocks of 8 columns. bias: or null.
__device__ __forceinline__ void add_bias(float* d, const float* bias, uint32_t n, uint32_t column) {
  if (bias == nullptr) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t c = column + 8 * j;
    const float low = c < n ? __ldg(bias + c) : 0.0f;
    const float high = c + 1 < n ? __ldg(bias + c + 1) : 0.0f;
    d[4 * j] += low;
    d[4 * j + 1] += high;
    d[4 * j + 2] += low;
    d[4 * j + 3] += high;
  }
}
/// The residual that Residual does not take: f32, or n that ends between 16-byte units.
template <typename Out>
__device__ __forceinline__ void add_residual(
    float* d, const ProblemArgs& problem, uint32_t m, uint32_t row, uint32_t column) {
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

/// Where in a warp's swizzled box of 16 rows x 64 columns this lane's row of blocks j and j + 1 of
/// 8 columns lies.
__device__ __forceinline__ uint32_t box_place(int j) {
  const uint32_t lane = threadIdx.x % 32;
  return lane % 16 * 128 + ((j + lane / 16) ^ (lane % 8)) * 16;
}

/// One warp's box of 16 rows x 64 columns of 16-bit results, swizzled, to shared memory.
template <typename T>
__device__ __forceinline__ void put_box(const float* d, uint32_t to) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    store_matrix_x4(
        to + box_place(j),
        pack2<T>(d[4 * j], d[4 * j + 1]),
        pack2<T>(d[4 * j + 2], d[4 * j + 3]),
        pack2<T>(d[4 * j + 4], d[4 * j + 5]),
        pack2<T>(d[4 * j + 6], d[4 * j + 7]));
  }
}

/// A box's place in memory, 16-bit, n a multiple of 8: pairs of lanes trade halves (trade), so that
/// each quad moves whole 32-byte sectors. Part i: rows i / 4 · 8 further, columns i % 4 · 16.
template <typename T>
struct Sectors {
  T* to;
  size_t stride;
  uint32_t rows, columns;  ///< that are left
  __device__ __forceinline__
  Sectors(T* base, size_t row_stride, uint32_t m, uint32_t n, uint32_t warp_row, uint32_t column)
      : stride(row_stride) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t row = warp_row + lane / 4, first = column + lane % 2 * 8 + lane % 4 / 2 * 4;
    to = base + row * stride + first;
    rows = row < m ? m - row : 0;
    columns = first < n ? n - first : 0;
  }
  __device__ __forceinline__ bool there(int i) const {
    return i / 4 * 8u < rows && i % 4 * 16u < columns;
  }
  using Part = std::conditional_t<std::is_const_v<T>, const uint2, uint2>;
  __device__ __forceinline__ Part* address(int i) const {
    return reinterpret_cast<Part*>(to + i / 4 * 8 * stride + i % 4 * 16);
  }
};
/// The first of part i's sums in a box; its others: + 1, + 4, + 5.
__device__ __forceinline__ constexpr int sector_sum(int i) {
  return i % 4 * 8 + i / 4 * 2;
}
/// From memory's order to the sums' (two words: blocks j and j + 1), and back: the same exchange.
__device__ __forceinline__ uint2 trade(uint2 part) {
  const bool odd = threadIdx.x % 2;
  const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? part.x : part.y, 1);
  return odd ? make_uint2(got, part.y) : make_uint2(part.x, got);
}

/// The same box straight to memory, or its first kColumns.
template <typename T, int kColumns = 64>
__device__ __forceinline__ void store_sectors(
    const float* d,
    void* out,
    size_t stride,
    uint32_t m,
    uint32_t n,
    uint32_t warp_row,
    uint32_t column) {
  const Sectors<T> at(static_cast<T*>(out), stride, m, n, warp_row, column);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i % 4 * 16 >= kColumns) continue;
    const float* from = &d[sector_sum(i)];
    const uint2 part = trade({pack2<T>(from[0], from[1]), pack2<T>(from[4], from[5])});
    if (at.there(i)) *at.address(i) = part;
  }
}

/// One warp's 16 rows of a tile to `out`, 16-bit, n a multiple of 8: through shared memory by the
/// copy engine, without a wait for it, so that the matrix unit does not wait either. The box of
/// columns 0 … 63 of a 256-wide tile lies in the tile's last stage, where it takes the rows of the
/// left operand that this warp alone multiplied; columns 192 … 255 have no room and go directly, as
/// do those of a narrower tile's last box that is not whole.
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
  if constexpr (kBoxes < L::kRightBoxes) {
    static_assert(kBoxes + 1 == L::kRightBoxes && kTileN % 16 == 0);
    store_sectors<T, kTileN - 64 * kBoxes>(
        &d[32 * kBoxes],
        problem.out,
        problem.out_stride,
        args.m,
        problem.n,
        warp_row,
        n0 + 64 * kBoxes);
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

}  // namespace metal_lora::cuda::sm90
