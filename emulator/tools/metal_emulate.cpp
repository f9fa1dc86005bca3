// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// metal-emulate: compiles, checks and runs Metal compute kernels on a CPU.
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "metal_emulator/emulator.h"
#include "src/frontend/compiler.h"

namespace {

namespace fs = std::filesystem;
using namespace metal_emulator;

constexpr const char* kHelp =
    R"(metal-emulate: compile, check and run Metal compute kernels on a CPU

  metal-emulate compile FILE.metal -o LIBRARY [options]   build a library of kernels
  metal-emulate lint FILE.metal [options]                 only what Apple's compiler would refuse
  metal-emulate rewrite FILE.metal [options]              print the C++ that clang gets
  metal-emulate list LIBRARY                              kernels, arguments, function constants
  metal-emulate run LIBRARY KERNEL [run options]          execute one dispatch, with all checks

LIBRARY may also be a .metal file: it is then compiled first (and cached).

options
  -I FOLDER, -D NAME[=VALUE]   as for a compiler
  --kernel NAME                build only this kernel (repeat for more)
  --no-lint                    accept what the strict lint refuses
  --depfile FILE               write a Makefile rule of the files read (compile)

run options
  --buffer N=SOURCE            contents of [[buffer(N)]]:
                                 path            a file's bytes
                                 zeros:BYTES     zeros
                                 undefined:BYTES reading it before the kernel wrote it is a finding
                                 float:1,2.5     32-bit floats;  int: and uint: likewise
  --save N=PATH                write buffer N to a file afterwards
  --grid X[,Y[,Z]]             threads in the grid (dispatchThreads)
  --threadgroup X[,Y[,Z]]      threads in a threadgroup
  --threadgroup-memory N=BYTES size of [[threadgroup(N)]]
  --constant N=TYPE:VALUE      function constant N; TYPE is bool, int, uint, ushort or float
  --no-checks                  only count
  --reverse                    schedule the last threadgroup and simdgroup first
  --json                       counters and findings as JSON

example
  metal-emulate run axpy.metal axpy --buffer 0=float:1,2,3,4 --buffer 1=zeros:16 \
      --grid 4 --threadgroup 4 --save 1=y.bin

Exit code: 0 clean; 1 findings, or text that is refused; 2 wrong usage.
Not told by an emulator: whether Apple's compiler takes the text, speed, registers.
)";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    throw UsageError("cannot read " + path);
  }
  return {std::istreambuf_iterator<char>(in), {}};
}

void write_file(const std::string& path, const char* data, size_t bytes) {
  std::ofstream out(path, std::ios::binary);
  out.write(data, static_cast<std::streamsize>(bytes));
  out.close();
  if (!out) {
    throw UsageError("cannot write " + path);
  }
}

uint64_t number(const std::string& text) {
  size_t used = 0;
  uint64_t value = 0;
  try {
    value = std::stoull(text, &used, 0);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size() || text[0] == '-') {
    throw UsageError("'" + text + "' is not a number");
  }
  return value;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> out;
  size_t begin = 0;
  for (size_t end = 0; end != std::string::npos; begin = end + 1) {
    end = text.find(separator, begin);
    out.push_back(text.substr(begin, end == std::string::npos ? end : end - begin));
  }
  return out;
}

