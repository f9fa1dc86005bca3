// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A random Llama of a few hundred kilobytes as a Hugging Face folder, for tests that need a whole
// model: config.json, model.safetensors, tokenizer.json (byte-level BPE without merges: token id =
// rank of the byte, so every text has known ids), tokenizer_config.json (ChatML). Header only;
// needs metal_lora_io.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/io/safetensors.h"

namespace metal_lora::test {

struct TinyModelOptions {
  int hidden = 64, layers = 2, heads = 4, kv_heads = 2, intermediate = 128;
  int vocab = 259;  ///< 256 bytes, <|im_start|> 256, <|im_end|> 257 (EOS), <|endoftext|> 258
  uint64_t seed = 1;
  bool chat_template = true;
  std::string model_type = "llama";
};

inline constexpr int32_t kTinyStart = 256, kTinyEos = 257;

/// A folder of its own under the system's temporary one, removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    static std::atomic<int> counter{0};
    path_ = std::filesystem::temp_directory_path() /
            ("metal_lora_" + std::to_string(::getpid()) + "_" + std::to_string(counter++));
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// GPT-2's printable stand-ins for bytes, as UTF-8, and the id of each byte's token.
inline std::vector<std::string> byte_tokens() {
  std::vector<std::string> out(256);
  int next = 256;
  for (int b = 0; b < 256; ++b) {
    const bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    const int code = plain ? b : next++;
    std::string utf8;
    if (code < 128) {
      utf8 += static_cast<char>(code);
    } else {
      utf8 += static_cast<char>(0xc0 | (code >> 6));
      utf8 += static_cast<char>(0x80 | (code & 0x3f));
    }
    out[static_cast<size_t>(b)] = utf8;
  }
  return out;
}

inline void write_tiny_tokenizer(
    const std::filesystem::path& folder, const TinyModelOptions& options = {}) {
  using Json = nlohmann::ordered_json;
  Json vocab = Json::object();
  const auto bytes = byte_tokens();
  for (size_t b = 0; b < bytes.size(); ++b) vocab[bytes[b]] = b;
  const std::vector<std::string> special = {"<|im_start|>", "<|im_end|>", "<|endoftext|>"};
  Json added = Json::array();
  for (size_t i = 0; i < special.size(); ++i) {
    vocab[special[i]] = 256 + i;
    added.push_back(
        {{"id", 256 + i},
         {"content", special[i]},
         {"single_word", false},
         {"lstrip", false},
         {"rstrip", false},
         {"normalized", false},
         {"special", true}});
  }
  const Json level = {
      {"type", "ByteLevel"},
      {"add_prefix_space", false},
      {"trim_offsets", true},
      {"use_regex", true}};
  Json tokenizer;
  tokenizer["version"] = "1.0";
  tokenizer["truncation"] = nullptr;
  tokenizer["padding"] = nullptr;
  tokenizer["added_tokens"] = added;
  tokenizer["normalizer"] = nullptr;
  tokenizer["pre_tokenizer"] = level;
  tokenizer["post_processor"] = nullptr;
  tokenizer["decoder"] = level;
  tokenizer["model"] = {
      {"type", "BPE"},
      {"dropout", nullptr},
      {"unk_token", nullptr},
      {"continuing_subword_prefix", nullptr},
      {"end_of_word_suffix", nullptr},
      {"fuse_unk", false},
      {"byte_fallback", false},
      {"ignore_merges", false},
      {"vocab", vocab},
      {"merges", Json::array()}};
  write_text(folder / "tokenizer.json", tokenizer.dump());
  Json config = {
      {"tokenizer_class", "GPT2TokenizerFast"},
      {"bos_token", "<|im_start|>"},
      {"eos_token", "<|im_end|>"},
      {"pad_token", "<|im_end|>"},
      {"clean_up_tokenization_spaces", false}};
  if (options.chat_template) {
    config["chat_template"] =
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}";
  }
  write_text(folder / "tokenizer_config.json", config.dump());
}

