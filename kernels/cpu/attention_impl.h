// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Source of attention_<isa>.cpp: compiled once per instruction set (see simd.h).
//
// Scores are kept transposed, [key, query], with queries across the lanes of a vector: the running
// maximum and sum of softmax, its masks and its rescaling are then plain vertical operations, and
// every product is "broadcast one word of A, multiply by vectors of B", with A in memory as it is:
//   forward   Sᵀ = K·Qᵀ      Oᵀ += Vᵀ·Pᵀ
//   backward  Sᵀ = K·Qᵀ      dPᵀ = V·dOᵀ     dQᵀ += Kᵀ·dSᵀ     dV += Pᵀ·dO     dK += dSᵀ·Q
// A word is one f32, or two bf16 neighbours along the summed index where bf16 dot products exist.
#pragma once

#include "kernels/cpu/attention_products.h"
#include "kernels/cpu/attention_tiles.h"

namespace metal_lora::cpu::METAL_LORA_SIMD {
namespace {

inline constexpr float kLog2e = 0x1.715476p+0f, kLn2 = 0x1.62e430p-1f;
inline constexpr int32_t kNever = 0x7fffffff;

// What the softmax of one head needs, with the sign of the scale moved into q.
struct Scale {
  bool negate;
  float log2;  // |scale|·log2 e; not 0, so that -infinity times it stays -infinity
};

Scale softmax_scale(float scale) {
  const float magnitude = (scale < 0 ? -scale : scale) * kLog2e;
  return {scale < 0, magnitude < 0x1p-126f ? 0x1p-126f : magnitude};
}

// The keys each lane of a query block sees: [first, last]; lanes without a query see none.
struct Visible {
  alignas(64) int32_t first[kBlock];
  alignas(64) int32_t last[kBlock];
  // Of strip s: keys at or past `end` are seen by none; all of [low, high] are seen by every lane.
  int32_t low[kStrips], high[kStrips], end[kStrips];
};

void find_visible(const AttentionParams& p, const QueryBlock& block, Visible& v) {
  const int32_t kv_last = static_cast<int32_t>(p.kv_tokens) - 1;
  for (size_t s = 0; s < kStrips; ++s) {
    v.low[s] = 0, v.high[s] = kNever, v.end[s] = 0;
    for (size_t i = s * kStripLanes; i < (s + 1) * kStripLanes; ++i) {
      if (i >= block.count) {
        v.first[i] = kNever, v.last[i] = -1;
      } else {
        const int32_t position = static_cast<int32_t>(p.kv_offset + block.begin + i);
        int32_t first = static_cast<int32_t>(block.segment);
        if (p.window != 0 && position - first >= static_cast<int32_t>(p.window)) {
          first = position - static_cast<int32_t>(p.window) + 1;
        }
        v.first[i] = first;
        v.last[i] = position < kv_last ? position : kv_last;
      }
      v.low[s] = v.first[i] > v.low[s] ? v.first[i] : v.low[s];
      v.high[s] = v.last[i] < v.high[s] ? v.last[i] : v.high[s];
      v.end[s] = v.last[i] + 1 > v.end[s] ? v.last[i] + 1 : v.end[s];
    }
  }
}

// Keys [begin, begin + count) of the block that strip s looks at, and whether lanes differ there.
struct StripKeys {
  uint32_t count;
  bool masked;
};

METAL_LORA_INLINE StripKeys strip_keys(const Visible& v, size_t s, uint32_t begin, uint32_t count) {
  const int32_t seen = v.end[s] - static_cast<int32_t>(begin);
  if (seen <= 0) return {0, false};
  const uint32_t n = static_cast<uint32_t>(seen) < count ? static_cast<uint32_t>(seen) : count;
  const int32_t first = static_cast<int32_t>(begin), last = static_cast<int32_t>(begin + n - 1);
  return {n, first < v.low[s] || last > v.high[s]};
}

METAL_LORA_INLINE VI visible_mask(const Visible& v, size_t lane, uint32_t key) {
  const VI k = set1_int(static_cast<int32_t>(key));
  const VI first = load_vector<VI>(v.first + lane, Full{}),
           last = load_vector<VI>(v.last + lane, Full{});
  return (k >= first) & (k <= last);
}

template <class T>
METAL_LORA_INLINE T* take(char*& scratch, size_t count) {
  T* p = reinterpret_cast<T*>(scratch);
  scratch += (count * sizeof(T) + 63) / 64 * 64;
  return p;
}

// ---- Forward ----

struct SoftmaxLanes {
  alignas(64) float shift[kBlock];  // the largest |scale|·s·log2 e so far
  alignas(64) float sum[kBlock];
  alignas(64) float rescale[kBlock];
};

// s [keys, strip] -> probabilities, as the words that the product with Vᵀ takes.
template <class Op>
METAL_LORA_INLINE void strip_softmax(
    float log2_scale,
    const Visible& visible,
    size_t lane,
    uint32_t key,
    StripKeys keys,
    float* s,
    float* words,
    SoftmaxLanes& state) {
  const VF c = set1(log2_scale);
#pragma GCC unroll 2
  for (size_t v = 0; v < kStripVectors; ++v) {
    float* column = s + v * kLanes;
    const size_t at = lane + v * kLanes;
    VF top = set1(-kInfinity);
    if (keys.masked) {
      for (uint32_t j = 0; j < keys.count; ++j) {
        VF x = load(column + j * kStripLanes);
        x = select(visible_mask(visible, at, key + j), x, set1(-kInfinity));
        store(column + j * kStripLanes, x);
        top = max(top, x);
      }
    } else {
      VF other = top;
      uint32_t j = 0;
      for (; j + 2 <= keys.count; j += 2) {
        top = max(top, load(column + j * kStripLanes));
        other = max(other, load(column + (j + 1) * kStripLanes));
      }
      if (j < keys.count) top = max(top, load(column + j * kStripLanes));
      top = max(other, top);
    }
    const VF old = load(state.shift + at), next = max(old, top * c);
    // A lane that has seen no key yet keeps -infinity but shifts by 0.
    const VF shift = select(next == -kInfinity, VF{}, next);
    const VF rescale = exp2_nonpositive(old - shift);
    VF sum = load(state.sum + at) * rescale;
    store(state.shift + at, next);
    store(state.rescale + at, rescale);
    sum = Op::exponentials(column, keys.count, c, -shift, words + v * kLanes, sum);
    store(state.sum + at, sum);
  }
}

template <class E, class Op>
void write_out(
    const AttentionParams& p,
    const QueryBlock& block,
    const SoftmaxLanes& state,
    float* ot,
    float* rows,
    void* out,
    float* logsumexp) {
  const size_t d = p.head_dim, dp = pad(d);
  for (size_t s = 0; s * kStripLanes < block.count; ++s) {
    float* strip = ot + s * d * kStripLanes;
    for (size_t v = 0; v < kStripVectors; ++v) {
      const VF sum = load(state.sum + s * kStripLanes + v * kLanes);
      const VF inverse = select(sum == 0.0f, VF{}, set1(1.0f) / sum);
      for (size_t i = 0; i < d; ++i) {
        float* at = strip + i * kStripLanes + v * kLanes;
        store(at, load(at) * inverse);
      }
    }
    write_transposed<E>(
        strip,
        d,
        dp,
        rows,
        block.count - s * kStripLanes,
        static_cast<typename E::T*>(out) + (block.begin + s * kStripLanes) * p.o_stride,
        p.o_stride);
  }
  if (logsumexp == nullptr) return;
  for (size_t i = 0; i < block.count; ++i) {
    logsumexp[block.begin + i] =
        state.sum[i] == 0 ? -kInfinity : state.shift[i] * kLn2 + __builtin_logf(state.sum[i]);
  }
}

template <class E, class Op>
void forward_block(
    const AttentionHead& head,
    const QueryBlock& block,
    void* out,
    float* logsumexp,
    void* scratch) {
  const AttentionParams& p = *head.params;
  const size_t d = p.head_dim, dp = pad(d), dw = Op::words(d);
  const Scale scale = softmax_scale(p.scale);
  char* free = static_cast<char*>(scratch);
  float* staged = take<float>(free, kBlock * dp);
  float* qt = take<float>(free, kBlock * pad4(dw));
  float* ot = take<float>(free, kBlock * d);
  float* s = take<float>(free, kBlock * kStripLanes);
  float* words = Op::kWordElements == 1 ? s : take<float>(free, kBlock / 2 * kStripLanes);
  KeyBlock<E, Op> keys(p, free);

  Visible visible;
  find_visible(p, block, visible);
  SoftmaxLanes state;
  for (size_t i = 0; i < kBlock; ++i) state.shift[i] = -kInfinity, state.sum[i] = 0;
  __builtin_memset(ot, 0, kBlock * d * sizeof(float));
  const auto* q = static_cast<const typename E::T*>(head.q) + block.begin * p.q_stride;
  stage_rows<E, Op>(q, p.q_stride, block.count, d, scale.negate, staged);
  transpose_staged<Op>(staged, block.count, d, qt);

  for (uint32_t key = block.key_begin; key < block.key_end; key += kAttentionBlock) {
    const uint32_t left = block.key_end - key;
    const uint32_t count = left < kAttentionBlock ? left : kAttentionBlock;
    keys.load(head, key, count);
    keys.pair_values(count);
    for (size_t strip = 0; strip * kStripLanes < block.count; ++strip) {
      const StripKeys seen = strip_keys(visible, strip, key, count);
      if (seen.count == 0) continue;
      multiply<Op, Sum::set>(
          seen.count,
          kStripLanes,
          dw,
          keys.k,
          qt + strip * pad4(dw) * kStripLanes,
          kStripLanes,
          s,
          kStripLanes);
      strip_softmax<Op>(scale.log2, visible, strip * kStripLanes, key, seen, s, words, state);
      multiply<Op, Sum::rescale>(
          d,
          kStripLanes,
          Op::words(seen.count),
          keys.vt,
          words,
          kStripLanes,
          ot + strip * d * kStripLanes,
          kStripLanes,
          state.rescale + strip * kStripLanes);
    }
  }
  write_out<E, Op>(p, block, state, ot, staged, out, logsumexp);
}

// ---- Backward ----

// Of each lane: logsumexp·log2 e, and D = dO·O (the softmax's own part of dS).
struct GradientLanes {
  alignas(64) float shift[kBlock];
  alignas(64) float dot[kBlock];
};

template <class E>
void find_lanes(
    const AttentionParams& p,
    const QueryBlock& block,
    const AttentionHeadGradient& g,
    GradientLanes& lanes) {
  using T = typename E::T;
  for (size_t i = 0; i < kBlock; ++i) lanes.shift[i] = 0, lanes.dot[i] = 0;
  for (size_t i = 0; i < block.count; ++i) {
    const size_t row = (block.begin + i) * p.o_stride;
    const T *out = static_cast<const T*>(g.out) + row, *dout = static_cast<const T*>(g.dout) + row;
    VF sum{};
    for_lanes(p.head_dim, [&](size_t at, auto part) {
      sum = fma(E::load(out + at, part), E::load(dout + at, part), sum);
    });
    lanes.dot[i] = reduce_add(sum);
    const float lse = g.logsumexp[block.begin + i];
    lanes.shift[i] = lse == -kInfinity ? 0.0f : lse * kLog2e;
  }
}

// Buffers of backward; a row of s, dp, p and ds has one entry per query of the block.
template <class Op>
struct GradientScratch {
  GradientScratch(const AttentionParams& params, char*& free) {
    const size_t d = params.head_dim, padded = pad(d), dw = Op::words(d);
    staged = take<float>(free, kBlock * padded);
    qt = take<float>(free, kBlock * pad4(dw));
    dot = take<float>(free, kBlock * pad4(dw));
    q_rows = take<float>(free, kBlock * padded);
    do_rows = take<float>(free, kBlock * padded);
    dqt = take<float>(free, kBlock * d);
    s = take<float>(free, kBlock * kBlock);
    dp = take<float>(free, kBlock * kBlock);
    if constexpr (Op::kWordElements == 1) {
      p_rows = s, ds_rows = ds_words = dp;
    } else {
      p_rows = take<float>(free, kBlock * kBlock / 2);
      ds_rows = take<float>(free, kBlock * kBlock / 2);
      ds_words = take<float>(free, kBlock * kBlock / 2);
    }
  }
  float *staged, *qt, *dot, *q_rows, *do_rows, *dqt, *s, *dp;
  float *p_rows, *ds_rows, *ds_words;
};

// P = 2^(s - shift), dS = P∘(dP - D) for one strip, in the layouts that the products take.
template <class Op>
METAL_LORA_INLINE void strip_gradient(
    float log2_scale,
    const Visible& visible,
    const GradientLanes& lanes,
    size_t strip,
    uint32_t key,
    StripKeys keys,
    const GradientScratch<Op>& b) {
  const VF c = set1(log2_scale);
  VF shift[kStripVectors], dot[kStripVectors];
  for (size_t v = 0; v < kStripVectors; ++v) {
    shift[v] = load(lanes.shift + strip * kStripLanes + v * kLanes);
    dot[v] = load(lanes.dot + strip * kStripLanes + v * kLanes);
  }
  const auto gradients = [&](uint32_t j, VF(&p)[kStripVectors], VF(&ds)[kStripVectors]) {
#pragma GCC unroll 2
    for (size_t v = 0; v < kStripVectors; ++v) {
      const size_t lane = strip * kStripLanes + v * kLanes, at = j * kBlock + lane;
      VF x = fma(load(b.s + at), c, -shift[v]);
      if (keys.masked) {
        x = select(visible_mask(visible, lane, key + j), x, set1(-kInfinity));
      }
      p[v] = exp2_nonpositive(x);
      ds[v] = p[v] * (load(b.dp + at) - dot[v]);
    }
  };
  VF p[2][kStripVectors], ds[2][kStripVectors];
  uint32_t j = 0;
  for (; j + 2 <= keys.count; j += 2) {
    gradients(j, p[0], ds[0]);
    gradients(j + 1, p[1], ds[1]);
    Op::store_pair(strip, j, p[0], p[1], ds[0], ds[1], b.p_rows, b.ds_rows, b.ds_words);
  }
  if (j < keys.count) {
    gradients(j, p[0], ds[0]);
    for (size_t v = 0; v < kStripVectors; ++v) p[1][v] = ds[1][v] = VF{};
    Op::store_pair(strip, j, p[0], p[1], ds[0], ds[1], b.p_rows, b.ds_rows, b.ds_words);
  }
}

template <class E, class Op>
void stage_queries(
    const AttentionHead& head,
    const AttentionHeadGradient& g,
    const QueryBlock& block,
    bool negate,
    const GradientScratch<Op>& b) {
  using T = typename E::T;
  const AttentionParams& p = *head.params;
  const T* q = static_cast<const T*>(head.q) + block.begin * p.q_stride;
  const T* dout = static_cast<const T*>(g.dout) + block.begin * p.o_stride;
  stage_rows<E, Op>(q, p.q_stride, block.count, p.head_dim, negate, b.staged);
  transpose_staged<Op>(b.staged, block.count, p.head_dim, b.qt);
  stage_rows<E, Op>(q, p.q_stride, block.count, p.head_dim, false, b.staged);
  Op::pair_rows(b.staged, kBlock, pad(p.head_dim), b.q_rows);
  stage_rows<E, Op>(dout, p.o_stride, block.count, p.head_dim, false, b.staged);
  transpose_staged<Op>(b.staged, block.count, p.head_dim, b.dot);
  Op::pair_rows(b.staged, kBlock, pad(p.head_dim), b.do_rows);
}

// dV += Pᵀ·dO and dK += dSᵀ·Q for the block's keys. Keys past the end of strip s - 1 are seen only
// by strips s and later: the sums over queries start there.
template <class Op>
void add_key_gradients(
    const GradientScratch<Op>& b,
    const uint32_t (&seen)[kStrips + 1],
    size_t strips,
    size_t padded,
    float* dk,
    float* dv) {
  uint32_t row = 0;
  for (size_t s = 0; s < strips; ++s) {
    if (seen[s] <= row) continue;
    const uint32_t rows = seen[s] - row;
    const size_t first = s * kStripLanes, queries = strips * kStripLanes - first;
    const size_t skipped = first / Op::kWordElements;
    const Operand p = Op::row_operand(b.p_rows, row, first),
                  ds = Op::row_operand(b.ds_rows, row, first);
    multiply<Op, Sum::add>(
        rows,
        padded,
        Op::words(queries),
        p,
        b.do_rows + skipped * padded,
        padded,
        dv + row * padded,
        padded);
    multiply<Op, Sum::add>(
        rows,
        padded,
        Op::words(queries),
        ds,
        b.q_rows + skipped * padded,
        padded,
        dk + row * padded,
        padded);
    row = seen[s];
  }
}

template <class E, class Op>
void backward_block(
    const AttentionHead& head,
    const AttentionHeadGradient& g,
    const QueryBlock& block,
    void* scratch) {
  const AttentionParams& p = *head.params;
  const size_t d = p.head_dim, dp = pad(d), dw = Op::words(d);
  const Scale scale = softmax_scale(p.scale);
  char* free = static_cast<char*>(scratch);
  const GradientScratch<Op> b(p, free);
  KeyBlock<E, Op> keys(p, free);
  Visible visible;
  find_visible(p, block, visible);
  GradientLanes lanes;
  find_lanes<E>(p, block, g, lanes);
  stage_queries<E, Op>(head, g, block, scale.negate, b);
  __builtin_memset(b.dqt, 0, kBlock * d * sizeof(float));

  const size_t strips = (block.count + kStripLanes - 1) / kStripLanes;
  for (uint32_t key = block.key_begin; key < block.key_end; key += kAttentionBlock) {
    const uint32_t left = block.key_end - key;
    const uint32_t count = left < kAttentionBlock ? left : kAttentionBlock;
    keys.load(head, key, count);
    keys.pair_keys(count);
    uint32_t seen[kStrips + 1] = {};
    for (size_t strip = 0; strip < strips; ++strip) {
      const StripKeys strip_seen = strip_keys(visible, strip, key, count);
      seen[strip] = strip_seen.count;
      if (strip_seen.count == 0) continue;
      const size_t lane = strip * kStripLanes, at = lane * pad4(dw);
      multiply<Op, Sum::set>(
          strip_seen.count, kStripLanes, dw, keys.k, b.qt + at, kStripLanes, b.s + lane, kBlock);
      multiply<Op, Sum::set>(
          strip_seen.count, kStripLanes, dw, keys.v, b.dot + at, kStripLanes, b.dp + lane, kBlock);
      strip_gradient<Op>(scale.log2, visible, lanes, strip, key, strip_seen, b);
      multiply<Op, Sum::add>(
          d,
          kStripLanes,
          Op::words(strip_seen.count),
          keys.kt,
          b.ds_words + lane,
          kBlock,
          b.dqt + lane * d,
          kStripLanes);
    }
    add_key_gradients<Op>(b, seen, strips, dp, g.dk + key * dp, g.dv + key * dp);
  }
  const VF factor = set1(p.scale);
  for (size_t i = 0; i < strips * kStripLanes * d; i += kLanes) {
    store(b.dqt + i, load(b.dqt + i) * factor);
  }
  for (size_t s = 0; s < strips; ++s) {
    write_transposed<E>(
        b.dqt + s * d * kStripLanes,
        d,
        dp,
        b.staged,
        block.count - s * kStripLanes,
        static_cast<typename E::T*>(g.dq) + (block.begin + s * kStripLanes) * p.q_stride,
        p.q_stride);
  }
}

// ---- Choice of the type ----

// bf16 is multiplied as it is where the machine can, everything else in f32.
template <class E>
using Product = ProductOf<kHasBf16Dot && E::dtype == DType::bf16>;

void forward(
    const AttentionHead& head,
    const QueryBlock& block,
    void* out,
    float* logsumexp,
    void* scratch) {
  with_element(head.params->dtype, [&](auto e) {
    using E = decltype(e);
    forward_block<E, Product<E>>(head, block, out, logsumexp, scratch);
  });
}

void backward(
    const AttentionHead& head,
    const AttentionHeadGradient& gradient,
    const QueryBlock& block,
    void* scratch) {
  with_element(head.params->dtype, [&](auto e) {
    using E = decltype(e);
    backward_block<E, Product<E>>(head, gradient, block, scratch);
  });
}

void sum_heads(
    uint32_t heads,
    uint32_t head_dim,
    const float* sums,
    size_t stride,
    float factor,
    DType dtype,
    void* out) {
  with_element(dtype, [&](auto e) {
    using E = decltype(e);
    for_lanes(head_dim, [&](size_t i, auto part) {
      VF total = F32::load(sums + i, part);
      for (uint32_t h = 1; h < heads; ++h) total = total + F32::load(sums + h * stride + i, part);
      E::store(static_cast<typename E::T*>(out) + i, total * set1(factor), part);
    });
  });
}

uint32_t padded_dim(uint32_t head_dim) {
  return static_cast<uint32_t>(pad(head_dim));
}

// At most 12 blocks of 64 rows by head_dim, and 5 of 64 by 64.
size_t scratch_bytes(const AttentionParams& p) {
  return kBlock * sizeof(float) * (12 * (pad(p.head_dim) + 8) + 5 * kBlock);
}

}  // namespace

inline constexpr AttentionTiles kAttentionTiles = {
    .padded_dim = padded_dim,
    .scratch_bytes = scratch_bytes,
    .forward = forward,
    .backward = backward,
    .sum_heads = sum_heads,
};

}  // namespace metal_lora::cpu::METAL_LORA_SIMD
