// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the forms for up to 128 tokens share (lora_skinny, and the streaming form of many adapters):
// a block multiplies 64 rows of W, on the matrix unit's tall side, by all tokens over a share of k.
// One thread fills a ring of stages, a warpgroup empties it, and the blocks of a cluster leave their
// sums in shared memory, where each adds up some of all.
#pragma once

#include <cuda.h>

#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::sm90::skinny {

constexpr uint32_t kRows = 64;  ///< of W, of a tile
constexpr uint32_t kStepK = 64;
constexpr uint32_t kMaxStages = 12;

/// In shared memory: stage s has the barriers `full` and, 8 bytes on, `empty` at barriers + 16·s.
struct Ring {
  uint32_t barriers, stages;
  uint32_t count, stage_bytes;  ///< W, x, A
};

/// A block's share of k.
struct Steps {
  uint32_t first, count;
  __device__ __forceinline__ Steps(uint32_t k, uint32_t part, uint32_t parts) {
    const uint32_t steps = (k + kStepK - 1) / kStepK;
    first = part * steps / parts;
    count = (part + 1) * steps / parts - first;
  }
};

__device__ __forceinline__ float4 load_own(uint32_t shared) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

/// L2 is asked for the first `ahead` steps of W.
__device__ __forceinline__ void prefetch(
    const CUtensorMap& w_map, const Steps& steps, uint32_t n0, uint32_t ahead) {
  for (uint32_t s = 0; s < min(ahead, steps.count); ++s) {
    tensor_prefetch(&w_map, (steps.first + s) * kStepK, n0);
  }
}

/// Fills stages with W before the wait, as many as there are: their number.
template <uint32_t kTokens>
__device__ __forceinline__ uint32_t fill(
    const Ring& ring,
    const Steps& steps,
    const CUtensorMap& w_map,
    uint32_t n0,
    uint32_t rank_columns) {
  const uint32_t bytes = (kRows + kTokens + rank_columns) * 128;
  const uint32_t filled = min(ring.count, steps.count);
  for (uint32_t s = 0; s < filled; ++s) {
    const uint32_t full = ring.barriers + 16 * s;
    barrier_expect(full, bytes);
    tensor_load(
        ring.stages + s * ring.stage_bytes, &w_map, full, (steps.first + s) * kStepK, n0);
  }
  return filled;
}

/// One thread: every stage; the first `filled` have their W. rank_columns > 0: with as many rows of
/// A.
template <uint32_t kTokens>
__device__ __forceinline__ void produce(
    const Ring& ring,
    const Steps& steps,
    const CUtensorMap& w_map,
    uint32_t n0,
    const CUtensorMap& x_map,
    const CUtensorMap& a_map,
    uint32_t rank_columns,
    uint32_t filled) {
  const uint32_t bytes = (kRows + kTokens + rank_columns) * 128;
  uint32_t stage = 0, parity = 1;
  for (uint32_t s = 0; s < steps.count; ++s) {
    const uint32_t full = ring.barriers + 16 * stage, w = ring.stages + stage * ring.stage_bytes;
    const uint32_t x = w + kRows * 128, k0 = (steps.first + s) * kStepK;
    if (s >= filled) {
      barrier_wait(full + 8, parity);
      barrier_expect(full, bytes);
      tensor_load(w, &w_map, full, k0, n0);
    }
    tensor_load(x, &x_map, full, k0, 0);
    if (rank_columns > 0) tensor_load(x + kTokens * 128, &a_map, full, k0, 0);
    if (++stage == ring.count) stage = 0, parity ^= 1;
  }
}

/// One warpgroup: 64 rows of W, or A's, by all tokens.
template <typename T, uint32_t kTokens>
__device__ __forceinline__ void consume(
    const Ring& ring, const Steps& steps, uint32_t left_offset, float (&d)[kTokens / 2]) {
  const bool releases = threadIdx.x % 32 == 0;
  uint32_t stage = 0, parity = 0, reading = 0;
#pragma unroll
  for (uint32_t i = 0; i < kTokens / 2; ++i) d[i] = 0.0f;
  for (uint32_t s = 0; s < steps.count; ++s) {
    const uint32_t full = ring.barriers + 16 * stage, at = ring.stages + stage * ring.stage_bytes;
    barrier_wait(full, parity);
    const uint64_t left = wgmma_descriptor(at + left_offset, 16);
    const uint64_t right = wgmma_descriptor(at + kRows * 128, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma<T, 0>(d, left + 2 * i, right + 2 * i, 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (s > 0 && releases) barrier_arrive(ring.barriers + 16 * reading + 8);
    reading = stage;
    if (++stage == ring.count) stage = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  wgmma_sums_fence(d);
}

/// A block's sums by the tokens: rows of `pitch` floats, y's kRows and then u's.
template <uint32_t kTokens>
__device__ __forceinline__ void leave_sums(
    float* sums,
    uint32_t pitch,
    uint32_t columns,
    uint32_t column0,
    const float (&d)[kTokens / 2]) {
  const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (column0 + warp * 16 >= columns) return;
  float* to = sums + lane % 4 * 2 * pitch + column0 + warp * 16 + lane / 4;
#pragma unroll
  for (uint32_t j = 0; j < kTokens / 8; ++j) {
    to[8 * j * pitch] = d[4 * j];
    to[(8 * j + 1) * pitch] = d[4 * j + 1];
    to[8 * j * pitch + 8] = d[4 * j + 2];
    to[(8 * j + 1) * pitch + 8] = d[4 * j + 3];
  }
}

/// The cluster's sum of four neighbours, four parts under way at a time.
__device__ __forceinline__ float4 sum_parts(uint32_t parts, uint32_t part, uint32_t at) {
  float4 sum = make_float4(0, 0, 0, 0);
  for (uint32_t p0 = 0; p0 < parts; p0 += 4) {
    float4 v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (p0 + i == part) {
        v[i] = load_own(at);
      } else if (p0 + i < parts) {
        v[i] = load_remote(at, p0 + i);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (p0 + i >= parts) break;
      sum.x += v[i].x;
      sum.y += v[i].y;
      sum.z += v[i].z;
      sum.w += v[i].w;
    }
  }
  return sum;
}

// ---- host ----

/// As few as hold all: each costs L2 and the matrix unit, used or not.
inline uint32_t tokens_of(uint32_t m) {
  return m <= 32 ? 32 : m <= 64 ? 64 : 128;
}
/// Blocks that share a tile's k: a cluster.
inline uint32_t parts_of(uint32_t tiles, uint32_t multiprocessors) {
  // Larger clusters with a multiprocessor a block find room for far less than all.
  if (tiles * 8 <= multiprocessors * 6 / 10) return 8;
  if (tiles * 4 <= multiprocessors * 6 / 10) return 4;
  return tiles * 2 <= multiprocessors ? 2 : 1;
}

}  // namespace metal_lora::cuda::sm90::skinny
