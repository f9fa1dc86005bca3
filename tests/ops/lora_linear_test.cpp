// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "metal_lora/error.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

struct Case {
  int tokens, in, out, rank;
  mx::Dtype dtype;
};

/// Inputs are rounded to the dtype first, so what differs is: the compute type of products (bf16
/// rounds an INT4 weight once more), f32 sums of `in` terms in another order, one rounding of the
/// output. Errors add as a random walk over `in` terms of size ~1; 8 standard deviations.
double tolerance(const Case& c) {
  const double u = unit_roundoff(c.dtype);
  return 2.0 * u + 8.0 * std::sqrt(static_cast<double>(c.in) + 1.0) *
                       (u == unit_roundoff(mx::float32) ? u : u / 2.0);
}

Lora make_lora(const Case& c, uint64_t seed) {
  return {normal({c.rank, c.in}, seed), normal({c.out, c.rank}, seed + 1), 0.5f};
}

class LoraLinearOp : public ::testing::TestWithParam<Case> {};

TEST_P(LoraLinearOp, MatchesPlainMlx) {
  const auto c = GetParam();
  auto x = normal({c.tokens, c.in}, 1, c.dtype);
  LoraLinear linear{
      Weight::dense(normal({c.out, c.in}, 2, c.dtype)), make_lora(c, 3), normal({c.out}, 5)};
  linear.lora->a = mx::multiply(linear.lora->a, mx::array(1.0f / std::sqrt(c.in + 1.0f)));
  expect_close(
      ops::lora_linear(x, linear), ops::reference::lora_linear(x, linear), tolerance(c), "y");
}

TEST_P(LoraLinearOp, GradientsMatchPlainMlx) {
  const auto c = GetParam();
  const auto weight = Weight::dense(normal({c.out, c.in}, 2, c.dtype));
  const auto with = [&](auto&& apply) {
    return [&, apply](const std::vector<mx::array>& in) {
      LoraLinear linear{weight, Lora{in[1], in[2], 0.5f}, std::nullopt};
      return std::vector<mx::array>{apply(in[0], linear)};
    };
  };
  auto lora = make_lora(c, 3);
  // dA sums over tokens and out, dB over tokens, dx over out.
  Case widest = c;
  widest.in = std::max({c.in, c.out, c.tokens}) * (c.rank + 1);
  expect_same_gradients(
      with([](const auto& x, const auto& l) { return ops::lora_linear(x, l); }),
      with([](const auto& x, const auto& l) { return ops::reference::lora_linear(x, l); }),
      {normal({c.tokens, c.in}, 1, c.dtype), lora.a, lora.b},
      tolerance(widest));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    LoraLinearOp,
    ::testing::Values(
        Case{1, 64, 96, 4, mx::float32},
        Case{7, 33, 31, 1, mx::float32},
        Case{40, 576, 192, 8, mx::float32},
        Case{0, 32, 16, 2, mx::float32},
        Case{1, 64, 96, 4, mx::bfloat16},
        Case{40, 576, 192, 8, mx::bfloat16},
        Case{9, 65, 33, 3, mx::float16},
        Case{40, 64, 96, 8, mx::float16},
        Case{520, 64, 96, 3, mx::bfloat16}));  // u stays in 16 bits on CUDA

TEST(LoraLinear, QuantisedBaseEqualsItsDequantisedSelf) {
  for (int bits : {4, 8}) {
    for (int group : {32, 64, 128}) {
      auto dense = Weight::dense(normal({48, 256}, 7));
      auto quantised = dense.quantized(bits, group);
      ASSERT_TRUE(quantised.is_quantized());
      auto x = normal({5, 256}, 8);
      LoraLinear linear{quantised.prepared(), std::nullopt, std::nullopt};
      LoraLinear plain{Weight::dense(quantised.dequantized()), std::nullopt, std::nullopt};
      expect_close(ops::lora_linear(x, linear), ops::reference::lora_linear(x, plain), 1e-5, "y");
    }
  }
}

TEST(LoraLinear, SharedInputEqualsSeparateCalls) {
  auto x = normal({33, 64}, 1);
  const LoraLinear linears[] = {
      {Weight::dense(normal({96, 64}, 2)),
       Lora{normal({4, 64}, 3), normal({96, 4}, 4), 2.0f},
       std::nullopt},
      {Weight::dense(normal({32, 64}, 5)), std::nullopt, normal({32}, 6)}};
  auto together = ops::lora_linear(x, linears);
  for (int i : {0, 1}) {
    EXPECT_TRUE(mx::array_equal(together[i], ops::lora_linear(x, linears[i])).item<bool>()) << i;
  }
}

