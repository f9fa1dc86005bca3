// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Flash attention backward on wgmma (sm_90a), head_dim 64 and 128: the sums of
// attention_backward.cu with two warpgroups a block. The copy engine brings right operands; left
// ones lie in registers. Blocks for dK and dV own 128 keys, blocks for dQ 64 queries of two heads
// that share keys, or 128 of one. The second products of a step and the first of the next are under
// way together.
//
// Ladder, H100, bf16, 4 causal segments of 1024, 32/8 heads (TFLOP/s of 989, 5 products counted):
//   mma.sync (attention_backward.cu), dim 64            266 us  161
//   wgmma                                               170 us  253
//   descriptors stepped by additions                    165 us  260 (26 %); dim 128 256 us  335
//   dQ in two passes a block, no divisions, 8 stages    166 us: not kept
//   warpgroups that take turns (named barriers)         170 us: not kept
//   every lane frees the stage whose infos it has read, not one for its warp   161.5 us, as before
// Turning dq and dk back before they are stored costs 7 us, a kernel of its own 33 us.
// Of the 165 us about 12 us are row sums at the speed of memory. cuDNN through PyTorch: 220 us, dim
// 128 345 us. Counting the 7 products made, 364 TFLOP/s; next: dQ beside dK and dV (5 products).
#include "kernels/cuda/attention_sm90.cuh"
#include "kernels/cuda/tensor_map.h"

