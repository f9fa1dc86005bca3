// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Attention and its gradients in f64, with bounds of a kernel's errors: for the tests of every
// backend.
#pragma once

#include <algorithm>

#include "tests/kernels/transformer_reference.h"

namespace metal_lora::cpu::transformer_test {

struct Shape {
  uint32_t q_tokens, kv_tokens, q_heads, kv_heads, head_dim, kv_offset, window;
  std::vector<int32_t> segments;  // per query, or empty
  uint32_t gap = 0;               // elements between tokens beyond the heads
  float scale = 0;                // 0: 1/sqrt(head_dim)
};

inline AttentionParams params_of(const Shape& s, DType dtype) {
  AttentionParams p;
  p.q_tokens = s.q_tokens, p.kv_tokens = s.kv_tokens;
  p.q_heads = s.q_heads, p.kv_heads = s.kv_heads, p.head_dim = s.head_dim;
  p.kv_offset = s.kv_offset, p.window = s.window, p.dtype = dtype;
  p.scale = s.scale != 0 ? s.scale : 1.0f / std::sqrt(static_cast<float>(s.head_dim));
  p.q_stride = s.q_heads * s.head_dim + s.gap;
  p.k_stride = s.kv_heads * s.head_dim + 2 * s.gap;
  p.v_stride = s.kv_heads * s.head_dim + 3 * s.gap;
  p.o_stride = s.q_heads * s.head_dim;
  return p;
}

inline const int32_t* segments(const Shape& s) {
  return s.segments.empty() ? nullptr : s.segments.data();
}

inline bool sees(const Shape& s, uint32_t i, uint32_t j) {
  const int64_t at = int64_t{s.kv_offset} + i;
  int64_t first = s.segments.empty() ? 0 : s.segments[i];
  if (s.window != 0) first = std::max(first, at - s.window + 1);
  return j >= first && j <= at;
}

inline std::vector<int32_t> segment_starts(
    std::initializer_list<uint32_t> lengths, uint32_t kv_offset = 0) {
  std::vector<int32_t> starts;
  uint32_t begin = kv_offset;
  for (const uint32_t n : lengths) {
    starts.insert(starts.end(), n, static_cast<int32_t>(begin));
    begin += n;
  }
  return starts;
}

/// What is stored, in f64.
struct AttentionValues {
  AttentionParams p;
  std::vector<double> q, k, v, dout;
};

/// How a kernel rounds: the probabilities and dS where they are multiplied in 16 bits (relative,
/// and absolute below the smallest normal number), and each step of its f32 sums.
struct AttentionRounding {
  double u_p = 0, p_step = 0, u = 0x1p-24;
};

/// f64, with a bound of the kernel's error beside each value.
struct Reference {
  Reference(const Shape& s, const AttentionValues& x, const AttentionRounding& r)
      : shape(s), p(x.p), q(x.q), k(x.k), v(x.v), dout(x.dout), u(r.u), p_step(r.p_step) {
    const size_t no = size_t{p.q_tokens} * p.o_stride, nq = size_t{p.q_tokens} * p.q_stride;
    out.resize(no), out_bound.resize(no), dq.resize(nq), dq_bound.resize(nq);
    dk.resize(p.kv_tokens * p.k_stride), dk_bound.resize(dk.size());
    dv.resize(p.kv_tokens * p.v_stride), dv_bound.resize(dv.size());
    lse.resize(size_t{p.q_heads} * p.q_tokens), lse_bound.resize(lse.size());
    for (uint32_t h = 0; h < p.q_heads; ++h) {
      for (uint32_t i = 0; i < p.q_tokens; ++i) row(h, i, r.u_p);
    }
    const double u_out = unit_roundoff(p.dtype), step = smallest_step(p.dtype);
    const auto store = [&](const std::vector<double>& x, std::vector<double>& bound) {
      for (size_t i = 0; i < x.size(); ++i)
        bound[i] = bound[i] * (1 + u_out) + u_out * std::fabs(x[i]) + step;
    };
    store(out, out_bound), store(dq, dq_bound), store(dk, dk_bound), store(dv, dv_bound);
  }

