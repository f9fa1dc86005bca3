// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
//   threadgroup half t[64], u;
// becomes
//   typedef half t__tg_type[64], u__tg_type; static ThreadgroupSlot t__tg_slot; auto& t =
//   tgvar<…>(…); …
// A typedef takes the same declarators, so that arrays of any dimension need no parsing.
#include <array>

#include "metal_emulator/emulator.h"
#include "src/frontend/rewrite.h"

namespace metal_emulator::frontend {
namespace {

constexpr std::string_view kAbi = "::metal_emulator::abi::";
constexpr std::string_view kGlue = "::metal_emulator::glue::";

class ThreadgroupRewriter {
 public:
  explicit ThreadgroupRewriter(TokenStream& stream) : stream_(stream), tokens_(stream.tokens) {}

  void body(size_t open, size_t close) {
    for (size_t at = open + 1; at < close; at++) {
      if (is_attribute(stream_, at)) {
        parse_attributes(stream_, at, &at);
        at--;
      } else if (tokens_[at].is("threadgroup") && tokens_[at].is_identifier()) {
        const size_t start = statement_start(at, open);
        if (start != kNone) {
          at = declaration(start, at);
        } else {
          refuse_variable(at);
        }
      }
    }
  }

 private:
  [[noreturn]] void fail(size_t index, const std::string& message) const {
    throw CompileError(stream_.where(index) + ": error: " + message);
  }

  // First token of the statement that `at` stands in the specifiers of; kNone in a cast, a
  // parameter, a template argument, a member function's qualifiers, a using or typedef.
  size_t statement_start(size_t at, size_t open) const {
    size_t start = at;
    while (start > open + 1) {
      const Token& before = tokens_[start - 1];
      if (before.is(";") || before.is("{") || before.is("}") || before.is(":") ||
          before.kind == TokenKind::pragma) {
        break;
      }
      if (before.is(")") || before.is("]")) {
        size_t group = specifier_group(start - 1, open);
        if (group == kNone) {
          return kNone;
        }
        start = group;
      } else if (before.is_identifier() || before.is("::")) {
        start--;
      } else {
        return kNone;
      }
    }
    return tokens_[start].is("using") || tokens_[start].is("typedef") || tokens_[start].is("return")
               ? kNone
               : start;
  }

  // The start of alignas(...), __attribute__((...)) or [[...]] that ends at `close`.
  size_t specifier_group(size_t close, size_t open) const {
    int depth = 0;
    for (size_t i = close; i > open; i--) {
      const Token& t = tokens_[i];
      depth += (t.is(")") || t.is("]")) - (t.is("(") || t.is("["));
      if (depth == 0) {
        if (is_attribute(stream_, i)) {
          return i;
        }
        return t.is("(") && (tokens_[i - 1].is("alignas") || tokens_[i - 1].is("__attribute__"))
                   ? i - 1
                   : kNone;
      }
    }
    return kNone;
  }

  // Where a cast, a parameter, an alias or a qualifier was found, no variable may hide: erasing its
  // `threadgroup` would make it every thread's own.
  void refuse_variable(size_t keyword) const {
    const size_t end = specifiers_end(keyword);
    const bool named = end > keyword + 1 && tokens_[end - 1].is_identifier();
    if (named && (tokens_[end].is(";") || tokens_[end].is("=") || tokens_[end].is("[") ||
                  tokens_[end].is("{"))) {
      fail(keyword, "threadgroup declaration in a place that is not understood");
    }
  }

  // The token after the specifiers and the name, if any, that follow `threadgroup`.
  size_t specifiers_end(size_t keyword) const {
    size_t at = keyword + 1;
    while (!ends_specifiers(at)) {
      const bool group = tokens_[at].is("alignas") || tokens_[at].is("__attribute__") ||
                         tokens_[at].is("decltype");
      if (is_attribute(stream_, at)) {
        parse_attributes(stream_, at, &at);
      } else if (group && tokens_[at + 1].is("(")) {
        at = match_bracket(stream_, at + 1) + 1;
      } else if (tokens_[at].is("<")) {
        const size_t close = match_angle(stream_, at);
        if (close == kNone) {
          fail(keyword, "threadgroup declaration that is not understood");
        }
        at = close + 1;
      } else {
        at++;
      }
    }
    return at;
  }

  // Handles the declaration; returns the index to go on from.
  size_t declaration(size_t start, size_t keyword) {
    const size_t at = specifiers_end(keyword);
    const bool pointer =
        tokens_[at].is("*") || tokens_[at].is("&") ||
        (tokens_[at].is("(") && (tokens_[at + 1].is("*") || tokens_[at + 1].is("&")));
    if (pointer) {
      return keyword;
    }
    // Without a name this is a function's result type (a local declaration) or an error.
    if (tokens_[at].is("(") || at == keyword + 1 || !tokens_[at - 1].is_identifier()) {
      fail(keyword, "threadgroup declaration that is not understood");
    }
    return variables(start, keyword, at - 1);
  }

