// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Verification of drafted tokens in Metal: token for token against f64 and the CPU kernel, and the
// distribution that rejection sampling must keep.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "kernels/cpu/lora_speculative.h"
#include "kernels/metal/plans_verify.h"
#include "tests/metal/stored_weight.h"

namespace metal_lora {
namespace {

namespace mx = mlx::core;

struct Verified {
  std::vector<int32_t> accepted, next_token;
  bool operator==(const Verified&) const = default;
};

/// A batch to verify. `logits` as stored.
struct Drafted {
  int batch, drafts, vocab;
  DType dtype;
  float temperature;
  uint64_t seed;
  test::Operand logits{mx::array(0.0f), {}};
  std::vector<int32_t> tokens = {};
  std::vector<float> q = {};  ///< empty: drafts are certain
};

Verified run_metal(const Drafted& d) {
  const metal::VerifyShape shape{
      .batch = uint32_t(d.batch),
      .drafts = uint32_t(d.drafts),
      .vocab = uint32_t(d.vocab),
      .dtype = d.dtype,
      .temperature = d.temperature,
      .has_draft_probs = !d.q.empty(),
      .seed = d.seed};
  test::NamedArrays arrays = {
      {"logits", d.logits.array}, {"draft_tokens", test::int_array(d.tokens, {d.batch, d.drafts})}};
  if (!d.q.empty()) {
    arrays.emplace("draft_probs", mx::array(d.q.data(), {d.batch, d.drafts, d.vocab}));
  }
  const OutputSpec tokens{{d.batch}, mx::int32};
  const auto out = test::run(
      {metal::plan_verify(shape)}, arrays, {{"accepted", tokens}, {"next_token", tokens}});
  const auto ints = [](const mx::array& a) {
    return std::vector<int32_t>(a.data<int32_t>(), a.data<int32_t>() + a.size());
  };
  return {ints(out.at("accepted")), ints(out.at("next_token"))};
}

Verified run_cpu(const Drafted& d) {
  VerifyParams p;
  p.batch = uint32_t(d.batch);
  p.drafts = uint32_t(d.drafts);
  p.vocab = uint32_t(d.vocab);
  p.dtype = DType::f32;
  p.temperature = d.temperature;
  p.seed = d.seed;
  const std::vector<float> logits(d.logits.value.begin(), d.logits.value.end());
  Verified out{std::vector<int32_t>(d.batch), std::vector<int32_t>(d.batch)};
  cpu::verify_tokens(
      p,
      logits.data(),
      d.tokens.data(),
      d.q.empty() ? nullptr : d.q.data(),
      out.accepted.data(),
      out.next_token.data());
  return out;
}

double uniform(const Drafted& d, int sequence, int counter) {
  return (cpu::counter_hash(d.seed, uint32_t(sequence), uint32_t(counter)) >> 8) * 0x1p-24;
}

/// A row's distribution, and how far f32's may be from it: roundings of the argument (its division,
/// product and difference: 4 of 2^-24 each) and of the exponential (4) scale a weight by its own
/// argument; the sums of 16 spans of 32 lanes round vocab / 512 + 40 times.
struct Distribution {
  std::vector<double> p, argument;
  double sum_error = 0.0;
  double error_of(int v) const { return sum_error + (argument[v] + 1.0) * 4 * test::kF32; }
};

Distribution distribution(const double* logits, int vocab, double temperature) {
  Distribution d;
  const double largest = *std::max_element(logits, logits + vocab);
  double sum = 0.0, mean = 0.0;
  for (int v = 0; v < vocab; ++v) {
    d.argument.push_back((largest - logits[v]) / temperature);
    sum += std::exp(-d.argument[v]);
  }
  for (int v = 0; v < vocab; ++v) {
    d.p.push_back(std::exp(-d.argument[v]) / sum);
    mean += d.p[v] * d.argument[v];
  }
  d.sum_error = (vocab / 512 + 40 + (mean + 1.0) * 4) * test::kF32;
  return d;
}

/// The token at u by the inverse distribution function, and how far u is from the next boundary.
int draw(const std::vector<double>& weight, double u, double& margin) {
  double total = 0.0, through = 0.0;
  for (const double w : weight) total += w;
  int token = -1;
  margin = 1.0;
  for (size_t v = 0; v < weight.size(); ++v) {
    through += weight[v];
    if (weight[v] > 0.0) margin = std::min(margin, std::fabs(through / total - u));
    if (token < 0 && through > u * total) token = static_cast<int>(v);
  }
  return token;
}

/// Leviathan et al. in f64. Every decision must be clear of f32's rounding.
Verified reference(const Drafted& d) {
  Verified out;
  for (int b = 0; b < d.batch; ++b) {
    int i = 0;
    std::vector<double> weight;
    double error = 0.0;
    for (;; ++i) {
      const double* row = &d.logits.value[(size_t(b) * (d.drafts + 1) + i) * d.vocab];
      const Distribution target = distribution(row, d.vocab, d.temperature);
      weight = target.p;
      error = target.sum_error;
      if (i == d.drafts) break;
      const int x = d.tokens[b * d.drafts + i];
      const float* q = d.q.empty() ? nullptr : &d.q[(size_t(b) * d.drafts + i) * d.vocab];
      const double threshold = uniform(d, b, 2 * i) * (q ? q[x] : 1.0);
      EXPECT_GT(std::fabs(threshold - weight[x]), target.error_of(x) * weight[x])
          << "choose another seed";
      if (threshold < weight[x]) continue;
      double rest = 0.0;
      for (int v = 0; v < d.vocab; ++v) {
        if (q) {
          weight[v] = std::max(weight[v] - double{q[v]}, 0.0);
        } else if (v == x) {
          weight[v] = 0.0;
        }
        rest += weight[v];
      }
      error =
          2 * error / rest;  // of p, relative to what is left of it: in the token and in the sum
      break;
    }
    double margin = 0.0;
    out.accepted.push_back(i);
    out.next_token.push_back(draw(weight, uniform(d, b, 2 * i + 1), margin));
    EXPECT_GT(margin, error) << "choose another seed";
  }
  return out;
}

/// Drafts from q, which is a mixture of the target and noise, so that some are kept.
Drafted drafted(
    int batch,
    int drafts,
    int vocab,
    DType dtype,
    float temperature,
    bool probabilities,
    uint64_t seed) {
  test::Random random(seed);
  Drafted d{batch, drafts, vocab, dtype, temperature, seed * 0x9e3779b97f4a7c15ull};
  d.logits = test::operand(
      random.normal(size_t(batch) * (drafts + 1) * vocab, 2.0f), {batch, drafts + 1, vocab}, dtype);
  for (int b = 0; b < batch; ++b) {
    for (int i = 0; i < drafts; ++i) {
      const double* row = &d.logits.value[(size_t(b) * (drafts + 1) + i) * vocab];
      auto q = distribution(row, vocab, temperature > 0 ? temperature : 1.0).p;
      double sum = 0.0;
      for (double& v : q) sum += v = 0.7 * v + 0.6 / vocab * random.uniform();
      for (double& v : q) v /= sum;
      double margin = 0.0;
      const bool best = temperature == 0 && random.uniform() < 0.8;
      d.tokens.push_back(
          best ? static_cast<int32_t>(std::max_element(row, row + vocab) - row)
               : draw(q, random.uniform(), margin));
      if (probabilities) d.q.insert(d.q.end(), q.begin(), q.end());
    }
  }
  return d;
}

TEST(MetalVerify, GreedyKeepsDraftsWhileTheyAreTheLargest) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int vocab : {7, 1000, 1027}) {
      const Drafted d = drafted(5, 4, vocab, dtype, 0.0f, false, 100 + vocab);
      Verified want;
      for (int b = 0; b < d.batch; ++b) {
        int i = 0, largest = 0;
        for (;; ++i) {
          const double* row = &d.logits.value[(size_t(b) * (d.drafts + 1) + i) * vocab];
          largest = static_cast<int>(std::max_element(row, row + vocab) - row);
          if (i == d.drafts || largest != d.tokens[b * d.drafts + i]) break;
        }
        want.accepted.push_back(i);
        want.next_token.push_back(largest);
      }
      EXPECT_EQ(run_metal(d), want) << vocab;
      EXPECT_EQ(run_cpu(d), want) << vocab;
    }
  }
}

