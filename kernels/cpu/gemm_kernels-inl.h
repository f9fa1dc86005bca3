// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The bodies behind gemm_kernels.h, compiled once per instruction set: each gemm_<isa>.cpp sets
// METAL_LORA_VECTOR_BYTES, METAL_LORA_MAX_ROWS and METAL_LORA_BF16 and includes this file. Plain
// C++ on GCC/Clang vector types, intrinsics where the compiler cannot find the instruction.
// Everything is in an unnamed namespace and no std:: function is called, so that the linker cannot
// keep a copy compiled for a newer machine in code that an older one runs.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <utility>

#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/lora_quantized_panel.h"

namespace metal_lora::cpu {
namespace {

constexpr uint32_t kVector = METAL_LORA_VECTOR_BYTES / 4;
constexpr uint32_t kVectorsPerPanel = kPanelColumns / kVector;
constexpr uint32_t kMaxRows = METAL_LORA_MAX_ROWS;
constexpr uint32_t kMaxPanels = METAL_LORA_VECTOR_BYTES == 64 ? 2 : 1;
typedef float Vf __attribute__((vector_size(METAL_LORA_VECTOR_BYTES), aligned(4), may_alias));

#if METAL_LORA_BF16
using Element = uint16_t;
constexpr Compute kCompute = Compute::bf16;
constexpr uint32_t kElementsPerStep = 2;
#else
using Element = float;
constexpr Compute kCompute = Compute::f32;
constexpr uint32_t kElementsPerStep = 1;
#endif

inline uint32_t smaller(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}
inline uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

// ---- conversions -------------------------------------------------------------------------------

inline float from_bf16(uint16_t h) {
  return float_of(uint32_t{h} << 16);
}

/// Nearest, ties to even; NaN stays NaN (made quiet).
inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40u;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

/// Branch-free: the exponent is rebased by a multiplication, which also normalises subnormals.
inline float from_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

/// Nearest, ties to even.
inline uint16_t to_f16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // ≥ 65520
  if (magnitude < 0x38800000u) {  // below 2⁻¹⁴: adding 1/2 rounds to a multiple of 2⁻²⁴
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

void load_f32(DType from, const void* source, size_t count, float* __restrict out) {
  if (count == 0) return;  // then the pointers may be null
  if (from == DType::f32) {
    __builtin_memcpy(out, source, count * sizeof(float));
    return;
  }
  const uint16_t* __restrict in = static_cast<const uint16_t*>(source);
  size_t i = 0;
  if (from == DType::bf16) {
    for (; i < count; ++i) out[i] = from_bf16(in[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(
        out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
#endif
  for (; i < count; ++i) out[i] = from_f16(in[i]);
}

void store(DType to, const float* __restrict source, size_t count, void* out) {
  if (count == 0) return;  // then the pointers may be null
  if (to == DType::f32) {
    __builtin_memcpy(out, source, count * sizeof(float));
    return;
  }
  uint16_t* __restrict half = static_cast<uint16_t*>(out);
  size_t i = 0;
  if (to == DType::bf16) {
#if defined(__AVX512BF16__)
    for (; i + 16 <= count; i += 16) {
      const __m256bh r = _mm512_cvtneps_pbh(_mm512_loadu_ps(source + i));
      __builtin_memcpy(half + i, &r, sizeof r);
    }
#endif
    for (; i < count; ++i) half[i] = to_bf16(source[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i r = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), r);
  }
#endif
  for (; i < count; ++i) half[i] = to_f16(source[i]);
}

constexpr uint32_t kChunk = 512;  // elements converted at a time through the stack

void load(DType from, const void* source, size_t count, void* out) {
  if (count == 0) return;  // then the pointers may be null
#if METAL_LORA_BF16
  if (from == DType::bf16) {
    __builtin_memcpy(out, source, count * 2);
  } else if (from == DType::f32) {
    store(DType::bf16, static_cast<const float*>(source), count, out);
  } else {
    alignas(64) float wide[kChunk];
    for (size_t done = 0; done < count; done += kChunk) {
      const size_t n = count - done < kChunk ? count - done : kChunk;
      load_f32(from, static_cast<const uint16_t*>(source) + done, n, wide);
      store(DType::bf16, wide, n, static_cast<uint16_t*>(out) + done);
    }
  }
#else
  load_f32(from, source, count, static_cast<float*>(out));
#endif
}

inline float load_scalar(DType dtype, const void* data, size_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[at];
  const uint16_t h = static_cast<const uint16_t*>(data)[at];
  return dtype == DType::bf16 ? from_bf16(h) : from_f16(h);
}

// ---- affine and NF4 weights --------------------------------------------------------------------

/// Columns [column, column + count), count ≤ 32, of one group as f32.
inline void affine_piece(
    const AffineRow& row, uint32_t column, uint32_t count, float scale, float bias, float* out) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(row.words);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t at = column + i;
    const uint32_t q = row.bits == 8 ? bytes[at] : (bytes[at / 2] >> (4 * (at % 2))) & 15u;
    out[i] =
        row.biases ? __builtin_fmaf(static_cast<float>(q), scale, bias) : kNf4Levels[q] * scale;
  }
}

#if defined(__AVX512F__)

/// Sixteen weights. int4: sixteen levels fit one register, so a permutation looks the weights up
/// (it reads only the low four bits of each index: the shifted words need no mask).
inline __m512 sixteen(
    const uint32_t* words, uint32_t bits, __m512 scale, __m512 bias, __m512 table) {
  if (bits == 8) {
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(q)), scale, bias);
  }
  const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i both = _mm512_inserti64x4(
      _mm512_set1_epi32(static_cast<int>(words[0])),
      _mm256_set1_epi32(static_cast<int>(words[1])),
      1);
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(both, shift), table);
}

inline void affine_32(
    const AffineRow& row, uint32_t column, float scale, float bias, Element* out) {
  const __m512 level = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 s = _mm512_set1_ps(scale), b = _mm512_set1_ps(bias);
  const __m512 table =
      row.biases ? _mm512_fmadd_ps(level, s, b) : _mm512_mul_ps(_mm512_loadu_ps(kNf4Levels), s);
  const uint32_t* words = row.words + column * row.bits / 32;
  const __m512 low = sixteen(words, row.bits, s, b, table);
  const __m512 high = sixteen(words + row.bits / 2, row.bits, s, b, table);
#if METAL_LORA_BF16
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
  _mm512_storeu_ps(out, low);
  _mm512_storeu_ps(out + 16, high);
#endif
}

#elif defined(__AVX2__)

inline void affine_32(const AffineRow& row, uint32_t column, float scale, float bias, float* out) {
  const __m256 s = _mm256_set1_ps(scale), b = _mm256_set1_ps(bias);
  const uint32_t* words = row.words + column * row.bits / 32;
  for (uint32_t i = 0; i < 32; i += 8) {
    __m256i q;
    if (!row.biases) {
      const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      q = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(words[i / 8])), shift);
      _mm256_storeu_ps(out + i, _mm256_mul_ps(METAL_LORA_SIMD_NS::nf4_level8(q), s));
      continue;
    }
    if (row.bits == 8) {
      q = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + i / 4)));
    } else {
      const __m256i shift = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
      const __m256i word = _mm256_set1_epi32(static_cast<int>(words[i / 8]));
      q = _mm256_and_si256(_mm256_srlv_epi32(word, shift), _mm256_set1_epi32(15));
    }
    _mm256_storeu_ps(out + i, _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), s, b));
  }
}

