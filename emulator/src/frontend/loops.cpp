// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Lanes of a simdgroup go through a loop in step: in `if (c) x += simd_sum(1);` a lane that skips
// one iteration does not meet the others' call of it in the next. Loops with such calls in branches
// tell the runtime where an iteration begins; a call is then a meeting of lanes in one iteration.
#include "src/frontend/rewrite.h"

namespace metal_emulator::frontend {
namespace {

// Calls that lanes meet at, and what lets some lanes pass them by.
bool meets_in_branch(const TokenStream& stream, size_t begin, size_t end) {
  bool meets = false, branches = false;
  for (size_t i = begin; i < end; i++) {
    const Token& token = stream.tokens[i];
    meets = meets || (token.is_identifier() &&
                      (token.text.starts_with("simd_") || token.text.starts_with("quad_")));
    branches = branches || token.is("if") || token.is("continue") || token.is("switch") ||
               token.is("?") || token.is("&&") || token.is("||");
  }
  return meets && branches;
}

}  // namespace

void rewrite_loops(TokenStream& stream) {
  std::vector<Token>& tokens = stream.tokens;
  for (size_t i = 0; i + 1 < tokens.size(); i++) {
    const bool counted = (tokens[i].is("for") || tokens[i].is("while")) && tokens[i + 1].is("(");
    if (!counted && !tokens[i].is("do")) {
      continue;
    }
    const size_t open = counted ? match_bracket(stream, i + 1) + 1 : i + 1;
    if (open >= tokens.size() || !tokens[open].is("{")) {
      continue;  // also the while of a do
    }
    const size_t close = match_bracket(stream, open);
    if (!meets_in_branch(stream, i, close)) {
      continue;
    }
    size_t last = close;
    if (!counted) {
      last = match_bracket(stream, close + 2) + 1;  // } while ( … ) ;
    }
    for (size_t p = i; p > 0 && tokens[p - 1].kind == TokenKind::pragma; p--) {
      tokens[p - 1].erased = true;  // a hint for the loop that would stand before our object
    }
    tokens[i].before = "{ ::metal_emulator::glue::Loop metal_emulator_loop; " + tokens[i].before;
    tokens[open].after = " metal_emulator_loop.next();" + tokens[open].after;
    tokens[last].after += " }";
  }
}

}  // namespace metal_emulator::frontend
