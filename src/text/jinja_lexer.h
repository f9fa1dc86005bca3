// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace metal_lora::text::jinja {

enum class TokenKind {
  text,
  block_begin,
  block_end,
  output_begin,
  output_end,
  name,
  string,
  integer,
  real,
  op,
  end
};

struct Token {
  TokenKind kind;
  std::string text;  ///< of a string: its value
  uint32_t line;
};

/// Cuts a template as Jinja does under trim_blocks and lstrip_blocks; comments and raw blocks are
/// resolved. Throws Error invalid_input with the line.
std::vector<Token> tokenize(const std::string& source);

}  // namespace metal_lora::text::jinja
