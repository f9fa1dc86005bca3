// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Attention of a few queries over a long cache: its keys are split over the blocks ("flash
// decoding") and, within a block, over warps that stream their own tiles; the queries of all heads
// that share a kv head are the rows of one product. How many keys a block takes follows from the
// position alone, so that a position's sums always have the same order. The last block to finish
// adds the partial sums up.
//
// Ladder, H100, bf16, 1 query, 32/8 heads, dim 64, 1024 / 8192 / 32768 keys:
//   two launches                     6.7 / 15.1 / 32.7 us
//   the last block combines          6.6 / 13.2 / 30.5 us
//   eight warps a block              6.3 / 12.1 / 29.0 us (2.3 TB/s; a copy moves 2.4)
// An empty launch is 1.15 us, partial sums and their ticket are 1.4, adding them up 1.7; a cluster
// that combines through shared memory could save about 1.5.
#include <algorithm>

#include "kernels/cuda/attention_forward.cuh"

namespace metal_lora::cuda::attention {
namespace {

constexpr int kStages = 3;
constexpr int kRows = 16;  ///< queries of a block: tokens x heads of a group

template <int kDim>
struct Tile {
  static constexpr int kWarps = kDim <= 128 ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kKeys = kDim <= 64 ? 32 : 16;  ///< of one warp's tile
  static constexpr int kLeast = 4;  ///< tiles of a block, below which more blocks do not pay
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
  s.chunk = max((share + kKeys - 1) / kKeys, Tile<kDim>::kLeast) * kKeys;
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
    float* memory,
    const float (&o)[1][kDim / 8][4],
    const RowState<1>& state,
    Partials to,
    int rows) {
  constexpr int kPitch = kDim + 4, kWarps = Tile<kDim>::kWarps, kThreads = Tile<kDim>::kThreads;
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
      *reinterpret_cast<float2*>(&sums[(warp * kRows + row) * kPitch + 8 * d + 2 * (lane % 4)]) =
          make_float2(o[0][d][2 * half], o[0][d][2 * half + 1]);
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < rows * kDim; at += kThreads) {
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

/// Some columns of a row, summed over some keys.
struct Sum {
  float top = -INFINITY, sum = 0.0f;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  /// Adds a part whose maximum is at most `top`.
  __device__ __forceinline__ void add(float2 state, float4 x) {
    const float fade = state.x == -INFINITY ? state.y : exp2_fast(state.x - top);
    sum = fmaf(state.y, fade, sum);  // y: 0, or NaN where there was one
    total.x = fmaf(x.x, fade, total.x), total.y = fmaf(x.y, fade, total.y);
    total.z = fmaf(x.z, fade, total.z), total.w = fmaf(x.w, fade, total.w);
  }
};

/// The splits' partial sums of one block of rows together, in their order: groups of threads take
/// runs of splits, whose sums then follow each other.
template <typename T, int kDim>
__device__ __forceinline__ void combine(
    const Arguments& a,
    const Partials& from,
    int row_block,
    int kv_head,
    int count,
    float* memory) {
  constexpr int kVectors = kDim / 4;  // of a row
  constexpr int kBatch = 4;           // of splits, loaded together
  constexpr int kThreads = Tile<kDim>::kThreads;
  const int group = a.p.q_heads / a.p.kv_heads, thread = threadIdx.x;
  const int rows = min(static_cast<int>(a.p.q_tokens) * group - row_block * kRows, kRows);
  const int slots = rows * kVectors, groups = max(kThreads / slots, 1);
  const auto sum_run = [&](int slot, int begin, int end) {
    const float2* states = from.state + slot / kVectors;
    const float4* sums = reinterpret_cast<const float4*>(from.sums) + slot;
    Sum sum;
    for (int s = begin; s < end; s += kBatch) {
      float2 state[kBatch];
      float4 part[kBatch];
      float top = sum.top;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int at = min(s + b, end - 1);
        state[b] = __ldcg(states + at * kRows);
        part[b] = __ldcg(sums + static_cast<size_t>(at) * kRows * kVectors);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) top = fmaxf(top, state[b].x);
      const float2 before = make_float2(sum.top, sum.sum);
      const float4 total = sum.total;
      sum = {top, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
      sum.add(before, total);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (s + b < end) sum.add(state[b], part[b]);
      }
    }
    return sum;
  };
  const auto finish = [&](int slot, const Sum& sum) {
    const int flat = row_block * kRows + slot / kVectors, i = flat / group;
    const int head = kv_head * group + flat % group, column = slot % kVectors * 4;
    const float inverse = sum.sum == 0.0f ? 0.0f : 1.0f / sum.sum;
    if (column < static_cast<int>(a.p.head_dim)) {
      *reinterpret_cast<uint2*>(
          static_cast<T*>(a.out) + i * a.p.o_stride + static_cast<size_t>(head) * a.p.head_dim +
          column) =
          make_uint2(
              mma::pack2<T>(sum.total.x * inverse, sum.total.y * inverse),
              mma::pack2<T>(sum.total.z * inverse, sum.total.w * inverse));
    }
    if (a.logsumexp != nullptr && column == 0) {
      a.logsumexp[static_cast<size_t>(head) * a.p.q_tokens + i] =
          sum.sum == 0.0f ? -INFINITY : (sum.top + __log2f(sum.sum)) * (1.0f / kLog2e);
    }
  };
  if (groups == 1) {
    for (int slot = thread; slot < slots; slot += kThreads) finish(slot, sum_run(slot, 0, count));
    return;
  }
  float4* totals = reinterpret_cast<float4*>(memory);  // [kThreads]
  float2* states = reinterpret_cast<float2*>(totals + kThreads);
  const int run = (count + groups - 1) / groups, part = thread / slots;
  if (part < groups) {
    const Sum sum = sum_run(thread % slots, part * run, min((part + 1) * run, count));
    totals[thread] = sum.total;
    states[thread] = make_float2(sum.top, sum.sum);
  }
  __syncthreads();
  if (thread < slots) {
    Sum sum;
    for (int g = 0; g < groups; ++g) sum.top = fmaxf(sum.top, states[g * slots + thread].x);
    for (int g = 0; g < groups; ++g) {
      sum.add(states[g * slots + thread], totals[g * slots + thread]);
    }
    finish(thread, sum);
  }
}
__device__ __forceinline__ int splits_used(const Split& s) {
  return max((s.last - s.first + s.chunk) / s.chunk, 1);
}
__device__ __forceinline__ Partials partials_of(
    const Arguments& a, const Partials& all, int row_block, int kv_head, int splits, int dim) {
  const size_t at = (static_cast<size_t>(row_block) * a.p.kv_heads + kv_head) * splits * kRows;
  return {all.state + at, all.sums + at * dim};
}

template <typename T, int kDim>
__global__ void __launch_bounds__(Tile<kDim>::kThreads)
    decode_kernel(const Arguments a, Partials partials, uint32_t* counters) {
  using Tile = Tile<kDim>;
  constexpr int kWarps = Tile::kWarps;
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
  if (a.p.scale < 0.0f) {
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) negate(q[d]);
  }
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
        scale);
  }
  mma::copies_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) state.top[0][half] *= scale;
  const Partials parts = partials_of(a, partials, row_block, kv_head, gridDim.x, kDim);
  const Partials mine = {
      parts.state + blockIdx.x * kRows,
      parts.sums + static_cast<size_t>(blockIdx.x) * kRows * kDim};
  merge_warps<kDim>(
      reinterpret_cast<float*>(memory), o, state, mine, min(rows - row_block * kRows, kRows));
  if (counters == nullptr) return;
  // Whoever comes last adds up.
  __shared__ bool last;
  const int used = splits_used(split);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for all of the block: the barriers carry it
    uint32_t* counter = counters + row_block * a.p.kv_heads + kv_head;
    last = atomicAdd(counter, 1u) == static_cast<uint32_t>(used) - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  combine<T, kDim>(a, parts, row_block, kv_head, used, reinterpret_cast<float*>(memory));
}

