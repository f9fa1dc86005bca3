// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/token_decoder.h"

#include "src/text/json_fields.h"
#include "src/text/pre_tokenizer.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

using Step = TokenDecoder::Step;
using Kind = TokenDecoder::Kind;
using Tokens = std::vector<std::string>;

constexpr size_t kMaxSteps = 32;
constexpr int kMaxNesting = 8;
constexpr size_t kMaxContentBytes = 256;
constexpr int64_t kMaxStripped = 8;  // the streaming decoder keeps as many tokens of context
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// The bytes behind a spelling in GPT-2's alphabet; the spelling itself if it has other characters.
void append_byte_level(const std::string& token, std::string& out) {
  const size_t before = out.size();
  for (size_t pos = 0; pos < token.size();) {
    const CodePoint c = read_utf8(token, pos);
    const int byte = c.valid ? byte_level_byte(c.value) : -1;
    if (byte < 0) {
      out.resize(before);
      out += token;
      return;
    }
    out += static_cast<char>(byte);
    pos += c.bytes;
  }
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The byte of "<0x0A>", or -1.
int fallback_byte(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
  const int high = hex_digit(token[3]), low = hex_digit(token[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

// A run of byte tokens is one string if it is UTF-8 as a whole, else one U+FFFD a byte.
void byte_fallback(Tokens& tokens, bool raw) {
  Tokens out;
  std::string run;
  const auto end_run = [&] {
    if (run.empty()) return;
    if (is_valid_utf8(run)) {
      out.push_back(run);
    } else {
      for (size_t i = 0; i < run.size(); ++i) out.emplace_back(kReplacement);
    }
    run.clear();
  };
  for (auto& token : tokens) {
    const int byte = fallback_byte(token);
    if (byte < 0) {
      end_run();
      out.push_back(std::move(token));
    } else if (raw) {
      out.emplace_back(1, static_cast<char>(byte));
    } else {
      run += static_cast<char>(byte);
    }
  }
  end_run();
  tokens = std::move(out);
}

void metaspace(Tokens& tokens, const Step& step) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::string out;
    for (size_t pos = 0; pos < tokens[i].size();) {
      if (tokens[i].compare(pos, step.pattern.size(), step.pattern) == 0) {
        if (i > 0 || !step.drop_in_first) out += ' ';
        pos += step.pattern.size();
      } else {
        out += tokens[i][pos++];
      }
    }
    tokens[i] = std::move(out);
  }
}

void strip(std::string& token, const Step& step) {
  size_t begin = 0, end = token.size();
  const size_t n = step.pattern.size();
  for (size_t i = 0; i < step.start && token.compare(begin, n, step.pattern) == 0; ++i) begin += n;
  for (size_t i = 0; i < step.stop && end >= begin + n; ++i) {
    if (token.compare(end - n, n, step.pattern) != 0) break;
    end -= n;
  }
  token = token.substr(begin, end - begin);
}

void replace(std::string& token, const Step& step) {
  size_t at = token.find(step.pattern);
  if (at == std::string::npos) return;
  std::string out;
  size_t done = 0;
  for (; at != std::string::npos; at = token.find(step.pattern, done)) {
    out.append(token, done, at - done);
    out += step.content;
    done = at + step.pattern.size();
  }
  out.append(token, done);
  token = std::move(out);
}

std::string joined(const Tokens& tokens, std::string_view between) {
  std::string out;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += between;
    out += tokens[i];
  }
  return out;
}

std::string one_character(const io::Json& json, const char* key, const std::string& where) {
  std::string c = string_field(json, key, where);
  if (c.empty() || !is_valid_utf8(c) || utf8_length(static_cast<unsigned char>(c[0])) != c.size()) {
    wrong_field(where, key, "one character", &field(json, key, where));
  }
  return c;
}

Step step_from_json(const std::string& type, const io::Json& json, const std::string& where) {
  Step step{Kind::fuse, {}, {}, 0, 0, false};
  if (type == "ByteLevel") {
    step.kind = Kind::byte_level;
  } else if (type == "ByteFallback") {
    step.kind = Kind::byte_fallback;
  } else if (type == "Fuse") {
    step.kind = Kind::fuse;
  } else if (type == "Metaspace") {
    step.kind = Kind::metaspace;
    step.pattern = one_character(json, "replacement", where);
    step.drop_in_first = bool_field(json, "add_prefix_space", true, where);
    if (!field(json, "prepend_scheme", where).is_null()) {
      step.drop_in_first = string_field(json, "prepend_scheme", where) != "never";
    }
  } else if (type == "Strip") {
    step.kind = Kind::strip;
    step.pattern = one_character(json, "content", where);
    step.start = static_cast<size_t>(int_field(json, "start", 0, kMaxStripped, where));
    step.stop = static_cast<size_t>(int_field(json, "stop", 0, kMaxStripped, where));
  } else if (type == "Replace") {
    step.kind = Kind::replace;
    Pattern pattern = pattern_from_json(field(json, "pattern", where), where + ".pattern");
    if (pattern.regex) refuse(where + ".pattern", "Regex");
    step.pattern = std::move(pattern.literal);
    step.content = string_field(json, "content", where);
    if (step.content.size() > kMaxContentBytes) {
      wrong_field(where, "content", "at most 256 bytes", &field(json, "content", where));
    }
  } else {
    refuse(where + ".type", type);
  }
  return step;
}

void append_steps(
    const io::Json& json, const std::string& where, int nesting, std::vector<Step>& steps) {
  if (nesting > kMaxNesting || steps.size() >= kMaxSteps) {
    throw Error(
        ErrorCode::invalid_input, "[" + where + "] must have at most 32 steps but has more");
  }
  const std::string type = string_field(json, "type", where);
  if (type == "Sequence") {
    for (const auto& item : array_field(json, "decoders", where)) {
      append_steps(item, where, nesting + 1, steps);
    }
    return;
  }
  steps.push_back(step_from_json(type, json, where));
}

}  // namespace

