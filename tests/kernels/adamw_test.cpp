// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/transformer_kernels.h"
#include "tests/kernels/transformer_reference.h"

namespace metal_lora::cpu::transformer_test {
namespace {

constexpr double kU = 0x1p-24;

class AdamW : public EachIsa {};
METAL_LORA_EACH_ISA(AdamW);

struct State {
  std::vector<float> param, m, v;
};

// 50 steps against f64. A step moves a parameter by at most about rate·(1 + decay·|p|); its
// direction m/(sqrt(v) + eps) carries the error of m and v: each a sum of t terms of one sign or
// another with 4 u a step, relative to their absolute sums, so at most 6·50 u of
// Σ|m terms|/sqrt(v), which is at most 1/sqrt(1 - beta2) < 32 times. Hence per step
// rate·32·300 u + 3 u·|p|.
TEST_P(AdamW, FollowsF64ForFiftySteps) {
  for (const size_t n : {1u, 31u, 33u, 4097u, 70000u}) {
    for (const float clip : {0.0f, 0.5f}) {
      AdamWParams p = {
          .count = n,
          .learning_rate = 1e-2f,
          .weight_decay = 0.1f,
          .clip_norm = clip,
          .grad_scale = 0.25f};
      State s = {random_floats(n, 1), std::vector<float>(n), std::vector<float>(n)};
      std::vector<double> param(s.param.begin(), s.param.end()), m(n), v(n);
      double move = 0, norm_error = 0;
      for (uint64_t step = 1; step <= 50; ++step) {
        p.step = step;
        const auto grad = random_floats(n, 100 + static_cast<uint32_t>(step));
        const AdamWResult result = adamw(p, s.param.data(), grad.data(), s.m.data(), s.v.data());
        double squares = 0;
        for (const float g : grad) squares += double{g} * g;
        const double norm = 0.25 * std::sqrt(squares);
        norm_error = std::max(norm_error, std::fabs(result.grad_norm - norm) / norm);
        ASSERT_FALSE(result.skipped);
        const double factor = 0.25 * (clip > 0 ? std::min(1.0, clip / (norm + 1e-6)) : 1.0);
        const double b1 = p.beta1, b2 = p.beta2, rate = p.learning_rate;
        const double bias1 = 1 - std::pow(b1, step), bias2 = 1 - std::pow(b2, step);
        for (size_t i = 0; i < n; ++i) {
          const double g = grad[i] * factor;
          m[i] = b1 * m[i] + (1 - b1) * g, v[i] = b2 * v[i] + (1 - b2) * g * g;
          const double unbiased = m[i] / bias1;
          param[i] -= rate * double{p.weight_decay} * param[i] +
                      rate * unbiased / (std::sqrt(v[i] / bias2) + double{p.eps});
        }
        move += rate * 32 * 300 * kU + 3 * kU * 2;
      }
      EXPECT_LE(norm_error, 2 * kU);  // summed in f64, rounded once
      expect_within(
          {s.param.begin(), s.param.end()},
          param,
          std::vector<double>(n, move),
          "param " + std::to_string(n));
      std::vector<double> m_bound(n, 300 * kU * 0.25), v_bound(n, 300 * kU * 0.0625);
      expect_within({s.m.begin(), s.m.end()}, m, m_bound, "m");
      expect_within({s.v.begin(), s.v.end()}, v, v_bound, "v");
    }
  }
}

TEST_P(AdamW, SkipsWhatIsNotFinite) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const size_t at : {0u, 69999u}) {
      const AdamWParams p = {.count = 70000, .learning_rate = 0.1f};
      State s = {random_floats(70000, 1), random_floats(70000, 2), random_floats(70000, 3, 0, 1)};
      const State before = s;
      auto grad = random_floats(70000, 4);
      grad[at] = bad;
      const AdamWResult r = adamw(p, s.param.data(), grad.data(), s.m.data(), s.v.data());
      EXPECT_TRUE(r.skipped);
      EXPECT_FALSE(std::isfinite(r.grad_norm));
      EXPECT_TRUE(s.param == before.param && s.m == before.m && s.v == before.v);
    }
  }
}

TEST_P(AdamW, LargeFiniteGradientsCount) {
  const AdamWParams p = {.count = 2, .learning_rate = 0.1f, .clip_norm = 1.0f};
  State s = {{1, 1}, {0, 0}, {0, 0}};
  const std::vector<float> grad = {1e30f, -1e30f};  // their squares overflow f32
  const AdamWResult r = adamw(p, s.param.data(), grad.data(), s.m.data(), s.v.data());
  EXPECT_FALSE(r.skipped);
  EXPECT_NEAR(r.grad_norm / 1.41421356e30, 1, 1e-6);
  EXPECT_NEAR(s.param[0], 1 - 0.1 - 0.1 * 0.01, 1e-5);  // the first step is rate·sign(g), and decay
  EXPECT_NEAR(s.param[1], 1 + 0.1 - 0.1 * 0.01, 1e-5);
}

TEST_P(AdamW, EmptyBufferAndNoBiasCorrection) {
  AdamWParams p;
  EXPECT_FALSE(adamw(p, nullptr, nullptr, nullptr, nullptr).skipped);
  p = {.count = 1, .learning_rate = 1, .weight_decay = 0, .bias_correction = false};
  float param = 0, m = 0, v = 0;
  const float grad = 1;
  adamw(p, &param, &grad, &m, &v);
  EXPECT_NEAR(param, -(1.0 - p.beta1) / std::sqrt(1.0 - p.beta2), 8 * kU * 3.2);
}

TEST_P(AdamW, SameBitsForAnyThreadCount) {
  const size_t n = 300000;
  const AdamWParams p = {.count = n, .learning_rate = 0.1f, .clip_norm = 1.0f};
  const auto grad = random_floats(n, 4);
  State a = {random_floats(n, 1), random_floats(n, 2), random_floats(n, 3, 0, 1)}, b = a;
  set_thread_count(1);
  const float norm = adamw(p, a.param.data(), grad.data(), a.m.data(), a.v.data()).grad_norm;
  set_thread_count(3);
  EXPECT_EQ(adamw(p, b.param.data(), grad.data(), b.m.data(), b.v.data()).grad_norm, norm);
  EXPECT_TRUE(a.param == b.param && a.m == b.m && a.v == b.v);
}

}  // namespace
}  // namespace metal_lora::cpu::transformer_test