/// Where there are no counters: a second launch.
template <typename T, int kDim>
__global__ void __launch_bounds__(Tile<kDim>::kThreads)
    combine_kernel(const Arguments a, Partials partials, int splits) {
  __shared__ __align__(16) float memory[Tile<kDim>::kThreads * 6];
  begin_dependent();
  const int kv_head = blockIdx.x, row_block = blockIdx.y;
  const Split split = split_keys<kDim>(a, offset_of(a), row_block, splits);
  combine<T, kDim>(
      a,
      partials_of(a, partials, row_block, kv_head, splits, kDim),
      row_block,
      kv_head,
      splits_used(split),
      memory);
}

template <typename T, int kDim>
void run(const Context& context, const Arguments& a) {
  const uint32_t rows = a.p.q_tokens * (a.p.q_heads / a.p.kv_heads);
  const uint32_t row_blocks = (rows + kRows - 1) / kRows;
  constexpr uint32_t kLeastKeys = Tile<kDim>::kKeys * Tile<kDim>::kLeast;
  constexpr int kThreads = Tile<kDim>::kThreads;
  const uint32_t most = (a.p.kv_tokens + kLeastKeys - 1) / kLeastKeys;
  const uint32_t splits = std::max(
      1u, std::min(most, context.multiprocessors / std::max(1u, a.p.kv_heads * row_blocks)));
  const size_t slots = size_t{row_blocks} * a.p.kv_heads * splits * kRows;
  Partials partials;
  partials.state = static_cast<float2*>(context.scratch->take(slots * sizeof(float2)));
  partials.sums = static_cast<float*>(context.scratch->take(slots * kDim * sizeof(float)));
  const bool counted =
      context.counters != nullptr && row_blocks * a.p.kv_heads <= METAL_LORA_CUDA_COUNTERS;
  launch(
      context,
      "attention_forward decode",
      decode_kernel<T, kDim>,
      dim3(splits, a.p.kv_heads, row_blocks),
      kThreads,
      Tile<kDim>::kSharedBytes,
      a,
      partials,
      counted ? context.counters : nullptr);
  if (counted) return;
  launch(
      context,
      "attention_forward combine",
      combine_kernel<T, kDim>,
      dim3(a.p.kv_heads, row_blocks),
      kThreads,
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