#else

inline void affine_32(const AffineRow& row, uint32_t column, float scale, float bias, float* out) {
  affine_piece(row, column, 32, scale, bias, out);
}

#endif

void load_affine(const AffineRow& row, uint32_t column0, uint32_t count, void* out) {
  Element* target = static_cast<Element*>(out);
  for (uint32_t i = 0; i < count; i += 32) {
    const uint32_t column = column0 + i, group = column / row.group_size;
    const float scale = load_scalar(row.scales_dtype, row.scales, group);
    const float bias = row.biases ? load_scalar(row.scales_dtype, row.biases, group) : 0.0f;
    if (count - i >= 32) {
      affine_32(row, column, scale, bias, target + i);
      continue;
    }
    alignas(64) float wide[32];
    affine_piece(row, column, count - i, scale, bias, wide);
    load(DType::f32, wide, count - i, target + i);
  }
}

void load_packed(const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, void* out) {
#if METAL_LORA_BF16
  METAL_LORA_SIMD_NS::dequantize_panel_bf16(w, panel, k0, k1, static_cast<uint16_t*>(out));
#else
  METAL_LORA_SIMD_NS::dequantize_panel_f32(w, panel, k0, k1, static_cast<float*>(out));
#endif
}

void load_packed_across(const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, void* out) {
#if METAL_LORA_BF16
  constexpr uint32_t kPiece = 64;
  alignas(64) float wide[kPiece * kPanelColumns];
  for (uint32_t k = k0; k < k1; k += kPiece) {
    const uint32_t end = smaller(k1, k + kPiece);
    METAL_LORA_SIMD_NS::dequantize_panel_f32(w, panel, k, end, wide);
    store(
        DType::bf16,
        wide,
        size_t{end - k} * kPanelColumns,
        static_cast<uint16_t*>(out) + size_t{k - k0} * kPanelColumns);
  }
#else
  METAL_LORA_SIMD_NS::dequantize_panel_f32(w, panel, k0, k1, static_cast<float*>(out));
#endif
}

