// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A tiny model, a few rows of data and runs over them.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/train/trainer.h"
#include "tests/support/tiny_model.h"

namespace metal_lora::train {

inline std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return {std::istreambuf_iterator<char>(in), {}};
}

/// Tensors of the newest saved state.
inline std::filesystem::path newest_state(const std::filesystem::path& adapter_path) {
  std::filesystem::path newest;
  for (const auto& item : std::filesystem::directory_iterator(adapter_path / "state")) {
    if (newest.empty() || item.path().filename() > newest.filename()) newest = item.path();
  }
  return newest;
}

inline std::string rows(int count, const std::string& word = "row") {
  std::string out;
  for (int i = 0; i < count; ++i) {
    out += "{\"text\": \"" + word + " " + std::to_string(i * i) + std::string(i % 7, '.') + "\"}\n";
  }
  return out;
}

class RunFixture : public testing::Test {
 protected:
  void SetUp() override { prepare(folder_.path()); }

  static void prepare(const std::filesystem::path& folder) {
    test::write_tiny_model(folder / "model");
    std::filesystem::create_directories(folder / "data");
    test::write_text(folder / "data" / "train.jsonl", rows(23));
    test::write_text(folder / "data" / "valid.jsonl", rows(5, "held out"));
  }

  static TrainingConfig make_config(const std::filesystem::path& folder, const std::string& name) {
    TrainingConfig config;
    config.model = (folder / "model").string();
    config.data = (folder / "data").string();
    config.adapter_path = (folder / name).string();
    config.dtype = "float32";
    config.num_layers = -1;
    config.lora_rank = 4;
    config.lora_scale = 2.0;
    config.batch_size = 3;
    config.iters = 20;
    config.learning_rate = 1e-3;
    config.steps_per_report = 10;
    config.steps_per_eval = 50;
    config.seed = 3;
    return config;
  }
  TrainingConfig make_config(const std::string& name) const {
    return make_config(folder_.path(), name);
  }

  static std::unique_ptr<Trainer::Impl> make_trainer(
      const TrainingConfig& config, TrainerCallbacks callbacks = {}) {
    return std::make_unique<Trainer::Impl>(
        Model::load(config.model, config.load_options()),
        text::Tokenizer::from_path(config.model),
        text::ChatTemplate::from_path(config.model),
        config,
        std::move(callbacks));
  }

  /// All parameters end to end.
  static std::vector<float> parameters(const AdapterWeights& adapter) {
    std::vector<float> out;
    for (auto array : adapter.parameters()) {
      array.eval();
      out.insert(out.end(), array.data<float>(), array.data<float>() + array.size());
    }
    return out;
  }

  /// Steps until iteration `count` is done, then stops as Ctrl-C does.
  static void run_and_stop(const TrainingConfig& config, int count) {
    bool stop = false;
    TrainerCallbacks callbacks;
    callbacks.on_step = [&](int iteration, double) { stop = iteration >= count; };
    callbacks.should_stop = [&] { return stop; };
    try {
      make_trainer(config, callbacks)->run();
      ADD_FAILURE() << "not stopped";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::interrupted) << error.what();
    }
  }

  test::TemporaryFolder folder_;
};

}  // namespace metal_lora::train
