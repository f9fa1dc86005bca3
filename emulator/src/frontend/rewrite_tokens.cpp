// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cctype>
#include <set>

#include "metal_emulator/emulator.h"
#include "src/frontend/rewrite.h"

namespace metal_emulator::frontend {
namespace {

// Attributes that mean something to Metal alone; the rewriter has read them by now.
constexpr std::array<std::string_view, 8> kMetalAttributes = {
    "kernel",
    "host_name",
    "buffer",
    "threadgroup",
    "function_constant",
    "max_total_threads_per_threadgroup",
    "required_threads_per_threadgroup",
    "unroll"};

constexpr std::array<std::string_view, 7> kStandardAttributes = {
    "maybe_unused", "nodiscard", "fallthrough", "deprecated", "noreturn", "likely", "unlikely"};

template <size_t N>
bool contains(const std::array<std::string_view, N>& list, std::string_view word) {
  return std::find(list.begin(), list.end(), word) != list.end();
}

void collect_classes(
    const TokenStream& stream,
    const std::vector<Declaration>& declarations,
    std::set<std::string>& out) {
  for (const Declaration& d : declarations) {
    if (d.kind == Declaration::Kind::class_type && d.name != kNone) {
      out.insert(stream.tokens[d.name].text);
    }
    collect_classes(stream, d.members, out);
  }
}

// Words in the declarations of data members: a struct may have one that is spelt as a swizzle is.
void collect_members(
    const TokenStream& stream,
    const std::vector<Declaration>& declarations,
    std::set<std::string>& out) {
  for (const Declaration& d : declarations) {
    for (size_t i = d.begin; d.in_class && d.kind == Declaration::Kind::variable && i < d.end;
         i++) {
      out.insert(stream.tokens[i].text);
    }
    collect_members(stream, d.members, out);
  }
}

// Local classes: their bodies are not parsed as declarations.
void collect_local_classes(const TokenStream& stream, std::set<std::string>& out) {
  for (size_t i = 0; i + 1 < stream.tokens.size(); i++) {
    if ((stream.tokens[i].is("struct") || stream.tokens[i].is("class")) &&
        stream.tokens[i + 1].is_identifier()) {
      out.insert(stream.tokens[i + 1].text);
    }
  }
}

class SpaceEraser {
 public:
  SpaceEraser(TokenStream& stream, std::set<std::string> classes, std::set<std::string> members)
      : stream_(stream),
        tokens_(stream.tokens),
        classes_(std::move(classes)),
        members_(std::move(members)) {
    for (size_t i = 1; i + 1 < tokens_.size(); i++) {
      if ((tokens_[i - 1].is("typename") || tokens_[i - 1].is("class")) &&
          tokens_[i].is_identifier() &&
          (tokens_[i + 1].is(",") || tokens_[i + 1].is(">") || tokens_[i + 1].is("="))) {
        type_parameters_.insert(tokens_[i].text);
      }
    }
  }

  void run() {
    for (size_t at = 0; at < tokens_.size();) {
      if (is_attribute(stream_, at)) {
        attribute(at);
        continue;
      }
      Token& token = tokens_[at];
      if (token.is_identifier() && !token.erased) {
        word(at);
      }
      at++;
    }
  }

 private:
  void attribute(size_t& at) {
    const size_t open = at;
    bool metal = false, standard = false;
    for (const Attribute& a : parse_attributes(stream_, open, &at)) {
      const bool known = contains(kMetalAttributes, a.name) || is_built_in(a.name);
      const bool plain = contains(kStandardAttributes, a.name) || a.name.starts_with("gnu::") ||
                         a.name.starts_with("clang::");
      if (!known && !plain) {
        throw CompileError(
            stream_.where(a.token) + ": error: attribute [[" + a.name + "]] is not supported");
      }
      metal = metal || known;
      standard = standard || plain;
    }
    if (metal && standard) {
      throw CompileError(
          stream_.where(open) + ": error: write Metal's and C++'s attributes in separate [[ ]]");
    }
    for (size_t i = open; metal && i < at; i++) {
      tokens_[i].erased = true;
    }
  }

  // `auto v = x.xy;`: a swizzle of the library's vectors is a proxy, Metal's is a vector.
  void deduced(size_t at) {
    if (at + 3 >= tokens_.size() || !tokens_[at + 1].is_identifier() || !tokens_[at + 2].is("=") ||
        tokens_[at + 3].is("{") || (at > 0 && tokens_[at - 1].is("constexpr"))) {
      return;
    }
    size_t end = at + 3;
    while (end < tokens_.size() && !tokens_[end].is(";") && !tokens_[end].is(")") &&
           !tokens_[end].is("}")) {
      end = tokens_[end].is("(") || tokens_[end].is("[") || tokens_[end].is("{")
                ? match_bracket(stream_, end) + 1
                : end + 1;
    }
    if (end > at + 3 && split_commas(stream_, at + 3, end).size() == 1) {
      tokens_[at + 2].after += " ::metal_emulator_rewrite::value(";
      tokens_[end - 1].after += ")";
    }
  }

