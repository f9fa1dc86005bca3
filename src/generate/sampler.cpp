// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Sampling in a few passes over the vocabulary. What costs: one exponential per token, made by
// `exp_of_negative`, which vectorises and gives the same bits everywhere (libm's does not), and a
// partial selection when tokens have to be ranked.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "metal_lora/generate.h"

namespace metal_lora {
namespace {

constexpr size_t kFirstTopPSelection = 64;

/// e^x for x ≤ 0, within 2 ulp; 0 below −87 (the smallest normal f32). Cody–Waite reduction and the
/// degree-6 Taylor polynomial on |r| ≤ ln2/2, whose remainder is below 2^-24.
inline float exp_of_negative(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  constexpr float kSmallest = -87.0f;
  const float clamped = x < kSmallest ? kSmallest : x;
  const float n = (clamped * kLog2e + kRound) - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float scale = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x < kSmallest ? 0.0f : p * scale;
}

void check(bool ok, const char* option, const char* expected, double got) {
  if (ok) return;
  throw Error(
      ErrorCode::invalid_input,
      fmt::format("[sampling] {} must be {} but is {}", option, expected, got));
}

// Reductions run in lanes of their own: the compiler may not reorder floats, so it vectorises only
// what is written that way. The order is fixed, hence the same on every machine.
constexpr size_t kLanes = 16;

/// Σ of the weights, in f64.
double sum_of(std::span<const float> weights) {
  double lanes[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= weights.size(); i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(weights[i + j]);
  }
  double total = 0.0;
  for (; i < weights.size(); ++i) total += static_cast<double>(weights[i]);
  for (const double lane : lanes) total += lane;
  return total;
}

/// Index of the largest; the lowest among equals. NaN and "nothing finite" are refused.
size_t best_index(std::span<const float> logits) {
  if (logits.empty()) throw Error(ErrorCode::internal, "[sampling] there are no logits");
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, logits[0]);
  uint32_t nan[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) {
      const float x = logits[i + j];
      nan[j] |= x != x ? 1u : 0u;
      lanes[j] = x > lanes[j] ? x : lanes[j];
    }
  }
  for (; i < logits.size(); ++i) {
    nan[0] |= logits[i] != logits[i] ? 1u : 0u;
    lanes[0] = std::max(lanes[0], logits[i]);
  }
  const float largest = *std::max_element(lanes, lanes + kLanes);
  const bool has_nan = std::any_of(nan, nan + kLanes, [](uint32_t flag) { return flag != 0; });
  if (has_nan || !std::isfinite(largest)) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[sampling] the logits must be finite but {}",
            has_nan ? "one is NaN" : "the largest is infinite"),
        "the model or the adapter is damaged, or its dtype overflows: try --dtype float32");
  }
  return static_cast<size_t>(std::find(logits.begin(), logits.end(), largest) - logits.begin());
}

}  // namespace

Sampler::Sampler(SamplingOptions options)
    : options_(std::move(options)), random_state_(options_.seed) {
  const SamplingOptions& o = options_;
  check(
      o.temperature >= 0 && std::isfinite(o.temperature),
      "temperature",
      "0 or more",
      o.temperature);
  check(o.top_k >= 0, "top_k", "0 or more", o.top_k);
  check(o.top_p > 0 && o.top_p <= 1, "top_p", "in (0, 1]", o.top_p);
  check(o.min_p >= 0 && o.min_p <= 1, "min_p", "in [0, 1]", o.min_p);
  check(
      o.repetition_penalty > 0 && std::isfinite(o.repetition_penalty),
      "repetition_penalty",
      "above 0",
      o.repetition_penalty);
  check(o.repetition_context >= 0, "repetition_context", "0 or more", o.repetition_context);
  check(std::isfinite(o.presence_penalty), "presence_penalty", "finite", o.presence_penalty);
  check(std::isfinite(o.frequency_penalty), "frequency_penalty", "finite", o.frequency_penalty);
  for (const auto& [id, bias] : o.logit_bias) {
    check(id >= 0, "logit_bias id", "0 or more", id);
    check(
        !std::isnan(bias) && bias < std::numeric_limits<float>::infinity(),
        "logit_bias",
        "finite or -inf",
        bias);
  }
}

// SplitMix64 (Steele, Lea & Flood 2014); 53 bits make a double in [0, 1).
double Sampler::next_uniform() {
  uint64_t z = (random_state_ += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}

void Sampler::apply_penalties(std::span<const int32_t> history, size_t answer_tokens) {
  const SamplingOptions& o = options_;
  const size_t vocab = logits_.size();
  for (const auto& [id, bias] : o.logit_bias) {
    if (static_cast<size_t>(id) >= vocab) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[sampling] logit_bias id must be below {} but is {}", vocab, id));
    }
    logits_[static_cast<size_t>(id)] += bias;
  }
  const auto in_vocab = [&](int32_t id) { return id >= 0 && static_cast<size_t>(id) < vocab; };
  if (o.repetition_penalty != 1.0f) {
    const size_t window = o.repetition_context == 0
                              ? history.size()
                              : std::min(history.size(), static_cast<size_t>(o.repetition_context));
    counts_.resize(vocab, 0);
    const auto recent = history.last(window);
    for (const int32_t id : recent) {
      if (!in_vocab(id) || counts_[static_cast<size_t>(id)]++ != 0) continue;
      float& logit = logits_[static_cast<size_t>(id)];
      logit = logit < 0 ? logit * o.repetition_penalty : logit / o.repetition_penalty;
    }
    for (const int32_t id : recent) {
      if (in_vocab(id)) counts_[static_cast<size_t>(id)] = 0;
    }
  }
  if (o.presence_penalty != 0.0f || o.frequency_penalty != 0.0f) {
    counts_.resize(vocab, 0);
    const auto answer = history.last(std::min(answer_tokens, history.size()));
    for (const int32_t id : answer) {
      if (in_vocab(id)) ++counts_[static_cast<size_t>(id)];
    }
    for (const int32_t id : answer) {
      if (!in_vocab(id) || counts_[static_cast<size_t>(id)] == 0) continue;
      const auto count = static_cast<float>(std::exchange(counts_[static_cast<size_t>(id)], 0));
      logits_[static_cast<size_t>(id)] -= o.presence_penalty + o.frequency_penalty * count;
    }
  }
}

