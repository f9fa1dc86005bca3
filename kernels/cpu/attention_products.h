// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The small matrix products of attention and the layouts they take; part of attention_impl.h.
#pragma once

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/simd.h"

namespace metal_lora::cpu::METAL_LORA_SIMD {
namespace {

inline constexpr size_t kBlock = kAttentionBlock;
/// A strip: the queries that two vectors hold. Causal work is cut to whole strips.
inline constexpr size_t kStripVectors = 2;
inline constexpr size_t kStripLanes = kStripVectors * kLanes;
inline constexpr size_t kStrips = kBlock / kStripLanes;
/// Rows of a register tile: 12 x 2 sums, 2 vectors of B and a broadcast fit 32 registers; 6 x 2
/// fit 16.
inline constexpr size_t kTileRows = kLanes == 16 ? 12 : 6;

constexpr size_t pad(size_t d) {
  return (d + kLanes - 1) / kLanes * kLanes;
}
constexpr size_t pad4(size_t d) {
  return (d + 3) / 4 * 4;
}

/// The left factor: word (row, step) lies at base + row·row_bytes + step·step_bytes.
struct Operand {
  const char* base = nullptr;
  size_t row_bytes = 0, step_bytes = 0;
};

enum class Sum { set, add, rescale };

// C[M, NV vectors] = A·B, C + A·B, or C·rescale + A·B (rescale per lane).
template <class Op, Sum kSum, size_t M, size_t NV>
METAL_LORA_INLINE void multiply_tile(
    size_t steps,
    Operand a,
    const float* b,
    size_t ldb,
    float* c,
    size_t ldc,
    const float* rescale) {
  VF sum[M][NV];
#pragma GCC unroll 12
  for (size_t m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (size_t v = 0; v < NV; ++v) {
      if constexpr (kSum == Sum::set) {
        sum[m][v] = VF{};
      } else {
        sum[m][v] = load(c + m * ldc + v * kLanes);
        if constexpr (kSum == Sum::rescale) sum[m][v] = sum[m][v] * load(rescale + v * kLanes);
      }
    }
  }
  // One pointer for each four rows: rows 1, 2 and 3 are reached by scaled addressing.
  const size_t row = a.row_bytes, row3 = 3 * a.row_bytes;
  const char* group[3] = {a.base, a.base + 4 * row, a.base + 8 * row};
  // steps > 0: a loop that may run no time at all makes GCC keep every sum twice.
  do {
    VF right[NV];
#pragma GCC unroll 2
    for (size_t v = 0; v < NV; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (size_t m = 0; m < M; ++m) {
      const char* at = group[m / 4] + (m % 4 == 3 ? row3 : (m % 4) * row);
      const auto left = Op::broadcast(at);
#pragma GCC unroll 2
      for (size_t v = 0; v < NV; ++v) sum[m][v] = Op::dot(left, right[v], sum[m][v]);
    }
#pragma GCC unroll 3
    for (size_t g = 0; g < 3; ++g) group[g] += a.step_bytes;
    b += ldb;
  } while (--steps != 0);
#pragma GCC unroll 12
  for (size_t m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (size_t v = 0; v < NV; ++v) store(c + m * ldc + v * kLanes, sum[m][v]);
  }
}

// The last rows: M to 1 of them.
template <class Op, Sum kSum, size_t M, size_t NV>
void multiply_rest(
    size_t m,
    size_t steps,
    Operand a,
    const float* b,
    size_t ldb,
    float* c,
    size_t ldc,
    const float* rescale) {
  if constexpr (M > 0) {
    if (m == M) return multiply_tile<Op, kSum, M, NV>(steps, a, b, ldb, c, ldc, rescale);
    multiply_rest<Op, kSum, M - 1, NV>(m, steps, a, b, ldb, c, ldc, rescale);
  }
}

template <class Op, Sum kSum, size_t NV>
void multiply_columns(
    size_t m,
    size_t steps,
    Operand a,
    const float* b,
    size_t ldb,
    float* c,
    size_t ldc,
    const float* rescale) {
  while (m > 0) {
    // 16 rows are two tiles of 8 rather than 12 and 4: more sums in flight in the second.
    const size_t rows = m > kTileRows && m < 2 * kTileRows ? (m + 1) / 2
                        : m < kTileRows                    ? m
                                                           : kTileRows;
    if (rows == kTileRows) {
      multiply_tile<Op, kSum, kTileRows, NV>(steps, a, b, ldb, c, ldc, rescale);
    } else {
      multiply_rest<Op, kSum, kTileRows - 1, NV>(rows, steps, a, b, ldb, c, ldc, rescale);
    }
    a.base += rows * a.row_bytes;
    c += rows * ldc;
    m -= rows;
  }
}

/// C[m, n] from A[m, steps] and B[steps, n] (rows ldb apart); n is a whole number of vectors.
template <class Op, Sum kSum>
void multiply(
    size_t m,
    size_t n,
    size_t steps,
    const Operand& a,
    const float* b,
    size_t ldb,
    float* c,
    size_t ldc,
    const float* rescale = nullptr) {
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    multiply_columns<Op, kSum, 2>(m, steps, a, b + i, ldb, c + i, ldc, rescale + i);
  }
  if (i < n) multiply_columns<Op, kSum, 1>(m, steps, a, b + i, ldb, c + i, ldc, rescale + i);
}

// ---- Words of one f32 ----

struct F32Product {
  static constexpr size_t kWordElements = 1;
  using T = float;
  static constexpr size_t words(size_t n) { return n; }
  static METAL_LORA_INLINE VF broadcast(const char* p) {
    float x;
    __builtin_memcpy(&x, p, sizeof x);
    return set1(x);
  }
  static METAL_LORA_INLINE VF dot(VF a, VF b, VF sum) { return fma(a, b, sum); }