  void word(size_t at) {
    Token& token = tokens_[at];
    if (token.is("auto")) {
      deduced(at);
    }
    swizzle_of_swizzle(at);
    conversion(at);
    if (token.is("constant")) {
      if (beside_const(at) || qualifies_constructor(at)) {
        token.erased = true;
      } else {
        token.text = "const";
      }
    } else if (is_address_space(token.text)) {
      token.erased = true;
    } else if (token.is("static_cast") && casts_to_value(at)) {
      token.text = "::metal_emulator_rewrite::cast";
    } else if (
        token.is("threadgroup_imageblock") || token.is("ray_data") || token.is("object_data")) {
      throw CompileError(
          stream_.where(at) + ": error: address space " + token.text + " is not supported");
    }
  }

  static size_t letter(char c) {
    static constexpr std::string_view kLetters = "xyzwrgba";
    const size_t at = kLetters.find(c);
    return at == std::string_view::npos ? at : at % 4;
  }

  static bool is_swizzle(const std::string& text) {
    return text.size() <= 4 && !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
             return letter(c) != std::string_view::npos;
           });
  }

  // v.xyz.zy → v.zy: a swizzle of the library's vectors has no swizzles itself.
  void swizzle_of_swizzle(size_t at) {
    while (at > 0 && at + 2 < tokens_.size() && tokens_[at - 1].is(".") &&
           tokens_[at].text.size() > 1 && is_swizzle(tokens_[at].text) && tokens_[at + 1].is(".") &&
           is_swizzle(tokens_[at + 2].text) && !members_.count(tokens_[at].text)) {
      const std::string outer = tokens_[at].text;
      for (char& c : tokens_[at + 2].text) {
        if (letter(c) >= outer.size()) {
          throw CompileError(
              stream_.where(at + 2) + ": error: no component " + c + " in ." + outer);
        }
        c = outer[letter(c)];
      }
      tokens_[at].erased = tokens_[at + 1].erased = true;
      at += 2;
      tokens_[at - 1].text = ".";  // the next round's
    }
  }

  // T(x) and (half)x where half may meet bfloat: clang converts neither to the other.
  void conversion(size_t at) {
    const Token& token = tokens_[at];
    const bool narrow =
        token.is("half") || token.is("bfloat") || token.is("float16_t") || token.is("bfloat16_t");
    if ((!narrow && !type_parameters_.count(token.text)) || at == 0 || at + 1 >= tokens_.size()) {
      return;
    }
    const Token& left = tokens_[at - 1];
    const size_t close = tokens_[at + 1].is("(") ? match_bracket(stream_, at + 1) : at;
    const bool of_literal = tokens_[close - 1].kind == TokenKind::number && close == at + 3;
    if (close > at + 2 && !of_literal && !left.is("::") && !left.is(".") &&
        (!left.is_identifier() || left.is("return") || left.is("case") || left.is("else"))) {
      tokens_[at].before += "::metal_emulator_rewrite::make<";
      tokens_[at].after += ">";
    } else if (left.is("(") && tokens_[at + 1].is(")") && at > 1 && !names_function(at - 2)) {
      const size_t end = operand_end(at + 2);
      if (end > at + 2) {
        tokens_[at - 1].before += "::metal_emulator_rewrite::make<";
        tokens_[at - 1].erased = tokens_[at + 1].erased = true;
        tokens_[at + 1].after += ">(";
        tokens_[end - 1].after += ")";
      }
    }
  }

  // What makes "(T)" after it an argument list or sizeof's operand, not a cast.
  bool names_function(size_t at) const {
    return (tokens_[at].is_identifier() && !tokens_[at].is("return") && !tokens_[at].is("case") &&
            !tokens_[at].is("else")) ||
           tokens_[at].is("]") || tokens_[at].is(">");
  }

