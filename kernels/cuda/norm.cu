// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// RMS norm with the addition before it. Every array moves once: a row stays in the registers of a
// block (up to 16,384 16-bit values), so that the second pass reads nothing. Rows that are longer
// or do not start on 16 bytes are read twice.
//
// Ladder ([4096, 2048] bf16, H100, copy 2.44 TB/s): a warp a row, eight loads in flight a lane:
// forward 18.7 µs, backward with dh 42 µs; a block a row: 18.2 µs (1.84 TB/s) and 32 µs (2.1 TB/s,
// 86 %). Within a training step, where part of a row comes from the second-level cache: 15.5 and
// 28.5 µs; weights in wide loads, they and dh ahead of the sums 11 and 22 µs (3.0 TB/s). The next
// 10 %: two rows a block, so that one loads while the other is reduced.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr int kBlock = 256;

/// Sums over the block, in a fixed order, known to all threads.
template <int kCount>
__device__ __forceinline__ void row_sums(float (&v)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = warp_sum(v[i]);
  __shared__ float parts[kCount][kBlock / 32];
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) parts[i][threadIdx.x / 32] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    v[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kBlock / 32; ++w) v[i] += parts[i][w];
  }
}

template <typename T, typename W>
struct Forward {
  uint32_t dims;
  float eps;
  const T* x;
  const T* residual;
  const W* weight;
  T* h;
  T* y;
};

/// h, rounded to its type as the next layer will read it.
template <typename T>
__device__ __forceinline__ T summed(T x, T residual) {
  return from_float<T>(to_float(x) + to_float(residual));
}

/// The weights of a vector of 16 bytes of T, in wide loads that do not wait for the sums.
template <typename T, typename W>
struct Weights {
  static constexpr int kCount = Vec16<T>::kCount, kEach = Vec16<W>::kCount;
  Vec16<W> part[kCount < kEach ? 1 : kCount / kEach];
  __device__ __forceinline__ void load(const W* from) {
    if constexpr (kCount < kEach) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) part[0].v[j] = from[j];
    } else {
#pragma unroll
      for (int p = 0; p < kCount / kEach; ++p) part[p] = load16(from + p * kEach);
    }
  }
  __device__ __forceinline__ float at(int j) const {
    return to_float(part[j / kEach].v[j % kEach]);
  }
};

/// A block a row, kChunks vectors of 16 bytes a thread.
template <typename T, typename W, int kChunks>
__global__ void __launch_bounds__(kBlock) forward_rows(const Forward<T, W> a) {
  allow_dependents();
  wait_for_previous();
  constexpr int kV = Vec16<T>::kCount;
  const uint32_t row = blockIdx.x;
  const size_t at = size_t{row} * a.dims;
  Vec16<T> v[kChunks];
  Weights<T, W> weights[kChunks];
  float sums[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t i = (c * kBlock + threadIdx.x) * kV;
    if (i >= a.dims) continue;
    v[c] = load16(a.x + at + i);
    weights[c].load(a.weight + i);
  }
  if (a.residual != nullptr) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const uint32_t i = (c * kBlock + threadIdx.x) * kV;
      if (i >= a.dims) continue;
      const Vec16<T> r = load16(a.residual + at + i);
#pragma unroll
      for (int j = 0; j < kV; ++j) v[c].v[j] = summed(v[c].v[j], r.v[j]);
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t i = (c * kBlock + threadIdx.x) * kV;
    if (i >= a.dims) continue;
    if (a.h != nullptr) store16(a.h + at + i, v[c]);
#pragma unroll
    for (int j = 0; j < kV; ++j) sums[0] += to_float(v[c].v[j]) * to_float(v[c].v[j]);
  }
  row_sums(sums);
  const float scale = rsqrtf(sums[0] / static_cast<float>(a.dims) + a.eps);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t i = (c * kBlock + threadIdx.x) * kV;
    if (i >= a.dims) continue;
    Vec16<T> out;
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      out.v[j] = from_float<T>(to_float(v[c].v[j]) * scale * weights[c].at(j));
    }
    store16(a.y + at + i, out);
  }
}

/// Any row, read twice.
template <typename T, typename W>
__global__ void __launch_bounds__(kBlock) forward_any(const Forward<T, W> a) {
  allow_dependents();
  wait_for_previous();
  const size_t at = size_t{blockIdx.x} * a.dims;
  const auto value = [&](uint32_t i) {
    const T x = a.x[at + i];
    return to_float(a.residual == nullptr ? x : summed(x, a.residual[at + i]));
  };
  float sums[1] = {0.0f};
  for (uint32_t i = threadIdx.x; i < a.dims; i += kBlock) sums[0] += value(i) * value(i);
  row_sums(sums);
  const float scale = rsqrtf(sums[0] / static_cast<float>(a.dims) + a.eps);
  for (uint32_t i = threadIdx.x; i < a.dims; i += kBlock) {
    const float v = value(i);
    if (a.h != nullptr) a.h[at + i] = from_float<T>(v);
    a.y[at + i] = from_float<T>(v * scale * to_float(a.weight[i]));
  }
}

