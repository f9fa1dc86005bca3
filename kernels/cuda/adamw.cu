// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// AdamW over one flat buffer in two launches: the gradient's norm by fixed chunks, then the update,
// whose blocks each add the chunks' sums in the same order. 32 bytes a value (the gradient twice).
#include <algorithm>
#include <cmath>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr int kBlock = 256;
constexpr size_t kChunk = 65536;  ///< as the CPU twin's: the order of the norm's sum

__device__ double block_sum(double v) {
  __shared__ double parts[kBlock / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  double sum = 0.0;
  for (double part : parts) sum += part;
  return sum;
}

/// Squares of f32 stay finite in f64, so a sum is finite exactly where every gradient is.
__global__ void __launch_bounds__(kBlock)
    norm_kernel(size_t count, const float* grad, double* partial) {
  wait_for_previous();
  const size_t first = blockIdx.x * kChunk, end = min(first + kChunk, count);
  double sum = 0.0;
  for (size_t i = first + threadIdx.x; i < end; i += kBlock) {
    sum += static_cast<double>(grad[i]) * static_cast<double>(grad[i]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

struct Update {
  AdamWParams p;
  float keep, step_size, inv_sqrt_bias2;
  float* param;
  const float* grad;
  float* m;
  float* v;
  const double* partial;
  uint32_t partials;
  float* grad_norm;
  int32_t* skipped;
};

__global__ void __launch_bounds__(kBlock) update_kernel(const __grid_constant__ Update a) {
  wait_for_previous();
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < a.partials; i += kBlock) sum += a.partial[i];
  const double norm = sqrt(block_sum(sum)) * fabs(static_cast<double>(a.p.grad_scale));
  const bool skip = !isfinite(static_cast<float>(norm));
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *a.grad_norm = static_cast<float>(norm);
    *a.skipped = skip ? 1 : 0;
  }
  if (skip) return;
  const double clip =
      a.p.clip_norm > 0.0f ? fmin(1.0, static_cast<double>(a.p.clip_norm) / (norm + 1e-6)) : 1.0;
  const float factor = static_cast<float>(static_cast<double>(a.p.grad_scale) * clip);
  for (size_t i = blockIdx.x * size_t{kBlock} + threadIdx.x; i < a.p.count;
       i += size_t{gridDim.x} * kBlock) {
    const float g = a.grad[i] * factor;
    const float m = a.p.beta1 * a.m[i] + (1.0f - a.p.beta1) * g;
    const float v = a.p.beta2 * a.v[i] + (1.0f - a.p.beta2) * g * g;
    a.m[i] = m;
    a.v[i] = v;
    a.param[i] = a.param[i] * a.keep - a.step_size * m / (sqrtf(v) * a.inv_sqrt_bias2 + a.p.eps);
  }
}

}  // namespace

void adamw(
    const Context& context,
    const AdamWParams& p,
    float* param,
    const float* grad,
    float* m,
    float* v,
    float* grad_norm,
    int32_t* skipped) {
  const auto partials = static_cast<uint32_t>((p.count + kChunk - 1) / kChunk);
  auto* partial =
      static_cast<double*>(context.scratch->take(std::max<size_t>(partials, 1) * sizeof(double)));
  if (partials > 0) {
    launch_pdl(
        norm_kernel, dim3(partials), dim3(kBlock), 0, context.stream, p.count, grad, partial);
  }
  const double t = static_cast<double>(p.step), rate = p.learning_rate;
  const double bias1 = p.bias_correction ? 1.0 - std::pow(double{p.beta1}, t) : 1.0;
  const double bias2 = p.bias_correction ? 1.0 - std::pow(double{p.beta2}, t) : 1.0;
  const Update update{
      p,
      static_cast<float>(1.0 - rate * p.weight_decay),
      static_cast<float>(rate / bias1),
      static_cast<float>(1.0 / std::sqrt(bias2)),
      param,
      grad,
      m,
      v,
      partial,
      partials,
      grad_norm,
      skipped};
  const size_t blocks = std::min<size_t>(
      (p.count + kBlock - 1) / kBlock, 8 * static_cast<size_t>(context.multiprocessors));
  launch_pdl(
      update_kernel,
      dim3(static_cast<unsigned>(std::max<size_t>(blocks, 1))),
      dim3(kBlock),
      0,
      context.stream,
      update);
}

}  // namespace metal_lora::cuda
