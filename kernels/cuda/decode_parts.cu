// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// All of these move a few KiB: what they cost is their launch. Programmatic dependent launch hides
// most of it (not measured one by one).
#include "kernels/cuda/decode_parts.h"

#include <stdexcept>

#include "kernels/cuda/decode_rope.cuh"
#include "kernels/cuda/launch.cuh"

namespace metal_lora::cuda {
namespace {

constexpr int kNormThreads = 512;
constexpr int kNormHeld = 2;  ///< of a thread's parts, kept in registers
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

/// Parts of kWidth values; what is not held is read twice.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kNormThreads)
    decode_norm_kernel(uint32_t dims, float eps, const float* x, const float* weight, T* y) {
  struct alignas(kWidth * sizeof(float)) Part {
    float v[kWidth];
  };
  struct alignas(kWidth * sizeof(T)) Out {
    T v[kWidth];
  };
  allow_dependents();
  const uint32_t parts = dims / kWidth;
  const auto* weights = reinterpret_cast<const Part*>(weight);
  Part held[kNormHeld], scales[kNormHeld];
#pragma unroll
  for (int j = 0; j < kNormHeld; ++j) {
    const uint32_t i = threadIdx.x + j * kNormThreads;
    if (i < parts) scales[j] = weights[i];
  }
  wait_for_previous();
  const auto* row = reinterpret_cast<const Part*>(x + size_t{blockIdx.x} * dims);
  auto* out = reinterpret_cast<Out*>(y + size_t{blockIdx.x} * dims);
  float squares = 0.0f;
  const auto add = [&](const Part& part) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) squares += part.v[c] * part.v[c];
  };
#pragma unroll
  for (int j = 0; j < kNormHeld; ++j) {
    const uint32_t i = threadIdx.x + j * kNormThreads;
    if (i < parts) held[j] = row[i];
  }
#pragma unroll
  for (int j = 0; j < kNormHeld; ++j) {
    if (threadIdx.x + j * kNormThreads < parts) add(held[j]);
  }
  constexpr uint32_t kRest = kNormHeld * kNormThreads;
  for (uint32_t i = kRest + threadIdx.x; i < parts; i += kNormThreads) add(row[i]);
  const float scale = rsqrtf(block_sum<kNormThreads>(squares) / static_cast<float>(dims) + eps);
  const auto store = [&](uint32_t i, const Part& part, const Part& by) {
    Out v;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) v.v[c] = from_float<T>(part.v[c] * scale * by.v[c]);
    out[i] = v;
  };
#pragma unroll
  for (int j = 0; j < kNormHeld; ++j) {
    const uint32_t i = threadIdx.x + j * kNormThreads;
    if (i < parts) store(i, held[j], scales[j]);
  }
  for (uint32_t i = kRest + threadIdx.x; i < parts; i += kNormThreads) {
    store(i, row[i], weights[i]);
  }
}

struct RopeArgs {
  DecodeAttentionParams p;
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
  const uint32_t lane = threadIdx.x % 32, token = blockIdx.y;
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
  Rotation<kMaxHeadDim / 64> rotation;
  rotation.load(from, norm, args.cos_sin + size_t{token} * p.head_dim, p.head_dim / 2);
  rotation.store(p.eps, [&](int column, float v) { to[column] = from_float<T>(v); });
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
  bool wide = dims % 4 == 0;
  for (const void* p :
       {static_cast<const void*>(x),
        static_cast<const void*>(weight),
        static_cast<const void*>(y)}) {
    wide = wide && is_aligned(p);
  }
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_pdl(
        wide ? decode_norm_kernel<T, 4> : decode_norm_kernel<T, 1>,
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
    const DecodeAttentionParams& p,
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