namespace metal_lora::cuda::attention {
namespace {

constexpr int kThreads = 256, kStages = 4, kAhead = 2;
constexpr int kInfoBytes = kTileRows * 12;

template <int kDim>
struct Shared {
  static constexpr int kTileBytes = kTileRows * kDim * 2;
  static constexpr int kStageBytes = 2 * kTileBytes + 1024;
  static constexpr uint32_t kStage = kStageBytes / 16, kTile = kTileBytes / 16;  // of descriptors
  static constexpr int kBarriers = 4 * kTileBytes + kStages * kStageBytes;
  static constexpr size_t kBytes = kBarriers + 8 * (2 * kStages + 1) + 1024;  // and alignment
};

struct Maps {
  CUtensorMap q, k, v, dout;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/// Where things lie, and who this thread is.
struct Block {
  uint8_t* memory;
  uint32_t own, stages, full, empty, own_full;  ///< own: four tiles that stay
  int group, warp, lane;
};
/// A tile that stays, as a left operand: in registers if they suffice, and at its address else.
template <int kDim>
struct Left;
template <>
struct Left<64> {
  uint32_t r[4][4];
  __device__ __forceinline__ Left(uint32_t tile, int warp) {
#pragma unroll
    for (int d = 0; d < 4; ++d) load_left<64>(r[d], tile, warp * 16, d * 16);
  }
  template <typename T>
  __device__ __forceinline__ void multiply(float (&sums)[8][4], uint32_t tile_address) const {
    wgmma_rows<T, 64>(sums, r, tile_address);
  }
};
template <>
struct Left<128> {
  uint32_t address;
  __device__ __forceinline__ Left(uint32_t tile, int) : address(descriptor_address(tile)) {}
  template <typename T>
  __device__ __forceinline__ void multiply(float (&sums)[8][4], uint32_t tile_address) const {
    wgmma_rows<T, 128>(sums, address, tile_address);
  }
};
template <typename T>
__device__ __forceinline__ void pack(uint32_t (&r)[4][4], const float (&sums)[8][4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) pack_left<T>(r[n], sums[2 * n], sums[2 * n + 1]);
}

/// dK and dV of 64 keys a warpgroup. Rows of the products are keys.
template <typename T, int kDim>
__device__ __forceinline__ void keys_block(
    const Maps& maps, const Arguments& a, const Block& b, int begin, int kv_head) {
  using S = Shared<kDim>;
  constexpr int kTileBytes = S::kTileBytes, kStageBytes = S::kStageBytes;
  const int tokens = a.p.q_tokens, keys = a.p.kv_tokens, offset = a.p.kv_offset;
  const int heads = a.p.q_heads / a.p.kv_heads, mine = begin + b.group * kTileRows;
  const int key_end = min(begin + 2 * kTileRows, keys);
  const int blocks = (tokens + kTileRows - 1) / kTileRows;
  const int first_block = max(begin - offset, 0) / kTileRows;
  int block_end = first_block;
  for (int at = blocks - 1 - b.lane; __any_sync(0xffffffffu, at >= first_block); at -= 32) {
    const bool sees = at >= first_block && a.block_first[at].x < key_end;
    const uint32_t found = __ballot_sync(0xffffffffu, sees);
    if (found != 0) {
      block_end = at + b.lane - (__ffs(found) - 1) + 1;
      break;
    }
  }
  block_end = __shfl_sync(0xffffffffu, block_end, 0);  // uniform, for the compiler
  const int per_head = block_end - first_block, steps = per_head * heads;

  const auto produce = [&](int step) {
    if (threadIdx.x >= 32 || step >= steps || !sm90::elect_lane()) return;
    const int s = step % kStages, head = kv_head * heads + step / per_head;
    const int row = (first_block + step % per_head) * kTileRows;
    if (step >= kStages) sm90::barrier_wait(b.empty + 8 * s, (step / kStages - 1) & 1);
    const uint32_t to = b.stages + s * kStageBytes, barrier = b.full + 8 * s;
    sm90::barrier_expect(barrier, 2 * kTileBytes + kInfoBytes);
    copy_tile<kDim>(to, &maps.q, barrier, head, row);
    copy_tile<kDim>(to + kTileBytes, &maps.dout, barrier, head, row);
    const size_t at = static_cast<size_t>(head) * padded_rows(a) + row;
    sm90::bulk_load(to + 2 * kTileBytes, a.row_info + at, kTileRows * 8, barrier);
    sm90::bulk_load(to + 2 * kTileBytes + kTileRows * 8, a.row_first + row, kTileRows * 4, barrier);
  };
  if (threadIdx.x == 0) {
    sm90::barrier_expect(b.own_full, 4 * kTileBytes);
    for (int g = 0; g < 2; ++g) {
      copy_tile<kDim>(
          b.own + 2 * g * kTileBytes, &maps.k, b.own_full, kv_head, begin + g * kTileRows);
      copy_tile<kDim>(
          b.own + (2 * g + 1) * kTileBytes, &maps.v, b.own_full, kv_head, begin + g * kTileRows);
    }
  }
  for (int step = 0; step < kAhead; ++step) produce(step);

  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {}, s[8][4], dp[8][4];
  sm90::barrier_wait(b.own_full, 0);
  const Left<kDim> k(b.own + 2 * b.group * kTileBytes, b.warp);
  const Left<kDim> v(b.own + (2 * b.group + 1) * kTileBytes, b.warp);
  const float scale = a.p.scale * kLog2e;

  const uint32_t stages_address = descriptor_address(b.stages);
  const auto begin_scores = [&](int step) {
    sm90::barrier_wait(b.full + 8 * (step % kStages), step / kStages & 1);
    sm90::wgmma_fence();
    k.template multiply<T>(s, stages_address + step % kStages * S::kStage);
    sm90::wgmma_commit();
  };
  const auto begin_dp = [&](int step) {
    sm90::wgmma_fence();
    v.template multiply<T>(dp, stages_address + step % kStages * S::kStage + S::kTile);
    sm90::wgmma_commit();
  };
  // Where the sums leave registers for it, dP starts as early as the scores.
  constexpr bool kEarly = kDim == 64;
  sums_fence(dv);  // their zeros are there before the first products start
  sums_fence(dk);
  if (steps > 0) {
    begin_scores(0);
    if (kEarly) begin_dp(0);
  }
  for (int step = 0; step < steps; ++step) {
    const int block = first_block + step % per_head, stage = step % kStages;
    const uint32_t q_tile = stages_address + stage * S::kStage;
    const uint8_t* infos = b.memory + 6 * kTileBytes + stage * kStageBytes;
    const int2 range = a.block_first[block];
    const bool partly = mine + kTileRows - 1 > offset + block * kTileRows || mine < range.y ||
                        (block + 1) * kTileRows > tokens;
    produce(step + kAhead);
    __syncwarp();
    if (!kEarly) begin_dp(step);
    sm90::wgmma_wait<0>();
    sums_fence(s);
    sums_fence(dp);
    const int j = mine + b.warp * 16 + b.lane / 4;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int column = 8 * n + 2 * (b.lane % 4);
      const float4 info = *reinterpret_cast<const float4*>(infos + 8 * column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s[n][2 * half] = exp2_fast(s[n][2 * half] * scale - info.x);
        s[n][2 * half + 1] = exp2_fast(s[n][2 * half + 1] * scale - info.z);
      }
    }
    if (partly) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int column = 8 * n + 2 * (b.lane % 4);
        const int2 first = *reinterpret_cast<const int2*>(infos + 8 * kTileRows + 4 * column);
        const int at = offset + block * kTileRows + column;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = j + 8 * half;
          if (key < first.x || key > at) s[n][2 * half] = 0.0f;
          if (key < first.y || key > at + 1) s[n][2 * half + 1] = 0.0f;
        }
      }
    }
    uint32_t p[4][4], ds[4][4];
    pack<T>(p, s);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int column = 8 * n + 2 * (b.lane % 4);
      const float4 info = *reinterpret_cast<const float4*>(infos + 8 * column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        dp[n][2 * half] = s[n][2 * half] * (dp[n][2 * half] - info.y);
        dp[n][2 * half + 1] = s[n][2 * half + 1] * (dp[n][2 * half + 1] - info.w);
      }
    }
    pack<T>(ds, dp);
    sm90::wgmma_fence();
    wgmma_columns<T, kDim>(dv, p, q_tile + S::kTile);
    wgmma_columns<T, kDim>(dk, ds, q_tile);
    sm90::wgmma_commit();
    if (step + 1 < steps) {
      begin_scores(step + 1);
      if (kEarly) begin_dp(step + 1);
    }
    sm90::wgmma_wait<kEarly ? 2 : 1>();  // after the last step nobody waits for the stage
    sm90::barrier_arrive(b.empty + 8 * stage);  // every lane has read infos
  }
  sm90::wgmma_wait<0>();
  sums_fence(dv);
  sums_fence(dk);
  sm90::named_barrier(1 + b.group, 128);  // its tiles are read no more
  if (a.rope) turn_back<kDim>(dk, a.rope, mine, keys);
  const float scales[2] = {a.p.scale, a.p.scale}, ones[2] = {1.0f, 1.0f};
  uint8_t* tile = b.memory + 2 * b.group * kTileBytes;
  const size_t column = static_cast<size_t>(kv_head) * kDim;
  store_tile<T, kDim>(static_cast<T*>(a.dk) + column, a.p.k_stride, tile, mine, keys, dk, scales);
  store_tile<T, kDim>(
      static_cast<T*>(a.dv) + column, a.p.v_stride, tile + kTileBytes, mine, keys, dv, ones);
}

