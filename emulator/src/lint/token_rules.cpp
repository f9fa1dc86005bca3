// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <map>

#include "src/lint/rules.h"

namespace metal_emulator::linting {
namespace {

using frontend::Declaration;
using frontend::is_address_space;
using frontend::kNone;
using frontend::Token;
using frontend::TokenStream;
using Kind = Declaration::Kind;

const std::map<std::string, std::string, std::less<>>& forbidden_words() {
  static const std::map<std::string, std::string, std::less<>> words = {
      {"double", "Metal has no double"},
      {"new", "Metal has no heap: new is not allowed"},
      {"delete", "Metal has no heap: delete is not allowed"},
      {"throw", "Metal has no exceptions: throw is not allowed"},
      {"try", "Metal has no exceptions: try is not allowed"},
      {"catch", "Metal has no exceptions: catch is not allowed"},
      {"virtual", "Metal has no virtual functions"},
      {"dynamic_cast", "Metal has no run-time type information: dynamic_cast is not allowed"},
      {"typeid", "Metal has no run-time type information: typeid is not allowed"},
      {"goto", "Metal has no goto"},
      {"thread_local", "Metal has no thread_local"},
      {"asm", "Metal has no asm"},
      {"__asm__", "Metal has no asm"},
      {"wchar_t", "Metal has no wchar_t"},
      {"char16_t", "Metal has no char16_t"},
      {"char32_t", "Metal has no char32_t"},
      {"__int128", "Metal has no 128-bit integers"},
      {"co_await", "Metal has no coroutines"},
      {"concept", "Metal is C++14: no concepts"},
      {"requires", "Metal is C++14: no concepts"},
      {"consteval", "Metal is C++14: no consteval"},
      {"constinit", "Metal is C++14: no constinit"},
  };
  return words;
}

class TokenRules {
 public:
  TokenRules(const TokenStream& stream, std::vector<Message>& messages)
      : stream_(stream), tokens_(stream.tokens), messages_(messages) {}

  void words() {
    for (size_t i = 0; i < tokens_.size(); i++) {
      const Token& t = tokens_[i];
      if (!t.is_identifier()) {
        lambda(i);
        continue;
      }
      const auto found = forbidden_words().find(t.text);
      if (found != forbidden_words().end() && !(t.is("delete") && is(i - 1, "="))) {
        report(i, found->second);
      } else if (t.is("std") && is(i + 1, "::")) {
        report(i, "Metal has no std::; its library is metal::");
      } else if (t.is("long") && (is(i + 1, "long") || is(i + 1, "double"))) {
        report(i, "Metal has no long " + tokens_[i + 1].text);
      } else if (
          (t.is("static_cast") || t.is("reinterpret_cast") || t.is("const_cast")) &&
          is(i + 1, "<")) {
        const size_t close = frontend::match_angle(stream_, i + 1);
        if (close != kNone) {
          pointer(i + 2, close, "cast");
        }
      }
      c_style_cast(i);
    }
    for (size_t i = 0; i + 3 < tokens_.size(); i++) {
      function_pointer(i);
    }
  }

  void declarations(const std::vector<Declaration>& list) {
    for (const Declaration& d : list) {
      if (d.kind == Kind::function) {
        function(d);
      } else if (d.kind == Kind::variable) {
        variable(d);
      }
      declarations(d.members);
    }
  }

 private:
  bool is(size_t index, std::string_view text) const {
    return index < tokens_.size() && tokens_[index].is(text);
  }

  void report(size_t index, std::string text) {
    const Token& t = tokens_[index];
    messages_.push_back({stream_.files[t.file], t.line, std::move(text)});
  }

  // `[…](…) {` and `[…] {` where an expression stands: an array subscript follows a value.
  void lambda(size_t i) {
    if (!tokens_[i].is("[") || i == 0 || frontend::is_attribute(stream_, i)) {
      return;
    }
    const Token& before = tokens_[i - 1];
    const bool value = (before.is_identifier() && !before.is("return")) || before.is(")") ||
                       before.is("]") || before.is("}") || before.is(">") || before.is("[") ||
                       before.kind == frontend::TokenKind::string;
    if (value) {
      return;
    }
    const size_t close = frontend::match_bracket(stream_, i);
    if (is(close + 1, "(") || is(close + 1, "{")) {
      report(i, "Metal has no lambda expressions");
    }
  }

