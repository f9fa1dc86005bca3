// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <map>

#include "metal_emulator/emulator.h"
#include "src/frontend/rewrite.h"

namespace metal_emulator::frontend {
namespace {

void erase(TokenStream& stream, size_t begin, size_t end) {
  for (size_t i = begin; i < end; i++) {
    stream.tokens[i].erased = true;
    stream.tokens[i].before.clear();
    stream.tokens[i].after.clear();
  }
}

/// Parameters' names do not tell functions apart: they are compared as #0, #1, ….
class ParameterNames {
 public:
  ParameterNames(const TokenStream& stream, const Declaration& function) : stream_(stream) {
    const auto parameters = split_commas(stream, function.params_open + 1, function.params_close);
    for (size_t i = 0; i < parameters.size(); i++) {
      const size_t name = name_of(parameters[i].first, parameters[i].second);
      if (name != kNone) {
        numbers_[stream.tokens[name].text] = "#" + std::to_string(i);
      }
    }
  }

  std::string text(size_t begin, size_t end) const {
    std::string out;
    for (size_t i = begin; i < end; i++) {
      const Token& token = stream_.tokens[i];
      if (token.erased) {
        continue;
      }
      const bool member =
          i > 0 && (stream_.tokens[i - 1].is(".") || stream_.tokens[i - 1].is("->") ||
                    stream_.tokens[i - 1].is("::"));
      const auto found = member ? numbers_.end() : numbers_.find(token.text);
      out += (out.empty() ? "" : " ") + (found == numbers_.end() ? token.text : found->second);
    }
    return out;
  }

 private:
  // kNone for a parameter without a name.
  size_t name_of(size_t begin, size_t end) const {
    size_t last = kNone;
    for (size_t i = begin; i < end; i++) {
      const Token& token = stream_.tokens[i];
      if (token.is("=") || (token.is("[") && last != kNone)) {
        break;
      }
      if (!token.erased) {
        last = i;
      }
    }
    if (last == kNone || last == begin || !stream_.tokens[last].is_identifier()) {
      return kNone;
    }
    size_t before = last - 1;
    while (before > begin && stream_.tokens[before].erased) {
      before--;
    }
    const Token& token = stream_.tokens[before];
    const bool type_before =
        (token.is_identifier() && !token.erased && !is_type_prefix(token.text)) || token.is("*") ||
        token.is("&") || token.is(">");
    return type_before ? last : kNone;
  }

  static bool is_type_prefix(const std::string& word) {
    return word == "const" || word == "volatile" || word == "struct" || word == "class" ||
           word == "enum" || word == "unsigned" || word == "signed" || word == "typename" ||
           word == "long" || word == "short";
  }

  const TokenStream& stream_;
  std::map<std::string, std::string> numbers_;
};

class DuplicateEraser {
 public:
  explicit DuplicateEraser(TokenStream& stream) : stream_(stream) {}

  void scope(const std::vector<Declaration>& declarations) {
    for (const Declaration& d : declarations) {
      if (d.kind == Declaration::Kind::function) {
        function(d);
      } else if (d.kind == Declaration::Kind::class_type) {
        class_type(d);
        in_scope(d);
      } else if (d.kind == Declaration::Kind::name_space) {
        in_scope(d);
      }
    }
  }

 private:
  // A namespace may be opened many times: the path names the scope, not the braces.
  void in_scope(const Declaration& d) {
    if (stream_.tokens[d.begin].erased && stream_.tokens[d.end - 1].erased) {
      return;
    }
    const std::string outer = path_;
    path_ = d.kind == Declaration::Kind::name_space
                ? path_ + join(stream_, d.head, d.head_end) + "|"
                : path_ + join(stream_, d.begin, d.head_end) + "|";
    scope(d.members);
    path_ = outer;
  }

  struct First {
    size_t begin;
    std::string body;
  };

  void function(const Declaration& d) {
    const bool body = d.body_open != kNone;
    // A declaration may be repeated in a namespace; in a class it may not.
    if (!body && !d.in_class) {
      return;
    }
    const ParameterNames names(stream_, d);
    once(
        path_ + "f|" + names.text(d.begin, d.head_end),
        d,
        names.text(d.head_end, d.end),
        "functions");
  }

  void class_type(const Declaration& d) {
    if (stream_.tokens[d.begin].is("template")) {
      const std::string key = path_ + "c|" + join(stream_, d.begin, d.head_end);
      once(key, d, join(stream_, d.head_end, d.end), "specialisations");
    }
  }

  void once(
      const std::string& key,
      const Declaration& d,
      const std::string& body,
      const std::string& what) {
    auto [found, fresh] = seen_.try_emplace(key, First{d.begin, body});
    if (fresh) {
      return;
    }
    if (found->second.body != body) {
      throw CompileError(
          stream_.where(d.begin) + ": error: " + what +
          " that differ in address spaces only must have equal bodies: the emulator keeps one (the "
          "first is at " +
          stream_.where(found->second.begin) + ")");
    }
    erase(stream_, d.begin, d.end);
  }

  TokenStream& stream_;
  std::string path_;
  std::map<std::string, First> seen_;
};

}  // namespace

void erase_duplicates(TokenStream& stream, const std::vector<Declaration>& declarations) {
  DuplicateEraser(stream).scope(declarations);
}

}  // namespace metal_emulator::frontend
