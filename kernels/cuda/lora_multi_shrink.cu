// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The first half of a multi-adapter linear: tokens by adapter, and u[t] = A_i·x[t]. A block takes
// up to eight tokens of one adapter and 1024 columns of K; its tokens' x goes to shared memory, a
// warp takes two rows of A at a time, its lanes 16 bytes each, so that every byte of A is asked for
// once and all of a block's at once. Which block that is follows from the indices alone: the one at
// the tile's first token; the blocks at the others leave at once. A lane's sum runs along k and the
// lanes meet in a fixed tree, the same whatever else is in the tile.
//
// Ladder (H100, K = 4096, 128 adapters of rank 16, one a token, from memory; launches one behind
// another): 64 tokens 9.3 us for 6.6 MB, 128 tokens 11.9 us for 10.6 MB; x through shared memory
// and all of A at once: 7.3 and 9.1 us. Mostly latency: index, then A, then the end of the kernel;
// 0.9 and 1.2 TB/s.
#include <algorithm>

#include "kernels/cuda/lora_multi.cuh"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda::multi {
namespace {

constexpr uint32_t kShrinkThreads = 256, kShrinkBlocks = 3;
constexpr uint32_t kWarps = kShrinkThreads / 32;
constexpr uint32_t kRankTable = 256;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

struct ShrinkArgs {
  Grouping grouping;
  Bank a;
  const void* x = nullptr;
  float* out = nullptr;  ///< [slices, m, max_rank]
};

/// One warp: kRows rows from j0 of an adapter's A by its tokens' slices of x, which stand in shared
/// memory, to out [m, max_rank]. All that it reads of A is asked for at once.
template <typename X, typename A, bool kVector, uint32_t kRows>
__device__ __forceinline__ void shrink_rows(
    const Bank& bank,
    const X (*x)[kSlice],
    const Tile& tile,
    uint32_t rank,
    uint32_t j0,
    float* out) {
  constexpr uint32_t kSteps = kSlice / 256;
  const uint32_t lane = threadIdx.x % 32, k = bank.columns, k0 = blockIdx.y * kSlice;
  const A* rows = static_cast<const A*>(bank.right) + size_t{tile.key} * bank.max_rank * k;
  A a[kSteps][kRows][8];
#pragma unroll
  for (uint32_t s = 0; s < kSteps; ++s) {
    const uint32_t p = k0 + 256 * s + 8 * lane, there = p < k ? min(k - p, 8u) : 0;
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) {
      // Beyond the last row: that again.
      load8<A, kVector>(a[s][r], rows + size_t{min(j0 + r, rank - 1)} * k + p, there);
    }
  }
  mma::copies_commit();
  mma::copies_wait<0>();
  __syncthreads();  // x is there
  for (uint32_t i = 0; i < tile.count; ++i) {
    float sum[kRows] = {};
#pragma unroll
    for (uint32_t s = 0; s < kSteps; ++s) {
      X v[8];
      load8<X, true>(v, x[i] + 256 * s + 8 * lane, 8);
#pragma unroll
      for (uint32_t e = 0; e < 8; ++e) {
        const float xe = to_float(v[e]);
#pragma unroll
        for (uint32_t r = 0; r < kRows; ++r) sum[r] = fmaf(xe, to_float(a[s][r][e]), sum[r]);
      }
    }
#pragma unroll
    for (uint32_t r = 0; r < kRows; ++r) {
      sum[r] = warp_sum(sum[r]);
      if (lane == 0 && j0 + r < rank) out[size_t{tile.token[i]} * bank.max_rank + j0 + r] = sum[r];
    }
  }
}

