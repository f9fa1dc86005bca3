// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Counter-based random numbers: value i of a key is a pure function of both, so nothing depends on
// threads, on what was drawn before, or on where a run was resumed.
#pragma once

#include <cstdint>
#include <string_view>

namespace metal_lora::train {

/// Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush on counters.
constexpr uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr uint64_t random_bits(uint64_t key, uint64_t counter) {
  return mix64(mix64(key + 0x9e3779b97f4a7c15u) + counter * 0x9e3779b97f4a7c15u);
}

/// A key of its own for each purpose ("data order", a module's path).
constexpr uint64_t random_key(uint64_t seed, std::string_view purpose, uint64_t index = 0) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  for (const char c : purpose) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return mix64(mix64(seed + 0x9e3779b97f4a7c15u) ^ mix64(hash) ^ random_bits(index, 0x5eed));
}

/// Uniform in [0, 1) with 24 bits: exact in f32.
constexpr float random_unit(uint64_t key, uint64_t counter) {
  return static_cast<float>(random_bits(key, counter) >> 40) * 0x1p-24f;
}

/// Uniform in [0, n), n ≥ 1; the bias of at most n/2^64 does not matter for shuffles.
constexpr uint64_t random_below(uint64_t key, uint64_t counter, uint64_t n) {
  return static_cast<uint64_t>(
      (static_cast<unsigned __int128>(random_bits(key, counter)) * n) >> 64);
}

}  // namespace metal_lora::train
