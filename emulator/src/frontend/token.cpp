// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/frontend/token.h"

#include <array>
#include <cctype>
#include <charconv>

#include "metal_emulator/emulator.h"

namespace metal_emulator::frontend {
namespace {

bool is_identifier_start(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || c == '_';
}
bool is_identifier_char(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_';
}
bool is_digit(char c) {
  return std::isdigit(static_cast<unsigned char>(c));
}

// Longest first. No ">>" and ">>=" (template brackets), no "[[" and "]]" (nested subscripts).
constexpr std::array<std::string_view, 21> kOperators = {
    "<<=", "...", "::", "->", "<<", "<=", ">=", "==", "!=", "&&", "||",
    "++",  "--",  "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^="};

enum class Origin { user, own_header, system };

class Tokenizer {
 public:
  Tokenizer(std::string_view text, const HeaderPaths& headers) : text_(text), headers_(headers) {}

  TokenStream run() {
    while (at_ < text_.size()) {
      step();
    }
    return std::move(stream_);
  }

 private:
  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }

  [[noreturn]] void fail(const std::string& message) const {
    const std::string file = stream_.files.empty() ? "input" : stream_.files[file_];
    throw CompileError(file + ":" + std::to_string(line_) + ": error: " + message);
  }

  void step() {
    const char c = peek();
    if (c == '\n') {
      line_++;
      at_++;
      line_start_ = true;
      space_ = true;
    } else if (std::isspace(static_cast<unsigned char>(c))) {
      at_++;
      space_ = true;
    } else if (c == '#' && line_start_) {
      directive();
    } else if (origin_ != Origin::user) {
      skip_line();
    } else {
      line_start_ = false;
      token();
    }
  }

  void skip_line() {
    const size_t end = text_.find('\n', at_);
    at_ = end == std::string_view::npos ? text_.size() : end;
  }

  void directive() {
    const size_t begin = at_;
    skip_line();
    std::string_view line = text_.substr(begin + 1, at_ - begin - 1);
    line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
    if (!line.empty() && is_digit(line[0])) {
      marker(line);
    } else if (origin_ == Origin::user && line.starts_with("pragma")) {
      add(TokenKind::pragma, "#" + std::string(line));
    } else if (origin_ == Origin::user) {
      fail("unexpected directive #" + std::string(line));
    }
    line_start_ = true;
  }

  // `12 "file" 1 3`: the next line is line 12 of file.
  void marker(std::string_view line) {
    int number = 0;
    std::from_chars(line.data(), line.data() + line.size(), number);
    const size_t open = line.find('"');
    const size_t close = line.rfind('"');
    if (open == std::string_view::npos || close == open) {
      fail("line marker without a file");
    }
    std::string name;
    for (size_t i = open + 1; i < close; i++) {
      if (line[i] == '\\' && i + 1 < close) {
        i++;
      }
      name += line[i];
    }
    const bool enters = line.find(" 1", close) != std::string_view::npos;
    const Origin origin = origin_of(name);
    if (origin == Origin::system && origin_ == Origin::user && enters && !stream_.files.empty()) {
      line_--;  // the marker follows the #include line's end
      fail("Metal has no header " + name);
    }
    origin_ = origin;
    // The marker's own line end adds one.
    line_ = number - 1;
    if (origin == Origin::user) {
      file_ = intern(name);
    }
  }

  Origin origin_of(const std::string& name) const {
    if (name.starts_with("<")) {
      return Origin::own_header;
    }
    for (const std::string& folder : headers_.own) {
      if (name.starts_with(folder)) {
        return Origin::own_header;
      }
    }
    if (name.starts_with("/usr/include/") || name.starts_with("/usr/lib/")) {
      return Origin::system;
    }
    return Origin::user;
  }

  int intern(const std::string& name) {
    for (size_t i = 0; i < stream_.files.size(); i++) {
      if (stream_.files[i] == name) {
        return static_cast<int>(i);
      }
    }
    stream_.files.push_back(name);
    return static_cast<int>(stream_.files.size()) - 1;
  }

  void add(TokenKind kind, std::string text) {
    if (stream_.files.empty()) {
      stream_.files.push_back("input");
    }
    Token token{};
    token.kind = kind;
    token.text = std::move(text);
    token.file = file_;
    token.line = line_;
    token.space_before = space_;
    stream_.tokens.push_back(std::move(token));
    space_ = false;
  }

