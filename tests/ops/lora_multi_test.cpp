// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "metal_lora/error.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

struct Case {
  int tokens, in, out, max_rank;
  mx::Dtype dtype;
};

constexpr int kAdapters = 4;

/// Adapter 2 has no rank; what lies beyond a true rank is NaN.
ops::LoraBank make_bank(const Case& c, mx::Dtype dtype = mx::float32) {
  const auto ranks = mx::array({c.max_rank, (c.max_rank + 1) / 2, 0, 1}, mx::int32);
  const auto counts = mx::less(
      mx::arange(c.max_rank, mx::int32), mx::reshape(ranks, {kAdapters, 1}));  // [adapters, rank]
  const auto nan = mx::array(std::numeric_limits<float>::quiet_NaN());
  const auto keep = [&](const mx::array& a, int axis) {
    return mx::astype(mx::where(mx::expand_dims(counts, axis), a, nan), dtype);
  };
  const float size = 1.0f / std::sqrt(static_cast<float>(c.in));
  return {
      keep(mx::multiply(normal({kAdapters, c.max_rank, c.in}, 3), mx::array(size)), 2),
      keep(normal({kAdapters, c.out, c.max_rank}, 4), 1),
      ranks,
      mx::array({0.5f, -1.0f, 3.0f, 2.0f})};
}

mx::array make_index(int tokens) {
  std::vector<int> index;
  for (int t = 0; t < tokens; ++t) index.push_back((t * 7 + 3) % (kAdapters + 1) - 1);
  return mx::array(index.data(), {tokens}, mx::int32);
}

/// As in lora_linear_test.cpp: sums of `in` and then `rank` terms of size about 1 in another order,
/// each operand rounded to the compute type, one rounding of the output; 8 standard deviations.
double tolerance(const Case& c) {
  const double u = unit_roundoff(c.dtype);
  const double terms = static_cast<double>(c.in) + c.max_rank + 1;
  return 2.0 * u + 8.0 * std::sqrt(terms) * (u == unit_roundoff(mx::float32) ? u : u / 2.0);
}

class LoraMultiOp : public ::testing::TestWithParam<Case> {};

TEST_P(LoraMultiOp, MatchesPlainMlx) {
  const auto c = GetParam();
  const auto x = normal({c.tokens, c.in}, 1, c.dtype);
  const auto weight = Weight::dense(normal({c.out, c.in}, 2, c.dtype));
  const auto bank = make_bank(c);
  const auto index = make_index(c.tokens);
  const auto bias = normal({c.out}, 5);
  for (const auto& b : {std::optional<mx::array>(bias), std::optional<mx::array>()}) {
    expect_close(
        ops::lora_linear_multi(x, weight, bank, index, b),
        ops::reference::lora_linear_multi(x, weight, bank, index, b),
        tolerance(c),
        "y");
  }
}

TEST_P(LoraMultiOp, GradientsMatchPlainMlx) {
  const auto c = GetParam();
  const auto weight = Weight::dense(normal({c.out, c.in}, 2, c.dtype));
  const auto bank = make_bank(c);
  const auto index = make_index(c.tokens);
  const auto with = [&](auto&& apply) {
    return [&, apply](const std::vector<mx::array>& in) {
      return std::vector<mx::array>{
          apply(in[0], weight, ops::LoraBank{in[1], in[2], bank.ranks, bank.scales}, index)};
    };
  };
  Case widest = c;
  widest.in = std::max({c.in, c.out, c.tokens}) * (c.max_rank + 1);
  expect_same_gradients(
      with([](const auto& x, const auto& w, const auto& b, const auto& i) {
        return ops::lora_linear_multi(x, w, b, i);
      }),
      with([](const auto& x, const auto& w, const auto& b, const auto& i) {
        return ops::reference::lora_linear_multi(x, w, b, i);
      }),
      {normal({c.tokens, c.in}, 1, c.dtype), bank.a, bank.b},
      tolerance(widest));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    LoraMultiOp,
    ::testing::Values(
        Case{0, 32, 16, 2, mx::float32},
        Case{1, 64, 96, 4, mx::float32},
        Case{8, 33, 31, 5, mx::float32},
        Case{40, 192, 64, 8, mx::float32},
        Case{8, 64, 96, 4, mx::bfloat16},
        Case{40, 192, 64, 8, mx::bfloat16},
        Case{9, 65, 33, 3, mx::float16}));

