// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>

#include "src/text/json_fields.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

constexpr size_t kMaxSteps = 32;
constexpr size_t kMaxContentBytes = 256;
constexpr size_t kMaxGrowth = 32;
constexpr int kMaxNesting = 8;

bool is_ascii(std::string_view text) {
  for (const char c : text) {
    if (static_cast<unsigned char>(c) >= 0x80) return false;
  }
  return true;
}

// Marks and letters of Unicode 10 to 15 that combine or decompose. The reference's tables are those
// of Unicode 9, which leave them where they are, and models were trained on what it gave.
struct CodePointRange {
  char32_t first, last;
};
constexpr CodePointRange kSinceUnicode9[] = {
    {0x07FD, 0x07FD},   {0x0898, 0x089F},   {0x08CA, 0x08D3},   {0x09FE, 0x09FE},
    {0x0C3C, 0x0C3C},   {0x0D3B, 0x0D3C},   {0x0EBA, 0x0EBA},   {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},
    {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785}, {0x10787, 0x107B0},
    {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11938, 0x11938}, {0x1193D, 0x1193E},
    {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47},
    {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E030, 0x1E06D}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
    {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}};

bool is_since_unicode_9(char32_t c) {
  const auto* end = std::end(kSinceUnicode9);
  const auto* range = std::lower_bound(
      std::begin(kSinceUnicode9), end, c, [](const auto& r, char32_t v) { return r.last < v; });
  return range != end && c >= range->first;
}

void append_mapped(std::string_view text, int options, std::string& out) {
  if (text.empty()) return;
  utf8proc_uint8_t* mapped = nullptr;
  const auto size = utf8proc_map(
      reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
      static_cast<utf8proc_ssize_t>(text.size()),
      &mapped,
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | options));
  std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, &std::free);
  if (size == UTF8PROC_ERROR_NOMEM) throw std::bad_alloc();
  if (size < 0) {
    throw Error(
        ErrorCode::invalid_input,
        std::string("[normalizer] text must be valid Unicode but is not: ") +
            utf8proc_errmsg(size));
  }
  out.append(reinterpret_cast<const char*>(mapped), static_cast<size_t>(size));
}

void unicode_form(std::string& text, int options) {
  if (is_ascii(text)) return;  // every form leaves ASCII alone
  std::string out;
  size_t done = 0;
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    if (is_since_unicode_9(c.value)) {
      append_mapped(std::string_view(text).substr(done, pos - done), options, out);
      out.append(text, pos, c.bytes);
      done = pos + c.bytes;
    }
    pos += c.bytes;
  }
  append_mapped(std::string_view(text).substr(done), options, out);
  text = std::move(out);
}

void lowercase(std::string& text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    pos += c.bytes;
    if (c.value == 0x130) {
      out += "i\xCC\x87";  // the only lower case of two code points
    } else {
      append_utf8(out, static_cast<char32_t>(utf8proc_tolower(static_cast<int32_t>(c.value))));
    }
  }
  text = std::move(out);
}

void replace(std::string& text, const Pattern& pattern, const std::string& content) {
  std::string out;
  size_t done = 0;
  for_each_match(pattern, text, [&](size_t begin, size_t end) {
    out.append(text, done, begin - done);
    out += content;
    done = end;
  });
  if (done == 0 && out.empty()) return;
  out.append(text, done);
  text = std::move(out);
}

void strip(std::string& text, bool left, bool right) {
  size_t begin = 0, end = text.size();
  while (left && begin < end) {
    const CodePoint c = read_utf8(text, begin);
    if (!is_white_space(c.value)) break;
    begin += c.bytes;
  }
  while (right && end > begin) {
    size_t last = end - 1;
    while (last > begin && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    if (!is_white_space(read_utf8(text, last).value)) break;
    end = last;
  }
  text = text.substr(begin, end - begin);
}

void append_steps(
    const io::Json& json,
    const std::string& where,
    int nesting,
    std::vector<Normalizer::Step>& steps) {
  using Kind = Normalizer::Kind;
  if (json.is_null()) return;
  if (nesting > kMaxNesting || steps.size() >= kMaxSteps) {
    throw Error(
        ErrorCode::invalid_input, "[" + where + "] must have at most 32 steps but has more");
  }
  const std::string type = string_field(json, "type", where);
  Normalizer::Step step{Kind::nfc, {}, {}, false, false};
  if (type == "Sequence") {
    for (const auto& item : array_field(json, "normalizers", where)) {
      append_steps(item, where, nesting + 1, steps);
    }
    return;
  }
  if (type == "NFC") {
    step.kind = Kind::nfc;
  } else if (type == "NFD") {
    step.kind = Kind::nfd;
  } else if (type == "NFKC") {
    step.kind = Kind::nfkc;
  } else if (type == "NFKD") {
    step.kind = Kind::nfkd;
  } else if (type == "Lowercase") {
    step.kind = Kind::lowercase;
  } else if (type == "Replace") {
    step.kind = Kind::replace;
    step.pattern = pattern_from_json(field(json, "pattern", where), where + ".pattern");
    step.content = string_field(json, "content", where);
  } else if (type == "Prepend") {
    step.kind = Kind::prepend;
    step.content = string_field(json, "prepend", where);
  } else if (type == "Strip") {
    step.kind = Kind::strip;
    step.left = bool_field(json, "strip_left", true, where);
    step.right = bool_field(json, "strip_right", true, where);
  } else {
    refuse(where + ".type", type);
  }
  if (step.content.size() > kMaxContentBytes || !is_valid_utf8(step.content)) {
    throw Error(
        ErrorCode::invalid_input,
        "[" + where + ".content] must have at most 256 bytes but has " +
            std::to_string(step.content.size()));
  }
  steps.push_back(std::move(step));
}

}  // namespace

Pattern pattern_from_json(const io::Json& json, const std::string& where) {
  Pattern pattern;
  if (json.is_object() && json.contains("Regex")) {
    pattern.regex.emplace(string_field(json, "Regex", where));
    return pattern;
  }
  pattern.literal = string_field(json, "String", where);
  if (pattern.literal.empty()) {
    throw Error(ErrorCode::invalid_input, "[" + where + "] must not be empty but is");
  }
  return pattern;
}

Normalizer Normalizer::from_json(const io::Json& json, const std::string& where) {
  std::vector<Step> steps;
  append_steps(json, where, 0, steps);
  return Normalizer(std::move(steps));
}

void Normalizer::apply(std::string& text) const {
  const size_t limit = 4096 + kMaxGrowth * text.size();
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::nfc:
        unicode_form(text, UTF8PROC_COMPOSE);
        break;
      case Kind::nfd:
        unicode_form(text, UTF8PROC_DECOMPOSE);
        break;
      case Kind::nfkc:
        unicode_form(text, UTF8PROC_COMPOSE | UTF8PROC_COMPAT);
        break;
      case Kind::nfkd:
        unicode_form(text, UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT);
        break;
      case Kind::lowercase:
        lowercase(text);
        break;
      case Kind::replace:
        replace(text, step.pattern, step.content);
        break;
      case Kind::prepend:
        if (!text.empty()) text.insert(0, step.content);
        break;
      case Kind::strip:
        strip(text, step.left, step.right);
        break;
    }
    if (text.size() > limit) {
      throw Error(
          ErrorCode::invalid_input,
          "[normalizer] text must stay within 32 times its size but grew to " +
              std::to_string(text.size()) + " bytes");
    }
  }
}

}  // namespace metal_lora::text
