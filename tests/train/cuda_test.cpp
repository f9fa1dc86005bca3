// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The whole program on an NVIDIA GPU against the CPU: training by single operations (f32) and by
// the fused step (bf16), its gradient, and generation. Skipped where there is no GPU.
#ifdef METAL_LORA_CUDA
#include <gtest/gtest.h>
#include <mlx/ops.h>
#include <mlx/random.h>
#include <mlx/transforms.h>

#include <cmath>

#include "metal_lora/generate.h"
#include "src/launch/backend.h"
#include "src/launch/mlx_cuda.h"
#include "src/ops/train_step.h"
#include "src/train/adapter_init.h"
#include "tests/train/run_fixture.h"

namespace metal_lora::train {
namespace {

namespace mx = mlx::core;

/// What names no stream is built for the backend, too, and as before afterwards.
class DefaultDeviceScope {
 public:
  explicit DefaultDeviceScope(Backend backend) { set_default_device_for(backend); }
  ~DefaultDeviceScope() { mx::set_default_device(previous_); }
  DefaultDeviceScope(const DefaultDeviceScope&) = delete;
  DefaultDeviceScope& operator=(const DefaultDeviceScope&) = delete;

 private:
  mx::Device previous_ = mx::default_device();
};

class CudaTraining : public RunFixture {
 protected:
  void SetUp() override {
    if (!mlx_cuda::availability().available) {
      GTEST_SKIP() << "no NVIDIA GPU, or MLX is not its CUDA build: nothing runs on CUDA here";
    }
    RunFixture::SetUp();
  }

  struct Run {
    std::vector<double> losses;
    std::vector<float> parameters;
  };
  Run run(Backend backend, TrainingConfig config) {
    BackendScope scope(backend);
    const DefaultDeviceScope device(backend);
    config.adapter_path = (folder_ / std::string(backend_name(backend))).string();
    Run out;
    TrainerCallbacks callbacks;
    callbacks.on_step = [&](int, double loss) { out.losses.push_back(loss); };
    auto trainer = make_trainer(config, callbacks);
    trainer->run();
    out.parameters = parameters(trainer->adapter());
    return out;
  }

