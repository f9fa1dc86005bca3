// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
// The AVX2 form of gemv_simd.h (include that one).
#pragma once

namespace metal_lora::cpu::METAL_LORA_SIMD_NS {

struct V16 {
  __m256 a, b;
};
struct I16 {
  __m256i a, b;
};

inline constexpr int kDenseRows = 2;  ///< 2 rows x 4 tokens = all 16 registers
inline constexpr int kAccumulators = 1;

inline V16 zero() {
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
inline V16 broadcast(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
inline V16 load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
inline V16 load_first(const float* p, size_t n) {
  alignas(32) float lanes[16] = {};
  std::memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
}
inline void store(float* p, V16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store_first(float* p, V16 x, size_t n) {
  alignas(32) float lanes[16];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(float));
}
inline __m128i load_words(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline V16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_words(p)), _mm256_cvtph_ps(load_words(p + 8))};
}
inline __m256 from_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline V16 load_bf16(const uint16_t* p) {
  return {from_bf16(load_words(p)), from_bf16(load_words(p + 8))};
}
inline V16 load_f16_first(const uint16_t* p, size_t n) {
  alignas(32) uint16_t words[16] = {};
  std::memcpy(words, p, n * sizeof(uint16_t));
  return load_f16(words);
}
inline V16 load_bf16_first(const uint16_t* p, size_t n) {
  alignas(32) uint16_t words[16] = {};
  std::memcpy(words, p, n * sizeof(uint16_t));
  return load_bf16(words);
}

inline V16 add(V16 x, V16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline V16 mul(V16 x, V16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline V16 fma(V16 x, V16 y, V16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}

inline float horizontal_sum(V16 x) {
  const __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

inline __m256 sum_each8(const V16* x) {
  __m256 s[8];
  for (int i = 0; i < 8; ++i) s[i] = _mm256_add_ps(x[i].a, x[i].b);
  const __m256 s03 = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
  const __m256 s47 = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
  return _mm256_add_ps(
      _mm256_permute2f128_ps(s03, s47, 0x20), _mm256_permute2f128_ps(s03, s47, 0x31));
}
/// Lane r: the sum of the lanes of x[r].
inline V16 sum_each(const V16* x) {
  return {sum_each8(x), sum_each8(x + 8)};
}

inline void store_half(uint16_t* p, V16 x) {
  auto* out = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(out, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(out + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
/// Rounded to nearest even, as bf16_of_float does (nan stays nan); bits in the high half.
inline __m256i bf16_bits_high(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
}
inline void store_bf16(uint16_t* p, V16 x) {
  const __m256i packed = _mm256_packus_epi32(
      _mm256_srli_epi32(bf16_bits_high(x.a), 16), _mm256_srli_epi32(bf16_bits_high(x.b), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline __m256i bf16_pairs(__m256 even, __m256 odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(bf16_bits_high(even), 16), bf16_bits_high(odd), 0xaa);
}
inline void store_bf16_pairs(uint16_t* p, V16 even, V16 odd) {
  auto* out = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(out, bf16_pairs(even.a, odd.a));
  _mm256_storeu_si256(out + 1, bf16_pairs(even.b, odd.b));
}

inline I16 load_int(const void* p) {
  const auto* in = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(in), _mm256_loadu_si256(in + 1)};
}
template <int kBits>
inline I16 shift_right(I16 x) {
  return {_mm256_srli_epi32(x.a, kBits), _mm256_srli_epi32(x.b, kBits)};
}
inline V16 low_bits(I16 x, int mask) {
  const __m256i m = _mm256_set1_epi32(mask);
  return {
      _mm256_cvtepi32_ps(_mm256_and_si256(x.a, m)), _mm256_cvtepi32_ps(_mm256_and_si256(x.b, m))};
}
inline V16 low_nibble(I16 x) {
  return low_bits(x, 15);
}
inline V16 low_byte(I16 x) {
  return low_bits(x, 255);
}
/// NF4 levels: a permutation picks by the low three bits, bit 3 chooses between two of them.
inline __m256 nf4_level8(__m256i q) {
  const __m256 negative = _mm256_loadu_ps(kNf4Levels), positive = _mm256_loadu_ps(kNf4Levels + 8);
  return _mm256_blendv_ps(
      _mm256_permutevar8x32_ps(negative, q),
      _mm256_permutevar8x32_ps(positive, q),
      _mm256_castsi256_ps(_mm256_slli_epi32(q, 28)));
}
/// The NF4 level of each dword's low nibble.
inline V16 nf4_level(I16 x) {
  return {nf4_level8(x.a), nf4_level8(x.b)};
}
/// Each of 16 consecutive nibbles (8 bytes) at the bottom of a dword, other bits above it.
inline I16 spread_nibbles(const uint8_t* p) {
  int32_t word[2];
  std::memcpy(word, p, sizeof(word));
  const __m256i shift = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0);
  return {
      _mm256_srlv_epi32(_mm256_set1_epi32(word[0]), shift),
      _mm256_srlv_epi32(_mm256_set1_epi32(word[1]), shift)};
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
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

}  // namespace metal_lora::cpu::METAL_LORA_SIMD_NS
