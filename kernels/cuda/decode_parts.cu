// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// All of these move a few KiB: what they cost is their launch. Programmatic dependent launch hides
// most of it (not measured one by one).
#include "kernels/cuda/decode_parts.h"

#include <stdexcept>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"

namespace metal_lora::cuda {
namespace {

constexpr int kNormThreads = 512;
constexpr uint32_t kMaxHeadDim = 256;

template <int kThreads>
__device__ float block_sum(float v) {
  __shared__ float parts[kThreads / 32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += parts[i];
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    decode_norm_kernel(uint32_t dims, float eps, const float* x, const float* weight, T* y) {
  allow_dependents();
  wait_for_previous();
  const float* row = x + size_t{blockIdx.x} * dims;
  float squares = 0.0f;
  for (uint32_t i = threadIdx.x; i < dims; i += kNormThreads) squares += row[i] * row[i];
  const float scale = rsqrtf(block_sum<kNormThreads>(squares) / static_cast<float>(dims) + eps);
  for (uint32_t i = threadIdx.x; i < dims; i += kNormThreads) {
    y[size_t{blockIdx.x} * dims + i] = from_float<T>(row[i] * scale * weight[i]);
  }
}

struct RopeArgs {
  DecodeRopeParams p;
  const int32_t* positions;
  const float* cos_sin;
  const float* q_norm;
  const float* k_norm;
};

/// One warp a head: q's, k's, then v's heads of token blockIdx.y.
template <typename T>
__global__ void decode_rope_kernel(
    const __grid_constant__ RopeArgs args, T* q, const T* k, const T* v, T* k_cache, T* v_cache) {
  allow_dependents();
  wait_for_previous();
  const auto& p = args.p;
  const uint32_t head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32, token = blockIdx.y, half = p.head_dim / 2;
  if (head >= p.q_heads + 2 * p.kv_heads) return;
  const size_t position = static_cast<size_t>(args.positions[token]);
  if (head >= p.q_heads + p.kv_heads) {
    const uint32_t h = head - p.q_heads - p.kv_heads;
    const T* from = v + (size_t{token} * p.kv_heads + h) * p.head_dim;
    T* to = v_cache + (position * p.kv_heads + h) * p.head_dim;
    for (uint32_t i = lane; i < p.head_dim; i += 32) to[i] = from[i];
    return;
  }
  const bool is_q = head < p.q_heads;
  const uint32_t h = is_q ? head : head - p.q_heads;
  const T* from = is_q ? q + (size_t{token} * p.q_heads + h) * p.head_dim
                       : k + (size_t{token} * p.kv_heads + h) * p.head_dim;
  T* to = is_q ? q + (size_t{token} * p.q_heads + h) * p.head_dim
               : k_cache + (position * p.kv_heads + h) * p.head_dim;
  const float* norm = is_q ? args.q_norm : args.k_norm;
  const float* cosines = args.cos_sin + size_t{token} * p.head_dim;
  constexpr int kPerLane = kMaxHeadDim / 64;
  float low[kPerLane], high[kPerLane], squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t i = lane + 32 * j;
    low[j] = i < half ? to_float(from[i]) : 0.0f;
    high[j] = i < half ? to_float(from[half + i]) : 0.0f;
    squares += low[j] * low[j] + high[j] * high[j];
  }
  const float scale =
      norm == nullptr ? 1.0f : rsqrtf(warp_sum(squares) / static_cast<float>(p.head_dim) + p.eps);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const uint32_t i = lane + 32 * j;
    if (i >= half) continue;
    float a = low[j], b = high[j];
    if (norm != nullptr) {
      a *= scale * norm[i];
      b *= scale * norm[half + i];
    }
    const float c = cosines[i], s = cosines[half + i];
    to[i] = from_float<T>(a * c - b * s);
    to[half + i] = from_float<T>(b * c + a * s);
  }
}

}  // namespace

void decode_norm(
    const Context& context,
    uint32_t rows,
    uint32_t dims,
    float eps,
    const float* x,
    const float* weight,
    DType dtype,
    void* y) {
  if (rows == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_pdl(
        decode_norm_kernel<T>,
        dim3(rows),
        dim3(kNormThreads),
        0,
        context.stream,
        dims,
        eps,
        x,
        weight,
        static_cast<T*>(y));
  });
}

void decode_rope_cache(
    const Context& context,
    const DecodeRopeParams& p,
    const int32_t* positions,
    const float* cos_sin,
    const float* q_norm,
    const float* k_norm,
    void* q,
    const void* k,
    const void* v,
    void* k_cache,
    void* v_cache) {
  if (p.head_dim > kMaxHeadDim || p.head_dim % 2 != 0) {
    throw std::invalid_argument("[decode_rope_cache] head_dim must be even and at most 256");
  }
  if (p.tokens == 0) return;
  constexpr uint32_t kHeadsPerBlock = 4;
  const uint32_t heads = p.q_heads + 2 * p.kv_heads;
  const RopeArgs args{p, positions, cos_sin, q_norm, k_norm};
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_pdl(
        decode_rope_kernel<T>,
        dim3((heads + kHeadsPerBlock - 1) / kHeadsPerBlock, p.tokens),
        dim3(32 * kHeadsPerBlock),
        0,
        context.stream,
        args,
        static_cast<T*>(q),
        static_cast<const T*>(k),
        static_cast<const T*>(v),
        static_cast<T*>(k_cache),
        static_cast<T*>(v_cache));
  });
}

}  // namespace metal_lora::cuda
