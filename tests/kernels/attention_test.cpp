// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "kernels/cpu/transformer_kernels.h"
#include "tests/kernels/transformer_reference.h"

namespace metal_lora::cpu::transformer_test {
namespace {

constexpr double kU = 0x1p-24;

struct Shape {
  uint32_t q_tokens, kv_tokens, q_heads, kv_heads, head_dim, kv_offset, window;
  std::vector<int32_t> segments;  // per query, or empty
  uint32_t gap = 0;               // elements between tokens beyond the heads
  float scale = 0;                // 0: 1/sqrt(head_dim)
};

AttentionParams params_of(const Shape& s, DType dtype) {
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

const int32_t* segments(const Shape& s) {
  return s.segments.empty() ? nullptr : s.segments.data();
}

bool sees(const Shape& s, uint32_t i, uint32_t j) {
  const int64_t at = int64_t{s.kv_offset} + i;
  int64_t first = s.segments.empty() ? 0 : s.segments[i];
  if (s.window != 0) first = std::max(first, at - s.window + 1);
  return j >= first && j <= at;
}

struct Problem {
  Problem(const Shape& s, DType dtype, uint32_t seed)
      : p(params_of(s, dtype)),
        q(dtype, random_floats(p.q_tokens * p.q_stride, seed)),
        k(dtype, random_floats(p.kv_tokens * p.k_stride, seed + 1)),
        v(dtype, random_floats(p.kv_tokens * p.v_stride, seed + 2)),
        dout(dtype, random_floats(p.q_tokens * p.o_stride, seed + 3)),
        out(dtype, p.q_tokens * p.o_stride),
        dq(dtype, p.q_tokens * p.q_stride),
        dk(dtype, p.kv_tokens * p.k_stride),
        dv(dtype, p.kv_tokens * p.v_stride),
        lse(size_t{p.q_heads} * p.q_tokens) {}
  void forward(const Shape& s) {
    attention_forward(p, q.data(), k.data(), v.data(), segments(s), out.data(), lse.data());
  }
  void backward(const Shape& s) {
    attention_backward(
        p,
        q.data(),
        k.data(),
        v.data(),
        segments(s),
        out.data(),
        lse.data(),
        dout.data(),
        dq.data(),
        dk.data(),
        dv.data());
  }
  AttentionParams p;
  Buffer q, k, v, dout, out, dq, dk, dv;
  std::vector<float> lse;
};

// f64, with a bound of the kernel's error beside each value. u_p: rounding of the probabilities and
// of dS where they are multiplied in bf16; u_out: rounding of what is stored.
struct Reference {
  Reference(const Shape& s, const Problem& r, double u_p)
      : shape(s), p(r.p), q(r.q.values()), k(r.k.values()), v(r.v.values()), dout(r.dout.values()) {
    const size_t no = size_t{p.q_tokens} * p.o_stride, nq = size_t{p.q_tokens} * p.q_stride;
    out.resize(no), out_bound.resize(no), dq.resize(nq), dq_bound.resize(nq);
    dk.resize(p.kv_tokens * p.k_stride), dk_bound.resize(dk.size());
    dv.resize(p.kv_tokens * p.v_stride), dv_bound.resize(dv.size());
    lse.resize(size_t{p.q_heads} * p.q_tokens), lse_bound.resize(lse.size());
    for (uint32_t h = 0; h < p.q_heads; ++h) {
      for (uint32_t i = 0; i < p.q_tokens; ++i) row(h, i, u_p);
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
      score_error = std::max(score_error, (d + 5) * kU * sa[j]);
    }
    const double log_sum = top + std::log(sum);
    lse[at] = log_sum;
    // exp2 is good to 4 u, n sums, a log.
    lse_bound[at] = score_error + (n + 8) * kU + 4 * kU * std::fabs(log_sum);
    // Relative error of a normalised probability: its own score, its share of the sum, exp2.
    const double rel = 2 * score_error + (n + 16) * kU + 2 * kU * std::fabs(log_sum);
    const double u_out = unit_roundoff(p.dtype);
    std::vector<double> prob(n), dp(n), dp_abs(n, 0);
    for (size_t j = 0; j < n; ++j) prob[j] = std::exp(s[j] - log_sum);
    double big_d = 0, big_d_error = 0;
    for (size_t c = 0; c < d; ++c) {
      double o = 0, o_abs = 0;
      for (size_t j = 0; j < n; ++j) {
        const double x = prob[j] * v[keys[j] * p.v_stride + kv * d + c];
        o += x, o_abs += std::fabs(x);
      }
      const size_t to = i * p.o_stride + h * d + c;
      out[to] = o;
      out_bound[to] = (rel + u_p + (n + 4) * kU) * o_abs;
      const double g = dout[to];
      big_d += o * g;
      // D is taken from out as it was stored.
      big_d_error +=
          (out_bound[to] + (u_out + d * kU) * o_abs + smallest_step(p.dtype)) * std::fabs(g);
    }
    for (size_t j = 0; j < n; ++j) {
      for (size_t c = 0; c < d; ++c) {
        const double g = dout[i * p.o_stride + h * d + c];
        const double x = g * v[keys[j] * p.v_stride + kv * d + c];
        dp[j] += x, dp_abs[j] += std::fabs(x);
        dv[keys[j] * p.v_stride + kv * d + c] += prob[j] * g;
        dv_bound[keys[j] * p.v_stride + kv * d + c] +=
            (rel + u_p + (p.q_tokens + 2) * kU) * prob[j] * std::fabs(g);
      }
      const double ds = prob[j] * (dp[j] - big_d);
      const double ds_error =
          prob[j] * ((d + 2) * kU * dp_abs[j] + big_d_error) +
          (rel + u_p + (p.q_tokens + n + 8) * kU) * prob[j] * (dp_abs[j] + std::fabs(big_d));
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
  std::vector<double> out, out_bound, lse, lse_bound, dq, dq_bound, dk, dk_bound, dv, dv_bound;
};

double product_roundoff(DType dtype) {
  return dtype == DType::bf16 && active_isa() == Isa::avx512_bf16 ? 0x1p-8 : 0;
}

// Elements between tokens belong to nobody: the kernel must leave them alone.
void mask_gaps(
    const AttentionParams& p,
    size_t stride,
    size_t heads,
    std::vector<double>& got,
    std::vector<double>& want) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (i % stride >= heads * p.head_dim) got[i] = want[i] = 0;
  }
}

void check(const Shape& s, DType dtype, uint32_t seed) {
  Problem r(s, dtype, seed);
  const Buffer dq0 = r.dq, dk0 = r.dk;
  r.forward(s);
  r.backward(s);
  Reference want(s, r, product_roundoff(dtype));
  const std::string what = "q " + std::to_string(s.q_tokens) + " kv " +
                           std::to_string(s.kv_tokens) + " dim " + std::to_string(s.head_dim) +
                           " dtype " + std::to_string(static_cast<int>(dtype));
  expect_within(r.out.values(), want.out, want.out_bound, what + " out");
  expect_within({r.lse.begin(), r.lse.end()}, want.lse, want.lse_bound, what + " logsumexp");
  auto dq = r.dq.values(), dk = r.dk.values(), dv = r.dv.values();
  const auto untouched = dq0.values();
  for (size_t i = 0; i < dq.size(); ++i) {
    if (i % r.p.q_stride >= size_t{s.q_heads} * s.head_dim) {
      ASSERT_EQ(dq[i], untouched[i]) << what << " wrote between the tokens of dq at " << i;
    }
  }
  mask_gaps(r.p, r.p.q_stride, s.q_heads, dq, want.dq);
  mask_gaps(r.p, r.p.k_stride, s.kv_heads, dk, want.dk);
  mask_gaps(r.p, r.p.v_stride, s.kv_heads, dv, want.dv);
  expect_within(dq, want.dq, want.dq_bound, what + " dq");
  expect_within(dk, want.dk, want.dk_bound, what + " dk");
  expect_within(dv, want.dv, want.dv_bound, what + " dv");
}

std::vector<int32_t> segment_starts(
    std::initializer_list<uint32_t> lengths, uint32_t kv_offset = 0) {
  std::vector<int32_t> starts;
  uint32_t begin = kv_offset;
  for (const uint32_t n : lengths) {
    starts.insert(starts.end(), n, static_cast<int32_t>(begin));
    begin += n;
  }
  return starts;
}

class Attention : public EachIsa {};
METAL_LORA_EACH_ISA(Attention);

TEST_P(Attention, MatchesF64) {
  const std::vector<Shape> shapes = {
      {1, 1, 1, 1, 32, 0, 0, {}},
      {31, 31, 3, 1, 64, 0, 0, {}},
      {33, 33, 2, 2, 33, 0, 0, {}},     // an odd head
      {65, 65, 2, 1, 48, 0, 0, {}, 5},  // strided, odd strides
      {130, 130, 2, 1, 64, 0, 0, segment_starts({1, 31, 33, 65})},
      {70, 70, 1, 1, 40, 0, 17, {}, 1},  // window
      {150, 150, 2, 1, 32, 0, 70, segment_starts({149, 1}), 4},
      {40, 107, 4, 2, 64, 67, 0, {}},  // cached prefill
      {12, 300, 3, 1, 32, 288, 64, {}},
      {3, 1100, 3, 1, 64, 1097, 0, {}},  // few queries: the row form
      {5, 77, 7, 1, 33, 72, 13, {}, 3},
      {20, 20, 1, 1, 256, 0, 0, {}},
      {20, 20, 2, 1, 32, 0, 0, {}, 0, -0.3f},  // any sign of the scale
  };
  uint32_t seed = 1;
  for (const Shape& s : shapes) {
    for (const DType dtype : kDTypes) check(s, dtype, seed += 10);
  }
}

// The reference above, by central differences in f64: error h²/6·|f'''| + roundoff/h, at h = 1e-4
// below 1e-6 of gradients that are of order 1e-2 and more.
TEST(AttentionReference, GradientsMatchCentralDifferences) {
  const Shape s = {9, 9, 2, 1, 32, 0, 5, segment_starts({4, 5})};
  const Problem r(s, DType::f32, 3);
  const auto loss = [&](Problem run) {
    const Reference ref(s, run, 0);
    double sum = 0;
    for (size_t i = 0; i < ref.out.size(); ++i) sum += ref.out[i] * ref.dout[i];
    return sum;
  };
  const Reference want(s, r, 0);
  constexpr float kStep = 0x1p-10f;
  for (const auto& [member, gradient] :
       {std::pair{&Problem::q, &want.dq}, {&Problem::k, &want.dk}, {&Problem::v, &want.dv}}) {
    for (const size_t at : {0u, 33u, 70u, 130u, 287u}) {
      Problem up = r, down = r;
      static_cast<float*>((up.*member).data())[at] += kStep;
      static_cast<float*>((down.*member).data())[at] -= kStep;
      const double h = static_cast<float*>((up.*member).data())[at] -
                       double{static_cast<float*>((down.*member).data())[at]};
      EXPECT_NEAR((loss(up) - loss(down)) / h, (*gradient)[at], 1e-6);
    }
  }
}

TEST_P(Attention, EmptyInputsAndUnseenKeys) {
  const Shape none = {0, 4, 2, 1, 32, 0, 0, {}};
  Problem r(none, DType::f32, 1);
  r.forward(none);
  r.backward(none);
  for (const double x : r.dk.values()) EXPECT_EQ(x, 0);
  // Queries whose segment lies beyond them see no key: zeros out, zeros back.
  for (const uint32_t n : {3u, 20u}) {
    const Shape blind = {n, n, 1, 1, 32, 0, 0, std::vector<int32_t>(n, 64)};
    Problem b(blind, DType::f32, 1);
    b.forward(blind);
    b.backward(blind);
    for (const double x : b.out.values()) EXPECT_EQ(x, 0);
    for (const float x : b.lse) EXPECT_EQ(x, -INFINITY);
    for (const Buffer* g : {&b.dq, &b.dk, &b.dv}) {
      for (const double x : g->values()) EXPECT_EQ(x, 0);
    }
  }
}

// A segment's results depend on nothing outside it: not on the others' values (here not even finite
// ones) and not on where it lies in the stream.
TEST_P(Attention, SegmentsDoNotLeak) {
  const uint32_t before = 37, n = 95, after = 21;
  const Shape packed = {
      before + n + after, before + n + after, 3, 1, 64, 0, 0, segment_starts({before, n, after})};
  const Shape alone = {n, n, 3, 1, 64, 0, 0, {}};
  for (const DType dtype : kDTypes) {
    Problem a(packed, dtype, 5), b(alone, dtype, 6);
    const auto part = [&](const Buffer& x, size_t stride) {
      return static_cast<const char*>(x.data()) + before * stride * x.size();
    };
    const auto copy = [&](Buffer& to, const Buffer& from, size_t stride) {
      std::memcpy(to.data(), part(from, stride), n * stride * to.size());
    };
    copy(b.q, a.q, a.p.q_stride), copy(b.k, a.k, a.p.k_stride), copy(b.v, a.v, a.p.v_stride);
    copy(b.dout, a.dout, a.p.o_stride);
    const std::vector<float> poison(before * a.p.k_stride, NAN);
    convert_range(poison.size(), DType::f32, poison.data(), dtype, a.k.data());
    convert_range(poison.size(), DType::f32, poison.data(), dtype, a.v.data());
    const size_t tail = (before + n) * a.p.v_stride;
    convert_range(
        after * a.p.v_stride,
        DType::f32,
        poison.data(),
        dtype,
        static_cast<char*>(a.v.data()) + tail * a.v.size());
    for (auto* run : {&a, &b}) {
      const Shape& s = run == &a ? packed : alone;
      run->forward(s);
      run->backward(s);
    }
    const auto same = [&](const Buffer& x, const Buffer& y, size_t stride, const char* what) {
      EXPECT_EQ(std::memcmp(part(x, stride), y.data(), n * stride * x.size()), 0)
          << what << " dtype " << static_cast<int>(dtype);
    };
    same(a.out, b.out, a.p.o_stride, "out");
    same(a.dq, b.dq, a.p.q_stride, "dq");
    same(a.dk, b.dk, a.p.k_stride, "dk");
    same(a.dv, b.dv, a.p.v_stride, "dv");
  }
}

TEST_P(Attention, SameBitsForAnyThreadCount) {
  const Shape s = {200, 200, 6, 2, 64, 0, 0, segment_starts({90, 110})};
  for (const DType dtype : kDTypes) {
    Problem one(s, dtype, 9), many(s, dtype, 9);
    set_thread_count(1);
    one.forward(s), one.backward(s);
    set_thread_count(3);
    many.forward(s), many.backward(s);
    EXPECT_TRUE(one.out == many.out && one.dq == many.dq && one.dk == many.dk && one.dv == many.dv);
    EXPECT_EQ(one.lse, many.lse);
  }
}

// Prefill in pieces over a cache gives the bits of prefill at once.
TEST_P(Attention, CachedPrefillMatchesWholePrefill) {
  const Shape whole = {100, 100, 2, 1, 64, 0, 0, {}}, rest = {63, 100, 2, 1, 64, 37, 0, {}};
  Problem a(whole, DType::bf16, 4), b(rest, DType::bf16, 4);
  b.k = a.k, b.v = a.v;
  std::memcpy(
      b.q.data(), static_cast<char*>(a.q.data()) + 37 * a.p.q_stride * 2, 63 * a.p.q_stride * 2);
  a.forward(whole), b.forward(rest);
  EXPECT_EQ(
      std::memcmp(
          static_cast<char*>(a.out.data()) + 37 * a.p.o_stride * 2,
          b.out.data(),
          63 * a.p.o_stride * 2),
      0);
}

TEST_P(Attention, NotANumberReachesTheResult) {
  const Shape s = {40, 40, 1, 1, 32, 0, 0, {}};
  Problem r(s, DType::f32, 2);
  static_cast<float*>(r.k.data())[7] = NAN;
  r.forward(s);
  r.backward(s);
  EXPECT_TRUE(std::isnan(r.out.values().back()));
  EXPECT_TRUE(std::isnan(r.dq.values().back()));
}

}  // namespace
}  // namespace metal_lora::cpu::transformer_test
