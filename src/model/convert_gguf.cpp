// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A GGUF's metadata as the JSON files of a Hugging Face folder. Whatever has no such form is
// refused by name: a folder that loads must mean what the GGUF meant.
#include <algorithm>
#include <cmath>
#include <map>
#include <unordered_map>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/io/json.h"
#include "src/model/convert.h"
#include "src/model/loader.h"
#include "src/model/tensor_weight.h"

namespace metal_lora {
namespace {

using io::unwrap;
using nlohmann::ordered_json;

[[noreturn]] void unsupported(
    const io::GgufFile& file, const std::string& key, const std::string& got) {
  throw Error(
      ErrorCode::unsupported,
      fmt::format("[{}, {}] must have a Hugging Face form but is {}", file.path(), key, got));
}

/// The f32 as the shortest decimal that is the same f32.
double shortest(float value) {
  return std::stod(fmt::format("{}", value));
}

std::string architecture_class(const std::string& architecture) {
  static const std::map<std::string, std::string> kClasses = {
      {"llama", "LlamaForCausalLM"}, {"qwen2", "Qwen2ForCausalLM"}, {"qwen3", "Qwen3ForCausalLM"}};
  return kClasses.at(architecture);
}

// llama.cpp keeps Llama 3's scaling as one divisor per frequency. The three constants of the
// formula are Llama 3.1's; whether they give these divisors is checked by the caller.
ordered_json llama3_scaling(const io::GgufFile& file, const io::TensorInfo& tensor, int head_dim) {
  const auto factors = tensor_vector(tensor, file.path() + ": " + tensor.name, head_dim / 2);
  const float* values = factors.data<float>();
  return {
      {"rope_type", "llama3"},
      {"factor", shortest(*std::max_element(values, values + head_dim / 2))},
      {"low_freq_factor", 1.0},
      {"high_freq_factor", 4.0},
      {"original_max_position_embeddings", 8192}};
}

ordered_json rope_scaling(
    const io::GgufFile& file, const ModelConfig& config, const std::string& arch) {
  if (const auto* tensor = file.find("rope_freqs.weight")) {
    return llama3_scaling(file, *tensor, config.head_dim);
  }
  const std::string prefix = arch + ".rope.scaling.";
  const std::string type(unwrap(file.get_string_or(prefix + "type", "none")));
  if (type == "none") return nullptr;
  ordered_json json = {
      {"rope_type", type}, {"factor", shortest(unwrap(file.get_f32(prefix + "factor")))}};
  if (file.has(prefix + "original_context_length")) {
    json["original_max_position_embeddings"] =
        unwrap(file.get_u32(prefix + "original_context_length"));
  }
  return json;
}

/// The folder's reader must compute the same frequencies as the GGUF's.
void check_rope(const io::GgufFile& file, const ModelConfig& config, const ordered_json& json) {
  std::vector<float> wanted = config.inv_freq;
  if (const auto* tensor = file.find("rope_freqs.weight")) {
    const auto factors = tensor_vector(*tensor, file.path(), config.head_dim / 2);
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] /= factors.data<float>()[i];
  }
  const ModelConfig back = parse_hf_config(io::Json(json), file.path());
  // Both sides compute in f64 and round to f32, the file's divisors were rounded once more: 4 ulp.
  constexpr float kTolerance = 4 * 1.1920929e-7f;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (std::abs(back.inv_freq[i] - wanted[i]) > kTolerance * wanted[i]) {
      unsupported(file, "rope_freqs.weight", "a scaling of another kind than Llama 3's");
    }
  }
}

std::vector<std::string> strings(const io::GgufFile& file, const char* key) {
  const auto views = unwrap(file.get_string_array(key));
  return {views.begin(), views.end()};
}

std::optional<std::string> token_named(
    const io::GgufFile& file, const std::vector<std::string>& tokens, const char* key) {
  if (!file.has(key)) return std::nullopt;
  const uint32_t id = unwrap(file.get_u32(key));
  if (id >= tokens.size()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[{}, {}] must be below {} but is {}", file.path(), key, tokens.size(), id));
  }
  return tokens[id];
}

