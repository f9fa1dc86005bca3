// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <system_error>

#include "src/io/gguf.h"
#include "src/io/mapped_file.h"
#include "src/text/json_fields.h"
#include "src/text/tokenizer.h"
#include "src/text/tokenizer_model.h"
#include "src/text/utf8.h"

namespace metal_lora::text {

namespace {

using io::Json;

// Gemma's file, the largest in use, has 33 MB.
constexpr uint64_t kMaxTokenizerBytes = uint64_t{96} << 20;
constexpr uint64_t kMaxConfigBytes = uint64_t{16} << 20;
constexpr size_t kMaxAddedTokens = 65536;
constexpr size_t kMaxAddedBytes = 1024;
constexpr size_t kMaxTemplateTokens = 16;

Json parse(std::string_view text, const std::string& where, uint64_t max_bytes) {
  return io::unwrap(io::parse_json(text, where, {.max_bytes = max_bytes}));
}

std::string read_text(const std::filesystem::path& path) {
  const auto file = io::unwrap(io::MappedFile::open(path.string()));
  const auto bytes = file->bytes();
  if (bytes.size() > kMaxTokenizerBytes) {
    throw Error(
        ErrorCode::invalid_input,
        "[" + path.string() + "] must have at most 96 MiB but has " + std::to_string(bytes.size()) +
            " bytes");
  }
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<bool> used;
};

Vocabulary read_vocabulary(const Json& model, const std::string& where) {
  const Json& vocab = field(model, "vocab", where);
  if (!vocab.is_object()) wrong_field(where, "vocab", "an object", &vocab);
  Vocabulary out;
  // Ids may have gaps, but a file of n tokens cannot ask for memory of another order.
  const int64_t limit =
      std::min<int64_t>(kMaxTokenId, 4 * static_cast<int64_t>(vocab.size()) + 65536);
  for (const auto& [token, id] : vocab.items()) {
    const int64_t value =
        id.is_number_integer() && !(id.is_number_unsigned() && id.get<uint64_t>() > INT32_MAX)
            ? id.get<int64_t>()
            : -1;
    if (value < 0 || value > limit) {
      throw Error(
          ErrorCode::invalid_input,
          "[" + where + ".vocab] ids must be from 0 to " + std::to_string(limit) + " but \"" +
              token.substr(0, 100) + "\" has " + io::describe_json(&id));
    }
    if (out.tokens.size() <= static_cast<size_t>(value)) {
      out.tokens.resize(value + 1);
      out.used.resize(value + 1);
    }
    if (out.used[value]) {
      throw Error(
          ErrorCode::invalid_input,
          "[" + where + ".vocab] ids must be unique but " + std::to_string(value) +
              " occurs twice");
    }
    out.tokens[value] = token;
    out.used[value] = true;
  }
  return out;
}

std::pair<std::string, std::string> merge_sides(const Json& merge, const std::string& where) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  }
  if (merge.is_string()) {
    const std::string text = merge.get<std::string>();
    const size_t space = text.find(' ');
    if (space != std::string::npos && text.find(' ', space + 1) == std::string::npos) {
      return {text.substr(0, space), text.substr(space + 1)};
    }
  }
  throw Error(
      ErrorCode::invalid_input,
      "[" + where + "] must be \"left right\" or two strings but is " + io::describe_json(&merge));
}

std::vector<Bpe::Merge> read_merges(
    const Json& model, const Vocabulary& vocabulary, const std::string& where) {
  TokenIndex index;
  index.build(vocabulary.tokens, vocabulary.used);
  const auto id_of = [&](const std::string& token, size_t rank) {
    const auto id = index.find(vocabulary.tokens, token);
    if (!id) {
      throw Error(
          ErrorCode::invalid_input,
          "[" + where + ".merges[" + std::to_string(rank) +
              "]] must name tokens of the vocabulary " + "but \"" + token.substr(0, 100) +
              "\" is none");
    }
    return *id;
  };
  std::vector<Bpe::Merge> merges;
  const Json& list = array_field(model, "merges", where);
  merges.reserve(list.size());
  for (size_t rank = 0; rank < list.size(); ++rank) {
    const auto [left, right] =
        merge_sides(list[rank], where + ".merges[" + std::to_string(rank) + "]");
    merges.push_back(
        {id_of(left, rank),
         id_of(right, rank),
         id_of(left + right, rank),
         static_cast<uint32_t>(rank)});
  }
  return merges;
}

bool is_empty_or_null(const Json& value) {
  return value.is_null() || (value.is_string() && value.get_ref<const std::string&>().empty());
}