bool Sampler::is_better(const Candidate& x, const Candidate& y) {
  return x.weight > y.weight || (x.weight == y.weight && x.id < y.id);
}

// Keeps twice as many as wanted and throws the worse half away when full: about one comparison per
// token of the vocabulary. In order of id, so among equals the lower id is already there and stays.
void Sampler::select_top(size_t count) {
  count = std::min(count, logits_.size());
  candidates_.clear();
  candidates_.reserve(2 * count);
  float threshold = -1.0f;  // weights are never negative
  for (size_t i = 0; i < logits_.size(); ++i) {
    if (!(logits_[i] > threshold)) continue;
    candidates_.push_back({logits_[i], static_cast<int32_t>(i)});
    if (candidates_.size() < 2 * count) continue;
    const auto nth = candidates_.begin() + static_cast<std::ptrdiff_t>(count - 1);
    std::nth_element(candidates_.begin(), nth, candidates_.end(), is_better);
    threshold = nth->weight;
    candidates_.resize(count);
  }
  std::sort(candidates_.begin(), candidates_.end(), is_better);
  if (candidates_.size() > count) candidates_.resize(count);
}

// Whether the candidates reach `wanted` together; if so, only the shortest such run is left.
bool Sampler::cut_at(double wanted) {
  double sum = 0.0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    sum += candidates_[i].weight;
    if (sum < wanted) continue;
    candidates_.resize(i + 1);
    return true;
  }
  return false;
}

// `total` is the weight of everything that top_p shares out. A model that is sure of itself needs
// the first few tokens; for a flat distribution everything above a falling threshold is ranked.
void Sampler::keep_top_p(double total, bool selected) {
  const double wanted = static_cast<double>(options_.top_p) * total;
  if (!selected) select_top(kFirstTopPSelection);
  if (cut_at(wanted) || selected) return;
  for (const float threshold : {1e-2f, 1e-4f, -1.0f}) {
    candidates_.clear();
    for (size_t i = 0; i < logits_.size(); ++i) {
      if (logits_[i] > threshold) candidates_.push_back({logits_[i], static_cast<int32_t>(i)});
    }
    std::sort(candidates_.begin(), candidates_.end(), is_better);
    if (cut_at(wanted)) return;
  }
}

int32_t Sampler::draw_from_all(double total) {
  const double target = next_uniform() * total;
  double sum = 0.0;
  int32_t last = 0;
  for (size_t i = 0; i < logits_.size(); ++i) {
    if (logits_[i] == 0.0f) continue;
    sum += logits_[i];
    last = static_cast<int32_t>(i);
    if (sum > target) return last;
  }
  return last;
}

int32_t Sampler::draw_from_candidates() {
  std::sort(candidates_.begin(), candidates_.end(), [](const Candidate& x, const Candidate& y) {
    return x.id < y.id;
  });
  double total = 0.0, sum = 0.0;
  for (const Candidate& candidate : candidates_) total += candidate.weight;
  const double target = next_uniform() * total;
  for (const Candidate& candidate : candidates_) {
    sum += candidate.weight;
    if (sum > target) return candidate.id;
  }
  return candidates_.back().id;
}

int32_t Sampler::sample(
    std::span<const float> logits, std::span<const int32_t> history, size_t answer_tokens) {
  const SamplingOptions& o = options_;
  const bool penalties = !o.logit_bias.empty() || o.repetition_penalty != 1.0f ||
                         o.presence_penalty != 0.0f || o.frequency_penalty != 0.0f;
  if (!penalties && o.temperature == 0.0f) return static_cast<int32_t>(best_index(logits));
  logits_.assign(logits.begin(), logits.end());
  if (penalties) {
    best_index(logits);  // refuses NaN before a penalty could hide it
    apply_penalties(history, answer_tokens);
  }
  const size_t best = best_index(logits_);
  if (o.temperature == 0.0f) return static_cast<int32_t>(best);

  // Copies, not members: a float of `this` might be one of the logits, for all the compiler knows.
  const float largest = logits_[best], temperature = o.temperature;
  for (float& value : logits_) value = exp_of_negative((value - largest) / temperature);
  double total = 0.0;
  const bool ranked = o.top_k > 0 && static_cast<size_t>(o.top_k) < logits_.size();
  if (ranked) {
    select_top(static_cast<size_t>(o.top_k));
    for (const Candidate& candidate : candidates_) total += candidate.weight;
  } else {
    total = sum_of(logits_);
  }
  if (o.top_p < 1.0f) keep_top_p(total, ranked);
  if (!ranked && o.top_p == 1.0f) {
    if (const float min_p = o.min_p; min_p > 0.0f) {  // the best has weight 1
      for (float& weight : logits_) weight = weight >= min_p ? weight : 0.0f;
      total = sum_of(logits_);
    }
    return draw_from_all(total);
  }
  std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < o.min_p; });
  return draw_from_candidates();
}

}  // namespace metal_lora