ordered_json byte_level(bool add_prefix_space, bool use_regex) {
  return {
      {"type", "ByteLevel"},
      {"add_prefix_space", add_prefix_space},
      {"trim_offsets", true},
      {"use_regex", use_regex}};
}

ordered_json sequence(std::initializer_list<ordered_json> parts) {
  auto list = ordered_json::array();
  for (const auto& part : parts) list.push_back(part);
  return {{"type", "Sequence"}, {"pretokenizers", list}};
}

ordered_json split_by(const char* expression) {
  return {
      {"type", "Split"},
      {"pattern", {{"Regex", expression}}},
      {"behavior", "Isolated"},
      {"invert", false}};
}

constexpr const char* kLlama3Expression =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr const char* kQwen2Expression =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

struct Pretokenizer {
  ordered_json json;
  bool nfc = false;
  bool ignore_merges = false;
};

/// llama.cpp's names of pre-tokenisers, in the parts of tokenizer.json.
Pretokenizer pretokenizer_of(const io::GgufFile& file, const std::string& pre) {
  const auto is_one_of = [&](std::initializer_list<const char*> names) {
    return std::find(names.begin(), names.end(), pre) != names.end();
  };
  if (is_one_of({"gpt-2", "mpt", "phi-2", "olmo"})) return {byte_level(false, true)};
  if (is_one_of({"smollm", "starcoder", "refact", "command-r"})) {
    const ordered_json digits = {{"type", "Digits"}, {"individual_digits", true}};
    return {sequence({digits, byte_level(false, true)}), pre == "command-r"};
  }
  if (is_one_of({"llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"})) {
    return {
        sequence({split_by(kLlama3Expression), byte_level(false, false)}),
        false,
        pre.starts_with("llama")};
  }
  if (is_one_of({"qwen2", "deepseek-r1-qwen"})) {
    return {sequence({split_by(kQwen2Expression), byte_level(false, false)}), true};
  }
  unsupported(file, "tokenizer.ggml.pre", "\"" + pre.substr(0, 100) + "\"");
}

constexpr int32_t kControlToken = 3, kUserDefinedToken = 4;

ordered_json added_tokens(const io::GgufFile& file, const std::vector<std::string>& tokens) {
  auto added = ordered_json::array();
  if (!file.has("tokenizer.ggml.token_type")) return added;
  const auto types = unwrap(file.get_i32_array("tokenizer.ggml.token_type"));
  for (size_t id = 0; id < std::min(types.size(), tokens.size()); ++id) {
    if (types[id] != kControlToken && types[id] != kUserDefinedToken) continue;
    added.push_back(
        {{"id", id},
         {"content", tokens[id]},
         {"single_word", false},
         {"lstrip", false},
         {"rstrip", false},
         {"normalized", false},
         {"special", types[id] == kControlToken}});
  }
  return added;
}

ordered_json bos_processor(
    const io::GgufFile& file, const std::vector<std::string>& tokens, bool by_default) {
  const bool adds_bos = unwrap(file.get_bool_or("tokenizer.ggml.add_bos_token", by_default));
  const auto bos = token_named(file, tokens, "tokenizer.ggml.bos_token_id");
  if (!adds_bos || !bos) return nullptr;
  const uint32_t id = unwrap(file.get_u32("tokenizer.ggml.bos_token_id"));
  const ordered_json special = {{"SpecialToken", {{"id", *bos}, {"type_id", 0}}}};
  const auto sequence_of = [](const char* name, int type) {
    return ordered_json{{"Sequence", {{"id", name}, {"type_id", type}}}};
  };
  return {
      {"type", "TemplateProcessing"},
      {"single", ordered_json::array({special, sequence_of("A", 0)})},
      {"pair", ordered_json::array({special, sequence_of("A", 0), special, sequence_of("B", 1)})},
      {"special_tokens",
       {{*bos,
         {{"id", *bos},
          {"ids", ordered_json::array({id})},
          {"tokens", ordered_json::array({*bos})}}}}}};
}