  void take(TokenKind kind, size_t length) {
    add(kind, std::string(text_.substr(at_, length)));
    at_ += length;
  }

  void token() {
    const char c = peek();
    if (is_identifier_start(c)) {
      size_t length = 1;
      while (is_identifier_char(peek(length))) {
        length++;
      }
      const std::string_view word = text_.substr(at_, length);
      if (peek(length) == '"' && (word == "R" || word == "LR" || word == "u8R" || word == "uR")) {
        fail("raw string literals are not supported");
      }
      take(TokenKind::identifier, length);
    } else if (is_digit(c) || (c == '.' && is_digit(peek(1)))) {
      number();
    } else if (c == '"' || c == '\'') {
      quoted(c);
    } else {
      punctuation();
    }
  }

  void number() {
    size_t length = 1;
    for (;; length++) {
      const char c = peek(length);
      const char last = peek(length - 1);
      const bool hexadecimal = peek() == '0' && (peek(1) == 'x' || peek(1) == 'X');
      const bool exponent = hexadecimal ? last == 'p' || last == 'P' : last == 'e' || last == 'E';
      const bool separator = c == '\'' && is_identifier_char(peek(length + 1));
      if (!is_identifier_char(c) && c != '.' && !separator &&
          !((c == '+' || c == '-') && exponent)) {
        break;
      }
    }
    take(TokenKind::number, length);
  }

  void quoted(char quote) {
    size_t length = 1;
    while (peek(length) != quote) {
      if (peek(length) == '\0' || peek(length) == '\n') {
        fail(std::string("unterminated ") + quote + " literal");
      }
      length += peek(length) == '\\' ? 2 : 1;
    }
    take(quote == '"' ? TokenKind::string : TokenKind::character, length + 1);
  }

  void punctuation() {
    for (std::string_view op : kOperators) {
      if (text_.substr(at_).starts_with(op)) {
        take(TokenKind::punctuation, op.size());
        return;
      }
    }
    const char c = peek();
    if (std::string_view("{}()[]<>;:,.?~!+-*/%&|^=").find(c) == std::string_view::npos) {
      fail(std::string("unexpected character '") + c + "'");
    }
    take(TokenKind::punctuation, 1);
  }

  std::string_view text_;
  const HeaderPaths& headers_;
  TokenStream stream_;
  size_t at_ = 0;
  int file_ = 0;
  int line_ = 1;
  bool line_start_ = true;
  bool space_ = false;
  Origin origin_ = Origin::user;
};

std::string quote_path(const std::string& path) {
  std::string out = "\"";
  for (char c : path) {
    if (c == '"' || c == '\\') {
      out += '\\';
    }
    out += c;
  }
  return out + '"';
}

}  // namespace

std::string TokenStream::where(size_t index) const {
  if (tokens.empty()) {
    return (files.empty() ? std::string("input") : files[0]) + ":1";
  }
  const Token& token = tokens[std::min(index, tokens.size() - 1)];
  return files[token.file] + ":" + std::to_string(token.line);
}

TokenStream tokenize(std::string_view preprocessed, const HeaderPaths& headers) {
  return Tokenizer(preprocessed, headers).run();
}

std::string print(const TokenStream& stream) {
  // A jump of more than this many lines is cheaper as a #line directive.
  constexpr int kMaxBlankLines = 4;
  std::string out;
  int file = -1, line = 0;
  for (const Token& token : stream.tokens) {
    if (token.erased && token.before.empty() && token.after.empty()) {
      continue;
    }
    const bool pragma = token.kind == TokenKind::pragma;
    if (pragma && token.file == file && token.line == line && !out.ends_with('\n')) {
      out += '\n';  // _Pragma in a macro: within a line of the text
      line++;
    }
    if (token.file != file || token.line < line || token.line > line + kMaxBlankLines) {
      out += "\n#line " + std::to_string(token.line) + " " + quote_path(stream.files[token.file]) +
             "\n";
    } else if (token.line > line) {
      out.append(static_cast<size_t>(token.line - line), '\n');
    } else if (token.space_before) {
      out += ' ';
    }
    file = token.file;
    line = token.line;
    out += token.before;
    if (!token.erased) {
      out += token.text;
    }
    out += token.after;
    if (pragma) {
      out += '\n';
      line++;
    }
  }
  return out + "\n";
}

}  // namespace metal_emulator::frontend
