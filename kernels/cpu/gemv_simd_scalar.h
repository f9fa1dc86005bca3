// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
// The plain form of gemv_simd.h (include that one): loops that a compiler vectorises as it can.
#pragma once

namespace metal_lora::cpu::METAL_LORA_SIMD_NS {

struct V16 {
  float v[16];
};
struct I16 {
  uint32_t v[16];
};

inline constexpr int kDenseRows = 2;
inline constexpr int kAccumulators = 1;

template <class F>
inline V16 each(F f) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = f(i);
  return r;
}

inline V16 broadcast(float x) {
  return each([=](int) { return x; });
}
inline V16 zero() {
  return broadcast(0.0f);
}
inline V16 load_first(const float* p, size_t n) {
  V16 r = zero();
  std::memcpy(r.v, p, n * sizeof(float));
  return r;
}
inline V16 load(const float* p) {
  return load_first(p, 16);
}
inline void store_first(float* p, const V16& a, size_t n) {
  std::memcpy(p, a.v, n * sizeof(float));
}
inline void store(float* p, const V16& a) {
  store_first(p, a, 16);
}
inline V16 load_f16_first(const uint16_t* p, size_t n) {
  return each([=](int i) { return size_t(i) < n ? float_of_half(p[i]) : 0.0f; });
}
inline V16 load_bf16_first(const uint16_t* p, size_t n) {
  return each([=](int i) { return size_t(i) < n ? float_of_bf16(p[i]) : 0.0f; });
}
inline V16 load_f16(const uint16_t* p) {
  return load_f16_first(p, 16);
}
inline V16 load_bf16(const uint16_t* p) {
  return load_bf16_first(p, 16);
}

inline V16 add(const V16& a, const V16& b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline V16 mul(const V16& a, const V16& b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
/// Two roundings where the baseline has no fused instruction.
inline V16 fma(const V16& a, const V16& b, const V16& c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}

inline float horizontal_sum(const V16& a) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = a.v[i] + a.v[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}
/// Lane r: the sum of the lanes of a[r].
inline V16 sum_each(const V16* a) {
  return each([=](int i) { return horizontal_sum(a[i]); });
}

inline void store_half(uint16_t* p, const V16& a) {
  for (int i = 0; i < 16; ++i) p[i] = half_of_float(a.v[i]);
}
inline void store_bf16(uint16_t* p, const V16& a) {
  for (int i = 0; i < 16; ++i) p[i] = bf16_of_float(a.v[i]);
}
inline void store_bf16_pairs(uint16_t* p, const V16& even, const V16& odd) {
  for (int i = 0; i < 16; ++i) {
    p[2 * i] = bf16_of_float(even.v[i]);
    p[2 * i + 1] = bf16_of_float(odd.v[i]);
  }
}

inline I16 load_int(const void* p) {
  I16 r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
template <int kBits>
inline I16 shift_right(const I16& a) {
  I16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] >> kBits;
  return r;
}
inline V16 low_nibble(const I16& a) {
  return each([&](int i) { return static_cast<float>(static_cast<int>(a.v[i] & 15u)); });
}
inline V16 low_byte(const I16& a) {
  return each([&](int i) { return static_cast<float>(static_cast<int>(a.v[i] & 255u)); });
}
/// The NF4 level of each dword's low nibble.
inline V16 nf4_level(const I16& a) {
  return each([&](int i) { return kNf4Levels[a.v[i] & 15u]; });
}
/// The NF4 levels of 16 consecutive nibbles (8 bytes).
inline V16 load_nf4(const uint8_t* p) {
  return each([=](int i) { return kNf4Levels[(p[i / 2] >> (4 * (i & 1))) & 15]; });
}
/// 16 consecutive nibbles (8 bytes) as f32.
inline V16 load_nibbles(const uint8_t* p) {
  return each([=](int i) { return static_cast<float>((p[i / 2] >> (4 * (i & 1))) & 15); });
}
/// 16 bytes as f32.
inline V16 load_bytes(const uint8_t* p) {
  return each([=](int i) { return static_cast<float>(p[i]); });
}

}  // namespace metal_lora::cpu::METAL_LORA_SIMD_NS