/// SentencePiece files have scores instead of merges: a pair merges when its whole is a token, the
/// best score first; among equals in order of the halves' ids (as `transformers` converts them).
ordered_json merges_from_scores(const io::GgufFile& file, const std::vector<std::string>& tokens) {
  const auto scores = unwrap(file.get_f32_array("tokenizer.ggml.scores"));
  if (scores.size() != tokens.size()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}, tokenizer.ggml.scores] must be {} but are {}",
            file.path(),
            tokens.size(),
            scores.size()));
  }
  std::unordered_map<std::string_view, uint32_t> ids;
  for (size_t id = 0; id < tokens.size(); ++id) ids.emplace(tokens[id], static_cast<uint32_t>(id));
  struct Merge {
    uint32_t whole, left, right;
  };
  std::vector<Merge> merges;
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string_view token = tokens[id];
    for (size_t at = 1; at < token.size(); ++at) {
      const auto left = ids.find(token.substr(0, at)), right = ids.find(token.substr(at));
      if (left != ids.end() && right != ids.end()) {
        merges.push_back({static_cast<uint32_t>(id), left->second, right->second});
      }
    }
  }
  std::stable_sort(merges.begin(), merges.end(), [&](const Merge& x, const Merge& y) {
    return std::tuple(-scores[x.whole], x.left, x.right) <
           std::tuple(-scores[y.whole], y.left, y.right);
  });
  auto json = ordered_json::array();
  for (const Merge& merge : merges)
    json.push_back(ordered_json::array({tokens[merge.left], tokens[merge.right]}));
  return json;
}

ordered_json sentencepiece_tokenizer(
    const io::GgufFile& file, const std::vector<std::string>& tokens) {
  constexpr const char* kMark = "\xE2\x96\x81";  // U+2581
  auto normalizers = ordered_json::array();
  if (unwrap(file.get_bool_or("tokenizer.ggml.add_space_prefix", true))) {
    normalizers.push_back({{"type", "Prepend"}, {"prepend", kMark}});
  }
  normalizers.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kMark}});
  auto decoders = ordered_json::array();
  decoders.push_back({{"type", "Replace"}, {"pattern", {{"String", kMark}}}, {"content", " "}});
  decoders.push_back({{"type", "ByteFallback"}});
  decoders.push_back({{"type", "Fuse"}});
  if (normalizers.size() == 2) {
    decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  return {
      {"normalizer", {{"type", "Sequence"}, {"normalizers", normalizers}}},
      {"pre_tokenizer", nullptr},
      {"post_processor", bos_processor(file, tokens, true)},
      {"decoder", {{"type", "Sequence"}, {"decoders", decoders}}},
      {"merges", merges_from_scores(file, tokens)}};
}

ordered_json byte_level_tokenizer(
    const io::GgufFile& file, const std::vector<std::string>& tokens) {
  const Pretokenizer pre = pretokenizer_of(
      file, std::string(unwrap(file.get_string_or("tokenizer.ggml.pre", "default"))));
  auto merges = ordered_json::array();
  for (const std::string& merge : strings(file, "tokenizer.ggml.merges")) {
    const size_t space = merge.find(' ', 1);
    if (space == std::string::npos) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[{}, tokenizer.ggml.merges] must be pairs but one is not", file.path()));
    }
    merges.push_back(ordered_json::array({merge.substr(0, space), merge.substr(space + 1)}));
  }
  return {
      {"normalizer", pre.nfc ? ordered_json{{"type", "NFC"}} : ordered_json(nullptr)},
      {"pre_tokenizer", pre.json},
      {"post_processor", bos_processor(file, tokens, pre.ignore_merges)},
      {"decoder", byte_level(true, true)},
      {"merges", merges},
      {"ignore_merges", pre.ignore_merges}};
}

}  // namespace

