// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The matrix-vector kernels, compiled once per instruction set (gemv_<isa>.cpp).
// A token's sums are taken in an order that depends on k and the format alone, so the same bits
// come out whichever tokens share the call.
#pragma once

#include "kernels/cpu/gemv_kernels.h"

namespace metal_lora::cpu::METAL_LORA_SIMD_NS {

inline constexpr uint32_t kSumSpan = 32;
/// How far ahead of the dot products packed weights are asked for.
inline constexpr size_t kPrefetchBytes = 2048;

/// Runs f.template operator()<M>(first token) over all tokens, up to 4 at a time: 4 tokens keep
/// the multiplier busy for longer than unpacking the weights takes, and a second pass reads the
/// panel from the first-level cache.
template <class F>
inline void for_token_tiles(uint32_t m, F&& f) {
  uint32_t t = 0;
  for (; t + 4 <= m; t += 4) f.template operator()<4>(t);
  if (m - t == 3) f.template operator()<3>(t);
  if (m - t == 2) f.template operator()<2>(t);
  if (m - t == 1) f.template operator()<1>(t);
}

// ---- cpu_packed: int4, int8, nf4 ---------------------------------------------------------------

/// What the codes of a packed weight stand for.
enum class Codes { int4, int8, nf4 };
/// k values of a 64-byte step.
template <Codes kCodes>
inline constexpr int kStepK = kCodes == Codes::int8 ? 4 : 8;

/// total += scale·(Σ q·x) + bias·(Σ x) of one group, for M tokens; nf4 has no bias.
template <Codes kCodes, int M>
inline void close_group(
    const uint8_t* block,
    const PanelGeometry& g,
    DType scales_dtype,
    const V16 (*dot)[kAccumulators],
    const float* const* sums,
    uint32_t spans,
    V16* total) {
  const V16 scale = load_panel_scales(block, scales_dtype);
  for (int t = 0; t < M; ++t) {
    V16 d = dot[t][0];
    if constexpr (kAccumulators == 2) d = add(d, dot[t][1]);
    total[t] = fma(scale, d, total[t]);
  }
  if constexpr (kCodes != Codes::nf4) {
    const V16 bias = load_panel_scales(block + g.scales_bytes, scales_dtype);
    for (int t = 0; t < M; ++t) {
      float sum = sums[t][0];
      for (uint32_t s = 1; s < spans; ++s) sum += sums[t][s];
      total[t] = fma(bias, broadcast(sum), total[t]);
    }
  }
}

/// One dword step: q_j·x[k_j] for the 8 or 4 (int8) k it holds.
template <Codes kCodes, int M>
inline void step_f32(I16 v, const float* const* x, V16 (*dot)[kAccumulators]) {
  const auto one = [&]<int kShift, int kAt>() {
    const I16 shifted = shift_right<kShift>(v);
    const V16 q = kCodes == Codes::int8  ? low_byte(shifted)
                  : kCodes == Codes::nf4 ? nf4_level(shifted)
                                         : low_nibble(shifted);
    for (int t = 0; t < M; ++t) {
      V16& d = dot[t][kAt & 1 & (kAccumulators - 1)];
      d = fma(q, broadcast(x[t][kAt]), d);
    }
  };
  if constexpr (kCodes == Codes::int8) {
    one.template operator()<0, 0>();
    one.template operator()<16, 1>();
    one.template operator()<8, 2>();
    one.template operator()<24, 3>();
  } else {
    one.template operator()<0, 0>();
    one.template operator()<16, 1>();
    one.template operator()<4, 2>();
    one.template operator()<20, 3>();
    one.template operator()<8, 4>();
    one.template operator()<24, 5>();
    one.template operator()<12, 6>();
    one.template operator()<28, 7>();
  }
}

template <Codes kCodes, int M>
void packed_f32(const WeightView& w, const GemvInput& in, uint32_t row0, uint32_t t0, float* acc) {
  const PanelGeometry g = panel_geometry(w.params);
  const uint32_t spans = w.params.group_size / kSumSpan, all_spans = in.k / kSumSpan;
  const uint8_t* block =
      static_cast<const uint8_t*>(w.data) + size_t{row0 / kPanelRows} * g.panel_bytes;
  V16 total[M];
  const float* x[M];
  const float* sums[M];
  for (int t = 0; t < M; ++t) {
    total[t] = zero();
    x[t] = in.f32 + size_t{t0 + t} * in.k;
    sums[t] = in.sums + size_t{t0 + t} * all_spans;
  }
  for (uint32_t group = 0; group < g.groups; ++group, block += g.block_bytes) {
    V16 dot[M][kAccumulators];
    for (int t = 0; t < M; ++t) {
      for (int a = 0; a < kAccumulators; ++a) dot[t][a] = zero();
    }
    for (size_t at = g.data_offset; at < g.block_bytes; at += kPanelStepBytes) {
      prefetch_once(block + at + kPrefetchBytes);
      step_f32<kCodes, M>(load_int(block + at), x, dot);
      for (int t = 0; t < M; ++t) x[t] += kStepK<kCodes>;
    }
    prefetch_once(block + kPrefetchBytes);
    close_group<kCodes, M>(block, g, w.params.scales_dtype, dot, sums, spans, total);
    for (int t = 0; t < M; ++t) sums[t] += spans;
  }
  for (int t = 0; t < M; ++t) store(acc + size_t{t0 + t} * kPanelRows, total[t]);
}

#if defined(METAL_LORA_HAS_BF16_DOT)
/// bf16 x: both halves of a dword become a bf16 pair by one table lookup (exact: q ≤ 15). An int8
/// q is 16·high + low, two exact lookups whose dot products have an accumulator each. NF4's levels
/// are rounded to bf16, as the tiled form rounds whole weights; their remainders as a second lookup
/// and dot product were tried and cost 20 % of the speed of one token, 30 % of four.
template <Codes kCodes, int M>
void packed_bf16(const WeightView& w, const GemvInput& in, uint32_t row0, uint32_t t0, float* acc) {
  const PanelGeometry g = panel_geometry(w.params);
  const uint32_t spans = w.params.group_size / kSumSpan, all_spans = in.k / kSumSpan;
  const uint8_t* block =
      static_cast<const uint8_t*>(w.data) + size_t{row0 / kPanelRows} * g.panel_bytes;
  constexpr bool kInt8 = kCodes == Codes::int8, kNf4 = kCodes == Codes::nf4;
  const I16 low = kNf4 ? nf4_table() : nibble_table(1.0f);
  const I16 high = kInt8 ? nibble_table(16.0f) : low;
  V16 total[M];
  const uint16_t* x[M];
  const float* sums[M];
  for (int t = 0; t < M; ++t) {
    total[t] = zero();
    x[t] = in.bf16 + size_t{t0 + t} * in.k;
    sums[t] = in.sums + size_t{t0 + t} * all_spans;
  }
  for (uint32_t group = 0; group < g.groups; ++group, block += g.block_bytes) {
    V16 dot[M][kAccumulators];
    for (int t = 0; t < M; ++t) dot[t][0] = dot[t][1] = zero();
    for (size_t at = g.data_offset; at < g.block_bytes; at += kPanelStepBytes) {
      prefetch_once(block + at + kPrefetchBytes);
      const I16 v = load_int(block + at);
      const I16 q0 = nibble_pairs(v, low), q1 = nibble_pairs(shift_right<4>(v), high);
      const I16 q2 = nibble_pairs(shift_right<8>(v), low);
      const I16 q3 = nibble_pairs(shift_right<12>(v), high);
      for (int t = 0; t < M; ++t) {
        const uint16_t* xt = x[t];
        if constexpr (kInt8) {
          const I16 x0 = broadcast_pair(xt), x1 = broadcast_pair(xt + 2);
          dot[t][0] = bf16_dot(bf16_dot(dot[t][0], q0, x0), q2, x1);
          dot[t][1] = bf16_dot(bf16_dot(dot[t][1], q1, x0), q3, x1);
        } else {
          dot[t][0] = bf16_dot(dot[t][0], q0, broadcast_pair(xt));
          dot[t][1] = bf16_dot(dot[t][1], q1, broadcast_pair(xt + 2));
          dot[t][0] = bf16_dot(dot[t][0], q2, broadcast_pair(xt + 4));
          dot[t][1] = bf16_dot(dot[t][1], q3, broadcast_pair(xt + 6));
        }
      }
      for (int t = 0; t < M; ++t) x[t] += kStepK<kCodes>;
    }
    prefetch_once(block + kPrefetchBytes);
    close_group<kCodes, M>(block, g, w.params.scales_dtype, dot, sums, spans, total);
    for (int t = 0; t < M; ++t) sums[t] += spans;
  }
  for (int t = 0; t < M; ++t) store(acc + size_t{t0 + t} * kPanelRows, total[t]);
}
#endif

template <Codes kCodes>
void packed_panel(const WeightView& w, const GemvInput& in, uint32_t row0, float* acc) {
  for_token_tiles(in.m, [&]<int M>(uint32_t t0) {
#if defined(METAL_LORA_HAS_BF16_DOT)
    if (in.bf16 != nullptr) return packed_bf16<kCodes, M>(w, in, row0, t0, acc);
#endif
    packed_f32<kCodes, M>(w, in, row0, t0, acc);
  });
}

// ---- row_major: lanes along k ------------------------------------------------------------------

/// Rows of a dense weight.
template <class T, V16 (*kLoad)(const T*), V16 (*kLoadFirst)(const T*, size_t)>
struct DenseRows {
  const T* data;
  size_t k;
  explicit DenseRows(const WeightView& w) : data(static_cast<const T*>(w.data)), k(w.params.k) {}
  V16 at(size_t row, size_t i) const { return kLoad(data + row * k + i); }
  V16 first(size_t row, size_t i, size_t n) const { return kLoadFirst(data + row * k + i, n); }
};
using RowsF32 = DenseRows<float, load, load_first>;
using RowsF16 = DenseRows<uint16_t, load_f16, load_f16_first>;
using RowsBf16 = DenseRows<uint16_t, load_bf16, load_bf16_first>;

/// Rows of an affine weight, dequantised 16 values at a time.
template <bool kInt8>
struct AffineRows {
  const uint8_t* data;
  const void* scales;
  const void* biases;
  size_t k, group_size;
  DType dtype;
  explicit AffineRows(const WeightView& w)
      : data(static_cast<const uint8_t*>(w.data)),
        scales(w.scales),
        biases(w.biases),
        k(w.params.k),
        group_size(w.params.group_size),
        dtype(w.params.scales_dtype) {}
  V16 at(size_t row, size_t i) const {
    const size_t group = row * (k / group_size) + i / group_size;
    const V16 scale = broadcast(read_float(scales, dtype, group));
    const V16 bias = broadcast(read_float(biases, dtype, group));
    const size_t value = row * k + i;
    return fma(kInt8 ? load_bytes(data + value) : load_nibbles(data + value / 2), scale, bias);
  }
  V16 first(size_t, size_t, size_t) const { return zero(); }  // groups are multiples of 32
};

/// Rows of an NF4 weight.
struct Nf4Rows {
  const WeightView& w;
  const uint8_t* data;
  size_t k;
  explicit Nf4Rows(const WeightView& weight)
      : w(weight), data(static_cast<const uint8_t*>(weight.data)), k(weight.params.k) {}
  V16 at(size_t row, size_t i) const {
    const size_t value = row * k + i;
    return mul(load_nf4(data + value / 2), broadcast(nf4_absmax(w, value / kNf4Block)));
  }
  V16 first(size_t, size_t, size_t) const { return zero(); }  // k is a multiple of 64
};

/// Lanes of the sums of R rows from `row` and M tokens, to dots[t·16 + r]; rows past the last
/// repeat it.
template <class Rows, int R, int M>
inline void dense_tile(
    const Rows& w, uint32_t row, uint32_t last_row, const float* x, uint32_t k, V16* dots) {
  V16 dot[M][R];
  size_t rows[R];
  for (int r = 0; r < R; ++r) rows[r] = row + r < last_row ? row + r : last_row;
  for (int t = 0; t < M; ++t) {
    for (int r = 0; r < R; ++r) dot[t][r] = zero();
  }
  uint32_t i = 0;
  for (; i + 16 <= k; i += 16) {
    V16 q[R];
    for (int r = 0; r < R; ++r) q[r] = w.at(rows[r], i);
    for (int t = 0; t < M; ++t) {
      const V16 xt = load(x + size_t{k} * t + i);
      for (int r = 0; r < R; ++r) dot[t][r] = fma(q[r], xt, dot[t][r]);
    }
  }
  if (i < k) {
    for (int r = 0; r < R; ++r) {
      const V16 q = w.first(rows[r], i, k - i);
      for (int t = 0; t < M; ++t) {
        dot[t][r] = fma(q, load_first(x + size_t{k} * t + i, k - i), dot[t][r]);
      }
    }
  }
  for (int t = 0; t < M; ++t) {
    for (int r = 0; r < R; ++r) dots[t * kPanelRows + r] = dot[t][r];
  }
}

/// One token leaves room for twice the rows: as many independent sums as the multiplier's latency
/// asks for.
template <int M>
inline constexpr int kTileRows = M == 1 ? 2 * kDenseRows : kDenseRows;

template <class Rows>
void dense_panel(
    const WeightView& w, const GemvInput& in, uint32_t row0, uint32_t rows, float* acc) {
  const Rows reader(w);
  for_token_tiles(in.m, [&]<int M>(uint32_t t0) {
    V16 dots[M * kPanelRows];
    for (uint32_t r = 0; r < kPanelRows; r += kTileRows<M>) {
      dense_tile<Rows, kTileRows<M>, M>(
          reader,
          row0 + (r < rows ? r : rows - 1),
          row0 + rows - 1,
          in.f32 + size_t{t0} * in.k,
          in.k,
          dots + r);
    }
    for (uint32_t t = 0; t < M; ++t) {
      store(acc + (t0 + t) * kPanelRows, sum_each(dots + t * kPanelRows));
    }
  });
}

#if defined(METAL_LORA_HAS_BF16_DOT)
template <int R, int M>
inline void bf16_tile(
    const uint16_t* w, uint32_t row, uint32_t last_row, const uint16_t* x, uint32_t k, V16* dots) {
  V16 dot[M][R];
  const uint16_t* rows[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = w + size_t{row + r < last_row ? row + r : last_row} * k;
  }
  for (int t = 0; t < M; ++t) {
    for (int r = 0; r < R; ++r) dot[t][r] = zero();
  }
  uint32_t i = 0;
  for (; i + 32 <= k; i += 32) {
    I16 q[R];
    for (int r = 0; r < R; ++r) q[r] = load_pairs(rows[r] + i);
    for (int t = 0; t < M; ++t) {
      const I16 xt = load_pairs(x + size_t{k} * t + i);
      for (int r = 0; r < R; ++r) dot[t][r] = bf16_dot(dot[t][r], q[r], xt);
    }
  }
  if (i < k) {
    for (int r = 0; r < R; ++r) {
      const I16 q = load_pairs_first(rows[r] + i, k - i);
      for (int t = 0; t < M; ++t) {
        dot[t][r] = bf16_dot(dot[t][r], q, load_pairs_first(x + size_t{k} * t + i, k - i));
      }
    }
  }
  for (int t = 0; t < M; ++t) {
    for (int r = 0; r < R; ++r) dots[t * kPanelRows + r] = dot[t][r];
  }
}

inline void bf16_panel(
    const WeightView& w, const GemvInput& in, uint32_t row0, uint32_t rows, float* acc) {
  for_token_tiles(in.m, [&]<int M>(uint32_t t0) {
    V16 dots[M * kPanelRows];
    for (uint32_t r = 0; r < kPanelRows; r += kTileRows<M>) {
      bf16_tile<kTileRows<M>, M>(
          static_cast<const uint16_t*>(w.data),
          row0 + (r < rows ? r : rows - 1),
          row0 + rows - 1,
          in.bf16 + size_t{t0} * in.k,
          in.k,
          dots + r);
    }
    for (uint32_t t = 0; t < M; ++t) {
      store(acc + (t0 + t) * kPanelRows, sum_each(dots + t * kPanelRows));
    }
  });
}
#endif

// ---- entries -----------------------------------------------------------------------------------

inline void panel(
    const WeightView& w, const GemvInput& in, uint32_t row0, uint32_t rows, float* acc) {
  const bool packed = w.params.layout == WeightLayout::cpu_packed;
  switch (w.params.format) {
    case WeightFormat::int4:
      return packed ? packed_panel<Codes::int4>(w, in, row0, acc)
                    : dense_panel<AffineRows<false>>(w, in, row0, rows, acc);
    case WeightFormat::int8:
      return packed ? packed_panel<Codes::int8>(w, in, row0, acc)
                    : dense_panel<AffineRows<true>>(w, in, row0, rows, acc);
    case WeightFormat::nf4:
      return packed ? packed_panel<Codes::nf4>(w, in, row0, acc)
                    : dense_panel<Nf4Rows>(w, in, row0, rows, acc);
    case WeightFormat::f32:
      return dense_panel<RowsF32>(w, in, row0, rows, acc);
    case WeightFormat::f16:
      return dense_panel<RowsF16>(w, in, row0, rows, acc);
    case WeightFormat::bf16:
#if defined(METAL_LORA_HAS_BF16_DOT)
      if (in.bf16 != nullptr) return bf16_panel(w, in, row0, rows, acc);
#endif
      return dense_panel<RowsBf16>(w, in, row0, rows, acc);
  }
}

template <class Rows>
void expand_rows(
    const WeightView& b,
    uint32_t rank,
    float scale,
    uint32_t m,
    const float* u,
    uint32_t row0,
    uint32_t rows,
    float* acc) {
  const Rows reader(b);
  for (uint32_t t = 0; t < m; ++t) {
    const float* ut = u + size_t{t} * rank;
    V16 dot[kPanelRows];
    for (uint32_t r = 0; r < kPanelRows; ++r) dot[r] = zero();
    uint32_t i = 0;
    for (; i + 16 <= rank; i += 16) {
      const V16 uv = load(ut + i);
      for (uint32_t r = 0; r < rows; ++r) dot[r] = fma(reader.at(row0 + r, i), uv, dot[r]);
    }
    if (i < rank) {
      const V16 uv = load_first(ut + i, rank - i);
      for (uint32_t r = 0; r < rows; ++r) {
        dot[r] = fma(reader.first(row0 + r, i, rank - i), uv, dot[r]);
      }
    }
    float* at = acc + size_t{t} * kPanelRows;
    store(at, fma(broadcast(scale), sum_each(dot), load(at)));
  }
}

#if defined(METAL_LORA_HAS_NARROW_ROWS)
template <int kRank>
inline void expand_narrow(
    const LoraView& lora, uint32_t m, const float* u, uint32_t row0, float* acc) {
  const uint16_t* b = static_cast<const uint16_t*>(lora.b) + size_t{row0} * kRank;
  const V16 scale = broadcast(lora.params.scale);
  for (uint32_t t = 0; t < m; ++t, u += kRank, acc += kPanelRows) {
    store(acc, fma(scale, narrow_rows_dot<kRank>(b, u), load(acc)));
  }
}
#endif

inline void expand(
    const LoraView& lora, uint32_t m, const float* u, uint32_t row0, uint32_t rows, float* acc) {
#if defined(METAL_LORA_HAS_NARROW_ROWS)
  const bool dense = lora.b_stride == 0 || lora.b_stride == lora.params.rank;
  if (lora.params.dtype == DType::bf16 && rows == kPanelRows && dense) {
    if (lora.params.rank == 16) return expand_narrow<16>(lora, m, u, row0, acc);
    if (lora.params.rank == 8) return expand_narrow<8>(lora, m, u, row0, acc);
  }
#endif
  WeightView b;
  const uint32_t rank = lora.params.rank;
  b.params.k = lora.b_stride != 0 ? lora.b_stride : rank;
  b.data = lora.b;
  const float scale = lora.params.scale;
  switch (lora.params.dtype) {
    case DType::f32:
      return expand_rows<RowsF32>(b, rank, scale, m, u, row0, rows, acc);
    case DType::f16:
      return expand_rows<RowsF16>(b, rank, scale, m, u, row0, rows, acc);
    case DType::bf16:
      return expand_rows<RowsBf16>(b, rank, scale, m, u, row0, rows, acc);
  }
}

inline void widen(size_t count, DType dtype, const void* x, float* f32) {
  if (dtype == DType::f32) {
    std::memcpy(f32, x, count * sizeof(float));
    return;
  }
  const auto* words = static_cast<const uint16_t*>(x);
  const bool half = dtype == DType::f16;
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    store(f32 + i, half ? load_f16(words + i) : load_bf16(words + i));
  }
  const size_t rest = count - i;
  if (rest == 0) return;
  store_first(
      f32 + i, half ? load_f16_first(words + i, rest) : load_bf16_first(words + i, rest), rest);
}

