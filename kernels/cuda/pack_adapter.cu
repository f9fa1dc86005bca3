// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The trainer's f32 adapters as the tensor cores read them. 6 bytes a value; a layer's adapters are
// a megabyte or two and took 5 µs by themselves, most of it the launch: many layers in one.
#include <algorithm>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/pack_adapter.h"

namespace metal_lora::cuda {
namespace {

constexpr int kMaxAdapters = 64;  ///< 3 KiB of arguments
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
  std::vector<PackedAdapter> there;
  for (const auto& p : adapters) {
    if (p.rank > 0) there.push_back(p);
  }
  for (size_t first = 0; first < there.size(); first += kMaxAdapters) {
    Adapters table;
    const size_t count = std::min<size_t>(kMaxAdapters, there.size() - first);
    size_t largest = 0;
    for (size_t i = 0; i < count; ++i) {
      const PackedAdapter& p = table.adapter[i] = there[first + i];
      largest = std::max(largest, size_t{p.padded_rank} * std::max(p.in, p.out));
    }
    const auto blocks =
        static_cast<unsigned>(std::min<size_t>((largest + 4 * kThreads - 1) / (4 * kThreads), 256));
    const dim3 grid(blocks, 2, static_cast<unsigned>(count));
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      pack_kernel<T><<<grid, kThreads, 0, context.stream>>>(table, from, static_cast<T*>(to));
    });
    check_launch("pack_adapters");
  }
}

}  // namespace metal_lora::cuda
