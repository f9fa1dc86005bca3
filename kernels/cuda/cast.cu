// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr unsigned kBlock = 256, kPerThread = 4;
constexpr size_t kTile = size_t{kBlock} * size_t{kPerThread};

template <typename From, typename To>
__global__ void __launch_bounds__(kBlock) cast_kernel(size_t count, const From* from, To* to) {
  allow_dependents();
  wait_for_previous();
  const size_t first = blockIdx.x * kTile + threadIdx.x;
#pragma unroll
  for (unsigned j = 0; j < kPerThread; ++j) {
    const size_t i = first + size_t{j} * kBlock;
    if (i < count) to[i] = from_float<To>(to_float(from[i]));
  }
}

}  // namespace

void cast(
    const Context& context,
    size_t count,
    const void* from,
    DType from_dtype,
    void* to,
    DType to_dtype) {
  if (count == 0) return;
  with_dtype(from_dtype, [&](auto f) {
    with_dtype(to_dtype, [&](auto t) {
      using From = decltype(f);
      using To = decltype(t);
      launch_pdl(
          cast_kernel<From, To>,
          dim3(static_cast<unsigned>((count + kTile - 1) / kTile)),
          dim3(kBlock),
          0,
          context.stream,
          count,
          static_cast<const From*>(from),
          static_cast<To*>(to));
    });
  });
}

}  // namespace metal_lora::cuda