TEST(MetalVerify, SamplesAsTheFormulaAndTheCpu) {
  for (const auto& [dtype, probabilities] :
       {std::pair{DType::f32, true}, {DType::f16, false}, {DType::bf16, true}}) {
    for (const int vocab : {5, 700}) {
      const Drafted d = drafted(12, 3, vocab, dtype, 0.8f, probabilities, 200 + vocab);
      const Verified want = reference(d);
      EXPECT_EQ(run_metal(d), want) << vocab << " " << probabilities;
      EXPECT_EQ(run_cpu(d), want) << vocab << " " << probabilities;
    }
  }
}

TEST(MetalVerify, WithoutDraftsTheRowIsDrawnFrom) {
  for (const float temperature : {0.0f, 1.0f}) {
    Drafted d = drafted(3, 0, 90, DType::f32, temperature, false, 3);
    Verified want = run_cpu(d);
    EXPECT_EQ(want.accepted, (std::vector<int32_t>{0, 0, 0}));
    EXPECT_EQ(run_metal(d), want);
  }
}

TEST(MetalVerify, EqualsGiveTheLowestToken) {
  Drafted d = drafted(1, 1, 600, DType::f32, 0.0f, false, 1);
  std::vector<float> logits(1200, 0.25f);
  d.logits = test::operand(logits, {1, 2, 600}, DType::f32);
  d.tokens = {0};
  EXPECT_EQ(run_metal(d), (Verified{{1}, {0}}));
  logits[599] = logits[431] = 1.0f;
  d.logits = test::operand(logits, {1, 2, 600}, DType::f32);
  EXPECT_EQ(run_metal(d), (Verified{{0}, {431}}));
}

