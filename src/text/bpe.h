// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace metal_lora::text {

/// Spelling → id over strings held elsewhere; open addressing, 8 bytes an entry at half load.
class TokenIndex {
 public:
  /// `tokens[id]` is the spelling; ids where `used` is false are left out, and of two equal
  /// spellings the first stays.
  void build(const std::vector<std::string>& tokens, const std::vector<bool>& used);
  std::optional<int32_t> find(
      const std::vector<std::string>& tokens, std::string_view spelling) const;

 private:
  std::vector<int32_t> slots_;
};

/// What encode() reuses between words and calls. One per running thread.
class BpeScratch {
 public:
  BpeScratch();

  struct Symbol {
    int32_t id, previous, next;
  };
  struct Candidate {
    uint32_t rank;
    int32_t left, left_id, right_id, id;
    // std::push_heap keeps the greatest in front: the lowest rank, then the leftmost.
    bool operator<(const Candidate& o) const {
      return rank != o.rank ? rank > o.rank : left > o.left;
    }
  };
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
  std::vector<int32_t> ids;
  std::vector<uint32_t> ranks;

  /// The cached ids of a word; false where there are none. Bounded: a full cache starts over.
  bool find(std::string_view word, uint64_t hash, std::vector<int32_t>& out) const;
  void store(std::string_view word, uint64_t hash, const int32_t* ids, size_t count);
  void clear();

 private:
  struct Slot {
    uint64_t hash = 0;
    uint32_t key = 0, first_id = 0;
    uint16_t key_bytes = 0, count = 0;
  };
  std::vector<Slot> slots_;
  std::string keys_;
  std::vector<int32_t> cached_ids_;
};

/// Byte-pair encoding: a vocabulary and ranked merges. Immutable after construction.
class Bpe {
 public:
  struct Config {
    bool byte_level = false;     ///< words are bytes of GPT-2's alphabet
    bool byte_fallback = false;  ///< unknown characters become <0x0A> tokens
    bool fuse_unk = false;
    bool ignore_merges = false;  ///< a word that is a token is that token (Llama 3)
    std::optional<int32_t> unk_id;
  };
  struct Merge {
    int32_t left, right, id;
    uint32_t rank;
  };

  Bpe() = default;
  /// `tokens[id]`, `used[id]`: the vocabulary. Of merges with one (left, right) the last counts.
  Bpe(std::vector<std::string> tokens,
      std::vector<bool> used,
      const std::vector<Merge>& merges,
      const Config& config);

  /// Appends the ids of one word. `forbidden` (one flag per id, or null): whole-word matches of
  /// these ids are not taken.
  void encode(
      std::string_view word,
      const std::vector<bool>* forbidden,
      BpeScratch& scratch,
      std::vector<int32_t>& out) const;

  std::optional<int32_t> find(std::string_view spelling) const {
    return index_.find(tokens_, spelling);
  }
  const std::vector<std::string>& tokens() const { return tokens_; }
  bool has(int32_t id) const { return id >= 0 && size_t(id) < used_.size() && used_[id]; }

 private:
  struct MergeSlot {
    uint64_t pair = UINT64_MAX;
    uint32_t rank = 0;
    int32_t id = 0;
  };

  const MergeSlot* find_merge(int32_t left, int32_t right) const;
  void first_symbols(std::string_view word, std::vector<int32_t>& ids) const;
  void merge_short(BpeScratch& scratch) const;
  void merge_long(BpeScratch& scratch) const;

  std::vector<std::string> tokens_;
  std::vector<bool> used_;
  TokenIndex index_;
  std::vector<MergeSlot> merges_;
  Config config_;
  std::array<int32_t, 256> alphabet_ids_{};  ///< byte-level: id of each byte's character, or -1
  std::array<int32_t, 256> fallback_ids_{};  ///< id of <0xXX>, or -1
};

}  // namespace metal_lora::text
