// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/transformer_kernels.h"
#include "tests/kernels/transformer_reference.h"

namespace metal_lora::cpu::transformer_test {
namespace {

constexpr double kU = 0x1p-24;

class Swiglu : public EachIsa {};
METAL_LORA_EACH_ISA(Swiglu);

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// exp is good to 2 ulp = 4 u; 1 + exp, the division and three products add 5 u.
// Below e^-87.3 the sigmoid may be flushed: then the result is off by |g·up|·2^-126.
TEST_P(Swiglu, MatchesF64) {
  for (const size_t n : {0u, 1u, 31u, 33u, 4097u, 20000u}) {
    for (const DType dtype : kDTypes) {
      auto gates = random_floats(n, 1, -20, 20);
      for (size_t i = 0; i < n; i += 17) gates[i] *= 6;  // far tails: exp(±120)
      const Buffer gate(dtype, gates), up(dtype, random_floats(n, 2)),
          dy(dtype, random_floats(n, 3));
      Buffer y(dtype, n), dgate(dtype, n), dup(dtype, n);
      swiglu_forward(n, dtype, gate.data(), up.data(), y.data());
      swiglu_backward(n, dtype, gate.data(), up.data(), dy.data(), dgate.data(), dup.data());
      const auto g = gate.values(), u = up.values(), d = dy.values();
      std::vector<double> want(n), bound(n), want_g(n), bound_g(n), want_u(n), bound_u(n);
      const double store = unit_roundoff(dtype);
      for (size_t i = 0; i < n; ++i) {
        const double s = sigmoid(g[i]), flushed = std::fabs(g[i]) * 0x1p-126 + smallest_step(dtype);
        want[i] = g[i] * s * u[i];
        bound[i] = (10 * kU + store) * std::fabs(want[i]) + flushed;
        want_u[i] = d[i] * g[i] * s;
        bound_u[i] = (10 * kU + store) * std::fabs(want_u[i]) + flushed;
        want_g[i] = d[i] * u[i] * s * (1 + g[i] * (1 - s));
        // 1 - s cancels: absolute error 8 u, times |g|.
        bound_g[i] = std::fabs(d[i] * u[i] * s) *
                         (12 * kU * (1 + std::fabs(g[i]) * (1 - s)) + 10 * kU * std::fabs(g[i])) +
                     store * std::fabs(want_g[i]) + flushed * (1 + std::fabs(g[i]));
      }
      expect_within(y.values(), want, bound, "y");
      expect_within(dgate.values(), want_g, bound_g, "dgate");
      expect_within(dup.values(), want_u, bound_u, "dup");
    }
  }
}

TEST(SwigluReference, SlopeMatchesCentralDifferences) {
  for (const double g : {-5.0, -0.3, 0.0, 0.7, 9.0}) {
    const double h = 1e-5, s = sigmoid(g);
    const double numeric = ((g + h) * sigmoid(g + h) - (g - h) * sigmoid(g - h)) / (2 * h);
    EXPECT_NEAR(numeric, s * (1 + g * (1 - s)), 1e-9);
  }
}

TEST_P(Swiglu, NotANumberStays) {
  std::vector<float> gate(40, 1.0f), up(40, 1.0f), y(40);
  gate[3] = NAN, gate[37] = NAN;
  swiglu_forward(40, DType::f32, gate.data(), up.data(), y.data());
  for (size_t i = 0; i < 40; ++i) EXPECT_EQ(std::isnan(y[i]), i == 3 || i == 37) << i;
}

// Every f16 and bf16 pattern through f32 and back; f32 ties and halves round to even.
TEST_P(Swiglu, ConversionsAreExact) {
  std::vector<uint16_t> all(65536), back(65536);
  std::vector<float> wide(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    convert_range(all.size(), dtype, all.data(), DType::f32, wide.data());
    convert_range(all.size(), DType::f32, wide.data(), dtype, back.data());
    const uint32_t exponent = dtype == DType::f16 ? 0x7c00 : 0x7f80;
    for (uint32_t i = 0; i < 65536; ++i) {
      if ((i & 0x7fff) > exponent) {
        EXPECT_TRUE(std::isnan(wide[i]) && (back[i] & 0x7fff) > exponent) << i;
      } else if (dtype == DType::bf16 && (i & exponent) == 0) {
        EXPECT_TRUE(back[i] == i || (back[i] & 0x7fff) == 0) << i;  // subnormals may be flushed
      } else {
        EXPECT_EQ(back[i], i);
      }
      if (dtype == DType::f16 && (i & 0x7fff) < 0x7c00) {
        const int e = static_cast<int>((i >> 10) & 31), m = static_cast<int>(i & 1023);
        const double value = e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, e - 25);
        EXPECT_EQ(wide[i], (i & 0x8000) != 0 ? -value : value);
      }
    }
    // Halfway between neighbours: to the even one. Values 1 + k/2 steps.
    const int mantissa = dtype == DType::f16 ? 10 : 7;
    for (int k = 0; k < 64; ++k) {
      const float x = 1.0f + std::ldexp(static_cast<float>(k), -mantissa - 1);
      uint16_t h = 0;
      float y = 0;
      convert_range(1, DType::f32, &x, dtype, &h);
      convert_range(1, dtype, &h, DType::f32, &y);
      EXPECT_EQ(y, 1.0f + std::ldexp(std::nearbyint(static_cast<float>(k) / 2), -mantissa));
    }
  }
  const float big[3] = {65519.0f, 65520.0f, 1e30f};
  uint16_t h[3];
  convert_range(3, DType::f32, big, DType::f16, h);
  EXPECT_EQ(h[0], 0x7bff);
  EXPECT_EQ(h[1], 0x7c00);
  EXPECT_EQ(h[2], 0x7c00);
}

}  // namespace
}  // namespace metal_lora::cpu::transformer_test
