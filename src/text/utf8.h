// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace metal_lora::text {

/// One code point and how many bytes it took. Invalid input gives U+FFFD with `valid` false and
/// the length of the maximal invalid subsequence (Unicode 15, section 3.9, as Rust and Python do).
struct CodePoint {
  char32_t value = 0;
  uint32_t bytes = 0;
  bool valid = true;
};

/// Reads the code point at `pos` (< text.size()).
CodePoint read_utf8(std::string_view text, size_t pos);
void append_utf8(std::string& out, char32_t code_point);

bool is_valid_utf8(std::string_view text);
/// Every maximal invalid sequence becomes U+FFFD.
std::string replace_invalid_utf8(std::string_view text);
/// How many bytes of `text` precede a trailing sequence that more bytes could still complete.
size_t complete_utf8_bytes(std::string_view text);

/// Bytes of the character that starts with `lead`, in valid UTF-8.
inline uint32_t utf8_length(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

/// Unicode White_Space.
bool is_white_space(char32_t c);
/// General category N*, as Rust's char::is_numeric.
bool is_numeric(char32_t c);
/// ASCII punctuation, or general category P*.
bool is_punctuation(char32_t c);
/// \w of UTS 18: Alphabetic, M*, Nd, Pc, Join_Control (to the letter for L*, M*, N*, Pc).
bool is_word(char32_t c);

}  // namespace metal_lora::text