  void row(uint32_t h, uint32_t i, double u_p) {
    const size_t d = p.head_dim, kv = h / (p.q_heads / p.kv_heads);
    const double* qr = &q[i * p.q_stride + h * d];
    std::vector<uint32_t> keys;
    std::vector<double> s, sa;  // scores, and scale·Σ|q||k|
    double top = -INFINITY;
    for (uint32_t j = 0; j < p.kv_tokens; ++j) {
      if (!sees(shape, i, j)) continue;
      double dot = 0, magnitude = 0;
      for (size_t c = 0; c < d; ++c) {
        const double x = qr[c] * k[j * p.k_stride + kv * d + c];
        dot += x, magnitude += std::fabs(x);
      }
      keys.push_back(j), s.push_back(p.scale * dot), sa.push_back(std::fabs(p.scale) * magnitude);
      top = std::max(top, s.back());
    }
    const size_t n = keys.size(), at = h * p.q_tokens + i;
    if (n == 0) {
      lse[at] = -INFINITY;
      return;
    }
    double sum = 0, score_error = 0;
    for (size_t j = 0; j < n; ++j) {
      sum += std::exp(s[j] - top);
      // (d + 1) roundings of the dot product, 4 of scaling and shifting (each ≤ u·|s|).
      score_error = std::max(score_error, (d + 5) * u * sa[j]);
    }
    const double log_sum = top + std::log(sum);
    lse[at] = log_sum;
    // exp2 is good to 4 u, n sums, a log.
    lse_bound[at] = score_error + (n + 8) * u + 4 * u * std::fabs(log_sum);
    // Relative error of a normalised probability: its own score, its share of the sum, exp2.
    const double rel = 2 * score_error + (n + 16) * u + 2 * u * std::fabs(log_sum);
    const double u_out = unit_roundoff(p.dtype);
    std::vector<double> prob(n), dp(n), dp_abs(n, 0);
    for (size_t j = 0; j < n; ++j) prob[j] = std::exp(s[j] - log_sum);
    double big_d = 0, big_d_error = 0;
    for (size_t c = 0; c < d; ++c) {
      double o = 0, o_abs = 0, v_abs = 0;
      for (size_t j = 0; j < n; ++j) {
        const double x = v[keys[j] * p.v_stride + kv * d + c];
        o += prob[j] * x, o_abs += prob[j] * std::fabs(x), v_abs += std::fabs(x);
      }
      const size_t to = i * p.o_stride + h * d + c;
      out[to] = o;
      out_bound[to] = (rel + u_p + (n + 4) * u) * o_abs + p_step * v_abs;
      const double g = dout[to];
      big_d += o * g;
      // D is taken from out as it was stored.
      big_d_error +=
          (out_bound[to] + (u_out + d * u) * o_abs + smallest_step(p.dtype)) * std::fabs(g);
    }
    for (size_t j = 0; j < n; ++j) {
      for (size_t c = 0; c < d; ++c) {
        const double g = dout[i * p.o_stride + h * d + c];
        const double x = g * v[keys[j] * p.v_stride + kv * d + c];
        dp[j] += x, dp_abs[j] += std::fabs(x);
        dv[keys[j] * p.v_stride + kv * d + c] += prob[j] * g;
        dv_bound[keys[j] * p.v_stride + kv * d + c] +=
            ((rel + u_p + (p.q_tokens + 2) * u) * prob[j] + p_step) * std::fabs(g);
      }
      const double ds = prob[j] * (dp[j] - big_d);
      const double ds_error =
          p_step + prob[j] * ((d + 2) * u * dp_abs[j] + big_d_error) +
          (rel + u_p + (p.q_tokens + n + 8) * u) * prob[j] * (dp_abs[j] + std::fabs(big_d));
      const double scale = p.scale, scale_abs = std::fabs(scale);
      for (size_t c = 0; c < d; ++c) {
        const size_t qi = i * p.q_stride + h * d + c, kj = keys[j] * p.k_stride + kv * d + c;
        dq[qi] += scale * ds * k[kj], dq_bound[qi] += scale_abs * ds_error * std::fabs(k[kj]);
        dk[kj] += scale * ds * q[qi], dk_bound[kj] += scale_abs * ds_error * std::fabs(q[qi]);
      }
    }
  }

  const Shape& shape;
  AttentionParams p;
  std::vector<double> q, k, v, dout;
  double u, p_step;
  std::vector<double> out, out_bound, lse, lse_bound, dq, dq_bound, dk, dk_bound, dv, dv_bound;
};

}  // namespace metal_lora::cpu::transformer_test
