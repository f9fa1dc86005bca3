// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace metal_lora::io {
class GgufFile;
}

namespace metal_lora::text {

struct TokenizerModel;  // src/text/tokenizer_model.h

/// How encode() treats the spelling of a special token ("<|im_end|>") inside the text.
enum class SpecialText {
  parse,    ///< becomes the special token, as the reference tokenizer does
  literal,  ///< stays plain text: for content that a stranger wrote
};

/// Text to token ids and back, for byte-level BPE (GPT-2, SmolLM, Llama 3, Qwen) and
/// SentencePiece-style BPE (Llama 2, Mistral, Gemma).
///
/// Immutable and cheap to copy (copies share one vocabulary); every member may be called from any
/// number of threads at once. Ids equal those of PyPI `tokenizers` on the same tokenizer.json.
/// Algorithm: Sennrich et al. 2016, merges taken in rank order from a heap, O(n log n) in a word.
class Tokenizer {
 public:
  /// Reads a Hugging Face tokenizer.json; tokenizer_config.json (optional) names bos, eos and pad.
  /// Throws Error: not_found, io, invalid_input (malformed), unsupported (asks for what we lack).
  static Tokenizer from_json(
      const std::filesystem::path& tokenizer_json,
      const std::optional<std::filesystem::path>& tokenizer_config_json = std::nullopt);

  /// The same from bytes in memory; `where` names them in errors.
  static Tokenizer from_json_text(
      std::string_view tokenizer_json,
      std::string_view tokenizer_config_json = {},
      const std::string& where = "tokenizer.json");

  /// Reads the vocabulary of a GGUF file: tokenizer.ggml.model "gpt2" or "llama".
  static Tokenizer from_gguf(const io::GgufFile& file);

  /// A Hugging Face folder (tokenizer.json in it) or a .gguf file.
  static Tokenizer from_path(const std::filesystem::path& model_path);

  /// Token ids of `text`. With add_special_tokens the post-processor's tokens (BOS …) are added.
  /// Bytes that are not UTF-8 are read as U+FFFD, one for each maximal invalid sequence.
  std::vector<int32_t> encode(
      std::string_view text,
      bool add_special_tokens,
      SpecialText special_text = SpecialText::parse) const;

  /// Text of `ids`. Ids outside the vocabulary and incomplete UTF-8 give nothing and U+FFFD.
  std::string decode(std::span<const int32_t> ids, bool skip_special) const;

  std::optional<int32_t> token_to_id(std::string_view token) const;
  /// The token's spelling in the vocabulary (not its text); nullopt outside the vocabulary.
  std::optional<std::string> id_to_token(int32_t id) const;
  bool is_special(int32_t id) const;
  /// One more than the largest id.
  int32_t vocab_size() const;

  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  std::optional<int32_t> pad_id() const;
  /// Spelling of bos and eos for chat templates; empty where there is none.
  std::string bos_token() const;
  std::string eos_token() const;
  /// eos_id, and the end-of-turn tokens the vocabulary marks as such (a GGUF's eot). A generation
  /// config may add more; that is the model's business.
  const std::set<int32_t>& eos_ids() const;
  /// encode("", true) would begin with BOS.
  bool adds_bos() const;

  const TokenizerModel& model() const { return *model_; }

 private:
  explicit Tokenizer(std::shared_ptr<const TokenizerModel> model) : model_(std::move(model)) {}

  std::shared_ptr<const TokenizerModel> model_;
};

/// Text of a token stream, piece by piece: holds back bytes until they are a whole character. The
/// pieces join to decode(all ids), but for one case: where a run of byte tokens is not UTF-8, the
/// reference gives up the whole run, and this one only the invalid part, since what is shown cannot
/// be taken back. Not thread-safe.
class StreamingDecoder {
 public:
  explicit StreamingDecoder(Tokenizer tokenizer, bool skip_special = true);

  /// Text that became final with this token, often empty inside a multi-byte character.
  std::string push(int32_t id);
  /// The rest: what is incomplete becomes U+FFFD. The decoder starts over.
  std::string flush();

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  std::vector<int32_t> context_;  ///< the last few tokens that gave text
  std::string held_bytes_;        ///< the beginning of a character
};

}  // namespace metal_lora::text
