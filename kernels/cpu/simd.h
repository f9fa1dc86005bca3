// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// One vector of f32 at the width of the instruction set this file is compiled for, for kernels
// whose source is compiled once per instruction set (x_impl.h, included by x_scalar.cpp,
// x_avx2.cpp, ...). Everything here has a namespace of its own per instruction set, so that the
// linker can never pick an AVX-512 copy of a function for a machine without it; for the same
// reason code that includes this uses no function templates of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/params.h"

#if defined(__x86_64__)
// GCC 12 calls the deliberately undefined registers of its own intrinsics uninitialised.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define METAL_LORA_SIMD avx512_bf16
#define METAL_LORA_SIMD_LANES 16
#define METAL_LORA_SIMD_BF16_DOT 1
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define METAL_LORA_SIMD avx512
#define METAL_LORA_SIMD_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define METAL_LORA_SIMD avx2
#define METAL_LORA_SIMD_LANES 8
#elif defined(__ARM_NEON)
#define METAL_LORA_SIMD neon
#define METAL_LORA_SIMD_LANES 4
#else
#define METAL_LORA_SIMD scalar
#define METAL_LORA_SIMD_LANES 4
#endif

#define METAL_LORA_INLINE inline __attribute__((always_inline))

namespace metal_lora::cpu::METAL_LORA_SIMD {

inline constexpr size_t kLanes = METAL_LORA_SIMD_LANES;
#if defined(METAL_LORA_SIMD_BF16_DOT)
inline constexpr bool kHasBf16Dot = true;
#else
inline constexpr bool kHasBf16Dot = false;
#endif

using VF = float __attribute__((vector_size(kLanes * 4)));
using VI = int32_t __attribute__((vector_size(kLanes * 4)));
using VU = uint32_t __attribute__((vector_size(kLanes * 4)));
using VH = uint16_t __attribute__((vector_size(kLanes * 2)));  // as many 16-bit values

inline constexpr float kInfinity = __builtin_inff();

/// Lanes of a whole vector, or the first n of one. Loads of a part fill with zeros.
struct Full {
  static constexpr size_t n = kLanes;
};
struct Part {
  size_t n;
};

/// body(i, Full or Part) over [0, n).
template <class Body>
METAL_LORA_INLINE void for_lanes(size_t n, Body&& body) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Full{});
  if (i < n) body(i, Part{n - i});
}

METAL_LORA_INLINE VF set1(float x) {
  return x - VF{};
}
METAL_LORA_INLINE VI set1_int(int32_t x) {
  return x - VI{};
}
METAL_LORA_INLINE VI lane_index() {
  VI v;
  for (size_t i = 0; i < kLanes; ++i) v[i] = static_cast<int32_t>(i);
  return v;
}
METAL_LORA_INLINE VI bits(VF v) {
  return reinterpret_cast<VI>(v);
}
METAL_LORA_INLINE VF from_bits(VI v) {
  return reinterpret_cast<VF>(v);
}
/// Lanes of a where mask is all ones, of b where it is zero.
METAL_LORA_INLINE VF select(VI mask, VF a, VF b) {
  return from_bits((mask & bits(a)) | (~mask & bits(b)));
}

template <class V, class T>
METAL_LORA_INLINE V load_vector(const T* p, Full) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
METAL_LORA_INLINE V load_vector(const T* p, Part part) {
  V v{};
  __builtin_memcpy(&v, p, part.n * sizeof(T));
  return v;
}
template <class V, class T>
METAL_LORA_INLINE void store_vector(T* p, V v, Full) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class V, class T>
METAL_LORA_INLINE void store_vector(T* p, V v, Part part) {
  __builtin_memcpy(p, &v, part.n * sizeof(T));
}
METAL_LORA_INLINE VF load(const float* p) {
  return load_vector<VF>(p, Full{});
}
METAL_LORA_INLINE void store(float* p, VF v) {
  store_vector(p, v, Full{});
}

