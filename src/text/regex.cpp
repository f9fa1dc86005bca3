// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "metal_lora/error.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

constexpr size_t kMaxPatternBytes = 8192;
// Backtracking steps for one match: far above what a real pattern takes on a long line of spaces.
constexpr uint32_t kMatchLimit = 5'000'000;
constexpr uint32_t kHeapLimitKib = 64 * 1024;

// Oniguruma's \s is White_Space; PCRE2's adds U+180E. Its \w has marks and connectors besides
// letters and digits; PCRE2's has letters, all numbers and the underscore. So both are spelt out.
constexpr std::string_view kSpace =
    "\\x09-\\x0d\\x20\\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"
    "\\x{3000}";
constexpr std::string_view kNotSpace =
    "\\x00-\\x08\\x0e-\\x1f\\x21-\\x84\\x86-\\x9f\\xa1-\\x{167f}\\x{1681}-\\x{1fff}"
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}"
    "\\x{3001}-\\x{10ffff}";
constexpr std::string_view kWord = "\\p{L}\\p{M}\\p{Nd}\\p{Pc}";

[[noreturn]] void unsupported(const std::string& what) {
  throw Error(ErrorCode::unsupported, "[regex] pattern must not use " + what + " but does");
}

void translate_escape(char c, bool in_class, std::string& out) {
  switch (c) {
    case 's':
    case 'S':
    case 'w': {
      const auto set = c == 's' ? kSpace : c == 'S' ? kNotSpace : kWord;
      if (!in_class) out += '[';
      out += set;
      if (!in_class) out += ']';
      return;
    }
    case 'W':
      if (in_class) unsupported("\\W inside a character class");
      out += "[^";
      out += kWord;
      out += ']';
      return;
    case 'h':
    case 'H':
    case 'R':
    case 'X':
    case 'K':
    case 'C':
    case 'G':
      unsupported(std::string("\\") + c);
    default:
      out += '\\';
      out += c;
  }
}

std::string to_pcre2(const std::string& pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      translate_escape(pattern[++i], in_class, out);
      continue;
    }
    if (in_class) {
      if (c == '[') unsupported("a class inside a character class");
      if (c == '&' && i + 1 < pattern.size() && pattern[i + 1] == '&') {
        unsupported("&& in a character class");
      }
      if (c == ']') in_class = false;
    } else if (c == '[') {
      in_class = true;
      out += c;
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      continue;
    } else if (c == '(' && i + 1 < pattern.size() && pattern[i + 1] == '*') {
      unsupported("(*VERB)");  // they could lift the limits
    }
    out += c;
  }
  return out;
}

}  // namespace

struct Regex::Code {
  pcre2_code* code = nullptr;
  pcre2_match_context* limits = nullptr;
  bool jit = false;

  ~Code() {
    pcre2_match_context_free(limits);
    pcre2_code_free(code);
  }
};

Regex::Regex(const std::string& pattern) {
  if (pattern.size() > kMaxPatternBytes || !is_valid_utf8(pattern)) {
    throw Error(
        ErrorCode::invalid_input,
        "[regex] pattern must be UTF-8 of at most " + std::to_string(kMaxPatternBytes) +
            " bytes but has " + std::to_string(pattern.size()));
  }
  const std::string translated = to_pcre2(pattern);
  auto code = std::make_shared<Code>();
  int error;
  PCRE2_SIZE offset;
  code->code = pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(translated.data()),
      translated.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
      &error,
      &offset,
      nullptr);
  if (!code->code) {
    PCRE2_UCHAR message[256] = {};
    pcre2_get_error_message(error, message, sizeof message);
    throw Error(
        ErrorCode::invalid_input,
        "[regex] pattern must be well-formed but is \"" + pattern.substr(0, 200) +
            "\": " + reinterpret_cast<const char*>(message));
  }
  code->limits = pcre2_match_context_create(nullptr);
  if (!code->limits) throw std::bad_alloc();
  pcre2_set_match_limit(code->limits, kMatchLimit);
  pcre2_set_heap_limit(code->limits, kHeapLimitKib);
  code->jit = pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE) == 0;
  code_ = std::move(code);
}

namespace {

// Two words of output and no state of the text: one for each thread serves every pattern.
pcre2_match_data* thread_match_data() {
  struct Free {
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };
  thread_local std::unique_ptr<pcre2_match_data, Free> data(pcre2_match_data_create(1, nullptr));
  if (!data) throw std::bad_alloc();
  return data.get();
}

}  // namespace

Regex::Cursor::Cursor(const Regex& regex, std::string_view text) : regex_(regex), text_(text) {}

bool Regex::Cursor::next(Match& match) {
  const Code& code = *regex_.code_;
  pcre2_match_data* data = thread_match_data();
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text_.data() ? text_.data() : "");
  while (position_ <= text_.size()) {
    int rc = code.jit ? pcre2_jit_match(
                            code.code,
                            subject,
                            text_.size(),
                            position_,
                            PCRE2_NO_UTF_CHECK,
                            data,
                            code.limits)
                      : PCRE2_ERROR_JIT_STACKLIMIT;
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      // The interpreter keeps its stack on the heap, within the limit above.
      rc = pcre2_match(
          code.code,
          subject,
          text_.size(),
          position_,
          PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
          data,
          code.limits);
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0) {
      throw Error(
          ErrorCode::invalid_input,
          "[regex] matching must stay within " + std::to_string(kMatchLimit) +
              " steps but exceeds its limits (PCRE2 error " + std::to_string(rc) + ")");
    }
    const size_t* ovector = pcre2_get_ovector_pointer(data);
    // \K-like oddities are refused above; begin <= end holds.
    match = {ovector[0], ovector[1]};
    const bool empty = match.begin == match.end;
    position_ = match.end;
    if (empty) {
      const bool repeats = matched_ && match.begin == last_end_;
      position_ +=
          match.end < text_.size() ? utf8_length(static_cast<unsigned char>(text_[match.end])) : 1;
      if (repeats) continue;
    }
    matched_ = true;
    last_end_ = match.end;
    return true;
  }
  position_ = text_.size() + 1;
  return false;
}

}  // namespace metal_lora::text