  // `int (*f)(int)` but in template parameters, where it names a function at compile time.
  void function_pointer(size_t i) {
    if (!is(i, "(") || !is(i + 1, "*") || !tokens_[i + 2].is_identifier() || i == 0 ||
        !(tokens_[i - 1].is_identifier() || tokens_[i - 1].is("*") || tokens_[i - 1].is(">"))) {
      return;
    }
    const size_t close = frontend::match_bracket(stream_, i);
    const bool declarator = close == i + 3 || (is(i + 3, "[") && is(close - 1, "]"));
    if (declarator && is(close + 1, "(") && !in_template_parameters(i)) {
      report(i, "pointers to functions are not allowed");
    }
  }

  bool in_template_parameters(size_t at) const {
    for (size_t i = at; i-- > 1;) {
      if (tokens_[i].is(";") || tokens_[i].is("{") || tokens_[i].is("}")) {
        return false;
      }
      if (tokens_[i].is("<") && tokens_[i - 1].is("template")) {
        const size_t close = frontend::match_angle(stream_, i);
        return close != kNone && close > at;
      }
    }
    return false;
  }

  // (float*)x
  void c_style_cast(size_t i) {
    if (i == 0 || !tokens_[i - 1].is("(")) {
      return;
    }
    const size_t close = frontend::match_bracket(stream_, i - 1);
    const bool abstract = close > i && (tokens_[close - 1].is("*") || tokens_[close - 1].is("&"));
    const bool call = i >= 2 && tokens_[i - 2].is_identifier();
    if (abstract && !call && !is(close + 1, ",") && !is(close + 1, ")")) {
      pointer(i, close, "cast");
    }
  }

  // A declarator [begin, end) with * or & must name an address space before it.
  void pointer(size_t begin, size_t end, const std::string& what) {
    bool space = false, deduced = false;
    for (size_t i = begin; i < end;) {
      const Token& t = tokens_[i];
      if (t.is("<")) {
        const size_t close = frontend::match_angle(stream_, i);
        i = close == kNone || close >= end ? i + 1 : close + 1;
        continue;
      }
      if (t.is("=") || t.is("{") || t.is("[")) {
        return;
      }
      space = space || (t.is_identifier() && is_address_space(t.text));
      deduced = deduced || t.is("auto") || t.is("decltype");
      if (t.is("*") || t.is("&") || t.is("&&")) {
        if (!space && !deduced) {
          report(
              i,
              what + ": " + (t.is("*") ? "pointer" : "reference") +
                  " without an address space (device, constant, threadgroup or thread)");
        }
        return;
      }
      i++;
    }
  }

  std::string name(size_t index) const {
    return index == kNone ? std::string("?") : tokens_[index].text;
  }

  static bool has_word(
      const std::vector<Token>& tokens, size_t begin, size_t end, std::string_view word) {
    return std::any_of(
        tokens.begin() + begin, tokens.begin() + end, [&](const Token& t) { return t.is(word); });
  }

  void function(const Declaration& d) {
    if (d.params_open == kNone) {
      return;
    }
    const bool kernel = d.has_attribute("kernel") ||
                        (d.name != kNone && has_word(tokens_, d.head, d.name, "kernel"));
    if (d.name != kNone && !tokens_[d.name].is("operator")) {
      pointer(d.head, d.name, "result of " + name(d.name));
    }
    for (auto [begin, end] : frontend::split_commas(stream_, d.params_open + 1, d.params_close)) {
      pointer(begin, end, "parameter of " + name(d.name));
    }
    if (d.body_open != kNone) {
      body(d, kernel);
    }
  }

  void body(const Declaration& d, bool kernel) {
    for (size_t i = d.body_open + 1; i < d.body_close; i++) {
      const Token& before = tokens_[i - 1];
      const bool start = before.is(";") || before.is("{") || before.is("}") ||
                         ends_condition(i - 1) || (before.is("(") && i >= 2 && is(i - 2, "for"));
      if (!start || !tokens_[i].is_identifier()) {
        continue;
      }
      statement(i, d, kernel);
    }
  }