  static AdapterWeights random_adapter(const Model& model, const TrainingConfig& config) {
    const auto fresh = initial_adapter(model.config(), config);
    auto values = fresh.parameters();
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = mx::multiply(
          mx::array(0.05f),
          mx::random::normal(values[i].shape(), mx::float32, 0.0f, 1.0f, mx::random::key(i)));
    }
    mx::eval(values);
    return fresh.with_parameters(values);
  }
};

/// f32: as between the CPU and the emulator (tests/train/metal_test.cpp).
TEST_F(CudaTraining, TwentyStepsOfSingleOperationsEqualTheCpu) {
  auto config = make_config("run");
  config.steps_per_report = 1;
  const auto cpu = run(Backend::cpu, config);
  const auto cuda = run(Backend::cuda, config);
  ASSERT_EQ(cpu.losses.size(), 20u);
  ASSERT_EQ(cuda.losses.size(), 20u);
  for (size_t i = 0; i < cpu.losses.size(); ++i) {
    EXPECT_NEAR(cuda.losses[i], cpu.losses[i], 1e-5 * static_cast<double>(i + 1) * cpu.losses[i])
        << "step " << i;
  }
}

/// bf16: every activation is rounded to 8 bits (2^-9 of its size, at random). A loss is a mean over
/// some hundred tokens of logits that went through about 20 roundings: √20·2^-9 ≈ 1 % of a logit's
/// own spread a token, an order less in the mean; AdamW passes signs on, so that it grows by step.
TEST_F(CudaTraining, TwentyFusedStepsEqualTheCpu) {
  auto config = make_config("run");
  config.steps_per_report = 1;
  config.dtype = "bfloat16";
  const auto cpu = run(Backend::cpu, config);
  const auto cuda = run(Backend::cuda, config);
  const auto again = run(Backend::cuda, config);
  ASSERT_EQ(cpu.losses.size(), 20u);
  ASSERT_EQ(cuda.losses.size(), 20u);
  for (size_t i = 0; i < cpu.losses.size(); ++i) {
    EXPECT_NEAR(
        cuda.losses[i], cpu.losses[i], 1e-3 * (1.0 + 0.5 * static_cast<double>(i)) * cpu.losses[i])
        << "step " << i;
    EXPECT_EQ(cuda.losses[i], again.losses[i]) << "not repeatable at step " << i;
  }
  EXPECT_EQ(cuda.parameters, again.parameters);
  EXPECT_LT(cuda.losses.back(), cuda.losses.front());
}

TEST_F(CudaTraining, TheFusedStepsGradientIsTheGraphs) {
  const auto ints = [](const std::vector<int32_t>& v) {
    return mx::array(v.data(), {static_cast<int>(v.size())}, mx::int32);
  };
  std::vector<int32_t> ids, positions, starts, targets;
  std::vector<float> counts;
  for (int i = 0; i < 75; ++i) {  // two segments, an odd number of tokens
    ids.push_back(60 + 7 * i % 50);
    targets.push_back(60 + 7 * (i + 1) % 50);
    starts.push_back(i < 33 ? 0 : 33);
    positions.push_back(i - starts.back());
    counts.push_back(i % 5 == 0 ? 0.0f : 1.0f);
  }
  auto config = make_config("run");
  config.dtype = "bfloat16";
  const auto gradient = [&](Backend backend, bool fused, size_t budget) {
    BackendScope scope(backend);
    const DefaultDeviceScope device(backend);
    auto model = Model::load(config.model, config.load_options());
    const auto adapter = random_adapter(*model, config);
    const ops::Segments segments{ints(positions), ints(starts)};
    const auto weights = mx::array(counts.data(), {75}, mx::float32);
    std::vector<mx::array> flat;
    for (const auto& p : adapter.parameters()) flat.push_back(mx::flatten(p));
    std::vector<float> out;
    if (fused) {
      EXPECT_EQ(model->train_step_refusal(adapter), "");
      auto plan = model->make_train_plan(adapter, budget);
      auto [loss, grad] =
          ops::train_step(plan, mx::concatenate(flat), ints(ids), segments, ints(targets), weights);
      mx::eval(loss, grad);
      out.push_back(loss.item<float>());
      out.insert(out.end(), grad.data<float>(), grad.data<float>() + grad.size());
    } else {
      const auto values = adapter.parameters();
      std::vector<int> all(values.size());
      for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
      auto [loss, grads] = mx::value_and_grad(
          [&](const std::vector<mx::array>& v) {
            return model->loss(
                ints(ids), segments, ints(targets), weights, adapter.with_parameters(v), true);
          },
          all)(values);
      for (auto& g : grads) g = mx::flatten(mx::astype(g, mx::float32));
      auto grad = mx::concatenate(grads);
      mx::eval(loss, grad);
      out.push_back(loss.item<float>());
      out.insert(out.end(), grad.data<float>(), grad.data<float>() + grad.size());
    }
    return out;
  };
  const auto truth = gradient(Backend::cpu, false, 0);
  const auto all_kept = gradient(Backend::cuda, true, size_t{8} << 30);
  const auto recomputed = gradient(Backend::cuda, true, 0);
  const auto graph = gradient(Backend::cuda, false, 0);
  EXPECT_EQ(all_kept, recomputed) << "recomputing changes bits";
  const auto distance = [&](const std::vector<float>& got) {
    double apart = 0.0, size = 0.0;
    EXPECT_EQ(got.size(), truth.size());
    for (size_t i = 1; i < truth.size(); ++i) {
      apart += std::pow(double{got[i]} - truth[i], 2);
      size += std::pow(double{truth[i]}, 2);
    }
    return std::sqrt(apart / size);
  };
  // bf16 gradients: some 40 roundings of 2^-9 each way, as independent: 40^½·2^-9 ≈ 1.2 %, and the
  // CPU's own as much.
  EXPECT_LT(distance(all_kept), 3e-2);
  EXPECT_LT(distance(graph), 3e-2);
  EXPECT_NEAR(all_kept[0], truth[0], 2e-3 * truth[0]);
}

/// What the trainer takes when all that it would rather keep does not fit.
TEST_F(CudaTraining, TheFusedStepFitsWhereTheGraphsActivationsDoNot) {
  auto config = make_config("run");
  config.dtype = "bfloat16";
  BackendScope scope(Backend::cuda);
  const DefaultDeviceScope device(Backend::cuda);
  auto model = Model::load(config.model, config.load_options());
  const auto plan = model->make_train_plan(random_adapter(*model, config), 0);
  constexpr int64_t kTokens = 1 << 20;
  EXPECT_LT(plan->least_bytes(kTokens), estimate_memory(*model, config, kTokens, 0).activations);
  // Scratch of a fixed size, and rows.
  const size_t fixed = plan->least_bytes(1);
  EXPECT_LT(fixed, size_t{512} << 20);
  EXPECT_NEAR(
      static_cast<double>(plan->least_bytes(kTokens) - fixed),
      2.0 * static_cast<double>(plan->least_bytes(kTokens / 2) - fixed),
      static_cast<double>(fixed));
}

TEST_F(CudaTraining, GeneratesTheCpusTokens) {
  const auto config = make_config("run");
  const auto generate = [&](Backend backend) {
    BackendScope scope(backend);
    const DefaultDeviceScope device(backend);
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
  EXPECT_EQ(generate(Backend::cuda), generate(Backend::cpu));
}

}  // namespace
}  // namespace metal_lora::train

#endif