  // words = 2^(c·s + shift); returns sum + Σ of them.
  static METAL_LORA_INLINE VF
  exponentials(const float* s, uint32_t keys, VF c, VF shift, float* words, VF sum) {
    for (uint32_t j = 0; j < keys; ++j) {
      const VF p = exp2_nonpositive(fma(load(s + j * kStripLanes), c, shift));
      store(words + j * kStripLanes, p);
      sum = sum + p;
    }
    return sum;
  }
  static METAL_LORA_INLINE void store_pair(
      size_t strip,
      uint32_t j,
      const VF (&p0)[kStripVectors],
      const VF (&p1)[kStripVectors],
      const VF (&ds0)[kStripVectors],
      const VF (&ds1)[kStripVectors],
      float* p,
      float* ds,
      float*) {
    for (size_t v = 0; v < kStripVectors; ++v) {
      const size_t at = j * kBlock + strip * kStripLanes + v * kLanes;
      store(p + at, p0[v]);
      store(ds + at, ds0[v]);
      store(p + at + kBlock, p1[v]);
      store(ds + at + kBlock, ds1[v]);
    }
  }
  static Operand row_operand(const float* rows, size_t row, size_t first) {
    return {reinterpret_cast<const char*>(rows + row * kBlock + first), kBlock * 4, 4};
  }
  static void pair_rows(const float* staged, size_t rows, size_t padded, float* words) {
    __builtin_memcpy(words, staged, rows * padded * sizeof(float));
  }
};

template <bool kBf16Dot>
struct ProductFor {
  using Type = F32Product;
};

// ---- Words of two bf16 ----

#if defined(METAL_LORA_SIMD_BF16_DOT)
struct Bf16Product {
  static constexpr size_t kWordElements = 2;
  using T = uint16_t;
  static constexpr size_t words(size_t n) { return (n + 1) / 2; }
  static METAL_LORA_INLINE __m512bh broadcast(const char* p) {
    int32_t x;
    __builtin_memcpy(&x, p, sizeof x);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(x));
  }
  static METAL_LORA_INLINE VF dot(__m512bh a, VF b, VF sum) {
    return _mm512_dpbf16_ps(sum, a, reinterpret_cast<__m512bh>(b));
  }
  // Word i = (a[i], b[i]).
  static METAL_LORA_INLINE VF zip(VH a, VH b) { return from_bits(widen(a) | widen(b) << 16); }