// ---- panels ------------------------------------------------------------------------------------

#if METAL_LORA_VECTOR_BYTES == 64

/// Sixteen rows of sixteen 32-bit lanes, transposed in registers: pairs, quads, then quarters.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

void pack_transposed(
    const void* source, size_t ld, uint32_t rows, uint32_t width, uint32_t k, void* panel) {
  const Element* in = static_cast<const Element*>(source);
  uint32_t* out = static_cast<uint32_t*>(panel);
  const uint32_t steps = steps_of(kCompute, k);
  for (uint32_t i0 = 0; i0 < width; i0 += 16) {
    const uint32_t lanes = smaller(16, width - i0);
    const __mmask16 keep = static_cast<__mmask16>((1u << lanes) - 1u);
    for (uint32_t s0 = 0; s0 < steps; s0 += 16) {
      const uint32_t left = smaller(16 * kElementsPerStep, k - s0 * kElementsPerStep);
      __m512i r[16];
#pragma GCC unroll 16
      for (uint32_t i = 0; i < 16; ++i) {
        const Element* at = in + (i0 + i) * ld + s0 * kElementsPerStep;
        if (i0 + i >= rows) {
          r[i] = _mm512_setzero_si512();
        } else if (left == 16 * kElementsPerStep) {
          r[i] = _mm512_loadu_si512(at);
        } else if constexpr (kElementsPerStep == 2) {
          r[i] = _mm512_maskz_loadu_epi16((1u << left) - 1u, at);
        } else {
          r[i] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << left) - 1u), at);
        }
      }
      transpose16(r);
      const uint32_t here = smaller(16, steps - s0);
      uint32_t* to = out + size_t{s0} * width + i0;
      if (here == 16) {
#pragma GCC unroll 16
        for (uint32_t s = 0; s < 16; ++s) _mm512_mask_storeu_epi32(to + s * width, keep, r[s]);
      } else {
        alignas(64) __m512i spilled[16];
#pragma GCC unroll 16
        for (uint32_t s = 0; s < 16; ++s) spilled[s] = r[s];
        for (uint32_t s = 0; s < here; ++s) {
          _mm512_mask_storeu_epi32(to + s * width, keep, spilled[s]);
        }
      }
    }
  }
}

