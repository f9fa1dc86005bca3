// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Adapter gradients, embeddings and the optimizer in Metal: against f64 at derived bounds, the
// dropout mask and AdamW against the CPU's bits.
#include <gtest/gtest.h>

#include <limits>
#include <sstream>

#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemm_skinny.h"
#include "kernels/cpu/transformer_kernels.h"
#include "kernels/metal/plans_train.h"
#include "tests/metal/stored_weight.h"

namespace metal_lora {
namespace {

namespace mx = mlx::core;
using test::Base;
using test::kF32;

/// A sum with the magnitude that its rounding errors scale with.
struct Sum {
  double value = 0.0, magnitude = 0.0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

/// Every term rounds a few times on its way (product, dropout's factor, scale) and once for each
/// addition: terms + 8 roundings cover any order.
double f32_error(const Sum& sum, size_t terms) {
  return static_cast<double>(terms + 8) * kF32 * sum.magnitude;
}

LoraParams dropout_params(float dropout, uint64_t seed) {
  LoraParams params;
  params.dropout = dropout;
  params.dropout_seed = seed;
  return params;
}

/// drop(x) by the CPU's kernel.
std::vector<float> dropped(std::vector<float> x, int columns, float dropout, uint64_t seed) {
  const auto mask = cpu::drop_mask(dropout_params(dropout, seed));
  const auto& kernels = cpu::gemm_kernels(cpu::Compute::f32);
  for (size_t t = 0; t < x.size() / columns; ++t) {
    kernels.drop(
        mask, static_cast<uint32_t>(t), 0, static_cast<uint32_t>(columns), &x[t * columns]);
  }
  return x;
}

struct GradCase {
  int m, n, k, rank;
  DType dtype;
  float dropout = 0.0f;
};
std::ostream& operator<<(std::ostream& out, const GradCase& c) {
  return out << "m" << c.m << "_n" << c.n << "_k" << c.k << "_rank" << c.rank << "_t"
             << static_cast<int>(c.dtype) << (c.dropout > 0 ? "_dropout" : "");
}
class LoraGrad : public testing::TestWithParam<GradCase> {};

TEST_P(LoraGrad, IsTheFormula) {
  const GradCase c = GetParam();
  constexpr uint64_t kSeed = 0x123456789abcdefull;
  const float scale = 0.75f;
  test::Random random(11);
  const auto x = test::operand(random.normal(size_t(c.m) * c.k), {c.m, c.k}, c.dtype);
  const auto dy = test::operand(random.normal(size_t(c.m) * c.n), {c.m, c.n}, c.dtype);
  const auto v = test::operand(random.normal(size_t(c.m) * c.rank), {c.m, c.rank}, DType::f32);
  const auto u = test::operand(random.normal(size_t(c.m) * c.rank), {c.m, c.rank}, DType::f32);
  const metal::LoraGradShape shape{
      .m = uint32_t(c.m),
      .n = uint32_t(c.n),
      .k = uint32_t(c.k),
      .rank = uint32_t(c.rank),
      .scale = scale,
      .dtype = c.dtype,
      .dropout = c.dropout,
      .dropout_seed = kSeed};
  const auto out = test::run(
      {metal::plan_lora_grad(shape)},
      {{"x", x.array}, {"dy", dy.array}, {"v", v.array}, {"u", u.array}},
      {{"da", {{c.rank, c.k}, mx::float32}}, {"db", {{c.n, c.rank}, mx::float32}}});
  const auto da = test::values(out.at("da")), db = test::values(out.at("db"));
  const auto xd = dropped({x.value.begin(), x.value.end()}, c.k, c.dropout, kSeed);
  for (int r = 0; r < c.rank; ++r) {
    for (int j = 0; j < c.k; ++j) {
      Sum sum;
      for (int t = 0; t < c.m; ++t) {
        sum.add(double{scale} * v.value[t * c.rank + r] * double{xd[t * c.k + j]});
      }
      ASSERT_LE(std::fabs(da[r * c.k + j] - sum.value), f32_error(sum, c.m)) << r << ", " << j;
    }
    for (int j = 0; j < c.n; ++j) {
      Sum sum;
      for (int t = 0; t < c.m; ++t) {
        sum.add(double{scale} * dy.value[t * c.n + j] * u.value[t * c.rank + r]);
      }
      ASSERT_LE(std::fabs(db[j * c.rank + r] - sum.value), f32_error(sum, c.m)) << j << ", " << r;
    }
  }
}

const GradCase kGradCases[] = {
    {1, 1, 1, 1, DType::f32},
    {33, 140, 200, 8, DType::f16, 0.1f},
    {17, 64, 130, 40, DType::bf16},
    {40, 300, 66, 16, DType::f32, 0.5f},
    {20, 37, 41, 256, DType::bf16},
};
INSTANTIATE_TEST_SUITE_P(Shapes, LoraGrad, testing::ValuesIn(kGradCases), [](const auto& info) {
  std::ostringstream name;
  name << info.param;
  return name.str();
});

TEST(LoraGradTraffic, ReadsActivationsOnceAndMultipliesOnTheMatrixUnits) {
  const metal::LoraGradShape shape{
      .m = 64, .n = 256, .k = 128, .rank = 16, .scale = 1.0f, .dtype = DType::f16};
  EmulatorLog log;
  test::run(
      {metal::plan_lora_grad(shape)},
      {{"x", mx::ones({64, 128}, mx::float16)},
       {"dy", mx::ones({64, 256}, mx::float16)},
       {"v", mx::ones({64, 16})},
       {"u", mx::ones({64, 16})}},
      {{"da", {{16, 128}, mx::float32}}, {"db", {{256, 16}, mx::float32}}});
  const auto dispatches = log.take();
  ASSERT_EQ(dispatches.size(), 1u);
  const auto& counters = dispatches[0].report.counters;
  EXPECT_EQ(counters.matrix_operations, 64u / 8 * (16 / 8) * ((128 + 256) / 8));
  EXPECT_EQ(counters.atomics, 0u);
  for (const auto& buffer : counters.buffers) {
    const auto& name = dispatches[0].buffer_names[buffer.index];
    if (name == "x" || name == "dy") {
      EXPECT_EQ(buffer.read_bytes, buffer.unique_read_bytes) << name;
    }
    if (name == "da" || name == "db") {
      EXPECT_EQ(buffer.written_bytes, buffer.unique_written_bytes) << name;
    }
  }
}

TEST(MetalDropout, DrawsTheCpusMask) {
  // v = I: row t of dA is drop(x[t]) itself.
  constexpr int kTokens = 16, kColumns = 130;
  for (const uint64_t seed : {uint64_t{0}, uint64_t{0xfedcba9876543210ull}}) {
    std::vector<float> identity(kTokens * kTokens, 0.0f);
    for (int t = 0; t < kTokens; ++t) identity[t * kTokens + t] = 1.0f;
    const std::vector<float> ones(kTokens * kColumns, 1.0f);
    const metal::LoraGradShape shape{
        .m = kTokens,
        .n = 1,
        .k = kColumns,
        .rank = kTokens,
        .scale = 1.0f,
        .dropout = 0.3f,
        .dropout_seed = seed};
    const auto v = test::stored(identity, {kTokens, kTokens}, mx::float32);
    const auto out = test::run(
        {metal::plan_lora_grad(shape)},
        {{"x", test::stored(ones, {kTokens, kColumns}, mx::float32)},
         {"dy", mx::ones({kTokens, 1})},
         {"v", v},
         {"u", v}},
        {{"da", {{kTokens, kColumns}, mx::float32}}, {"db", {{1, kTokens}, mx::float32}}});
    const auto want = dropped(ones, kColumns, 0.3f, seed);
    EXPECT_EQ(test::values(out.at("da")), std::vector<double>(want.begin(), want.end()));
    EXPECT_EQ(std::count(want.begin(), want.end(), 0.0f) > 0, true);
  }
}

struct EmbeddingCase {
  int tokens, vocab, dims;
  Base base;
  DType dtype, lora_dtype;
  int rank;
};
std::ostream& operator<<(std::ostream& out, const EmbeddingCase& c) {
  return out << "tokens" << c.tokens << "_vocab" << c.vocab << "_dims" << c.dims << "_base"
             << static_cast<int>(c.base) << "_t" << static_cast<int>(c.dtype)
             << static_cast<int>(c.lora_dtype) << "_rank" << c.rank;
}
class LoraEmbedding : public testing::TestWithParam<EmbeddingCase> {};

TEST_P(LoraEmbedding, IsTheFormula) {
  const EmbeddingCase c = GetParam();
  const float scale = 0.5f;
  test::Random random(21);
  const auto table = test::stored_weight(random, c.base, c.vocab, c.dims);
  const auto ids = random.integers(c.tokens, 0, c.vocab - 1);
  const auto a =
      test::operand(random.normal(size_t(c.rank) * c.vocab), {c.rank, c.vocab}, c.lora_dtype);
  const auto b =
      test::operand(random.normal(size_t(c.rank) * c.dims), {c.dims, c.rank}, c.lora_dtype);
  const metal::LoraEmbeddingShape shape{
      .tokens = uint32_t(c.tokens),
      .vocab = uint32_t(c.vocab),
      .dims = uint32_t(c.dims),
      .format = table.format,
      .group_size = table.group_size,
      .scales_dtype = table.scales_dtype,
      .double_quant = table.double_quant,
      .rank = uint32_t(c.rank),
      .scale = scale,
      .dtype = c.dtype,
      .lora_dtype = c.lora_dtype};
  auto arrays = table.arrays;
  arrays.emplace("ids", test::int_array(ids, {c.tokens}));
  if (c.rank > 0) {
    arrays.emplace("a", a.array);
    arrays.emplace("b", b.array);
  }
  const auto out = test::run(
      {metal::plan_lora_embedding(shape)}, arrays, {{"y", {{c.tokens, c.dims}, to_mlx(c.dtype)}}});
  const auto y = test::values(out.at("y"));
  for (int t = 0; t < c.tokens; ++t) {
    for (int d = 0; d < c.dims; ++d) {
      Sum sum;
      sum.add(table.value[size_t(ids[t]) * c.dims + d]);
      for (int r = 0; r < c.rank; ++r) {
        sum.add(double{scale} * a.value[size_t(r) * c.vocab + ids[t]] * b.value[d * c.rank + r]);
      }
      double error = f32_error(sum, c.rank);
      error += test::relative_rounding(c.dtype) * (std::fabs(sum.value) + error) +
               test::smallest_step(c.dtype);
      ASSERT_LE(std::fabs(y[t * c.dims + d] - sum.value), error) << t << ", " << d;
    }
  }
}

const EmbeddingCase kEmbeddingCases[] = {
    {9, 11, 37, Base::f16, DType::f16, DType::f16, 3},
    {9, 50, 600, Base::f32, DType::f32, DType::f32, 20},
    {3, 20, 128, Base::int4, DType::bf16, DType::bf16, 0},
    {4, 30, 64, Base::int8, DType::f32, DType::bf16, 256},
    {13, 30, 640, Base::nf4, DType::f16, DType::f32, 33},
    {2, 9, 64, Base::nf4_nested, DType::bf16, DType::f16, 8},
};
INSTANTIATE_TEST_SUITE_P(
    Shapes, LoraEmbedding, testing::ValuesIn(kEmbeddingCases), [](const auto& info) {
      std::ostringstream name;
      name << info.param;
      return name.str();
    });

TEST(LoraEmbeddingIds, OutsideTheTableGiveZeros) {
  const metal::LoraEmbeddingShape shape{
      .tokens = 3, .vocab = 4, .dims = 5, .format = WeightFormat::f32};
  const auto out = test::run(
      {metal::plan_lora_embedding(shape)},
      {{"ids", test::int_array({-1, 2, 4}, {3})}, {"w", mx::ones({4, 5})}},
      {{"y", {{3, 5}, mx::float32}}});
  std::vector<double> want(15, 0.0);
  std::fill_n(want.begin() + 5, 5, 1.0);
  EXPECT_EQ(test::values(out.at("y")), want);
}

class LoraEmbeddingGrad : public testing::TestWithParam<EmbeddingCase> {};

TEST_P(LoraEmbeddingGrad, IsTheFormula) {
  const EmbeddingCase c = GetParam();
  const float scale = 2.0f;
  test::Random random(31);
  auto ids = random.integers(c.tokens, 0, c.vocab - 1);
  // A long run of one token, as padding makes.
  for (int t = c.tokens / 4; t < c.tokens / 2; ++t) ids[t] = c.vocab / 2;
  const auto dy =
      test::operand(random.normal(size_t(c.tokens) * c.dims), {c.tokens, c.dims}, c.dtype);
  const auto a =
      test::operand(random.normal(size_t(c.rank) * c.vocab), {c.rank, c.vocab}, c.lora_dtype);
  const auto b =
      test::operand(random.normal(size_t(c.rank) * c.dims), {c.dims, c.rank}, c.lora_dtype);
  const metal::LoraEmbeddingShape shape{
      .tokens = uint32_t(c.tokens),
      .vocab = uint32_t(c.vocab),
      .dims = uint32_t(c.dims),
      .rank = uint32_t(c.rank),
      .scale = scale,
      .dtype = c.dtype,
      .lora_dtype = c.lora_dtype};
  const auto out = test::run(
      {metal::plan_lora_embedding_grad(shape)},
      {{"ids", test::int_array(ids, {c.tokens})}, {"dy", dy.array}, {"a", a.array}, {"b", b.array}},
      {{"da", {{c.rank, c.vocab}, mx::float32}}, {"db", {{c.dims, c.rank}, mx::float32}}});
  const auto da = test::values(out.at("da")), db = test::values(out.at("db"));
  std::vector<Sum> want_a(size_t(c.rank) * c.vocab), want_b(size_t(c.rank) * c.dims);
  for (int t = 0; t < c.tokens; ++t) {
    for (int r = 0; r < c.rank; ++r) {
      for (int d = 0; d < c.dims; ++d) {
        const double g = double{scale} * dy.value[size_t(t) * c.dims + d];
        want_a[size_t(r) * c.vocab + ids[t]].add(g * b.value[d * c.rank + r]);
        want_b[size_t(d) * c.rank + r].add(g * a.value[size_t(r) * c.vocab + ids[t]]);
      }
    }
  }
  for (size_t i = 0; i < want_a.size(); ++i) {
    ASSERT_LE(std::fabs(da[i] - want_a[i].value), f32_error(want_a[i], c.dims + c.tokens)) << i;
  }
  for (size_t i = 0; i < want_b.size(); ++i) {
    ASSERT_LE(std::fabs(db[i] - want_b[i].value), f32_error(want_b[i], c.tokens)) << i;
  }
}

const EmbeddingCase kEmbeddingGradCases[] = {
    {1, 1, 1, Base::f32, DType::f32, DType::f32, 1},
    {300, 600, 130, Base::f32, DType::f16, DType::f32, 20},
};
INSTANTIATE_TEST_SUITE_P(
    Shapes, LoraEmbeddingGrad, testing::ValuesIn(kEmbeddingGradCases), [](const auto& info) {
      std::ostringstream name;
      name << info.param;
      return name.str();
    });

// ---- AdamW ----

struct AdamState {
  std::vector<float> param, grad, m, v;
};

AdamState adam_state(size_t count, float gradient_size) {
  test::Random random(41);
  AdamState s{
      random.normal(count),
      random.normal(count, gradient_size),
      random.normal(count, 0.1f),
      random.normal(count, 0.1f)};
  for (float& v : s.v) v *= v;
  return s;
}

struct AdamResult {
  std::vector<float> param, m, v;
  float grad_norm;
  bool skipped;
  size_t dispatches;
};

std::vector<float> floats(const mx::array& a) {
  return {a.data<float>(), a.data<float>() + a.size()};
}

AdamResult run_adamw(const AdamWParams& params, const AdamState& s) {
  const int count = static_cast<int>(s.param.size());
  const auto array = [&](const std::vector<float>& v) { return mx::array(v.data(), {count}); };
  const auto factors = metal::adamw_factors(params);
  const auto plans = metal::plan_adamw(params.count);
  const OutputSpec flat{{count}, mx::float32};
  const auto out = test::run(
      plans,
      {{"param", array(s.param)},
       {"grad", array(s.grad)},
       {"m", array(s.m)},
       {"v", array(s.v)},
       {"h", mx::array(factors.data(), {8})}},
      {{"partial", {{int(metal::adamw_partials(params.count)), 3}, mx::float32}},
       {"new_param", flat},
       {"new_m", flat},
       {"new_v", flat},
       {"grad_norm", {{1}, mx::float32}},
       {"skipped", {{1}, mx::int32}}});
  return {
      floats(out.at("new_param")),
      floats(out.at("new_m")),
      floats(out.at("new_v")),
      out.at("grad_norm").data<float>()[0],
      out.at("skipped").data<int32_t>()[0] != 0,
      plans.size()};
}

AdamWParams adam_params(size_t count) {
  AdamWParams p;
  p.count = count;
  p.learning_rate = 1e-2f;
  p.step = 3;
  p.grad_scale = 0.5f;
  return p;
}

TEST(MetalAdamW, StepsAsTheCpuToTheBit) {
  // Without clipping no sum enters an element, and both sides fuse the same multiply-adds.
  for (const size_t count : {size_t{3}, size_t{5000}, size_t{metal::kAdamWSingleCount + 4097}}) {
    AdamState s = adam_state(count, 1.0f);
    const AdamWParams params = adam_params(count);
    const AdamResult got = run_adamw(params, s);
    EXPECT_EQ(got.dispatches, count <= metal::kAdamWSingleCount ? 1u : 2u);
    const auto want = cpu::adamw(params, s.param.data(), s.grad.data(), s.m.data(), s.v.data());
    EXPECT_EQ(got.m, s.m);
    EXPECT_EQ(got.v, s.v);
    EXPECT_EQ(got.param, s.param);
    EXPECT_FALSE(got.skipped);
    // Σ g² of n terms in f32: at most n + 40 roundings, halved by the root; three more after it.
    EXPECT_NEAR(got.grad_norm, want.grad_norm, (count / 2.0 + 23) * kF32 * want.grad_norm);
  }
}

TEST(MetalAdamW, ClipsByTheGlobalNorm) {
  // From squares that f32 cannot hold down to squares that it rounds to zero.
  for (const float size : {1e22f, 1.0f, 1e-25f}) {
    AdamState s = adam_state(2000, size);
    AdamWParams params = adam_params(2000);
    params.clip_norm = 1e-3f;
    const AdamResult got = run_adamw(params, s);
    double squares = 0.0;
    for (const float g : s.grad) squares += double{g} * g;
    const double norm = std::sqrt(squares) * 0.5;
    // Each of 256 threads adds 8 squares, then 5 + 7 additions: 24 roundings cover it all.
    const double norm_error = 24 * kF32;
    EXPECT_NEAR(got.grad_norm, norm, norm_error * norm) << size;
    const double factor = 0.5 * std::min(1.0, 1e-3 / (norm + 1e-6));
    for (size_t i = 0; i < s.m.size(); ++i) {
      const double g = s.grad[i] * factor;
      const double kept = double{params.beta1} * s.m[i], added = (1.0 - double{params.beta1}) * g;
      // 1 - beta1 in f32 is off by an ulp of 1; the factor by the norm's error and three roundings.
      const double error = kF32 * std::fabs(kept + added) +
                           (norm_error + 6 * kF32 + 2 * kF32 / 0.1) * std::fabs(added);
      ASSERT_NEAR(got.m[i], kept + added, error) << size << " at " << i;
    }
  }
}

TEST(MetalAdamW, SkipsAStepThatIsNotFinite) {
  for (const size_t count : {size_t{1000}, size_t{metal::kAdamWSingleCount + 1}}) {
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      AdamState s = adam_state(count, 1.0f);
      s.grad[count - 2] = bad;
      const AdamResult got = run_adamw(adam_params(count), s);
      EXPECT_TRUE(got.skipped);
      EXPECT_FALSE(std::isfinite(got.grad_norm));
      EXPECT_EQ(got.param, s.param);
      EXPECT_EQ(got.m, s.m);
      EXPECT_EQ(got.v, s.v);
    }
  }
}

TEST(TrainPlans, RefuseByName) {
  metal::LoraGradShape grad{.m = 4, .n = 8, .k = 8, .rank = 300};
  EXPECT_THROW(metal::plan_lora_grad(grad), std::invalid_argument);
  grad.rank = 8;
  grad.dropout = 1.0f;
  EXPECT_THROW(metal::plan_lora_grad(grad), std::invalid_argument);
  EXPECT_THROW(metal::plan_adamw(0), std::invalid_argument);
  EXPECT_THROW(metal::plan_adamw(uint64_t{1} << 32), std::invalid_argument);
  metal::LoraEmbeddingShape embedding{
      .tokens = 2, .vocab = 8, .dims = 60, .format = WeightFormat::nf4};
  EXPECT_THROW(metal::plan_lora_embedding(embedding), std::invalid_argument);
  embedding.format = WeightFormat::f32;
  EXPECT_THROW(metal::plan_lora_embedding_grad(embedding), std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora
