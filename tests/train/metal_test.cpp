// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The whole program on the Metal kernels: training and generation on the emulator against the CPU's,
// and steps exported for a Mac.
#include <gtest/gtest.h>
#include <mlx/ops.h>

#include <cmath>

#include "metal_lora/generate.h"
#include "src/launch/backend.h"
#include "src/model/export.h"
#include "src/train/adapter_init.h"
#include "tests/train/run_fixture.h"

namespace metal_lora::train {
namespace {

namespace mx = mlx::core;

class MetalTraining : public RunFixture {
 protected:
  struct Run {
    std::vector<double> losses;
    std::vector<float> parameters;
  };
  /// 20 steps on a backend, from one start.
  Run run(Backend backend, TrainingConfig config) {
    BackendScope scope(backend);
    config.adapter_path = (folder_ / std::string(backend_name(backend))).string();
    Run out;
    TrainerCallbacks callbacks;
    callbacks.on_step = [&](int, double loss) { out.losses.push_back(loss); };
    auto trainer = make_trainer(config, callbacks);
    trainer->run();
    out.parameters = parameters(trainer->adapter());
    return out;
  }

  /// f32: each loss is a mean over tokens of sums of about 64·128 products through two layers and
  /// back; two orders of f32 sums differ by about √(8192)·2⁻²⁴ ≈ 5e-6 of the terms, and AdamW's
  /// early steps (g/|g|) pass the sign of gradients on, so that drift grows with the step.
  static double loss_tolerance(size_t step) { return 1e-5 * static_cast<double>(step + 1); }
};

TEST_F(MetalTraining, TwentyStepsOnTheEmulatorEqualTheCpu) {
  auto config = make_config("run");
  config.steps_per_report = 1;
  const auto cpu = run(Backend::cpu, config);
  const auto emulator = run(Backend::emulator, config);
  ASSERT_EQ(cpu.losses.size(), 20u);
  ASSERT_EQ(emulator.losses.size(), 20u);
  for (size_t i = 0; i < cpu.losses.size(); ++i) {
    EXPECT_NEAR(emulator.losses[i], cpu.losses[i], loss_tolerance(i) * cpu.losses[i])
        << "step " << i;
  }
  EXPECT_LT(cpu.losses.back(), cpu.losses.front());
}

TEST_F(MetalTraining, DropoutDrawsTheSameMasks) {
  auto config = make_config("run");
  config.lora_dropout = 0.25;
  config.iters = 4;
  const auto cpu = run(Backend::cpu, config);
  const auto emulator = run(Backend::emulator, config);
  for (size_t i = 0; i < cpu.losses.size(); ++i) {
    EXPECT_NEAR(emulator.losses[i], cpu.losses[i], loss_tolerance(i) * cpu.losses[i]);
  }
}

TEST_F(MetalTraining, GeneratesTheCpusTokens) {
  const auto config = make_config("run");
  const auto generate = [&](Backend backend) {
    BackendScope scope(backend);
    auto model = Model::load(config.model, config.load_options());
    const auto adapter = initial_adapter(model->config(), config);
    KVCache cache(*model);
    std::vector<int32_t> tokens{82, 111, 119, 32, 52, 57, 46};
    std::vector<int32_t> next = tokens;
    for (int i = 0; i < 12; ++i) {
      const auto logits = model->decode(next, cache, adapter);
      next = {static_cast<int32_t>(mx::argmax(logits, -1).item<uint32_t>())};
      tokens.push_back(next[0]);
    }
    return tokens;
  };
  EXPECT_EQ(generate(Backend::emulator), generate(Backend::cpu));
}

TEST_F(MetalTraining, ExportsStepsForAMac) {
  const auto config = make_config("run");
  BackendScope scope(Backend::emulator);
  auto model = Model::load(config.model, config.load_options());
  const auto adapter = initial_adapter(model->config(), config);
  const auto train = export_train_step(*model, adapter, 16, folder_ / "train_step.mlxfn");
  const auto decode = export_decode_step(*model, adapter, 32, folder_ / "decode_step.mlxfn");
  const auto text = read_bytes(train.file) + read_bytes(decode.file);
  for (const char* kernel : {"custom_kernel_lora_", "custom_kernel_adamw", "simdgroup"}) {
    EXPECT_NE(text.find(kernel), std::string::npos) << kernel;
  }
  ASSERT_EQ(train.outputs.size(), 6u);
  EXPECT_EQ(train.outputs[1].shape, train.inputs[5].shape);
  EXPECT_EQ(decode.outputs[0].shape, (mx::Shape{1, model->config().vocab_size}));
  EXPECT_EQ(decode.outputs[1].shape, decode.inputs[2].shape);
}

}  // namespace
}  // namespace metal_lora::train
