// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT

// @region dropout :
// The mask of an adapter's dropout, drawn from (seed, token, column) alone: forward and backward
// call it instead of storing a mask, in any order. Bit-equal to kernels/cpu: a 64-bit key for each
// token (splitmix64's finaliser, Steele et al., OOPSLA 2014), then a 32-bit mix of the column
// (MurmurHash3's finaliser) under that key.
namespace metal_lora {

inline ulong dropout_mix64(ulong x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
  return x ^ (x >> 31);
}

struct DropoutKey {
  uint add;
  uint flip;
};

// Once per token: two 64-bit mixes.
inline DropoutKey dropout_key(ulong seed, uint token) {
  const ulong key = dropout_mix64(dropout_mix64(seed + 0x9e3779b97f4a7c15ul) + ulong(token));
  DropoutKey out;
  out.add = uint(key);
  out.flip = uint(key >> 32);
  return out;
}

// Uniform in [0, 2³²).
inline uint dropout_hash(DropoutKey key, uint column) {
  uint h = column * 0x9e3779b9u + key.add;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ key.flip) ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// threshold = min(2³² - 1, p · 2³²).
inline bool dropout_keep(DropoutKey key, uint column, uint threshold) {
  return dropout_hash(key, column) >= threshold;
}

// Inverted dropout of one value: keep_scale = 1 / (1 - p), or 0 where p = 1.
inline float dropout_apply(
    DropoutKey key, uint column, uint threshold, float keep_scale, float value) {
  return dropout_keep(key, column, threshold) ? value * keep_scale : 0.0f;
}

}  // namespace metal_lora
