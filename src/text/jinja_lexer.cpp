// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/jinja_lexer.h"

#include <algorithm>
#include <cctype>

#include "metal_lora/error.h"
#include "src/text/utf8.h"

namespace metal_lora::text::jinja {

namespace {

[[noreturn]] void fail(uint32_t line, const std::string& what) {
  throw Error(
      ErrorCode::invalid_input, "[chat template, line " + std::to_string(line) + "] " + what);
}

bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

// Jinja reads any line end as \n and drops one at the end of the template.
std::string normalize_lines(const std::string& source) {
  std::string out;
  out.reserve(source.size());
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(const std::string& source) : s_(normalize_lines(source)) {}

  std::vector<Token> run() {
    while (pos_ < s_.size()) data();
    push(TokenKind::end, "");
    return std::move(tokens_);
  }

 private:
  bool at(std::string_view what) const { return s_.compare(pos_, what.size(), what) == 0; }

  void push(TokenKind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }

  void advance(size_t to) {
    line_ += static_cast<uint32_t>(std::count(s_.begin() + pos_, s_.begin() + to, '\n'));
    pos_ = to;
  }

  // Template data up to the next tag, then the tag.
  void data() {
    size_t tag = pos_;
    while ((tag = s_.find('{', tag)) != std::string::npos && tag + 1 < s_.size() &&
           s_[tag + 1] != '{' && s_[tag + 1] != '%' && s_[tag + 1] != '#') {
      ++tag;
    }
    if (tag == std::string::npos || tag + 1 >= s_.size()) {
      push_text(s_.substr(pos_));
      advance(s_.size());
      return;
    }
    std::string text = s_.substr(pos_, tag - pos_);
    strip_before(tag, text);
    push_text(std::move(text));
    advance(tag);
    const char kind = s_[tag + 1];
    const bool sign = tag + 2 < s_.size() && (s_[tag + 2] == '-' || s_[tag + 2] == '+');
    if (kind == '#') {
      comment();
    } else if (kind == '%' && raw_block(sign)) {
      return;
    } else {
      advance(tag + 2 + sign);
      expression(kind == '%');
    }
  }

  void push_text(std::string text) {
    if (!text.empty()) push(TokenKind::text, std::move(text));
  }

  // What a tag takes from the data before it: all white space after "-", the line's indentation
  // before a block or comment.
  void strip_before(size_t tag, std::string& text) const {
    const char sign = tag + 2 < s_.size() ? s_[tag + 2] : ' ';
    if (sign == '-') {
      while (!text.empty() && is_space(text.back())) text.pop_back();
    } else if (sign != '+' && s_[tag + 1] != '{') {
      const size_t newline = text.rfind('\n');
      if (newline == std::string::npos && !line_start_) return;
      const size_t from = newline == std::string::npos ? 0 : newline + 1;
      if (std::all_of(text.begin() + from, text.end(), is_space)) text.resize(from);
    }
  }

  // After a tag's closing: "-" takes all white space, otherwise a block takes one line end.
  void skip_after(size_t end, char sign, bool trims) {
    size_t to = end;
    if (sign == '-') {
      while (to < s_.size() && is_space(s_[to])) ++to;
    } else if (trims && sign != '+' && to < s_.size() && s_[to] == '\n') {
      ++to;
    }
    advance(to);
    line_start_ = to > 0 && s_[to - 1] == '\n';
  }

  void comment() {
    const size_t close = s_.find("#}", pos_ + 2);
    if (close == std::string::npos) fail(line_, "a comment must end with #} but does not");
    const char sign = close > pos_ + 2 ? s_[close - 1] : ' ';
    advance(close);
    skip_after(close + 2, sign, true);
  }

  // {% raw %} … {% endraw %}: data that is not looked at.
  bool raw_block(bool sign) {
    size_t p = pos_ + 2 + sign;
    while (p < s_.size() && is_space(s_[p])) ++p;
    if (s_.compare(p, 3, "raw") != 0) return false;
    p += 3;
    while (p < s_.size() && is_space(s_[p])) ++p;
    char close_sign = ' ';
    if (p < s_.size() && (s_[p] == '-' || s_[p] == '+')) close_sign = s_[p++];
    if (s_.compare(p, 2, "%}") != 0) return false;
    skip_after(p + 2, close_sign, true);
    for (size_t tag = pos_; (tag = s_.find("{%", tag)) != std::string::npos; tag += 2) {
      size_t q = tag + 2;
      if (q < s_.size() && (s_[q] == '-' || s_[q] == '+')) ++q;
      while (q < s_.size() && is_space(s_[q])) ++q;
      if (s_.compare(q, 6, "endraw") != 0) continue;
      q += 6;
      while (q < s_.size() && is_space(s_[q])) ++q;
      char end_sign = ' ';
      if (q < s_.size() && (s_[q] == '-' || s_[q] == '+')) end_sign = s_[q++];
      if (s_.compare(q, 2, "%}") != 0) continue;
      std::string text = s_.substr(pos_, tag - pos_);
      strip_before(tag, text);
      push_text(std::move(text));
      advance(tag);
      skip_after(q + 2, end_sign, true);
      return true;
    }
    fail(line_, "{% raw %} must end with {% endraw %} but does not");
  }

  void expression(bool block) {
    push(block ? TokenKind::block_begin : TokenKind::output_begin, "");
    const std::string_view close = block ? "%}" : "}}";
    size_t open_brackets = 0;
    while (true) {
      while (pos_ < s_.size() && is_space(s_[pos_])) advance(pos_ + 1);
      if (pos_ >= s_.size()) fail(line_, "a tag must be closed but is not");
      if (open_brackets == 0) {
        const bool sign = s_[pos_] == '-' || (block && s_[pos_] == '+');
        if (s_.compare(pos_ + sign, 2, close) == 0) {
          push(block ? TokenKind::block_end : TokenKind::output_end, "");
          skip_after(pos_ + sign + 2, sign ? s_[pos_] : ' ', block);
          return;
        }
      }
      const char c = s_[pos_];
      const auto u = static_cast<unsigned char>(c);
      if (std::isalpha(u) || c == '_') {
        name();
      } else if (std::isdigit(u)) {
        number();
      } else if (c == '\'' || c == '"') {
        string(c);
      } else {
        op(open_brackets);
      }
    }
  }

  void name() {
    size_t end = pos_;
    while (end < s_.size() &&
           (std::isalnum(static_cast<unsigned char>(s_[end])) || s_[end] == '_')) {
      ++end;
    }
    push(TokenKind::name, s_.substr(pos_, end - pos_));
    pos_ = end;
  }

  void number() {
    size_t end = pos_;
    bool real = false;
    const auto digits = [&] {
      while (end < s_.size() &&
             (std::isdigit(static_cast<unsigned char>(s_[end])) || s_[end] == '_')) {
        ++end;
      }
    };
    const auto digit_at = [&](size_t i) {
      return i < s_.size() && std::isdigit(static_cast<unsigned char>(s_[i]));
    };
    digits();
    if (end < s_.size() && s_[end] == '.' && digit_at(end + 1)) {
      real = true;
      ++end;
      digits();
    }
    if (end < s_.size() && (s_[end] == 'e' || s_[end] == 'E')) {
      const bool sign = end + 1 < s_.size() && (s_[end + 1] == '-' || s_[end + 1] == '+');
      if (digit_at(end + 1 + sign)) {
        real = true;
        end += 1 + sign;
        digits();
      }
    }
    std::string text = s_.substr(pos_, end - pos_);
    text.erase(std::remove(text.begin(), text.end(), '_'), text.end());
    push(real ? TokenKind::real : TokenKind::integer, std::move(text));
    pos_ = end;
  }

  void string(char quote) {
    std::string value;
    size_t i = pos_ + 1;
    for (; i < s_.size() && s_[i] != quote; ++i) {
      if (s_[i] == '\\' && i + 1 < s_.size()) {
        i = escape(i + 1, value);
      } else {
        value += s_[i];
      }
    }
    if (i >= s_.size()) fail(line_, "a string must be closed but is not");
    push(TokenKind::string, std::move(value));
    advance(i + 1);
  }

  // Python's string escapes; returns the position of the last character used.
  size_t escape(size_t i, std::string& out) const {
    static constexpr std::string_view kFrom = "ntr\\'\"abfv";
    static constexpr std::string_view kTo = "\n\t\r\\'\"\a\b\f\v";
    const char c = s_[i];
    if (const size_t k = kFrom.find(c); k != std::string_view::npos) {
      out += kTo[k];
      return i;
    }
    if (c == '\n') return i;
    const size_t hex_digits = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    const size_t first = hex_digits ? i + 1 : i;
    const int base = hex_digits ? 16 : 8;
    const size_t most = hex_digits ? hex_digits : 3;
    char32_t value = 0;
    size_t n = 0;
    for (; n < most && first + n < s_.size(); ++n) {
      const auto d = static_cast<unsigned char>(s_[first + n]);
      const int digit = std::isdigit(d)    ? d - '0'
                        : std::isxdigit(d) ? std::tolower(d) - 'a' + 10
                                           : 99;
      if (digit >= base) break;
      value = value * static_cast<char32_t>(base) + static_cast<char32_t>(digit);
    }
    if (hex_digits ? n < hex_digits : n == 0) {
      if (hex_digits)
        fail(line_, std::string("\\") + c + " must have its hexadecimal digits but has not");
      out += '\\';
      out += c;
      return i;
    }
    if (value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) {
      fail(line_, "an escape must name a Unicode scalar value but does not");
    }
    append_utf8(out, value);
    return first + n - 1;
  }

  void op(size_t& open_brackets) {
    for (const std::string_view two : {"==", "!=", "<=", ">=", "//", "**"}) {
      if (at(two)) {
        push(TokenKind::op, std::string(two));
        pos_ += 2;
        return;
      }
    }
    const char c = s_[pos_];
    static constexpr std::string_view kOps = "+-*/%~<>=.,:|()[]{}";
    if (kOps.find(c) == std::string_view::npos) {
      fail(
          line_,
          std::string("an expression must not contain '") +
              (static_cast<unsigned char>(c) < 0x80 ? std::string(1, c)
                                                    : std::string("a non-ASCII character")) +
              "' but does");
    }
    if (c == '(' || c == '[' || c == '{') ++open_brackets;
    if ((c == ')' || c == ']' || c == '}') && open_brackets > 0) --open_brackets;
    push(TokenKind::op, std::string(1, c));
    ++pos_;
  }

  const std::string s_;
  size_t pos_ = 0;
  uint32_t line_ = 1;
  bool line_start_ = true;
  std::vector<Token> tokens_;
};

}  // namespace

std::vector<Token> tokenize(const std::string& source) {
  return Lexer(source).run();
}

}  // namespace metal_lora::text::jinja