  bool ends_specifiers(size_t at) const {
    static constexpr std::array<std::string_view, 11> kEnds = {
        ";", "=", "[", ",", "{", "(", "*", "&", "}", ")", ">"};
    if (at >= tokens_.size()) {
      fail(tokens_.size() - 1, "threadgroup declaration without its ;");
    }
    if (is_attribute(stream_, at)) {
      return false;
    }
    for (std::string_view end : kEnds) {
      if (tokens_[at].is(end)) {
        return true;
      }
    }
    return false;
  }

  size_t variables(size_t start, size_t keyword, size_t first_name) {
    size_t semicolon = first_name;
    while (!tokens_[semicolon].is(";")) {
      semicolon =
          tokens_[semicolon].is("(") || tokens_[semicolon].is("[") || tokens_[semicolon].is("{")
              ? match_bracket(stream_, semicolon) + 1
              : semicolon + 1;
      if (semicolon >= tokens_.size()) {
        fail(keyword, "threadgroup declaration without its ;");
      }
    }
    std::string after;
    for (auto [begin, end] : split_commas(stream_, first_name, semicolon)) {
      after += variable(begin, end);
    }
    specifiers(start, first_name);
    tokens_[start].before = "typedef " + tokens_[start].before;
    tokens_[keyword].erased = true;
    tokens_[semicolon].after += after;
    return semicolon;
  }

  // A typedef takes no storage class and no alignas.
  void specifiers(size_t start, size_t first_name) {
    for (size_t i = start; i < first_name; i++) {
      if (tokens_[i].is("static")) {
        tokens_[i].erased = true;
      } else if (tokens_[i].is("alignas") && tokens_[i + 1].is("(")) {
        tokens_[i].text = "__attribute__((aligned";
        tokens_[match_bracket(stream_, i + 1)].after += "))";
      }
    }
  }

  std::string variable(size_t begin, size_t end) {
    if (!tokens_[begin].is_identifier()) {
      fail(begin, "threadgroup declaration that is not understood");
    }
    const std::string name = tokens_[begin].text;
    const std::string type = name + "__tg_type", slot = name + "__tg_slot";
    tokens_[begin].text = type;
    size_t at = begin + 1;
    while (at < end && tokens_[at].is("[")) {
      at = match_bracket(stream_, at) + 1;
    }
    std::string out = " static " + std::string(kAbi) + "ThreadgroupSlot " + slot + "; auto& " +
                      name + " = " + std::string(kGlue) + "tgvar<" + type + ">(" + slot + ");";
    if (at < end) {
      if (!tokens_[at].is("=") && !tokens_[at].is("{")) {
        fail(at, "initialiser of threadgroup variable " + name + " is not understood");
      }
      out += " " + type + " " + name + "__tg_init " + join(stream_, at, end) + "; " +
             std::string(kGlue) + "tginit(" + slot + ", " + name + ", " + name + "__tg_init);";
      for (size_t i = at; i < end; i++) {
        tokens_[i].erased = true;
      }
    }
    return out;
  }

  TokenStream& stream_;
  std::vector<Token>& tokens_;
};

// Members and program-scope variables may point to threadgroup memory, not be there.
void refuse_outside_functions(const TokenStream& stream, const Declaration& d) {
  bool threadgroup = false, pointer = false;
  for (size_t i = d.head; i < d.name; i++) {
    const size_t close = stream.tokens[i].is("<") ? match_angle(stream, i) : kNone;
    i = close == kNone ? i : close;
    threadgroup = threadgroup || stream.tokens[i].is("threadgroup");
    pointer = pointer || stream.tokens[i].is("*") || stream.tokens[i].is("&");
  }
  if (threadgroup && !pointer) {
    throw CompileError(
        stream.where(d.begin) + ": error: threadgroup variable " + stream.tokens[d.name].text +
        " outside a function");
  }
}

// `using T = threadgroup float;`: what T declares could not be told from a thread's own variable.
void refuse_alias(const TokenStream& stream, const Declaration& d) {
  for (size_t i = d.head; i < d.end; i++) {
    if (is_attribute(stream, i)) {
      i = match_bracket(stream, i);
    }
    if (!stream.tokens[i].is("threadgroup")) {
      continue;
    }
    while (i < d.end && !stream.tokens[i].is("*") && !stream.tokens[i].is("&")) {
      if (stream.tokens[i].is(";")) {
        throw CompileError(
            stream.where(d.begin) + ": error: an alias of a threadgroup type is not supported");
      }
      i++;
    }
  }
}

void walk(
    ThreadgroupRewriter& rewriter,
    const TokenStream& stream,
    const std::vector<Declaration>& declarations) {
  for (const Declaration& d : declarations) {
    if (d.kind == Declaration::Kind::function && d.body_open != kNone) {
      rewriter.body(d.body_open, d.body_close);
    }
    if (d.kind == Declaration::Kind::variable && d.name != kNone) {
      refuse_outside_functions(stream, d);
    }
    if (d.kind == Declaration::Kind::other) {
      refuse_alias(stream, d);
    }
    walk(rewriter, stream, d.members);
  }
}

}  // namespace

void rewrite_threadgroup_variables(
    TokenStream& stream, const std::vector<Declaration>& declarations) {
  ThreadgroupRewriter rewriter(stream);
  walk(rewriter, stream, declarations);
}

}  // namespace metal_emulator::frontend