/// Writes the folder and returns its path. Weights are uniform with variance 1/fan_in, from a
/// counter-based generator: equal options, equal bytes.
inline std::filesystem::path write_tiny_model(
    const std::filesystem::path& folder, const TinyModelOptions& o = {}) {
  std::filesystem::create_directories(folder);
  const int head_dim = o.hidden / o.heads;
  const nlohmann::ordered_json config = {
      {"architectures", {"LlamaForCausalLM"}},
      {"model_type", o.model_type},
      {"hidden_size", o.hidden},
      {"num_hidden_layers", o.layers},
      {"intermediate_size", o.intermediate},
      {"num_attention_heads", o.heads},
      {"num_key_value_heads", o.kv_heads},
      {"head_dim", head_dim},
      {"vocab_size", o.vocab},
      {"max_position_embeddings", 2048},
      {"rope_theta", 10000.0},
      {"rms_norm_eps", 1e-5},
      {"hidden_act", "silu"},
      {"attention_bias", false},
      {"mlp_bias", false},
      {"tie_word_embeddings", true},
      {"bos_token_id", kTinyStart},
      {"eos_token_id", kTinyEos},
      {"torch_dtype", "float32"}};
  write_text(folder / "config.json", config.dump(1));

  uint64_t counter = o.seed * 0x9e3779b97f4a7c15u;
  const auto uniform = [&counter] {  // SplitMix64, in [-1, 1)
    uint64_t x = counter += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return static_cast<float>(x >> 40) * 0x1p-23f - 1.0f;
  };
  std::vector<std::vector<float>> data;
  std::vector<io::TensorInfo> tensors;
  const auto add = [&](const std::string& name, std::vector<uint64_t> shape) {
    uint64_t count = 1;
    for (const uint64_t dim : shape) count *= dim;
    std::vector<float> values(count, 1.0f);
    const float bound = shape.size() == 2 ? std::sqrt(3.0f / static_cast<float>(shape[1])) : 0.1f;
    for (float& value : values) {
      value = shape.size() == 2 ? uniform() * bound : 1.0f + uniform() * bound;
    }
    data.push_back(std::move(values));
    io::TensorInfo info;
    info.name = name;
    info.type = io::TensorType::f32;
    info.shape = std::move(shape);
    info.data = reinterpret_cast<const std::byte*>(data.back().data());
    info.nbytes = count * sizeof(float);
    tensors.push_back(std::move(info));
  };
  const auto u = [](int value) { return static_cast<uint64_t>(value); };
  add("model.embed_tokens.weight", {u(o.vocab), u(o.hidden)});
  for (int i = 0; i < o.layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    add(layer + "input_layernorm.weight", {u(o.hidden)});
    add(layer + "post_attention_layernorm.weight", {u(o.hidden)});
    add(layer + "self_attn.q_proj.weight", {u(o.heads * head_dim), u(o.hidden)});
    add(layer + "self_attn.k_proj.weight", {u(o.kv_heads * head_dim), u(o.hidden)});
    add(layer + "self_attn.v_proj.weight", {u(o.kv_heads * head_dim), u(o.hidden)});
    add(layer + "self_attn.o_proj.weight", {u(o.hidden), u(o.heads * head_dim)});
    add(layer + "mlp.gate_proj.weight", {u(o.intermediate), u(o.hidden)});
    add(layer + "mlp.up_proj.weight", {u(o.intermediate), u(o.hidden)});
    add(layer + "mlp.down_proj.weight", {u(o.hidden), u(o.intermediate)});
  }
  add("model.norm.weight", {u(o.hidden)});
  io::unwrap(
      io::write_safetensors((folder / "model.safetensors").string(), tensors, {{"format", "pt"}}));
  write_tiny_tokenizer(folder, o);
  return folder;
}

}  // namespace metal_lora::test
