// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/normalizer.h"

#include <utf8proc.h>

#include <cstdlib>
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

void unicode_form(std::string& text, int options) {
  if (is_ascii(text)) return;  // every form leaves ASCII alone
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
  text.assign(reinterpret_cast<const char*>(mapped), static_cast<size_t>(size));
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
