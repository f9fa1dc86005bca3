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
constexpr std::array<std::string_view, 28> kMetalAttributes = {
    "kernel",
    "host_name",
    "buffer",
    "threadgroup",
    "function_constant",
    "max_total_threads_per_threadgroup",
    "required_threads_per_threadgroup",
    "unroll",
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "thread_index_in_quadgroup",
    "simdgroup_index_in_threadgroup",
    "quadgroup_index_in_threadgroup",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_simdgroup",
    "thread_execution_width",
    "simdgroups_per_threadgroup",
    "quadgroups_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "dispatch_quadgroups_per_threadgroup",
    "grid_origin",
    "grid_size"};

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
  SpaceEraser(TokenStream& stream, std::set<std::string> classes)
      : stream_(stream), tokens_(stream.tokens), classes_(std::move(classes)) {}

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
      const bool known = contains(kMetalAttributes, a.name);
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
  std::set<std::string> classes_;
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
  SpaceEraser(stream, std::move(classes)).run();
}

}  // namespace metal_emulator::frontend