/// dQ of 64 queries of one head a warpgroup.
template <typename T, int kDim>
__device__ __forceinline__ void queries_block(
    const Maps& maps, const Arguments& a, const Block& b, int begin, int unit, bool paired) {
  using S = Shared<kDim>;
  constexpr int kTileBytes = S::kTileBytes, kStageBytes = S::kStageBytes;
  const int tokens = a.p.q_tokens, offset = a.p.kv_offset;
  const int head = paired ? 2 * unit + b.group : unit;
  const int row = paired ? begin : begin + b.group * kTileRows;
  const int kv_head = head / static_cast<int>(a.p.q_heads / a.p.kv_heads);
  const int block_rows = paired ? kTileRows : 2 * kTileRows;
  int2 range = a.block_first[begin / kTileRows];
  if (!paired && begin + kTileRows < tokens) {
    const int2 second = a.block_first[begin / kTileRows + 1];
    range = make_int2(min(range.x, second.x), max(range.y, second.y));
  }
  const int last = last_key(a, offset, min(begin + block_rows, tokens) - 1);
  const int first_tile = range.x / kTileRows * kTileRows;
  const int steps = max((last - first_tile + kTileRows) / kTileRows, 0);

  const auto produce = [&](int step) {
    if (threadIdx.x >= 32 || step >= steps || !sm90::elect_lane()) return;
    const int s = step % kStages, key = first_tile + step * kTileRows;
    if (step >= kStages) sm90::barrier_wait(b.empty + 8 * s, (step / kStages - 1) & 1);
    const uint32_t to = b.stages + s * kStageBytes, barrier = b.full + 8 * s;
    sm90::barrier_expect(barrier, 2 * kTileBytes);
    copy_tile<kDim>(to, &maps.k, barrier, kv_head, key);
    copy_tile<kDim>(to + kTileBytes, &maps.v, barrier, kv_head, key);
  };
  if (threadIdx.x == 0) {
    sm90::barrier_expect(b.own_full, 4 * kTileBytes);
    for (int g = 0; g < 2; ++g) {
      const int its_head = paired ? 2 * unit + g : unit;
      const int its_row = paired ? begin : begin + g * kTileRows;
      copy_tile<kDim>(b.own + 2 * g * kTileBytes, &maps.q, b.own_full, its_head, its_row);
      copy_tile<kDim>(b.own + (2 * g + 1) * kTileBytes, &maps.dout, b.own_full, its_head, its_row);
    }
  }
  for (int step = 0; step < kAhead; ++step) produce(step);

  float2 info[2] = {make_float2(INFINITY, 0.0f), make_float2(INFINITY, 0.0f)};
  int first[2] = {INT_MAX, INT_MAX};
  const int i = row + b.warp * 16 + b.lane / 4;
  if (row < tokens) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      info[half] = a.row_info[static_cast<size_t>(head) * padded_rows(a) + i + 8 * half];
      first[half] = a.row_first[i + 8 * half];
    }
  }
  float dq[kDim / 8][4] = {}, s[8][4], dp[8][4];
  sm90::barrier_wait(b.own_full, 0);
  const Left<kDim> q(b.own + 2 * b.group * kTileBytes, b.warp);
  const Left<kDim> g(b.own + (2 * b.group + 1) * kTileBytes, b.warp);
  const float scale = a.p.scale * kLog2e;
  const uint32_t stages_address = descriptor_address(b.stages);
  const auto begin_step = [&](int step) {
    const uint32_t k_tile = stages_address + step % kStages * S::kStage;
    sm90::barrier_wait(b.full + 8 * (step % kStages), step / kStages & 1);
    sm90::wgmma_fence();
    q.template multiply<T>(s, k_tile);
    sm90::wgmma_commit();
    g.template multiply<T>(dp, k_tile + S::kTile);
    sm90::wgmma_commit();
  };
  sums_fence(dq);
  if (steps > 0) begin_step(0);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, key = first_tile + step * kTileRows;
    produce(step + kAhead);
    __syncwarp();
    sm90::wgmma_wait<0>();
    sums_fence(s);
    sums_fence(dp);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[n][c] = exp2_fast(s[n][c] * scale - info[c / 2].x);
    }
    if (key + kTileRows - 1 > min(offset + row, last) || key < range.y) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int j = key + 8 * n + 2 * (b.lane % 4) + c % 2;
          if (j < first[c / 2] || j > offset + i + c / 2 * 8) s[n][c] = 0.0f;
        }
      }
    }
    uint32_t ds[4][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) dp[n][c] = s[n][c] * (dp[n][c] - info[c / 2].y);
    }
    pack<T>(ds, dp);
    sm90::wgmma_fence();
    wgmma_columns<T, kDim>(dq, ds, stages_address + stage * S::kStage);
    sm90::wgmma_commit();
    if (step + 1 < steps) begin_step(step + 1);
    sm90::wgmma_wait<2>();
    if (b.lane == 0) sm90::barrier_arrive(b.empty + 8 * stage);
  }
  sm90::wgmma_wait<0>();
  sums_fence(dq);
  sm90::named_barrier(1 + b.group, 128);
  if (a.rope) turn_back<kDim>(dq, a.rope, row, tokens);
  const float scales[2] = {a.p.scale, a.p.scale};
  store_tile<T, kDim>(
      static_cast<T*>(a.dq) + static_cast<size_t>(head) * kDim,
      a.p.q_stride,
      b.memory + 2 * b.group * kTileBytes,
      row,
      tokens,
      dq,
      scales);
}
#endif

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Maps maps, const Arguments a, bool paired) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shared<kDim>;
  extern __shared__ uint8_t raw[];
  Block b;
  b.memory = raw + (1024 - mma::shared_address(raw) % 1024) % 1024;
  b.own = mma::shared_address(b.memory);
  b.stages = b.own + 4 * S::kTileBytes;
  b.full = b.own + S::kBarriers;
  b.empty = b.full + 8 * kStages;
  b.own_full = b.empty + 8 * kStages;
  b.group = threadIdx.x / 128;
  b.warp = threadIdx.x / 32 % 4;
  b.lane = threadIdx.x % 32;
  const int kv_heads = a.p.kv_heads, block = blockIdx.x;
  const int for_keys = (a.p.kv_tokens + 2 * kTileRows - 1) / (2 * kTileRows) * kv_heads;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      sm90::barrier_init(b.full + 8 * s, 1);
      sm90::barrier_init(b.empty + 8 * s, block < for_keys ? kThreads : kThreads / 32);
    }
    sm90::barrier_init(b.own_full, 1);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  begin_dependent();
  if (block < for_keys) {
    keys_block<T, kDim>(maps, a, b, block / kv_heads * 2 * kTileRows, block % kv_heads);
  } else {
    const int rows = paired ? kTileRows : 2 * kTileRows;
    const int units = paired ? a.p.q_heads / 2 : a.p.q_heads;
    const int from_end = (block - for_keys) / units;
    const int blocks = (a.p.q_tokens + rows - 1) / rows;
    queries_block<T, kDim>(
        maps, a, b, (blocks - 1 - from_end) * rows, (block - for_keys) % units, paired);
  }