  // The ) of if (…), for (…) and the like; not that of a cast: (long)a * b is no declaration.
  bool ends_condition(size_t close) const {
    int depth = 0;
    for (size_t i = close; i > 0; i--) {
      depth += tokens_[i].is(")") - tokens_[i].is("(");
      if (depth == 0) {
        return is(close, ")") && (is(i - 1, "if") || is(i - 1, "for") || is(i - 1, "while") ||
                                  is(i - 1, "switch") || is(i - 1, "constexpr"));
      }
    }
    return false;
  }

  void statement(size_t begin, const Declaration& d, bool kernel) {
    size_t end = begin;
    bool is_static = false, is_constant = false, threadgroup = false;
    while (end < d.body_close && tokens_[end].is_identifier() &&
           (is_address_space(tokens_[end].text) || tokens_[end].is("const") ||
            tokens_[end].is("constexpr") || tokens_[end].is("static") ||
            tokens_[end].is("volatile"))) {
      is_static = is_static || tokens_[end].is("static");
      is_constant = is_constant || tokens_[end].is("constant");
      threadgroup = threadgroup || tokens_[end].is("threadgroup");
      end++;
    }
    if (is_static && !is_constant) {
      report(begin, "static local variable outside the constant address space");
    }
    const size_t declarator = local_declarator(end, d.body_close);
    if (declarator == kNone) {
      return;
    }
    const bool indirect =
        tokens_[declarator].is("*") || tokens_[declarator].is("&") || tokens_[declarator].is("&&");
    if (indirect) {
      pointer(begin, declarator + 1, "local variable");
    } else if (threadgroup && !kernel) {
      report(begin, "threadgroup variable outside a kernel function");
    }
  }

  // `T * name =|;|,|[|(|{|:`: the index of *, & or of the name; kNone for what is no declaration.
  size_t local_declarator(size_t at, size_t limit) const {
    static constexpr std::array<std::string_view, 9> kNot = {
        "return", "if", "while", "for", "else", "do", "switch", "using", "typedef"};
    if (at >= limit || !tokens_[at].is_identifier() ||
        std::find(kNot.begin(), kNot.end(), tokens_[at].text) != kNot.end()) {
      return kNone;
    }
    while (at < limit &&
           (tokens_[at].is_identifier() || tokens_[at].is("::") || tokens_[at].is("<"))) {
      if (tokens_[at].is("<")) {
        const size_t close = frontend::match_angle(stream_, at);
        if (close == kNone) {
          return kNone;
        }
        at = close;
      }
      at++;
    }
    if (at < limit && (tokens_[at].is("*") || tokens_[at].is("&") || tokens_[at].is("&&"))) {
      size_t name_at = at;
      while (is(name_at, "*") || is(name_at, "&") || is(name_at, "const")) {
        name_at++;
      }
      const bool declares = name_at < limit && tokens_[name_at].is_identifier() &&
                            (is(name_at + 1, "=") || is(name_at + 1, ";") || is(name_at + 1, ",") ||
                             is(name_at + 1, "[") || is(name_at + 1, "{") || is(name_at + 1, ":"));
      return declares ? at : kNone;
    }
    const bool declares = is(at, ";") || is(at, "[") || is(at, "=") || is(at, ",");
    return declares ? at - 1 : kNone;
  }

  void variable(const Declaration& d) {
    if (d.name == kNone) {
      return;
    }
    const bool constant = has_word(tokens_, d.head, d.name, "constant");
    if (tokens_[d.head].is("struct") || tokens_[d.head].is("class") || tokens_[d.head].is("enum") ||
        tokens_[d.head].is("union")) {
      return;  // forward declaration
    }
    if (!d.in_class) {
      const bool variable_template = d.is_template;
      if (!constant && !variable_template) {
        report(
            d.head,
            "program-scope variable " + name(d.name) + " must be in the constant address space");
      }
    } else if (has_word(tokens_, d.head, d.name, "static") && !constant) {
      report(d.head, "static member " + name(d.name) + " must be in the constant address space");
    }
    pointer(d.head, d.end, "variable " + name(d.name));
  }

  const TokenStream& stream_;
  const std::vector<Token>& tokens_;
  std::vector<Message>& messages_;
};

}  // namespace

void check_tokens(
    const TokenStream& stream,
    const std::vector<Declaration>& declarations,
    std::vector<Message>& messages) {
  TokenRules rules(stream, messages);
  rules.words();
  rules.declarations(declarations);
}

}  // namespace metal_emulator::linting
