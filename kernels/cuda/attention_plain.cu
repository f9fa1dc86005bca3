// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Attention for whatever the matrix units cannot take: f32, and 16-bit rows that are not aligned
// to 16 bytes. The same flash form on tiles of 32 rows of f32, summed by FFMA.
#include "kernels/cuda/attention.cuh"

namespace metal_lora::cuda::attention {
namespace {

constexpr int kRows = 32, kThreads = 256, kLanes = kThreads / kRows;  // of one row
constexpr int kColumns = kRows / kLanes;                              ///< scores of one thread
constexpr int kMaxSums = 256 / kLanes;                                ///< of one thread's row
constexpr int kPitch = kRows + 1;

struct Thread {
  int row = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
};
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  v += __shfl_xor_sync(0xffffffffu, v, 2);
  return v + __shfl_xor_sync(0xffffffffu, v, 4);
}
__device__ __forceinline__ float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 4));
}

/// An odd pitch: neighbouring rows lie in different banks.
__device__ __forceinline__ int pitch_of(const Arguments& a) {
  return a.p.head_dim | 1;
}

template <typename T>
__device__ void load_rows(
    const Arguments& a,
    float* tile,
    const void* from,
    size_t stride,
    int head,
    int begin,
    int end) {
  const int head_dim = a.p.head_dim, pitch = pitch_of(a);
  for (int at = threadIdx.x; at < kRows * head_dim; at += kThreads) {
    const int row = at / head_dim, column = at % head_dim;
    tile[row * pitch + column] =
        begin + row < end
            ? to_float(static_cast<const T*>(
                  from)[(begin + row) * stride + static_cast<size_t>(head) * head_dim + column])
            : 0.0f;
  }
}
template <typename T>
__device__ void store_row(
    const Arguments& a,
    void* to,
    size_t stride,
    int head,
    int row,
    int rows,
    const float (&sums)[kMaxSums],
    float scale) {
  const Thread t;
  const int head_dim = a.p.head_dim;
  if (row >= rows) return;
#pragma unroll
  for (int c = 0; c < kMaxSums; ++c) {
    const int column = t.lane + kLanes * c;
    if (column >= head_dim) continue;
    static_cast<T*>(to)[row * stride + static_cast<size_t>(head) * head_dim + column] =
        from_float<T>(sums[c] * scale);
  }
}
/// dots[c] = row `row` of x · row lane + 8·c of y.
__device__ __forceinline__ void multiply_rows(
    float (&dots)[kColumns], const float* x, const float* y, int head_dim, int pitch) {
  const Thread t;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) dots[c] = 0.0f;
  for (int d = 0; d < head_dim; ++d) {
    const float left = x[t.row * pitch + d];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      dots[c] = fmaf(left, y[(t.lane + kLanes * c) * pitch + d], dots[c]);
    }
  }
}
/// sums += row `row` of p [32, 32] · y. The row is written and read by one warp.
__device__ __forceinline__ void add_product(
    float (&sums)[kMaxSums], const float* p, const float* y, int head_dim, int pitch) {
  const Thread t;
  for (int j = 0; j < kRows; ++j) {
    const float left = p[t.row * kPitch + j];
#pragma unroll
    for (int c = 0; c < kMaxSums; ++c) {
      if (kLanes * c >= head_dim) break;
      const int column = t.lane + kLanes * c;
      sums[c] = fmaf(left, column < head_dim ? y[j * pitch + column] : 0.0f, sums[c]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Arguments a) {
  extern __shared__ float memory[];
  __shared__ float p[kRows * kPitch];
  begin_dependent();
  const Thread t;
  const int head_dim = a.p.head_dim, pitch = pitch_of(a), tokens = a.p.q_tokens;
  const int begin = blockIdx.x * kRows, head = blockIdx.y, i = begin + t.row;
  const int kv_head = head / (a.p.q_heads / a.p.kv_heads), offset = offset_of(a);
  float *q = memory, *k = q + kRows * pitch, *v = k + kRows * pitch;
  const int2 firsts = first_keys(a, offset, begin, min(begin + kRows, tokens));
  const int last = last_key(a, offset, min(begin + kRows, tokens) - 1);
  const int first_mine = i < tokens ? first_key(a, offset, i) : INT_MAX;
  const int last_mine = last_key(a, offset, i);
  load_rows<T>(a, q, a.q, a.p.q_stride, head, begin, tokens);
  float top = -INFINITY, sum = 0.0f, o[kMaxSums] = {};
  const float scale = a.p.scale * kLog2e;
  for (int key = firsts.x / kRows * kRows; key <= last; key += kRows) {
    __syncthreads();
    load_rows<T>(a, k, a.k, a.p.k_stride, kv_head, key, last + 1);
    load_rows<T>(a, v, a.v, a.p.v_stride, kv_head, key, last + 1);
    __syncthreads();
    float s[kColumns];
    multiply_rows(s, q, k, head_dim, pitch);
    float new_top = top;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int j = key + t.lane + kLanes * c;
      s[c] = j < first_mine || j > last_mine ? -INFINITY : s[c] * scale;
      new_top = fmaxf(new_top, s[c]);
    }
    new_top = row_max(new_top);
    const float base = new_top == -INFINITY ? 0.0f : new_top;
    const float fade = exp2f(top - base);
    top = new_top;
    sum *= fade;
#pragma unroll
    for (int c = 0; c < kMaxSums; ++c) o[c] *= fade;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float x = exp2f(s[c] - base);
      sum += x;
      p[t.row * kPitch + t.lane + kLanes * c] = x;
    }
    __syncwarp();
    add_product(o, p, v, head_dim, pitch);
  }
  sum = row_sum(sum);
  store_row<T>(a, a.out, a.p.o_stride, head, i, tokens, o, sum == 0.0f ? 0.0f : 1.0f / sum);
  if (a.logsumexp != nullptr && t.lane == 0 && i < tokens) {
    a.logsumexp[static_cast<size_t>(head) * tokens + i] =
        sum == 0.0f ? -INFINITY : (top + log2f(sum)) * (1.0f / kLog2e);
  }
}

/// Σ dout·out of a row, by its threads; the logsumexp in base 2, infinite where no key is seen.
template <typename T>
__device__ float2 row_info(const Arguments& a, int head, int i) {
  const Thread t;
  const bool there = i < static_cast<int>(a.p.q_tokens);
  float sum = 0.0f;
  if (there) {
    const size_t row = i * a.p.o_stride + static_cast<size_t>(head) * a.p.head_dim;
    for (int c = t.lane; c < static_cast<int>(a.p.head_dim); c += kLanes) {
      sum = fmaf(
          to_float(static_cast<const T*>(a.out)[row + c]),
          to_float(static_cast<const T*>(a.dout)[row + c]),
          sum);
    }
  }
  sum = row_sum(sum);
  const float lse = there ? a.logsumexp[static_cast<size_t>(head) * a.p.q_tokens + i] : -INFINITY;
  return make_float2(lse == -INFINITY ? INFINITY : lse * kLog2e, sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) queries_kernel(const Arguments a) {
  extern __shared__ float memory[];
  __shared__ float ds[kRows * kPitch];
  begin_dependent();
  const Thread t;
  const int head_dim = a.p.head_dim, pitch = pitch_of(a), tokens = a.p.q_tokens;
  const int begin = blockIdx.x * kRows, head = blockIdx.y, i = begin + t.row;
  const int kv_head = head / (a.p.q_heads / a.p.kv_heads), offset = a.p.kv_offset;
  float *q = memory, *g = q + kRows * pitch, *k = g + kRows * pitch, *v = k + kRows * pitch;
  const int2 firsts = first_keys(a, offset, begin, min(begin + kRows, tokens));
  const int last = last_key(a, offset, min(begin + kRows, tokens) - 1);
  const int first_mine = i < tokens ? first_key(a, offset, i) : INT_MAX;
  load_rows<T>(a, q, a.q, a.p.q_stride, head, begin, tokens);
  load_rows<T>(a, g, a.dout, a.p.o_stride, head, begin, tokens);
  const float2 info = row_info<T>(a, head, i);
  float dq[kMaxSums] = {};
  for (int key = firsts.x / kRows * kRows; key <= last; key += kRows) {
    __syncthreads();
    load_rows<T>(a, k, a.k, a.p.k_stride, kv_head, key, last + 1);
    load_rows<T>(a, v, a.v, a.p.v_stride, kv_head, key, last + 1);
    __syncthreads();
    float s[kColumns], dp[kColumns];
    multiply_rows(s, q, k, head_dim, pitch);
    multiply_rows(dp, g, v, head_dim, pitch);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int j = key + t.lane + kLanes * c;
      const bool seen = j >= first_mine && j <= last_key(a, offset, i);
      ds[t.row * kPitch + t.lane + kLanes * c] =
          seen ? exp2f(s[c] * a.p.scale * kLog2e - info.x) * (dp[c] - info.y) : 0.0f;
    }
    __syncwarp();
    add_product(dq, ds, k, head_dim, pitch);
  }
  store_row<T>(a, a.dq, a.p.q_stride, head, i, tokens, dq, a.p.scale);
}

/// The largest query block that sees a key before `key_end` cannot be told from the segments
/// alone: every block from the diagonal on is looked at, and left where none of its rows does.
template <typename T>
__global__ void __launch_bounds__(kThreads) keys_kernel(const Arguments a) {
  extern __shared__ float memory[];
  __shared__ float p[kRows * kPitch], ds[kRows * kPitch];
  __shared__ float2 infos[kRows];
  __shared__ int first_of[kRows];
  begin_dependent();
  const Thread t;
  const int head_dim = a.p.head_dim, pitch = pitch_of(a), tokens = a.p.q_tokens;
  const int keys = a.p.kv_tokens, offset = a.p.kv_offset, group = a.p.q_heads / a.p.kv_heads;
  const int begin = blockIdx.x * kRows, kv_head = blockIdx.y, j = begin + t.row;
  float *k = memory, *v = k + kRows * pitch, *q = v + kRows * pitch, *g = q + kRows * pitch;
  load_rows<T>(a, k, a.k, a.p.k_stride, kv_head, begin, keys);
  load_rows<T>(a, v, a.v, a.p.v_stride, kv_head, begin, keys);
  float dk[kMaxSums] = {}, dv[kMaxSums] = {};
  for (int row = max(begin - offset, 0) / kRows * kRows; row < tokens; row += kRows) {
    __syncthreads();
    const int2 firsts = first_keys(a, offset, row, min(row + kRows, tokens));
    if (firsts.x >= begin + kRows) continue;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      __syncthreads();
      load_rows<T>(a, q, a.q, a.p.q_stride, head, row, tokens);
      load_rows<T>(a, g, a.dout, a.p.o_stride, head, row, tokens);
      const float2 mine = row_info<T>(a, head, row + t.row);
      if (t.lane == 0) {
        infos[t.row] = mine;
        first_of[t.row] = row + t.row < tokens ? first_key(a, offset, row + t.row) : INT_MAX;
      }
      __syncthreads();
      float s[kColumns], dp[kColumns];
      multiply_rows(s, k, q, head_dim, pitch);
      multiply_rows(dp, v, g, head_dim, pitch);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int i = t.lane + kLanes * c;
        const bool seen = j >= first_of[i] && j <= offset + row + i;
        const float x = seen ? exp2f(s[c] * a.p.scale * kLog2e - infos[i].x) : 0.0f;
        p[t.row * kPitch + i] = x;
        ds[t.row * kPitch + i] = seen ? x * (dp[c] - infos[i].y) : 0.0f;
      }
      __syncwarp();
      add_product(dv, p, g, head_dim, pitch);
      add_product(dk, ds, q, head_dim, pitch);
    }
  }
  store_row<T>(a, a.dk, a.p.k_stride, kv_head, j, keys, dk, a.p.scale);
  store_row<T>(a, a.dv, a.p.v_stride, kv_head, j, keys, dv, 1.0f);
}

size_t shared_bytes(const Arguments& a, int tiles) {
  return tiles * kRows * size_t{a.p.head_dim | 1} * sizeof(float);
}
uint32_t blocks_of(uint32_t rows) {
  return (rows + kRows - 1) / kRows;
}

}  // namespace

void forward_plain(const Context& context, const Arguments& a) {
  with_dtype(a.p.dtype, [&](auto type) {
    launch(
        context,
        "attention_forward",
        forward_kernel<decltype(type)>,
        dim3(blocks_of(a.p.q_tokens), a.p.q_heads),
        kThreads,
        shared_bytes(a, 3),
        a);
  });
}
void backward_plain(const Context& context, const Arguments& a) {
  with_dtype(a.p.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.p.q_tokens > 0) {
      launch(
          context,
          "attention_backward queries",
          queries_kernel<T>,
          dim3(blocks_of(a.p.q_tokens), a.p.q_heads),
          kThreads,
          shared_bytes(a, 4),
          a);
    }
    launch(
        context,
        "attention_backward keys",
        keys_kernel<T>,
        dim3(blocks_of(a.p.kv_tokens), a.p.kv_heads),
        kThreads,
        shared_bytes(a, 4),
        a);
  });
}

}  // namespace metal_lora::cuda::attention