#else
  __trap();
#endif
}

template <typename T, int kDim>
void run(const Context& context, const Arguments& a) {
  const AttentionParams& p = a.p;
  const bool paired = p.q_heads / p.kv_heads % 2 == 0;
  const auto map = [&](const void* data, uint32_t rows, uint32_t heads, size_t stride) {
    return make_tensor_map({data, p.dtype, rows, heads * kDim, stride, kTileRows});
  };
  const Maps maps = {
      map(a.q, p.q_tokens, p.q_heads, p.q_stride),
      map(a.k, p.kv_tokens, p.kv_heads, p.k_stride),
      map(a.v, p.kv_tokens, p.kv_heads, p.v_stride),
      map(a.dout, p.q_tokens, p.q_heads, p.o_stride)};
  const uint32_t rows = paired ? kTileRows : 2 * kTileRows;
  const dim3 grid(
      (p.kv_tokens + 2 * kTileRows - 1) / (2 * kTileRows) * p.kv_heads +
      (p.q_tokens + rows - 1) / rows * (paired ? p.q_heads / 2 : p.q_heads));
  launch(
      context,
      "attention_backward",
      backward_kernel<T, kDim>,
      grid,
      kThreads,
      Shared<kDim>::kBytes,
      maps,
      a,
      paired);
}

}  // namespace

bool backward_sm90(const Context& context, const Arguments& a) {
  const AttentionParams& p = a.p;
  // As forward_sm90's.
  const bool takes = context.capability == 90 && (p.head_dim == 64 || p.head_dim == 128) &&
                     p.q_tokens > 0 && p.kv_tokens > 0 && p.kv_tokens <= p.kv_offset + p.q_tokens;
  if (!takes) return false;
  const auto run_type = [&](auto type) {
    using T = decltype(type);
    p.head_dim == 64 ? run<T, 64>(context, a) : run<T, 128>(context, a);
  };
  p.dtype == DType::bf16 ? run_type(bf16{}) : run_type(f16{});
  return true;
}

}  // namespace metal_lora::cuda::attention