// max and min give b where either is not a number: put the value whose NaN must survive second.
#if METAL_LORA_SIMD_LANES == 16
METAL_LORA_INLINE VF fma(VF a, VF b, VF c) {
  return _mm512_fmadd_ps(a, b, c);
}
METAL_LORA_INLINE VF max(VF a, VF b) {
  return _mm512_max_ps(a, b);
}
METAL_LORA_INLINE VF min(VF a, VF b) {
  return _mm512_min_ps(a, b);
}
METAL_LORA_INLINE VF sqrt(VF a) {
  return _mm512_sqrt_ps(a);
}
METAL_LORA_INLINE VF round(VF a) {
  return _mm512_roundscale_ps(a, 8);
}
METAL_LORA_INLINE VI to_int(VF a) {
  return reinterpret_cast<VI>(_mm512_cvtps_epi32(a));
}
METAL_LORA_INLINE VF from_half(VH h) {
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
}
METAL_LORA_INLINE VH to_half(VF a) {
  return reinterpret_cast<VH>(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
METAL_LORA_INLINE VI widen(VH h) {
  return reinterpret_cast<VI>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)));
}
METAL_LORA_INLINE VH narrow(VI v) {
  return reinterpret_cast<VH>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
}
#elif METAL_LORA_SIMD_LANES == 8
METAL_LORA_INLINE VF fma(VF a, VF b, VF c) {
  return _mm256_fmadd_ps(a, b, c);
}
METAL_LORA_INLINE VF max(VF a, VF b) {
  return _mm256_max_ps(a, b);
}
METAL_LORA_INLINE VF min(VF a, VF b) {
  return _mm256_min_ps(a, b);
}
METAL_LORA_INLINE VF sqrt(VF a) {
  return _mm256_sqrt_ps(a);
}
METAL_LORA_INLINE VF round(VF a) {
  return _mm256_round_ps(a, 8);
}
METAL_LORA_INLINE VI to_int(VF a) {
  return reinterpret_cast<VI>(_mm256_cvtps_epi32(a));
}
METAL_LORA_INLINE VF from_half(VH h) {
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
}
METAL_LORA_INLINE VH to_half(VF a) {
  return reinterpret_cast<VH>(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
METAL_LORA_INLINE VI widen(VH h) {
  return reinterpret_cast<VI>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(h)));
}
METAL_LORA_INLINE VH narrow(VI v) {  // values fit 16 bits
  const __m256i x = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<VH>(
      _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
#elif defined(__ARM_NEON)
METAL_LORA_INLINE VF fma(VF a, VF b, VF c) {
  return vfmaq_f32(c, a, b);
}
METAL_LORA_INLINE VF max(VF a, VF b) {
  return select(a > b, a, b);
}
METAL_LORA_INLINE VF min(VF a, VF b) {
  return select(a < b, a, b);
}
METAL_LORA_INLINE VF sqrt(VF a) {
  return vsqrtq_f32(a);
}
METAL_LORA_INLINE VF round(VF a) {
  return vrndnq_f32(a);
}
METAL_LORA_INLINE VI to_int(VF a) {
  return reinterpret_cast<VI>(vcvtnq_s32_f32(a));
}
METAL_LORA_INLINE VF from_half(VH h) {
  return vcvt_f32_f16(vreinterpret_f16_u16(reinterpret_cast<uint16x4_t>(h)));
}
METAL_LORA_INLINE VH to_half(VF a) {
  return reinterpret_cast<VH>(vreinterpret_u16_f16(vcvt_f16_f32(a)));
}
METAL_LORA_INLINE VI widen(VH h) {
  return __builtin_convertvector(h, VI);
}
METAL_LORA_INLINE VH narrow(VI v) {
  return __builtin_convertvector(v, VH);
}
#else
METAL_LORA_INLINE VF fma(VF a, VF b, VF c) {
  return a * b + c;
}
METAL_LORA_INLINE VF max(VF a, VF b) {
  return select(a > b, a, b);
}
METAL_LORA_INLINE VF min(VF a, VF b) {
  return select(a < b, a, b);
}
METAL_LORA_INLINE VF sqrt(VF a) {
  for (size_t i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
// |a| < 2^22 wherever it is used: adding 1.5·2^23 leaves no fraction bits.
METAL_LORA_INLINE VF round(VF a) {
  VF shifted = a + 0x1.8p23f;
  __asm__("" : "+m"(shifted));  // keeps (a + c) - c from being simplified
  return shifted - 0x1.8p23f;
}
METAL_LORA_INLINE VI to_int(VF a) {
  return __builtin_convertvector(round(a), VI);
}
METAL_LORA_INLINE VI widen(VH h) {
  return __builtin_convertvector(h, VI);
}
METAL_LORA_INLINE VH narrow(VI v) {
  return __builtin_convertvector(v, VH);
}
METAL_LORA_INLINE VF from_half(VH h) {
  const VI w = widen(h), sign = (w & 0x8000) << 16, magnitude = w & 0x7fff;
  // Moves the fields into place and scales the exponent's bias away; infinities are put right.
  const VF scaled = from_bits(magnitude << 13) * 0x1p112f;
  return from_bits(
      bits(select(magnitude >= 0x7c00, from_bits((magnitude << 13) | 0x7f800000), scaled)) | sign);
}
METAL_LORA_INLINE VH to_half(VF a) {
  const VI all = bits(a), sign = (all >> 16) & 0x8000, magnitude = all & 0x7fffffff;
  const VI normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
  // Below 2^-14: adding 0.5 rounds to a multiple of 2^-24, the subnormal step.
  const VI small = bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  VI h = ((magnitude >= 0x38800000) & normal) | ((magnitude < 0x38800000) & small);
  h = ((magnitude >= 0x477ff000) & 0x7c00) | ((magnitude < 0x477ff000) & h);
  h = ((magnitude > 0x7f800000) & 0x7e00) | ((magnitude <= 0x7f800000) & h);
  return narrow(h | sign);
}
#endif

METAL_LORA_INLINE VF from_bf16(VH h) {
  return from_bits(widen(h) << 16);
}
/// Round to nearest even; NaN stays NaN.
METAL_LORA_INLINE VI bf16_bits(VF a) {
  const VU u = reinterpret_cast<VU>(a);
  const VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VU quiet = (u >> 16) | 0x40u;
  const VU nan = reinterpret_cast<VU>(a != a);
  return reinterpret_cast<VI>((nan & quiet) | (~nan & rounded));
}
METAL_LORA_INLINE VH to_bf16(VF a) {
#if defined(METAL_LORA_SIMD_BF16_DOT)
  return reinterpret_cast<VH>(_mm512_cvtneps_pbh(a));
#else
  return narrow(bf16_bits(a));
#endif
}

/// Element types: how each DType is stored and becomes f32.
struct F32 {
  using T = float;
  static constexpr DType dtype = DType::f32;
  template <class N>
  static METAL_LORA_INLINE VF load(const T* p, N n) {
    return load_vector<VF>(p, n);
  }
  template <class N>
  static METAL_LORA_INLINE void store(T* p, VF v, N n) {
    store_vector(p, v, n);
  }
  static METAL_LORA_INLINE VF rounded(VF v) { return v; }
};
struct F16 {
  using T = uint16_t;
  static constexpr DType dtype = DType::f16;
  template <class N>
  static METAL_LORA_INLINE VF load(const T* p, N n) {
    return from_half(load_vector<VH>(p, n));
  }
  template <class N>
  static METAL_LORA_INLINE void store(T* p, VF v, N n) {
    store_vector(p, to_half(v), n);
  }
  static METAL_LORA_INLINE VF rounded(VF v) { return from_half(to_half(v)); }
};
struct Bf16 {
  using T = uint16_t;
  static constexpr DType dtype = DType::bf16;
  template <class N>
  static METAL_LORA_INLINE VF load(const T* p, N n) {
    return from_bf16(load_vector<VH>(p, n));
  }
  template <class N>
  static METAL_LORA_INLINE void store(T* p, VF v, N n) {
    store_vector(p, to_bf16(v), n);
  }
  static METAL_LORA_INLINE VF rounded(VF v) { return from_bf16(to_bf16(v)); }
};

/// body(F32{}), body(F16{}) or body(Bf16{}).
template <class Body>
METAL_LORA_INLINE void with_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(F32{});
    case DType::f16:
      return body(F16{});
    case DType::bf16:
      return body(Bf16{});
  }
}

// The same tree of additions whatever the values.
METAL_LORA_INLINE float reduce_add(VF v) {
#if METAL_LORA_SIMD_LANES == 16
  return _mm512_reduce_add_ps(v);
#elif METAL_LORA_SIMD_LANES == 8
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
METAL_LORA_INLINE float reduce_max(VF v) {
  float best = v[0];
  for (size_t i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

/// 2^n for an integer-valued n; 0 below 2^-126 and infinity above 2^127.
METAL_LORA_INLINE VF scale_by_power(VF p, VF n) {
#if METAL_LORA_SIMD_LANES == 16
  return _mm512_scalef_ps(p, n);
#else
  return p * from_bits((to_int(n) + 127) << 23);
#endif
}

/// e^x within 2 ulp: Cody & Waite's reduction x = n·ln 2 + r with ln 2 in two parts (n·hi is exact,
/// hi has 9 trailing zero bits), then a minimax polynomial of relative error 1.9e-9 + its
/// coefficients' rounding (1.7e-8 in all), evaluated with one rounding a step. NaN stays. Where the
/// result is near the ends of f32's range it is 0 below e^-87.3 and infinity above e^88.3; with
/// AVX-512, which scales exactly, subnormal and up to the true end.
METAL_LORA_INLINE VF exp(VF x) {
#if METAL_LORA_SIMD_LANES == 16
  x = min(set1(89.0f), max(set1(-105.0f), x));
#else
  // n in [-127, 128]: both ends give the factors 0 and infinity.
  x = min(set1(88.8f), max(set1(-88.0f), x));
#endif
  const VF n = round(x * 0x1.715476p+0f);
  VF r = fma(n, set1(-0x1.62e400p-1f), x);
  r = fma(n, set1(-0x1.7f7d1cp-20f), r);
  VF p = set1(0x1.6ab96ep-10f);
  p = fma(p, r, set1(0x1.126d1ep-7f));
  p = fma(p, r, set1(0x1.55589ap-5f));
  p = fma(p, r, set1(0x1.55540ap-3f));
  p = fma(p, r, set1(0x1.fffffap-2f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

/// 2^x for x ≤ 0 or NaN (anything below -127 gives 0): what softmax needs. Exactly 1 at 0.
METAL_LORA_INLINE VF exp2_nonpositive(VF x) {
#if METAL_LORA_SIMD_LANES == 16
  x = max(set1(-200.0f), x);
#else
  x = max(set1(-127.0f), x);
#endif
  const VF n = round(x), r = x - n;
  VF p = set1(0x1.41d324p-13f);
  p = fma(p, r, set1(0x1.5f4582p-10f));
  p = fma(p, r, set1(0x1.3b2dbcp-7f));
  p = fma(p, r, set1(0x1.c6aed4p-5f));
  p = fma(p, r, set1(0x1.ebfbdap-3f));
  p = fma(p, r, set1(0x1.62e430p-1f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

}  // namespace metal_lora::cpu::METAL_LORA_SIMD
