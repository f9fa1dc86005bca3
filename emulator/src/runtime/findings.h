// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Collects what the checks found, once per kind and place, and gives places a file and line.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "metal_emulator/emulator.h"

namespace metal_emulator {

struct SourceLine {
  std::string file;
  int line = 0;
};

/// File and line of each code address of a shared library, from its line tables: of the innermost
/// frame outside `skipped_directory` (inlined library functions). Runs addr2line (binutils), or
/// llvm-symbolizer's twin; without either, names stay empty. `offsets` are relative to the library.
std::vector<SourceLine> symbolize(
    const std::filesystem::path& library,
    const std::vector<uintptr_t>& offsets,
    const std::string& skipped_directory);

class Findings {
 public:
  void clear();
  /// `site` is a return address. Returns true where `text` is wanted: the first time at this place.
  bool add(FindingKind kind, const void* site);
  void set_text(std::string text) { last_->text = std::move(text); }
  uint64_t count() const { return count_; }
  /// Ordered by first appearance; places that share kind, file and line are one.
  std::vector<Finding> report(
      const std::string& kernel,
      const std::filesystem::path& library,
      const void* library_base,
      const std::string& skipped_directory,
      size_t limit) const;

 private:
  struct Entry {
    FindingKind kind;
    const void* site;
    std::string text;
    uint64_t count;
  };
  std::vector<Entry> entries_;
  std::map<std::pair<FindingKind, const void*>, size_t> index_;
  Entry* last_ = nullptr;
  uint64_t count_ = 0;
};

}  // namespace metal_emulator
