// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/bpe.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "src/text/pre_tokenizer.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

constexpr size_t kCacheSlots = size_t{1} << 16;
constexpr size_t kCacheKeyBytes = size_t{4} << 20;
constexpr size_t kCacheIds = size_t{1} << 20;
constexpr size_t kMaxCachedWord = 128;
// Up to here scanning all pairs for the best beats a heap.
constexpr size_t kShortWord = 24;

uint64_t mix(uint64_t x) {
  x *= 0x9E3779B97F4A7C15ull;
  return x ^ x >> 32;
}

uint64_t hash_bytes(std::string_view s) {
  uint64_t h = s.size() * 0xD6E8FEB86659FD93ull;
  size_t i = 0;
  for (; i + 8 <= s.size(); i += 8) {
    uint64_t chunk;
    std::memcpy(&chunk, s.data() + i, 8);
    h = mix(h ^ chunk);
  }
  uint64_t tail = 0;
  std::memcpy(&tail, s.data() + i, s.size() - i);
  return mix(mix(h ^ tail));
}

size_t power_of_two_above(size_t n) {
  size_t size = 16;
  while (size < n) size *= 2;
  return size;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

void TokenIndex::build(const std::vector<std::string>& tokens, const std::vector<bool>& used) {
  slots_.assign(power_of_two_above(2 * tokens.size()), -1);
  const size_t mask = slots_.size() - 1;
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (!used[id]) continue;
    size_t at = hash_bytes(tokens[id]) & mask;
    while (slots_[at] >= 0 && tokens[slots_[at]] != tokens[id]) at = (at + 1) & mask;
    if (slots_[at] < 0) slots_[at] = static_cast<int32_t>(id);
  }
}

std::optional<int32_t> TokenIndex::find(
    const std::vector<std::string>& tokens, std::string_view spelling) const {
  if (slots_.empty()) return std::nullopt;
  const size_t mask = slots_.size() - 1;
  for (size_t at = hash_bytes(spelling) & mask; slots_[at] >= 0; at = (at + 1) & mask) {
    if (tokens[slots_[at]] == spelling) return slots_[at];
  }
  return std::nullopt;
}

BpeScratch::BpeScratch() : slots_(kCacheSlots) {}

bool BpeScratch::find(std::string_view word, uint64_t hash, std::vector<int32_t>& out) const {
  const Slot& slot = slots_[hash & (kCacheSlots - 1)];
  if (slot.hash != hash || slot.key_bytes != word.size() ||
      std::memcmp(keys_.data() + slot.key, word.data(), word.size()) != 0) {
    return false;
  }
  const int32_t* first = cached_ids_.data() + slot.first_id;
  out.insert(out.end(), first, first + slot.count);
  return true;
}

void BpeScratch::store(std::string_view word, uint64_t hash, const int32_t* ids, size_t count) {
  if (keys_.size() + word.size() > kCacheKeyBytes || cached_ids_.size() + count > kCacheIds)
    clear();
  Slot& slot = slots_[hash & (kCacheSlots - 1)];
  slot.hash = hash;
  slot.key = static_cast<uint32_t>(keys_.size());
  slot.key_bytes = static_cast<uint16_t>(word.size());
  slot.first_id = static_cast<uint32_t>(cached_ids_.size());
  slot.count = static_cast<uint16_t>(count);
  keys_ += word;
  cached_ids_.insert(cached_ids_.end(), ids, ids + count);
}

void BpeScratch::clear() {
  std::fill(slots_.begin(), slots_.end(), Slot{});
  keys_.clear();
  cached_ids_.clear();
}

Bpe::Bpe(
    std::vector<std::string> tokens,
    std::vector<bool> used,
    const std::vector<Merge>& merges,
    const Config& config)
    : tokens_(std::move(tokens)), used_(std::move(used)), config_(config) {
  index_.build(tokens_, used_);
  merges_.resize(power_of_two_above(2 * merges.size()));
  const size_t mask = merges_.size() - 1;
  for (const Merge& merge : merges) {
    const uint64_t pair = pair_key(merge.left, merge.right);
    size_t at = mix(pair) & mask;
    while (merges_[at].pair != UINT64_MAX && merges_[at].pair != pair) at = (at + 1) & mask;
    merges_[at] = {pair, merge.rank, merge.id};
  }
  for (int b = 0; b < 256; ++b) {
    char spelling[8];
    std::snprintf(spelling, sizeof spelling, "<0x%02X>", b);
    fallback_ids_[b] = find(spelling).value_or(-1);
    alphabet_ids_[b] = find(byte_level_char(static_cast<unsigned char>(b))).value_or(-1);
  }
}

const Bpe::MergeSlot* Bpe::find_merge(int32_t left, int32_t right) const {
  const uint64_t pair = pair_key(left, right);
  const size_t mask = merges_.size() - 1;
  for (size_t at = mix(pair) & mask; merges_[at].pair != UINT64_MAX; at = (at + 1) & mask) {
    if (merges_[at].pair == pair) return &merges_[at];
  }
  return nullptr;
}

