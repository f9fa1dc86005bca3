// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/pre_tokenizer.h"

#include <array>

#include "src/text/json_fields.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

using Step = PreTokenizer::Step;
using Kind = PreTokenizer::Kind;
using Behavior = PreTokenizer::Behavior;
using Prepend = PreTokenizer::Prepend;
using Cuts = std::vector<std::pair<size_t, size_t>>;

constexpr size_t kMaxSteps = 32;
constexpr int kMaxNesting = 8;
constexpr size_t kMaxReplacementBytes = 4;

// Radford et al. 2019, the expression of GPT-2's encoder.
constexpr const char* kGpt2Expression =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

struct ByteAlphabet {
  std::array<std::string, 256> chars;
  std::array<int16_t, 324> bytes;  // 68 bytes are moved to U+0100…U+0143

  ByteAlphabet() {
    bytes.fill(-1);
    char32_t moved = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      const char32_t c = printable ? static_cast<char32_t>(b) : moved++;
      append_utf8(chars[b], c);
      bytes[c] = static_cast<int16_t>(b);
    }
  }
};

const ByteAlphabet& byte_alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

// Collects the stretches of one piece, matches and gaps alternating, as one Behavior asks.
class Splitter {
 public:
  Splitter(Behavior behavior, Cuts& out) : behavior_(behavior), out_(out), first_(out.size()) {}

  void add(size_t begin, size_t end, bool is_match) {
    switch (behavior_) {
      case Behavior::removed:
        if (!is_match) push(begin, end);
        break;
      case Behavior::isolated:
        push(begin, end);
        break;
      case Behavior::contiguous:
        if (out_.size() > first_ && is_match == previous_match_) {
          out_.back().second = end;
        } else {
          push(begin, end);
        }
        break;
      case Behavior::merged_with_previous:
        if (is_match && !previous_match_ && out_.size() > first_) {
          out_.back().second = end;
        } else {
          push(begin, end);
        }
        break;
      case Behavior::merged_with_next:
        if (previous_match_ && !is_match && out_.size() > first_) {
          out_.back().second = end;
        } else {
          push(begin, end);
        }
        break;
    }
    previous_match_ = is_match;
  }

 private:
  void push(size_t begin, size_t end) {
    if (end > begin) out_.emplace_back(begin, end);
  }

  Behavior behavior_;
  Cuts& out_;
  size_t first_;
  bool previous_match_ = false;
};

void split_pattern(const Step& step, std::string_view text, size_t base, Cuts& out) {
  Splitter splitter(step.behavior, out);
  size_t done = 0;
  for_each_match(step.pattern, text, [&](size_t begin, size_t end) {
    if (begin > done) splitter.add(base + done, base + begin, step.invert);
    if (end > begin) splitter.add(base + begin, base + end, !step.invert);
    done = end;
  });
  if (done < text.size()) splitter.add(base + done, base + text.size(), step.invert);
}

// Splits where a property of single characters begins or ends.
template <class Property>
void split_chars(
    Property property, Behavior behavior, std::string_view text, size_t base, Cuts& out) {
  Splitter splitter(behavior, out);
  size_t gap = 0;
  for (size_t pos = 0; pos < text.size();) {
    const CodePoint c = read_utf8(text, pos);
    if (property(c.value)) {
      if (pos > gap) splitter.add(base + gap, base + pos, false);
      splitter.add(base + pos, base + pos + c.bytes, true);
      gap = pos + c.bytes;
    }
    pos += c.bytes;
  }
  if (gap < text.size()) splitter.add(base + gap, base + text.size(), false);
}

void split_piece(const Step& step, std::string_view text, size_t base, Cuts& out) {
  switch (step.kind) {
    case Kind::digits:
      return split_chars(is_numeric, step.behavior, text, base, out);
    case Kind::white_space:
      return split_chars(is_white_space, step.behavior, text, base, out);
    case Kind::punctuation:
      return split_chars(is_punctuation, step.behavior, text, base, out);
    default:
      return split_pattern(step, text, base, out);
  }
}

bool wants_prefix(const Step& step, std::string_view piece, bool at_start) {
  if (step.prepend == Prepend::never) return false;
  if (step.prepend == Prepend::first && !at_start) return false;
  return piece.substr(0, step.replacement.size()) != step.replacement;
}

// Metaspace: spaces become the replacement; maybe one in front.
void rewrite_spaces(const Step& step, std::string_view piece, bool at_start, std::string& out) {
  const size_t begin = out.size();
  for (const char c : piece) {
    if (c == ' ') {
      out += step.replacement;
    } else {
      out += c;
    }
  }
  const std::string_view written = std::string_view(out).substr(begin);
  if (wants_prefix(step, written, at_start)) out.insert(begin, step.replacement);
}

Behavior behavior_from_json(const io::Json& json, const std::string& where, Behavior absent) {
  if (field(json, "behavior", where).is_null()) return absent;
  const std::string name = string_field(json, "behavior", where);
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "Contiguous") return Behavior::contiguous;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  refuse(where + ".behavior", name);
}

Step metaspace_from_json(const io::Json& json, const std::string& where) {
  Step step{Kind::metaspace};
  step.replacement = string_field(json, "replacement", where);
  if (step.replacement.empty() || step.replacement.size() > kMaxReplacementBytes ||
      utf8_length(static_cast<unsigned char>(step.replacement[0])) != step.replacement.size()) {
    throw Error(
        ErrorCode::invalid_input, "[" + where + ".replacement] must be one character but is not");
  }
  step.prepend =
      bool_field(json, "add_prefix_space", true, where) ? Prepend::always : Prepend::never;
  if (!field(json, "prepend_scheme", where).is_null()) {
    const std::string scheme = string_field(json, "prepend_scheme", where);
    if (scheme == "always") {
      step.prepend = Prepend::always;
    } else if (scheme == "first") {
      step.prepend = Prepend::first;
    } else if (scheme == "never") {
      step.prepend = Prepend::never;
    } else {
      refuse(where + ".prepend_scheme", scheme);
    }
  }
  step.split = bool_field(json, "split", true, where);
  step.pattern.literal = step.replacement;
  step.behavior = Behavior::merged_with_next;
  return step;
}

