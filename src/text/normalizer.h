// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/json.h"
#include "src/text/regex.h"

namespace metal_lora::text {

/// What `Replace` and `Split` look for: a literal or a regular expression.
struct Pattern {
  std::string literal;  ///< used when there is no regex; never empty then
  std::optional<Regex> regex;
};

/// {"String": …} or {"Regex": …}; `where` names it in errors.
Pattern pattern_from_json(const io::Json& json, const std::string& where);

/// Calls found(begin, end) for every match, left to right.
template <class Found>
void for_each_match(const Pattern& pattern, std::string_view text, Found&& found) {
  if (pattern.regex) {
    Regex::Cursor cursor(*pattern.regex, text);
    for (Regex::Match match; cursor.next(match);) found(match.begin, match.end);
    return;
  }
  for (size_t at = 0; (at = text.find(pattern.literal, at)) != std::string_view::npos;) {
    found(at, at + pattern.literal.size());
    at += pattern.literal.size();
  }
}

/// The steps that rewrite text before it is split. Immutable.
class Normalizer {
 public:
  enum class Kind { nfc, nfd, nfkc, nfkd, lowercase, replace, prepend, strip };
  struct Step {
    Kind kind;
    Pattern pattern;      ///< replace
    std::string content;  ///< replace, prepend
    bool left = false, right = false;
  };

  Normalizer() = default;
  explicit Normalizer(std::vector<Step> steps) : steps_(std::move(steps)) {}
  /// The "normalizer" member of a tokenizer.json, null included.
  static Normalizer from_json(const io::Json& json, const std::string& where);

  bool empty() const { return steps_.empty(); }
  /// `text` must be valid UTF-8, and so is the result. Throws Error when a replacement makes the
  /// text grow beyond 32 times its size.
  void apply(std::string& text) const;

 private:
  std::vector<Step> steps_;
};

}  // namespace metal_lora::text
