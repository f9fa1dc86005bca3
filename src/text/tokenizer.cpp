// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/text/tokenizer.h"

#include <algorithm>

#include "src/io/gguf.h"
#include "src/text/tokenizer_model.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

constexpr size_t kIdleScratch = 8;    // about 2 MB each
constexpr size_t kContextTokens = 8;  // what a decoder may strip from the first tokens

class BorrowedScratch {
 public:
  explicit BorrowedScratch(ScratchPool& pool) : pool_(pool), scratch_(pool.take()) {}
  ~BorrowedScratch() { pool_.give_back(std::move(scratch_)); }
  BorrowedScratch(const BorrowedScratch&) = delete;
  BorrowedScratch& operator=(const BorrowedScratch&) = delete;
  EncodeScratch& operator*() { return *scratch_; }

 private:
  ScratchPool& pool_;
  std::unique_ptr<EncodeScratch> scratch_;
};

void encode_plain(
    const TokenizerModel& model,
    std::string_view text,
    bool at_start,
    const std::vector<bool>* forbidden,
    EncodeScratch& scratch,
    std::vector<int32_t>& out) {
  text = model.pre_tokenizer.apply(text, at_start, scratch.pieces);
  for (const auto& [begin, end] : scratch.pieces.cuts) {
    model.bpe.encode(text.substr(begin, end - begin), forbidden, scratch.bpe, out);
  }
}

// Text between the added tokens that are sought in raw text.
void encode_stretch(
    const TokenizerModel& model,
    std::string_view text,
    bool at_start,
    SpecialText special,
    EncodeScratch& scratch,
    std::vector<int32_t>& out) {
  const auto* forbidden = special == SpecialText::literal ? &model.special : nullptr;
  if (!model.normalizer.empty()) {
    scratch.normalized = text;
    model.normalizer.apply(scratch.normalized);
    text = scratch.normalized;
  }
  if (!model.added.has_normalized()) {
    encode_plain(model, text, at_start, forbidden, scratch, out);
    return;
  }
  scratch.inner.clear();
  model.added.split(text, true, special == SpecialText::parse, scratch.inner);
  for (const Stretch& s : scratch.inner) {
    if (s.id >= 0) {
      out.push_back(s.id);
      continue;
    }
    const auto part = text.substr(s.begin, s.end - s.begin);
    encode_plain(model, part, at_start && s.begin == 0, forbidden, scratch, out);
  }
}

std::vector<std::string> spellings(
    const TokenizerModel& model, std::span<const int32_t> ids, bool skip_special) {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const int32_t id : ids) {
    const std::string* token = model.spelling(id);
    if (!token || (skip_special && model.special[id])) continue;
    tokens.push_back(*token);
  }
  return tokens;
}

}  // namespace

std::unique_ptr<EncodeScratch> ScratchPool::take() {
  {
    const std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      auto scratch = std::move(idle_.back());
      idle_.pop_back();
      return scratch;
    }
  }
  return std::make_unique<EncodeScratch>();
}

void ScratchPool::give_back(std::unique_ptr<EncodeScratch> scratch) {
  const std::lock_guard lock(mutex_);
  if (idle_.size() < kIdleScratch) idle_.push_back(std::move(scratch));
}

void TokenizerModel::finish() {
  int32_t largest = static_cast<int32_t>(bpe.tokens().size()) - 1;
  for (const auto& token : added.tokens()) largest = std::max(largest, token.id);
  vocab_size = largest + 1;
  special.assign(static_cast<size_t>(vocab_size), false);
  for (size_t i = 0; i < added.tokens().size(); ++i) {
    const AddedToken& token = added.tokens()[i];
    added_by_id.emplace(token.id, i);
    added_by_content.emplace(token.content, token.id);
    if (token.special) special[token.id] = true;
  }
  if (eos) eos_ids.insert(*eos);
}

const std::string* TokenizerModel::spelling(int32_t id) const {
  if (const auto it = added_by_id.find(id); it != added_by_id.end()) {
    return &added.tokens()[it->second].decoded;
  }
  return bpe.has(id) ? &bpe.tokens()[id] : nullptr;
}

std::vector<int32_t> Tokenizer::encode(
    std::string_view text, bool add_special_tokens, SpecialText special) const {
  const TokenizerModel& model = *model_;
  std::string repaired;
  if (!is_valid_utf8(text)) {
    repaired = replace_invalid_utf8(text);
    text = repaired;
  }
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 4 + 8);
  if (add_special_tokens) ids = model.prefix;
  BorrowedScratch borrowed(model.pool);
  EncodeScratch& scratch = *borrowed;
  scratch.outer.clear();
  model.added.split(text, false, special == SpecialText::parse, scratch.outer);
  for (const Stretch& s : scratch.outer) {
    if (s.id >= 0) {
      ids.push_back(s.id);
    } else {
      encode_stretch(
          model, text.substr(s.begin, s.end - s.begin), s.begin == 0, special, scratch, ids);
    }
  }
  if (add_special_tokens) ids.insert(ids.end(), model.suffix.begin(), model.suffix.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  return model_->decoder.decode(spellings(*model_, ids, skip_special));
}

std::optional<int32_t> Tokenizer::token_to_id(std::string_view token) const {
  const auto it = model_->added_by_content.find(std::string(token));
  return it != model_->added_by_content.end() ? it->second : model_->bpe.find(token);
}

std::optional<std::string> Tokenizer::id_to_token(int32_t id) const {
  const std::string* token = model_->spelling(id);
  return token ? std::optional(*token) : std::nullopt;
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < model_->vocab_size && model_->special[id];
}

int32_t Tokenizer::vocab_size() const {
  return model_->vocab_size;
}

std::optional<int32_t> Tokenizer::bos_id() const {
  return model_->bos;
}

std::optional<int32_t> Tokenizer::eos_id() const {
  return model_->eos;
}

std::optional<int32_t> Tokenizer::pad_id() const {
  return model_->pad;
}

std::string Tokenizer::bos_token() const {
  return model_->bos ? id_to_token(*model_->bos).value_or("") : "";
}

std::string Tokenizer::eos_token() const {
  return model_->eos ? id_to_token(*model_->eos).value_or("") : "";
}

const std::set<int32_t>& Tokenizer::eos_ids() const {
  return model_->eos_ids;
}

bool Tokenizer::adds_bos() const {
  return model_->bos && !model_->prefix.empty() && model_->prefix.front() == *model_->bos;
}

StreamingDecoder::StreamingDecoder(Tokenizer tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

std::string StreamingDecoder::push(int32_t id) {
  const TokenizerModel& model = tokenizer_.model();
  const std::string* token = model.spelling(id);
  if (!token || token->empty() || (skip_special_ && model.special[id])) return {};
  // The first tokens of a text may lose a space, so the new one is read behind some context; what
  // it adds is what the context alone did not give.
  const std::string before = model.decoder.decode_bytes(spellings(model, context_, skip_special_));
  context_.push_back(id);
  const std::string after = model.decoder.decode_bytes(spellings(model, context_, skip_special_));
  if (context_.size() > kContextTokens) context_.erase(context_.begin());
  held_bytes_.append(after, std::min(before.size(), after.size()));
  const size_t complete = complete_utf8_bytes(held_bytes_);
  std::string text = replace_invalid_utf8(std::string_view(held_bytes_).substr(0, complete));
  held_bytes_.erase(0, complete);
  return text;
}

std::string StreamingDecoder::flush() {
  std::string text = replace_invalid_utf8(held_bytes_);
  held_bytes_.clear();
  context_.clear();
  return text;
}

}  // namespace metal_lora::text
