// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/transformer_kernels.h"
#include "tests/kernels/attention_reference.h"

namespace metal_lora::cpu::transformer_test {
namespace {

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
  AttentionValues values() const { return {p, q.values(), k.values(), v.values(), dout.values()}; }
  AttentionParams p;
  Buffer q, k, v, dout, out, dq, dk, dv;
  std::vector<float> lse;
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
  Reference want(s, r.values(), {product_roundoff(dtype)});
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
    const Reference ref(s, run.values(), {});
    double sum = 0;
    for (size_t i = 0; i < ref.out.size(); ++i) sum += ref.out[i] * ref.dout[i];
    return sum;
  };
  const Reference want(s, r.values(), {});
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
