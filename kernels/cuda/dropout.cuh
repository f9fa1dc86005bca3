// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The dropout mask of kernels/cpu/gemm_kernels-inl.h, bit by bit: a 64-bit key per (seed, token),
// then a 32-bit mix of the column under that key (splitmix64's and MurmurHash3's finalisers). No
// state, any order: the forward and backward passes draw the same mask.
#pragma once

#include <cstdint>

namespace metal_lora::cuda {

__host__ __device__ __forceinline__ uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// (token, column) is kept iff hash(token, column) ≥ threshold, and then multiplied by keep_scale
/// = 1/(1-p). Made on the host.
struct DropMask {
  uint64_t seed = 0;       ///< mixed once
  uint32_t threshold = 0;  ///< p·2³²; 0: keeps all
  float keep_scale = 1.0f;

  DropMask() = default;
  DropMask(float dropout, uint64_t dropout_seed) : seed(mix_bits(dropout_seed + kGolden)) {
    if (dropout <= 0.0f) return;
    const double limit = static_cast<double>(dropout) * 4294967296.0;
    threshold = limit < 4294967295.0 ? static_cast<uint32_t>(limit) : 0xffffffffu;
    keep_scale = dropout < 1.0f ? 1.0f / (1.0f - dropout) : 0.0f;
  }

  static constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ull;
};

/// The key of one token: two mixes of 64 bits, worth keeping for the row.
struct DropKey {
  uint32_t add, flip;
};
__device__ __forceinline__ DropKey drop_key(const DropMask& mask, uint32_t token) {
  const uint64_t key = mix_bits(mask.seed + token);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

__device__ __forceinline__ uint32_t counter_hash(DropKey key, uint32_t column) {
  uint32_t h = column * 0x9e3779b9u + key.add;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ key.flip) ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}
/// As cpu::counter_hash.
__device__ __forceinline__ uint32_t counter_hash(uint64_t seed, uint32_t row, uint32_t column) {
  const uint64_t key = mix_bits(mix_bits(seed + DropMask::kGolden) + row);
  return counter_hash(
      DropKey{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}, column);
}

__device__ __forceinline__ bool drop_keeps(const DropMask& mask, DropKey key, uint32_t column) {
  return counter_hash(key, column) >= mask.threshold;
}
/// The mask's factor: keep_scale or 0.
__device__ __forceinline__ float drop_factor(const DropMask& mask, DropKey key, uint32_t column) {
  return drop_keeps(mask, key, column) ? mask.keep_scale : 0.0f;
}

}  // namespace metal_lora::cuda
