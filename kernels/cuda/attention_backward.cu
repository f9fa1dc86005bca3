// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Flash attention backward on mma.sync without atomics: some blocks sum dK and dV of 64 keys over
// all queries, others dQ of 64 queries over all keys. Each works out the probabilities itself: 7
// products instead of 5, but every sum has one owner and one order. All of them are blocks of one
// launch.
#include <algorithm>

#include "kernels/cuda/attention.cuh"

namespace metal_lora::cuda::attention {
namespace {

constexpr int kRows = kInfoRows;  ///< keys or queries of a block, and of a step of its loop
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlocks = kRows / 8;

template <int kDim>
struct Shared {
  static constexpr int kTileBytes = kRows * kDim * 2;
  static constexpr int kInfoBytes = kRows * 12;  ///< a float2 and an int of each query
  static constexpr int kStageBytes = 2 * kTileBytes + kInfoBytes;
  static constexpr size_t kBytes = 2 * kTileBytes + 2 * kStageBytes;
};

/// sums [16, 64] = the 16 rows at `row` of `left` · (rows of `right`)^T.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_rows(
    float (&sums)[kBlocks][4], uint32_t left_tile, int row, uint32_t right_tile) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[n][c] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    uint32_t left[4];
    load_left<kDim>(left, left_tile, row, d);
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t right[4];
      load_right_rows<kDim>(right, right_tile, 8 * n, d);
      mma::multiply<T>(sums[n], left, right[0], right[1]);
      mma::multiply<T>(sums[n + 1], left, right[2], right[3]);
    }
  }
}
/// sums [16, kDim] += left [16, 64], rounded, · the tile.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_columns(
    float (&sums)[kDim / 8][4], const float (&left_sums)[kBlocks][4], uint32_t right_tile) {
#pragma unroll
  for (int n = 0; n < kBlocks; n += 2) {
    uint32_t left[4];
    pack_left<T>(left, left_sums[n], left_sums[n + 1]);
#pragma unroll
    for (int d = 0; d < kDim / 8; d += 2) {
      uint32_t right[4];
      load_right_columns<kDim>(right, right_tile, 8 * n, 8 * d);
      mma::multiply<T>(sums[d], left, right[0], right[1]);
      mma::multiply<T>(sums[d + 1], left, right[2], right[3]);
    }
  }
}
template <typename T, int kDim>
__device__ __forceinline__ void store_sums(
    void* to,
    size_t stride,
    int row,
    int rows,
    int head_dim,
    const float (&sums)[kDim / 8][4],
    float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + lane / 4 + 8 * half;
    if (i >= rows) continue;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const int column = 8 * d + 2 * (lane % 4);
      if (column >= head_dim) continue;
      *reinterpret_cast<uint32_t*>(static_cast<T*>(to) + i * stride + column) =
          mma::pack2<T>(sums[d][2 * half] * scale, sums[d][2 * half + 1] * scale);
    }
  }
}

