// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "kernels/cpu/transformer_kernels.h"
#include "tests/kernels/transformer_reference.h"

namespace metal_lora::cpu::transformer_test {
namespace {

constexpr double kU = 0x1p-24;

class CrossEntropy : public EachIsa {};
METAL_LORA_EACH_ISA(CrossEntropy);

struct Problem {
  Problem(uint32_t tokens, uint32_t dims, uint32_t vocab, DType dtype, uint32_t seed, float spread)
      : p{.tokens = tokens, .dims = dims, .vocab = vocab, .dtype = dtype},
        x(dtype, random_floats(size_t{tokens} * dims, seed, -spread, spread)),
        w(random_floats(size_t{vocab} * dims, seed + 1)),
        weights(random_floats(tokens, seed + 2, 0.1f, 2.0f)),
        losses(tokens, 7),
        dx(dtype, size_t{tokens} * dims) {
    if (dtype ==
        DType::bf16) {  // a head that bf16 holds exactly: its own rounding is not tested here
      const Buffer rounded(DType::bf16, w);
      const auto exact = rounded.values();
      std::transform(
          exact.begin(), exact.end(), w.begin(), [](double v) { return static_cast<float>(v); });
    }
    head.params = {.n = vocab, .k = dims, .format = WeightFormat::f32};
    head.data = w.data();
    std::mt19937 rng(seed + 3);
    for (uint32_t t = 0; t < tokens; ++t) {
      targets.push_back(static_cast<int32_t>(rng() % vocab));
      if (t % 3 == 1) weights[t] = 0;
    }
  }
  void run(bool gradient = true) {
    linear_cross_entropy(
        p,
        x.data(),
        head,
        targets.data(),
        weights.data(),
        &loss,
        gradient ? dx.data() : nullptr,
        losses.data());
  }
  LinearCrossEntropyParams p;
  Buffer x;
  std::vector<float> w, weights;
  WeightView head;
  std::vector<int32_t> targets;
  float loss = -1;
  std::vector<float> losses;
  Buffer dx;
};

struct Truth {
  double loss = 0, loss_bound = 0;
  std::vector<double> losses, losses_bound, dx, dx_bound;
};

// u_w: rounding of the head's elements where the compute type is bf16 (0: the head is exact).
// u_g: rounding of dlogits (2^-8 where x is bf16).
Truth truth_of(const Problem& r) {
  const auto xs = r.x.values();
  const size_t d = r.p.dims, n = r.p.vocab;
  const double u_g = r.p.dtype == DType::bf16 ? 0x1p-8 : 0, u = unit_roundoff(r.p.dtype);
  Truth t;
  t.losses.resize(r.p.tokens), t.losses_bound.resize(r.p.tokens);
  t.dx.resize(xs.size()), t.dx_bound.resize(xs.size());
  for (size_t i = 0; i < r.p.tokens; ++i) {
    if (r.weights[i] == 0) continue;
    std::vector<double> z(n);
    double top = -INFINITY, error = 0, size = 0;
    for (size_t v = 0; v < n; ++v) {
      double sum_abs = 0;
      for (size_t c = 0; c < d; ++c) {
        const double term = xs[i * d + c] * r.w[v * d + c];
        z[v] += term, sum_abs += std::fabs(term);
      }
      top = std::max(top, z[v]), error = std::max(error, (d + 2) * kU * sum_abs);
      size = std::max(size, std::fabs(z[v]));
    }
    double sum = 0;
    for (const double v : z) sum += std::exp(v - top);
    const double lse = top + std::log(sum), target = z[static_cast<size_t>(r.targets[i])];
    // A logit's error moves the logsumexp by as much; n sums of exp at 6 u; two subtractions.
    const double lse_error = error + (n + 8) * kU + 6 * kU * size;
    t.losses[i] = lse - target;
    t.losses_bound[i] = lse_error + error + 4 * kU * size;
    t.loss += r.weights[i] * t.losses[i], t.loss_bound += r.weights[i] * t.losses_bound[i];
    const double rel = std::expm1(error + lse_error) + 8 * kU;
    for (size_t v = 0; v < n; ++v) {
      const double p = std::exp(z[v] - lse),
                   g = r.weights[i] * (p - (v == static_cast<size_t>(r.targets[i])));
      const double g_error =
          r.weights[i] * (rel * p + 2 * kU) * (v == static_cast<size_t>(r.targets[i]) ? 2 : 1) +
          (u_g + (n + 2) * kU) * std::fabs(g);
      for (size_t c = 0; c < d; ++c) {
        t.dx[i * d + c] += g * r.w[v * d + c];
        t.dx_bound[i * d + c] += g_error * std::fabs(r.w[v * d + c]);
      }
    }
    for (size_t c = 0; c < d; ++c) {
      t.dx_bound[i * d + c] += (u + kU) * (std::fabs(t.dx[i * d + c]) + t.dx_bound[i * d + c]) +
                               smallest_step(r.p.dtype);
    }
  }
  t.loss_bound += kU * std::fabs(t.loss);
  return t;
}

void check(Problem& r, const std::string& what) {
  r.run();
  const Truth t = truth_of(r);
  EXPECT_NEAR(r.loss, t.loss, t.loss_bound) << what;
  expect_within({r.losses.begin(), r.losses.end()}, t.losses, t.losses_bound, what + " losses");
  expect_within(r.dx.values(), t.dx, t.dx_bound, what + " dx");
  const std::vector<float> before = r.losses;
  const float loss = r.loss;
  r.run(false);  // without a gradient: the same losses
  EXPECT_EQ(r.losses, before);
  EXPECT_EQ(r.loss, loss);
}

TEST_P(CrossEntropy, MatchesF64) {
  uint32_t seed = 1;
  for (const DType dtype : kDTypes) {
    for (const auto& [tokens, dims, vocab] :
         {std::tuple{1u, 33u, 31u},
          {31u, 64u, 4097u},
          {33u, 31u, 33u},
          {20u, 576u, 300u},
          {5u, 1u, 1u}}) {
      Problem r(tokens, dims, vocab, dtype, seed += 7, 1.0f);
      check(
          r,
          "vocab " + std::to_string(vocab) + " dtype " + std::to_string(static_cast<int>(dtype)));
    }
  }
}

TEST_P(CrossEntropy, ExtremeLogits) {
  // Logits of some ±1e4: e^z overflows, and almost every probability is 0 or 1.
  for (const DType dtype : kDTypes) {
    Problem r(9, 32, 500, dtype, 3, 2000.0f);
    check(r, "extreme, dtype " + std::to_string(static_cast<int>(dtype)));
    EXPECT_TRUE(std::isfinite(r.loss));
  }
}

TEST_P(CrossEntropy, ZeroWeightsCostAndChangeNothing) {
  Problem r(12, 32, 100, DType::f32, 1, 1.0f), poisoned(12, 32, 100, DType::f32, 1, 1.0f);
  for (size_t t = 1; t < 12; t += 3) {
    static_cast<float*>(poisoned.x.data())[t * 32] = NAN;
    poisoned.targets[t] = -100;  // the usual mark of a token without a target
  }
  r.run(), poisoned.run();
  EXPECT_EQ(r.loss, poisoned.loss);
  EXPECT_TRUE(r.dx == poisoned.dx);
  for (size_t t = 1; t < 12; t += 3) {
    EXPECT_EQ(r.losses[t], 0);
    for (size_t c = 0; c < 32; ++c) EXPECT_EQ(static_cast<float*>(r.dx.data())[t * 32 + c], 0);
  }
  std::fill(r.weights.begin(), r.weights.end(), 0.0f);
  r.run();
  EXPECT_EQ(r.loss, 0);
  Problem none(0, 32, 100, DType::f32, 1, 1.0f);
  none.run();
  EXPECT_EQ(none.loss, 0);
}

// Enough rows for several blocks of logits; each token as if it were alone.
TEST_P(CrossEntropy, BlocksOfTokens) {
  Problem r(700, 2, 30000, DType::f32, 1, 1.0f);  // 467 counted rows of 117 KiB: three blocks
  r.run();
  for (const uint32_t t : {0u, 332u, 699u}) {
    Problem one = r;
    one.head.data = one.w.data();
    const size_t row = size_t{t} * 2;
    one.p.tokens = 1;
    one.x = Buffer(
        DType::f32,
        std::vector<float>{
            static_cast<float*>(r.x.data())[row], static_cast<float*>(r.x.data())[row + 1]});
    one.targets = {r.targets[t]}, one.weights = {r.weights[t]}, one.losses = {0};
    one.dx = Buffer(DType::f32, 2);
    const Truth want = truth_of(one);
    EXPECT_NEAR(r.losses[t], want.losses[0], want.losses_bound[0]);
    for (size_t c = 0; c < 2; ++c) {
      EXPECT_NEAR(static_cast<float*>(r.dx.data())[row + c], want.dx[c], want.dx_bound[c]);
    }
  }
}

TEST_P(CrossEntropy, SameBitsForAnyThreadCount) {
  for (const DType dtype : kDTypes) {
    Problem a(40, 64, 1000, dtype, 1, 1.0f), b(40, 64, 1000, dtype, 1, 1.0f);
    set_thread_count(1);
    a.run();
    set_thread_count(3);
    b.run();
    EXPECT_EQ(a.loss, b.loss);
    EXPECT_EQ(a.losses, b.losses);
    EXPECT_TRUE(a.dx == b.dx);
  }
}

// dx against central differences of the f64 loss (error ~ step² and 1e-16/step, step 2^-10).
TEST(CrossEntropyReference, GradientMatchesCentralDifferences) {
  Problem r(4, 9, 31, DType::f32, 2, 1.0f);
  const Truth t = truth_of(r);
  for (const size_t at : {0u, 5u, 20u, 35u}) {
    Problem up = r, down = r;
    static_cast<float*>(up.x.data())[at] += 0x1p-10f;
    static_cast<float*>(down.x.data())[at] -= 0x1p-10f;
    const double h = up.x.values()[at] - down.x.values()[at];
    EXPECT_NEAR((truth_of(up).loss - truth_of(down).loss) / h, t.dx[at], 2e-6);
  }
}

TEST_P(CrossEntropy, NotANumberReachesTheLoss) {
  Problem r(3, 32, 100, DType::f32, 1, 1.0f);
  static_cast<float*>(r.x.data())[0] = NAN;
  r.run();
  EXPECT_TRUE(std::isnan(r.loss));
  EXPECT_TRUE(std::isnan(static_cast<float*>(r.dx.data())[0]));
}

}  // namespace
}  // namespace metal_lora::cpu::transformer_test
