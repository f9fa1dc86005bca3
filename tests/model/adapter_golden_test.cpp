// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Adapters that PEFT and mlx-lm wrote, and the logits that those programs computed with them
// (tests/golden/make_adapters.py): transposes, scales, patterns and rsLoRA, all at once.
#include <gtest/gtest.h>
#include <mlx/mlx.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>

#include "metal_lora/adapter.h"
#include "src/io/safetensors.h"

namespace metal_lora {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = fs::path(METAL_LORA_SOURCE_DIR) / "tests/golden";

/// As for the models' own goldens (model_test.cpp): a dozen f32 operations a layer with a relative
/// error of about √K·u, K ≤ 64, two layers, here logits of size ~3.
constexpr double kTolerance = 24 * 8.0 * 0x1p-24 * 12;

double largest_difference(const fs::path& adapter_path, const fs::path& expected_path) {
  LoadOptions options;
  options.dtype = mlx::core::float32;
  const auto model = Model::load(kGolden / "models/llama", options);
  const Adapter adapter = load_adapter(adapter_path, model->config());
  const auto file =
      io::unwrap(io::read_safetensors((expected_path / "expected.safetensors").string()));
  const auto* ids = reinterpret_cast<const int32_t*>(file.find("tokens")->data);
  const std::vector<int32_t> tokens(ids, ids + file.find("tokens")->element_count());
  KVCache cache(*model);
  const auto logits =
      model->decode(tokens, cache, adapter.weights, static_cast<int>(tokens.size()));
  const auto* expected = reinterpret_cast<const float*>(file.find("logits")->data);
  EXPECT_EQ(logits.size(), file.find("logits")->element_count());
  double largest = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    largest =
        std::max(largest, std::abs(static_cast<double>(logits.data<float>()[i]) - expected[i]));
  }
  return largest;
}

class AdapterGolden : public ::testing::TestWithParam<std::string> {};

TEST_P(AdapterGolden, GivesTheLogitsOfTheProgramThatWroteIt) {
  const fs::path folder = kGolden / "adapters" / GetParam();
  EXPECT_LT(largest_difference(folder, folder), kTolerance);
}

TEST_P(AdapterGolden, AndInTheOtherFormat) {
  const fs::path folder = kGolden / "adapters" / GetParam();
  std::string name = (fs::temp_directory_path() / "adapter-golden-XXXXXX").string();
  ASSERT_NE(mkdtemp(name.data()), nullptr);
  const AdapterFile adapter = read_adapter(folder);
  const bool is_peft = adapter.info.format == AdapterFormat::peft;
  WriteAdapterOptions options;
  options.fold_scale = true;  // PEFT's has three scales
  write_adapter(name, is_peft ? AdapterFormat::mlx_lm : AdapterFormat::peft, adapter, options);
  // Folding a scale rounds B once more: within the same bound.
  EXPECT_LT(largest_difference(name, folder), kTolerance);
  fs::remove_all(name);
}

INSTANTIATE_TEST_SUITE_P(
    Each, AdapterGolden, ::testing::Values("peft", "mlx-lm"), [](const auto& info) {
      return info.param == "peft" ? "peft" : "mlx_lm";
    });

}  // namespace
}  // namespace metal_lora
