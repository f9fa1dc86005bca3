// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "src/text/normalizer.h"

namespace metal_lora::text {

/// A token that is looked for in the text itself, before or after normalisation.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;  ///< only where no word character touches it
  bool lstrip = false;       ///< takes the white space before it
  bool rstrip = false;       ///< takes the white space after it
  bool normalized = false;   ///< looked for in the normalised text
  bool special = false;
  std::string decoded;  ///< what decoding writes: as it was sought, hence normalised if so
};

/// A stretch of text: an added token, or text between (id < 0).
struct Stretch {
  size_t begin, end;
  int32_t id;
};

/// Finds added tokens, leftmost and longest first, in one pass. Immutable after construction.
class AddedTokens {
 public:
  AddedTokens() = default;
  AddedTokens(std::vector<AddedToken> tokens, const Normalizer& normalizer);

  const std::vector<AddedToken>& tokens() const { return tokens_; }
  bool has_normalized() const { return !normalized_.nodes.empty(); }

  /// Cuts `text` at the tokens with the given `normalized` flag; special ones only where `special`.
  /// A text without any is one stretch.
  void split(std::string_view text, bool normalized, bool special, std::vector<Stretch>& out) const;

 private:
  struct Trie {
    std::vector<int32_t> nodes;  ///< index into tokens_ of the token ending here, or -1
    std::unordered_map<uint64_t, int32_t> edges;
    std::array<bool, 256> first{};
    void add(std::string_view content, int32_t token);
    int32_t longest(std::string_view text, size_t pos, size_t& end) const;
  };

  std::vector<AddedToken> tokens_;
  Trie raw_, normalized_;
};

}  // namespace metal_lora::text
