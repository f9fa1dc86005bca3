// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Ladder: one element a thread with the indices worked out by division; not measured. Views reach
// an op seldom (a transposed test input), and no step's inner loop has one.
#include "kernels/cuda/strided_copy.h"

#include <algorithm>

namespace metal_lora::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(size_t count) {
  constexpr size_t kMostBlocks = 1 << 16;
  return static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, kMostBlocks));
}

template <class T>
__global__ void strided_copy_kernel(StridedCopy p, size_t count, const T* from, T* to) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    size_t rest = i;
    int64_t at = 0;
    for (int d = p.dims - 1; d >= 0; --d) {
      const size_t next = rest / p.shape[d];
      at += static_cast<int64_t>(rest - next * p.shape[d]) * p.strides[d];
      rest = next;
    }
    to[i] = from[at];
  }
}

template <class T>
__global__ void copy_kernel(size_t count, const T* from, T* to) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = from[i];
  }
}

template <class T>
void launch_strided(
    const Context& context, const StridedCopy& p, size_t count, const void* from, void* to) {
  strided_copy_kernel<T><<<blocks_for(count), kThreads, 0, context.stream>>>(
      p, count, static_cast<const T*>(from), static_cast<T*>(to));
}

template <class T>
void launch_copy(const Context& context, size_t bytes, const void* from, void* to) {
  const size_t count = bytes / sizeof(T);
  copy_kernel<T><<<blocks_for(count), kThreads, 0, context.stream>>>(
      count, static_cast<const T*>(from), static_cast<T*>(to));
}

}  // namespace

void strided_copy(const Context& context, const StridedCopy& p, const void* from, void* to) {
  size_t count = 1;
  for (int d = 0; d < p.dims; ++d) count *= p.shape[d];
  if (count == 0) return;
  switch (p.item_bytes) {
    case 1:
      launch_strided<uint8_t>(context, p, count, from, to);
      break;
    case 2:
      launch_strided<uint16_t>(context, p, count, from, to);
      break;
    case 4:
      launch_strided<uint32_t>(context, p, count, from, to);
      break;
    case 8:
      launch_strided<uint64_t>(context, p, count, from, to);
      break;
    default:
      throw std::invalid_argument(
          "[strided_copy] item_bytes must be 1, 2, 4 or 8 but is " + std::to_string(p.item_bytes));
  }
  check_launch("strided_copy");
}

void copy_bytes(const Context& context, size_t bytes, const void* from, void* to) {
  if (bytes == 0) return;
  const auto aligned = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | bytes;
  if (aligned % sizeof(uint4) == 0) {
    launch_copy<uint4>(context, bytes, from, to);
  } else {
    launch_copy<uint8_t>(context, bytes, from, to);
  }
  check_launch("copy_bytes");
}

}  // namespace metal_lora::cuda
