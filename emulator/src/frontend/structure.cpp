// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/frontend/structure.h"

#include <algorithm>
#include <array>

#include "metal_emulator/emulator.h"

namespace metal_emulator::frontend {
namespace {

using Kind = Declaration::Kind;

bool is_class_key(const Token& token) {
  return token.is("struct") || token.is("class") || token.is("union") || token.is("enum");
}

class Parser {
 public:
  explicit Parser(const TokenStream& stream) : stream_(stream), tokens_(stream.tokens) {}

  std::vector<Declaration> parse() {
    std::vector<Declaration> out = scope(0, tokens_.size(), "", "");
    return out;
  }

 private:
  [[noreturn]] void fail(size_t index, const std::string& message) const {
    throw CompileError(stream_.where(index) + ": error: " + message);
  }
  bool is(size_t index, std::string_view text) const {
    return index < tokens_.size() && tokens_[index].is(text);
  }

  // class_name: of the class whose members these are, else empty.
  std::vector<Declaration> scope(
      size_t begin, size_t end, const std::string& path, const std::string& class_name) {
    std::vector<Declaration> out;
    const bool in_class = !class_name.empty();
    for (size_t at = begin; at < end;) {
      const Token& token = tokens_[at];
      if (token.kind == TokenKind::pragma || token.is(";")) {
        at++;
      } else if (token.is("}")) {
        fail(at, "unexpected }");
      } else if (
          (token.is("public") || token.is("private") || token.is("protected")) && is(at + 1, ":")) {
        at += 2;
      } else {
        Declaration declaration;
        declaration.begin = at;
        declaration.scope = path;
        declaration.in_class = in_class;
        parse_one(declaration, end);
        at = declaration.end;
        out.push_back(std::move(declaration));
      }
    }
    return out;
  }

  void parse_one(Declaration& d, size_t limit) {
    size_t at = d.begin;
    while (is(at, "template")) {
      if (!is(at + 1, "<")) {
        break;  // explicit instantiation
      }
      const size_t close = match_angle(stream_, at + 1);
      if (close == kNone) {
        fail(at, "template parameters without a closing >");
      }
      d.is_template = d.is_template || close > at + 2;
      at = close + 1;
    }
    d.head = at;
    if (is(at, "template")) {
      d.kind = Kind::instantiation;
      to_semicolon(d, at, limit);
      size_t i = at + 1;
      while (i < d.end && is_attribute(stream_, i)) {
        append(d.attributes, parse_attributes(stream_, i, &i));
      }
      return;
    }
    if (is(at, "using") || is(at, "typedef") || is(at, "static_assert") || is(at, "friend")) {
      to_semicolon(d, at, limit);
      return;
    }
    if (is(at, "namespace") || (is(at, "inline") && is(at + 1, "namespace"))) {
      name_space(d, at, limit);
      return;
    }
    declarator(d, at, limit);
  }

  static void append(std::vector<Attribute>& to, std::vector<Attribute> from) {
    to.insert(to.end(), from.begin(), from.end());
  }

  void to_semicolon(Declaration& d, size_t at, size_t limit) {
    while (at < limit && !is(at, ";")) {
      at = is(at, "(") || is(at, "[") || is(at, "{") ? match_bracket(stream_, at) + 1 : at + 1;
    }
    if (at >= limit) {
      fail(d.begin, "declaration without its ;");
    }
    d.head_end = at;
    d.end = at + 1;
  }

  void name_space(Declaration& d, size_t at, size_t limit) {
    at += is(at, "inline") ? 2 : 1;
    std::string path = d.scope;
    while (at < limit && !is(at, "{")) {
      if (is(at, "=")) {
        to_semicolon(d, at, limit);
        return;
      }
      if (is_attribute(stream_, at)) {
        parse_attributes(stream_, at, &at);
        continue;
      }
      if (tokens_[at].is_identifier()) {
        d.name = at;
        path += tokens_[at].text + "::";
      }
      at++;
    }
    if (at >= limit) {
      fail(d.begin, "namespace without its {");
    }
    d.kind = Kind::name_space;
    d.head_end = d.body_open = at;
    d.body_close = match_bracket(stream_, at);
    d.end = d.body_close + 1;
    d.members = scope(at + 1, d.body_close, path, "");
  }

