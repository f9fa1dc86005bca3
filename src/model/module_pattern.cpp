// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/module_pattern.h"

#include <fmt/format.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "metal_lora/error.h"

namespace metal_lora {
namespace {

constexpr size_t kMaxPatternBytes = 4096;
constexpr uint32_t kMatchLimit = 100'000;

std::shared_ptr<const void> compile(const std::string& expression, const std::string& where) {
  int code = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* compiled = pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(expression.data()),
      expression.size(),
      PCRE2_ANCHORED | PCRE2_ENDANCHORED | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C,
      &code,
      &offset,
      nullptr);
  if (compiled == nullptr) {
    PCRE2_UCHAR reason[128] = {};
    pcre2_get_error_message(code, reason, sizeof(reason));
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] must be a regular expression but is not: {}",
            where,
            reinterpret_cast<const char*>(reason)));
  }
  return {compiled, [](const void* p) {
            pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p)));
          }};
}

}  // namespace

ModulePattern::ModulePattern(std::string_view pattern, std::string where)
    : where_(std::move(where)) {
  if (pattern.size() > kMaxPatternBytes) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] must be at most {} bytes but is {}", where_, kMaxPatternBytes, pattern.size()));
  }
  // Compiled by itself first: "a)(b" must not become valid inside the parentheses.
  whole_ = compile(fmt::format("{}", pattern), where_);
  whole_ = compile(fmt::format("(?:{})", pattern), where_);
  suffix_ = compile(fmt::format("(?:.*\\.)?(?:{})", pattern), where_);
}

bool ModulePattern::run(const void* code, std::string_view path) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create(1, nullptr), &pcre2_match_data_free);
  const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context(
      pcre2_match_context_create(nullptr), &pcre2_match_context_free);
  if (!match || !context)
    throw Error(ErrorCode::does_not_fit, "[" + where_ + "] no memory to match");
  pcre2_set_match_limit(context.get(), kMatchLimit);
  const int rc = pcre2_match(
      static_cast<const pcre2_code*>(code),
      reinterpret_cast<PCRE2_SPTR>(path.data()),
      path.size(),
      0,
      0,
      match.get(),
      context.get());
  // 0: matched, but there were more groups than the block has room for, which nobody reads.
  if (rc >= 0) return true;
  if (rc == PCRE2_ERROR_NOMATCH) return false;
  throw Error(
      ErrorCode::invalid_input,
      fmt::format("[{}] must match in {} steps but needs more", where_, kMatchLimit));
}

bool ModulePattern::matches_suffix(std::string_view path) const {
  return run(suffix_.get(), path);
}
bool ModulePattern::matches_whole(std::string_view path) const {
  return run(whole_.get(), path);
}

}  // namespace metal_lora