/// Σ y·g is linear in each of x, A and B apart: its derivative along a direction is a central
/// difference without truncation error, so only f32 rounding of the two sums counts.
TEST(LoraMulti, GradientsAreCentralDifferences) {
  const Case c{12, 24, 20, 4, mx::float32};
  const auto weight = Weight::dense(normal({c.out, c.in}, 2));
  auto bank = make_bank(c);
  const auto finite = [](const mx::array& a) {
    return mx::where(mx::isnan(a), mx::array(0.0f), a);
  };
  const auto index = make_index(c.tokens);
  const auto g = normal({c.tokens, c.out}, 9);
  const std::vector<mx::array> at{normal({c.tokens, c.in}, 1), finite(bank.a), finite(bank.b)};
  const auto loss = [&](const std::vector<mx::array>& in) {
    const ops::LoraBank b{in[1], in[2], bank.ranks, bank.scales};
    return mx::sum(mx::multiply(ops::lora_linear_multi(in[0], weight, b, index), g));
  };
  const auto f = [&](const std::vector<mx::array>& in) { return std::vector<mx::array>{loss(in)}; };
  const auto grads = mx::vjp(f, at, {mx::array(1.0f)}).second;
  for (size_t i = 0; i < at.size(); ++i) {
    const auto direction = normal(at[i].shape(), 20 + i);
    auto plus = at, minus = at;
    plus[i] = mx::add(at[i], direction);
    minus[i] = mx::subtract(at[i], direction);
    const double up = loss(plus).item<float>(), down = loss(minus).item<float>();
    const double along = mx::sum(mx::multiply(grads[i], direction)).item<float>();
    // Sums of tokens·out terms that are sums of in terms: a random walk of roundings, 8 sigma.
    const double size = std::sqrt(1.0 * c.tokens * c.out * c.in) * 4;
    EXPECT_NEAR((up - down) / 2, along, 8 * size * unit_roundoff(mx::float32) * 10) << i;
  }
}

TEST(LoraMulti, BanksIn16BitsAndQuantisedBases) {
  const Case c{8, 128, 48, 4, mx::float32};
  const auto dense = Weight::dense(normal({c.out, c.in}, 2));
  const auto x = normal({c.tokens, c.in}, 1);
  const auto index = make_index(c.tokens);
  for (const auto& weight :
       {dense.quantized(4, 64), dense.quantized_nf4(false), dense.quantized_nf4(true)}) {
    for (auto dtype : {mx::float16, mx::bfloat16}) {
      const auto bank = make_bank(c, dtype);
      expect_close(
          ops::lora_linear_multi(x, weight.prepared(), bank, index),
          ops::reference::lora_linear_multi(x, weight, bank, index),
          tolerance(c),
          "y");
    }
  }
}

TEST(LoraMulti, BadValuesAreNamedWhenTheKernelRuns) {
  const Case c{3, 16, 8, 2, mx::float32};
  const auto weight = Weight::dense(normal({c.out, c.in}, 2));
  const auto x = normal({c.tokens, c.in}, 1);
  const auto message = [&](const ops::LoraBank& bank, const mx::array& index) -> std::string {
    try {
      auto y = ops::lora_linear_multi(x, weight, bank, index);
      y.eval();
    } catch (const std::exception& e) {  // MLX's eval may pass it on as a runtime_error
      return e.what();
    }
    return "accepted";
  };
  auto bank = make_bank(c);
  EXPECT_EQ(
      message(bank, mx::array({0, 4, 1}, mx::int32)),
      "[lora_linear_multi] adapter_index[1] must be in [-1, 3] but is 4");
  EXPECT_EQ(
      message(bank, mx::array({0, 0, -2}, mx::int32)),
      "[lora_linear_multi] adapter_index[2] must be in [-1, 3] but is -2");
  bank.ranks = mx::array({2, 3, 0, 1}, mx::int32);
  EXPECT_EQ(
      message(bank, mx::array({0, 0, 0}, mx::int32)),
      "[lora_linear_multi] ranks[1] must be in [0, 2] but is 3");
}