  // Skips what may hold parentheses but declares nothing: attributes, alignas, decltype, template
  // arguments. Returns false at any other token.
  bool skip_specifier(Declaration& d, size_t& at) {
    static constexpr std::array<std::string_view, 6> kWithParentheses = {
        "__attribute__", "alignas", "_Alignas", "decltype", "noexcept", "__typeof__"};
    if (is_attribute(stream_, at)) {
      append(d.attributes, parse_attributes(stream_, at, &at));
      return true;
    }
    const bool named =
        std::find(kWithParentheses.begin(), kWithParentheses.end(), tokens_[at].text) !=
        kWithParentheses.end();
    if (named && is(at + 1, "(")) {
      at = match_bracket(stream_, at + 1) + 1;
      return true;
    }
    if (is(at, "<") && at > d.head && tokens_[at - 1].is_identifier() &&
        !tokens_[at - 1].is("operator")) {
      const size_t close = match_angle(stream_, at);
      if (close != kNone) {
        at = close + 1;
        return true;
      }
    }
    return false;
  }

  void declarator(Declaration& d, size_t at, size_t limit) {
    size_t class_key = kNone;
    bool initializer = false;
    while (at < limit) {
      if (skip_specifier(d, at)) {
        continue;
      }
      const Token& token = tokens_[at];
      if (is_class_key(token) && class_key == kNone && !initializer) {
        class_key = at++;
      } else if (token.is("operator") && !initializer) {
        operator_name(d, at);
      } else if (token.is("(")) {
        if (!initializer && d.params_open == kNone) {
          function(d, at, limit);
          return;
        }
        at = match_bracket(stream_, at) + 1;
      } else if (token.is("=") || token.is("[") || token.is(";") || token.is(",")) {
        if (d.name == kNone && at > d.head) {
          d.name = at - 1;
        }
        initializer = initializer || token.is("=");
        if (token.is(";")) {
          finish_variable(d, at);
          return;
        }
        at = token.is("[") ? match_bracket(stream_, at) + 1 : at + 1;
      } else if (token.is("{")) {
        if (class_key != kNone && !initializer) {
          class_body(d, class_key, at, limit);
          return;
        }
        if (d.name == kNone && at > d.head) {
          d.name = at - 1;
        }
        initializer = true;
        at = match_bracket(stream_, at) + 1;
      } else if (token.is(":") && class_key != kNone && !initializer) {
        base_clause(at, limit);
      } else {
        at++;
      }
    }
    fail(d.begin, "declaration without its end");
  }

  void finish_variable(Declaration& d, size_t semicolon) {
    d.kind = Kind::variable;
    // `bool f [[function_constant(0)]];`: the name stands before the attribute.
    while (d.name != kNone && d.name > d.head && tokens_[d.name].is("]")) {
      size_t open = d.name;
      for (int depth = 0; open > d.head; open--) {
        depth += tokens_[open].is("]") - tokens_[open].is("[");
        if (depth == 0) {
          break;
        }
      }
      d.name = open - 1;
    }
    d.head_end = semicolon;
    d.end = semicolon + 1;
  }

  // `operator()`, `operator[]`, `operator T*`, `operator<<`: to the ( of the parameters.
  void operator_name(Declaration& d, size_t& at) {
    d.name = at++;
    if (is(at, "(") && is(at + 1, ")")) {
      at += 2;
    }
    while (at < tokens_.size() && !is(at, "(")) {
      const size_t close =
          is(at, "<") && tokens_[at - 1].is_identifier() && !tokens_[at - 1].is("operator")
              ? match_angle(stream_, at)
              : kNone;
      at = close == kNone ? at + 1 : close + 1;
    }
  }

