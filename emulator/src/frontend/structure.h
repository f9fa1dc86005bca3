// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The declarations of a translation unit, found from tokens alone: enough structure to tell a
// kernel from a function, a threadgroup variable from a cast, and a namespace's scope from a
// class's.
#pragma once

#include <string>
#include <vector>

#include "src/frontend/token.h"

namespace metal_emulator::frontend {

constexpr size_t kNone = static_cast<size_t>(-1);

/// An attribute `[[name(argument)]]` of a list; `[[a, b(1)]]` gives two.
struct Attribute {
  std::string name;      ///< with its namespace: gnu::unused
  std::string argument;  ///< the text between its parentheses, tokens separated by one space
  size_t token = 0;
};

struct Declaration {
  enum class Kind { name_space, class_type, enumeration, function, variable, instantiation, other };
  Kind kind = Kind::other;
  size_t begin = 0, end = 0;  ///< tokens [begin, end), with the closing `;` or `}`
  size_t head = 0;            ///< first token after template<...> prefixes
  size_t name = kNone;        ///< the declared name; of a function, before its parameters
  size_t params_open = kNone, params_close = kNone;
  size_t head_end = kNone;  ///< where the body, `:` of a constructor or `;` begins
  size_t body_open = kNone, body_close = kNone;
  bool is_template = false;  ///< has a non-empty template<...> prefix
  bool in_class = false;
  std::string scope;                  ///< "a::b::" around it; classes count
  std::vector<Attribute> attributes;  ///< those before the name, and after a variable's name
  std::vector<Declaration> members;   ///< of a namespace or class

  bool has_attribute(std::string_view attribute_name) const;
};

/// Index of the bracket that closes the ( [ or { at `open`; throws CompileError when there is none.
size_t match_bracket(const TokenStream& stream, size_t open);
/// Index of the > that closes the < at `open`, or kNone when it is a comparison.
size_t match_angle(const TokenStream& stream, size_t open);
/// True at the first [ of an attribute list `[[`.
bool is_attribute(const TokenStream& stream, size_t index);
/// Attributes of the list at `open` ([[); `*next` becomes the index after it.
std::vector<Attribute> parse_attributes(const TokenStream& stream, size_t open, size_t* next);
/// Splits [begin, end) at commas outside every bracket, angle brackets included.
std::vector<std::pair<size_t, size_t>> split_commas(
    const TokenStream& stream, size_t begin, size_t end);
/// The tokens of [begin, end) that are not erased, separated by one space.
std::string join(const TokenStream& stream, size_t begin, size_t end);

bool is_address_space(std::string_view word);

/// Throws CompileError (file:line) for text whose declarations it cannot follow.
std::vector<Declaration> parse_declarations(const TokenStream& stream);

}  // namespace metal_emulator::frontend
