// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "src/io/json.h"

namespace metal_lora::text {

/// The "decoder" of a tokenizer.json: token spellings to text. Immutable.
class TokenDecoder {
 public:
  enum class Kind { byte_level, metaspace, byte_fallback, fuse, strip, replace };
  struct Step {
    Kind kind;
    std::string pattern;         ///< replace: literal. strip, metaspace: one character
    std::string content;         ///< replace
    size_t start = 0, stop = 0;  ///< strip: at most so many characters at each end
    bool drop_in_first = false;  ///< metaspace: the first token loses the character
  };

  TokenDecoder() = default;  ///< joins tokens with spaces, as the reference does without a decoder
  explicit TokenDecoder(std::vector<Step> steps) : steps_(std::move(steps)), present_(true) {}
  static TokenDecoder from_json(const io::Json& json, const std::string& where);

  /// The text of all tokens, as the reference writes it: always valid UTF-8.
  std::string decode(std::vector<std::string> tokens) const;
  /// The same before anything incomplete was replaced by U+FFFD: a byte token is its byte. Two
  /// calls with a common beginning agree on the text of that beginning.
  std::string decode_bytes(std::vector<std::string> tokens) const;

 private:
  std::string run(std::vector<std::string> tokens, bool raw) const;

  std::vector<Step> steps_;
  bool present_ = false;
};

}  // namespace metal_lora::text
