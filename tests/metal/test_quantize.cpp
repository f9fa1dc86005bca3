// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Quantising in Metal: int4 and int8 bit for bit as mx.quantize, NF4 as the CPU kernel;
// dequantising against the formats' formulas.
#include <gtest/gtest.h>

#include <sstream>

#include "kernels/cpu/lora_quantized.h"
#include "kernels/metal/plans_quantize.h"
#include "tests/metal/stored_weight.h"

namespace metal_lora {
namespace {

namespace mx = mlx::core;
using test::Base;

/// A block of zeros, one that is all positive and one that is all negative, then normal values.
std::vector<float> awkward(int n, int k) {
  test::Random random(51);
  auto w = random.normal(size_t(n) * k);
  for (int i = 0; i < k && n > 1; ++i) {
    w[i] = i < 64 ? 0.0f : 0.001f * w[i];
    w[k + i] = (i % 128 < 64 ? 1.0f : -1.0f) * (std::fabs(w[k + i]) + 1.0f);
  }
  return w;
}

bool same_bits(const mx::array& a, const mx::array& b) {
  auto x = mx::contiguous(mx::view(a, mx::uint8)), y = mx::contiguous(mx::view(b, mx::uint8));
  return mx::array_equal(x, y).item<bool>();
}

struct AffineCase {
  WeightFormat format;
  int group, n, k;
  DType dtype;
};
class QuantizeAffine : public testing::TestWithParam<AffineCase> {};

TEST_P(QuantizeAffine, IsMlxsToTheBit) {
  const AffineCase c = GetParam();
  const int bits = c.format == WeightFormat::int4 ? 4 : 8;
  const auto w = test::stored(awkward(c.n, c.k), {c.n, c.k}, to_mlx(c.dtype));
  const metal::QuantizeShape shape{
      .n = uint32_t(c.n),
      .k = uint32_t(c.k),
      .format = c.format,
      .group_size = uint32_t(c.group),
      .dtype = c.dtype};
  const OutputSpec groups{{c.n, c.k / c.group}, to_mlx(c.dtype)};
  const auto out = test::run(
      {metal::plan_quantize(shape)},
      {{"w", w}},
      {{"q", {{c.n, c.k * bits / 32}, mx::uint32}}, {"scales", groups}, {"biases", groups}});
  const auto want = mx::quantize(w, c.group, bits, "affine", std::nullopt, mx::Device::cpu);
  EXPECT_TRUE(same_bits(out.at("q"), want[0]));
  EXPECT_TRUE(same_bits(out.at("scales"), want[1]));
  EXPECT_TRUE(same_bits(out.at("biases"), want[2]));
}

INSTANTIATE_TEST_SUITE_P(
    Formats,
    QuantizeAffine,
    testing::Values(
        AffineCase{WeightFormat::int4, 32, 3, 192, DType::f32},
        AffineCase{WeightFormat::int4, 64, 17, 128, DType::f16},
        AffineCase{WeightFormat::int4, 128, 5, 256, DType::bf16},
        AffineCase{WeightFormat::int8, 32, 9, 32, DType::bf16},
        AffineCase{WeightFormat::int8, 64, 2, 192, DType::f32}));

class QuantizeNf4 : public testing::TestWithParam<DType> {};

TEST_P(QuantizeNf4, IsTheCpusToTheBit) {
  constexpr int kRows = 5, kColumns = 192, kBlocks = kRows * kColumns / 64;
  const auto w = test::operand(awkward(kRows, kColumns), {kRows, kColumns}, GetParam());
  const metal::QuantizeShape shape{
      .n = kRows, .k = kColumns, .format = WeightFormat::nf4, .dtype = GetParam()};
  const auto out = test::run(
      {metal::plan_quantize(shape)},
      {{"w", w.array}},
      {{"q", {{kRows, kColumns / 8}, mx::uint32}},
       {"scales", {{kRows, kColumns / 64}, mx::float32}}});
  WeightParams params;
  params.n = kRows;
  params.k = kColumns;
  params.format = WeightFormat::nf4;
  const std::vector<float> values(w.value.begin(), w.value.end());
  std::vector<uint32_t> words(kRows * kColumns / 8);
  std::vector<float> absmax(kBlocks);
  cpu::quantize_nf4(params, values.data(), words.data(), absmax.data(), nullptr);
  EXPECT_TRUE(same_bits(out.at("q"), mx::array(words.data(), {kRows, kColumns / 8}, mx::uint32)));
  EXPECT_TRUE(same_bits(out.at("scales"), mx::array(absmax.data(), {kRows, kColumns / 64})));
}
INSTANTIATE_TEST_SUITE_P(Types, QuantizeNf4, testing::Values(DType::f32, DType::bf16));

struct DequantizeCase {
  Base base;
  int n, k, group;
  DType dtype, scales_dtype;
};
class Dequantize : public testing::TestWithParam<DequantizeCase> {};

TEST_P(Dequantize, IsTheFormula) {
  const DequantizeCase c = GetParam();
  test::Random random(61);
  const auto weight = test::stored_weight(random, c.base, c.n, c.k, c.group, c.scales_dtype);
  const metal::QuantizeShape shape{
      .n = uint32_t(c.n),
      .k = uint32_t(c.k),
      .format = weight.format,
      .group_size = weight.group_size,
      .scales_dtype = weight.scales_dtype,
      .double_quant = weight.double_quant,
      .dtype = c.dtype};
  const auto out = test::run(
      {metal::plan_dequantize(shape)}, weight.arrays, {{"dense", {{c.n, c.k}, to_mlx(c.dtype)}}});
  const auto got = test::values(out.at("dense"));
  for (size_t i = 0; i < got.size(); ++i) {
    // Affine: one fused multiply-add. NF4: a product, and for a nested absmax another two
    // operations before it, on magnitudes up to |absmax| + 2·offset. Then the storage's rounding.
    const double want = weight.value[i];
    const double f32 =
        test::kF32 * (weight.double_quant ? 4.0 * (std::fabs(want) + 0.6) : std::fabs(want));
    const double error = f32 + test::relative_rounding(c.dtype) * (std::fabs(want) + f32) +
                         test::smallest_step(c.dtype);
    ASSERT_LE(std::fabs(got[i] - want), error) << i;
  }
}
INSTANTIATE_TEST_SUITE_P(
    Formats,
    Dequantize,
    testing::Values(
        DequantizeCase{Base::int4, 7, 96, 32, DType::f16, DType::f16},
        DequantizeCase{Base::int4, 3, 128, 128, DType::f32, DType::bf16},
        DequantizeCase{Base::int8, 5, 128, 64, DType::bf16, DType::f32},
        DequantizeCase{Base::nf4, 7, 128, 0, DType::f16, DType::f32},
        DequantizeCase{Base::nf4_nested, 300, 64, 0, DType::f32, DType::f32}));

TEST(QuantizePlans, RefuseByName) {
  metal::QuantizeShape shape{.n = 2, .k = 100, .format = WeightFormat::nf4};
  EXPECT_THROW(metal::plan_quantize(shape), std::invalid_argument);
  shape.k = 128;
  shape.double_quant = true;
  EXPECT_THROW(metal::plan_quantize(shape), std::invalid_argument);
  shape = {.n = 2, .k = 128, .format = WeightFormat::f16};
  EXPECT_THROW(metal::plan_dequantize(shape), std::invalid_argument);
  shape = {.n = 2, .k = 128, .format = WeightFormat::int8, .group_size = 16};
  EXPECT_THROW(metal::plan_quantize(shape), std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora
