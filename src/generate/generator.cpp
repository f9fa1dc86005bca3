// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "metal_lora/generate.h"
#include "metal_lora/memory.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

bool is_set(const std::atomic<bool>* flag) {
  return flag != nullptr && flag->load(std::memory_order_relaxed);
}

void check_prompt(std::span<const int32_t> prompt, const ModelConfig& config) {
  if (prompt.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        "[generate] the prompt must hold at least one token but is empty");
  }
  for (const int32_t id : prompt) {
    if (id >= 0 && id < config.vocab_size) continue;
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[generate] prompt tokens must be in 0 … {} but one is {}", config.vocab_size - 1, id));
  }
  if (prompt.size() >= static_cast<size_t>(config.max_position_embeddings)) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[generate] the prompt must be shorter than the model's context of {} tokens but has "
            "{}",
            config.max_position_embeddings,
            prompt.size()),
        "shorten the prompt");
  }
}

/// The answer's text as it becomes certain.
class TextStream {
 public:
  TextStream(
      const text::Tokenizer& tokenizer, const GenerateOptions& options, const OnText& on_text)
      : decoder_(tokenizer, options.skip_special_tokens), stops_(options.stop), on_text_(on_text) {}

  void push(int32_t id) { give(stops_.push(decoder_.push(id))); }
  void finish() {
    give(stops_.push(decoder_.flush()));
    give(stops_.flush());
  }
  bool stopped() const { return stops_.stopped(); }
  bool refused() const { return refused_; }
  std::string take() { return std::move(text_); }

 private:
  void give(const std::string& piece) {
    if (piece.empty() || refused_) return;
    text_ += piece;
    if (on_text_ && !on_text_(piece)) refused_ = true;
  }

  text::StreamingDecoder decoder_;
  StopStrings stops_;
  const OnText& on_text_;
  std::string text_;
  bool refused_ = false;
};

}  // namespace

std::string_view finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::eos:
      return "eos";
    case FinishReason::stop_string:
      return "stop_string";
    case FinishReason::max_tokens:
      return "max_tokens";
    case FinishReason::context_full:
      return "context_full";
    case FinishReason::cancelled:
      return "cancelled";
  }
  return "unknown";
}

Generator::Generator(
    std::shared_ptr<const Model> model, text::Tokenizer tokenizer, AdapterWeights adapter)
    : model_(std::move(model)),
      tokenizer_(std::move(tokenizer)),
      adapter_(std::move(adapter)),
      eos_ids_(tokenizer_.eos_ids()),
      cache_(*model_) {
  eos_ids_.insert(model_->config().eos_token_ids.begin(), model_->config().eos_token_ids.end());
}

void Generator::reset() {
  cache_.truncate(0);
  cached_tokens_.clear();
}

// Runs what the cache does not hold yet; the logits after the last token. The last one always runs:
// its logits are not kept.
std::optional<mx::array> Generator::prefill(
    std::span<const int32_t> prompt,
    int chunk_tokens,
    const std::atomic<bool>* cancel,
    GenerationResult& result) {
  const size_t comparable = std::min(cached_tokens_.size(), prompt.size() - 1);
  const auto common = std::mismatch(
      cached_tokens_.begin(),
      cached_tokens_.begin() + static_cast<std::ptrdiff_t>(comparable),
      prompt.begin());
  const auto reused = static_cast<size_t>(common.first - cached_tokens_.begin());
  cache_.truncate(static_cast<int>(reused));
  cached_tokens_.resize(reused);
  result.reused_tokens = static_cast<int>(reused);

  std::optional<mx::array> logits;
  const auto chunk = static_cast<size_t>(std::max(1, chunk_tokens));
  for (size_t begin = reused; begin < prompt.size(); begin += chunk) {
    if (is_set(cancel)) return std::nullopt;
    const auto tokens = prompt.subspan(begin, std::min(chunk, prompt.size() - begin));
    logits = model_->decode(tokens, cache_, adapter_);
    cached_tokens_.insert(cached_tokens_.end(), tokens.begin(), tokens.end());
  }
  return logits;
}

// One token after the other until something ends the answer; `history` is the prompt at first.
FinishReason Generator::decode_answer(
    mx::array logits,
    std::vector<int32_t>& history,
    const GenerateOptions& options,
    const std::atomic<bool>* cancel,
    const std::function<bool(int32_t)>& on_token,
    int& steps) {
  Sampler sampler(options.sampling);
  const size_t prompt_tokens = history.size();
  const auto vocab = static_cast<size_t>(model_->config().vocab_size);
  for (int answered = 0;; ++answered) {
    if (answered >= options.max_tokens) return FinishReason::max_tokens;
    if (is_set(cancel)) return FinishReason::cancelled;
    if (answered > 0) {
      if (cache_.length() >= model_->config().max_position_embeddings) {
        return FinishReason::context_full;
      }
      const int32_t last = history.back();
      logits = model_->decode({&last, 1}, cache_, adapter_);
      cached_tokens_.push_back(last);
      ++steps;
    }
    const int32_t token =
        sampler.sample({logits.data<float>(), vocab}, history, history.size() - prompt_tokens);
    if (!options.ignore_eos && eos_ids_.contains(token)) return FinishReason::eos;
    history.push_back(token);
    if (!on_token(token)) return FinishReason::stop_string;
  }
}

GenerationResult Generator::generate(
    std::span<const int32_t> prompt,
    const GenerateOptions& options,
    const OnText& on_text,
    const std::atomic<bool>* cancel) {
  check_prompt(prompt, model_->config());
  GenerationResult result;
  result.prompt_tokens = static_cast<int>(prompt.size());
  TextStream text(tokenizer_, options, on_text);
  try {
    const auto start = Clock::now();
    const auto logits = prefill(prompt, options.prefill_chunk_tokens, cancel, result);
    result.prompt_seconds = seconds_since(start);
    if (!logits) {
      result.finish_reason = FinishReason::cancelled;
      return result;
    }
    std::vector<int32_t> history(prompt.begin(), prompt.end());
    int steps = 0;
    const auto answer_start = Clock::now();
    result.finish_reason = decode_answer(
        *logits,
        history,
        options,
        cancel,
        [&](int32_t token) {
          result.tokens.push_back(token);
          text.push(token);
          return !text.stopped() && !text.refused();
        },
        steps);
    result.generation_seconds = seconds_since(answer_start);
    if (steps > 0) result.generation_tps = steps / result.generation_seconds;
  } catch (...) {
    reset();  // what the cache holds is no longer certain
    throw;
  }
  text.finish();
  if (text.refused()) result.finish_reason = FinishReason::cancelled;
  result.text = text.take();
  const int prompt_run = result.prompt_tokens - result.reused_tokens;
  if (result.prompt_seconds > 0) result.prompt_tps = prompt_run / result.prompt_seconds;
  result.peak_memory_bytes = peak_resident_bytes();
  return result;
}

}  // namespace metal_lora