template <class T, class Parse>
void append(std::string& bytes, const std::string& text, Parse parse) {
  const T value = static_cast<T>(parse(text));
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// "float:1,2" → bytes.
std::string values(const std::string& type, const std::string& list) {
  std::string bytes;
  for (const std::string& text : split(list, ',')) {
    try {
      if (type == "float") {
        append<float>(bytes, text, [](const std::string& t) { return std::stof(t); });
      } else if (type == "int") {
        append<int32_t>(bytes, text, [](const std::string& t) { return std::stol(t, nullptr, 0); });
      } else if (type == "uint") {
        append<uint32_t>(bytes, text, number);
      } else if (type == "ushort") {
        append<uint16_t>(bytes, text, number);
      } else if (type == "bool") {
        append<uint8_t>(bytes, text, [](const std::string& t) { return t == "true" || t == "1"; });
      } else {
        throw UsageError("unknown type '" + type + "'");
      }
    } catch (const std::logic_error&) {
      throw UsageError("'" + text + "' is not a value of type " + type);
    }
  }
  return bytes;
}

std::array<uint32_t, 3> triple(const std::string& text) {
  std::array<uint32_t, 3> out{1, 1, 1};
  const std::vector<std::string> parts = split(text, ',');
  if (parts.size() > 3) {
    throw UsageError("'" + text + "' has more than three dimensions");
  }
  for (size_t i = 0; i < parts.size(); i++) {
    out[i] = static_cast<uint32_t>(number(parts[i]));
  }
  return out;
}

/// Positional arguments and options, in order.
struct Arguments {
  std::vector<std::string> positional;
  std::vector<std::pair<std::string, std::string>> options;
  bool has(const std::string& name) const {
    for (const auto& [key, value] : options) {
      if (key == name) {
        return true;
      }
    }
    return false;
  }
  std::string get(const std::string& name, const std::string& otherwise) const {
    for (const auto& [key, value] : options) {
      if (key == name) {
        return value;
      }
    }
    return otherwise;
  }
};

Arguments parse(int argc, char** argv) {
  static const std::map<std::string, bool> known = {
      {"-o", true},
      {"-I", true},
      {"-D", true},
      {"--kernel", true},
      {"--no-lint", false},
      {"--depfile", true},
      {"--buffer", true},
      {"--save", true},
      {"--grid", true},
      {"--threadgroup", true},
      {"--threadgroup-memory", true},
      {"--constant", true},
      {"--no-checks", false},
      {"--reverse", false},
      {"--json", false}};
  Arguments out;
  for (int i = 2; i < argc; i++) {
    std::string word = argv[i];
    if (word.size() > 2 && (word.starts_with("-I") || word.starts_with("-D"))) {
      out.options.emplace_back(word.substr(0, 2), word.substr(2));
      continue;
    }
    const auto found = known.find(word);
    if (found == known.end()) {
      if (word.starts_with("-")) {
        throw UsageError("unknown option " + word);
      }
      out.positional.push_back(word);
    } else if (!found->second) {
      out.options.emplace_back(word, "");
    } else if (++i < argc) {
      out.options.emplace_back(word, argv[i]);
    } else {
      throw UsageError(word + " needs a value");
    }
  }
  return out;
}

CompileOptions compile_options(const Arguments& arguments, const std::string& file) {
  CompileOptions options;
  options.file_name = file;
  for (const auto& [key, value] : arguments.options) {
    if (key == "-I") {
      options.include_dirs.push_back(value);
    } else if (key == "-D") {
      options.defines.push_back(value);
    } else if (key == "--kernel") {
      options.kernels.push_back(value);
    } else if (key == "--no-lint") {
      options.lint = false;
    }
  }
  return options;
}

void need(const Arguments& arguments, size_t count, const char* what) {
  if (arguments.positional.size() != count) {
    throw UsageError(std::string("expected ") + what);
  }
}

std::string escape_for_make(const std::string& path) {
  std::string out;
  for (char c : path) {
    out += c == ' ' ? "\\ " : std::string(1, c);
  }
  return out;
}

int compile_command(const Arguments& arguments) {
  need(arguments, 1, "compile FILE.metal -o LIBRARY");
  const std::string library = arguments.get("-o", "");
  if (library.empty()) {
    throw UsageError("compile needs -o LIBRARY");
  }
  const std::string& file = arguments.positional[0];
  const CompileOptions options = compile_options(arguments, file);
  const std::string text = read_file(file);
  compile_to(text, library, options);
  if (const std::string depfile = arguments.get("--depfile", ""); !depfile.empty()) {
    std::string rule = escape_for_make(library) + ":";
    for (const std::string& used : frontend::translate(text, options).files) {
      rule += " \\\n  " + escape_for_make(fs::absolute(used).string());
    }
    rule += "\n";
    write_file(depfile, rule.data(), rule.size());
  }
  return 0;
}

int lint_command(const Arguments& arguments) {
  need(arguments, 1, "lint FILE.metal");
  const std::string& file = arguments.positional[0];
  const std::vector<std::string> messages = lint(read_file(file), compile_options(arguments, file));
  for (const std::string& message : messages) {
    std::printf("%s\n", message.c_str());
  }
  return messages.empty() ? 0 : 1;
}

int rewrite_command(const Arguments& arguments) {
  need(arguments, 1, "rewrite FILE.metal");
  const std::string& file = arguments.positional[0];
  const std::string text =
      frontend::translate(read_file(file), compile_options(arguments, file)).text;
  std::fwrite(text.data(), 1, text.size(), stdout);
  return 0;
}

Library open(const Arguments& arguments) {
  const std::string& path = arguments.positional[0];
  return fs::path(path).extension() == ".metal"
             ? compile(read_file(path), compile_options(arguments, path))
             : load(path);
}

int list_command(const Arguments& arguments) {
  need(arguments, 1, "list LIBRARY");
  const Library library = open(arguments);
  for (const KernelInfo& kernel : library.kernels()) {
    std::printf("%s\n", kernel.name.c_str());
    for (const ArgumentInfo& a : kernel.arguments) {
      if (a.kind != ArgumentInfo::Kind::built_in) {
        std::printf(
            "  %s(%d) %s%s\n",
            a.kind == ArgumentInfo::Kind::buffer ? "buffer" : "threadgroup",
            a.index,
            a.name.c_str(),
            a.read_only ? " (read only)" : "");
      }
    }
  }
  for (const FunctionConstantInfo& c : library.function_constants()) {
    std::printf("function_constant(%d) %s, %zu bytes\n", c.index, c.name.c_str(), c.bytes);
  }
  return 0;
}

/// A dispatch and the memory behind its buffers.
struct Run {
  Dispatch dispatch;
  std::map<int, std::string> memory;
};

void add_buffer(Run& run, const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos) {
    throw UsageError("--buffer takes N=SOURCE");
  }
  const int index = static_cast<int>(number(text.substr(0, equals)));
  const std::string source = text.substr(equals + 1);
  const size_t colon = source.find(':');
  const std::string type = colon == std::string::npos ? "" : source.substr(0, colon);
  Buffer buffer;
  buffer.index = index;
  std::string& bytes = run.memory[index];
  if (type == "zeros" || type == "undefined") {
    bytes.assign(number(source.substr(colon + 1)), '\0');
    buffer.initialized = type == "zeros";
  } else if (type == "float" || type == "int" || type == "uint" || type == "ushort") {
    bytes = values(type, source.substr(colon + 1));
  } else {
    bytes = read_file(source);
  }
  buffer.bytes = bytes.size();
  run.dispatch.buffers.push_back(buffer);
}