Step step_from_json(const std::string& type, const io::Json& json, const std::string& where) {
  if (type == "ByteLevel") {
    return PreTokenizer::byte_level_step(
        bool_field(json, "add_prefix_space", true, where),
        bool_field(json, "use_regex", true, where));
  }
  if (type == "Digits") {
    return PreTokenizer::digits_step(bool_field(json, "individual_digits", false, where));
  }
  if (type == "Split") {
    Step step{Kind::split};
    step.pattern = pattern_from_json(field(json, "pattern", where), where + ".pattern");
    step.behavior = behavior_from_json(json, where, Behavior::isolated);
    step.invert = bool_field(json, "invert", false, where);
    return step;
  }
  if (type == "Metaspace") return metaspace_from_json(json, where);
  if (type == "Whitespace") {
    Step step{Kind::split};
    step.pattern.regex.emplace(
        "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]+|"
        "[^\\s\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]+");
    step.behavior = Behavior::removed;
    step.invert = true;
    return step;
  }
  if (type == "WhitespaceSplit") {
    Step step{Kind::white_space};
    step.behavior = Behavior::removed;
    return step;
  }
  if (type == "Punctuation") {
    Step step{Kind::punctuation};
    step.behavior = behavior_from_json(json, where, Behavior::isolated);
    return step;
  }
  refuse(where + ".type", type);
}

void append_steps(
    const io::Json& json, const std::string& where, int nesting, std::vector<Step>& steps) {
  if (json.is_null()) return;
  if (nesting > kMaxNesting || steps.size() >= kMaxSteps) {
    throw Error(
        ErrorCode::invalid_input, "[" + where + "] must have at most 32 steps but has more");
  }
  const std::string type = string_field(json, "type", where);
  if (type == "Sequence") {
    for (const auto& item : array_field(json, "pretokenizers", where)) {
      append_steps(item, where, nesting + 1, steps);
    }
    return;
  }
  steps.push_back(step_from_json(type, json, where));
}

}  // namespace

const std::string& byte_level_char(unsigned char byte) {
  return byte_alphabet().chars[byte];
}

int byte_level_byte(char32_t c) {
  const auto& bytes = byte_alphabet().bytes;
  return c < bytes.size() ? bytes[c] : -1;
}

PreTokenizer::PreTokenizer(std::vector<Step> steps) : steps_(std::move(steps)) {
  byte_level_ = !steps_.empty() && steps_.back().kind == Kind::byte_level;
  for (size_t i = 0; i < steps_.size(); ++i) {
    steps_[i].map_bytes = steps_[i].kind == Kind::byte_level && i + 1 < steps_.size();
  }
}

PreTokenizer PreTokenizer::from_json(const io::Json& json, const std::string& where) {
  std::vector<Step> steps;
  append_steps(json, where, 0, steps);
  return PreTokenizer(std::move(steps));
}

Step PreTokenizer::split_step(const std::string& regex, Behavior behavior) {
  Step step{Kind::split};
  step.pattern.regex.emplace(regex);
  step.behavior = behavior;
  return step;
}

Step PreTokenizer::digits_step(bool individual) {
  Step step{Kind::digits};
  step.behavior = individual ? Behavior::isolated : Behavior::contiguous;
  return step;
}

Step PreTokenizer::byte_level_step(bool add_prefix_space, bool use_regex) {
  Step step{Kind::byte_level};
  step.replacement.push_back(' ');  // g++ 12 misreads the assignment of a literal here
  step.prepend = add_prefix_space ? Prepend::always : Prepend::never;
  step.split = use_regex;
  if (use_regex) step.pattern.regex.emplace(kGpt2Expression);
  return step;
}

std::string_view PreTokenizer::apply(std::string_view text, bool at_start, Pieces& p) const {
  p.cuts.clear();
  if (!text.empty()) p.cuts.emplace_back(0, text.size());
  for (const Step& step : steps_) {
    if (step.kind == Kind::metaspace || step.prepend != Prepend::never) {
      p.next.clear();
      p.next_text.clear();
      for (const auto& [begin, end] : p.cuts) {
        const size_t from = p.next_text.size();
        const auto piece = text.substr(begin, end - begin);
        const bool starts = at_start && begin == 0;
        if (step.kind == Kind::metaspace) {
          rewrite_spaces(step, piece, starts, p.next_text);
        } else {
          if (wants_prefix(step, piece, starts)) p.next_text += ' ';
          p.next_text += piece;
        }
        p.next.emplace_back(from, p.next_text.size());
      }
      p.cuts.swap(p.next);
      p.text.swap(p.next_text);
      text = p.text;
    }
    if (step.split) {
      p.next.clear();
      for (const auto& [begin, end] : p.cuts) {
        split_piece(step, text.substr(begin, end - begin), begin, p.next);
      }
      p.cuts.swap(p.next);
    }
    if (step.map_bytes) {
      p.next_text.clear();
      for (auto& [begin, end] : p.cuts) {
        const size_t from = p.next_text.size();
        for (size_t i = begin; i < end; ++i) {
          p.next_text += byte_level_char(static_cast<unsigned char>(text[i]));
        }
        begin = from;
        end = p.next_text.size();
      }
      p.text.swap(p.next_text);
      text = p.text;
    }
  }
  return text;
}

}  // namespace metal_lora::text