  // The end of the operand of a cast that begins at `at`: signs, casts, a name or parenthesis, and
  // what follows it closely. `at` itself where there is none.
  size_t operand_end(size_t at) const {
    const size_t none = at, count = tokens_.size();
    for (; at < count; at++) {
      const bool sign = tokens_[at].is("-") || tokens_[at].is("+") || tokens_[at].is("*") ||
                        tokens_[at].is("&") || tokens_[at].is("!") || tokens_[at].is("~");
      const size_t close = tokens_[at].is("(") ? match_bracket(stream_, at) : kNone;
      const bool cast = close != kNone && close + 1 < count &&
                        (tokens_[close + 1].is_identifier() || tokens_[close + 1].is("(") ||
                         tokens_[close + 1].kind == TokenKind::number);
      if (cast) {
        at = close;
      } else if (!sign) {
        break;
      }
    }
    if (at >= count) {
      return none;
    }
    if (tokens_[at].is("(")) {
      at = match_bracket(stream_, at) + 1;
    } else if (tokens_[at].is_identifier() || tokens_[at].kind == TokenKind::number) {
      at++;
    } else {
      return none;
    }
    while (at < count) {
      if (tokens_[at].is("(") || tokens_[at].is("[")) {
        at = match_bracket(stream_, at) + 1;
      } else if (tokens_[at].is(".") || tokens_[at].is("->") || tokens_[at].is("::")) {
        at += 2;
      } else if (tokens_[at].is("++") || tokens_[at].is("--")) {
        at++;
      } else if (tokens_[at].is("<")) {
        const size_t close = match_angle(stream_, at);
        if (close == kNone || close + 1 >= count ||
            !(tokens_[close + 1].is("(") || tokens_[close + 1].is("::"))) {
          break;
        }
        at = close + 1;
      } else {
        break;
      }
    }
    return std::min(at, count);
  }

  bool casts_to_value(size_t at) const {
    const size_t close = match_angle(stream_, at + 1);
    for (size_t i = at; close != kNone && i < close; i++) {
      if (tokens_[i].is("*") || tokens_[i].is("&")) {
        return false;
      }
    }
    return close != kNone;
  }

  bool beside_const(size_t at) const {
    size_t i = at;
    while (i > 0 && (tokens_[i - 1].erased || is_address_space(tokens_[i - 1].text))) {
      i--;
    }
    if (i > 0 && tokens_[i - 1].is("const")) {
      return true;
    }
    i = at + 1;
    while (i < tokens_.size() && is_address_space(tokens_[i].text)) {
      i++;
    }
    return i < tokens_.size() && tokens_[i].is("const");
  }

  // `S(float x) constant : …`: C++ has no const constructors.
  bool qualifies_constructor(size_t at) const {
    size_t i = at;
    while (i > 0 && (tokens_[i - 1].is("const") || is_address_space(tokens_[i - 1].text))) {
      i--;
    }
    if (i == 0 || !tokens_[i - 1].is(")")) {
      return false;
    }
    int depth = 0;
    while (i-- > 0) {
      depth += tokens_[i].is(")") - tokens_[i].is("(");
      if (depth == 0) {
        break;
      }
    }
    return i > 0 && i < tokens_.size() && classes_.count(tokens_[i - 1].text) > 0;
  }

  TokenStream& stream_;
  std::vector<Token>& tokens_;
  std::set<std::string> classes_, members_;
  std::set<std::string> type_parameters_;
};

bool ends_with_letters(const std::string& text, std::string_view lower) {
  if (text.size() <= lower.size()) {
    return false;
  }
  return std::equal(lower.begin(), lower.end(), text.end() - lower.size(), [](char a, char b) {
    return a == std::tolower(static_cast<unsigned char>(b));
  });
}

void literal(const TokenStream& stream, size_t index, Token& token) {
  std::string& text = token.text;
  const bool hexadecimal = text.size() > 1 && (text[1] == 'x' || text[1] == 'X');
  const bool floating = hexadecimal ? text.find_first_of("pP") != std::string::npos
                                    : text.find('.') != std::string::npos ||
                                          text.find_first_of("eE") != std::string::npos;
  if (!floating) {
    // 1h and 1f are not literals in Metal either; clang says so.
    return;
  }
  if (ends_with_letters(text, "l")) {
    throw CompileError(
        stream.where(index) + ": error: literal " + text + ": Metal has no long double");
  }
  if (ends_with_letters(text, "bf")) {
    text = "((bfloat)" + text.substr(0, text.size() - 2) + "f)";
  } else if (ends_with_letters(text, "h")) {
    // Rounded once, from the decimal digits.
    text = "((half)" + text.substr(0, text.size() - 1) + "f16)";
  } else if (!ends_with_letters(text, "f")) {
    text += "f";
  }
}

}  // namespace

void rewrite_literals(TokenStream& stream) {
  for (size_t i = 0; i < stream.tokens.size(); i++) {
    if (stream.tokens[i].kind == TokenKind::number) {
      literal(stream, i, stream.tokens[i]);
    }
  }
}

void rewrite_tokens(TokenStream& stream, const std::vector<Declaration>& declarations) {
  std::set<std::string> classes;
  collect_classes(stream, declarations, classes);
  collect_local_classes(stream, classes);
  std::set<std::string> members;
  collect_members(stream, declarations, members);
  SpaceEraser(stream, std::move(classes), std::move(members)).run();
}

}  // namespace metal_emulator::frontend
