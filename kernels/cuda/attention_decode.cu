// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Attention of a few queries over a long cache: its keys are split over the blocks ("flash
// decoding") and, within a block, over warps that stream their own tiles; the queries of all heads
// that share a kv head are the rows of one product. How many keys a block takes follows from the
// position alone, so that a position's sums always have the same order.
#include <algorithm>

#include "kernels/cuda/attention_forward.cuh"

namespace metal_lora::cuda::attention {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kStages = 3;
constexpr int kRows = 16;  ///< queries of a block: tokens x heads of a group

template <int kDim>
struct Tile {
  static constexpr int kKeys = kDim <= 64 ? 32 : 16;  ///< of one warp's tile
  static constexpr int kBytes = kKeys * kDim * 2;
  static constexpr int kWarpBytes = kStages * 2 * kBytes;
  static constexpr size_t kSharedBytes = size_t{kWarps} * kWarpBytes;
};

/// The keys of one block of rows and how they are cut.
struct Split {
  int first, last, chunk;
};
template <int kDim>
__device__ Split split_keys(const Arguments& a, int offset, int row_block, int splits) {
  constexpr int kKeys = Tile<kDim>::kKeys;
  const int group = a.p.q_heads / a.p.kv_heads, tokens = a.p.q_tokens;
  const int begin = row_block * kRows / group;
  const int end = min((row_block * kRows + kRows - 1) / group, tokens - 1);
  int first = INT_MAX;
  for (int i = begin; i <= end; ++i) first = min(first, first_key(a, offset, i));
  Split s;
  s.last = last_key(a, offset, end);
  s.first = min(first, s.last + 1) / kKeys * kKeys;
  const int share = (s.last + 1 - s.first + splits - 1) / splits;
  s.chunk = max((share + kKeys - 1) / kKeys, kWarps) * kKeys;
  return s;
}

template <int kDim>
__device__ __forceinline__ void load_keys(
    uint32_t tile, const uint16_t* from, size_t stride, int begin, int end, int head_dim) {
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile<kDim>::kKeys * kChunks / 32; ++i) {
    const int at = i * 32 + lane, row = at / kChunks, chunk = at % kChunks;
    const bool there = begin + row < end && chunk * 8 < head_dim;
    const uint16_t* source = there ? from + (begin + row) * stride + chunk * 8 : from;
    mma::copy_async<16>(tile_at<kDim>(tile, row, chunk), source, there ? 16 : 0);
  }
}

