// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// verify_tokens against its definition in f64, and the distribution of what it lets through.
#include "kernels/cpu/lora_speculative.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemv_convert.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Inputs of a call, the logits also as doubles.
struct Inputs {
  VerifyParams p;
  std::vector<uint8_t> logits;
  std::vector<double> exact;
  std::vector<int32_t> drafts;
  std::vector<float> q;
  bool has_q = false;

  const double* row(uint32_t b, uint32_t i) const {
    return exact.data() + (size_t{b} * (p.drafts + 1) + i) * p.vocab;
  }
  void set(uint32_t b, uint32_t i, uint32_t v, float value) {
    const size_t at = (size_t{b} * (p.drafts + 1) + i) * p.vocab + v;
    write_float(logits.data(), p.dtype, at, value);
    exact[at] = read_float(logits.data(), p.dtype, at);
  }
};

struct Outputs {
  std::vector<int32_t> accepted, next;
  bool operator==(const Outputs&) const = default;
};

Outputs run(const Inputs& in) {
  Outputs out{std::vector<int32_t>(in.p.batch, -7), std::vector<int32_t>(in.p.batch, -7)};
  verify_tokens(
      in.p,
      in.logits.data(),
      in.drafts.data(),
      in.has_q ? in.q.data() : nullptr,
      out.accepted.data(),
      out.next.data());
  return out;
}

/// Logits of size `spread`; proposals near the target's distribution; drafts drawn from them (or
/// the argmax, for greedy drafts, three times of four).
Inputs random_inputs(const VerifyParams& p, bool has_q, float spread, std::mt19937& rng) {
  Inputs in;
  in.p = p;
  in.has_q = has_q;
  const size_t count = size_t{p.batch} * (p.drafts + 1) * p.vocab;
  in.logits.resize(count * 4);
  in.exact.resize(count);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < count; ++i) {
    write_float(in.logits.data(), p.dtype, i, spread * normal(rng));
    in.exact[i] = read_float(in.logits.data(), p.dtype, i);
  }
  for (uint32_t b = 0; b < p.batch; ++b) {
    for (uint32_t i = 0; i < p.drafts; ++i) {
      const double* row = in.row(b, i);
      std::vector<double> weights(p.vocab);
      const double t = p.temperature > 0 ? p.temperature : 1.0;
      for (uint32_t v = 0; v < p.vocab; ++v) {
        weights[v] = std::exp((row[v] + 0.5 * normal(rng)) / t);
      }
      const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
      for (double w : weights) in.q.push_back(static_cast<float>(w / sum));
      const auto best = static_cast<int32_t>(std::max_element(row, row + p.vocab) - row);
      std::discrete_distribution<int32_t> draw(weights.begin(), weights.end());
      const int32_t drawn = draw(rng);
      in.drafts.push_back(!has_q && rng() % 4 != 0 ? best : drawn);
    }
  }
  return in;
}

/// The definition in f64. `close`: some comparison was nearer to a tie than f32 can tell.
struct Reference {
  int32_t accepted = 0, next = -1;
  bool close = false;
};

/// The f32 sums of a draw run over a few hundred terms (a 16th of the row in 32 lanes, then 16
/// spans, then one span in order): their relative error stays below (vocab/16 + 64)·2^-24.
double sum_error(uint32_t vocab) {
  return (vocab / 16.0 + 64.0) * 0x1p-24;
}

int32_t reference_draw(const std::vector<double>& weights, double u, bool& close) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const double target = u * total;
  // Exponentials are off by 2 ulp, weights that are differences by 2 ulp of what they came from,
  // which the caller has folded into the weights' own sum being near 1.
  const double allowed = 4 * sum_error(static_cast<uint32_t>(weights.size())) * (total + 0.25);
  double through = 0;
  int32_t last = -1;
  for (size_t v = 0; v < weights.size(); ++v) {
    if (weights[v] <= 0) continue;
    if (std::fabs(through - target) < allowed) close = true;
    through += weights[v];
    last = static_cast<int32_t>(v);
    if (std::fabs(through - target) < allowed) close = true;
    if (through > target) return last;
  }
  return last;
}

