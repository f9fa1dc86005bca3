// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Drives clang 19 as a child process: preprocess, compile, link.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "metal_emulator/emulator.h"
#include "src/frontend/token.h"

namespace metal_emulator::frontend {

/// A folder that is removed with its contents at the end of the scope.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::filesystem::path& parent);
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// Where the emulator's headers are: $METAL_EMULATOR_SHIM, else the source folder of the build.
std::filesystem::path shim_folder();
std::filesystem::path lint_shim_folder();
/// clang++-19, or $METAL_EMULATOR_CLANG. Throws CompileError naming Debian's package when missing.
std::string compiler();

/// Text after preprocessing with clang `-E`, as tokens of the user's files.
struct Preprocess {
  std::vector<std::string> flags;  ///< language and target
  std::filesystem::path headers;   ///< folder of the library headers
  std::string always_included;     ///< header of that folder, before the text; may be empty
};
TokenStream preprocess(std::string_view text, const CompileOptions& options, const Preprocess& how);

struct Translation {
  std::string text;                  ///< C++
  std::vector<std::string> kernels;  ///< host names
  std::vector<std::string> files;    ///< the user's files it was made from, options.file_name too
};
/// Preprocesses and rewrites.
Translation translate(std::string_view text, const CompileOptions& options);

/// Puts a file in its place: readers see no file or the whole one.
void publish(const std::filesystem::path& built, const std::filesystem::path& target);

/// The flags a translation is compiled with on this machine.
std::vector<std::string> code_flags();
/// Compiles and links a translation into `library` (replaced atomically). Throws CompileError with
/// clang's messages. cache: folder of precompiled library headers, half the time of a compilation;
/// toolchain: names headers, flags and compiler.
void build(
    const Translation& translation,
    const std::filesystem::path& library,
    const std::filesystem::path& cache,
    const std::string& toolchain);

}  // namespace metal_emulator::frontend
