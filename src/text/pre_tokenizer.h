// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/json.h"
#include "src/text/normalizer.h"

namespace metal_lora::text {

/// The character that GPT-2's byte-level alphabet writes for each byte, as UTF-8.
const std::string& byte_level_char(unsigned char byte);
/// The byte behind a code point of that alphabet, or -1.
int byte_level_byte(char32_t c);

/// Text cut into the words that merges never cross. Reused between calls to spare allocations.
struct Pieces {
  std::string text;                             ///< rewritten text
  std::vector<std::pair<size_t, size_t>> cuts;  ///< [begin, end), never empty
  std::vector<std::pair<size_t, size_t>> next;
  std::string next_text;
};

/// The "pre_tokenizer" of a tokenizer.json. Immutable.
class PreTokenizer {
 public:
  enum class Kind { split, digits, metaspace, byte_level, white_space, punctuation };
  enum class Behavior { removed, isolated, contiguous, merged_with_previous, merged_with_next };
  enum class Prepend { always, never, first };
  struct Step {
    Kind kind;
    Behavior behavior = Behavior::isolated;
    Pattern pattern{};          ///< split, byte_level's GPT-2 expression
    bool invert = false;        ///< split on what does not match
    bool split = true;          ///< metaspace, byte_level: whether it splits at all
    std::string replacement{};  ///< metaspace
    Prepend prepend = Prepend::never;
    bool map_bytes = false;  ///< byte_level that is not last: write its alphabet out
  };

  PreTokenizer() = default;
  /// Steps in order. A final byte_level step is not written out: byte_level() is true and the words
  /// stay raw bytes.
  explicit PreTokenizer(std::vector<Step> steps);
  static PreTokenizer from_json(const io::Json& json, const std::string& where);

  static Step split_step(const std::string& regex, Behavior behavior = Behavior::isolated);
  static Step digits_step(bool individual);
  static Step byte_level_step(bool add_prefix_space, bool use_regex);

  /// The words are bytes, to be looked up through GPT-2's alphabet.
  bool byte_level() const { return byte_level_; }

  /// Splits valid UTF-8. Views of the words lie in `text` or in pieces.text. `at_start` tells that
  /// `text` begins where the caller's text began.
  std::string_view apply(std::string_view text, bool at_start, Pieces& pieces) const;

 private:
  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace metal_lora::text
