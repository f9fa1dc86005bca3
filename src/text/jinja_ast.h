// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/text/jinja_value.h"

namespace metal_lora::text::jinja {

struct Expr;
struct Stmt;
using ExprPtr = std::unique_ptr<Expr>;
using Body = std::vector<std::unique_ptr<Stmt>>;

enum class ExprKind {
  constant,
  name,
  list,
  tuple,
  dict,
  negate,
  plus,
  logical_not,
  logical_and,
  logical_or,
  add,
  subtract,
  multiply,
  divide,
  floor_divide,
  modulo,
  power,
  concat,
  compare,      ///< items[0] ops[0] items[1] ops[1] …
  conditional,  ///< items: then, condition, else or null
  attribute,
  subscript,
  slice,  ///< slice: items: object, start, stop, step (null where absent)
  call,
  filter,
  test,
  test_not,
};

struct Expr {
  ExprKind kind;
  uint32_t line = 0;
  uint32_t height = 1;           ///< levels below and including this node
  std::string name;              ///< variable, attribute, filter, test
  Value value;                   ///< constant
  std::vector<ExprPtr> items;    ///< operands; of call, filter, test: the object, then arguments
  std::vector<std::string> ops;  ///< compare
  std::vector<std::pair<std::string, ExprPtr>> named;  ///< keyword arguments
};

enum class StmtKind {
  text,
  output,
  branch,
  loop,
  set,
  set_block,
  macro,
  filter_block,
  group,
  break_loop,
  continue_loop
};

struct MacroNode {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<ExprPtr> defaults;  ///< of the last parameters
  Body body;
};

struct Stmt {
  StmtKind kind;
  uint32_t line = 0;
  std::string text;   ///< text
  ExprPtr expr;       ///< output, loop's sequence, set's value, filter applied to a block
  ExprPtr condition;  ///< of a loop's items
  std::vector<ExprPtr> targets;                    ///< names, or one attribute of a namespace
  bool unpacks = false;                            ///< targets take the items of one value
  std::vector<std::pair<ExprPtr, Body>> branches;  ///< branch: null condition is else
  Body body, otherwise;
  std::unique_ptr<MacroNode> macro;
};

struct Program {
  Body body;
};

/// Throws Error: invalid_input with the line, unsupported for what lies outside the subset.
std::shared_ptr<const Program> parse(const std::string& source);

/// Names that parse() accepts; the evaluator implements exactly these.
bool is_filter(const std::string& name);
bool is_test(const std::string& name);

/// Deepest nesting that parse() accepts.
inline constexpr uint32_t kMaxHeight = 200;

}  // namespace metal_lora::text::jinja