template <typename T, typename W>
struct Backward {
  uint32_t dims;
  float eps;
  const T* h;
  const W* weight;
  const T* dy;
  const T* dh;
  T* dx;
  float* scale;  ///< [rows] 1/sqrt(mean(h²) + eps), or null
};

/// dx = dh + s·w·dy − h·s³·mean(w·dy·h), s = 1/sqrt(mean(h²) + eps). A thread reads all of its part
/// of a row before it writes: dx may be dy or dh.
template <typename T, typename W, int kChunks>
__global__ void __launch_bounds__(kBlock) backward_rows(const Backward<T, W> a) {
  allow_dependents();
  wait_for_previous();
  constexpr int kV = Vec16<T>::kCount;
  const uint32_t row = blockIdx.x;
  const size_t at = size_t{row} * a.dims;
  Vec16<T> h[kChunks], g[kChunks], beside[kChunks] = {};
  Weights<T, W> weights[kChunks];
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t i = (c * kBlock + threadIdx.x) * kV;
    if (i >= a.dims) continue;
    h[c] = load16(a.h + at + i);
    g[c] = load16(a.dy + at + i);
    if (a.dh != nullptr) beside[c] = load16(a.dh + at + i);
    weights[c].load(a.weight + i);
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t i = (c * kBlock + threadIdx.x) * kV;
    if (i >= a.dims) continue;
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const float v = to_float(h[c].v[j]);
      sums[0] += v * v;
      sums[1] += v * to_float(g[c].v[j]) * weights[c].at(j);
    }
  }
  row_sums(sums);
  const float scale = rsqrtf(sums[0] / static_cast<float>(a.dims) + a.eps);
  const float pull = scale * scale * scale * (sums[1] / static_cast<float>(a.dims));
  if (a.scale != nullptr && threadIdx.x == 0) a.scale[row] = scale;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint32_t i = (c * kBlock + threadIdx.x) * kV;
    if (i >= a.dims) continue;
    Vec16<T> out;
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      float v = scale * weights[c].at(j) * to_float(g[c].v[j]) - to_float(h[c].v[j]) * pull;
      if (a.dh != nullptr) v += to_float(beside[c].v[j]);
      out.v[j] = from_float<T>(v);
    }
    store16(a.dx + at + i, out);
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kBlock) backward_any(const Backward<T, W> a) {
  allow_dependents();
  wait_for_previous();
  const size_t at = size_t{blockIdx.x} * a.dims;
  float sums[2] = {0.0f, 0.0f};
  for (uint32_t i = threadIdx.x; i < a.dims; i += kBlock) {
    const float v = to_float(a.h[at + i]);
    sums[0] += v * v;
    sums[1] += v * to_float(a.dy[at + i]) * to_float(a.weight[i]);
  }
  row_sums(sums);
  const float scale = rsqrtf(sums[0] / static_cast<float>(a.dims) + a.eps);
  const float pull = scale * scale * scale * (sums[1] / static_cast<float>(a.dims));
  if (a.scale != nullptr && threadIdx.x == 0) a.scale[blockIdx.x] = scale;
  for (uint32_t i = threadIdx.x; i < a.dims; i += kBlock) {
    float v = scale * to_float(a.weight[i]) * to_float(a.dy[at + i]) - to_float(a.h[at + i]) * pull;
    if (a.dh != nullptr) v += to_float(a.dh[at + i]);
    a.dx[at + i] = from_float<T>(v);
  }
}

/// partial[chunk, i] = Σ of the chunk's rows of dy·h·scale; the rows in order.
constexpr uint32_t kRowsPerChunk = 64;
template <typename T>
__global__ void __launch_bounds__(kBlock) weight_partials(
    uint32_t rows, uint32_t dims, const T* h, const T* dy, const float* scale, float* partial) {
  wait_for_previous();
  const uint32_t i = blockIdx.x * kBlock + threadIdx.x;
  if (i >= dims) return;
  const uint32_t first = blockIdx.y * kRowsPerChunk;
  const uint32_t end = min(first + kRowsPerChunk, rows);
  float sum = 0.0f;
  for (uint32_t r = first; r < end; ++r) {
    const size_t at = size_t{r} * dims + i;
    sum += to_float(dy[at]) * to_float(h[at]) * scale[r];
  }
  partial[size_t{blockIdx.y} * dims + i] = sum;
}

