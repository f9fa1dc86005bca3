// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "src/text/added_tokens.h"
#include "src/text/bpe.h"
#include "src/text/normalizer.h"
#include "src/text/pre_tokenizer.h"
#include "src/text/token_decoder.h"

namespace metal_lora::text {

/// What one running encode() needs: buffers and the cache of words already seen.
struct EncodeScratch {
  BpeScratch bpe;
  Pieces pieces;
  std::vector<Stretch> outer, inner;
  std::string normalized;
};

/// Hands each running encode() its own scratch and keeps it warm for the next one.
class ScratchPool {
 public:
  std::unique_ptr<EncodeScratch> take();
  void give_back(std::unique_ptr<EncodeScratch> scratch);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<EncodeScratch>> idle_;
};

/// Everything a tokenizer file says. Immutable but for the pool, which locks.
struct TokenizerModel {
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe bpe;
  AddedTokens added;
  TokenDecoder decoder;
  std::vector<int32_t> prefix, suffix;  ///< what add_special_tokens puts around
  std::optional<int32_t> bos, eos, pad;
  std::set<int32_t> eos_ids;

  // Derived by finish().
  std::unordered_map<int32_t, size_t> added_by_id;  ///< index into added.tokens()
  std::unordered_map<std::string, int32_t> added_by_content;
  std::vector<bool> special;  ///< by id
  int32_t vocab_size = 0;
  mutable ScratchPool pool;

  /// Fills what is derived; the last step of every loader.
  void finish();
  const std::string* spelling(int32_t id) const;
};

/// The largest id a file may name: far above any vocabulary, far below what would exhaust memory.
inline constexpr int64_t kMaxTokenId = (1 << 22) - 1;

}  // namespace metal_lora::text
