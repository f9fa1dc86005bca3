// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>

#include "metal_lora/error.h"
#include "src/io/gguf.h"
#include "src/text/tokenizer.h"
#include "src/text/tokenizer_model.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

using Step = PreTokenizer::Step;

// tokenizer.ggml.token_type
constexpr int32_t kTypeUnknown = 2, kTypeControl = 3, kTypeUserDefined = 4, kTypeUnused = 5;

constexpr const char* kSpaceMark = "\xE2\x96\x81";  // U+2581

constexpr const char* kLlama3Expression =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr const char* kQwen2Expression =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr const char* kQwen35Expression =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}|"
    " ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
// llama.cpp's "default": punctuation apart, GPT-2's words, numbers in threes.
constexpr const char* kPunctuationExpression = "[\\p{P}\\$\\+<=>\\^~\\|]+";
constexpr const char* kThreeDigits = "[0-9][0-9][0-9]";

struct Family {
  const char* pre;
  std::vector<Step> (*steps)();
  bool nfc;
  bool ignore_merges;
  bool adds_bos;  ///< where the file does not say
};

std::vector<Step> gpt2_steps() {
  return {PreTokenizer::byte_level_step(false, true)};
}

std::vector<Step> digit_steps() {
  return {PreTokenizer::digits_step(true), PreTokenizer::byte_level_step(false, true)};
}

std::vector<Step> one_expression(const char* expression) {
  return {PreTokenizer::split_step(expression), PreTokenizer::byte_level_step(false, false)};
}

std::vector<Step> llama3_steps() {
  return one_expression(kLlama3Expression);
}

std::vector<Step> qwen2_steps() {
  return one_expression(kQwen2Expression);
}

std::vector<Step> qwen35_steps() {
  return one_expression(kQwen35Expression);
}

std::vector<Step> default_steps() {
  return {
      PreTokenizer::split_step(kPunctuationExpression),
      PreTokenizer::split_step(
          "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)"),
      PreTokenizer::digits_step(false),
      PreTokenizer::split_step(kThreeDigits),
      PreTokenizer::byte_level_step(false, false)};
}

constexpr Family kFamilies[] = {
    {"default", default_steps, false, false, false},
    {"gpt-2", gpt2_steps, false, false, false},
    {"mpt", gpt2_steps, false, false, false},
    {"phi-2", gpt2_steps, false, false, false},
    {"olmo", gpt2_steps, false, false, false},
    {"smollm", digit_steps, false, false, false},
    {"starcoder", digit_steps, false, false, false},
    {"refact", digit_steps, false, false, false},
    {"command-r", digit_steps, true, false, false},
    {"llama-bpe", llama3_steps, false, true, true},
    {"llama3", llama3_steps, false, true, true},
    {"llama-v3", llama3_steps, false, true, true},
    {"dbrx", llama3_steps, false, false, false},
    {"smaug-bpe", llama3_steps, false, false, false},
    {"qwen2", qwen2_steps, true, false, false},
    {"deepseek-r1-qwen", qwen2_steps, true, false, false},
    {"qwen35", qwen35_steps, true, false, false},
};

const Family& family(const std::string& pre, const std::string& path) {
  for (const Family& f : kFamilies) {
    if (pre == f.pre) return f;
  }
  throw Error(
      ErrorCode::unsupported,
      "[" + path + ", tokenizer.ggml.pre] must be a kind this program knows but is \"" +
          pre.substr(0, 100) + "\"");
}

struct GgufVocabulary {
  std::vector<std::string> tokens;
  std::vector<bool> used;  ///< takes part in merging
  std::vector<AddedToken> added;
  std::optional<int32_t> unk;
};

GgufVocabulary read_vocabulary(const io::GgufFile& file, bool special_unk) {
  const auto views = io::unwrap(file.get_string_array("tokenizer.ggml.tokens"));
  std::vector<int32_t> types;
  if (file.has("tokenizer.ggml.token_type")) {
    types = io::unwrap(file.get_i32_array("tokenizer.ggml.token_type"));
  }
  if (views.empty() || views.size() > size_t{kMaxTokenId} + 1 ||
      (!types.empty() && types.size() != views.size())) {
    throw Error(
        ErrorCode::invalid_input,
        "[" + file.path() + ", tokenizer.ggml.tokens] must be tokens with one type each but are " +
            std::to_string(views.size()) + " with " + std::to_string(types.size()) + " types");
  }
  GgufVocabulary out;
  out.tokens.assign(views.begin(), views.end());
  out.used.assign(views.size(), true);
  for (size_t id = 0; id < types.size(); ++id) {
    const int32_t type = types[id];
    const bool special = type == kTypeControl || (special_unk && type == kTypeUnknown);
    if (type == kTypeUnknown && !out.unk) out.unk = static_cast<int32_t>(id);
    if (type == kTypeUnused) continue;
    if (!special && type != kTypeUserDefined) continue;
    if (out.tokens[id].empty() || out.tokens[id].size() > 1024) continue;
    AddedToken token;
    token.id = static_cast<int32_t>(id);
    token.content = out.tokens[id];
    token.special = special;
    out.added.push_back(std::move(token));
  }
  return out;
}