Bpe read_model(const Json& json, bool byte_level, const std::string& where) {
  const Json& type = field(json, "type", where);
  // Files of old versions name no type; what has merges is BPE.
  if (!(type.is_null() && field(json, "merges", where).is_array())) {
    const std::string name = string_field(json, "type", where);
    if (name != "BPE") refuse(where + ".type", name);
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& value = field(json, key, where);
    if (!is_empty_or_null(value)) refuse(where + "." + key, value.dump());
  }
  const Json& dropout = field(json, "dropout", where);
  if (!dropout.is_null() && !(dropout.is_number() && dropout.get<double>() == 0)) {
    refuse(where + ".dropout", dropout.dump());
  }
  Vocabulary vocabulary = read_vocabulary(json, where);
  const auto merges = read_merges(json, vocabulary, where);
  Bpe::Config config;
  config.byte_level = byte_level;
  config.byte_fallback = bool_field(json, "byte_fallback", false, where);
  config.fuse_unk = bool_field(json, "fuse_unk", false, where);
  config.ignore_merges = bool_field(json, "ignore_merges", false, where);
  if (!field(json, "unk_token", where).is_null()) {
    const std::string unk = string_field(json, "unk_token", where);
    const auto at = std::find(vocabulary.tokens.begin(), vocabulary.tokens.end(), unk);
    if (at != vocabulary.tokens.end() && vocabulary.used[at - vocabulary.tokens.begin()]) {
      config.unk_id = static_cast<int32_t>(at - vocabulary.tokens.begin());
    } else if (!unk.empty()) {
      throw Error(
          ErrorCode::invalid_input,
          "[" + where + ".unk_token] must be in the vocabulary but \"" + unk.substr(0, 100) +
              "\" is not");
    }
  }
  return Bpe(std::move(vocabulary.tokens), std::move(vocabulary.used), merges, config);
}

std::vector<AddedToken> read_added(const Json& root, const Bpe& bpe, const std::string& where) {
  std::vector<AddedToken> out;
  if (field(root, "added_tokens", where).is_null()) return out;
  const Json& list = array_field(root, "added_tokens", where);
  if (list.size() > kMaxAddedTokens) {
    throw Error(
        ErrorCode::invalid_input,
        "[" + where + ".added_tokens] must be at most 65536 but are " +
            std::to_string(list.size()));
  }
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string here = where + ".added_tokens[" + std::to_string(i) + "]";
    AddedToken token;
    token.content = string_field(list[i], "content", here);
    if (token.content.empty()) continue;  // the reference ignores it, too
    if (token.content.size() > kMaxAddedBytes) {
      wrong_field(here, "content", "at most 1024 bytes", &field(list[i], "content", here));
    }
    token.id = static_cast<int32_t>(int_field(list[i], "id", 0, kMaxTokenId, here));
    if (const auto known = bpe.find(token.content)) token.id = *known;
    token.single_word = bool_field(list[i], "single_word", false, here);
    token.lstrip = bool_field(list[i], "lstrip", false, here);
    token.rstrip = bool_field(list[i], "rstrip", false, here);
    token.special = bool_field(list[i], "special", false, here);
    token.normalized = bool_field(list[i], "normalized", !token.special, here);
    out.push_back(std::move(token));
  }
  return out;
}

