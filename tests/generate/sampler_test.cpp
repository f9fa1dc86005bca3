// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The sampler against an oracle that sorts everything and computes in f64, step by step as
// SamplingOptions documents.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "metal_lora/error.h"
#include "metal_lora/generate.h"

namespace metal_lora {
namespace {

using Probabilities = std::vector<double>;

/// Probability of each token after all filters.
Probabilities oracle(
    std::vector<double> logits,
    const SamplingOptions& o,
    const std::vector<int32_t>& history,
    size_t answer) {
  for (const auto& [id, bias] : o.logit_bias) logits[id] += bias;
  const size_t window = o.repetition_context == 0
                            ? history.size()
                            : std::min<size_t>(o.repetition_context, history.size());
  const std::set<int32_t> recent(
      history.end() - static_cast<std::ptrdiff_t>(window), history.end());
  for (const int32_t id : recent) {
    logits[id] =
        logits[id] < 0 ? logits[id] * o.repetition_penalty : logits[id] / o.repetition_penalty;
  }
  std::map<int32_t, int> counts;
  for (size_t i = history.size() - answer; i < history.size(); ++i) ++counts[history[i]];
  for (const auto& [id, count] : counts)
    logits[id] -= o.presence_penalty + o.frequency_penalty * count;
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(
      order.begin(), order.end(), [&](size_t x, size_t y) { return logits[x] > logits[y]; });
  const double best = logits[order[0]];
  Probabilities weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i)
    weights[i] = std::exp((logits[i] - best) / o.temperature);
  size_t kept = o.top_k == 0 ? order.size() : std::min<size_t>(o.top_k, order.size());
  if (o.top_p < 1.0f) {
    double total = 0, sum = 0;
    for (size_t i = 0; i < kept; ++i) total += weights[order[i]];
    size_t run = 0;
    while (run < kept && sum < o.top_p * total) sum += weights[order[run++]];
    kept = run;
  }
  Probabilities result(logits.size(), 0.0);
  double total = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (weights[order[i]] < o.min_p) continue;
    result[order[i]] = weights[order[i]];
    total += weights[order[i]];
  }
  for (double& p : result) p /= total;
  return result;
}

std::vector<float> random_logits(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> logits(count);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

/// Frequencies of many draws agree with the oracle's probabilities: Pearson's chi-square over the
/// tokens that are expected at least five times, and no token that the oracle forbids.
void expect_distribution(
    SamplingOptions o,
    const std::vector<float>& logits,
    const std::vector<int32_t>& history = {},
    size_t answer = 0) {
  const Probabilities expected = oracle({logits.begin(), logits.end()}, o, history, answer);
  constexpr int kDraws = 4000;
  std::vector<int> counts(logits.size(), 0);
  Sampler sampler(o);
  for (int i = 0; i < kDraws; ++i) ++counts[sampler.sample(logits, history, answer)];
  double chi_square = 0, rest_expected = 0, rest_seen = 0;
  int cells = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    ASSERT_TRUE(expected[i] > 0.0 || counts[i] == 0) << "token " << i << " is filtered out";
    const double mean = expected[i] * kDraws;
    if (mean < 5) {
      rest_expected += mean;
      rest_seen += counts[i];
      continue;
    }
    chi_square += (counts[i] - mean) * (counts[i] - mean) / mean;
    ++cells;
  }
  if (rest_expected >= 5) {
    chi_square += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
    ++cells;
  }
  // Mean n − 1, variance 2(n − 1); six standard deviations. The seed is fixed: no flakes.
  const double freedom = std::max(1, cells - 1);
  EXPECT_LT(chi_square, freedom + 6 * std::sqrt(2 * freedom)) << cells << " cells";
}

TEST(Sampler, GreedyTakesTheLargestAndTheLowestIdAmongEquals) {
  Sampler sampler(SamplingOptions{});
  const std::vector<float> logits = {0.5f, 2.0f, -1.0f, 2.0f};
  EXPECT_EQ(sampler.sample(logits, {}, 0), 1);
}

TEST(Sampler, DrawsInProportionToProbability) {
  SamplingOptions o;
  o.temperature = 1.0f;
  o.seed = 11;
  expect_distribution(o, random_logits(40, 1));
  o.temperature = 0.5f;
  expect_distribution(o, random_logits(1000, 2));
  o.temperature = 3.0f;
  expect_distribution(o, random_logits(40, 3));
}

TEST(Sampler, EachFilterAloneAndAllTogether) {
  SamplingOptions o;
  o.temperature = 1.3f;
  o.seed = 5;
  const auto logits = random_logits(500, 4);
  for (const int top_k : {1, 2, 7, 499, 500, 5000}) {
    SamplingOptions with = o;
    with.top_k = top_k;
    expect_distribution(with, logits);
  }
  for (const float top_p : {0.01f, 0.3f, 0.9f, 0.999f}) {
    SamplingOptions with = o;
    with.top_p = top_p;
    expect_distribution(with, logits);
  }
  for (const float min_p : {0.01f, 0.2f, 1.0f}) {
    SamplingOptions with = o;
    with.min_p = min_p;
    expect_distribution(with, logits);
  }
  o.top_k = 50;
  o.top_p = 0.8f;
  o.min_p = 0.02f;
  expect_distribution(o, logits);
}