// "left right"; a token may itself begin with a space, so the search starts behind the first byte.
std::vector<Bpe::Merge> read_merges(const io::GgufFile& file, const GgufVocabulary& vocabulary) {
  TokenIndex index;
  index.build(vocabulary.tokens, vocabulary.used);
  const auto lines = io::unwrap(file.get_string_array("tokenizer.ggml.merges"));
  std::vector<Bpe::Merge> merges;
  merges.reserve(lines.size());
  for (size_t rank = 0; rank < lines.size(); ++rank) {
    const size_t space = lines[rank].find(' ', 1);
    std::optional<int32_t> left, right, whole;
    if (space != std::string_view::npos) {
      const std::string a(lines[rank].substr(0, space)), b(lines[rank].substr(space + 1));
      left = index.find(vocabulary.tokens, a);
      right = index.find(vocabulary.tokens, b);
      whole = index.find(vocabulary.tokens, a + b);
    }
    if (!left || !right || !whole) {
      throw Error(
          ErrorCode::invalid_input,
          "[" + file.path() + ", tokenizer.ggml.merges[" + std::to_string(rank) +
              "]] must be \"left right\" of known tokens but is \"" +
              std::string(lines[rank].substr(0, 100)) + "\"");
    }
    merges.push_back({*left, *right, *whole, static_cast<uint32_t>(rank)});
  }
  return merges;
}

// SentencePiece stores a score for each token and no merges: any two tokens that join to a token
// may merge, best score first. Ranks are those that the conversion to tokenizer.json gives: by
// score, then longer left side, then longer right side. Cost: a lookup for each split of each
// token.
std::vector<Bpe::Merge> merges_from_scores(
    const io::GgufFile& file, const GgufVocabulary& vocabulary) {
  const auto scores = io::unwrap(file.get_f32_array("tokenizer.ggml.scores"));
  const auto& tokens = vocabulary.tokens;
  if (scores.size() != tokens.size()) {
    throw Error(
        ErrorCode::invalid_input,
        "[" + file.path() + ", tokenizer.ggml.scores] must be " + std::to_string(tokens.size()) +
            " but are " + std::to_string(scores.size()));
  }
  TokenIndex index;
  index.build(tokens, vocabulary.used);
  std::vector<Bpe::Merge> merges;
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string_view token = tokens[id];
    // Real tokens have at most 48 bytes here (runs of spaces); splits cost their square.
    if (token.size() > 256) continue;
    const size_t first = merges.size();
    for (size_t cut = 1; cut < token.size(); ++cut) {
      if ((static_cast<unsigned char>(token[cut]) & 0xC0) == 0x80) continue;
      const auto left = index.find(tokens, token.substr(0, cut));
      const auto right = left ? index.find(tokens, token.substr(cut)) : std::nullopt;
      if (right) merges.push_back({*left, *right, static_cast<int32_t>(id), 0});
    }
    std::sort(merges.begin() + first, merges.end(), [](const auto& a, const auto& b) {
      return std::pair(a.left, a.right) < std::pair(b.left, b.right);
    });
  }
  const auto length = [&](int32_t id) {
    return std::count_if(tokens[id].begin(), tokens[id].end(), [](char c) {
      return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    });
  };
  std::stable_sort(merges.begin(), merges.end(), [&](const auto& a, const auto& b) {
    if (scores[a.id] != scores[b.id]) return scores[a.id] > scores[b.id];
    const auto la = length(a.left), lb = length(b.left);
    return la != lb ? la > lb : length(a.right) > length(b.right);
  });
  for (size_t i = 0; i < merges.size(); ++i) merges[i].rank = static_cast<uint32_t>(i);
  return merges;
}

Normalizer space_normalizer(bool add_prefix) {
  std::vector<Normalizer::Step> steps;
  if (add_prefix) {
    steps.push_back({Normalizer::Kind::prepend, {}, kSpaceMark, false, false});
  }
  Pattern space;
  space.literal = " ";
  steps.push_back({Normalizer::Kind::replace, std::move(space), kSpaceMark, false, false});
  return Normalizer(std::move(steps));
}