TEST(MetalVerify, RowsWithoutADistributionEndASequence) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Drafted d = drafted(5, 1, 50, DType::f32, 1.0f, false, 2);
  std::vector<float> logits(d.logits.value.begin(), d.logits.value.end());
  logits[3] = std::numeric_limits<float>::quiet_NaN();
  std::fill_n(logits.begin() + 100, 50, -kInfinity);
  logits[200 + 7] = kInfinity;
  std::fill_n(logits.begin() + 301, 49, -kInfinity);  // only token 0 is possible
  d.tokens = {1, 1, 1, 0, -5};                        // the last one is no token
  d.logits = test::operand(logits, {5, 2, 50}, DType::f32);
  const Verified got = run_metal(d);
  EXPECT_EQ(got, run_cpu(d));
  EXPECT_EQ(got.next_token[0], -1);
  EXPECT_EQ(got.next_token[1], -1);
  EXPECT_EQ(got.next_token[2], -1);
  EXPECT_EQ(got.accepted, (std::vector<int32_t>{0, 0, 0, 1, 0}));
  EXPECT_GE(got.next_token[4], 0);
}

/// Pearson's statistic of counts against p. The tail of chi-square with f degrees of freedom beyond
/// f + 2·√(f·t) + 2·t is below e^-t (Laurent and Massart, Annals of Statistics 28, 2000); t = 14:
/// one in a million.
void expect_distribution(
    const std::vector<int>& counts, const std::vector<double>& p, const char* what) {
  double total = 0.0, statistic = 0.0;
  for (const int c : counts) total += c;
  ASSERT_GT(total, 200) << what;
  for (size_t v = 0; v < p.size(); ++v) {
    ASSERT_GT(total * p[v], 5.0) << what << ": too few to compare";
    statistic += std::pow(counts[v] - total * p[v], 2) / (total * p[v]);
  }
  const double freedom = static_cast<double>(p.size()) - 1.0, t = 14.0;
  EXPECT_LT(statistic, freedom + 2.0 * std::sqrt(freedom * t) + 2.0 * t) << what;
}

TEST(MetalVerify, KeepsTheTargetsDistribution) {
  constexpr int kBatch = 1200, kDrafts = 2, kVocab = 6;
  const std::vector<double> target[3] = {
      {0.30, 0.25, 0.05, 0.20, 0.10, 0.10},
      {0.10, 0.40, 0.15, 0.15, 0.10, 0.10},
      {0.05, 0.15, 0.20, 0.10, 0.25, 0.25}};
  const std::vector<double> proposal[2] = {
      {0.10, 0.15, 0.25, 0.30, 0.10, 0.10}, {0.20, 0.20, 0.05, 0.25, 0.10, 0.20}};
  Drafted d{kBatch, kDrafts, kVocab, DType::f32, 1.0f, 77};
  test::Random random(5);
  std::vector<float> logits;
  for (int b = 0; b < kBatch; ++b) {
    for (const auto& row : target) {
      for (const double p : row) logits.push_back(static_cast<float>(std::log(p) + 1.5));
    }
    for (const auto& row : proposal) {
      double margin = 0.0;
      d.tokens.push_back(draw(row, random.uniform(), margin));
      d.q.insert(d.q.end(), row.begin(), row.end());
    }
  }
  d.logits = test::operand(logits, {kBatch, kDrafts + 1, kVocab}, DType::f32);
  const Verified got = run_metal(d);
  std::vector<int> counts[3] = {
      std::vector<int>(kVocab), std::vector<int>(kVocab), std::vector<int>(kVocab)};
  for (int b = 0; b < kBatch; ++b) {
    for (int i = 0; i <= got.accepted[b]; ++i) {
      ++counts[i][i < got.accepted[b] ? d.tokens[b * kDrafts + i] : got.next_token[b]];
    }
  }
  expect_distribution(counts[0], target[0], "first token");
  expect_distribution(counts[1], target[1], "second token");
  expect_distribution(counts[2], target[2], "token after all drafts");
}

TEST(VerifyPlan, RefusesByName) {
  metal::VerifyShape shape{.batch = 0, .drafts = 2, .vocab = 10};
  EXPECT_THROW(metal::plan_verify(shape), std::invalid_argument);
  shape.batch = 1;
  shape.temperature = -1.0f;
  EXPECT_THROW(metal::plan_verify(shape), std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora
