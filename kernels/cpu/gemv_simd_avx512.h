// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
// The AVX-512 form of gemv_simd.h (include that one).
#pragma once

namespace metal_lora::cpu::METAL_LORA_SIMD_NS {

struct V16 {
  __m512 v;
};
struct I16 {
  __m512i v;
};

inline constexpr int kDenseRows = 4;  ///< rows of a dense tile: 4 rows x 4 tokens = 16 registers
inline constexpr int kAccumulators = 2;

inline __mmask16 first_lanes(size_t n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}

inline V16 zero() {
  return {_mm512_setzero_ps()};
}
inline V16 broadcast(float x) {
  return {_mm512_set1_ps(x)};
}
inline V16 load(const float* p) {
  return {_mm512_loadu_ps(p)};
}
inline V16 load_first(const float* p, size_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline void store(float* p, V16 a) {
  _mm512_storeu_ps(p, a.v);
}
inline void store_first(float* p, V16 a, size_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}
inline V16 from_half(__m256i bits) {
  return {_mm512_cvtph_ps(bits)};
}
inline V16 from_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline __m256i load_words(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline V16 load_f16(const uint16_t* p) {
  return from_half(load_words(p));
}
inline V16 load_bf16(const uint16_t* p) {
  return from_bf16(load_words(p));
}
inline V16 load_f16_first(const uint16_t* p, size_t n) {
  return from_half(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline V16 load_bf16_first(const uint16_t* p, size_t n) {
  return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}

inline V16 add(V16 a, V16 b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline V16 mul(V16 a, V16 b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline V16 fma(V16 a, V16 b, V16 c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

inline float horizontal_sum(V16 a) {
  return _mm512_reduce_add_ps(a.v);
}

/// Lane r: the sum of the lanes of a[r]. A tree of 15 shuffle-and-add steps.
inline V16 sum_each(const V16* a) {
  __m512 b[8], c[4], d[2];
  for (int i = 0; i < 8; ++i) {  // lanes of i and i + 8 side by side, 8-lane halves folded
    const __m512 lo = _mm512_shuffle_f32x4(a[i].v, a[i + 8].v, 0x44);
    const __m512 hi = _mm512_shuffle_f32x4(a[i].v, a[i + 8].v, 0xee);
    b[i] = _mm512_add_ps(lo, hi);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 lo = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    const __m512 hi = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    c[i] = _mm512_add_ps(lo, hi);  // 128-bit parts: i, i + 8, i + 4, i + 12
  }
  for (int i = 0; i < 2; ++i) {
    d[i] = _mm512_add_ps(_mm512_unpacklo_ps(c[i], c[i + 2]), _mm512_unpackhi_ps(c[i], c[i + 2]));
  }
  const __m512 sums =  // in each part: i, i + 1, i + 2, i + 3
      _mm512_add_ps(_mm512_unpacklo_ps(d[0], d[1]), _mm512_unpackhi_ps(d[0], d[1]));
  return {_mm512_shuffle_f32x4(sums, sums, 0xd8)};
}

/// Lanes that narrow_rows_dot needs: u's even and odd columns once per row of a register, and
/// where its reduction leaves each row.
template <int kRank>
struct NarrowRowsOrder {
  alignas(64) int32_t even[16] = {}, odd[16] = {}, row[16] = {};
  constexpr NarrowRowsOrder() {
    for (int i = 0; i < 16; ++i) {
      even[i] = 2 * (i % (kRank / 2));
      odd[i] = even[i] + 1;
      row[i] = kRank == 16 ? (i / 8 * 2 + i % 2) * 4 + i % 8 / 2 : i % 4 * 4 + i / 4;
    }
  }
};
template <int kRank>
inline constexpr NarrowRowsOrder<kRank> kNarrowRowsOrder;

/// Lane r: Σ_j b[r·kRank + j]·u[j] for 16 rows of bf16, kRank 8 or 16. A register holds 4 or 2
/// whole rows; even and odd columns become f32 by a shift and a mask, so 16 rows cost 61
/// instructions at rank 16 where a register per row costs 110.
template <int kRank>
inline V16 narrow_rows_dot(const uint16_t* b, const float* u) {
  constexpr int kVectors = kRank / 2;
  constexpr const NarrowRowsOrder<kRank>& kOrder = kNarrowRowsOrder<kRank>;
  const __m512 uv = _mm512_maskz_loadu_ps(first_lanes(kRank), u);
  const __m512 u_even = _mm512_permutexvar_ps(_mm512_load_si512(kOrder.even), uv);
  const __m512 u_odd = _mm512_permutexvar_ps(_mm512_load_si512(kOrder.odd), uv);
  __m512 dot[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const __m512i pair = _mm512_loadu_si512(b + 32 * i);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-0x10000)));
    dot[i] = _mm512_fmadd_ps(odd, u_odd, _mm512_mul_ps(even, u_even));
  }
  __m512 c[4], d[2];
  for (int i = 0; i < 4; ++i) {
    if constexpr (kRank == 16) {
      c[i] = _mm512_add_ps(
          _mm512_shuffle_f32x4(dot[i], dot[i + 4], 0x88),
          _mm512_shuffle_f32x4(dot[i], dot[i + 4], 0xdd));
    } else {
      c[i] = dot[i];
    }
  }
  for (int i = 0; i < 2; ++i) {
    d[i] = _mm512_add_ps(_mm512_unpacklo_ps(c[i], c[i + 2]), _mm512_unpackhi_ps(c[i], c[i + 2]));
  }
  const __m512 sums = _mm512_add_ps(_mm512_unpacklo_ps(d[0], d[1]), _mm512_unpackhi_ps(d[0], d[1]));
  return {_mm512_permutexvar_ps(_mm512_load_si512(kOrder.row), sums)};
}
#define METAL_LORA_HAS_NARROW_ROWS 1

inline void store_half(uint16_t* p, V16 a) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
/// Rounds to nearest even in integer arithmetic, as bf16_of_float does (nan stays nan).
inline __m512i bf16_bits_high(V16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
inline void store_bf16(uint16_t* p, V16 a) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits_high(a), 16)));
}
/// p[2r] = bf16(even[r]), p[2r + 1] = bf16(odd[r]).
inline void store_bf16_pairs(uint16_t* p, V16 even, V16 odd) {
#if defined(__AVX512BF16__)
  const __m512i order = _mm512_set_epi16(
      31,
      15,
      30,
      14,
      29,
      13,
      28,
      12,
      27,
      11,
      26,
      10,
      25,
      9,
      24,
      8,
      23,
      7,
      22,
      6,
      21,
      5,
      20,
      4,
      19,
      3,
      18,
      2,
      17,
      1,
      16,
      0);
  const __m512bh both = _mm512_cvtne2ps_pbh(odd.v, even.v);
  __m512i words;
  std::memcpy(&words, &both, sizeof(words));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, words));
#else
  const __m512i low = _mm512_srli_epi32(bf16_bits_high(even), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaau, low, bf16_bits_high(odd)));
