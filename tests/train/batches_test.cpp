// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/batches.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "src/train/rng.h"

namespace metal_lora::train {
namespace {

using testing::ElementsAre;

Dataset random_dataset(size_t count, int longest) {
  std::vector<std::vector<int32_t>> rows(count);
  for (size_t i = 0; i < count; ++i) {
    rows[i].resize(2 + random_below(11, i, static_cast<uint64_t>(longest - 1)));
    std::iota(rows[i].begin(), rows[i].end(), static_cast<int32_t>(i * 1000));
  }
  return Dataset::from_samples(rows);
}

std::vector<uint32_t> all_samples(const std::vector<StepSamples>& plan) {
  std::vector<uint32_t> out;
  for (const auto& step : plan) {
    for (const auto& micro : step) out.insert(out.end(), micro.begin(), micro.end());
  }
  return out;
}

TEST(MicroBatch, LaysSamplesEndToEnd) {
  const Dataset data = Dataset::from_samples({{1, 2, 3}, {7, 8}, {4, 5, 6, 9}}, {0, 0, 2});
  const std::vector<uint32_t> order = {2, 0, 1};
  const MicroBatch batch = make_micro_batch(data, order);
  EXPECT_THAT(batch.tokens, ElementsAre(4, 5, 6, 1, 2, 7));
  EXPECT_THAT(batch.targets, ElementsAre(5, 6, 9, 2, 3, 8));
  EXPECT_THAT(batch.positions, ElementsAre(0, 1, 2, 0, 1, 0));
  EXPECT_THAT(batch.segment_start, ElementsAre(0, 0, 0, 3, 3, 5));
  // The prompt of sample 2 is {4, 5}: 6 is the first token to learn.
  EXPECT_THAT(batch.weights, ElementsAre(0, 1, 1, 1, 1, 1));
  EXPECT_EQ(batch.trained_tokens, 5);
  EXPECT_EQ(batch.sample_tokens, 9);
}

TEST(PlanEpoch, EverySampleOnceInEveryMode) {
  const Dataset data = random_dataset(103, 40);
  for (const bool packing : {false, true}) {
    for (const int batch : {1, 4, 200}) {
      BatchOptions options{batch, 3, packing, 64, 5};
      auto samples = all_samples(plan_epoch(data, options, 2));
      std::sort(samples.begin(), samples.end());
      ASSERT_EQ(samples.size(), data.size());
      for (uint32_t i = 0; i < samples.size(); ++i) EXPECT_EQ(samples[i], i);
    }
  }
}

TEST(PlanEpoch, IsAFunctionOfSeedAndEpoch) {
  const Dataset data = random_dataset(60, 30);
  const BatchOptions options{4, 1, false, 64, 5};
  BatchOptions other = options;
  other.seed = 6;
  EXPECT_EQ(plan_epoch(data, options, 3), plan_epoch(data, options, 3));
  EXPECT_NE(plan_epoch(data, options, 3), plan_epoch(data, options, 4));
  EXPECT_NE(plan_epoch(data, options, 3), plan_epoch(data, other, 3));
}

TEST(PlanEpoch, StepsShareLengthsAndComeShuffled) {
  const Dataset data = random_dataset(400, 100);
  const auto plan = plan_epoch(data, {4, 1, false, 128, 1}, 0);
  std::vector<size_t> longest;
  size_t previous_high = 0;
  std::vector<std::pair<size_t, size_t>> ranges;
  for (const auto& step : plan) {
    size_t low = 1000, high = 0;
    for (const uint32_t sample : step[0]) {
      low = std::min(low, data.sample(sample).tokens.size());
      high = std::max(high, data.sample(sample).tokens.size());
    }
    ranges.emplace_back(low, high);
    longest.push_back(high);
  }
  EXPECT_FALSE(std::is_sorted(longest.begin(), longest.end()));
  // Sorted by length, the steps' ranges touch at most at their ends.
  std::sort(ranges.begin(), ranges.end());
  for (const auto& [low, high] : ranges) {
    EXPECT_GE(low, previous_high);
    previous_high = high;
  }
}

TEST(PlanEpoch, AccumulationSplitsTheSameSteps) {
  const Dataset data = random_dataset(37, 20);
  const auto flat = [](const std::vector<StepSamples>& plan) {
    std::vector<std::vector<uint32_t>> out;
    for (const auto& step : plan) {
      out.emplace_back();
      for (const auto& micro : step) {
        out.back().insert(out.back().end(), micro.begin(), micro.end());
      }
    }
    return out;
  };
  const auto big = plan_epoch(data, {8, 1, false, 64, 9}, 1);
  const auto small = plan_epoch(data, {2, 4, false, 64, 9}, 1);
  EXPECT_EQ(flat(big), flat(small));
  for (const auto& step : small) {
    for (const auto& micro : step) EXPECT_LE(micro.size(), 2u);
  }
}

TEST(PlanEpoch, PackedStreamsKeepTheirBound) {
  const Dataset data = random_dataset(300, 50);
  const int max_tokens = 64;
  const auto plan = plan_epoch(data, {1, 1, true, max_tokens, 3}, 0);
  size_t total = 0;
  for (const auto& step : plan) {
    const size_t tokens = make_micro_batch(data, step[0]).tokens.size();
    EXPECT_LE(tokens, static_cast<size_t>(max_tokens));
    total += tokens;
  }
  // Best fit leaves no two streams that could be one: on average they are more than half full.
  EXPECT_GT(total * 2, plan.size() * max_tokens);
}

TEST(PlanEpoch, LargestMicroBatchIsABound) {
  const Dataset data = random_dataset(90, 50);
  for (const bool packing : {false, true}) {
    const BatchOptions options{4, 2, packing, 50, 8};
    const int64_t bound = largest_micro_batch(data, options);
    for (uint64_t epoch = 0; epoch < 5; ++epoch) {
      for (const auto& step : plan_epoch(data, options, epoch)) {
        for (const auto& micro : step) {
          EXPECT_LE(static_cast<int64_t>(make_micro_batch(data, micro).tokens.size()), bound);
        }
      }
    }
  }
}

TEST(PlanEvaluation, IsFixedAndBounded) {
  const Dataset data = random_dataset(50, 30);
  EXPECT_EQ(all_samples({plan_evaluation(data, 4, -1)}).size(), 50u);
  const auto some = plan_evaluation(data, 4, 3);
  EXPECT_EQ(some.size(), 3u);
  EXPECT_EQ(some, plan_evaluation(data, 4, 3));
  const auto samples = all_samples({some});
  EXPECT_EQ(std::set<uint32_t>(samples.begin(), samples.end()).size(), 12u);
}

}  // namespace
}  // namespace metal_lora::train