void add_constant(Run& run, const std::string& text) {
  const size_t equals = text.find('='), colon = text.find(':');
  if (equals == std::string::npos || colon == std::string::npos || colon < equals) {
    throw UsageError("--constant takes N=TYPE:VALUE");
  }
  FunctionConstant constant;
  constant.index = static_cast<int>(number(text.substr(0, equals)));
  for (char c : values(text.substr(equals + 1, colon - equals - 1), text.substr(colon + 1))) {
    constant.value.push_back(static_cast<std::byte>(c));
  }
  run.dispatch.function_constants.push_back(std::move(constant));
}

Run parse_run(const Arguments& arguments) {
  Run run;
  run.dispatch.kernel = arguments.positional[1];
  for (const auto& [key, value] : arguments.options) {
    if (key == "--buffer") {
      add_buffer(run, value);
    } else if (key == "--constant") {
      add_constant(run, value);
    } else if (key == "--grid") {
      run.dispatch.threads_per_grid = triple(value);
    } else if (key == "--threadgroup") {
      run.dispatch.threads_per_threadgroup = triple(value);
    } else if (key == "--threadgroup-memory") {
      const size_t equals = value.find('=');
      const size_t index = number(value.substr(0, equals));
      if (equals == std::string::npos || index > 30) {
        throw UsageError("--threadgroup-memory takes N=BYTES");
      }
      auto& sizes = run.dispatch.threadgroup_memory_bytes;
      sizes.resize(std::max(sizes.size(), index + 1));
      sizes[index] = number(value.substr(equals + 1));
    }
  }
  run.dispatch.checks = !arguments.has("--no-checks");
  run.dispatch.reverse_order = arguments.has("--reverse");
  for (Buffer& buffer : run.dispatch.buffers) {
    buffer.data = run.memory[buffer.index].data();
  }
  return run;
}

std::string json(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
    }
    if (static_cast<unsigned char>(c) < 0x20) {
      out += ' ';
    } else {
      out += c;
    }
  }
  return out + '"';
}

/// Name and value of each counter that belongs to no buffer.
std::vector<std::pair<const char*, uint64_t>> counter_list(const Counters& c) {
  return {
      {"threadgroups", c.threadgroups},
      {"threads", c.threads},
      {"threadgroup_memory_bytes", c.threadgroup_memory_bytes},
      {"threadgroup_read_bytes", c.threadgroup_read_bytes},
      {"threadgroup_written_bytes", c.threadgroup_written_bytes},
      {"threadgroup_barriers", c.threadgroup_barriers},
      {"simdgroup_barriers", c.simdgroup_barriers},
      {"simd_operations", c.simd_operations},
      {"matrix_operations", c.matrix_operations},
      {"atomics", c.atomics}};
}

