// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace metal_lora::text {

/// A pattern in the Oniguruma dialect that tokenizer.json uses, run by PCRE2's JIT. Immutable;
/// any number of threads may search at once, each with its own Cursor.
class Regex {
 public:
  /// Throws Error: invalid_input (malformed), unsupported (Oniguruma syntax PCRE2 has not).
  explicit Regex(const std::string& pattern);

  struct Match {
    size_t begin, end;
  };

  /// One left-to-right search through valid UTF-8 that must outlive it.
  class Cursor {
   public:
    Cursor(const Regex& regex, std::string_view text);
    /// The next match, empty ones included, never overlapping. False at the end. Throws Error
    /// invalid_input when the pattern backtracks beyond its limit.
    bool next(Match& match);

   private:
    const Regex& regex_;
    std::string_view text_;
    size_t position_ = 0;
    size_t last_end_ = 0;
    bool matched_ = false;
  };

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

}  // namespace metal_lora::text
