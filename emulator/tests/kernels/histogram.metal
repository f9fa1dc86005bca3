// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Counts of byte values modulo 64: per threadgroup in threadgroup memory, then into the result.
#include <metal_stdlib>
using namespace metal;

kernel void histogram(
    const device uchar* values [[buffer(0)]],
    device atomic_uint* counts [[buffer(1)]],
    constant uint& size [[buffer(2)]],
    uint position [[thread_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint group_counts[64];
  if (thread_index < 64) atomic_store_explicit(&group_counts[thread_index], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (position < size)
    atomic_fetch_add_explicit(&group_counts[values[position] % 64], 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index < 64) {
    const uint count = atomic_load_explicit(&group_counts[thread_index], memory_order_relaxed);
    if (count != 0) atomic_fetch_add_explicit(&counts[thread_index], count, memory_order_relaxed);
  }
}
