// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The first half of a multi-adapter linear: tokens by adapter, and u[t] = A_i·x[t]. A block takes
// up to eight tokens of one adapter and 1024 columns of K. Which block that is follows from the
// indices alone: the one at the tile's first token; the blocks at the others leave at once.
//
// Ladder (H100, K = 4096, 128 adapters of rank 16, one a token, from memory; launches one behind
// another): 64 tokens 9.3 us for 6.6 MB, 128 tokens 11.9 us for 10.6 MB; x through shared memory
// and all of A at once: 7.3 and 9.1 us. Mostly latency: index, then A, then the end of the kernel;
// 0.9 and 1.2 TB/s.
#include <algorithm>

#include "kernels/cuda/lora_multi_shrink.cuh"

namespace metal_lora::cuda::multi {
namespace {

constexpr uint32_t kShrinkBlocks = 3;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}
bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

/// A block to a token and a slice: those at the first token of a tile have work.
template <typename X, typename A, bool kVector>
__global__ void __launch_bounds__(kShrinkThreads, kShrinkBlocks)
    shrink_kernel(const Grouping grouping, const Shrink args) {
  __shared__ TileSearch search;
  __shared__ alignas(16) X x[1][kTileTokens][kSlice];
  wait_for_previous();
  allow_dependents();
  if (!find_tile(grouping, blockIdx.x, search)) return;
  const Tile& tile = search.tile;
  if (tile.key >= grouping.adapters) return;
  const uint32_t rank = rank_of(args.a, tile.key, grouping.adapters);
  const Unit unit[] = {{&tile, rank, blockIdx.y}};
  shrink_units<X, A, kVector>(args, unit, threadIdx.x, x, [] { __syncthreads(); });
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
  if (a.columns == 0 || g.m == 0) return {};
  Shrink args = {a, x, nullptr, g.m, ceil_div(a.columns, kSlice)};
  args.out = static_cast<float*>(
      context.scratch->take(size_t{args.slices} * g.m * a.max_rank * sizeof(float)));
  const dim3 grid(g.m, args.slices);
  const bool vector = aligned(x) && aligned(a.right) && a.columns % 8 == 0;
  with_dtype(dtype, [&](auto x_type) {
    with_dtype(a.dtype, [&](auto a_type) {
      using X = decltype(x_type);
      using A = decltype(a_type);
      const auto kernel = vector ? &shrink_kernel<X, A, true> : &shrink_kernel<X, A, false>;
      launch_pdl(kernel, grid, kShrinkThreads, 0, context.stream, g, args);
    });
  });
  return {args.out, args.slices};
}

}  // namespace metal_lora::cuda::multi