/// dK and dV of keys [begin, begin + 64) of one kv head. Rows of the products are keys, so that
/// P^T and dS^T are left operands as they come out of the first products.
template <typename T, int kDim>
__device__ __forceinline__ void keys_block(
    const Arguments& a, uint32_t memory, uint8_t* generic, int begin, int kv_head) {
  using S = Shared<kDim>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tokens = a.p.q_tokens, keys = a.p.kv_tokens, head_dim = a.p.head_dim;
  const int offset = a.p.kv_offset, group = a.p.q_heads / a.p.kv_heads;
  const uint32_t k_tile = memory, v_tile = memory + S::kTileBytes, stages = v_tile + S::kTileBytes;
  uint8_t* generic_stages = generic + 2 * S::kTileBytes;

  // The blocks of queries that see any of the keys lie in [block, last_block].
  const int first_block = max(begin - offset, 0) / kRows, blocks = (tokens + kRows - 1) / kRows;
  int block_end = first_block;
  for (int b = blocks - 1 - lane; __any_sync(0xffffffffu, b >= first_block); b -= 32) {
    const bool sees = b >= first_block && a.block_first[b].x < begin + kRows;
    const uint32_t found = __ballot_sync(0xffffffffu, sees);
    if (found != 0) {
      block_end = b + lane - (__ffs(found) - 1) + 1;
      break;
    }
  }
  const int per_head = block_end - first_block, steps = per_head * group;

  const auto load_step = [&](int stage, int step) {
    const int head = kv_head * group + step / per_head;
    const int row = (first_block + step % per_head) * kRows;
    const uint32_t to = stages + stage * S::kStageBytes;
    load_tile<kDim, kRows, kThreads>(
        to,
        static_cast<const uint16_t*>(a.q) + head * head_dim,
        a.p.q_stride,
        row,
        tokens,
        head_dim);
    load_tile<kDim, kRows, kThreads>(
        to + S::kTileBytes,
        static_cast<const uint16_t*>(a.dout) + head * head_dim,
        a.p.o_stride,
        row,
        tokens,
        head_dim);
    if (threadIdx.x < kRows) {
      const int i = row + threadIdx.x;
      auto* info =
          reinterpret_cast<float2*>(generic_stages + stage * S::kStageBytes + 2 * S::kTileBytes);
      info[threadIdx.x] = a.row_info[static_cast<size_t>(head) * padded_rows(a) + i];
      reinterpret_cast<int*>(info + kRows)[threadIdx.x] = a.row_first[i];
    }
    mma::copies_commit();
  };
  load_tile<kDim, kRows, kThreads>(
      k_tile,
      static_cast<const uint16_t*>(a.k) + kv_head * head_dim,
      a.p.k_stride,
      begin,
      keys,
      head_dim);
  load_tile<kDim, kRows, kThreads>(
      v_tile,
      static_cast<const uint16_t*>(a.v) + kv_head * head_dim,
      a.p.v_stride,
      begin,
      keys,
      head_dim);
  if (steps > 0) load_step(0, 0);

  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  const float scale = a.p.scale * kLog2e;
  for (int step = 0; step < steps; ++step) {
    mma::copies_wait<0>();
    __syncthreads();
    if (step + 1 < steps) load_step((step + 1) % 2, step + 1);
    const int block = first_block + step % per_head;
    const uint32_t q_tile = stages + step % 2 * S::kStageBytes, do_tile = q_tile + S::kTileBytes;
    const auto* info = reinterpret_cast<const float2*>(
        generic_stages + step % 2 * S::kStageBytes + 2 * S::kTileBytes);
    const int* firsts = reinterpret_cast<const int*>(info + kRows);
    float s[kBlocks][4], dp[kBlocks][4];
    multiply_rows<T, kDim>(s, k_tile, warp * 16, q_tile);
    multiply_rows<T, kDim>(dp, v_tile, warp * 16, do_tile);
    const bool partly = begin + kRows - 1 > offset + block * kRows ||
                        begin < a.block_first[block].y || (block + 1) * kRows > tokens;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + 2 * (lane % 4) + c;
        const float2 row = info[column];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float p = exp2_fast(s[n][2 * half + c] * scale - row.x);
          if (partly) {
            const int j = begin + warp * 16 + lane / 4 + 8 * half;
            if (j < firsts[column] || j > offset + block * kRows + column) {
              p = 0.0f, dp[n][2 * half + c] = row.y;
            }
          }
          s[n][2 * half + c] = p;
          dp[n][2 * half + c] = p * (dp[n][2 * half + c] - row.y);
        }
      }
    }
    multiply_columns<T, kDim>(dv, s, do_tile);
    multiply_columns<T, kDim>(dk, dp, q_tile);
  }
  mma::copies_wait<0>();
  const size_t column = static_cast<size_t>(kv_head) * head_dim;
  store_sums<T, kDim>(
      static_cast<T*>(a.dk) + column,
      a.p.k_stride,
      begin + warp * 16,
      keys,
      head_dim,
      dk,
      a.p.scale);
  store_sums<T, kDim>(
      static_cast<T*>(a.dv) + column, a.p.v_stride, begin + warp * 16, keys, head_dim, dv, 1.0f);
}