/// The scores of one warp's tile, softened, times its values.
template <typename T, int kDim>
__device__ __forceinline__ void add_tile(
    const uint32_t (&q)[kDim / 16][4],
    float (&o)[1][kDim / 8][4],
    RowState<1>& state,
    uint32_t keys,
    int key,
    float sign,
    float scale) {
  constexpr int kKeys = Tile<kDim>::kKeys;
  const uint32_t values = keys + Tile<kDim>::kBytes;
  float s[1][kKeys / 8][4] = {};
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t right[4];
      load_right_rows<kDim>(right, keys, 8 * n, d);
      mma::multiply<T>(s[0][n], q[d / 16], right[0], right[1]);
      mma::multiply<T>(s[0][n + 1], q[d / 16], right[2], right[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[0][n][c] *= sign;
  }
  soften<true>(s, o, state, key, scale);
#pragma unroll
  for (int n = 0; n < kKeys; n += 16) {
    uint32_t left[4];
    pack_left<T>(left, s[0][n / 8], s[0][n / 8 + 1]);
#pragma unroll
    for (int d = 0; d < kDim / 8; d += 2) {
      uint32_t right[4];
      load_right_columns<kDim>(right, values, n, 8 * d);
      mma::multiply<T>(o[0][d], left, right[0], right[1]);
      mma::multiply<T>(o[0][d + 1], left, right[2], right[3]);
    }
  }
}

/// Partial sums: [row_block, kv_head, split, row] (top, sum) and, behind them, [.., kDim].
struct Partials {
  float2* state;
  float* sums;
};

/// The block's warps together, in their order, into its partial sums.
template <int kDim>
__device__ __forceinline__ void merge_warps(
    float* memory, const float (&o)[1][kDim / 8][4], const RowState<1>& state, Partials to) {
  constexpr int kPitch = kDim + 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float2* states = reinterpret_cast<float2*>(memory);  // [warp, row]
  float* sums = memory + 2 * kWarps * kRows;           // [warp, row, kPitch]
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float sum = quad_sum(state.sum[0][half]);
    if (lane % 4 == 0) states[warp * kRows + row] = make_float2(state.top[0][half], sum);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      *reinterpret_cast<float2*>(
          &sums[(warp * kRows + row) * kPitch + 8 * d + 2 * (lane % 4)]) =
          make_float2(o[0][d][2 * half], o[0][d][2 * half + 1]);
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < kRows * kDim; at += kThreads) {
    const int row = at / kDim, column = at % kDim;
    float top = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, states[w * kRows + row].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = states[w * kRows + row];
      const float fade = part.x == -INFINITY ? part.y : exp2_fast(part.x - top);
      sum = fmaf(part.y, fade, sum);
      total = fmaf(sums[(w * kRows + row) * kPitch + column], fade, total);
    }
    to.sums[at] = total;
    if (column == 0) to.state[row] = make_float2(top, sum);
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads) decode_kernel(const Arguments a, Partials partials) {
  using Tile = Tile<kDim>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head_dim = a.p.head_dim, group = a.p.q_heads / a.p.kv_heads;
  const int kv_head = blockIdx.y, row_block = blockIdx.z;
  const int rows = a.p.q_tokens * group;
  begin_dependent();
  const int offset = offset_of(a);
  const Split split = split_keys<kDim>(a, offset, row_block, gridDim.x);
  const int begin = split.first + blockIdx.x * split.chunk;
  const int end = min(begin + split.chunk, split.last + 1);
  if (begin >= end && blockIdx.x > 0) return;

  const auto* k = static_cast<const uint16_t*>(a.k) + kv_head * head_dim;
  const auto* v = static_cast<const uint16_t*>(a.v) + kv_head * head_dim;
  const uint32_t tiles = mma::shared_address(memory) + warp * Tile::kWarpBytes;
  const auto load = [&](int step) {
    const int key = begin + (step * kWarps + warp) * Tile::kKeys;
    if (key < end) {
      const uint32_t to = tiles + step % kStages * 2 * Tile::kBytes;
      load_keys<kDim>(to, k, a.p.k_stride, key, end, head_dim);
      load_keys<kDim>(to + Tile::kBytes, v, a.p.v_stride, key, end, head_dim);
    }
    mma::copies_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);

  uint32_t q[kDim / 16][4];
  RowState<1> state;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int flat = row_block * kRows + lane / 4 + 8 * half;
    const int i = min(flat, rows - 1) / group;
    const int head = kv_head * group + min(flat, rows - 1) % group;
    const auto* from =
        static_cast<const uint16_t*>(a.q) + i * a.p.q_stride + static_cast<size_t>(head) * head_dim;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 16 * d + 8 * c + 2 * (lane % 4);
        q[d][2 * c + half] =
            column < head_dim ? *reinterpret_cast<const uint32_t*>(from + column) : 0u;
      }
    }
    state.top[0][half] = -INFINITY, state.sum[0][half] = 0.0f;
    state.first[0][half] = first_key(a, offset, i);
    state.last[0][half] = min(last_key(a, offset, i), end - 1);
  }
  const float sign = a.p.scale < 0.0f ? -1.0f : 1.0f;
  const float scale = fmaxf(fabsf(a.p.scale), 1e-30f) * kLog2e;
  float o[1][kDim / 8][4] = {};
  for (int step = 0; begin + (step * kWarps + warp) * Tile::kKeys < end; ++step) {
    mma::copies_wait<kStages - 2>();
    __syncwarp();
    load(step + kStages - 1);
    add_tile<T, kDim>(
        q,
        o,
        state,
        tiles + step % kStages * 2 * Tile::kBytes,
        begin + (step * kWarps + warp) * Tile::kKeys,
        sign,
        scale);
  }
  mma::copies_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) state.top[0][half] *= scale;
  const size_t at =
      ((static_cast<size_t>(row_block) * a.p.kv_heads + kv_head) * gridDim.x + blockIdx.x) * kRows;
  partials.state += at;
  partials.sums += at * kDim;
  merge_warps<kDim>(reinterpret_cast<float*>(memory), o, state, partials);
}