TokenDecoder space_decoder(bool add_prefix) {
  using Kind = TokenDecoder::Kind;
  std::vector<TokenDecoder::Step> steps = {
      {Kind::replace, kSpaceMark, " ", 0, 0, false},
      {Kind::byte_fallback, {}, {}, 0, 0, false},
      {Kind::fuse, {}, {}, 0, 0, false}};
  if (add_prefix) steps.push_back({Kind::strip, " ", {}, 1, 0, false});
  return TokenDecoder(std::move(steps));
}

std::optional<int32_t> token_id(
    const io::GgufFile& file, const std::string& key, const TokenizerModel& model) {
  if (!file.has(key)) return std::nullopt;
  const uint32_t id = io::unwrap(file.get_u32(key));
  if (id >= static_cast<uint32_t>(model.vocab_size)) {
    throw Error(
        ErrorCode::invalid_input,
        "[" + file.path() + ", " + key + "] must be below " + std::to_string(model.vocab_size) +
            " but is " + std::to_string(id));
  }
  return static_cast<int32_t>(id);
}

void read_special_ids(
    const io::GgufFile& file, bool adds_bos, bool adds_eos, TokenizerModel& model) {
  model.bos = token_id(file, "tokenizer.ggml.bos_token_id", model);
  model.eos = token_id(file, "tokenizer.ggml.eos_token_id", model);
  model.pad = token_id(file, "tokenizer.ggml.padding_token_id", model);
  for (const char* key : {"eos", "eot", "eom"}) {
    const auto id = token_id(file, std::string("tokenizer.ggml.") + key + "_token_id", model);
    if (id) model.eos_ids.insert(*id);
  }
  if (io::unwrap(file.get_bool_or("tokenizer.ggml.add_bos_token", adds_bos)) && model.bos) {
    model.prefix.push_back(*model.bos);
  }
  if (io::unwrap(file.get_bool_or("tokenizer.ggml.add_eos_token", adds_eos)) && model.eos) {
    model.suffix.push_back(*model.eos);
  }
}

bool load_byte_level(const io::GgufFile& file, TokenizerModel& model) {
  const std::string pre(io::unwrap(file.get_string_or("tokenizer.ggml.pre", "default")));
  const Family& kind = family(pre, file.path());
  GgufVocabulary vocabulary = read_vocabulary(file, false);
  const auto merges = read_merges(file, vocabulary);
  Bpe::Config config;
  config.byte_level = true;
  config.ignore_merges = kind.ignore_merges;
  if (kind.nfc) {
    model.normalizer = Normalizer({{Normalizer::Kind::nfc, {}, {}, false, false}});
  }
  model.pre_tokenizer = PreTokenizer(kind.steps());
  model.bpe = Bpe(std::move(vocabulary.tokens), std::move(vocabulary.used), merges, config);
  model.added = AddedTokens(std::move(vocabulary.added), model.normalizer);
  model.decoder = TokenDecoder({{TokenDecoder::Kind::byte_level, {}, {}, 0, 0, false}});
  return kind.adds_bos;
}

void load_sentencepiece(const io::GgufFile& file, bool has_merges, TokenizerModel& model) {
  const bool add_prefix =
      io::unwrap(file.get_bool_or("tokenizer.ggml.add_space_prefix", !has_merges));
  GgufVocabulary vocabulary = read_vocabulary(file, true);
  const auto merges =
      has_merges ? read_merges(file, vocabulary) : merges_from_scores(file, vocabulary);
  Bpe::Config config;
  config.byte_fallback = true;
  config.fuse_unk = true;
  config.unk_id = vocabulary.unk;
  model.normalizer = space_normalizer(add_prefix);
  model.bpe = Bpe(std::move(vocabulary.tokens), std::move(vocabulary.used), merges, config);
  model.added = AddedTokens(std::move(vocabulary.added), model.normalizer);
  model.decoder = space_decoder(add_prefix);
}

}  // namespace

Tokenizer Tokenizer::from_gguf(const io::GgufFile& file) {
  const std::string kind(io::unwrap(file.get_string("tokenizer.ggml.model")));
  auto model = std::make_shared<TokenizerModel>();
  bool adds_bos = true;
  if (kind == "gpt2") {
    adds_bos = load_byte_level(file, *model);
  } else if (kind == "llama" || kind == "gemma4") {
    load_sentencepiece(file, kind == "gemma4", *model);
  } else {
    throw Error(
        ErrorCode::unsupported,
        "[" + file.path() + ", tokenizer.ggml.model] must be gpt2, llama or gemma4 but is \"" +
            kind.substr(0, 100) + "\"");
  }
  model->finish();
  read_special_ids(file, adds_bos, false, *model);
  return Tokenizer(std::move(model));
}

}  // namespace metal_lora::text