/// dQ of queries [begin, begin + 64) of one head.
template <typename T, int kDim>
__device__ __forceinline__ void queries_block(
    const Arguments& a, uint32_t memory, int begin, int head) {
  using S = Shared<kDim>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tokens = a.p.q_tokens, head_dim = a.p.head_dim, offset = a.p.kv_offset;
  const int kv_head = head / (a.p.q_heads / a.p.kv_heads);
  const uint32_t q_tile = memory, do_tile = memory + S::kTileBytes;
  const uint32_t stages = do_tile + S::kTileBytes;
  const int2 range = a.block_first[begin / kRows];
  const int last = last_key(a, offset, min(begin + kRows, tokens) - 1);
  const auto load_keys = [&](int stage, int key) {
    const uint32_t to = stages + stage * S::kStageBytes;
    load_tile<kDim, kRows, kThreads>(
        to,
        static_cast<const uint16_t*>(a.k) + kv_head * head_dim,
        a.p.k_stride,
        key,
        last + 1,
        head_dim);
    load_tile<kDim, kRows, kThreads>(
        to + S::kTileBytes,
        static_cast<const uint16_t*>(a.v) + kv_head * head_dim,
        a.p.v_stride,
        key,
        last + 1,
        head_dim);
    mma::copies_commit();
  };
  load_tile<kDim, kRows, kThreads>(
      q_tile,
      static_cast<const uint16_t*>(a.q) + head * head_dim,
      a.p.q_stride,
      begin,
      tokens,
      head_dim);
  load_tile<kDim, kRows, kThreads>(
      do_tile,
      static_cast<const uint16_t*>(a.dout) + head * head_dim,
      a.p.o_stride,
      begin,
      tokens,
      head_dim);
  const int first_tile = range.x / kRows * kRows;
  load_keys(0, first_tile);

  float2 info[2];
  int first[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = begin + warp * 16 + lane / 4 + 8 * half;
    info[half] = a.row_info[static_cast<size_t>(head) * padded_rows(a) + i];
    first[half] = a.row_first[i];
  }
  float dq[kDim / 8][4] = {};
  const float scale = a.p.scale * kLog2e;
  for (int key = first_tile, stage = 0; key <= last; key += kRows, stage ^= 1) {
    mma::copies_wait<0>();
    __syncthreads();
    if (key + kRows <= last) load_keys(stage ^ 1, key + kRows);
    const uint32_t k_tile = stages + stage * S::kStageBytes, v_tile = k_tile + S::kTileBytes;
    float s[kBlocks][4], dp[kBlocks][4];
    multiply_rows<T, kDim>(s, q_tile, warp * 16, k_tile);
    multiply_rows<T, kDim>(dp, do_tile, warp * 16, v_tile);
    const bool partly = key + kRows - 1 > min(offset + begin, last) || key < range.y;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int half = c / 2;
        float p = exp2_fast(s[n][c] * scale - info[half].x);
        if (partly) {
          const int j = key + 8 * n + 2 * (lane % 4) + c % 2;
          if (j < first[half] || j > offset + begin + warp * 16 + lane / 4 + 8 * half) {
            p = 0.0f, dp[n][c] = info[half].y;
          }
        }
        dp[n][c] = p * (dp[n][c] - info[half].y);
      }
    }
    multiply_columns<T, kDim>(dq, dp, k_tile);
  }
  mma::copies_wait<0>();
  store_sums<T, kDim>(
      static_cast<T*>(a.dq) + static_cast<size_t>(head) * head_dim,
      a.p.q_stride,
      begin + warp * 16,
      tokens,
      head_dim,
      dq,
      a.p.scale);
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim == 64 ? 3 : 2) backward_kernel(const Arguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  begin_dependent();
  const int key_blocks = (a.p.kv_tokens + kRows - 1) / kRows;
  const int for_keys = key_blocks * a.p.kv_heads;
  const int block = blockIdx.x;
  if (block < for_keys) {
    keys_block<T, kDim>(
        a,
        mma::shared_address(memory),
        memory,
        block / static_cast<int>(a.p.kv_heads) * kRows,
        block % a.p.kv_heads);
  } else {
    const int query_blocks = (a.p.q_tokens + kRows - 1) / kRows;
    const int left = block - for_keys;
    queries_block<T, kDim>(
        a,
        mma::shared_address(memory),
        (query_blocks - 1 - left / static_cast<int>(a.p.q_heads)) * kRows,
        left % a.p.q_heads);
  }
}

