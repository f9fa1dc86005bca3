// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The form of lora_gemv that takes anything: f32 activations, weights of another type than x, odd
// k, unaligned pointers. A warp a row, FFMA, lanes along k; u in a dispatch of its own.
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_gemv.h"
#include "kernels/cuda/lora_gemv_formats.cuh"

namespace metal_lora::cuda::gemv {
namespace {

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kTokens = kVectorMaxTokens;

struct GenericBranch {
  WeightView weight;
  LoraView lora;
  const float* bias = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
  float* u = nullptr;
  DropMask mask;
};
struct GenericCall {
  const void* x = nullptr;
  uint32_t m = 0, k = 0;
  DType dtype = DType::bf16, y_dtype = DType::bf16;
  uint32_t branches = 0;
  GenericBranch branch[kMaxBranches];
};

__device__ float generic_u_value(
    const GenericCall& call, const GenericBranch& b, uint32_t token, uint32_t column) {
  if (b.mask.threshold > 0 && !drop_keeps(b.mask, drop_key(b.mask, token), column)) return 0.0f;
  return load_as_float(call.x, call.dtype, size_t{token} * call.k + column);
}

/// u [m, rank] of each branch: a warp a rank.
__global__ void __launch_bounds__(kThreads)
    generic_shrink_kernel(const __grid_constant__ GenericCall call) {
  allow_dependents();
  wait_for_previous();
  uint32_t rank = blockIdx.x * kWarps + threadIdx.x / 32;
  const uint32_t lane = threadIdx.x % 32;
  uint32_t i = 0;
  while (i < call.branches && rank >= call.branch[i].lora.params.rank) {
    rank -= call.branch[i++].lora.params.rank;
  }
  if (i == call.branches) return;
  const GenericBranch& b = call.branch[i];
  float sums[kTokens] = {};
  for (uint32_t column = lane; column < call.k; column += 32) {
    const float a = load_as_float(b.lora.a, b.lora.params.dtype, size_t{rank} * call.k + column);
#pragma unroll
    for (uint32_t t = 0; t < kTokens; ++t) {
      if (t >= call.m) break;
      sums[t] = fmaf(a, generic_u_value(call, b, t, column), sums[t]);
    }
  }
#pragma unroll
  for (uint32_t t = 0; t < kTokens; ++t) {
    const float sum = warp_sum(sums[t]);
    if (t < call.m && lane == t)
      b.u[size_t{t} * b.lora.params.rank + rank] = sum * b.mask.keep_scale;
  }
}

template <WeightFormat kFormat>
__device__ __forceinline__ float weight_at(const WeightView& w, uint32_t row, uint32_t column) {
  const size_t at = size_t{row} * w.params.k + column;
  if constexpr (kFormat <= WeightFormat::bf16) {
    return load_as_float(w.data, static_cast<DType>(kFormat), at);
  } else if constexpr (kFormat == WeightFormat::nf4) {
    const uint32_t byte = static_cast<const uint8_t*>(w.data)[at / 2];
    const size_t block = at / kNf4Block;
    float absmax;
    if (w.params.double_quant) {
      const auto* nested = static_cast<const float*>(w.biases);
      const uint32_t code = static_cast<const uint8_t*>(w.scales)[block];
      absmax = __fadd_rn(
          __fmul_rn(nested[1 + code], nested[kNf4NestedHead + block / kNf4NestedBlock]), nested[0]);
    } else {
      absmax = static_cast<const float*>(w.scales)[block];
    }
    return __fmul_rn(nf4_level(byte >> (4 * (at % 2)) & 15u), absmax);
  } else {
    const uint32_t byte = kFormat == WeightFormat::int8
                              ? static_cast<const uint8_t*>(w.data)[at]
                              : static_cast<const uint8_t*>(w.data)[at / 2] >> (4 * (at % 2)) & 15u;
    const size_t group = at / w.params.group_size;
    return fmaf(
        static_cast<float>(byte),
        load_as_float(w.scales, w.params.scales_dtype, group),
        load_as_float(w.biases, w.params.scales_dtype, group));
  }
}

template <WeightFormat kFormat>
__global__ void __launch_bounds__(kThreads)
    generic_kernel(const __grid_constant__ GenericCall call, const uint32_t branch) {
  const GenericBranch& b = call.branch[branch];
  const uint32_t n = b.weight.params.n, rank = b.lora.params.rank;
  const uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  allow_dependents();
  wait_for_previous();
  if (row >= n) return;
  float sums[kTokens] = {};
#pragma unroll 4
  for (uint32_t column = lane; column < call.k; column += 32) {
    const float w = weight_at<kFormat>(b.weight, row, column);
#pragma unroll
    for (uint32_t t = 0; t < kTokens; ++t) {
      if (t >= call.m) break;
      const float x = load_as_float(call.x, call.dtype, size_t{t} * call.k + column);
      sums[t] = fmaf(w, x, sums[t]);
    }
  }
  float delta[kTokens] = {};
  for (uint32_t r = lane; r < rank; r += 32) {
    const float w = load_as_float(b.lora.b, b.lora.params.dtype, size_t{row} * rank + r);
#pragma unroll
    for (uint32_t t = 0; t < kTokens; ++t) {
      if (t < call.m) delta[t] = fmaf(w, b.u[size_t{t} * rank + r], delta[t]);
    }
  }
#pragma unroll
  for (uint32_t t = 0; t < kTokens; ++t) {
    if (t >= call.m) break;
    float y = warp_sum(sums[t]);
    if (rank > 0) y = fmaf(b.lora.params.scale, warp_sum(delta[t]), y);
    if (lane != 0) continue;
    const size_t at = size_t{t} * n + row;
    if (b.bias != nullptr) y += b.bias[row];
    if (b.residual != nullptr) y += load_as_float(b.residual, call.y_dtype, at);
    store_from_float(b.y, call.y_dtype, at, y);
  }
}

template <WeightFormat kFormat>
void launch_rows(const Context& context, const GenericCall& call, uint32_t branch) {
  const uint32_t n = call.branch[branch].weight.params.n;
  launch_pdl(
      generic_kernel<kFormat>,
      (n + kWarps - 1) / kWarps,
      kThreads,
      0,
      context.stream,
      call,
      branch);
}

GenericCall make_generic_call(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count) {
  GenericCall call;
  call.x = x;
  call.m = m;
  call.k = k;
  call.dtype = dtype;
  call.branches = static_cast<uint32_t>(count);
  for (size_t i = 0; i < count; ++i) {
    GenericBranch& b = call.branch[i];
    const LoraParams& lora = branches[i].lora.params;
    b.weight = branches[i].weight;
    b.lora = branches[i].lora;
    b.bias = branches[i].bias;
    b.residual = branches[i].residual;
    b.y = branches[i].y;
    b.u = branches[i].u;
    b.mask = DropMask(lora.dropout, lora.dropout_seed);
    if (lora.rank > 0 && b.u == nullptr) {
      b.u = static_cast<float*>(context.scratch->take(size_t{m} * lora.rank * sizeof(float)));
    }
  }
  return call;
}

void shrink(const Context& context, const GenericCall& call) {
  uint32_t ranks = 0;
  for (uint32_t i = 0; i < call.branches; ++i) ranks += call.branch[i].lora.params.rank;
  if (ranks == 0) return;
  launch_pdl(
      generic_shrink_kernel, (ranks + kWarps - 1) / kWarps, kThreads, 0, context.stream, call);
}

}  // namespace

void launch_generic_shrink(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count) {
  shrink(context, make_generic_call(context, m, k, dtype, x, branches, count));
}

void launch_generic(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype) {
  GenericCall call = make_generic_call(context, m, k, dtype, x, branches, count);
  call.y_dtype = y_dtype;
  shrink(context, call);
  for (uint32_t i = 0; i < call.branches; ++i) {
    if (call.branch[i].weight.params.n == 0) continue;
    switch (call.branch[i].weight.params.format) {
      case WeightFormat::f32:
        launch_rows<WeightFormat::f32>(context, call, i);
        break;
      case WeightFormat::f16:
        launch_rows<WeightFormat::f16>(context, call, i);
        break;
      case WeightFormat::bf16:
        launch_rows<WeightFormat::bf16>(context, call, i);
        break;
      case WeightFormat::int4:
        launch_rows<WeightFormat::int4>(context, call, i);
        break;
      case WeightFormat::int8:
        launch_rows<WeightFormat::int8>(context, call, i);
        break;
      case WeightFormat::nf4:
        launch_rows<WeightFormat::nf4>(context, call, i);
        break;
    }
  }
  check_launch("lora_gemv generic");
}

}  // namespace metal_lora::cuda::gemv
