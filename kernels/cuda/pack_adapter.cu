// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The trainer's f32 adapters as the tensor cores read them. 6 bytes a value; a layer's adapters are
// a megabyte or two, so that the launch is most of the cost (not measured on its own).
#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/pack_adapter.h"

namespace metal_lora::cuda {
namespace {

constexpr int kMaxAdapters = 8;
constexpr int kThreads = 256;

struct Adapters {
  PackedAdapter adapter[kMaxAdapters];
};

/// grid (blocks, 2, adapters): y = 0 is A, 1 is B.
template <typename T>
__global__ void pack_kernel(const __grid_constant__ Adapters adapters, const float* from, T* to) {
  const PackedAdapter& p = adapters.adapter[blockIdx.z];
  const bool is_b = blockIdx.y == 1;
  const uint32_t columns = is_b ? p.padded_rank : p.in;
  const uint32_t rows = is_b ? p.out : p.padded_rank;
  const float* source = from + (is_b ? p.from_b : p.from_a);
  T* target = to + (is_b ? p.to_b : p.to_a);
  const size_t count = size_t{rows} * columns;
  for (size_t i = blockIdx.x * size_t{kThreads} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    const auto row = static_cast<uint32_t>(i / columns),
               column = static_cast<uint32_t>(i % columns);
    float v = 0.0f;
    if (is_b) {
      if (column < p.rank) v = source[size_t{row} * p.rank + column];
    } else if (row < p.rank) {
      v = source[i];
    }
    target[i] = from_float<T>(v);
  }
}

}  // namespace

void pack_adapters(
    const Context& context,
    std::span<const PackedAdapter> adapters,
    const float* from,
    DType dtype,
    void* to) {
  if (adapters.size() > kMaxAdapters) {
    throw std::invalid_argument("[pack_adapters] at most 8 adapters a call");
  }
  Adapters table;
  int count = 0;
  size_t largest = 0;
  for (const auto& p : adapters) {
    if (p.rank == 0) continue;
    table.adapter[count++] = p;
    largest = std::max(largest, size_t{p.padded_rank} * std::max(p.in, p.out));
  }
  if (count == 0) return;
  const auto blocks =
      static_cast<unsigned>(std::min<size_t>((largest + 4 * kThreads - 1) / (4 * kThreads), 256));
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    pack_kernel<T><<<dim3(blocks, 2, static_cast<unsigned>(count)), kThreads, 0, context.stream>>>(
        table, from, static_cast<T*>(to));
  });
  check_launch("pack_adapters");
}

}  // namespace metal_lora::cuda