TokenDecoder TokenDecoder::from_json(const io::Json& json, const std::string& where) {
  if (json.is_null()) return {};
  std::vector<Step> steps;
  append_steps(json, where, 0, steps);
  return TokenDecoder(std::move(steps));
}

std::string TokenDecoder::decode(std::vector<std::string> tokens) const {
  return replace_invalid_utf8(run(std::move(tokens), false));
}

std::string TokenDecoder::decode_bytes(std::vector<std::string> tokens) const {
  return run(std::move(tokens), true);
}

std::string TokenDecoder::run(std::vector<std::string> tokens, bool raw) const {
  if (!present_) return joined(tokens, " ");
  size_t limit = 4096;
  for (const auto& token : tokens) limit += 32 * token.size();
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::byte_level: {
        std::string bytes;
        for (const auto& token : tokens) append_byte_level(token, bytes);
        tokens.assign(1, raw ? bytes : replace_invalid_utf8(bytes));
        break;
      }
      case Kind::metaspace:
        metaspace(tokens, step);
        break;
      case Kind::byte_fallback:
        byte_fallback(tokens, raw);
        break;
      case Kind::fuse:
        tokens.assign(1, joined(tokens, ""));
        break;
      case Kind::strip:
        for (auto& token : tokens) strip(token, step);
        break;
      case Kind::replace:
        for (auto& token : tokens) replace(token, step);
        break;
    }
    size_t size = 0;
    for (const auto& token : tokens) size += token.size();
    if (size > limit) {
      throw Error(
          ErrorCode::invalid_input,
          "[decoder] text must stay within 32 times its tokens but grew to " +
              std::to_string(size) + " bytes");
    }
  }
  return joined(tokens, "");
}

}  // namespace metal_lora::text
