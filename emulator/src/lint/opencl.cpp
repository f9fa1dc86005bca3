// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <set>

#include "src/frontend/rewrite.h"
#include "src/lint/rules.h"

namespace metal_emulator::linting {
namespace {

using frontend::Declaration;
using frontend::kNone;
using frontend::Token;
using frontend::TokenStream;

// Words of OpenCL that are plain names in Metal.
constexpr std::array<std::string_view, 14> kOpenClWords = {
    "local",
    "global",
    "generic",
    "pipe",

    "image2d_t",
    "image3d_t",
    "sampler_t",
    "event_t",
    "queue_t",
    "read_only",
    "write_only",
    "read_write",
    "clk_event_t",
    "reserve_id_t"};

bool is_vector_name(const std::string& text) {
  static constexpr std::array<std::string_view, 13> kElements = {
      "bool",
      "char",
      "uchar",
      "short",
      "ushort",
      "int",
      "uint",
      "long",
      "ulong",
      "half",
      "float",
      "bfloat",
      "size_t"};
  const char n = text.empty() ? '\0' : text.back();
  if (n < '2' || n > '4') {
    return false;
  }
  std::string_view element = std::string_view(text).substr(0, text.size() - 1);
  if (element.starts_with("packed_")) {
    element.remove_prefix(7);
  }
  return std::find(kElements.begin(), kElements.end(), element) != kElements.end();
}

class OpenClRewriter {
 public:
  OpenClRewriter(TokenStream stream, const std::vector<Declaration>& declarations)
      : stream_(std::move(stream)), tokens_(stream_.tokens), declarations_(declarations) {}

  std::string run() {
    constants(declarations_);
    frontend::rewrite_literals(stream_);
    for (Token& token : tokens_) {
      const size_t suffix = token.text.find("f16)");
      if (token.kind == frontend::TokenKind::number && suffix != std::string::npos) {
        token.text.replace(suffix, 4, "f)");
      }
    }
    frontend::rewrite_threadgroup_variables(stream_, declarations_);
    function_parameters();
    for (size_t at = 0; at < tokens_.size();) {
      if (frontend::is_attribute(stream_, at)) {
        attribute(at);
      } else {
        word(at++);
      }
    }
    return "#include <metal_stdlib>\n" + frontend::print(stream_);
  }

 private:
  bool is(size_t index, std::string_view text) const {
    return index < tokens_.size() && tokens_[index].is(text);
  }

  // template <int (*f)(int)>: clang's C++ for OpenCL takes functions by reference only.
  void function_parameters() {
    for (size_t i = 0; i + 1 < tokens_.size(); i++) {
      const size_t close =
          is(i, "template") && is(i + 1, "<") ? frontend::match_angle(stream_, i + 1) : kNone;
      for (size_t p = i + 2; close != kNone && p + 4 < close; p++) {
        if (is(p, "(") && is(p + 1, "*") && is(p + 3, ")") && is(p + 4, "(")) {
          tokens_[p + 1].text = "&";
        }
      }
    }
  }

  // Function constants, and what is computed from them, have no value at compile time.
  void constants(const std::vector<Declaration>& list) {
    for (const Declaration& d : list) {
      if (d.kind == Declaration::Kind::variable && d.name != kNone && !d.in_class) {
        bool depends = d.has_attribute("function_constant");
        size_t equals = d.end - 1;
        for (size_t i = d.name; i < d.end; i++) {
          equals = tokens_[i].is("=") ? std::min(equals, i) : equals;
          depends = depends || unknown_.count(tokens_[i].text) > 0;
        }
        if (depends) {
          unknown_.insert(tokens_[d.name].text);
          tokens_[d.head].before += "extern ";
          for (size_t i = d.head; i < d.name; i++) {
            tokens_[i].erased = tokens_[i].is("static") || tokens_[i].is("constexpr");
          }
          for (size_t i = equals; i + 1 < d.end; i++) {
            tokens_[i].erased = true;
          }
        }
      }
      constants(d.members);
    }
  }

  void attribute(size_t& at) {
    const size_t open = at;
    frontend::parse_attributes(stream_, open, &at);
    for (size_t i = open; i < at; i++) {
      tokens_[i].erased = true;
    }
  }

  // (half4)x → metal_lint::cast<half4>() ->* x, where nothing that binds closer is before it.
  void vector_cast(size_t at) {
    if (at < 2 || at + 2 >= tokens_.size() || !is(at - 1, "(") || !is(at + 1, ")")) {
      return;
    }
    const Token& left = tokens_[at - 2];
    const Token& next = tokens_[at + 2];
    const bool operand = next.is_identifier() || next.kind == frontend::TokenKind::number ||
                         next.is("(") || next.is("*");
    const bool free = left.is("=") || left.is("(") || left.is(",") || left.is("return") ||
                      left.is("/") || left.is("{") || left.is("?") || left.is(":");
    if (operand && free) {
      tokens_[at - 1].erased = tokens_[at + 1].erased = true;
      tokens_[at].before += "metal_lint::cast<";
      tokens_[at].after += ">() ->* ";
    }
  }

  void word(size_t at) {
    Token& token = tokens_[at];
    if (!token.is_identifier() || token.erased) {
      return;
    }
    if (token.is("device")) {
      token.text = "__global";
    } else if (token.is("constant")) {
      token.text = "__constant";
    } else if (token.is("threadgroup")) {
      token.text = "__local";
    } else if (token.is("thread")) {
      token.text = "__private";
    } else if (token.is("kernel")) {
      token.erased = true;
    } else if (
        std::find(kOpenClWords.begin(), kOpenClWords.end(), token.text) != kOpenClWords.end()) {
      token.text += "_";
    } else if (
        is_vector_name(token.text) && is(at + 1, "(") && !(at > 0 && is(at - 1, "operator"))) {
      construct(at, at);
    } else if (is_vector_name(token.text)) {
      vector_cast(at);
    } else if (token.is("vec") && is(at + 1, "<")) {
      const size_t close = frontend::match_angle(stream_, at + 1);
      if (close != kNone && is(close + 1, "(") && !(at > 0 && is(at - 1, "operator"))) {
        construct(at, close);
      }
    }
  }

  // float4(a, b) → metal_lint::make<float4>(a, b): OpenCL's vectors have no constructors.
  void construct(size_t first, size_t last) {
    size_t begin = first;
    while (begin >= 2 && is(begin - 1, "::") && tokens_[begin - 2].is_identifier()) {
      begin -= 2;
    }
    tokens_[begin].before += "metal_lint::make<";
    tokens_[last].after += ">";
  }

  TokenStream stream_;
  std::vector<Token>& tokens_;
  const std::vector<Declaration>& declarations_;
  std::set<std::string> unknown_;
};

}  // namespace

std::string to_opencl(TokenStream stream, const std::vector<Declaration>& declarations) {
  return OpenClRewriter(std::move(stream), declarations).run();
}

}  // namespace metal_emulator::linting
