// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Adds up what the tiles of a product with SwiGLU at their end left of the next linear's low-rank
// half (GemmSwiglu::parts): a thread four columns of a row, in order of the parts.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) add_act_parts_kernel(const ActParts p) {
  const uint32_t quads = p.rank / 4, i = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t row = i / quads, column = i % quads * 4;
  wait_for_previous();
  allow_dependents();  // after the wait: a product may begin on what was written before this kernel
  if (row >= p.m) return;
  const size_t stride = size_t{p.m} * p.rank;
  const float* from = p.parts + size_t{row} * p.rank + column;
  float4 sum = {};
#pragma unroll 8
  for (uint32_t part = 0; part < p.count; ++part) {
    add_to(sum, __ldcs(reinterpret_cast<const float4*>(from + part * stride)));
  }
  const float f = p.factor;
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + row * p.out_stride + column) =
      make_uint2(mma::pack2<T>(f * sum.x, f * sum.y), mma::pack2<T>(f * sum.z, f * sum.w));
}

}  // namespace

void add_act_parts(const Context& context, const ActParts& parts) {
  const uint32_t quads = parts.m * (parts.rank / 4);
  if (quads == 0) return;
  const auto kernel =
      parts.dtype == DType::bf16 ? add_act_parts_kernel<bf16> : add_act_parts_kernel<f16>;
  launch_pdl(kernel, (quads + kThreads - 1) / kThreads, kThreads, 0, context.stream, parts);
  check_launch("add_act_parts");
}

}  // namespace metal_lora::cuda
