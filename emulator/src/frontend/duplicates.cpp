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

// What the rewriter put around the tokens differs between instantiations of one text never.
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
    const std::string key = path_ + "f|" + join(stream_, d.begin, d.head_end);
    once(key, d, join(stream_, d.head_end, d.end), "functions");
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
