// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A dense base quantised while it loads.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include <map>

#include "metal_lora/error.h"
#include "metal_lora/model.h"
#include "src/io/result.h"
#include "src/model/convert.h"
#include "tests/ops/support.h"
#include "tests/support/tiny_model.h"

namespace metal_lora::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

template <class Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

class QuantizationTest : public ::testing::Test {
 protected:
  void SetUp() override { test::write_tiny_model(folder_.path()); }

  std::shared_ptr<const Model> load(Quantization quantization, bool double_quant = true) const {
    return Model::load(
        folder_.path(),
        {.dtype = mx::float32, .quantize = quantization, .double_quant = double_quant});
  }

  test::TemporaryFolder folder_;
};

TEST(Quantization, NamesAreWhatUsersWrite) {
  for (const char* name : {"0", "4", "8", "nf4"}) {
    const auto quantization = parse_quantization(name);
    ASSERT_TRUE(quantization) << name;
    EXPECT_EQ(quantization_name(*quantization), name);
  }
  for (const char* name : {"", "3", "NF4", "nf", "fp4", "04"}) {
    EXPECT_FALSE(parse_quantization(name)) << name;
  }
}

TEST(Quantization, OptionsThatContradictAreRefusedByName) {
  const auto error = [](const LoadOptions& options) {
    // Before the path is looked at.
    return error_of([&] { Model::load("/nonexistent", options); });
  };
  EXPECT_THAT(
      error({.quantize = Quantization::nf4, .quantize_group = 32}),
      HasSubstr("[quantize_group_size] must be 64 with quantize nf4 but is 32"));
  EXPECT_THAT(
      error({.quantize = Quantization::int4, .quantize_group = 48}),
      HasSubstr("[quantize_group_size] must be 32, 64 or 128 but is 48"));
  EXPECT_THAT(
      error({.quantize = Quantization::int4, .double_quant = false}),
      AllOf(HasSubstr("[double_quant]"), HasSubstr("off with quantize 4")));
  EXPECT_THAT(
      error({.quantize = Quantization::nf4, .double_quant = false}), HasSubstr("/nonexistent"));
}

TEST_F(QuantizationTest, Nf4WeightsAreThoseOfQuantizedNf4) {
  const auto dense = load(Quantization::none);
  const auto info = adaptable_linears(dense->config());
  std::map<bool, std::shared_ptr<const Model>> models;
  for (const bool double_quant : {false, true}) {
    const auto model = models[double_quant] = load(Quantization::nf4, double_quant);
    const auto expect_equal = [&](const Weight& got, const Weight& source) {
      EXPECT_EQ(got.params().format, WeightFormat::nf4);
      EXPECT_TRUE(
          mx::array_equal(got.dequantized(), source.quantized_nf4(double_quant).dequantized())
              .item<bool>());
    };
    for (const auto& linear : info) {
      expect_equal(model->linear(linear.path).weight, dense->linear(linear.path).weight);
    }
    expect_equal(model->embedding(), dense->embedding());
    // 0.5 bytes and 4 of absmax for each 64 weights at most, of 4. A table of nested scales is 1
    // KB: the embedding's, and every matrix's where the backend does not pack them.
    const double tables = 2048.0 * static_cast<double>(info.size() + 1);
    EXPECT_LT(model->weight_bytes(), dense->weight_bytes() * (0.5 + 4.0 / 64) / 4 + tables);
  }
  const auto& path = info.front().path;
  EXPECT_FALSE(mx::array_equal(
                   models[false]->linear(path).weight.dequantized(),
                   models[true]->linear(path).weight.dequantized())
                   .item<bool>());
}

TEST_F(QuantizationTest, AnNf4ModelComputesWithItsDequantizedWeights) {
  const auto model = load(Quantization::nf4);
  // The same model written dense with the values that NF4 left.
  const test::TemporaryFolder rounded;
  test::write_tiny_model(rounded.path());
  auto file = io::unwrap(io::read_safetensors((folder_ / "model.safetensors").string()));
  std::vector<mx::array> values;
  std::vector<io::TensorInfo> tensors = file.tensors();
  values.reserve(tensors.size());
  for (auto& tensor : tensors) {
    if (tensor.shape.size() != 2) continue;
    const std::string path = tensor.name.substr(0, tensor.name.rfind(".weight"));
    const Weight& weight =
        path == "model.embed_tokens" ? model->embedding() : model->linear(path).weight;
    values.push_back(weight.dequantized());
    tensor.data = reinterpret_cast<const std::byte*>(values.back().data<float>());
  }
  io::unwrap(io::write_safetensors((rounded / "model.safetensors").string(), tensors));
  const auto dense = Model::load(rounded.path(), {.dtype = mx::float32});
  const std::vector<int32_t> tokens{256, 10, 65, 66, 67, 200, 31, 7, 99, 100, 101};
  const auto logits = [&](const Model& m) {
    KVCache cache(m);
    const std::span<const int32_t> all(tokens);
    const auto prefill = m.decode(all.first(9), cache, {}, 9);
    return mx::concatenate({prefill, m.decode(all.subspan(9), cache, {}, 2)}, 0);
  };
  // f32 on both sides: a dozen operations in each of two layers, each off by about √K·u, K ≤ 128.
  const double tolerance = 24 * std::sqrt(128.0) * 0x1p-24 * 4;
  expect_close(logits(*model), logits(*dense), tolerance, "nf4");
}

TEST_F(QuantizationTest, AQuantizedFileStaysAsItIs) {
  const test::TemporaryFolder parent;
  ExportOptions options;
  options.quantize_bits = 8;
  export_model(folder_.path(), parent / "q8", options);
  const auto model = Model::load(parent / "q8", {.quantize = Quantization::nf4});
  EXPECT_EQ(
      model->linear("model.layers.0.self_attn.q_proj").weight.params().format, WeightFormat::int8);
}

TEST(Quantization, Nf4RefusesNarrowRowsByName) {
  const test::TemporaryFolder folder;
  test::write_tiny_model(folder.path(), {.intermediate = 96});
  EXPECT_THAT(
      error_of([&] { Model::load(folder.path(), {.quantize = Quantization::nf4}); }),
      AllOf(
          HasSubstr(folder.path().string() + ": model.layers.0.mlp.down_proj.weight]"),
          HasSubstr("a multiple of 64"),
          HasSubstr("96"),
          HasSubstr("quantize 4")));
}

}  // namespace
}  // namespace metal_lora::testing
