// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Flash attention forward on mma.sync: blocks of queries whose scores, probabilities and sums stay
// in registers; keys and values pass through two stages of shared memory.
#include <algorithm>

#include "kernels/cuda/attention_forward.cuh"

namespace metal_lora::cuda::attention {
namespace {

template <int kDim_, int kQueries_, int kKeys_, int kWarps_>
struct Tile {
  static constexpr int kDim = kDim_, kQueries = kQueries_, kKeys = kKeys_, kWarps = kWarps_;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = kQueries / (16 * kWarps);  ///< blocks of 16 queries of a warp
  static constexpr size_t kSharedBytes = (kQueries + 4 * kKeys) * kDim * 2;
};

template <typename T, typename Tile, int kRows, int kOut>
__device__ __forceinline__ void store_rows(
    const Arguments& a,
    const float (&o)[kRows][kOut][4],
    const RowState<kRows>& state,
    int row,
    int head,
    float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + 16 * m + lane / 4 + 8 * half;
      const float sum = quad_sum(state.sum[m][half]);
      if (i >= static_cast<int>(a.p.q_tokens)) continue;
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      T* to = static_cast<T*>(a.out) + i * a.p.o_stride + head * a.p.head_dim;
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        const int column = 8 * n + 2 * (lane % 4);
        if (column >= static_cast<int>(a.p.head_dim)) continue;
        *reinterpret_cast<uint32_t*>(to + column) =
            mma::pack2<T>(o[m][n][2 * half] * inverse, o[m][n][2 * half + 1] * inverse);
      }
      if (a.logsumexp != nullptr && lane % 4 == 0) {
        a.logsumexp[static_cast<size_t>(head) * a.p.q_tokens + i] =
            sum == 0.0f ? -INFINITY : (state.top[m][half] * scale + __log2f(sum)) * (1.0f / kLog2e);
      }
    }
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) forward_kernel(const Arguments a) {
  constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys, kRows = Tile::kRows;
  constexpr int kBlocks = kKeys / 8, kOut = kDim / 8, kTileBytes = kKeys * kDim * 2;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t queries = mma::shared_address(memory);
  const uint32_t stages = queries + Tile::kQueries * kDim * 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = (gridDim.y - 1 - blockIdx.y) * Tile::kQueries;  // the longest rows first
  const int head = blockIdx.x, tokens = a.p.q_tokens, head_dim = a.p.head_dim;
  const int kv_head = head / (a.p.q_heads / a.p.kv_heads);
  begin_dependent();

  const int offset = offset_of(a), end = min(begin + Tile::kQueries, tokens);
  const int2 firsts = first_keys(a, offset, begin, end);
  const int last = last_key(a, offset, end - 1);
  const auto* q = static_cast<const uint16_t*>(a.q) + head * head_dim;
  const auto* k = static_cast<const uint16_t*>(a.k) + kv_head * head_dim;
  const auto* v = static_cast<const uint16_t*>(a.v) + kv_head * head_dim;
  const auto load_keys = [&](int stage, int key) {
    const uint32_t to = stages + stage * 2 * kTileBytes;
    load_tile<kDim, kKeys, Tile::kThreads>(to, k, a.p.k_stride, key, last + 1, head_dim);
    load_tile<kDim, kKeys, Tile::kThreads>(
        to + kTileBytes, v, a.p.v_stride, key, last + 1, head_dim);
    mma::copies_commit();
  };
  const int first_tile = firsts.x / kKeys * kKeys;
  load_tile<kDim, Tile::kQueries, Tile::kThreads>(
      queries, q, a.p.q_stride, begin, tokens, head_dim);
  load_keys(0, first_tile);

  const int row = begin + warp * 16 * kRows;
  RowState<kRows> state;
  float o[kRows][kOut][4] = {};
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = min(row + 16 * m + lane / 4 + 8 * half, tokens - 1);
      state.top[m][half] = -INFINITY, state.sum[m][half] = 0.0f;
      state.first[m][half] = first_key(a, offset, i);
      state.last[m][half] = last_key(a, offset, i);
    }
  }
  const bool negative = a.p.scale < 0.0f;
  const float scale = fmaxf(fabsf(a.p.scale), 1e-30f) * kLog2e;

  for (int key = first_tile, stage = 0; key <= last; key += kKeys, stage ^= 1) {
    mma::copies_wait<0>();
    __syncthreads();
    if (key + kKeys <= last) load_keys(stage ^ 1, key + kKeys);
    if (key > offset + row + 16 * kRows - 1) continue;  // beyond this warp's rows
    const uint32_t keys = stages + stage * 2 * kTileBytes, values = keys + kTileBytes;
    float s[kRows][kBlocks][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t left[kRows][4];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        load_left<kDim>(left[m], queries, (warp * kRows + m) * 16, d);
      }
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t right[4];
        load_right_rows<kDim>(right, keys, 8 * n, d);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          mma::multiply<T>(s[m][n], left[m], right[0], right[1]);
          mma::multiply<T>(s[m][n + 1], left[m], right[2], right[3]);
        }
      }
    }
    if (negative) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) s[m][n][c] = -s[m][n][c];
        }
      }
    }
    // The last column must be every row's, the first one too: else some see less.
    if (key + kKeys - 1 > min(offset + row, last) || key < firsts.y) {
      soften<true>(s, o, state, key, scale);
    } else {
      soften<false>(s, o, state, key, scale);
    }
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      uint32_t left[kRows][4];
#pragma unroll
      for (int m = 0; m < kRows; ++m) pack_left<T>(left[m], s[m][n / 8], s[m][n / 8 + 1]);
#pragma unroll
      for (int d = 0; d < kOut; d += 2) {
        uint32_t right[4];
        load_right_columns<kDim>(right, values, n, 8 * d);
#pragma unroll
        for (int m = 0; m < kRows; ++m) {
          mma::multiply<T>(o[m][d], left[m], right[0], right[1]);
          mma::multiply<T>(o[m][d + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
  mma::copies_wait<0>();
  store_rows<T, Tile>(a, o, state, row, head, scale);
}

template <typename T, typename Tile>
void run(const Context& context, const Arguments& a) {
  const dim3 grid(a.p.q_heads, (a.p.q_tokens + Tile::kQueries - 1) / Tile::kQueries);
  launch(
      context,
      "attention_forward",
      forward_kernel<T, Tile>,
      grid,
      Tile::kThreads,
      Tile::kSharedBytes,
      a);
}
template <typename T>
void run_dim(const Context& context, const Arguments& a) {
  if (a.p.head_dim <= 64) return run<T, Tile<64, 128, 64, 4>>(context, a);
  if (a.p.head_dim <= 128) return run<T, Tile<128, 128, 64, 8>>(context, a);
  return run<T, Tile<256, 64, 32, 4>>(context, a);
}

}  // namespace

void forward_tiled(const Context& context, const Arguments& a) {
  a.p.dtype == DType::bf16 ? run_dim<bf16>(context, a) : run_dim<f16>(context, a);
}

}  // namespace metal_lora::cuda::attention