/// The tile's slices of x to shared memory, zeros beyond k.
template <typename X, bool kVector>
__device__ __forceinline__ void stage_x(const ShrinkArgs& args, const Tile& tile, X (*to)[kSlice]) {
  const uint32_t k = args.a.columns, k0 = blockIdx.y * kSlice;
  const X* x = static_cast<const X*>(args.x) + k0;
  constexpr uint32_t kCount = kVector ? Vec16<X>::kCount : 1;
  for (uint32_t i = threadIdx.x; i < tile.count * (kSlice / kCount); i += kShrinkThreads) {
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

template <typename X, typename A, bool kVector>
__global__ void __launch_bounds__(kShrinkThreads, kShrinkBlocks)
    shrink_kernel(const ShrinkArgs args) {
  __shared__ TileSearch search;
  __shared__ uint32_t ranks[kRankTable];
  __shared__ alignas(16) X tokens[kTileTokens][kSlice];
  wait_for_previous();
  // A small bank's ranks are read beside the indices, not behind them.
  const uint32_t adapters = args.grouping.adapters;
  const bool table = adapters <= kRankTable;
  for (uint32_t i = threadIdx.x; table && i < adapters; i += kShrinkThreads) {
    ranks[i] = rank_of(args.a, i, adapters);
  }
  if (!find_tile(args.grouping, blockIdx.x, search)) return;
  const Tile& tile = search.tile;
  if (tile.key >= adapters) return;
  const uint32_t rank = table ? ranks[tile.key] : rank_of(args.a, tile.key, adapters);
  stage_x<X, kVector>(args, tile, tokens);
  allow_dependents();
  constexpr uint32_t kRows = sizeof(A) == 4 ? 1 : 2;
  float* out = args.out + size_t{blockIdx.y} * args.grouping.m * args.a.max_rank;
  for (uint32_t j = 0; j < rank; j += kWarps * kRows) {  // the same for all warps: they meet inside
    shrink_rows<X, A, kVector, kRows>(
        args.a, tokens, tile, rank, j + threadIdx.x / 32 * kRows, out);
  }
}

/// Each token counts those that come before it by adapter, then by place: m² comparisons, spread
/// over all multiprocessors (4096 tokens: 17 million).
__global__ void __launch_bounds__(kThreads) sort_kernel(
    const int32_t* index,
    uint32_t m,
    uint32_t adapters,
    uint32_t* order,
    uint32_t* key,
    uint32_t* within) {
  __shared__ uint32_t keys[kThreads];
  const uint32_t t = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t mine = t < m ? key_of(index[t], adapters) : 0;
  uint32_t less = 0, before = 0;
  for (uint32_t base = 0; base < m; base += kThreads) {
    __syncthreads();
    if (base + threadIdx.x < m) keys[threadIdx.x] = key_of(index[base + threadIdx.x], adapters);
    __syncthreads();
    const uint32_t count = min(kThreads, m - base);
#pragma unroll 8
    for (uint32_t i = 0; i < count; ++i) {
      less += keys[i] < mine;
      before += keys[i] == mine && base + i < t;
    }
  }
  if (t >= m) return;
  const uint32_t at = less + before;
  order[at] = t;
  key[at] = mine;
  within[at] = before;
}

}  // namespace

Grouping sort_tokens(const Context& context, const int32_t* index, uint32_t m, uint32_t adapters) {
  auto* words = static_cast<uint32_t*>(context.scratch->take(size_t{3} * m * 4));
  sort_kernel<<<ceil_div(m, kThreads), kThreads, 0, context.stream>>>(
      index, m, adapters, words, words + m, words + size_t{2} * m);
  check_launch("lora_multi_sort");
  return {index, m, adapters, words, words + m, words + size_t{2} * m};
}

Partials shrink(
    const Context& context, const Grouping& g, const Bank& a, DType dtype, const void* x) {
  Partials out;
  out.slices = ceil_div(a.columns, kSlice);
  if (out.slices == 0 || g.m == 0) return out;
  out.data = static_cast<float*>(
      context.scratch->take(size_t{out.slices} * g.m * a.max_rank * sizeof(float)));
  const ShrinkArgs args = {g, a, x, out.data};
  const bool vector = is_aligned(x) && is_aligned(a.right) && a.columns % 8 == 0;
  with_dtype(dtype, [&](auto x_type) {
    with_dtype(a.dtype, [&](auto a_type) {
      using X = decltype(x_type);
      using A = decltype(a_type);
      const auto kernel = vector ? &shrink_kernel<X, A, true> : &shrink_kernel<X, A, false>;
      launch_pdl(kernel, dim3(g.m, out.slices), kShrinkThreads, 0, context.stream, args);
    });
  });
  return out;
}

}  // namespace metal_lora::cuda::multi