ordered_json hf_config_of(const io::GgufFile& file) {
  const ModelConfig c = parse_gguf_config(file);
  const std::string arch = c.architecture;
  ordered_json json = {
      {"architectures", ordered_json::array({architecture_class(arch)})},
      {"model_type", arch},
      {"hidden_act", "silu"},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.num_hidden_layers},
      {"num_attention_heads", c.num_attention_heads},
      {"num_key_value_heads", c.num_key_value_heads},
      {"head_dim", c.head_dim},
      {"vocab_size", c.vocab_size},
      {"max_position_embeddings", c.max_position_embeddings},
      {"rms_norm_eps", shortest(c.rms_norm_eps)},
      {"rope_theta", shortest(unwrap(file.get_f32_or(arch + ".rope.freq_base", 10000.0f)))},
      {"rope_scaling", rope_scaling(file, c, arch)},
      {"tie_word_embeddings", c.tie_word_embeddings},
      {"attention_bias", arch != "qwen2" && file.find("blk.0.attn_q.bias") != nullptr},
      {"use_cache", true}};
  if (arch == "llama") json["mlp_bias"] = file.find("blk.0.ffn_up.bias") != nullptr;
  if (c.sliding_window > 0) {
    if (arch == "llama") {
      json["model_type"] = "mistral";
      json["architectures"] = ordered_json::array({"MistralForCausalLM"});
    } else {
      json["use_sliding_window"] = true;
      json["max_window_layers"] = 0;
    }
    json["sliding_window"] = c.sliding_window;
  }
  json.update(hf_generation_config_of(file));
  check_rope(file, c, json);
  return json;
}

ordered_json hf_generation_config_of(const io::GgufFile& file) {
  const ModelConfig c = parse_gguf_config(file);
  ordered_json json = ordered_json::object();
  if (c.bos_token_id) json["bos_token_id"] = *c.bos_token_id;
  if (!c.eos_token_ids.empty()) json["eos_token_id"] = c.eos_token_ids.front();
  if (c.pad_token_id) json["pad_token_id"] = *c.pad_token_id;
  return json;
}

ordered_json hf_tokenizer_of(const io::GgufFile& file) {
  const std::string kind(unwrap(file.get_string("tokenizer.ggml.model")));
  const auto tokens = strings(file, "tokenizer.ggml.tokens");
  const bool sentencepiece = kind == "llama";
  if (!sentencepiece && kind != "gpt2") unsupported(file, "tokenizer.ggml.model", kind);
  const ordered_json parts =
      sentencepiece ? sentencepiece_tokenizer(file, tokens) : byte_level_tokenizer(file, tokens);
  ordered_json vocab = ordered_json::object();
  // push_back on the object's vector: its operator[] searches from the front each time.
  auto& entries = vocab.get_ref<ordered_json::object_t&>();
  entries.reserve(tokens.size());
  for (size_t id = 0; id < tokens.size(); ++id) {
    static_cast<std::vector<ordered_json::object_t::value_type>&>(entries).emplace_back(
        tokens[id], id);
  }
  const auto unk = token_named(file, tokens, "tokenizer.ggml.unknown_token_id");
  return {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added_tokens(file, tokens)},
      {"normalizer", parts["normalizer"]},
      {"pre_tokenizer", parts["pre_tokenizer"]},
      {"post_processor", parts["post_processor"]},
      {"decoder", parts["decoder"]},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", sentencepiece && unk ? ordered_json(*unk) : ordered_json(nullptr)},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", sentencepiece},
        {"byte_fallback", sentencepiece},
        {"ignore_merges", parts.value("ignore_merges", false)},
        {"vocab", vocab},
        {"merges", parts["merges"]}}}};
}

ordered_json hf_tokenizer_config_of(const io::GgufFile& file) {
  const auto tokens = strings(file, "tokenizer.ggml.tokens");
  ordered_json json = {
      {"tokenizer_class", "PreTrainedTokenizerFast"},
      {"clean_up_tokenization_spaces", false},
      {"model_max_length", parse_gguf_config(file).max_position_embeddings}};
  constexpr std::pair<const char*, const char*> kNames[] = {
      {"bos_token", "tokenizer.ggml.bos_token_id"},
      {"eos_token", "tokenizer.ggml.eos_token_id"},
      {"unk_token", "tokenizer.ggml.unknown_token_id"},
      {"pad_token", "tokenizer.ggml.padding_token_id"}};
  for (const auto& [name, key] : kNames) {
    if (const auto token = token_named(file, tokens, key)) json[name] = *token;
  }
  if (file.has("tokenizer.chat_template")) {
    json["chat_template"] = std::string(unwrap(file.get_string("tokenizer.chat_template")));
  }
  return json;
}

}  // namespace metal_lora
