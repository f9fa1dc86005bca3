// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "metal_lora/model.h"
#include "src/text/tokenizer.h"

namespace metal_lora {

/// How the next token is chosen. The steps run in this order, each on what the one before left:
///   1. logit_bias:            logit += bias
///   2. repetition_penalty:    logit < 0 ? logit·penalty : logit/penalty, for every token among the
///                             last `repetition_context` of prompt and answer (Keskar et al. 2019)
///   3. presence, frequency:   logit −= presence + frequency·count, over the answer alone (OpenAI)
///   4. temperature:           logit /= temperature; 0 takes the largest (lowest id among equals)
///   5. top_k:                 the k largest (lower ids first among equals)
///   6. top_p:                 the shortest run of largest ones whose probability reaches top_p
///                             (Holtzman et al. 2020)
///   7. min_p:                 those at least min_p times as probable as the best
///   8. the draw, in proportion to probability: the first token, in order of id, at which the
///      cumulative sum exceeds u·total, u uniform in [0, 1) from the seed.
/// This is the order of `transformers`; probabilities are renormalised after steps 5 and 6.
struct SamplingOptions {
  float temperature = 0.0f;         ///< 0: greedy
  int top_k = 0;                    ///< 0: all
  float top_p = 1.0f;               ///< (0, 1]; 1: all
  float min_p = 0.0f;               ///< [0, 1]; 0: all
  float repetition_penalty = 1.0f;  ///< > 0; 1: none
  int repetition_context = 0;       ///< tokens; 0: all of them
  float presence_penalty = 0.0f, frequency_penalty = 0.0f;
  std::map<int32_t, float> logit_bias;
  uint64_t seed = 0;
};

/// Draws tokens from logits. The same seed, logits and history give the same tokens on every
/// machine. Cost: one to three passes over the vocabulary, never a sort of it. Not thread-safe.
class Sampler {
 public:
  /// Throws Error invalid_input, naming the option, for values outside the ranges above.
  explicit Sampler(SamplingOptions options);

  /// `history`: prompt and answer so far; its last `answer_tokens` are the answer. Throws Error
  /// invalid_input when no logit is finite or one is NaN (a broken model must not look like an
  /// answer).
  int32_t sample(
      std::span<const float> logits, std::span<const int32_t> history, size_t answer_tokens);

  const SamplingOptions& options() const { return options_; }

 private:
  struct Candidate {
    float weight;
    int32_t id;
  };
  void apply_penalties(std::span<const int32_t> history, size_t answer_tokens);
  void select_top(size_t count);
  void keep_top_p(double total, bool selected);
  bool cut_at(double wanted);
  static bool is_better(const Candidate& x, const Candidate& y);
  int32_t draw_from_all(double total);
  int32_t draw_from_candidates();
  double next_uniform();

  SamplingOptions options_;
  uint64_t random_state_;
  std::vector<float> logits_;  ///< working copy; from step 4 on e^((logit − max)/temperature)
  std::vector<Candidate> candidates_;  ///< the largest ones in falling order
  std::vector<int32_t> counts_;        ///< per id, all 0 between calls
};

/// Finds stop strings in text that comes in pieces. Gives out only text that can no longer be part
/// of one; the stop string itself and what follows it never come out.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops);

  /// Text that is certain now. After stopped() it is empty.
  std::string push(std::string_view piece);
  /// The held-back rest, when the text ended without a stop string.
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

enum class FinishReason {
  eos,  ///< an end-of-sequence token, which is not part of the answer
  stop_string,
  max_tokens,
  context_full,  ///< the model's context is used up
  cancelled,
};
std::string_view finish_reason_name(FinishReason reason);

struct GenerateOptions {
  int max_tokens = 256;
  SamplingOptions sampling;
  std::vector<std::string> stop;
  bool ignore_eos = false;          ///< for measurements
  bool skip_special_tokens = true;  ///< in the text
  int prefill_chunk_tokens = 512;   ///< bounds the memory of a long prompt
};

struct GenerationResult {
  std::string text;
  std::vector<int32_t> tokens;  ///< of the answer, without the end-of-sequence token
  FinishReason finish_reason = FinishReason::eos;
  int prompt_tokens = 0;
  int reused_tokens = 0;        ///< of the prompt, found in the cache
  double prompt_seconds = 0.0;  ///< until the first logits
  double generation_seconds = 0.0;
  double prompt_tps = 0.0;       ///< prompt tokens run per second (reused ones do not count)
  double generation_tps = 0.0;   ///< decode steps per second
  size_t peak_memory_bytes = 0;  ///< largest resident size of the process so far
};

/// Text that became final; false ends the generation (FinishReason::cancelled).
using OnText = std::function<bool(std::string_view text)>;

/// One conversation with a model and, optionally, an adapter, which is applied unmerged. Keeps the
/// keys and values of what it has seen, so that a prompt that begins as the last one went on costs
/// its new tokens alone. One thread at a time; several generators may share a model.
class Generator {
 public:
  Generator(
      std::shared_ptr<const Model> model, text::Tokenizer tokenizer, AdapterWeights adapter = {});

  /// `cancel`, when given, is looked at before each token and each chunk of the prompt. Throws
  /// Error invalid_input when the prompt is empty, has an id outside the vocabulary or leaves no
  /// room in the model's context.
  GenerationResult generate(
      std::span<const int32_t> prompt,
      const GenerateOptions& options,
      const OnText& on_text = {},
      const std::atomic<bool>* cancel = nullptr);

  /// Forgets the conversation.
  void reset();
  /// Ids that end an answer: the model's and the tokenizer's.
  const std::set<int32_t>& eos_ids() const { return eos_ids_; }

  const Model& model() const { return *model_; }
  const text::Tokenizer& tokenizer() const { return tokenizer_; }
  const AdapterWeights& adapter() const { return adapter_; }

 private:
  std::optional<mlx::core::array> prefill(
      std::span<const int32_t> prompt,
      int chunk_tokens,
      const std::atomic<bool>* cancel,
      GenerationResult& result);
  FinishReason decode_answer(
      mlx::core::array logits,
      std::vector<int32_t>& history,
      const GenerateOptions& options,
      const std::atomic<bool>* cancel,
      const std::function<bool(int32_t)>& on_token,
      int& steps);

  std::shared_ptr<const Model> model_;
  text::Tokenizer tokenizer_;
  AdapterWeights adapter_;
  std::set<int32_t> eos_ids_;
  KVCache cache_;
  std::vector<int32_t> cached_tokens_;
};

/// Natural logarithm of the probability that the model gives each token after those before it:
/// [tokens − 1] values, of tokens 1 … end. No logits are kept in memory. At most the model's
/// context.
std::vector<float> score_tokens(
    const Model& model, const AdapterWeights& adapter, std::span<const int32_t> tokens);

}  // namespace metal_lora
