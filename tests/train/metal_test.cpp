// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The whole program on the Metal kernels: training and generation on the emulator against the
// CPU's, and steps exported for a Mac.
#ifdef METAL_LORA_EMULATOR
#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/random.h>
#include <mlx/transforms.h>

#include <cmath>

#include "kernels/metal/plans_train.h"
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

  /// Every B random too: a fresh adapter's is zero and would show nothing.
  static AdapterWeights random_adapter(const Model& model, const TrainingConfig& config) {
    const auto fresh = initial_adapter(model.config(), config);
    auto values = fresh.parameters();
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = mx::multiply(
          mx::array(0.05f),
          mx::random::normal(values[i].shape(), mx::float32, 0.0f, 1.0f, mx::random::key(i)));
    }
    return fresh.with_parameters(values);
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
  // Both runs start alike and AdamW moves each value by at most the rate each step.
  ASSERT_EQ(cpu.parameters.size(), emulator.parameters.size());
  double apart = 0.0, size = 0.0;
  for (size_t i = 0; i < cpu.parameters.size(); ++i) {
    apart += std::pow(double{cpu.parameters[i]} - emulator.parameters[i], 2);
    size += std::pow(double{cpu.parameters[i]}, 2);
  }
  EXPECT_LT(std::sqrt(apart / size), 1e-2);
}

TEST_F(MetalTraining, DropoutDrawsTheSameMasks) {
  auto config = make_config("run");
  config.lora_dropout = 0.25;
  config.iters = 4;
  const auto cpu = run(Backend::cpu, config);
  const auto emulator = run(Backend::emulator, config);
  ASSERT_EQ(cpu.losses.size(), 4u);
  ASSERT_EQ(emulator.losses.size(), 4u);
  for (size_t i = 0; i < cpu.losses.size(); ++i) {
    EXPECT_NEAR(emulator.losses[i], cpu.losses[i], loss_tolerance(i) * cpu.losses[i]);
  }
  // Without the masks the losses are others, by more than the tolerance.
  config.lora_dropout = 0.0;
  const auto without = run(Backend::cpu, config);
  EXPECT_GT(
      std::fabs(without.losses.back() - cpu.losses.back()), loss_tolerance(3) * cpu.losses.back());
}

TEST_F(MetalTraining, GeneratesTheCpusTokens) {
  const auto config = make_config("run");
  const auto generate = [&](Backend backend) {
    BackendScope scope(backend);
    auto model = Model::load(config.model, config.load_options());
    const auto adapter = random_adapter(*model, config);
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
  // The graph that was written, run here, is a step of the CPU's.
  std::vector<int32_t> ids, positions, targets;
  for (int i = 0; i < 16; ++i) {
    ids.push_back(60 + 7 * i % 50);
    positions.push_back(i);
    targets.push_back(60 + 7 * (i + 1) % 50);
  }
  const auto ints = [](const std::vector<int32_t>& v) {
    return mx::array(v.data(), {static_cast<int>(v.size())}, mx::int32);
  };
  const ops::Segments segments{ints(positions), mx::zeros({16}, mx::int32)};
  const auto weights = mx::ones({16});
  const int count = train.inputs[5].shape[0];
  const auto param = mx::multiply(
      mx::array(0.05f), mx::random::normal({count}, mx::float32, 0.0f, 1.0f, mx::random::key(9)));
  AdamWParams adamw;
  adamw.learning_rate = 1e-2f;
  const auto factors = metal::adamw_factors(adamw);
  const auto zeros = mx::zeros({count});
  const auto step = train_step_function(*model, adapter)(
      {ints(ids),
       segments.positions,
       segments.segment_start,
       ints(targets),
       weights,
       param,
       zeros,
       zeros,
       mx::array(factors.begin(), {8}, mx::float32)});
  mx::eval(step);
  std::vector<mx::array> tensors;
  int begin = 0;
  for (const auto& like : adapter.parameters()) {
    const int end = begin + static_cast<int>(like.size());
    tensors.push_back(mx::reshape(mx::slice(param, {begin}, {end}), like.shape()));
    begin = end;
  }
  double loss = 0.0;
  {
    BackendScope cpu(Backend::cpu);
    auto cpu_model = Model::load(config.model, config.load_options());
    const auto with = adapter.with_parameters(tensors);
    loss = cpu_model->loss(ints(ids), segments, ints(targets), weights, with, false).item<float>();
  }
  EXPECT_NEAR(step[0].item<float>(), loss, 1e-5 * loss);
  // AdamW's first step moves every value with a gradient by the rate, whatever its size.
  auto moved = mx::max(mx::abs(mx::subtract(step[1], param)));
  EXPECT_NEAR(moved.item<float>(), adamw.learning_rate, 2e-3 * adamw.learning_rate);
  EXPECT_EQ(step[5].item<int32_t>(), 0);

  ASSERT_EQ(train.outputs.size(), 6u);
  EXPECT_EQ(train.outputs[1].shape, train.inputs[5].shape);
  EXPECT_EQ(decode.outputs[0].shape, (mx::Shape{1, model->config().vocab_size}));
  EXPECT_EQ(decode.outputs[1].shape, decode.inputs[2].shape);
}

}  // namespace
}  // namespace metal_lora::train

#endif
