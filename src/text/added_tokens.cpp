// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/added_tokens.h"

#include <algorithm>

#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

// Where the last character before `pos` begins (valid UTF-8, pos > 0).
size_t character_before(std::string_view text, size_t pos) {
  do {
    --pos;
  } while (pos > 0 && (static_cast<unsigned char>(text[pos]) & 0xC0) == 0x80);
  return pos;
}

bool touches_word(std::string_view text, size_t begin, size_t end) {
  if (begin > 0 && is_word(read_utf8(text, character_before(text, begin)).value)) return true;
  return end < text.size() && is_word(read_utf8(text, end).value);
}

}  // namespace

void AddedTokens::Trie::add(std::string_view content, int32_t token) {
  if (content.empty()) return;
  if (nodes.empty()) nodes.push_back(-1);
  first[static_cast<unsigned char>(content[0])] = true;
  uint64_t node = 0;
  for (const char c : content) {
    const auto [it, fresh] = edges.try_emplace(
        node << 8 | static_cast<unsigned char>(c), static_cast<int32_t>(nodes.size()));
    if (fresh) nodes.push_back(-1);
    node = static_cast<uint64_t>(it->second);
  }
  if (nodes[node] < 0) nodes[node] = token;
}

int32_t AddedTokens::Trie::longest(std::string_view text, size_t pos, size_t& end) const {
  int32_t found = -1;
  uint64_t node = 0;
  for (size_t i = pos; i < text.size(); ++i) {
    const auto it = edges.find(node << 8 | static_cast<unsigned char>(text[i]));
    if (it == edges.end()) break;
    node = static_cast<uint64_t>(it->second);
    if (nodes[node] >= 0) {
      found = nodes[node];
      end = i + 1;
    }
  }
  return found;
}

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Normalizer& normalizer)
    : tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    tokens_[i].decoded = tokens_[i].content;
    if (!tokens_[i].normalized) {
      raw_.add(tokens_[i].content, static_cast<int32_t>(i));
      continue;
    }
    normalizer.apply(tokens_[i].decoded);
    normalized_.add(tokens_[i].decoded, static_cast<int32_t>(i));
  }
}

void AddedTokens::split(
    std::string_view text, bool normalized, bool special, std::vector<Stretch>& out) const {
  const Trie& trie = normalized ? normalized_ : raw_;
  size_t done = 0;
  for (size_t pos = 0; pos < text.size() && !trie.nodes.empty();) {
    size_t end = pos;
    const int32_t found =
        trie.first[static_cast<unsigned char>(text[pos])] ? trie.longest(text, pos, end) : -1;
    if (found < 0) {
      ++pos;
      continue;
    }
    const AddedToken& token = tokens_[found];
    size_t begin = pos;
    pos = end;
    if (token.special && !special) continue;
    if (token.single_word && touches_word(text, begin, end)) continue;
    if (token.lstrip) {
      while (begin > done) {
        const size_t before = character_before(text, begin);
        if (!is_white_space(read_utf8(text, before).value)) break;
        begin = before;
      }
    }
    begin = std::max(begin, done);
    if (token.rstrip) {
      while (end < text.size()) {
        const CodePoint c = read_utf8(text, end);
        if (!is_white_space(c.value)) break;
        end += c.bytes;
      }
    }
    if (begin > done) out.push_back({done, begin, -1});
    out.push_back({begin, std::max(begin, end), token.id});
    done = std::max(done, end);
  }
  if (done < text.size()) out.push_back({done, text.size(), -1});
}

}  // namespace metal_lora::text
