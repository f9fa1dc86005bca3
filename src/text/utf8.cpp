// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/utf8.h"

#include <utf8proc.h>

#include <cstring>

namespace metal_lora::text {

namespace {

// Bytes a lead byte announces, and the range its first continuation byte must lie in.
struct LeadByte {
  uint32_t bytes;
  unsigned char low, high;
};

LeadByte classify(unsigned char lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead >= 0xC2 && lead <= 0xDF) return {2, 0x80, 0xBF};
  if (lead == 0xE0) return {3, 0xA0, 0xBF};
  if (lead == 0xED) return {3, 0x80, 0x9F};
  if (lead >= 0xE1 && lead <= 0xEF) return {3, 0x80, 0xBF};
  if (lead == 0xF0) return {4, 0x90, 0xBF};
  if (lead >= 0xF1 && lead <= 0xF3) return {4, 0x80, 0xBF};
  if (lead == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// Bytes of the longest prefix at `pos` that can begin a character; `complete` when it is one.
uint32_t subsequence(std::string_view text, size_t pos, bool& complete) {
  const LeadByte lead = classify(static_cast<unsigned char>(text[pos]));
  complete = false;
  if (lead.bytes == 0) return 1;
  unsigned char low = lead.low, high = lead.high;
  uint32_t n = 1;
  for (; n < lead.bytes && pos + n < text.size(); ++n) {
    const auto c = static_cast<unsigned char>(text[pos + n]);
    if (c < low || c > high) return n;
    low = 0x80, high = 0xBF;
  }
  complete = n == lead.bytes;
  return n;
}

utf8proc_category_t category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

}  // namespace

CodePoint read_utf8(std::string_view text, size_t pos) {
  const auto lead = static_cast<unsigned char>(text[pos]);
  if (lead < 0x80) return {lead, 1, true};
  bool complete;
  const uint32_t n = subsequence(text, pos, complete);
  if (!complete) return {0xFFFD, n, false};
  char32_t value = lead & (0xFF >> (n + 1));
  for (uint32_t i = 1; i < n; ++i) {
    value = value << 6 | (static_cast<unsigned char>(text[pos + i]) & 0x3F);
  }
  return {value, n, true};
}

void append_utf8(std::string& out, char32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
    return;
  }
  if (c < 0x800) {
    out += static_cast<char>(0xC0 | c >> 6);
  } else {
    if (c < 0x10000) {
      out += static_cast<char>(0xE0 | c >> 12);
    } else {
      out += static_cast<char>(0xF0 | c >> 18);
      out += static_cast<char>(0x80 | ((c >> 12) & 0x3F));
    }
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
  }
  out += static_cast<char>(0x80 | (c & 0x3F));
}

bool is_valid_utf8(std::string_view text) {
  size_t pos = 0;
  while (pos < text.size()) {
    uint64_t chunk;
    if (pos + 8 <= text.size()) {
      std::memcpy(&chunk, text.data() + pos, 8);
      if ((chunk & 0x8080808080808080ull) == 0) {
        pos += 8;
        continue;
      }
    }
    bool complete;
    const uint32_t n = subsequence(text, pos, complete);
    if (!complete) return false;
    pos += n;
  }
  return true;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t pos = 0; pos < text.size();) {
    bool complete;
    const uint32_t n = subsequence(text, pos, complete);
    if (complete) {
      out.append(text, pos, n);
    } else {
      out += "\xEF\xBF\xBD";
    }
    pos += n;
  }
  return out;
}

size_t complete_utf8_bytes(std::string_view text) {
  // Only a lead byte among the last three can announce more than there is.
  for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const size_t pos = text.size() - back;
    const LeadByte lead = classify(static_cast<unsigned char>(text[pos]));
    if (lead.bytes <= back) continue;
    bool complete;
    if (subsequence(text, pos, complete) == back) return pos;
  }
  return text.size();
}

bool is_white_space(char32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0D);
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
         c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_numeric(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  const auto k = category(c);
  return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
}

bool is_punctuation(char32_t c) {
  if (c < 0x80) {
    return (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) ||
           (c >= 123 && c <= 126);
  }
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO;
}

bool is_word(char32_t c) {
  if (c < 0x80) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
  }
  if (c == 0x200C || c == 0x200D) return true;                                      // Join_Control
  if ((c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149)) return true;  // circled …
  if ((c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189)) return true;
  const auto k = category(c);
  return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO) ||
         (k >= UTF8PROC_CATEGORY_MN && k <= UTF8PROC_CATEGORY_ME) || k == UTF8PROC_CATEGORY_ND ||
         k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_PC;
}

}  // namespace metal_lora::text
