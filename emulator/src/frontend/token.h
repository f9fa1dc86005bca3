// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Tokens of preprocessed Metal text. Only tokens of the user's own files are kept: what comes from
// the emulator's headers is compiled from those headers again, and is never rewritten.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace metal_emulator::frontend {

enum class TokenKind { identifier, number, string, character, punctuation, pragma };

struct Token {
  TokenKind kind;
  std::string text;
  int file = 0;  ///< index into TokenStream::files
  int line = 0;
  bool space_before = false;  ///< white space separates it from the token before
  // What the rewriter makes of it: `before` and `after` are printed around it.
  bool erased = false;
  std::string before, after;

  bool is(std::string_view s) const { return text == s; }
  bool is_identifier() const { return kind == TokenKind::identifier; }
};

struct TokenStream {
  std::vector<std::string> files;
  std::vector<Token> tokens;

  /// "file:line" of a token; the last token's for an index past the end.
  std::string where(size_t index) const;
};

/// A file of the emulator's own headers or of the system, by its path in a line marker.
struct HeaderPaths {
  std::vector<std::string> own;  ///< folders of the emulator's headers
};

/// Splits the output of `clang -E` (with line markers) into the user's tokens. `>` and `]` are
/// always single tokens, so that template and attribute brackets can be matched. Throws
/// CompileError with file:line for raw strings, system headers, stray characters and unterminated
/// literals.
TokenStream tokenize(std::string_view preprocessed, const HeaderPaths& headers);

/// Prints the tokens with their edits; #line directives keep every line's number and file.
std::string print(const TokenStream& stream);

}  // namespace metal_emulator::frontend