// The ids that one {"SpecialToken": {"id": name}} of a template stands for.
std::vector<int32_t> template_ids(
    const Json& processor, const std::string& name, const std::string& where) {
  const Json& special = field(field(processor, "special_tokens", where), name.c_str(), where);
  std::vector<int32_t> ids;
  for (const Json& id : array_field(special, "ids", where + ".special_tokens." + name)) {
    const bool fits = id.is_number_unsigned() && id.get<uint64_t>() <= uint64_t{kMaxTokenId};
    if (!fits || ids.size() >= kMaxTemplateTokens) {
      throw Error(
          ErrorCode::invalid_input,
          "[" + where + ".special_tokens] must be few token ids but has " + io::describe_json(&id));
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

int32_t processor_token(const Json& processor, const char* key, const std::string& where) {
  const Json& pair = array_field(processor, key, where);
  if (pair.size() != 2 || !pair[1].is_number_unsigned() ||
      pair[1].get<uint64_t>() > uint64_t{kMaxTokenId}) {
    wrong_field(where, key, "[token, id]", &pair);
  }
  return pair[1].get<int32_t>();
}

void read_processor(
    const Json& json, const std::string& where, int nesting, TokenizerModel& model) {
  if (json.is_null()) return;
  const std::string type = string_field(json, "type", where);
  if (type == "ByteLevel") return;  // moves offsets only
  if (type == "Sequence" && nesting < 8) {
    for (const Json& item : array_field(json, "processors", where)) {
      read_processor(item, where, nesting + 1, model);
    }
    return;
  }
  std::vector<int32_t> before, after;
  if (type == "TemplateProcessing") {
    bool seen_text = false;
    for (const Json& item : array_field(json, "single", where)) {
      if (item.is_object() && item.contains("Sequence")) {
        if (seen_text) refuse(where + ".single", "two Sequences");
        seen_text = true;
        continue;
      }
      const std::string name =
          string_field(field(item, "SpecialToken", where), "id", where + ".single");
      auto& side = seen_text ? after : before;
      for (const int32_t id : template_ids(json, name, where)) side.push_back(id);
      if (side.size() > kMaxTemplateTokens) refuse(where + ".single", "more than 16 tokens");
    }
    if (!seen_text) refuse(where + ".single", "no Sequence");
  } else if (type == "RobertaProcessing" || type == "BertProcessing") {
    before.push_back(processor_token(json, "cls", where));
    after.push_back(processor_token(json, "sep", where));
  } else {
    refuse(where + ".type", type);
  }
  model.prefix.insert(model.prefix.begin(), before.begin(), before.end());
  model.suffix.insert(model.suffix.end(), after.begin(), after.end());
  if (model.prefix.size() + model.suffix.size() > 8 * kMaxTemplateTokens) {
    refuse(where, "too many tokens");
  }
}

// tokenizer_config.json gives a token as its spelling or as an object with "content".
std::optional<int32_t> config_token(
    const Json& config, const char* key, const TokenizerModel& model, const std::string& where) {
  const Json* value = &field(config, key, where);
  if (value->is_object()) value = &field(*value, "content", where);
  if (!value->is_string()) return std::nullopt;
  const auto& spelling = value->get_ref<const std::string&>();
  const auto added = model.added_by_content.find(spelling);
  return added != model.added_by_content.end() ? added->second : model.bpe.find(spelling);
}

// Without a configuration, the template's first token is BOS if it has the looks of one.
void guess_bos(TokenizerModel& model) {
  if (model.prefix.size() == 1) model.bos = model.prefix.front();
}

}  // namespace

Tokenizer Tokenizer::from_json_text(
    std::string_view tokenizer_json,
    std::string_view tokenizer_config_json,
    const std::string& where) {
  const Json root = parse(tokenizer_json, where, kMaxTokenizerBytes);
  auto model = std::make_shared<TokenizerModel>();
  model->normalizer =
      Normalizer::from_json(field(root, "normalizer", where), where + ": normalizer");
  model->pre_tokenizer =
      PreTokenizer::from_json(field(root, "pre_tokenizer", where), where + ": pre_tokenizer");
  const Json& bpe = field(root, "model", where);
  model->bpe = read_model(bpe, model->pre_tokenizer.byte_level(), where + ": model");
  model->added = AddedTokens(read_added(root, model->bpe, where), model->normalizer);
  model->decoder = TokenDecoder::from_json(field(root, "decoder", where), where + ": decoder");
  read_processor(field(root, "post_processor", where), where + ": post_processor", 0, *model);
  model->finish();
  guess_bos(*model);
  if (!tokenizer_config_json.empty()) {
    const std::string name = "tokenizer_config.json";
    const Json config = parse(tokenizer_config_json, name, kMaxConfigBytes);
    if (const auto id = config_token(config, "bos_token", *model, name)) model->bos = id;
    model->eos = config_token(config, "eos_token", *model, name);
    model->pad = config_token(config, "pad_token", *model, name);
    if (model->eos) model->eos_ids.insert(*model->eos);
  }
  return Tokenizer(std::move(model));
}

Tokenizer Tokenizer::from_json(
    const std::filesystem::path& tokenizer_json,
    const std::optional<std::filesystem::path>& tokenizer_config_json) {
  const std::string config = tokenizer_config_json ? read_text(*tokenizer_config_json) : "";
  return from_json_text(read_text(tokenizer_json), config, tokenizer_json.string());
}

Tokenizer Tokenizer::from_path(const std::filesystem::path& model_path) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(model_path, ignored)) {
    return from_gguf(io::unwrap(io::read_gguf(model_path.string())));
  }
  const auto config = model_path / "tokenizer_config.json";
  const bool configured = std::filesystem::exists(config, ignored);
  return from_json(
      model_path / "tokenizer.json", configured ? std::optional(config) : std::nullopt);
}

}  // namespace metal_lora::text