inline void sums(uint32_t m, uint32_t k, const float* f32, float* out) {
  const uint32_t spans = k / kSumSpan;
  const auto span = [](const float* p) { return add(load(p), load(p + 16)); };
  for (uint32_t t = 0; t < m; ++t) {
    const float* x = f32 + size_t{t} * k;
    float* sum = out + size_t{t} * spans;
    for (uint32_t s = 0; s < spans; s += 16) {
      const uint32_t n = spans - s < 16 ? spans - s : 16;
      V16 part[16];
      for (uint32_t i = 0; i < 16; ++i) {
        part[i] = i < n ? span(x + size_t{s + i} * kSumSpan) : zero();
      }
      store_first(sum + s, sum_each(part), n);
    }
  }
}

/// Rows of the panels that row0 … row0 + rows - 1 lie in, transposed 16 values at a time.
inline void dequantize_packed_rows(const WeightView& w, uint32_t row0, uint32_t rows, float* out) {
  constexpr uint32_t kSpan = 32;
  alignas(64) float columns[kSpan * kPanelRows];
  const uint32_t k = w.params.k, end = row0 + rows;
  for (uint32_t panel_index = row0 / kPanelRows; panel_index * kPanelRows < end; ++panel_index) {
    const uint32_t first = panel_index * kPanelRows;
    const uint32_t begin = first > row0 ? first : row0;
    const uint32_t stop = first + kPanelRows < end ? first + kPanelRows : end;
    for (uint32_t k0 = 0; k0 < k; k0 += kSpan) {
      dequantize_panel_f32(w, panel_index, k0, k0 + kSpan, columns);
      for (uint32_t row = begin; row < stop; ++row) {
        float* to = out + size_t{row - row0} * k + k0;
        for (uint32_t i = 0; i < kSpan; ++i) to[i] = columns[i * kPanelRows + row - first];
      }
    }
  }
}