  // Base classes hold no { but in template arguments.
  void base_clause(size_t& at, size_t limit) {
    while (at < limit && !is(at, "{") && !is(at, ";")) {
      at++;
    }
  }

  void class_body(Declaration& d, size_t class_key, size_t open, size_t limit) {
    const bool enumeration = tokens_[class_key].is("enum");
    d.kind = enumeration ? Kind::enumeration : Kind::class_type;
    size_t at = class_key + 1;
    while (at < open && (is_attribute(stream_, at) || is(at, "__attribute__") ||
                         is(at, "alignas") || is(at, "class") || is(at, "struct"))) {
      if (is_attribute(stream_, at)) {
        parse_attributes(stream_, at, &at);
      } else {
        at = is(at + 1, "(") ? match_bracket(stream_, at + 1) + 1 : at + 1;
      }
    }
    if (at < open && tokens_[at].is_identifier()) {
      d.name = at;
    }
    const std::string name = d.name == kNone ? "(unnamed)" : tokens_[d.name].text;
    d.head_end = d.body_open = open;
    d.body_close = match_bracket(stream_, open);
    if (!enumeration) {
      d.members = scope(open + 1, d.body_close, d.scope + name + "::", name);
    }
    Declaration rest;
    rest.begin = d.begin;
    to_semicolon(rest, d.body_close + 1, limit);
    d.end = rest.end;
  }

  void function(Declaration& d, size_t open, size_t limit) {
    d.kind = Kind::function;
    d.params_open = open;
    d.params_close = match_bracket(stream_, open);
    if (d.name == kNone && open > d.head) {
      d.name = open - 1;
      // f<int>(...): an explicit specialisation's name stands before its arguments.
      if (is(d.name, ">")) {
        int depth = 0;
        while (d.name > d.head) {
          depth += is(d.name, ">") - is(d.name, "<");
          if (depth == 0) {
            break;
          }
          d.name--;
        }
        d.name--;
      }
    }
    size_t at = d.params_close + 1;
    while (at < limit && !is(at, "{") && !is(at, ";") && !is(at, ":")) {
      if (is(at, "=")) {
        d.head_end = at;
        size_t semicolon = at;
        Declaration rest;
        rest.begin = d.begin;
        to_semicolon(rest, semicolon, limit);
        d.end = rest.end;
        return;
      }
      if (!skip_specifier(d, at)) {
        at = is(at, "(") || is(at, "[") ? match_bracket(stream_, at) + 1 : at + 1;
      }
    }
    if (at >= limit) {
      fail(d.begin, "function without a body or ;");
    }
    d.head_end = at;
    if (is(at, ":")) {
      at = constructor_initializers(at + 1, limit);
    }
    if (is(at, ";")) {
      d.end = at + 1;
      return;
    }
    d.body_open = at;
    d.body_close = match_bracket(stream_, at);
    d.end = d.body_close + 1;
  }

  // `: a(1), b{2} {`: to the { of the body.
  size_t constructor_initializers(size_t at, size_t limit) {
    while (at < limit) {
      while (at < limit && !is(at, "(") && !is(at, "{")) {
        const size_t close = is(at, "<") ? match_angle(stream_, at) : kNone;
        at = close == kNone ? at + 1 : close + 1;
      }
      if (at >= limit) {
        break;
      }
      at = match_bracket(stream_, at) + 1;
      if (is(at, "...")) {
        at++;
      }
      if (!is(at, ",")) {
        break;
      }
      at++;
    }
    if (at >= limit || !is(at, "{")) {
      fail(std::min(at, limit - 1), "constructor without a body");
    }
    return at;
  }

