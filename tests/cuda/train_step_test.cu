// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What a training step keeps and how much it takes: host arithmetic, which needs no GPU. Its values
// are tested through the trainer (tests/train/cuda_test.cpp).
#include <gtest/gtest.h>

#include "kernels/cuda/train_step.h"

namespace metal_lora::cuda {
namespace {

/// 16 layers, 2048 wide, as the published benchmark's.
TrainModel billion(WeightFormat format) {
  TrainModel m;
  m.dims = 2048;
  m.ffn = 8192;
  m.q_heads = 32;
  m.kv_heads = 8;
  m.head_dim = 64;
  const auto linear = [&](uint32_t n, uint32_t k) {
    TrainLinear l;
    l.weight.params.n = n;
    l.weight.params.k = k;
    l.weight.params.format = format;
    l.rank = 16;
    l.a = m.parameters;
    m.parameters += size_t{16} * k;
    l.b = m.parameters;
    m.parameters += size_t{16} * n;
    return l;
  };
  for (int i = 0; i < 16; ++i) {
    TrainLayer layer;
    layer.q = layer.o = linear(2048, 2048);
    layer.k = layer.v = linear(512, 2048);
    layer.gate = layer.up = linear(8192, 2048);
    layer.down = linear(2048, 8192);
    m.layers.push_back(layer);
  }
  return m;
}

constexpr uint32_t kTokens = 4096;

TEST(CudaTrainStep, KeepsWhatTheBudgetHolds) {
  const auto model = billion(WeightFormat::bf16);
  const size_t least = TrainStep(model, kTokens, {}).workspace_bytes();
  const size_t most = TrainStep(model, kTokens, {16, 16, 16}).workspace_bytes();
  EXPECT_LT(least, most);
  EXPECT_EQ(TrainStep::fit(model, kTokens, 0), Retention{});
  EXPECT_EQ(TrainStep::fit(model, kTokens, most), (Retention{16, 16, 16}));
  Retention before;
  for (size_t budget = least; budget <= most; budget += (most - least) / 40) {
    const Retention kept = TrainStep::fit(model, kTokens, budget);
    EXPECT_LE(TrainStep(model, kTokens, kept).workspace_bytes(), budget);
    EXPECT_GE(kept.gate_up, before.gate_up);
    // The dearer to make again, the sooner it is kept.
    if (kept.gate_up < 15) EXPECT_LE(kept.act, kept.gate_up);
    before = kept;
  }
}

/// 50 KiB a token and layer with gate and up, 24 KiB more with all; u, logsumexp and what is shared
/// come on top.
TEST(CudaTrainStep, TakesWhatTheLayersAddUpTo) {
  const auto model = billion(WeightFormat::bf16);
  const auto bytes = [&](const Retention& kept) {
    return static_cast<double>(TrainStep(model, kTokens, kept).workspace_bytes());
  };
  const double token_layers = 16.0 * kTokens * 1024;
  // What layers without their own share lies where the loss works between the two passes.
  const double own = kTokens * (3 * 8192 + 2 * 2048) * 2.0;
  EXPECT_LT(bytes({15, 15, 15}), bytes({16, 16, 16}));
  EXPECT_GT(bytes({15, 15, 15}), bytes({16, 16, 16}) - own);
  EXPECT_NEAR(bytes({8, 0, 0}) - bytes({4, 0, 0}), 4 * token_layers / 16 * 32, 1e6);
  EXPECT_GT(bytes({16, 16, 16}), 74 * token_layers);
  EXPECT_LT(bytes({16, 16, 16}), 74 * token_layers + 1.0e9);
}

TEST(CudaTrainStep, ADenseCopyOfTheWidestGroupIsAllThatAQuantisedBaseAdds) {
  const size_t dense = TrainStep(billion(WeightFormat::bf16), kTokens, {}).workspace_bytes();
  const size_t quantised = TrainStep(billion(WeightFormat::nf4), kTokens, {}).workspace_bytes();
  EXPECT_EQ(quantised - dense, size_t{2} * 8192 * 2048 * 2);
}

TEST(CudaTrainStep, RefusesMoreTokensThanItWasMadeFor) {
  const TrainStep step(billion(WeightFormat::bf16), 64, {});
  TrainBatch batch;
  for (uint32_t tokens : {0u, 65u}) {
    batch.tokens = tokens;
    EXPECT_THROW(
        step.run(Context{}, nullptr, batch, nullptr, nullptr, nullptr), std::invalid_argument);
  }
}

}  // namespace
}  // namespace metal_lora::cuda
