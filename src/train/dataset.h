// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/text/chat_template.h"
#include "src/text/tokenizer.h"

namespace metal_lora::train {

/// What a row is, decided by the first row in this order, as mlx-lm does.
enum class DatasetKind {
  completions,  ///< {"prompt", "completion"}, rendered as a user and an assistant message
  chat,         ///< {"messages": […], "tools"?: […]}
  text,         ///< {"text"}
};

/// One sequence; tokens [prompt_tokens, size) are trained on (token 0 never is: nothing precedes
/// it).
struct Sample {
  std::span<const int32_t> tokens;
  int32_t prompt_tokens = 0;

  int64_t trained_tokens() const {
    return static_cast<int64_t>(tokens.size()) - (prompt_tokens > 1 ? prompt_tokens : 1);
  }
};

struct DatasetOptions {
  int max_seq_length = 2048;
  bool mask_prompt = false;
  int32_t vocab_size = 0;  ///< ids beyond the model's table are refused; 0: not checked
  int threads = 0;         ///< 0: one per core
  std::function<void(double)> progress;
  std::function<void(const std::string&)> on_warning;
};

/// A split in memory: all tokens end to end (4 bytes each). Immutable after loading.
///
/// Tokens are mlx-lm's with two differences, both asked for by "every sequence ends with one EOS":
/// text gets an EOS where it has none (as there), and whatever a chat template writes after the
/// last EOS (ChatML's newline) is left out, since generation has stopped by then.
class Dataset {
 public:
  /// Rows that leave nothing to learn (empty, or truncated to their prompt) are dropped with a
  /// warning. Error: not_found, invalid_input naming file, line and field, unsupported.
  /// Rows are read and tokenised on all cores; the result does not depend on their number.
  static Dataset load(
      const std::filesystem::path& jsonl,
      const text::Tokenizer& tokenizer,
      const std::optional<text::ChatTemplate>& chat_template,
      const DatasetOptions& options);
  /// From token sequences, for tests and tools.
  static Dataset from_samples(
      const std::vector<std::vector<int32_t>>& tokens, std::vector<int32_t> prompt_tokens = {});

  size_t size() const { return starts_.empty() ? 0 : starts_.size() - 1; }
  bool empty() const { return size() == 0; }
  Sample sample(size_t index) const;
  DatasetKind kind() const { return kind_; }
  int64_t token_count() const { return static_cast<int64_t>(tokens_.size()); }
  int32_t longest() const;
  uint64_t nbytes() const;
  /// SHA-256 of tokens, boundaries and prompt lengths: equal data, equal training.
  std::string hash() const;

 private:
  void append(std::span<const int32_t> tokens, int32_t prompt_tokens);

  DatasetKind kind_ = DatasetKind::text;
  std::vector<int32_t> tokens_;
  std::vector<uint64_t> starts_;  ///< size() + 1
  std::vector<int32_t> prompt_tokens_;
};

}  // namespace metal_lora::train
