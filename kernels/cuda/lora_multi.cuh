// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the multi-adapter kernels share: the bank as kernels see it, the grouping of tokens by
// adapter (worked out on the device) and the shrink u[t] = A_i·x[t] in slices of k.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/context.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda::multi {

inline constexpr uint32_t kThreads = 256;
/// Columns of k that are summed apart: a constant, so that sums are the same in all forms.
inline constexpr uint32_t kSlice = 1024;
/// Tokens of one adapter that share a read of its matrices.
inline constexpr uint32_t kTileTokens = 8;
/// Up to here every block groups the tokens itself; beyond, a kernel sorts them once.
inline constexpr uint32_t kScanTokens = 512;

/// Which token uses which adapter. `order` (null: the tokens' own order, and blocks scan) lists the
/// tokens by adapter, `key` their adapters, `within` how many of the same adapter come before.
struct Grouping {
  const int32_t* index = nullptr;
  uint32_t m = 0, adapters = 0;
  const uint32_t* order = nullptr;
  const uint32_t* key = nullptr;
  const uint32_t* within = nullptr;
};

struct Bank {
  const void* right =
      nullptr;  ///< A [adapters, max_rank, columns] or B [adapters, columns, max_rank]
  DType dtype = DType::f32;
  uint32_t columns = 0, max_rank = 0;
  const int32_t* ranks = nullptr;
  const float* scales = nullptr;
};

/// u in slices of the inner dimension: f32 [slices, m, max_rank]. The sum over the slices, in their
/// order, times the adapter's scale, is what goes on.
struct Partials {
  float* data = nullptr;
  uint32_t slices = 0;
};

/// All that have no adapter share one key.
__device__ __forceinline__ uint32_t key_of(int32_t index, uint32_t adapters) {
  return static_cast<uint32_t>(index) < adapters ? static_cast<uint32_t>(index) : adapters;
}

struct Tile {
  uint32_t key, count;
  uint32_t token[kTileTokens];
};
struct TileSearch {
  uint32_t words[kScanTokens / 32];
  Tile tile;
};

/// The tile that begins at `position` of the order; false: none does. For all threads of a block.
__device__ inline bool find_tile(const Grouping& g, uint32_t position, TileSearch& shared) {
  const uint32_t lane = threadIdx.x % 32;
  if (g.order) {
    if (g.within[position] % kTileTokens != 0) return false;
    const uint32_t key = g.key[position];
    if (threadIdx.x < 32) {
      const uint32_t p = position + lane;
      const bool same = lane < kTileTokens && p < g.m && g.key[p] == key;
      if (same) shared.tile.token[lane] = g.order[p];
      const uint32_t count = __popc(__ballot_sync(0xffffffffu, same));
      if (lane == 0) shared.tile.key = key, shared.tile.count = count;
    }
    __syncthreads();
    return true;
  }
  const uint32_t key = key_of(g.index[position], g.adapters);
  for (uint32_t base = threadIdx.x - lane; base < g.m; base += blockDim.x) {
    const uint32_t t = base + lane;
    const bool same = t < g.m && key_of(g.index[t], g.adapters) == key;
    const uint32_t word = __ballot_sync(0xffffffffu, same);
    if (lane == 0) shared.words[base / 32] = word;
  }
  __syncthreads();
  const uint32_t at = position / 32, below = (1u << position % 32) - 1;
  uint32_t before = __popc(shared.words[at] & below);
  for (uint32_t i = 0; i < at; ++i) before += __popc(shared.words[i]);
  if (before % kTileTokens != 0) return false;
  if (threadIdx.x == 0) {
    uint32_t count = 0, word = shared.words[at] & ~below;
    for (uint32_t i = at; count < kTileTokens;) {
      if (word == 0) {
        if (++i * 32 >= g.m) break;
        word = shared.words[i];
        continue;
      }
      shared.tile.token[count++] = 32 * i + __ffs(word) - 1;
      word &= word - 1;
    }
    shared.tile.key = key, shared.tile.count = count;
  }
  __syncthreads();
  return true;
}

__device__ __forceinline__ uint32_t rank_of(const Bank& bank, uint32_t key, uint32_t adapters) {
  return key < adapters ? min(static_cast<uint32_t>(max(bank.ranks[key], 0)), bank.max_rank) : 0;
}

/// Σ over the slices, in their order.
__device__ __forceinline__ float sum_slices(
    const Partials& partials, uint32_t m, uint32_t max_rank, uint32_t token, uint32_t j) {
  const float* from = partials.data + size_t{token} * max_rank + j;
  const size_t stride = size_t{m} * max_rank;
  float sum = 0.0f;
#pragma unroll 4
  for (uint32_t s = 0; s < partials.slices; ++s) sum += from[s * stride];
  return sum;
}

/// Eight values at p + i of which `count` are there; vectors where kVector.
template <typename T, bool kVector>
__device__ __forceinline__ void load8(T (&to)[8], const T* p, uint32_t count) {
  if constexpr (kVector) {
    constexpr uint32_t kCount = Vec16<T>::kCount;
#pragma unroll
    for (uint32_t q = 0; q < 8 / kCount; ++q) {
      Vec16<T> v = {};
      if (count > 0) v = load16(p + q * kCount);
#pragma unroll
      for (uint32_t e = 0; e < kCount; ++e) to[q * kCount + e] = v.v[e];
    }
  } else {
#pragma unroll
    for (uint32_t e = 0; e < 8; ++e) to[e] = e < count ? p[e] : from_float<T>(0.0f);
  }
}

/// Makes `order`, `key` and `within` in scratch.
Grouping sort_tokens(const Context& context, const int32_t* index, uint32_t m, uint32_t adapters);

inline constexpr uint32_t kStreamTokens = 128;

/// What the streaming form is asked for.
struct Stream {
  uint32_t m = 0, n = 0, k = 0;
  DType dtype = DType::bf16;
  const void* x = nullptr;
  const void* w = nullptr;
  const int32_t* index = nullptr;
  Bank a, b;
  uint32_t adapters = 0;
  const float* bias = nullptr;
  void* y = nullptr;
  /// How long a block waits for other blocks' u before it works all of it out itself.
  uint32_t patience_ns = 200'000;
};
/// A_i·x[t] of every token with an adapter, x [m, bank.columns] of `dtype`.
Partials shrink(
    const Context& context, const Grouping& g, const Bank& a, DType dtype, const void* x);
/// Whether the streaming form takes it: compute capability 9.0, x, W and the bank of
/// one 16-bit type, up to kStreamTokens tokens, whole aligned vectors, counters.
bool can_stream(const Context& context, const Stream& call);
/// y = W·x + bias + scales·B_i·(A_i·x): in one launch.
void stream(const Context& context, const Stream& call);

}  // namespace metal_lora::cuda::multi
