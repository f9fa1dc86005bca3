// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// How attention_decode.cu's warps and blocks add up what each made of some of the keys, always in
// the same order.
#pragma once

#include "kernels/cuda/attention_forward.cuh"

namespace metal_lora::cuda::attention {

inline constexpr int kRows = 16;  ///< queries of a block: tokens x heads of a group

template <int kDim>
struct Tile {
  static constexpr int kWarps = kDim <= 128 ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kKeys = kDim <= 64 ? 32 : 16;  ///< of one warp's tile
  static constexpr int kBytes = kKeys * kDim * 2;
};

/// Partial sums: [row_block, kv_head, split, row] (top, sum) and, behind them, [.., kDim].
struct Partials {
  float2* state;
  float* sums;
};

/// The block's warps together, in their order: put(row, column, total, top, sum).
template <int kDim, typename Put>
__device__ __forceinline__ void merge_warps(
    float* memory,
    const float (&o)[1][kDim / 8][4],
    const RowState<1>& state,
    int rows,
    const Put& put) {
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
    put(row, column, total, top, sum);
  }
}

/// Where row `row` of a block of rows is, and what its log-sum-exp is.
struct OutRow {
  int token, head;
  __device__ OutRow(const Arguments& a, int row_block, int kv_head, int row) {
    const int group = a.p.q_heads / a.p.kv_heads, flat = row_block * kRows + row;
    token = flat / group;
    head = kv_head * group + flat % group;
  }
  __device__ size_t at(const Arguments& a) const {
    return token * a.p.o_stride + static_cast<size_t>(head) * a.p.head_dim;
  }
  __device__ void store_logsumexp(const Arguments& a, float top, float sum) const {
    a.logsumexp[static_cast<size_t>(head) * a.p.q_tokens + token] =
        sum == 0.0f ? -INFINITY : (top + __log2f(sum)) * (1.0f / kLog2e);
  }
};

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
    const OutRow row(a, row_block, kv_head, slot / kVectors);
    const int column = slot % kVectors * 4;
    const float inverse = sum.sum == 0.0f ? 0.0f : 1.0f / sum.sum;
    if (column < static_cast<int>(a.p.head_dim)) {
      *reinterpret_cast<uint2*>(static_cast<T*>(a.out) + row.at(a) + column) = make_uint2(
          mma::pack2<T>(sum.total.x * inverse, sum.total.y * inverse),
          mma::pack2<T>(sum.total.z * inverse, sum.total.w * inverse));
    }
    if (a.logsumexp != nullptr && column == 0) row.store_logsumexp(a, sum.top, sum.sum);
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
__device__ __forceinline__ Partials partials_of(
    const Arguments& a, const Partials& all, int row_block, int kv_head, int splits, int dim) {
  const size_t at = (static_cast<size_t>(row_block) * a.p.kv_heads + kv_head) * splits * kRows;
  return {all.state + at, all.sums + at * dim};
}

}  // namespace metal_lora::cuda::attention