// One symbol a character. An unknown one is spelt in byte tokens, or is <unk> (a run of them one
// <unk> under fuse_unk), or vanishes, in this order. A pending <unk> is written only before the
// next known character: so does the reference, also when byte tokens come between.
void Bpe::first_symbols(std::string_view word, std::vector<int32_t>& ids) const {
  bool pending_unk = false;
  for (size_t pos = 0; pos < word.size();) {
    const uint32_t n = config_.byte_level ? 1 : utf8_length(static_cast<unsigned char>(word[pos]));
    const std::string_view c = word.substr(pos, n);
    pos += n;
    const int32_t id =
        config_.byte_level ? alphabet_ids_[static_cast<unsigned char>(c[0])] : find(c).value_or(-1);
    if (id >= 0) {
      if (pending_unk) ids.push_back(*config_.unk_id);
      pending_unk = false;
      ids.push_back(id);
      continue;
    }
    if (config_.byte_fallback) {
      const std::string& spelt =
          config_.byte_level ? byte_level_char(static_cast<unsigned char>(c[0])) : std::string();
      const std::string_view bytes = config_.byte_level ? std::string_view(spelt) : c;
      const bool all = std::all_of(bytes.begin(), bytes.end(), [&](char b) {
        return fallback_ids_[static_cast<unsigned char>(b)] >= 0;
      });
      if (all) {
        for (const char b : bytes) ids.push_back(fallback_ids_[static_cast<unsigned char>(b)]);
        continue;
      }
    }
    if (!config_.unk_id) continue;
    if (pending_unk && !config_.fuse_unk) ids.push_back(*config_.unk_id);
    pending_unk = true;
  }
  if (pending_unk) ids.push_back(*config_.unk_id);
}

void Bpe::merge_short(BpeScratch& scratch) const {
  auto& ids = scratch.ids;
  auto& ranks = scratch.ranks;
  const auto rank_at = [&](size_t i) {
    const MergeSlot* merge = i + 1 < ids.size() ? find_merge(ids[i], ids[i + 1]) : nullptr;
    return merge ? merge->rank : UINT32_MAX;
  };
  ranks.resize(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) ranks[i] = rank_at(i);
  while (ids.size() > 1) {
    const size_t i = std::min_element(ranks.begin(), ranks.end()) - ranks.begin();
    if (ranks[i] == UINT32_MAX) break;
    ids[i] = find_merge(ids[i], ids[i + 1])->id;
    ids.erase(ids.begin() + i + 1);
    ranks.erase(ranks.begin() + i + 1);
    ranks[i] = rank_at(i);
    if (i > 0) ranks[i - 1] = rank_at(i - 1);
  }
}

void Bpe::merge_long(BpeScratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  const auto n = static_cast<int32_t>(scratch.ids.size());
  symbols.clear();
  heap.clear();
  for (int32_t i = 0; i < n; ++i) {
    symbols.push_back({scratch.ids[i], i - 1, i + 1 < n ? i + 1 : -1});
  }
  const auto candidate = [&](int32_t left) {
    const int32_t right = symbols[left].next;
    if (right < 0) return false;
    const MergeSlot* merge = find_merge(symbols[left].id, symbols[right].id);
    if (!merge) return false;
    heap.push_back({merge->rank, left, symbols[left].id, symbols[right].id, merge->id});
    return true;
  };
  for (int32_t i = 0; i < n; ++i) candidate(i);
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const auto best = heap.back();
    heap.pop_back();
    auto& left = symbols[best.left];
    if (left.id != best.left_id || left.next < 0) continue;
    auto& right = symbols[left.next];
    if (right.id != best.right_id) continue;
    left.id = best.id;
    right.id = -1;
    left.next = right.next;
    if (right.next >= 0) symbols[right.next].previous = best.left;
    if (left.previous >= 0 && candidate(left.previous)) std::push_heap(heap.begin(), heap.end());
    if (candidate(best.left)) std::push_heap(heap.begin(), heap.end());
  }
  scratch.ids.clear();
  for (int32_t i = n > 0 ? 0 : -1; i >= 0; i = symbols[i].next) {
    scratch.ids.push_back(symbols[i].id);
  }
}

void Bpe::encode(
    std::string_view word,
    const std::vector<bool>* forbidden,
    BpeScratch& scratch,
    std::vector<int32_t>& out) const {
  const bool cached = word.size() <= kMaxCachedWord && !forbidden;
  const uint64_t hash = cached ? hash_bytes(word) : 0;
  if (cached && scratch.find(word, hash, out)) return;
  auto& ids = scratch.ids;
  ids.clear();
  if (config_.ignore_merges) {
    std::string spelling;
    if (config_.byte_level) {
      for (const char b : word) spelling += byte_level_char(static_cast<unsigned char>(b));
    } else {
      spelling = word;
    }
    const auto id = find(spelling);
    if (id && !(forbidden && (*forbidden)[*id])) ids.push_back(*id);
  }
  if (ids.empty()) {
    first_symbols(word, ids);
    if (ids.size() <= kShortWord) {
      merge_short(scratch);
    } else {
      merge_long(scratch);
    }
  }
  out.insert(out.end(), ids.begin(), ids.end());
  if (cached) scratch.store(word, hash, ids.data(), ids.size());
}

}  // namespace metal_lora::text