/// One block a row: the splits' partial sums together, in their order.
template <typename T, int kDim>
__global__ void __launch_bounds__(kDim)
    combine_kernel(const Arguments a, Partials partials, int splits) {
  begin_dependent();
  const int group = a.p.q_heads / a.p.kv_heads, kv_head = blockIdx.y;
  const int row_block = blockIdx.x / kRows, row = blockIdx.x % kRows;
  const int i = blockIdx.x / group, head = kv_head * group + blockIdx.x % group;
  const Split split = split_keys<kDim>(a, offset_of(a), row_block, splits);
  const int count = max((split.last - split.first + split.chunk) / split.chunk, 1);
  const size_t at =
      (static_cast<size_t>(row_block) * a.p.kv_heads + kv_head) * splits * kRows + row;
  const float2* states = partials.state + at;
  const float* sums = partials.sums + at * kDim + threadIdx.x;
  float top = -INFINITY, sum = 0.0f, total = 0.0f;
  for (int s = 0; s < count; ++s) top = fmaxf(top, states[s * kRows].x);
#pragma unroll 8
  for (int s = 0; s < count; ++s) {
    const float2 part = states[s * kRows];
    const float fade = part.x == -INFINITY ? part.y : exp2_fast(part.x - top);
    sum = fmaf(part.y, fade, sum);
    total = fmaf(sums[static_cast<size_t>(s) * kRows * kDim], fade, total);
  }
  if (threadIdx.x < a.p.head_dim) {
    static_cast<T*>(a.out)
        [i * a.p.o_stride + static_cast<size_t>(head) * a.p.head_dim + threadIdx.x] =
            from_float<T>(sum == 0.0f ? 0.0f : total / sum);
  }
  if (a.logsumexp != nullptr && threadIdx.x == 0) {
    a.logsumexp[static_cast<size_t>(head) * a.p.q_tokens + i] =
        sum == 0.0f ? -INFINITY : (top + __log2f(sum)) * (1.0f / kLog2e);
  }
}

template <typename T, int kDim>
void run(const Context& context, const Arguments& a) {
  const uint32_t rows = a.p.q_tokens * (a.p.q_heads / a.p.kv_heads);
  const uint32_t row_blocks = (rows + kRows - 1) / kRows;
  const uint32_t most = (a.p.kv_tokens + Tile<kDim>::kKeys * kWarps - 1) /
      (Tile<kDim>::kKeys * kWarps);
  const uint32_t resident = context.multiprocessors * (kDim <= 128 ? 2 : 1);
  const uint32_t splits =
      std::max(1u, std::min(most, resident / std::max(1u, a.p.kv_heads * row_blocks)));
  const size_t slots = size_t{row_blocks} * a.p.kv_heads * splits * kRows;
  Partials partials;
  partials.state = static_cast<float2*>(context.scratch->take(slots * sizeof(float2)));
  partials.sums = static_cast<float*>(context.scratch->take(slots * kDim * sizeof(float)));
  launch(
      context,
      "attention_forward decode",
      decode_kernel<T, kDim>,
      dim3(splits, a.p.kv_heads, row_blocks),
      kThreads,
      Tile<kDim>::kSharedBytes,
      a,
      partials);
  launch(
      context,
      "attention_forward combine",
      combine_kernel<T, kDim>,
      dim3(rows, a.p.kv_heads),
      kDim,
      0,
      a,
      partials,
      static_cast<int>(splits));
}
template <typename T>
void run_dim(const Context& context, const Arguments& a) {
  if (a.p.head_dim <= 64) return run<T, 64>(context, a);
  if (a.p.head_dim <= 128) return run<T, 128>(context, a);
  return run<T, 256>(context, a);
}

}  // namespace

void forward_decode(const Context& context, const Arguments& a) {
  a.p.dtype == DType::bf16 ? run_dim<bf16>(context, a) : run_dim<f16>(context, a);
}

}  // namespace metal_lora::cuda::attention
