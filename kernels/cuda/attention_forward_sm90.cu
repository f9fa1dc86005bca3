// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Flash attention forward on wgmma (sm_90a): head_dim 64 and 128. A block is two warpgroups, each
// with 64 queries of its own: two heads of one kv head where there are, else 128 queries of one.
// The copy engine brings keys and values through four stages. While a warpgroup works out the
// probabilities of one tile, the others of the multiprocessor keep the matrix unit busy; within
// one, P·V of a tile and the scores of the next are under way together.
//
// Ladder, H100, bf16, 4 causal segments of 1024, 32/8 heads (TFLOP/s of 989):
//   mma.sync (attention_forward.cu), dim 64                 84.6 us  203
//   wgmma, two blocks of two warpgroups a multiprocessor    55.7 us  308
//   sums scaled only where the maximum grew, descriptors
//   stepped by additions                                    53.3 us  322 (33 %); dim 128 96 us 358
//   warpgroups that take turns (named barriers)             54.9 us: not kept
// One segment of 4096: 150 us, 457. cuDNN through PyTorch, dim 64: 59.5 us, dim 128: 82.4 us.
// exp2, the matrix unit and the issue slots are each about half used; what short segments lose is
// the start of each block: a persistent grid that brings the next block's queries early.
#include "kernels/cuda/attention_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace metal_lora::cuda::attention {
namespace {

constexpr int kThreads = 256, kStages = 4, kAhead = 2;

template <int kDim>
struct Shared {
  static constexpr int kTileBytes = kTileRows * kDim * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kBarriers = 2 * kTileBytes + kStages * kStageBytes;
  static constexpr size_t kBytes = kBarriers + 8 * (2 * kStages + 1) + 1024;  // and alignment
};

struct Maps {
  CUtensorMap q, k, v;
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 64 ? 2 : 1)
    forward_kernel(const __grid_constant__ Maps maps, const Arguments a, bool paired) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shared<kDim>;
  extern __shared__ uint8_t raw[];
  uint8_t* memory = raw + (1024 - mma::shared_address(raw) % 1024) % 1024;
  const uint32_t queries = mma::shared_address(memory), stages = queries + 2 * S::kTileBytes;
  const uint32_t full = queries + S::kBarriers, empty = full + 8 * kStages;
  const uint32_t q_full = empty + 8 * kStages;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    sm90::tensor_map_prefetch(&maps.q);
    sm90::tensor_map_prefetch(&maps.k);
    sm90::tensor_map_prefetch(&maps.v);
    for (int s = 0; s < kStages; ++s) {
      sm90::barrier_init(full + 8 * s, 1);
      sm90::barrier_init(empty + 8 * s, kThreads / 32);
    }
    sm90::barrier_init(q_full, 1);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  begin_dependent();

  const int tokens = a.p.q_tokens, offset = a.p.kv_offset;
  const int block_rows = paired ? kTileRows : 2 * kTileRows;
  const int begin = (gridDim.y - 1 - blockIdx.y) * block_rows;  // the longest rows first
  const int end = min(begin + block_rows, tokens);
  const int head = paired ? 2 * blockIdx.x + group : blockIdx.x;
  const int row = paired ? begin : begin + group * kTileRows;
  const int kv_head = head / static_cast<int>(a.p.q_heads / a.p.kv_heads);
  if (threadIdx.x == 0) {
    sm90::barrier_expect(q_full, 2 * S::kTileBytes);
    copy_tile<kDim>(queries, &maps.q, q_full, head, begin);
    copy_tile<kDim>(
        queries + S::kTileBytes,
        &maps.q,
        q_full,
        paired ? head + 1 : head,
        paired ? begin : begin + kTileRows);
  }
  const int2 firsts = first_keys(a, offset, begin, end);
  const int last = last_key(a, offset, end - 1);
  const int first_tile = firsts.x / kTileRows * kTileRows;
  const int tiles = max((last - first_tile + kTileRows) / kTileRows, 0);

  const auto produce = [&](int t) {
    if (threadIdx.x >= 32 || t >= tiles || !sm90::elect_lane()) return;
    const int s = t % kStages;
    if (t >= kStages) sm90::barrier_wait(empty + 8 * s, (t / kStages - 1) & 1);
    const uint32_t to = stages + s * S::kStageBytes, barrier = full + 8 * s;
    sm90::barrier_expect(barrier, S::kStageBytes);
    copy_tile<kDim>(to, &maps.k, barrier, kv_head, first_tile + t * kTileRows);
    copy_tile<kDim>(to + S::kTileBytes, &maps.v, barrier, kv_head, first_tile + t * kTileRows);
  };
  for (int t = 0; t < kAhead; ++t) produce(t);