double uniform(uint64_t seed, uint32_t b, uint32_t counter) {
  return (counter_hash(seed, b, counter) >> 8) * 0x1p-24;
}

Reference reference(const Inputs& in, uint32_t b) {
  const VerifyParams& p = in.p;
  Reference out;
  for (uint32_t i = 0;; ++i) {
    const double* row = in.row(b, i);
    out.accepted = static_cast<int32_t>(i);
    if (p.temperature == 0) {
      out.next = static_cast<int32_t>(std::max_element(row, row + p.vocab) - row);
      if (i == p.drafts || out.next != in.drafts[b * p.drafts + i]) return out;
      continue;
    }
    const double largest = *std::max_element(row, row + p.vocab);
    std::vector<double> prob(p.vocab);
    for (uint32_t v = 0; v < p.vocab; ++v) prob[v] = std::exp((row[v] - largest) / p.temperature);
    const double sum = std::accumulate(prob.begin(), prob.end(), 0.0);
    for (double& v : prob) v /= sum;
    const double u = uniform(p.seed, b, 2 * i + 1);
    if (i == p.drafts) {
      out.next = reference_draw(prob, u, out.close);
      return out;
    }
    const int32_t x = in.drafts[b * p.drafts + i];
    const float* q = in.has_q ? in.q.data() + (size_t{b} * p.drafts + i) * p.vocab : nullptr;
    const double chance = uniform(p.seed, b, 2 * i) * (q ? q[x] : 1.0);
    if (std::fabs(chance - prob[x]) < 8 * sum_error(p.vocab) * prob[x]) out.close = true;
    if (chance < prob[x]) continue;
    std::vector<double> rest(p.vocab);
    for (uint32_t v = 0; v < p.vocab; ++v) {
      rest[v] = q ? std::max(prob[v] - q[v], 0.0) : (static_cast<int32_t>(v) == x ? 0.0 : prob[v]);
    }
    out.next = reference_draw(rest, u, out.close);
    return out;
  }
}

VerifyParams params(
    uint32_t batch, uint32_t drafts, uint32_t vocab, DType dtype, float temperature) {
  VerifyParams p;
  p.batch = batch;
  p.drafts = drafts;
  p.vocab = vocab;
  p.dtype = dtype;
  p.temperature = temperature;
  p.seed = 1234;
  return p;
}

class Verify : public testing::Test {
 protected:
  void TearDown() override {
    set_active_isa(detected_isa());
    set_thread_count(threads_);
  }
  std::mt19937 rng_{21};
  const int threads_ = thread_count();
};

TEST_F(Verify, MatchesTheDefinition) {
  int compared = 0, total = 0;
  for (DType dtype : kDTypes) {
    for (uint32_t vocab : {1u, 7u, 33u, 512u, 1000u, 5001u}) {
      for (float temperature : {0.0f, 0.6f, 1.0f}) {
        for (bool has_q : {false, true}) {
          for (uint32_t drafts : {0u, 1u, 5u}) {
            auto p = params(17, drafts, vocab, dtype, temperature);
            p.seed = rng_() * 0x100000001ull;
            const Inputs in = random_inputs(p, has_q, 3.0f, rng_);
            const Outputs out = run(in);
            for (uint32_t b = 0; b < p.batch; ++b, ++total) {
              const Reference want = reference(in, b);
              if (want.close) continue;
              ++compared;
              ASSERT_EQ(out.accepted[b], want.accepted) << vocab << " " << temperature;
              ASSERT_EQ(out.next[b], want.next) << vocab << " " << temperature;
            }
          }
        }
      }
    }
  }
  // Vocabularies of 5001 tokens have boundaries near most places; few cases are left out even so.
  EXPECT_GT(compared, total * 9 / 10);
}

TEST_F(Verify, GreedyTakesTheLowestOfEquals) {
  for (DType dtype : kDTypes) {
    auto p = params(1, 2, 100, dtype, 0.0f);
    Inputs in = random_inputs(p, false, 1.0f, rng_);
    for (uint32_t i = 0; i < 3; ++i) {
      for (uint32_t v : {90u, 41u, 73u}) in.set(0, i, v, 50.0f);
    }
    in.drafts = {41, 73};
    const Outputs out = run(in);
    EXPECT_EQ(out.accepted[0], 1);
    EXPECT_EQ(out.next[0], 41);
  }
}