/// row_info, one warp a row of a head; and, by the first head's blocks, block_first.
template <typename T>
__global__ void __launch_bounds__(256) prepare_kernel(const Arguments a) {
  begin_dependent();
  const int tokens = a.p.q_tokens, head = blockIdx.y, lane = threadIdx.x % 8;
  const int begin = blockIdx.x * kRows;
  if (head == 0) {
    const int2 range = first_keys(a, a.p.kv_offset, begin, min(begin + kRows, tokens));
    if (threadIdx.x == 0) a.block_first[blockIdx.x] = range;
    if (threadIdx.x < kRows) {
      const int i = begin + threadIdx.x;
      a.row_first[i] = i < tokens ? first_key(a, a.p.kv_offset, i) : INT_MAX;
    }
  }
#pragma unroll
  for (int part = 0; part < kRows; part += 32) {
    const int i = begin + part + threadIdx.x / 8;
    float sum = 0.0f;
    if (i < tokens) {
      const size_t row = i * a.p.o_stride + static_cast<size_t>(head) * a.p.head_dim;
      for (int c = lane * 8; c < static_cast<int>(a.p.head_dim); c += 64) {
        const auto x = load16(static_cast<const T*>(a.out) + row + c);
        const auto g = load16(static_cast<const T*>(a.dout) + row + c);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(to_float(x.v[e]), to_float(g.v[e]), sum);
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += __shfl_xor_sync(0xffffffffu, sum, 4);
    if (lane == 0) {
      const float lse =
          i < tokens ? a.logsumexp[static_cast<size_t>(head) * tokens + i] : -INFINITY;
      a.row_info[static_cast<size_t>(head) * padded_rows(a) + i] =
          make_float2(lse == -INFINITY ? INFINITY : lse * kLog2e, sum);
    }
  }
}

template <typename T>
bool run(const Context& context, const Arguments& a) {
  const uint32_t query_blocks = (a.p.q_tokens + kRows - 1) / kRows;
  const uint32_t key_blocks = (a.p.kv_tokens + kRows - 1) / kRows;
  if (query_blocks > 0) {
    launch(
        context,
        "attention_backward prepare",
        prepare_kernel<T>,
        dim3(query_blocks, a.p.q_heads),
        256,
        0,
        a);
  }
  if (backward_sm90(context, a)) return true;
  const dim3 grid(key_blocks * a.p.kv_heads + query_blocks * a.p.q_heads);
  if (a.p.head_dim <= 64) {
    launch(
        context,
        "attention_backward",
        backward_kernel<T, 64>,
        grid,
        kThreads,
        Shared<64>::kBytes,
        a);
  } else {
    launch(
        context,
        "attention_backward",
        backward_kernel<T, 128>,
        grid,
        kThreads,
        Shared<128>::kBytes,
        a);
  }
  return false;
}

}  // namespace

bool backward_tiled(const Context& context, const Arguments& arguments) {
  Arguments a = arguments;
  const size_t rows = padded_rows(a);
  a.row_info = static_cast<float2*>(context.scratch->take(rows * a.p.q_heads * sizeof(float2)));
  a.row_first = static_cast<int32_t*>(context.scratch->take(rows * sizeof(int32_t)));
  a.block_first =
      static_cast<int2*>(context.scratch->take((a.p.q_tokens + kRows - 1) / kRows * sizeof(int2)));
  return a.p.dtype == DType::bf16 ? run<bf16>(context, a) : run<f16>(context, a);
}

}  // namespace metal_lora::cuda::attention