void print_json(const std::string& kernel, const Report& report) {
  std::printf("{\"kernel\": %s, \"counters\": {", json(kernel).c_str());
  for (const auto& [name, value] : counter_list(report.counters)) {
    std::printf("\"%s\": %llu, ", name, static_cast<unsigned long long>(value));
  }
  std::printf("\"buffers\": [");
  const char* comma = "";
  for (const BufferCounters& b : report.counters.buffers) {
    std::printf(
        "%s{\"index\": %d, \"read_bytes\": %llu, \"unique_read_bytes\": %llu, "
        "\"written_bytes\": %llu, \"unique_written_bytes\": %llu}",
        comma,
        b.index,
        static_cast<unsigned long long>(b.read_bytes),
        static_cast<unsigned long long>(b.unique_read_bytes),
        static_cast<unsigned long long>(b.written_bytes),
        static_cast<unsigned long long>(b.unique_written_bytes));
    comma = ", ";
  }
  std::printf(
      "]}, \"finding_count\": %llu, \"findings\": [",
      static_cast<unsigned long long>(report.finding_count));
  comma = "";
  for (const Finding& f : report.findings) {
    std::printf(
        "%s{\"kind\": \"%s\", \"file\": %s, \"line\": %d, \"count\": %llu, \"text\": %s}",
        comma,
        std::string(finding_name(f.kind)).c_str(),
        json(f.file).c_str(),
        f.line,
        static_cast<unsigned long long>(f.count),
        json(f.text).c_str());
    comma = ", ";
  }
  std::printf("]}\n");
}

void print_text(const Report& report) {
  for (const auto& [name, value] : counter_list(report.counters)) {
    std::printf("%-28s %llu\n", name, static_cast<unsigned long long>(value));
  }
  for (const BufferCounters& b : report.counters.buffers) {
    std::printf(
        "buffer %-2d read %llu bytes (%llu unique), wrote %llu bytes (%llu unique)\n",
        b.index,
        static_cast<unsigned long long>(b.read_bytes),
        static_cast<unsigned long long>(b.unique_read_bytes),
        static_cast<unsigned long long>(b.written_bytes),
        static_cast<unsigned long long>(b.unique_written_bytes));
  }
  for (const Finding& f : report.findings) {
    std::printf(
        "%s:%d: %s: %s (%llu times)\n",
        f.file.c_str(),
        f.line,
        std::string(finding_name(f.kind)).c_str(),
        f.text.c_str(),
        static_cast<unsigned long long>(f.count));
  }
  std::printf("%llu findings\n", static_cast<unsigned long long>(report.finding_count));
}

int run_command(const Arguments& arguments) {
  need(arguments, 2, "run LIBRARY KERNEL");
  const Library library = open(arguments);
  Run prepared = parse_run(arguments);
  const Report report = run(library, prepared.dispatch);
  if (arguments.has("--json")) {
    print_json(prepared.dispatch.kernel, report);
  } else {
    print_text(report);
  }
  for (const auto& [key, value] : arguments.options) {
    if (key == "--save") {
      const size_t equals = value.find('=');
      const auto found =
          equals == std::string::npos
              ? prepared.memory.end()
              : prepared.memory.find(static_cast<int>(number(value.substr(0, equals))));
      if (found == prepared.memory.end()) {
        throw UsageError("--save takes N=PATH of a bound buffer");
      }
      write_file(value.substr(equals + 1), found->second.data(), found->second.size());
    }
  }
  return report.finding_count == 0 ? 0 : 1;
}

int command(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "--help" || name == "-h" || name == "help") {
    std::fputs(kHelp, stdout);
    return 0;
  }
  const std::map<std::string, int (*)(const Arguments&)> commands = {
      {"compile", compile_command},
      {"lint", lint_command},
      {"rewrite", rewrite_command},
      {"list", list_command},
      {"run", run_command}};
  const auto found = commands.find(name);
  if (found == commands.end()) {
    throw UsageError(name.empty() ? "no command" : "unknown command '" + name + "'");
  }
  return found->second(parse(argc, argv));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return command(argc, argv);
  } catch (const UsageError& error) {
    std::fprintf(stderr, "metal-emulate: %s; see metal-emulate --help\n", error.what());
    return 2;
  } catch (const CompileError& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "metal-emulate: %s\n", error.what());
    return 1;
  }
}