#endif
}

inline I16 load_int(const void* p) {
  return {_mm512_loadu_si512(p)};
}
template <int kBits>
inline I16 shift_right(I16 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
/// The low nibble of each dword as f32: one table lookup, which ignores the other bits.
inline V16 low_nibble(I16 a) {
  const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return {_mm512_permutexvar_ps(a.v, table)};
}
inline V16 low_byte(I16 a) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(0xff)))};
}
/// The NF4 level of each dword's low nibble.
inline V16 nf4_level(I16 a) {
  return {_mm512_permutexvar_ps(a.v, _mm512_loadu_ps(kNf4Levels))};
}
/// Each of 16 consecutive nibbles (8 bytes) at the bottom of a dword, other bits above it.
inline I16 spread_nibbles(const uint8_t* p) {
  const __m512i both = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m512i dword = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i shift = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
  return {_mm512_srlv_epi32(_mm512_permutexvar_epi32(dword, both), shift)};
}
/// The NF4 levels of 16 consecutive nibbles.
inline V16 load_nf4(const uint8_t* p) {
  return nf4_level(spread_nibbles(p));
}
/// 16 consecutive nibbles as f32.
inline V16 load_nibbles(const uint8_t* p) {
  return low_nibble(spread_nibbles(p));
}
/// 16 bytes as f32.
inline V16 load_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

#if defined(__AVX512BF16__)
#define METAL_LORA_HAS_BF16_DOT 1

/// Each dword looked up in both halves: the low nibble (bit 4 ignored, the table repeats) as bf16.
inline I16 nibble_pairs(I16 a, I16 table) {
  return {_mm512_permutexvar_epi16(a.v, table.v)};
}
/// bf16 of multiplier·(0 … 15), twice; multiplier a power of two.
inline I16 nibble_table(float multiplier) {
  alignas(64) uint16_t words[32];
  for (int i = 0; i < 32; ++i) {
    words[i] = bf16_of_float(static_cast<float>(i & 15) * multiplier);
  }
  return {_mm512_load_si512(words)};
}
/// bf16 of the NF4 levels, twice.
inline I16 nf4_table() {
  alignas(64) uint16_t words[32];
  for (int i = 0; i < 32; ++i) words[i] = bf16_of_float(kNf4Levels[i & 15]);
  return {_mm512_load_si512(words)};
}
inline I16 broadcast_pair(const uint16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  return {_mm512_set1_epi32(pair)};
}
inline I16 load_pairs(const uint16_t* p) {
  return {_mm512_loadu_si512(p)};
}
inline I16 load_pairs_first(const uint16_t* p, size_t n) {
  return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1ull), p)};
}
/// c + a.even·b.even + a.odd·b.odd per dword, in f32.
inline V16 bf16_dot(V16 c, I16 a, I16 b) {
  __m512bh x, y;
  std::memcpy(&x, &a.v, sizeof(x));
  std::memcpy(&y, &b.v, sizeof(y));
  return {_mm512_dpbf16_ps(c.v, x, y)};
}
#endif

}  // namespace metal_lora::cpu::METAL_LORA_SIMD_NS