  RowState<1> state;
  float o[1][kDim / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = min(row + 16 * warp + lane / 4 + 8 * half, tokens - 1);
    state.top[0][half] = -INFINITY, state.sum[0][half] = 0.0f;
    state.first[0][half] = first_key(a, offset, i);
    state.last[0][half] = last_key(a, offset, i);
  }
  const float scale = fmaxf(fabsf(a.p.scale), 1e-30f) * kLog2e;
  uint8_t* my_queries = memory + group * S::kTileBytes;
  uint32_t q[kDim / 16][4];
  sm90::barrier_wait(q_full, 0);
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    load_left<64>(
        q[d], queries + group * S::kTileBytes + d / 4 * kColumnBlockBytes, warp * 16, d % 4 * 16);
    if (a.p.scale < 0.0f) negate(q[d]);
  }

  const uint32_t keys_address = descriptor_address(stages);
  constexpr uint32_t kStage = S::kStageBytes / 16, kTile = S::kTileBytes / 16;
  float s[1][8][4];
  if (tiles > 0) {
    sm90::barrier_wait(full, 0);
    sm90::wgmma_fence();
    wgmma_rows<T, kDim>(s[0], q, keys_address);
    sm90::wgmma_commit();
  }
  for (int t = 0; t < tiles; ++t) {
    const int key = first_tile + t * kTileRows;
    produce(t + kAhead);
    __syncwarp();
    sm90::wgmma_wait<0>();
    sums_fence(s[0]);
    // A tile that every row of the warpgroup sees wholly needs no mask.
    if (key + kTileRows - 1 > min(offset + row, last) || key < firsts.y) {
      soften<true>(s, o, state, key, scale);
    } else {
      soften<false>(s, o, state, key, scale);
    }
    uint32_t p[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) pack_left<T>(p[n], s[0][2 * n], s[0][2 * n + 1]);
    sm90::wgmma_fence();
    wgmma_columns<T, kDim>(o[0], p, keys_address + t % kStages * kStage + kTile);
    sm90::wgmma_commit();
    if (t + 1 < tiles) {
      const int next = (t + 1) % kStages;
      sm90::barrier_wait(full + 8 * next, (t + 1) / kStages & 1);
      sm90::wgmma_fence();
      wgmma_rows<T, kDim>(s[0], q, keys_address + next * kStage);
      sm90::wgmma_commit();
      sm90::wgmma_wait<1>();
    } else {
      sm90::wgmma_wait<0>();
    }
    sums_fence(o[0]);
    if (lane == 0) sm90::barrier_arrive(empty + 8 * (t % kStages));
  }
  sm90::named_barrier(1 + group, 128);  // its queries are read no more
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(state.sum[0][half]);
    inverse[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int i = row + 16 * warp + lane / 4 + 8 * half;
    if (a.logsumexp != nullptr && lane % 4 == 0 && i < tokens) {
      a.logsumexp[static_cast<size_t>(head) * tokens + i] =
          sum == 0.0f ? -INFINITY : (state.top[0][half] * scale + __log2f(sum)) * (1.0f / kLog2e);
    }
  }
  store_tile<T, kDim>(
      static_cast<T*>(a.out) + static_cast<size_t>(head) * kDim,
      a.p.o_stride,
      my_queries,
      row,
      tokens,
      o[0],
      inverse);
#else
  __trap();
#endif
}

template <typename T, int kDim>
void run(const Context& context, const Arguments& a) {
  const AttentionParams& p = a.p;
  const bool paired = p.q_heads / p.kv_heads % 2 == 0;
  const auto map = [&](const void* data, uint32_t rows, uint32_t heads, size_t stride) {
    return make_tensor_map({data, p.dtype, rows, heads * p.head_dim, stride, kTileRows});
  };
  const Maps maps = {
      map(a.q, p.q_tokens, p.q_heads, p.q_stride),
      map(a.k, p.kv_tokens, p.kv_heads, p.k_stride),
      map(a.v, p.kv_tokens, p.kv_heads, p.v_stride)};
  const uint32_t block_rows = paired ? kTileRows : 2 * kTileRows;
  const dim3 grid(paired ? p.q_heads / 2 : p.q_heads, (p.q_tokens + block_rows - 1) / block_rows);
  launch(
      context,
      "attention_forward",
      forward_kernel<T, kDim>,
      grid,
      kThreads,
      Shared<kDim>::kBytes,
      maps,
      a,
      paired);
}

}  // namespace

bool forward_sm90(const Context& context, const Arguments& a) {
  const AttentionParams& p = a.p;
  // The copy engine brings whole tiles of the tensor: there must be no keys behind the last query.
  const bool takes = context.capability == 90 && (p.head_dim == 64 || p.head_dim == 128) &&
                     a.kv_offset == nullptr && p.kv_tokens <= p.kv_offset + p.q_tokens;
  if (!takes) return false;
  const auto run_type = [&](auto type) {
    using T = decltype(type);
    p.head_dim == 64 ? run<T, 64>(context, a) : run<T, 128>(context, a);
  };
  p.dtype == DType::bf16 ? run_type(bf16{}) : run_type(f16{});
  return true;
}

}  // namespace metal_lora::cuda::attention
