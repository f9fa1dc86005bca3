// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Metal text → C++ for clang: kernels become functions with a table of their arguments, address
// spaces vanish (`constant` becomes const), threadgroup variables move to the emulator's memory,
// function constants become variables. See emulator/README.md for what is covered.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "src/frontend/structure.h"
#include "src/frontend/token.h"

namespace metal_emulator::frontend {

struct KernelArgument {
  std::string kind;         ///< enumerator of abi::ArgKind
  std::string index = "0";  ///< of the buffer or threadgroup memory: an integer expression
  bool is_constant = false;
  bool read_only = false;
  std::string enable;  ///< qualified name of a function constant; empty: always there
  std::string name;
};

struct KernelFunction {
  std::string scope, name;  ///< scope ends in "::" or is empty
  std::string host_name;    ///< without instantiation
  bool is_template = false;
  std::vector<KernelArgument> arguments;
  size_t declaration_begin = 0;
};

/// One entry of the library: a kernel, or an instantiation of a template.
struct KernelEntry {
  std::string host_name;
  size_t function = 0;  ///< index into the kernel functions
  std::string pointer;  ///< expression that names the function, from the global scope
};

struct RewriteResult {
  std::string text;                  ///< C++ with #line directives, ends with the library's table
  std::vector<std::string> kernels;  ///< host names, in order
};

/// wanted: host names to keep; empty: all. Throws CompileError ("file:line: error: …").
RewriteResult rewrite(TokenStream stream, const std::vector<std::string>& wanted);

/// Whether an attribute of a kernel's parameter names a position or a size of the dispatch.
bool is_built_in(std::string_view attribute);

// Steps, in this order; each edits the stream.

/// Arguments of a kernel's signature. Throws for what compute kernels cannot take.
std::vector<KernelArgument> parse_kernel_arguments(
    const TokenStream& stream, const Declaration& declaration);
/// Metal's literals: 1.0 is a float, 1.0h a half, 1.0bf a bfloat. Refuses L.
void rewrite_literals(TokenStream& stream);
/// Moves threadgroup variables of function bodies; program-scope ones are refused.
void rewrite_threadgroup_variables(
    TokenStream& stream, const std::vector<Declaration>& declarations);
/// Marks the iterations of loops in which lanes may meet.
void rewrite_loops(TokenStream& stream);
/// Erases attributes (unknown ones are refused) and address spaces.
void rewrite_tokens(TokenStream& stream, const std::vector<Declaration>& declarations);
/// Overloads and specialisations that differed in address spaces only are now equal: keeps one.
/// Throws when their bodies differ.
void erase_duplicates(TokenStream& stream, const std::vector<Declaration>& declarations);
/// The tokens of [begin, end) as edited, on one line.
std::string edited_text(const TokenStream& stream, size_t begin, size_t end);

}  // namespace metal_emulator::frontend
