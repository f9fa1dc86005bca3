// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <set>

#include "metal_emulator/emulator.h"
#include "src/frontend/rewrite.h"

namespace metal_emulator::frontend {
namespace {

constexpr std::array<std::string_view, 20> kBuiltIns = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "thread_index_in_quadgroup",
    "simdgroup_index_in_threadgroup",
    "quadgroup_index_in_threadgroup",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_simdgroup",
    "thread_execution_width",
    "simdgroups_per_threadgroup",
    "quadgroups_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "dispatch_quadgroups_per_threadgroup",
    "grid_origin",
    "grid_size"};

struct Parameter {
  std::vector<Attribute> attributes;
  std::vector<size_t> core;  ///< tokens outside attributes
  size_t begin = 0;
};

Parameter split(const TokenStream& stream, size_t begin, size_t end) {
  Parameter p;
  p.begin = begin;
  for (size_t at = begin; at < end;) {
    if (is_attribute(stream, at)) {
      const std::vector<Attribute> more = parse_attributes(stream, at, &at);
      p.attributes.insert(p.attributes.end(), more.begin(), more.end());
    } else {
      p.core.push_back(at++);
    }
  }
  return p;
}

// What the declarator says: everything at angle depth 0.
struct Shape {
  int pointers = 0;        // *
  bool reference = false;  // & or an array
  bool const_pointee = false;
  std::set<std::string> spaces;
  std::string name, type;
};

Shape shape_of(const TokenStream& stream, const Parameter& p) {
  Shape s;
  int angle = 0;
  bool after_name = false;
  for (size_t index : p.core) {
    const Token& t = stream.tokens[index];
    angle += t.is("<") - t.is(">");
    if (angle > 0) {
      continue;
    }
    if (t.is("=")) {
      break;
    }
    if (t.is("*")) {
      s.pointers++;
    } else if (t.is("&") || t.is("[")) {
      s.reference = true;
      after_name = t.is("[") && !s.name.empty();
    } else if (t.is("const")) {
      s.const_pointee = s.const_pointee || (s.pointers == 0 && !s.reference);
    } else if (is_address_space(t.text)) {
      s.spaces.insert(t.text);
    } else if (t.is_identifier() && !after_name) {
      s.type = s.name.empty() ? s.type : s.name;
      s.name = t.text;
    }
  }
  return s;
}

class ArgumentParser {
 public:
  ArgumentParser(const TokenStream& stream, const Declaration& kernel)
      : stream_(stream), kernel_(stream.tokens[kernel.name].text) {
    for (auto [begin, end] : split_commas(stream, kernel.params_open + 1, kernel.params_close)) {
      parameters_.push_back(split(stream, begin, end));
    }
    for (const Parameter& p : parameters_) {
      for (const Attribute& a : p.attributes) {
        if (a.name == "buffer" && !used_.insert(a.argument).second) {
          fail(p, "buffer index " + a.argument + " is used twice");
        }
      }
    }
  }

  std::vector<KernelArgument> run() {
    std::vector<KernelArgument> out;
    for (const Parameter& p : parameters_) {
      if (p.core.size() == 1 && stream_.tokens[p.core[0]].is("void")) {
        continue;
      }
      out.push_back(argument(p));
    }
    return out;
  }

 private:
  [[noreturn]] void fail(const Parameter& p, const std::string& message) const {
    throw CompileError(stream_.where(p.begin) + ": error: kernel " + kernel_ + ": " + message);
  }

  static const Attribute* find(const Parameter& p, std::string_view name) {
    for (const Attribute& a : p.attributes) {
      if (a.name == name) {
        return &a;
      }
    }
    return nullptr;
  }

  KernelArgument argument(const Parameter& p) {
    const Shape s = shape_of(stream_, p);
    KernelArgument a;
    a.name = s.name;
    if (const Attribute* enable = find(p, "function_constant")) {
      a.enable = enable->argument;
    }
    for (const Attribute& attribute : p.attributes) {
      check_attribute(p, attribute, s.name);
    }
    if (s.pointers == 0 && !s.reference) {
      return built_in(p, s, std::move(a));
    }
    if (s.spaces.empty()) {
      fail(p, "parameter " + s.name + " has no address space");
    }
    if (s.pointers > 1 || s.spaces.size() > 1) {
      fail(p, "parameter " + s.name + ": pointers to pointers are not supported");
    }
    a.is_constant = s.spaces.count("constant") > 0;
    a.read_only = a.is_constant || s.const_pointee;
    if (s.spaces.count("threadgroup")) {
      const Attribute* memory = find(p, "threadgroup");
      if (!memory) {
        fail(p, "parameter " + s.name + " in threadgroup memory lacks [[threadgroup(n)]]");
      }
      a.kind = "threadgroup_memory";
      a.index = memory->argument;
      return a;
    }
    if (s.spaces.count("thread")) {
      fail(p, "parameter " + s.name + " cannot be in the thread address space");
    }
    a.kind = "buffer";
    a.index = buffer_index(p);
    return a;
  }

  void check_attribute(const Parameter& p, const Attribute& a, const std::string& name) const {
    const bool built_in = is_built_in(a.name);
    if (!built_in && a.name != "buffer" && a.name != "threadgroup" &&
        a.name != "function_constant" && a.name != "maybe_unused") {
      fail(p, "parameter " + name + ": attribute [[" + a.name + "]] is not supported");
    }
  }

  std::string buffer_index(const Parameter& p) {
    if (const Attribute* buffer = find(p, "buffer")) {
      return buffer->argument;
    }
    for (const std::string& index : used_) {
      if (index.find_first_not_of("0123456789") != std::string::npos) {
        fail(p, "a buffer without an index beside [[buffer(" + index + ")]] is not supported");
      }
    }
    for (int index = 0;; index++) {
      if (used_.insert(std::to_string(index)).second) {
        return std::to_string(index);
      }
    }
  }

  KernelArgument built_in(const Parameter& p, const Shape& s, KernelArgument a) const {
    for (const Attribute& attribute : p.attributes) {
      if (is_built_in(attribute.name)) {
        a.kind = attribute.name;
        a.read_only = true;
        return a;
      }
    }
    if (s.type.starts_with("texture") || s.type == "sampler" || s.type.starts_with("depth")) {
      fail(p, "parameter " + s.name + ": textures and samplers are not supported");
    }
    fail(p, "parameter " + s.name + " is neither a buffer nor a built-in attribute");
  }

  const TokenStream& stream_;
  std::string kernel_;
  std::vector<Parameter> parameters_;
  std::set<std::string> used_;
};

}  // namespace

bool is_built_in(std::string_view attribute) {
  return std::find(kBuiltIns.begin(), kBuiltIns.end(), attribute) != kBuiltIns.end();
}

std::vector<KernelArgument> parse_kernel_arguments(
    const TokenStream& stream, const Declaration& declaration) {
  return ArgumentParser(stream, declaration).run();
}

}  // namespace metal_emulator::frontend
