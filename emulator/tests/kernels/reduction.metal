// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Sums of rows: one threadgroup per row, simd_sum within simdgroups, threadgroup memory across them.
#include <metal_stdlib>
using namespace metal;

kernel void row_sum(
    const device float* x [[buffer(0)]],
    device float* sums [[buffer(1)]],
    constant uint& columns [[buffer(2)]],
    uint row [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint threads [[threads_per_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float partial[32];
  float sum = 0.0f;
  for (uint c = thread_index; c < columns; c += threads) sum += x[row * columns + c];
  sum = simd_sum(sum);
  if (lane == 0) partial[simdgroup_index] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup_index == 0) {
    sum = lane < simdgroups ? partial[lane] : 0.0f;
    sum = simd_sum(sum);
    if (lane == 0) sums[row] = sum;
  }
}