  static METAL_LORA_INLINE VF
  exponentials(const float* s, uint32_t keys, VF c, VF shift, float* words, VF sum) {
    for (uint32_t j = 0; j < keys; j += 2) {
      const VF p0 = exp2_nonpositive(fma(load(s + j * kStripLanes), c, shift));
      VF p1{};
      if (j + 1 < keys) p1 = exp2_nonpositive(fma(load(s + (j + 1) * kStripLanes), c, shift));
      store(words + j / 2 * kStripLanes, zip(to_bf16(p0), to_bf16(p1)));
      sum = sum + (p0 + p1);
    }
    return sum;
  }
  static METAL_LORA_INLINE void store_pair(
      size_t strip,
      uint32_t j,
      const VF (&p0)[kStripVectors],
      const VF (&p1)[kStripVectors],
      const VF (&ds0)[kStripVectors],
      const VF (&ds1)[kStripVectors],
      float* p,
      float* ds,
      float* ds_words) {
    uint16_t* p_row = reinterpret_cast<uint16_t*>(p) + j * kBlock;
    uint16_t* ds_row = reinterpret_cast<uint16_t*>(ds) + j * kBlock;
    for (size_t v = 0; v < kStripVectors; ++v) {
      const size_t lane = strip * kStripLanes + v * kLanes;
      const VH d0 = to_bf16(ds0[v]), d1 = to_bf16(ds1[v]);
      store_vector(p_row + lane, to_bf16(p0[v]), Full{});
      store_vector(p_row + kBlock + lane, to_bf16(p1[v]), Full{});
      store_vector(ds_row + lane, d0, Full{});
      store_vector(ds_row + kBlock + lane, d1, Full{});
      store(ds_words + j / 2 * kBlock + lane, zip(d0, d1));
    }
  }
  static Operand row_operand(const float* rows, size_t row, size_t first) {
    const auto* elements = reinterpret_cast<const uint16_t*>(rows);
    return {reinterpret_cast<const char*>(elements + row * kBlock + first), kBlock * 2, 4};
  }
  static void pair_rows(const float* staged, size_t rows, size_t padded, float* words) {
    const auto* elements = reinterpret_cast<const uint16_t*>(staged);
    for (size_t r = 0; r < rows; r += 2) {
      for (size_t i = 0; i < padded; i += kLanes) {
        const VH a = load_vector<VH>(elements + r * padded + i, Full{});
        const VH b = load_vector<VH>(elements + (r + 1) * padded + i, Full{});
        store(words + r / 2 * padded + i, zip(a, b));
      }
    }
  }
};

template <>
struct ProductFor<true> {
  using Type = Bf16Product;
};
#endif

template <bool kBf16Dot>
using ProductOf = typename ProductFor<kBf16Dot>::Type;

// ---- Layouts ----

/// rows [kBlock, pad(d)] of Op's elements from `count` rows of E, zeros elsewhere.
template <class E, class Op>
void stage_rows(
    const typename E::T* x, size_t stride, size_t count, size_t d, bool negate, float* staged) {
  const size_t padded = pad(d);
  auto* rows = reinterpret_cast<typename Op::T*>(staged);
  for (size_t r = 0; r < count; ++r) {
    const typename E::T* from = x + r * stride;
    typename Op::T* to = rows + r * padded;
    for_lanes(d, [&](size_t i, auto part) {
      if constexpr (Op::kWordElements == 1) {
        const VF v = E::load(from + i, part);
        F32::store(to + i, negate ? -v : v, Full{});
      } else {
        const VH v = load_vector<VH>(from + i, part);
        store_vector(to + i, negate ? static_cast<VH>(v ^ 0x8000) : v, Full{});
      }
    });
  }
  __builtin_memset(rows + count * padded, 0, (kBlock - count) * padded * sizeof(typename Op::T));
}

using V4 = float __attribute__((vector_size(16)));

// to[c][r] = from[r][c] over rows x columns words, both multiples of 4.
METAL_LORA_INLINE void transpose(
    const float* from,
    size_t from_stride,
    size_t rows,
    size_t columns,
    float* to,
    size_t to_stride) {
  for (size_t r = 0; r < rows; r += 4) {
    for (size_t c = 0; c < columns; c += 4) {
      V4 x[4];
      for (size_t i = 0; i < 4; ++i) __builtin_memcpy(&x[i], from + (r + i) * from_stride + c, 16);
      const V4 a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
      const V4 b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
      const V4 e = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
      const V4 f = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
      const V4 y[4] = {
          __builtin_shufflevector(a, b, 0, 1, 4, 5),
          __builtin_shufflevector(a, b, 2, 3, 6, 7),
          __builtin_shufflevector(e, f, 0, 1, 4, 5),
          __builtin_shufflevector(e, f, 2, 3, 6, 7)};
      for (size_t i = 0; i < 4; ++i) __builtin_memcpy(to + (c + i) * to_stride + r, &y[i], 16);
    }
  }
}

/// staged rows -> strips [pad4(words), kStripLanes], one after the other.
template <class Op>
void transpose_staged(const float* staged, size_t count, size_t d, float* strips) {
  const size_t row_words = pad(d) / Op::kWordElements, columns = pad4(Op::words(d));
  for (size_t s = 0; s * kStripLanes < count; ++s) {
    transpose(
        staged + s * kStripLanes * row_words,
        row_words,
        kStripLanes,
        columns,
        strips + s * kStripLanes * columns,
        kStripLanes);
  }
}

/// strip [d, kStripLanes] -> the first n rows of out; `rows` is scratch of [kStripLanes, padded].
template <class E>
void write_transposed(
    const float* strip,
    size_t d,
    size_t padded,
    float* rows,
    size_t n,
    typename E::T* out,
    size_t stride) {
  transpose(strip, kStripLanes, pad4(d), kStripLanes, rows, padded);
  for (size_t r = 0; r < kStripLanes && r < n; ++r) {
    for_lanes(d, [&](size_t i, auto part) {
      E::store(out + r * stride + i, F32::load(rows + r * padded + i, part), part);
    });
  }
}

/// Up to 64 keys and values of one kv head as left factors: k, v [key, dim] and their transposes
/// kt, vt [dim, key]. In place wherever the elements are those of the product already.
template <class E, class Op>
class KeyBlock {
 public:
  KeyBlock(const AttentionParams& p, char* scratch)
      : p_(p),
        padded_(pad(p.head_dim)),
        staged_{
            reinterpret_cast<float*>(scratch),
            reinterpret_cast<float*>(scratch) + kBlock * padded_},
        pairs_(reinterpret_cast<float*>(scratch) + 2 * kBlock * padded_) {}

