// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/frontend/compiler.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <set>
#include <system_error>

#include "src/frontend/process.h"
#include "src/frontend/rewrite.h"

namespace metal_emulator::frontend {
namespace {

namespace fs = std::filesystem;

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

ProcessResult run_compiler(std::vector<std::string> arguments) {
  try {
    return run_process(arguments);
  } catch (const std::system_error& error) {
    throw CompileError(
        std::string("cannot run ") + error.what() +
        "; hint: install Debian's packages clang-19 and libclang-rt-19-dev, or set "
        "METAL_EMULATOR_CLANG to a clang++ of version 19");
  }
}

void write_file(const fs::path& path, std::string_view text) {
  std::ofstream out(path, std::ios::binary);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  out.close();
  if (!out) {
    throw CompileError("cannot write " + path.string());
  }
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
    }
    out += c;
  }
  return out + '"';
}

// `extern "C"` says nothing that matters here; Apple's compiler takes it too.
void drop_linkage(std::vector<Token>& tokens) {
  std::vector<Token> kept;
  std::vector<bool> linkage;  // of each open brace
  for (size_t i = 0; i < tokens.size(); i++) {
    if (tokens[i].is("extern") && i + 1 < tokens.size() &&
        tokens[i + 1].kind == TokenKind::string) {
      i++;
      if (i + 1 < tokens.size() && tokens[i + 1].is("{")) {
        i++;
        linkage.push_back(true);
      }
      continue;
    }
    if (tokens[i].is("{")) {
      linkage.push_back(false);
    } else if (tokens[i].is("}") && !linkage.empty()) {
      const bool dropped = linkage.back();
      linkage.pop_back();
      if (dropped) {
        continue;
      }
    }
    kept.push_back(std::move(tokens[i]));
  }
  tokens = std::move(kept);
}

// clang's own words, without its count of errors.
std::string errors_of(const std::string& messages) {
  std::string out;
  size_t begin = 0;
  while (begin < messages.size()) {
    size_t end = messages.find('\n', begin);
    end = end == std::string::npos ? messages.size() : end;
    const std::string line = messages.substr(begin, end - begin);
    if (!line.ends_with(" generated.")) {
      out += (out.empty() ? "" : "\n") + line;
    }
    begin = end + 1;
  }
  return out;
}

#if defined(__x86_64__)
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}
#endif

}  // namespace

TemporaryFolder::TemporaryFolder(const fs::path& parent) {
  std::error_code code;
  fs::create_directories(parent, code);
  std::string name = (parent / "metal-emulator-XXXXXX").string();
  if (!mkdtemp(name.data())) {
    throw CompileError("cannot create a folder in " + parent.string());
  }
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code code;
  fs::remove_all(path_, code);
}

fs::path shim_folder() {
  const std::string set = environment("METAL_EMULATOR_SHIM");
  return set.empty() ? fs::path(METAL_EMULATOR_SHIM_FOLDER) : fs::path(set);
}

fs::path lint_shim_folder() {
  const std::string set = environment("METAL_EMULATOR_LINT_SHIM");
  return set.empty() ? fs::path(METAL_EMULATOR_LINT_SHIM_FOLDER) : fs::path(set);
}

std::string compiler() {
  const std::string set = environment("METAL_EMULATOR_CLANG");
  return set.empty() ? "clang++-19" : set;
}

// rename() is atomic within a file system: readers see no file or the whole one.
void publish(const fs::path& built, const fs::path& target) {
  const fs::path parent = target.has_parent_path() ? target.parent_path() : fs::path(".");
  const TemporaryFolder beside(parent);
  const fs::path copy = beside.path() / target.filename();
  fs::copy_file(built, copy, fs::copy_options::overwrite_existing);
  fs::rename(copy, target);
}

namespace {

ProcessResult run_compiler(const std::string& language, const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {compiler(), "-x", language};
  const std::vector<std::string> flags = code_flags();
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  arguments.push_back("-I" + shim_folder().string());
  arguments.insert(arguments.end(), more.begin(), more.end());
  return run_compiler(std::move(arguments));
}

// clang's complaints about a precompiled header that does not fit.
bool speaks_of_header(const std::string& messages) {
  for (const char* word : {"precompiled header", "PCH file", "AST file"}) {
    if (messages.find(word) != std::string::npos) {
      return true;
    }
  }
  return false;
}

fs::path precompiled_header(const fs::path& cache, const std::string& toolchain) {
  const fs::path header = cache / (toolchain + ".pch");
  if (fs::exists(header)) {
    return header;
  }
  const TemporaryFolder folder(fs::temp_directory_path());
  const fs::path built = folder.path() / "stdlib.pch";
  // Named by content: times of the headers say nothing.
  const ProcessResult result = run_compiler(
      "c++-header",
      {"-Xclang",
       "-fno-pch-timestamp",
       (shim_folder() / "metal_stdlib").string(),
       "-o",
       built.string()});
  if (result.status != 0) {
    throw CompileError(errors_of(result.err));
  }
  publish(built, header);
  return header;
}

}  // namespace