TEST_F(Verify, RowsWithoutADistributionEndTheSequence) {
  for (DType dtype : kDTypes) {
    for (float temperature : {0.0f, 0.8f}) {
      auto p = params(4, 2, 40, dtype, temperature);
      Inputs in = random_inputs(p, false, 1.0f, rng_);
      for (uint32_t b = 0; b < 4; ++b) {
        in.set(b, 0, 5, 60.0f);  // the first draft is certain
        in.drafts[2 * b] = 5;
      }
      for (uint32_t v = 0; v < 40; ++v) in.set(0, 1, v, -kInfinity);
      in.set(1, 1, 9, kNan);
      in.set(2, 1, 9, kInfinity);
      const Outputs out = run(in);
      EXPECT_EQ(out.accepted[0], 1);
      EXPECT_EQ(out.next[0], -1);
      if (temperature > 0) {
        EXPECT_EQ(out.accepted[1], 1);
        EXPECT_EQ(out.next[1], -1);
        EXPECT_EQ(out.accepted[2], 1);
        EXPECT_EQ(out.next[2], -1);
      } else {
        EXPECT_NE(out.next[1], 9);  // NaN never wins
        EXPECT_GE(out.next[1], 0);
      }
      EXPECT_GE(out.next[3], 0);
    }
  }
}

TEST_F(Verify, RefusesDraftsOutsideTheVocabulary) {
  for (bool has_q : {false, true}) {
    auto p = params(2, 1, 50, DType::f32, 1.0f);
    Inputs in = random_inputs(p, has_q, 1.0f, rng_);
    in.drafts = {-1, 50};
    const Outputs out = run(in);
    for (uint32_t b = 0; b < 2; ++b) {
      EXPECT_EQ(out.accepted[b], 0);
      EXPECT_GE(out.next[b], 0);
      EXPECT_LT(out.next[b], 50);
    }
  }
}

TEST_F(Verify, SameBitsForAnyThreadsAndInstructionSet) {
  for (DType dtype : kDTypes) {
    const Inputs in = random_inputs(params(9, 4, 3000, dtype, 0.7f), true, 3.0f, rng_);
    const Outputs want = run(in);
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
      if (!set_active_isa(isa)) continue;
      for (int threads : {1, 3}) {
        set_thread_count(threads);
        EXPECT_EQ(run(in), want) << isa_name(isa);
      }
    }
  }
}

/// χ² of counts against expectations, tokens expected less than 5 times taken together.
double chi_square(const std::vector<int>& counts, const std::vector<double>& expected, int& cells) {
  double sum = 0, few_expected = 0, few = 0;
  cells = 0;
  for (size_t v = 0; v < counts.size(); ++v) {
    if (expected[v] < 5) {
      few_expected += expected[v];
      few += counts[v];
      continue;
    }
    sum += std::pow(counts[v] - expected[v], 2) / expected[v];
    ++cells;
  }
  if (few_expected > 0) {
    sum += std::pow(few - few_expected, 2) / few_expected;
    ++cells;
  }
  return sum;
}

/// χ² with n degrees of freedom exceeds this once in about 10^6 samples (Wilson & Hilferty's
/// normal approximation at 4.75 standard deviations).
double chi_square_limit(int n) {
  const double h = 2.0 / (9.0 * n);
  return n * std::pow(1 - h + 4.75 * std::sqrt(h), 3);
}