TEST(LoraMulti, WrongShapesAreNamed) {
  const Case c{3, 16, 8, 2, mx::float32};
  const auto weight = Weight::dense(normal({c.out, c.in}, 2));
  const auto x = normal({c.tokens, c.in}, 1);
  const auto index = make_index(c.tokens);
  const auto message = [&](auto change) -> std::string {
    auto bank = make_bank(c);
    auto i = index;
    change(bank, i);
    try {
      ops::lora_linear_multi(x, weight, bank, i);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message([](auto&, auto&) {}), "accepted");
  EXPECT_EQ(
      message([](auto& b, auto&) {
        b.a = normal({4, 2, 17}, 1);
      }),
      "[lora_linear_multi] A must be (any, any, 16) but is (4, 2, 17)");
  EXPECT_EQ(
      message([](auto& b, auto&) {
        b.b = normal({4, 8, 3}, 1);
      }),
      "[lora_linear_multi] B must be (4, 8, 2) but is (4, 8, 3)");
  EXPECT_EQ(
      message([](auto& b, auto&) { b.scales = normal({3}, 1); }),
      "[lora_linear_multi] scales must be (4) but is (3)");
  EXPECT_EQ(
      message([](auto&, auto& i) {
        i = mx::array({0, 0}, mx::int32);
      }),
      "[lora_linear_multi] adapter_index must be (3) but is (2)");
  EXPECT_EQ(
      message([](auto&, auto& i) { i = mx::astype(i, mx::float32); }),
      "[lora_linear_multi] adapter_index's dtype must be int32 but is float32");
}

TEST(LoraMulti, OnlyXAndTheAdaptersHaveGradients) {
  const Case c{3, 16, 8, 2, mx::float32};
  const auto weight = Weight::dense(normal({c.out, c.in}, 2));
  const auto bank = make_bank(c);
  const auto f = [&](const std::vector<mx::array>& in) {
    const ops::LoraBank b{bank.a, bank.b, bank.ranks, in[0]};
    return std::vector<mx::array>{
        ops::lora_linear_multi(normal({c.tokens, c.in}, 1), weight, b, make_index(c.tokens))};
  };
  const auto gradient = [&] {
    return mx::vjp(f, {bank.scales}, {normal({c.tokens, c.out}, 2)}).second[0];
  };
  if (on_metal_kernels()) {  // MLX asks a custom function for all gradients: this one is zero
    EXPECT_EQ(mx::max(mx::abs(gradient())).item<float>(), 0.0f);
  } else {
    EXPECT_THROW(gradient(), Error);
  }
}

TEST(LoraMulti, JvpAndVmapFallBackToPlainMlx) {
  const Case c{3, 16, 8, 2, mx::float32};
  const auto weight = Weight::dense(normal({c.out, c.in}, 2));
  const auto bank = make_bank(c);
  const auto index = make_index(c.tokens);
  const auto f = [&](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::lora_linear_multi(in[0], weight, bank, index)};
  };
  const auto x = normal({c.tokens, c.in}, 1), t = normal({c.tokens, c.in}, 6);
  if (on_metal_kernels()) {  // as of every custom Metal kernel
    EXPECT_ANY_THROW(mx::jvp(f, {x}, {t}));
    return;
  }
  expect_close(
      mx::jvp(f, {x}, {t}).second[0],
      ops::reference::lora_linear_multi(t, weight, bank, index),
      tolerance(c),
      "jvp");
  const auto batch = normal({4, c.tokens, c.in}, 7);
  const auto mapped = mx::vmap(f, std::vector<int>{0})({batch})[0];
  for (int i = 0; i < 4; ++i) {
    expect_close(
        mx::take(mapped, i, 0),
        ops::reference::lora_linear_multi(mx::take(batch, i, 0), weight, bank, index),
        tolerance(c),
        "vmap");
  }
}

}  // namespace
}  // namespace metal_lora::testing