  Operand k, v, kt, vt;

  void load(const AttentionHead& head, uint32_t key, uint32_t count) {
    using T = typename E::T;
    k = place(static_cast<const T*>(head.k) + key * p_.k_stride, p_.k_stride, count, staged_[0]);
    v = place(static_cast<const T*>(head.v) + key * p_.v_stride, p_.v_stride, count, staged_[1]);
    kt = {k.base, k.step_bytes, k.row_bytes};
    vt = {v.base, v.step_bytes, v.row_bytes};
  }
  void pair_keys(uint32_t count) { pair(k, count, kt); }
  void pair_values(uint32_t count) { pair(v, count, vt); }

 private:
  Operand place(const typename E::T* x, size_t stride, uint32_t count, float* staged) {
    // A bf16 word must not reach into the next head: an odd head_dim needs the zero after it.
    const bool in_place = Op::kWordElements == 1 ? E::dtype == DType::f32 : p_.head_dim % 2 == 0;
    if (in_place) return {reinterpret_cast<const char*>(x), stride * sizeof(typename E::T), 4};
    stage_rows<E, Op>(x, stride, count, p_.head_dim, false, staged);
    return {reinterpret_cast<const char*>(staged), padded_ * sizeof(typename Op::T), 4};
  }

  // The transpose as a left factor: for pairs along the keys, rows 2i and 2i + 1 are zipped.
  void pair(const Operand& x, uint32_t count, Operand& transposed) {
    if constexpr (Op::kWordElements == 2) {
      for (uint32_t r = 0; r < count; r += 2) {
        const auto* a = reinterpret_cast<const uint16_t*>(x.base + r * x.row_bytes);
        const auto* b = reinterpret_cast<const uint16_t*>(x.base + (r + 1) * x.row_bytes);
        for_lanes(p_.head_dim, [&](size_t i, auto part) {
          const VH second = r + 1 < count ? load_vector<VH>(b + i, part) : VH{};
          store(pairs_ + r / 2 * padded_ + i, Op::zip(load_vector<VH>(a + i, part), second));
        });
      }
      transposed = {reinterpret_cast<const char*>(pairs_), 4, padded_ * 4};
    }
  }

  const AttentionParams& p_;
  size_t padded_;
  float* staged_[2];
  float* pairs_;
};

}  // namespace
}  // namespace metal_lora::cpu::METAL_LORA_SIMD