#else

/// Blocks of 32 steps, so that the strided writes stay in the first-level cache.
void pack_transposed(
    const void* source, size_t ld, uint32_t rows, uint32_t width, uint32_t k, void* panel) {
  static_assert(kElementsPerStep == 1);
  const float* in = static_cast<const float*>(source);
  float* out = static_cast<float*>(panel);
  for (uint32_t s0 = 0; s0 < k; s0 += 32) {
    const uint32_t end = smaller(k, s0 + 32);
    for (uint32_t i = 0; i < width; ++i) {
      if (i < rows) {
        const float* row = in + i * ld;
        for (uint32_t s = s0; s < end; ++s) out[size_t{s} * width + i] = row[s];
      } else {
        for (uint32_t s = s0; s < end; ++s) out[size_t{s} * width + i] = 0.0f;
      }
    }
  }
}

#endif

/// One step of pack_straight; `next` is the odd row of a bf16 pair, or null at an odd k's end.
inline void straight_step(
    const Element* __restrict row,
    const Element* __restrict next,
    uint32_t columns,
    uint32_t* out) {
#if METAL_LORA_BF16
  if (next) {
    for (uint32_t i = 0; i < columns; ++i) out[i] = row[i] | uint32_t{next[i]} << 16;
  } else {
    for (uint32_t i = 0; i < columns; ++i) out[i] = row[i];
  }
#else
  (void)next;
  for (uint32_t i = 0; i < columns; ++i) out[i] = bits_of(row[i]);
#endif
}

void pack_straight(
    const void* source, size_t ld, uint32_t columns, uint32_t width, uint32_t k, void* panel) {
  const Element* row = static_cast<const Element*>(source);
  uint32_t* out = static_cast<uint32_t*>(panel);
  for (uint32_t p = 0; p < k; p += kElementsPerStep, row += kElementsPerStep * ld, out += width) {
    const Element* next = kElementsPerStep == 2 && p + 1 < k ? row + ld : nullptr;
    if (columns == kPanelColumns && (next || kElementsPerStep == 1)) {
      straight_step(row, next, kPanelColumns, out);  // a constant count: whole vectors
    } else {
      straight_step(row, next, columns, out);
    }
    for (uint32_t i = columns; i < width; ++i) out[i] = 0;
  }
}

// ---- the tile ----------------------------------------------------------------------------------

