// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Source of elementwise_<isa>.cpp: compiled once per instruction set (see simd.h).
#pragma once

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/simd.h"

namespace metal_lora::cpu::METAL_LORA_SIMD {
namespace {

template <class E>
METAL_LORA_INLINE const typename E::T* as(const void* p) {
  return static_cast<const typename E::T*>(p);
}
template <class E>
METAL_LORA_INLINE typename E::T* as(void* p) {
  return static_cast<typename E::T*>(p);
}

void convert(size_t n, DType x_dtype, const void* x, DType y_dtype, void* y) {
  with_element(x_dtype, [&](auto ex) {
    with_element(y_dtype, [&](auto ey) {
      using X = decltype(ex);
      using Y = decltype(ey);
      for_lanes(n, [&](size_t i, auto part) {
        Y::store(as<Y>(y) + i, X::load(as<X>(x) + i, part), part);
      });
    });
  });
}

// ---- RMS norm ----

METAL_LORA_INLINE float inverse_rms(VF sum_of_squares, uint32_t dims, float eps) {
  return 1.0f / __builtin_sqrtf(reduce_add(sum_of_squares) / static_cast<float>(dims) + eps);
}

template <class X, class W, class Y>
METAL_LORA_INLINE void scale_row(
    uint32_t dims, float r, const typename X::T* x, const typename W::T* w, typename Y::T* y) {
  const VF vr = set1(r);
  for_lanes(dims, [&](size_t i, auto part) {
    Y::store(y + i, X::load(x + i, part) * vr * W::load(w + i, part), part);
  });
}

void rms_norm(
    uint32_t dims,
    float eps,
    const float* x,
    DType weight_dtype,
    const void* weight,
    DType y_dtype,
    void* y) {
  VF sum{};
  for_lanes(dims, [&](size_t i, auto part) {
    const VF v = F32::load(x + i, part);
    sum = fma(v, v, sum);
  });
  const float r = inverse_rms(sum, dims, eps);
  with_element(weight_dtype, [&](auto ew) {
    with_element(y_dtype, [&](auto ey) {
      using W = decltype(ew);
      using Y = decltype(ey);
      scale_row<F32, W, Y>(dims, r, x, as<W>(weight), as<Y>(y));
    });
  });
}

template <class E>
METAL_LORA_INLINE VF add_and_square(
    uint32_t dims, const typename E::T* x, const typename E::T* residual, typename E::T* h) {
  VF sum{};
  for_lanes(dims, [&](size_t i, auto part) {
    VF v = E::load(x + i, part);
    if (residual != nullptr) v = E::rounded(v + E::load(residual + i, part));
    if (h != nullptr) E::store(h + i, v, part);
    sum = fma(v, v, sum);
  });
  return sum;
}

void add_rms_norm(
    const NormParams& p,
    const void* x,
    const void* residual,
    const void* weight,
    void* h,
    void* y) {
  with_element(p.dtype, [&](auto e) {
    using E = decltype(e);
    const VF sum = add_and_square<E>(p.dims, as<E>(x), as<E>(residual), as<E>(h));
    const float r = inverse_rms(sum, p.dims, p.eps);
    const void* normed = residual != nullptr ? h : x;
    with_element(p.weight_dtype, [&](auto ew) {
      using W = decltype(ew);
      scale_row<E, W, E>(p.dims, r, as<E>(normed), as<W>(weight), as<E>(y));
    });
  });
}

// With n = h·r: dx = dh + r·(g - n·mean(g∘n)), g = w∘dy; dweight = dy∘n.
template <class E, class W>
METAL_LORA_INLINE void norm_backward_row(
    const NormParams& p,
    const typename E::T* h,
    const typename W::T* w,
    const typename E::T* dy,
    const typename E::T* dh,
    typename E::T* dx,
    float* dweight_sum) {
  VF squares{}, dot{};
  for_lanes(p.dims, [&](size_t i, auto part) {
    const VF v = E::load(h + i, part);
    squares = fma(v, v, squares);
    dot = fma(v, W::load(w + i, part) * E::load(dy + i, part), dot);
  });
  const float r = inverse_rms(squares, p.dims, p.eps);
  const VF vr = set1(r), back = set1(reduce_add(dot) / static_cast<float>(p.dims) * r * r);
  for_lanes(p.dims, [&](size_t i, auto part) {
    const VF v = E::load(h + i, part), d = E::load(dy + i, part);
    if (dweight_sum != nullptr) {
      F32::store(dweight_sum + i, fma(d * v, vr, F32::load(dweight_sum + i, part)), part);
    }
    VF out = (W::load(w + i, part) * d - v * back) * vr;
    if (dh != nullptr) out = out + E::load(dh + i, part);
    E::store(dx + i, out, part);
  });
}

void add_rms_norm_backward(
    const NormParams& p,
    const void* h,
    const void* weight,
    const void* dy,
    const void* dh,
    void* dx,
    float* dweight_sum) {
  with_element(p.dtype, [&](auto e) {
    with_element(p.weight_dtype, [&](auto ew) {
      using E = decltype(e);
      using W = decltype(ew);
      norm_backward_row<E, W>(
          p, as<E>(h), as<W>(weight), as<E>(dy), as<E>(dh), as<E>(dx), dweight_sum);
    });
  });
}

// ---- Rotary embedding ----

template <class X, class Y>
METAL_LORA_INLINE void rope_halves(
    uint32_t half, const float* cos_sin, float sign, const typename X::T* x, typename Y::T* y) {
  const VF turn = set1(sign);
  for_lanes(half, [&](size_t i, auto part) {
    const VF a = X::load(x + i, part), b = X::load(x + half + i, part);
    const VF c = F32::load(cos_sin + i, part), s = F32::load(cos_sin + half + i, part) * turn;
    Y::store(y + i, a * c - b * s, part);
    Y::store(y + half + i, b * c + a * s, part);
  });
}

void rope_head(
    uint32_t head_dim,
    const float* cos_sin,
    bool inverse,
    DType x_dtype,
    const void* x,
    DType y_dtype,
    void* y) {
  with_element(x_dtype, [&](auto ex) {
    with_element(y_dtype, [&](auto ey) {
      using X = decltype(ex);
      using Y = decltype(ey);
      rope_halves<X, Y>(head_dim / 2, cos_sin, inverse ? -1.0f : 1.0f, as<X>(x), as<Y>(y));
    });
  });
}

// ---- SwiGLU ----

METAL_LORA_INLINE VF sigmoid(VF x) {
  return set1(1.0f) / (set1(1.0f) + exp(-x));
}

void swiglu(size_t n, DType x_dtype, const void* gate, const void* up, DType y_dtype, void* y) {
  with_element(x_dtype, [&](auto ex) {
    with_element(y_dtype, [&](auto ey) {
      using X = decltype(ex);
      using Y = decltype(ey);
      for_lanes(n, [&](size_t i, auto part) {
        const VF g = X::load(as<X>(gate) + i, part);
        // g·(up·σ) keeps a huge gate's product in range as long as the result is.
        Y::store(as<Y>(y) + i, g * sigmoid(g) * X::load(as<X>(up) + i, part), part);
      });
    });
  });
}

void swiglu_backward(
    size_t n,
    DType dtype,
    const void* gate,
    const void* up,
    const void* dy,
    void* dgate,
    void* dup) {
  with_element(dtype, [&](auto e) {
    using E = decltype(e);
    for_lanes(n, [&](size_t i, auto part) {
      const VF g = E::load(as<E>(gate) + i, part), u = E::load(as<E>(up) + i, part);
      const VF d = E::load(as<E>(dy) + i, part), s = sigmoid(g);
      // silu'(g) = σ·(1 + g·(1 - σ))
      const VF slope = s * fma(g, set1(1.0f) - s, set1(1.0f));
      E::store(as<E>(dgate) + i, d * u * slope, part);
      E::store(as<E>(dup) + i, d * g * s, part);
    });
  });
}

// ---- Cross entropy ----

void add_in_place(size_t n, const float* x, float* sum) {
  for_lanes(n, [&](size_t i, auto part) {
    F32::store(sum + i, F32::load(sum + i, part) + F32::load(x + i, part), part);
  });
}

// Lanes beyond the part count as -infinity.
template <class N>
METAL_LORA_INLINE VF load_logits(const float* p, N part) {
  const VF v = F32::load(p, part);
  if constexpr (N{}.n == kLanes) return v;
  return select(lane_index() < static_cast<int32_t>(part.n), v, set1(-kInfinity));
}

// Online over blocks that stay in the first-level cache: a block is read twice, memory once.
float logsumexp(size_t n, const float* logits) {
  constexpr size_t kBlock = 2048;
  constexpr float kLog2e = 0x1.715476p+0f;
  float best = -kInfinity;
  VF sum{};
  for (size_t begin = 0; begin < n; begin += kBlock) {
    const size_t count = n - begin < kBlock ? n - begin : kBlock;
    const float* block = logits + begin;
    VF top[4] = {set1(best), set1(best), set1(best), set1(best)};
    size_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
      for (size_t j = 0; j < 4; ++j) top[j] = max(load(block + i + j * kLanes), top[j]);
    }
    for (; i + kLanes <= count; i += kLanes) top[0] = max(load(block + i), top[0]);
    if (i < count) top[0] = max(load_logits(block + i, Part{count - i}), top[0]);
    const float higher = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
    if (higher == -kInfinity) continue;
    if (higher > best) {
      sum = sum * exp2_nonpositive(set1((best - higher) * kLog2e));
      best = higher;
    }
    const VF shift = set1(best);
    for_lanes(count, [&](size_t at, auto part) {
      VF p = exp(load_logits(block + at, part) - shift);
      sum = sum + p;
    });
  }
  return best + __builtin_logf(reduce_add(sum));
}

void softmax_gradient(
    size_t n, float logsumexp, float weight, size_t target, bool to_bf16, float* logits) {
  const VF shift = set1(logsumexp), w = set1(weight);
  const float at_target = logits[target];
  uint16_t* narrow_row = reinterpret_cast<uint16_t*>(logits);
  for_lanes(n, [&](size_t i, auto part) {
    const VF d = w * exp(F32::load(logits + i, part) - shift);
    // bf16 element i lies at or before f32 element i / 2: what is still to be read stays intact.
    if (to_bf16) {
      Bf16::store(narrow_row + i, d, part);
    } else {
      F32::store(logits + i, d, part);
    }
  });
  const VF d = w * (exp(set1(at_target) - shift) - set1(1.0f));
  if (to_bf16) {
    Bf16::store(narrow_row + target, d, Part{1});
  } else {
    F32::store(logits + target, d, Part{1});
  }
}

// ---- AdamW ----

double sum_of_squares(size_t n, const float* x) {
  constexpr size_t kHalf = kLanes / 2;
  using HalfF = float __attribute__((vector_size(kHalf * 4)));
  using VD = double __attribute__((vector_size(kHalf * 8)));
  VD sum[4] = {};
  size_t i = 0;
  for (; i + 4 * kHalf <= n; i += 4 * kHalf) {
    for (size_t j = 0; j < 4; ++j) {
      HalfF v;
      __builtin_memcpy(&v, x + i + j * kHalf, sizeof v);
      const VD d = __builtin_convertvector(v, VD);
      sum[j] += d * d;
    }
  }
  double rest = 0;
  for (; i < n; ++i) rest += static_cast<double>(x[i]) * x[i];
  const VD all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (size_t j = 0; j < kHalf; ++j) rest += all[j];
  return rest;
}

void adamw(
    size_t n,
    const Elementwise::AdamWStep& s,
    float* param,
    const float* grad,
    float* m,
    float* v) {
  const VF factor = set1(s.grad_factor), beta1 = set1(s.beta1), beta2 = set1(s.beta2);
  const VF rest1 = set1(1.0f - s.beta1), rest2 = set1(1.0f - s.beta2);
  const VF keep = set1(s.keep), step = set1(-s.step_size), unbias = set1(s.inv_sqrt_bias2);
  const VF eps = set1(s.eps);
  for_lanes(n, [&](size_t i, auto part) {
    const VF g = F32::load(grad + i, part) * factor;
    const VF new_m = fma(beta1, F32::load(m + i, part), rest1 * g);
    const VF new_v = fma(beta2, F32::load(v + i, part), rest2 * g * g);
    const VF direction = new_m / fma(sqrt(new_v), unbias, eps);
    F32::store(m + i, new_m, part);
    F32::store(v + i, new_v, part);
    F32::store(param + i, fma(step, direction, keep * F32::load(param + i, part)), part);
  });
}

// ---- Attention of single queries ----

inline constexpr uint32_t kKeyBlock = 64;
inline constexpr uint32_t kMaxHeadDim = 256;
inline constexpr float kLog2eF = 0x1.715476p+0f;

// scores[h][j] = q_h·k_j for up to 64 keys; a head's sum is the same whatever H is.
template <class E, uint32_t H>
METAL_LORA_INLINE void score_keys(
    uint32_t head_dim,
    const float* q,
    const typename E::T* k,
    size_t k_stride,
    uint32_t keys,
    float (*scores)[kKeyBlock]) {
  for (uint32_t j = 0; j < keys; ++j) {
    VF sum[H] = {};
    for_lanes(head_dim, [&](size_t i, auto part) {
      const VF kv = E::load(k + j * k_stride + i, part);
#pragma GCC unroll 4
      for (uint32_t h = 0; h < H; ++h) {
        sum[h] = fma(F32::load(q + h * head_dim + i, part), kv, sum[h]);
      }
    });
#pragma GCC unroll 4
    for (uint32_t h = 0; h < H; ++h) scores[h][j] = reduce_add(sum[h]);
  }
}

// scores become exp2(scale·s - max); state and acc are brought to the new maximum.
METAL_LORA_INLINE void block_softmax(
    uint32_t head_dim, float scale, uint32_t keys, float* scores, SoftmaxState* state, float* acc) {
  for (uint32_t j = keys; j % kLanes != 0; ++j) scores[j] = scores[0];
  const size_t padded = (keys + kLanes - 1) / kLanes * kLanes;
  const VF vscale = set1(scale);
  VF top = set1(state->max);
  for (size_t j = 0; j < padded; j += kLanes) {
    const VF s = load(scores + j) * vscale;
    top = max(s, top);
    store(scores + j, s);
  }
  const float best = reduce_max(top);
  if (best > state->max) {
    const VF factor = exp2_nonpositive(set1((state->max - best) * kLog2eF));
    state->sum *= factor[0];
    for_lanes(head_dim, [&](size_t i, auto part) {
      F32::store(acc + i, F32::load(acc + i, part) * factor, part);
    });
    state->max = best;
  }
  const VF shift = set1(state->max), log2e = set1(kLog2eF);
  VF sum{};
  for_lanes(keys, [&](size_t j, auto part) {
    VF p = exp2_nonpositive((load(scores + j) - shift) * log2e);
    if constexpr (decltype(part){}.n != kLanes) {
      p = select(lane_index() < static_cast<int32_t>(part.n), p, VF{});
    }
    store(scores + j, p);
    sum = sum + p;
  });
  state->sum += reduce_add(sum);
}

// acc_h += Σ_j p[h][j]·v_j.
template <class E, uint32_t H>
METAL_LORA_INLINE void add_values(
    uint32_t head_dim,
    const float (*p)[kKeyBlock],
    const typename E::T* v,
    size_t v_stride,
    uint32_t keys,
    float* acc) {
  for_lanes(head_dim, [&](size_t i, auto part) {
    VF sum[H];
#pragma GCC unroll 4
    for (uint32_t h = 0; h < H; ++h) sum[h] = F32::load(acc + h * head_dim + i, part);
    for (uint32_t j = 0; j < keys; ++j) {
      const VF value = E::load(v + j * v_stride + i, part);
#pragma GCC unroll 4
      for (uint32_t h = 0; h < H; ++h) sum[h] = fma(set1(p[h][j]), value, sum[h]);
    }
#pragma GCC unroll 4
    for (uint32_t h = 0; h < H; ++h) F32::store(acc + h * head_dim + i, sum[h], part);
  });
}

template <class E, uint32_t H>
void attend_heads(
    uint32_t head_dim,
    float scale,
    const float* q,
    const typename E::T* k,
    size_t k_stride,
    const typename E::T* v,
    size_t v_stride,
    uint32_t keys,
    SoftmaxState* state,
    float* acc) {
  alignas(64) float scores[H][kKeyBlock];
  for (uint32_t begin = 0; begin < keys; begin += kKeyBlock) {
    const uint32_t count = keys - begin < kKeyBlock ? keys - begin : kKeyBlock;
    score_keys<E, H>(head_dim, q, k + begin * k_stride, k_stride, count, scores);
    for (uint32_t h = 0; h < H; ++h) {
      block_softmax(head_dim, scale, count, scores[h], state + h, acc + h * head_dim);
    }
    add_values<E, H>(head_dim, scores, v + begin * v_stride, v_stride, count, acc);
  }
}

void attend_keys(
    uint32_t heads,
    uint32_t head_dim,
    float scale,
    const float* q,
    DType kv_dtype,
    const void* k,
    size_t k_stride,
    const void* v,
    size_t v_stride,
    uint32_t keys,
    SoftmaxState* state,
    float* acc) {
  with_element(kv_dtype, [&](auto e) {
    using E = decltype(e);
    for (uint32_t h = 0; h < heads;) {
      const uint32_t count = heads - h < 4 ? heads - h : 4;
      const auto run = count == 4   ? attend_heads<E, 4>
                       : count == 3 ? attend_heads<E, 3>
                       : count == 2 ? attend_heads<E, 2>
                                    : attend_heads<E, 1>;
      const size_t at = size_t{h} * head_dim;
      run(head_dim,
          scale,
          q + at,
          as<E>(k),
          k_stride,
          as<E>(v),
          v_stride,
          keys,
          state + h,
          acc + at);
      h += count;
    }
  });
}

float combine_attention(
    uint32_t head_dim,
    uint32_t parts,
    const SoftmaxState* states,
    size_t state_stride,
    const float* accs,
    size_t acc_stride,
    DType y_dtype,
    void* y) {
  float best = -kInfinity;
  for (uint32_t p = 0; p < parts; ++p) {
    const float top = states[p * state_stride].max;
    if (top > best || top != top) best = top;
  }
  alignas(64) float total[kMaxHeadDim] = {};
  float sum = 0;
  for (uint32_t p = 0; p < parts; ++p) {
    const SoftmaxState& s = states[p * state_stride];
    if (s.max == -kInfinity) continue;
    const VF factor = exp2_nonpositive(set1((s.max - best) * kLog2eF));
    sum += s.sum * factor[0];
    const float* acc = accs + p * acc_stride;
    for_lanes(head_dim, [&](size_t i, auto part) {
      F32::store(
          total + i, fma(factor, F32::load(acc + i, part), F32::load(total + i, part)), part);
    });
  }
  const VF inverse = set1(sum == 0 ? 0.0f : 1.0f / sum);
  with_element(y_dtype, [&](auto e) {
    using E = decltype(e);
    for_lanes(head_dim, [&](size_t i, auto part) {
      E::store(as<E>(y) + i, F32::load(total + i, part) * inverse, part);
    });
  });
  return sum == 0 ? -kInfinity : best + __builtin_logf(sum);
}

}  // namespace

inline constexpr Elementwise kElementwise = {
    .convert = convert,
    .rms_norm = rms_norm,
    .add_rms_norm = add_rms_norm,
    .add_rms_norm_backward = add_rms_norm_backward,
    .rope_head = rope_head,
    .swiglu = swiglu,
    .swiglu_backward = swiglu_backward,
    .add_in_place = add_in_place,
    .logsumexp = logsumexp,
    .softmax_gradient = softmax_gradient,
    .sum_of_squares = sum_of_squares,
    .adamw = adamw,
    .attend_keys = attend_keys,
    .combine_attention = combine_attention,
};

}  // namespace metal_lora::cpu::METAL_LORA_SIMD