__global__ void __launch_bounds__(kBlock)
    weight_sums(uint32_t chunks, uint32_t dims, const float* partial, float* dweight) {
  wait_for_previous();
  const uint32_t i = blockIdx.x * kBlock + threadIdx.x;
  if (i >= dims) return;
  float sum = 0.0f;
  for (uint32_t c = 0; c < chunks; ++c) sum += partial[size_t{c} * dims + i];
  dweight[i] = sum;
}

// ---- host ----

constexpr int kMaxChunks = 8;

/// Vectors of 16 bytes that a thread holds: 1, 2, 4 or 8; 0 where rows cannot be held.
template <typename T>
int chunks_of(uint32_t dims, std::initializer_list<const void*> pointers) {
  constexpr uint32_t kV = Vec16<T>::kCount;
  if (dims % kV != 0 || dims > kBlock * kMaxChunks * kV) return 0;
  for (const void* p : pointers) {
    if (!is_aligned(p)) return 0;
  }
  int chunks = 1;
  while (dims > static_cast<uint32_t>(chunks) * kBlock * kV) chunks *= 2;
  return chunks;
}

template <typename F>
void with_types(DType dtype, DType weight_dtype, F&& f) {
  with_dtype(dtype, [&](auto t) { with_dtype(weight_dtype, [&](auto w) { f(t, w); }); });
}

unsigned tiles(uint32_t count) {
  return (count + kBlock - 1) / kBlock;
}

}  // namespace

void add_rms_norm_forward(
    const Context& context,
    const NormParams& p,
    const void* x,
    const void* residual,
    const void* weight,
    void* h,
    void* y) {
  if (p.rows == 0 || p.dims == 0) return;
  with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const Forward<T, W> a{
        p.dims,
        p.eps,
        static_cast<const T*>(x),
        static_cast<const T*>(residual),
        static_cast<const W*>(weight),
        static_cast<T*>(h),
        static_cast<T*>(y)};
    const int chunks = chunks_of<T>(p.dims, {x, residual, weight, h, y});
    const auto kernel = chunks == 0   ? forward_any<T, W>
                        : chunks == 1 ? forward_rows<T, W, 1>
                        : chunks == 2 ? forward_rows<T, W, 2>
                        : chunks == 4 ? forward_rows<T, W, 4>
                                      : forward_rows<T, W, 8>;
    launch_pdl(kernel, dim3(p.rows), dim3(kBlock), 0, context.stream, a);
  });
}

void add_rms_norm_backward(
    const Context& context,
    const NormParams& p,
    const void* h,
    const void* weight,
    const void* dy,
    const void* dh,
    void* dx,
    float* dweight) {
  if (p.dims == 0) return;
  if (p.rows == 0) {
    if (dweight != nullptr) {
      check(cudaMemsetAsync(dweight, 0, p.dims * sizeof(float), context.stream), "rms_norm");
    }
    return;
  }
  float* scale = nullptr;
  const void* kept_dy = dy;
  with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    if (dweight != nullptr) {
      scale = static_cast<float*>(context.scratch->take(p.rows * sizeof(float)));
      if (dx == dy) {  // the second pass reads it still
        const size_t bytes = size_t{p.rows} * p.dims * sizeof(T);
        void* copy = context.scratch->take(bytes);
        check(
            cudaMemcpyAsync(copy, dy, bytes, cudaMemcpyDeviceToDevice, context.stream), "rms_norm");
        kept_dy = copy;
      }
    }
    const Backward<T, W> a{
        p.dims,
        p.eps,
        static_cast<const T*>(h),
        static_cast<const W*>(weight),
        static_cast<const T*>(dy),
        static_cast<const T*>(dh),
        static_cast<T*>(dx),
        scale};
    const int chunks = chunks_of<T>(p.dims, {h, weight, dy, dh, dx});
    const auto kernel = chunks == 0   ? backward_any<T, W>
                        : chunks == 1 ? backward_rows<T, W, 1>
                        : chunks == 2 ? backward_rows<T, W, 2>
                        : chunks == 4 ? backward_rows<T, W, 4>
                                      : backward_rows<T, W, 8>;
    launch_pdl(kernel, dim3(p.rows), dim3(kBlock), 0, context.stream, a);
    if (dweight == nullptr) return;
    const uint32_t row_chunks = (p.rows + kRowsPerChunk - 1) / kRowsPerChunk;
    auto* partial =
        static_cast<float*>(context.scratch->take(size_t{row_chunks} * p.dims * sizeof(float)));
    launch_pdl(
        weight_partials<T>,
        dim3(tiles(p.dims), row_chunks),
        dim3(kBlock),
        0,
        context.stream,
        p.rows,
        p.dims,
        a.h,
        static_cast<const T*>(kept_dy),
        scale,
        partial);
    launch_pdl(
        weight_sums,
        dim3(tiles(p.dims)),
        dim3(kBlock),
        0,
        context.stream,
        row_chunks,
        p.dims,
        partial,
        dweight);
  });
}

}  // namespace metal_lora::cuda
