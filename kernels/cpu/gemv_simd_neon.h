// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
// The NEON (AArch64) form of gemv_simd.h (include that one).
#pragma once

namespace metal_lora::cpu::METAL_LORA_SIMD_NS {

struct V16 {
  float32x4_t v[4];
};
struct I16 {
  uint32x4_t v[4];
};

inline constexpr int kDenseRows = 2;
inline constexpr int kAccumulators = 1;

template <class F>
inline V16 quarters(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline V16 broadcast(float x) {
  return quarters([=](int) { return vdupq_n_f32(x); });
}
inline V16 zero() {
  return broadcast(0.0f);
}
inline V16 load(const float* p) {
  return quarters([=](int i) { return vld1q_f32(p + 4 * i); });
}
inline V16 load_first(const float* p, size_t n) {
  float lanes[16] = {};
  std::memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
}
inline void store(float* p, const V16& a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline void store_first(float* p, const V16& a, size_t n) {
  float lanes[16];
  store(lanes, a);
  std::memcpy(p, lanes, n * sizeof(float));
}
inline V16 load_f16(const uint16_t* p) {
  return quarters([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline V16 load_bf16(const uint16_t* p) {
  return quarters(
      [=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline V16 load_f16_first(const uint16_t* p, size_t n) {
  uint16_t words[16] = {};
  std::memcpy(words, p, n * sizeof(uint16_t));
  return load_f16(words);
}
inline V16 load_bf16_first(const uint16_t* p, size_t n) {
  uint16_t words[16] = {};
  std::memcpy(words, p, n * sizeof(uint16_t));
  return load_bf16(words);
}

inline V16 add(const V16& a, const V16& b) {
  return quarters([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline V16 mul(const V16& a, const V16& b) {
  return quarters([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline V16 fma(const V16& a, const V16& b, const V16& c) {
  return quarters([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}

inline float horizontal_sum(const V16& a) {
  return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3])));
}
/// Lane r: the sum of the lanes of a[r].
inline V16 sum_each(const V16* a) {
  return quarters([=](int i) {
    float32x4_t s[4];
    for (int j = 0; j < 4; ++j) {
      const V16& x = a[4 * i + j];
      s[j] = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
    }
    return vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3]));
  });
}

inline void store_half(uint16_t* p, const V16& a) {
  for (int i = 0; i < 4; ++i) {
    vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
  }
}
/// Rounded to nearest even, as bf16_of_float does (nan stays nan); bits in the high half.
inline uint32x4_t bf16_bits_high(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  return vbslq_u32(vceqq_f32(a, a), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
inline void store_bf16(uint16_t* p, const V16& a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vshrn_n_u32(bf16_bits_high(a.v[i]), 16));
}
inline void store_bf16_pairs(uint16_t* p, const V16& even, const V16& odd) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t low = vshrq_n_u32(bf16_bits_high(even.v[i]), 16);
    const uint32x4_t high = vandq_u32(bf16_bits_high(odd.v[i]), vdupq_n_u32(0xffff0000u));
    vst1q_u16(p + 8 * i, vreinterpretq_u16_u32(vorrq_u32(low, high)));
  }
}

inline I16 load_int(const void* p) {
  const auto* in = static_cast<const uint8_t*>(p);
  I16 r;
  for (int i = 0; i < 4; ++i) r.v[i] = vreinterpretq_u32_u8(vld1q_u8(in + 16 * i));
  return r;
}
template <int kBits>
inline I16 shift_right(const I16& a) {
  if constexpr (kBits == 0) {  // the instruction shifts by 1 … 32
    return a;
  } else {
    I16 r;
    for (int i = 0; i < 4; ++i) r.v[i] = vshrq_n_u32(a.v[i], kBits);
    return r;
  }
}
inline V16 low_bits(const I16& a, uint32_t mask) {
  return quarters([&](int i) { return vcvtq_f32_u32(vandq_u32(a.v[i], vdupq_n_u32(mask))); });
}
inline V16 low_nibble(const I16& a) {
  return low_bits(a, 15);
}
inline V16 low_byte(const I16& a) {
  return low_bits(a, 255);
}
/// 16 bytes as f32.
inline V16 widen_bytes(uint8x16_t bytes) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {
      {vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
       vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
       vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
       vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
}
inline V16 load_bytes(const uint8_t* p) {
  return widen_bytes(vld1q_u8(p));
}
/// 16 consecutive nibbles (8 bytes), a byte each.
inline uint8x16_t spread_nibbles(const uint8_t* p) {
  const uint8x8_t bytes = vld1_u8(p);
  const uint8x8_t low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
  return vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
}
/// 16 consecutive nibbles as f32.
inline V16 load_nibbles(const uint8_t* p) {
  return widen_bytes(spread_nibbles(p));
}
/// The NF4 level of each dword's low nibble: the 64 bytes of the table are one lookup, whose byte
/// indices are 4·q + {0, 1, 2, 3}.
inline V16 nf4_level(const I16& a) {
  uint8x16x4_t table;
  for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(vld1q_f32(kNf4Levels + 4 * i));
  return quarters([&](int i) {
    const uint32x4_t q = vandq_u32(a.v[i], vdupq_n_u32(15));
    const uint32x4_t at = vmlaq_u32(vdupq_n_u32(0x03020100), q, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(at)));
  });
}
/// The NF4 levels of 16 consecutive nibbles.
inline V16 load_nf4(const uint8_t* p) {
  const uint8x16_t bytes = spread_nibbles(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return nf4_level(
      {{vmovl_u16(vget_low_u16(low)),
        vmovl_u16(vget_high_u16(low)),
        vmovl_u16(vget_low_u16(high)),
        vmovl_u16(vget_high_u16(high))}});
}

}  // namespace metal_lora::cpu::METAL_LORA_SIMD_NS