template <class Rows>
void dequantize_row_major(const WeightView& w, uint32_t row0, uint32_t rows, float* out) {
  const Rows reader(w);
  for (uint32_t row = 0; row < rows; ++row) {
    float* to = out + size_t{row} * reader.k;
    size_t i = 0;
    for (; i + 16 <= reader.k; i += 16) store(to + i, reader.at(row0 + row, i));
    if (i < reader.k) {
      store_first(to + i, reader.first(row0 + row, i, reader.k - i), reader.k - i);
    }
  }
}

inline void dequantize(const WeightView& w, uint32_t row0, uint32_t rows, float* out) {
  const bool packed = w.params.layout == WeightLayout::cpu_packed;
  switch (w.params.format) {
    case WeightFormat::int4:
      return packed ? dequantize_packed_rows(w, row0, rows, out)
                    : dequantize_row_major<AffineRows<false>>(w, row0, rows, out);
    case WeightFormat::int8:
      return packed ? dequantize_packed_rows(w, row0, rows, out)
                    : dequantize_row_major<AffineRows<true>>(w, row0, rows, out);
    case WeightFormat::nf4:
      return packed ? dequantize_packed_rows(w, row0, rows, out)
                    : dequantize_row_major<Nf4Rows>(w, row0, rows, out);
    case WeightFormat::f32:
      return dequantize_row_major<RowsF32>(w, row0, rows, out);
    case WeightFormat::f16:
      return dequantize_row_major<RowsF16>(w, row0, rows, out);
    case WeightFormat::bf16:
      return dequantize_row_major<RowsBf16>(w, row0, rows, out);
  }
}

inline constexpr GemvKernels kGemvKernels = {
    panel, expand, widen, sums, dequantize, dequantize_panel_bf16};

}  // namespace metal_lora::cpu::METAL_LORA_SIMD_NS
