// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Ladder: 2 bytes a thread and step, both halves in one launch; not measured (a prompt's share is
// 2·tokens·row_bytes, a thousandth of a layer's traffic).
#include "kernels/cuda/kv_cache.h"

#include <algorithm>

namespace metal_lora::cuda {
namespace {

__global__ void write_kv_cache_kernel(
    uint32_t tokens,
    uint32_t capacity,
    size_t row_units,
    const int32_t* position,
    const uint16_t* k,
    const uint16_t* v,
    uint16_t* k_cache,
    uint16_t* v_cache,
    int32_t* written) {
  const auto most = static_cast<int32_t>(capacity - tokens);
  const int32_t at = min(max(*position, 0), most);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *written = at;
  const uint16_t* from = blockIdx.y == 0 ? k : v;
  uint16_t* to = (blockIdx.y == 0 ? k_cache : v_cache) + at * row_units;
  const size_t count = tokens * row_units, step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = from[i];
  }
}

}  // namespace

void write_kv_cache(
    const Context& context,
    uint32_t tokens,
    uint32_t capacity,
    size_t row_bytes,
    const int32_t* position,
    const void* k,
    const void* v,
    void* k_cache,
    void* v_cache,
    int32_t* written) {
  constexpr size_t kThreads = 256, kMostBlocks = 1024;
  const size_t units = row_bytes / sizeof(uint16_t);
  const size_t blocks =
      std::clamp<size_t>((tokens * units + kThreads - 1) / kThreads, 1, kMostBlocks);
  write_kv_cache_kernel<<<dim3(static_cast<unsigned>(blocks), 2), kThreads, 0, context.stream>>>(
      tokens,
      capacity,
      units,
      position,
      static_cast<const uint16_t*>(k),
      static_cast<const uint16_t*>(v),
      static_cast<uint16_t*>(k_cache),
      static_cast<uint16_t*>(v_cache),
      written);
  check_launch("write_kv_cache");
}

}  // namespace metal_lora::cuda