TokenStream preprocess(
    std::string_view text, const CompileOptions& options, const Preprocess& how) {
  const TemporaryFolder folder(fs::temp_directory_path());
  const fs::path input = folder.path() / "input.metal";
  write_file(input, "#line 1 " + quoted(options.file_name) + "\n" + std::string(text) + "\n");
  std::vector<std::string> arguments = {compiler(), "-E"};
  arguments.insert(arguments.end(), how.flags.begin(), how.flags.end());
  for (const char* define :
       {"-D__METAL__=1", "-D__METAL_VERSION__=310", "-D__METAL_MACOS__=1", "-D__HAVE_BFLOAT__=1"}) {
    arguments.push_back(define);
  }
  for (const std::string& define : options.defines) {
    arguments.push_back("-D" + define);
  }
  const fs::path parent = fs::path(options.file_name).parent_path();
  arguments.insert(arguments.end(), {"-iquote", parent.empty() ? "." : parent.string()});
  for (const fs::path& folder_path : options.include_dirs) {
    arguments.push_back("-I" + folder_path.string());
  }
  arguments.push_back("-I" + how.headers.string());
  if (!how.always_included.empty()) {
    arguments.insert(arguments.end(), {"-include", (how.headers / how.always_included).string()});
  }
  arguments.push_back(input.string());
  const ProcessResult result = run_compiler(arguments);
  if (result.status != 0) {
    throw CompileError(errors_of(result.err));
  }
  TokenStream stream = tokenize(result.out, {{how.headers.string()}});
  drop_linkage(stream.tokens);
  for (std::string& file : stream.files) {
    if (file == input.string()) {
      file = options.file_name;  // named so by the marker before its #line
    }
  }
  return stream;
}

Translation translate(std::string_view text, const CompileOptions& options) {
  TokenStream stream =
      preprocess(text, options, {{"-x", "c++", "-std=c++14"}, shim_folder(), "metal_stdlib"});
  Translation translation;
  const std::set<std::string> files(stream.files.begin(), stream.files.end());
  translation.files.assign(files.begin(), files.end());
  RewriteResult result = rewrite(std::move(stream), options.kernels);
  translation.text = std::move(result.text);
  translation.kernels = std::move(result.kernels);
  return translation;
}

std::vector<std::string> code_flags() {
  std::vector<std::string> flags = {
      "-std=c++17",
      "-O2",
      "-fPIC",
      "-w",
      "-ferror-limit=20",
      "-fvisibility=hidden",
      "-fno-exceptions",
      "-fno-rtti",
      "-fno-strict-aliasing",
      // The kernel's own fma() fuses; nothing else does, so that results do not depend on the CPU.
      "-ffp-contract=off",
      "-Xclang",
      "-ffloat16-excess-precision=none",
      "-Xclang",
      "-fbfloat16-excess-precision=none",
      "-fwrapv",
      "-fdebug-compilation-dir=.",
      // One access in the text is one access in the counters.
      "-fno-vectorize",
      "-fno-slp-vectorize",
      "-fconvergent-functions",
      "-fno-optimize-sibling-calls",
      "-fno-threadsafe-statics",
      "-gline-tables-only",
      "-gdwarf-4",
      // ThreadSanitizer's instrumentation, but the emulator's own hooks.
      "-fsanitize=thread",
      "-mllvm",
      "-tsan-instrument-read-before-write=1",
      "-mllvm",
      "-tsan-instrument-atomics=0",
      "-mllvm",
      "-tsan-instrument-func-entry-exit=1",
      "-fsanitize=alignment,bounds,integer-divide-by-zero,shift-exponent",
      "-fsanitize-recover=alignment,bounds,integer-divide-by-zero,shift-exponent",
  };
#if defined(__x86_64__)
  if (has_v3()) {
    flags.push_back("-march=x86-64-v3");  // F16C: half ↔ float in one instruction
  }
#endif
  return flags;
}

void build(
    const Translation& translation,
    const fs::path& library,
    const fs::path& cache,
    const std::string& toolchain) {
  const TemporaryFolder folder(fs::temp_directory_path());
  const fs::path source = folder.path() / "kernels.cpp", built = folder.path() / "kernels.so";
  write_file(source, translation.text);
  const auto compile = [&](const std::string& include, const fs::path& header) {
    return run_compiler(
        "c++",
        {include,
         header.string(),
         source.string(),
         "-o",
         built.string(),
         "-shared",
         "-nostdlib++",
         "-fno-sanitize-link-runtime",
         "-Wl,-Bsymbolic",
         "-Wl,-z,defs",
         "-lm"});
  };
  ProcessResult result = compile("-include-pch", precompiled_header(cache, toolchain));
  if (result.status != 0 && speaks_of_header(result.err)) {
    // Someone edits the headers: without their precompiled form, which another process makes anew.
    std::error_code code;
    fs::remove(cache / (toolchain + ".pch"), code);
    result = compile("-include", shim_folder() / "metal_stdlib");
  }
  if (result.status != 0) {
    throw CompileError(errors_of(result.err));
  }
  publish(built, library);
}

}  // namespace metal_emulator::frontend