#if METAL_LORA_BF16
inline Vf multiply_add(Vf acc, Vf b, uint32_t a_pair) {
  const __m512i a = _mm512_set1_epi32(static_cast<int>(a_pair));
  return (Vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#else
inline Vf multiply_add(Vf acc, Vf b, uint32_t a) {
  return acc + b * float_of(a);
}
#endif

template <uint32_t Rows, uint32_t Panels>
void tile_of(const PanelRun* runs, uint32_t count, float* c, size_t ldc, bool accumulate) {
  constexpr uint32_t kVectors = Panels * kVectorsPerPanel;
  Vf acc[Rows][kVectors];
#pragma GCC unroll 16
  for (uint32_t i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (uint32_t v = 0; v < kVectors; ++v) acc[i][v] = Vf{};
  }
  for (const PanelRun* run = runs; run != runs + count; ++run) {
    const uint32_t* a = static_cast<const uint32_t*>(run->a);
    const float* b = static_cast<const float*>(run->b);
    const size_t second = run->b_stride * kPanelColumns;
    for (uint32_t steps = run->steps; steps != 0; --steps) {
      Vf bv[kVectors];
#pragma GCC unroll 4
      for (uint32_t v = 0; v < kVectors; ++v) {
        const float* at = v < kVectorsPerPanel ? b : b + second;
        bv[v] = *reinterpret_cast<const Vf*>(at + v % kVectorsPerPanel * kVector);
      }
#pragma GCC unroll 16
      for (uint32_t i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (uint32_t v = 0; v < kVectors; ++v) acc[i][v] = multiply_add(acc[i][v], bv[v], a[i]);
      }
      a += Rows;
      b += kPanelColumns;
    }
  }
#pragma GCC unroll 16
  for (uint32_t i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (uint32_t v = 0; v < kVectors; ++v) {
      Vf* out = reinterpret_cast<Vf*>(c + i * ldc + v * kVector);
      *out = accumulate ? *out + acc[i][v] : acc[i][v];
    }
  }
}

using TileFn = void (*)(const PanelRun*, uint32_t, float*, size_t, bool);

template <uint32_t Panels, size_t... I>
inline TileFn tile_for(uint32_t rows, std::index_sequence<I...>) {
  static constexpr TileFn kTable[] = {&tile_of<I + 1, Panels>...};
  return kTable[rows - 1];
}

void tile(
    uint32_t rows,
    uint32_t panels,
    const PanelRun* runs,
    uint32_t count,
    float* c,
    size_t ldc,
    bool accumulate) {
  constexpr auto kRows = std::make_index_sequence<kMaxRows>();
  if constexpr (kMaxPanels == 2) {
    if (panels == 2) return tile_for<2>(rows, kRows)(runs, count, c, ldc, accumulate);
  }
  (void)panels;
  tile_for<1>(rows, kRows)(runs, count, c, ldc, accumulate);
}

// ---- rows --------------------------------------------------------------------------------------

void finish_row(
    DType dtype,
    const float* acc,
    size_t count,
    const float* bias,
    const void* residual,
    void* out) {
  if (!bias && !residual) return store(dtype, acc, count, out);
  const size_t bytes = dtype == DType::f32 ? 4 : 2;
  alignas(64) float sum[kChunk];
  alignas(64) float other[kChunk];
  for (size_t done = 0; done < count; done += kChunk) {
    const size_t n = count - done < kChunk ? count - done : kChunk;
    for (size_t i = 0; i < n; ++i) sum[i] = bias ? acc[done + i] + bias[done + i] : acc[done + i];
    if (residual) {
      load_f32(dtype, static_cast<const char*>(residual) + done * bytes, n, other);
      for (size_t i = 0; i < n; ++i) sum[i] += other[i];
    }
    store(dtype, sum, n, static_cast<char*>(out) + done * bytes);
  }
}

inline uint64_t mix64(uint64_t x) {  // splitmix64's finaliser (Steele et al., OOPSLA 2014)
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

/// Counter-based: a 64-bit key per (seed, token), then a 32-bit mix (MurmurHash3's finaliser) of
/// the column under that key: eight or sixteen columns at a time, no state, any order.
void drop(const DropMask& mask, uint32_t token, uint32_t column0, uint32_t count, float* values) {
  const uint64_t key = mix64(mix64(mask.seed + 0x9e3779b97f4a7c15ull) + token);
  const uint32_t add = static_cast<uint32_t>(key), flip = static_cast<uint32_t>(key >> 32);
  const uint32_t threshold = mask.threshold;
  const float keep = mask.keep_scale;
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t h = (column0 + i) * 0x9e3779b9u + add;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = ((h ^ flip) ^ (h >> 13)) * 0xc2b2ae35u;
    h ^= h >> 16;
    values[i] = h >= threshold ? values[i] * keep : 0.0f;
  }
}

constexpr GemmKernels kKernels = {
    kCompute,
    kMaxRows,
    kMaxPanels,
    &tile,
    &load,
    &load_affine,
    &load_packed,
    &load_packed_across,
    &store,
    &finish_row,
    &pack_transposed,
    &pack_straight,
    &drop,
};

}  // namespace
}  // namespace metal_lora::cpu