/// What leaves at the first place is distributed as the target, whatever the drafter proposes: the
/// theorem of Leviathan et al. The drafter is fixed and bad; drafts are drawn from it.
TEST_F(Verify, WhatComesOutIsDistributedAsTheTarget) {
  constexpr uint32_t kVocab = 24, kBatch = 20000;
  for (bool has_q : {true, false}) {
    auto p = params(kBatch, 1, kVocab, DType::f32, 0.8f);
    Inputs one = random_inputs(params(1, 1, kVocab, DType::f32, 0.8f), has_q, 1.5f, rng_);
    std::vector<double> target(kVocab), proposal(kVocab);
    for (uint32_t v = 0; v < kVocab; ++v) {
      target[v] = std::exp(one.row(0, 0)[v] / 0.8);
      proposal[v] = 1.0 + v % 5;
    }
    const double target_sum = std::accumulate(target.begin(), target.end(), 0.0);
    const double proposal_sum = std::accumulate(proposal.begin(), proposal.end(), 0.0);
    std::discrete_distribution<int32_t> drafter(proposal.begin(), proposal.end());
    Inputs in;
    in.p = p;
    in.has_q = has_q;
    for (uint32_t b = 0; b < kBatch; ++b) {
      in.logits.insert(in.logits.end(), one.logits.begin(), one.logits.end());
      // Without q the draft is what a greedy drafter always says.
      in.drafts.push_back(has_q ? drafter(rng_) : 3);
      for (double w : proposal) in.q.push_back(static_cast<float>(w / proposal_sum));
    }
    const Outputs out = run(in);
    std::vector<int> counts(kVocab);
    std::vector<double> expected;
    int kept = 0;
    for (uint32_t b = 0; b < kBatch; ++b) {
      kept += out.accepted[b];
      ++counts[out.accepted[b] == 1 ? in.drafts[b] : out.next[b]];
    }
    for (double w : target) expected.push_back(w / target_sum * kBatch);
    int cells = 0;
    const double chi = chi_square(counts, expected, cells);
    EXPECT_LT(chi, chi_square_limit(cells - 1)) << has_q;
    // Kept with probability Σ min(p, q); 5 standard deviations of a binomial count.
    double rate = 0;
    for (uint32_t v = 0; v < kVocab; ++v) {
      const double q = has_q ? proposal[v] / proposal_sum : v == 3;
      rate += std::min(target[v] / target_sum, q);
    }
    EXPECT_NEAR(kept, rate * kBatch, 5 * std::sqrt(kBatch * rate * (1 - rate)));
  }
}

/// The token after a fully accepted draft follows the last row.
TEST_F(Verify, TheTokenAfterAllDraftsFollowsTheLastRow) {
  constexpr uint32_t kVocab = 700, kBatch = 8000;
  const Inputs one = random_inputs(params(1, 0, kVocab, DType::bf16, 1.3f), false, 2.0f, rng_);
  Inputs in;
  in.p = params(kBatch, 0, kVocab, DType::bf16, 1.3f);
  for (uint32_t b = 0; b < kBatch; ++b) {
    in.logits.insert(in.logits.end(), one.logits.begin(), one.logits.begin() + 2 * kVocab);
  }
  const Outputs out = run(in);
  std::vector<int> counts(kVocab);
  for (int32_t v : out.next) ++counts[v];
  std::vector<double> expected(kVocab);
  const double t = double{1.3f};
  for (uint32_t v = 0; v < kVocab; ++v) expected[v] = std::exp(one.exact[v] / t);
  const double sum = std::accumulate(expected.begin(), expected.end(), 0.0);
  for (double& e : expected) e *= kBatch / sum;
  int cells = 0;
  const double chi = chi_square(counts, expected, cells);
  EXPECT_LT(chi, chi_square_limit(cells - 1));
}

/// counter_hash is the generator of dropout's masks: a value is kept iff its hash reaches the
/// threshold.
TEST_F(Verify, UniformsAreDropoutsGenerator) {
  for (uint32_t i = 0; i < 200; ++i) {
    DropMask mask;
    mask.seed = rng_() * 0x100000001ull + 5;
    const uint32_t row = rng_() % 1000, column = rng_() % 1000;
    const uint32_t hash = counter_hash(mask.seed, row, column);
    float value = 1.0f;
    mask.threshold = hash;
    gemm_kernels(Compute::f32).drop(mask, row, column, 1, &value);
    EXPECT_EQ(value, 1.0f);
    if (hash == 0xffffffffu) continue;
    mask.threshold = hash + 1;
    gemm_kernels(Compute::f32).drop(mask, row, column, 1, &value);
    EXPECT_EQ(value, 0.0f);
  }
}

}  // namespace
}  // namespace metal_lora::cpu
