// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/lint/lint.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <set>

#include "src/frontend/compiler.h"
#include "src/frontend/process.h"
#include "src/lint/rules.h"

namespace metal_emulator::linting {
namespace {

// C++ for OpenCL has Metal's address spaces and its limits; x86-64 gives it half and bfloat.
const std::vector<std::string>& language() {
  static const std::vector<std::string> flags = {
      "-x",
      "clcpp",
      "-cl-std=clc++2021",
      "--target=x86_64-linux-gnu",
      "-cl-no-stdinc",
      "-nostdinc",
      "-cl-single-precision-constant",
      "-Xclang",
      "-cl-ext=-__opencl_c_fp64,-cl_khr_fp64,-__opencl_c_images,-__opencl_c_read_write_images,-__"
      "opencl_c_3d_image_writes,-cl_khr_3d_image_writes"};
  return flags;
}

struct Diagnostic {
  std::string file, severity, text;
  int line = 0;
};

// clang's C++ for OpenCL gives temporaries of classes no address space, so that `const thread T&`
// does not bind to them; Metal's are in `thread`. Said in a note that follows the error.
constexpr std::string_view kTemporaryQuirk =
    "cannot bind reference in default address space to object in address space '__private'";
constexpr std::string_view kTemporaryText =
    "cannot bind to a temporary object because of address space mismatch";

// "file:12:5: error: text"
bool parse(const std::string& line, Diagnostic& d) {
  for (const char* severity : {"fatal error", "error", "warning"}) {
    const std::string mark = std::string(": ") + severity + ": ";
    const size_t at = line.find(mark);
    if (at == std::string::npos) {
      continue;
    }
    const size_t column = line.rfind(':', at - 1);
    const size_t number =
        column == std::string::npos || column == 0 ? column : line.rfind(':', column - 1);
    if (number == std::string::npos) {
      return false;
    }
    d.file = line.substr(0, number);
    d.line = std::atoi(line.c_str() + number + 1);
    d.severity = severity;
    d.text = line.substr(at + mark.size());
    return true;
  }
  return false;
}

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

// Where OpenCL is stricter than Metal about vectors and conversions; the emulator's own headers
// check those types.
bool stricter_than_metal(const std::string& text) {
  static constexpr std::array<std::string_view, 6> kParts = {
      "C-style cast from vector",
      "too few elements in vector initialization",
      "return type cannot be qualified with address space",
      "scalar operand type has greater rank than the type of the vector element",
      "excess elements in vector initializer",
      "implicit conversion from vector to scalar"};
  // Metal converts half to bfloat and back, explicitly.
  const bool cast = contains(text, "_cast from ") || contains(text, "cast from ");
  if (cast && contains(text, "'half'") && (contains(text, "bfloat") || contains(text, "__bf16"))) {
    return true;
  }
  // Members are in __generic there, in the space of their object in Metal. Pointers that have no
  // address space are refused by a rule of their own.
  if (contains(text, "changes address space") && contains(text, "'__generic")) {
    return true;
  }
  if (contains(text, kTemporaryText) && contains(text, "__private")) {
    return true;
  }
  return std::any_of(
      kParts.begin(), kParts.end(), [&](std::string_view part) { return contains(text, part); });
}

bool is_finding(const Diagnostic& d) {
  if (d.severity != "warning") {
    return !stricter_than_metal(d.text);
  }
  if (contains(d.text, "bf16")) {
    return true;  // narrowing to bfloat without a cast
  }
  // Apple's compiler takes `if constexpr` as an extension, with a warning.
  return contains(d.text, "C++ standards before C++17") && !contains(d.text, "constexpr if");
}

void replace_all(std::string& text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
}

std::string in_metal_words(std::string text) {
  replace_all(text, "__global", "device");
  replace_all(text, "__local", "threadgroup");
  replace_all(text, "__constant", "constant");
  replace_all(text, "__private", "thread");
  replace_all(text, "__bf16", "bfloat");
  replace_all(text, "<bfloat>' is unavailable", "' is unavailable");
  replace_all(text, " is incompatible with C++ standards before C++17", ": Metal is C++14");
  replace_all(text, " are incompatible with C++ standards before C++17", ": Metal is C++14");
  const size_t option = text.rfind(" [-W");
  return option == std::string::npos ? text : text.substr(0, option);
}

void check_with_clang(const std::string& text, std::vector<Message>& messages) {
  const frontend::TemporaryFolder folder(std::filesystem::temp_directory_path());
  const std::filesystem::path source = folder.path() / "lint.clcpp";
  std::ofstream(source, std::ios::binary) << text;
  std::vector<std::string> arguments = {frontend::compiler()};
  arguments.insert(arguments.end(), language().begin(), language().end());
  // Assembly without optimisation, for the call graph; line tables for its functions' places.
  arguments.insert(
      arguments.end(),
      {"-S",
       "-emit-llvm",
       "-O0",
       "-gline-tables-only",
       "-o",
       "-",
       "-ferror-limit=0",
       "-fno-caret-diagnostics",
       "-Wno-everything",
       "-Wpre-c++17-compat",
       "-Wimplicit-float-conversion",
       "-I" + frontend::lint_shim_folder().string(),
       source.string()});
  const frontend::ProcessResult result = frontend::run_process(arguments);
  size_t found = 0;
  bool kept = false;  // the last diagnostic is the last message
  for (size_t begin = 0; begin < result.err.size();) {
    size_t end = result.err.find('\n', begin);
    end = end == std::string::npos ? result.err.size() : end;
    Diagnostic d;
    const std::string line = result.err.substr(begin, end - begin);
    if (parse(line, d)) {
      found++;
      kept = is_finding(d);
      if (kept) {
        messages.push_back({d.file, d.line, in_metal_words(d.text)});
      }
    } else if (kept && contains(line, kTemporaryQuirk)) {
      messages.pop_back();
      kept = false;
    }
    begin = end + 1;
  }
  if (result.status != 0 && found == 0) {
    throw CompileError("the lint's compiler failed: " + result.err);
  }
  check_calls(result.out, messages);
}

}  // namespace

std::vector<std::string> check(std::string_view text, const CompileOptions& options) {
  const frontend::TokenStream stream = frontend::preprocess(
      text, options, {language(), frontend::lint_shim_folder(), "metal_stdlib"});
  const std::vector<frontend::Declaration> declarations = frontend::parse_declarations(stream);
  std::vector<Message> messages;
  check_tokens(stream, declarations, messages);
  check_with_clang(to_opencl(stream, declarations), messages);
  std::vector<std::string> out;
  std::set<std::string> seen;
  for (const Message& m : messages) {
    std::string line = m.file + ":" + std::to_string(m.line) + ": error: " + m.text;
    if (seen.insert(line).second) {
      out.push_back(std::move(line));
    }
  }
  return out;
}

}  // namespace metal_emulator::linting
