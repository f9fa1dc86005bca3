// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace metal_lora {

/// A regular expression over module paths, as PEFT's configurations hold them. It comes from a file
/// that a stranger may have written, so matching is bounded: past the limit it throws. Thread-safe.
class ModulePattern {
 public:
  /// `where` names the pattern in errors. Throws Error invalid_input for a malformed one.
  ModulePattern(std::string_view pattern, std::string where);

  /// PEFT's rule for rank_pattern and alpha_pattern: re.match("(.*\.)?(pattern)$", path).
  bool matches_suffix(std::string_view path) const;
  /// PEFT's rule for a string in target_modules: re.fullmatch(pattern, path).
  bool matches_whole(std::string_view path) const;

 private:
  bool run(const void* code, std::string_view path) const;

  std::string where_;
  std::shared_ptr<const void> suffix_, whole_;  ///< pcre2_code
};

}  // namespace metal_lora