  const TokenStream& stream_;
  const std::vector<Token>& tokens_;
};

}  // namespace

bool Declaration::has_attribute(std::string_view attribute_name) const {
  return std::any_of(attributes.begin(), attributes.end(), [&](const Attribute& a) {
    return a.name == attribute_name;
  });
}

size_t match_bracket(const TokenStream& stream, size_t open) {
  const std::vector<Token>& tokens = stream.tokens;
  std::string expected;
  for (size_t i = open; i < tokens.size(); i++) {
    const std::string& text = tokens[i].text;
    if (text.size() != 1 || tokens[i].kind != TokenKind::punctuation) {
      continue;
    }
    const char c = text[0];
    if (c == '(' || c == '[' || c == '{') {
      expected += c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
      if (expected.empty() || expected.back() != c) {
        throw CompileError(stream.where(i) + ": error: unexpected " + text);
      }
      expected.pop_back();
      if (expected.empty()) {
        return i;
      }
    }
  }
  throw CompileError(stream.where(open) + ": error: " + tokens[open].text + " without its end");
}

size_t match_angle(const TokenStream& stream, size_t open) {
  int depth = 0;
  for (size_t i = open; i < stream.tokens.size();) {
    const Token& token = stream.tokens[i];
    if (token.is("(") || token.is("[")) {
      i = match_bracket(stream, i) + 1;
      continue;
    }
    // After a value `<` compares: enable_if_t<sizeof(T) < 8>.
    if (token.is("<") && (i == open || stream.tokens[i - 1].is_identifier())) {
      depth++;
    } else if (token.is(">")) {
      if (--depth == 0) {
        return i;
      }
    } else if (token.is(";") || token.is("{") || token.is("}") || token.is(")") || token.is("]")) {
      return kNone;
    }
    i++;
  }
  return kNone;
}

bool is_attribute(const TokenStream& stream, size_t index) {
  return index + 1 < stream.tokens.size() && stream.tokens[index].is("[") &&
         stream.tokens[index + 1].is("[");
}

std::vector<Attribute> parse_attributes(const TokenStream& stream, size_t open, size_t* next) {
  const size_t close = match_bracket(stream, open);
  std::vector<Attribute> out;
  for (auto [begin, end] : split_commas(stream, open + 2, close - 1)) {
    Attribute attribute;
    attribute.token = begin;
    size_t at = begin;
    while (at < end && !stream.tokens[at].is("(")) {
      attribute.name += stream.tokens[at++].text;
    }
    if (at < end) {
      attribute.argument = join(stream, at + 1, match_bracket(stream, at));
    }
    out.push_back(std::move(attribute));
  }
  *next = close + 1;
  return out;
}

std::vector<std::pair<size_t, size_t>> split_commas(
    const TokenStream& stream, size_t begin, size_t end) {
  std::vector<std::pair<size_t, size_t>> out;
  size_t start = begin;
  for (size_t i = begin; i < end;) {
    const Token& token = stream.tokens[i];
    if (token.is("(") || token.is("[") || token.is("{")) {
      i = match_bracket(stream, i) + 1;
    } else if (token.is("<")) {
      const size_t close = match_angle(stream, i);
      i = close == kNone || close >= end ? i + 1 : close + 1;
    } else {
      if (token.is(",")) {
        out.emplace_back(start, i);
        start = i + 1;
      }
      i++;
    }
  }
  if (start < end) {
    out.emplace_back(start, end);
  }
  return out;
}

std::string join(const TokenStream& stream, size_t begin, size_t end) {
  std::string out;
  for (size_t i = begin; i < end; i++) {
    if (!stream.tokens[i].erased) {
      out += (out.empty() ? "" : " ") + stream.tokens[i].text;
    }
  }
  return out;
}

bool is_address_space(std::string_view word) {
  return word == "device" || word == "constant" || word == "threadgroup" || word == "thread";
}

std::vector<Declaration> parse_declarations(const TokenStream& stream) {
  return Parser(stream).parse();
}

}  // namespace metal_emulator::frontend