TEST(Sampler, TopPNeedsMoreThanTheFirstSelection) {
  SamplingOptions o;
  o.temperature = 1.0f;
  o.top_p = 0.95f;
  o.seed = 3;
  std::vector<float> flat(2000, 0.0f);  // 1900 tokens share 95 %
  for (size_t i = 0; i < flat.size(); ++i) flat[i] = 1e-3f * static_cast<float>(i % 7);
  const Probabilities expected = oracle({flat.begin(), flat.end()}, o, {}, 0);
  Sampler sampler(o);
  for (int i = 0; i < 2000; ++i) ASSERT_GT(expected[sampler.sample(flat, {}, 0)], 0.0);
}

TEST(Sampler, PenaltiesAndBias) {
  SamplingOptions o;
  o.temperature = 1.0f;
  o.seed = 9;
  o.repetition_penalty = 1.7f;
  o.repetition_context = 4;
  o.presence_penalty = 0.4f;
  o.frequency_penalty = 0.6f;
  o.logit_bias = {{3, 2.5f}, {8, -4.0f}};
  const std::vector<int32_t> history = {1, 2, 3, 3, 5, 5, 5, 6};
  expect_distribution(o, random_logits(30, 6), history, 5);
}

TEST(Sampler, RepetitionLooksAtThePromptPresenceOnlyAtTheAnswer) {
  const std::vector<float> logits = {1.0f, 0.9f};
  SamplingOptions o;
  o.repetition_penalty = 2.0f;
  EXPECT_EQ(Sampler(o).sample(logits, std::vector<int32_t>{0}, 0), 1);
  o = {};
  o.presence_penalty = 1.0f;
  EXPECT_EQ(Sampler(o).sample(logits, std::vector<int32_t>{0}, 0), 0);
  EXPECT_EQ(Sampler(o).sample(logits, std::vector<int32_t>{0}, 1), 1);
}

TEST(Sampler, TheSeedDecides) {
  SamplingOptions o;
  o.temperature = 1.0f;
  o.seed = 42;
  const auto logits = random_logits(49152, 7);
  Sampler first(o), second(o);
  o.seed = 43;
  Sampler third(o);
  int different = 0;
  for (int i = 0; i < 50; ++i) {
    const int32_t a = first.sample(logits, {}, 0);
    ASSERT_EQ(a, second.sample(logits, {}, 0));
    different += a != third.sample(logits, {}, 0);
  }
  EXPECT_GT(different, 25);
}

TEST(Sampler, MaskedTokensNeverCome) {
  std::vector<float> logits(10, -std::numeric_limits<float>::infinity());
  logits[4] = -3.0f;
  SamplingOptions o;
  o.temperature = 1.0f;
  Sampler sampler(o);
  for (int i = 0; i < 100; ++i) ASSERT_EQ(sampler.sample(logits, {}, 0), 4);
}

TEST(Sampler, RefusesBrokenLogits) {
  SamplingOptions warm;
  warm.temperature = 0.7f;
  warm.presence_penalty = 1.0f;
  for (const SamplingOptions& o : {SamplingOptions{}, warm}) {
    Sampler sampler(o);
    EXPECT_THROW(sampler.sample(std::vector<float>{1.0f, NAN}, {}, 0), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{1.0f, INFINITY}, {}, 0), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{-INFINITY, -INFINITY}, {}, 0), Error);
  }
}

TEST(Sampler, RefusesOptionsOutOfRangeByName) {
  const auto message = [](auto change) {
    SamplingOptions o;
    change(o);
    try {
      Sampler sampler(o);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_input);
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  using O = SamplingOptions;
  EXPECT_NE(message([](O& o) { o.temperature = -1; }).find("temperature"), std::string::npos);
  EXPECT_NE(message([](O& o) { o.temperature = NAN; }).find("temperature"), std::string::npos);
  EXPECT_NE(message([](O& o) { o.top_k = -1; }).find("top_k"), std::string::npos);
  EXPECT_NE(message([](O& o) { o.top_p = 0; }).find("top_p"), std::string::npos);
  EXPECT_NE(message([](O& o) { o.top_p = 1.5f; }).find("top_p"), std::string::npos);
  EXPECT_NE(message([](O& o) { o.min_p = -0.1f; }).find("min_p"), std::string::npos);
  EXPECT_NE(
      message([](O& o) { o.repetition_penalty = 0; }).find("repetition_penalty"),
      std::string::npos);
  EXPECT_NE(
      message([](O& o) { o.frequency_penalty = INFINITY; }).find("frequency_penalty"),
      std::string::npos);
  EXPECT_NE(message([](O& o) { o.logit_bias[-1] = 0; }).find("logit_bias"), std::string::npos);
}

}  // namespace
}  // namespace metal_lora