TEST(LoraLinear, ReadsStridedInput) {
  auto wide = normal({64, 33}, 1);
  auto x = mx::transpose(wide);  // [33, 64], not row-contiguous
  LoraLinear linear{Weight::dense(normal({16, 64}, 2)), std::nullopt, std::nullopt};
  auto copy = mx::contiguous(x);
  EXPECT_TRUE(
      mx::array_equal(ops::lora_linear(x, linear), ops::lora_linear(copy, linear)).item<bool>());
}

TEST(LoraLinear, WrongShapesAreNamed) {
  LoraLinear linear{
      Weight::dense(normal({16, 64}, 2)),
      Lora{normal({4, 63}, 3), normal({16, 4}, 4)},
      std::nullopt};
  try {
    ops::lora_linear(normal({2, 64}, 1), linear);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::invalid_input);
    EXPECT_STREQ(e.what(), "[lora_linear] A must be (any, 64) but is (4, 63)");
  }
  EXPECT_THROW(
      ops::lora_linear(normal({2, 65}, 1), LoraLinear{linear.weight, std::nullopt, std::nullopt}),
      Error);
  EXPECT_THROW(
      ops::lora_linear(
          mx::zeros({2, 64}, mx::int32), LoraLinear{linear.weight, std::nullopt, std::nullopt}),
      Error);
}

TEST(LoraLinear, JvpAndVmapFallBackToPlainMlx) {
  LoraLinear linear{Weight::dense(normal({16, 8}, 2)), std::nullopt, std::nullopt};
  auto f = [&](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::lora_linear(in[0], linear)};
  };
  auto x = normal({3, 8}, 1), t = normal({3, 8}, 9);
  if (on_metal_kernels()) {  // as of every custom Metal kernel
    EXPECT_ANY_THROW(mx::jvp(f, {x}, {t}));
    return;
  }
  auto tangent = mx::jvp(f, {x}, {t}).second[0];
  expect_close(tangent, ops::reference::lora_linear(t, linear), 1e-5, "jvp");
  auto batch = normal({5, 3, 8}, 10);
  auto mapped = mx::vmap(f, std::vector<int>{0})({batch})[0];
  expect_close(
      mx::slice(mapped, {2, 0, 0}, {3, 3, 16}),
      mx::reshape(
          ops::reference::lora_linear(
              mx::squeeze(mx::slice(batch, {2, 0, 0}, {3, 3, 8}), 0), linear),
          {1, 3, 16}),
      1e-5,
      "vmap");
}

TEST(LoraLinear, DropoutIsUnbiasedAndTheSameInBothDirections) {
  const int tokens = 64, in = 128, out = 16, rank = 4;
  auto x = normal({tokens, in}, 1), a = normal({rank, in}, 2), b = normal({out, rank}, 3);
  const auto weight = Weight::dense(mx::zeros({out, in}));
  auto f = [&](const std::vector<mx::array>& p) {
    return std::vector<mx::array>{ops::lora_linear(
        p[0], LoraLinear{weight, Lora{p[1], p[2], 1.0f, 0.25f, 42}, std::nullopt})};
  };
  // y is linear in A for a fixed mask: <dA, A> = <dy, y> exactly when backward draws the same one.
  auto dy = normal({tokens, out}, 4);
  auto [values, grads] = mx::vjp(f, {x, a, b}, {dy});
  const double forward = mx::sum(mx::multiply(values[0], dy)).item<float>();
  for (int i : {0, 1, 2}) {
    const std::vector<mx::array> primals{x, a, b};
    const double back = mx::sum(mx::multiply(grads[i], primals[i])).item<float>();
    EXPECT_NEAR(forward, back, 1e-4 * std::sqrt(1.0 * tokens * in * out * rank)) << i;
  }
  auto other = ops::lora_linear(x, LoraLinear{weight, Lora{a, b, 1.0f, 0.25f, 43}, std::nullopt});
  EXPECT_FALSE(mx::array_equal(values[0], other).item<bool>());
}

}  // namespace
}  // namespace metal_lora::testing
