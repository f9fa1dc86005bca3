// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/io/result.h"
#include "src/model/loader.h"
#include "src/model/rope.h"

namespace metal_lora {
namespace {

using io::unwrap;

constexpr std::array kArchitectures = {"llama", "mistral", "qwen2", "qwen3"};
constexpr int kMaxLayers = 1024, kMaxDims = 1 << 20, kMaxVocab = 1 << 24, kMaxContext = 1 << 24;

[[noreturn]] void unsupported(
    const std::string& path, const std::string& field, const std::string& got) {
  throw Error(
      ErrorCode::unsupported, fmt::format("[{}: {}] {} is not supported", path, field, got));
}

int get_size(const io::JsonObject& c, std::string_view key, int high) {
  return static_cast<int>(unwrap(c.get_int(key, 1, high)));
}

/// Which layers use the sliding window, as transformers decides it.
void read_window(const io::JsonObject& c, ModelConfig& config) {
  config.layer_uses_window.assign(config.num_hidden_layers, false);
  const bool qwen = config.architecture.starts_with("qwen");
  const bool wanted =
      qwen ? unwrap(c.get_bool_or("use_sliding_window", false)) : config.architecture == "mistral";
  if (!wanted || !c.has("sliding_window")) return;
  config.sliding_window = get_size(c, "sliding_window", kMaxContext);
  int first = 0;
  if (qwen) first = static_cast<int>(unwrap(c.get_int_or("max_window_layers", 28, 0, kMaxLayers)));
  for (int i = first; i < config.num_hidden_layers; ++i) config.layer_uses_window[i] = true;
  if (!c.has("layer_types")) return;
  const auto types = unwrap(c.get_strings("layer_types"));
  if (types.size() != static_cast<size_t>(config.num_hidden_layers)) {
    io::throw_failure(c.failure(
        "layer_types",
        fmt::format("{} entries", config.num_hidden_layers),
        std::to_string(types.size())));
  }
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    if (types[i] != "sliding_attention" && types[i] != "full_attention") {
      unsupported(c.path(), "layer_types", types[i]);
    }
    config.layer_uses_window[i] = types[i] == "sliding_attention";
  }
}

void refuse_unsupported(const io::JsonObject& c) {
  const auto activation = unwrap(c.get_string_or("hidden_act", "silu"));
  if (activation != "silu" && activation != "swish")
    unsupported(c.path(), "hidden_act", activation);
  if (c.has("quantization_config") && !c.has("quantization")) {
    unsupported(c.path(), "quantization_config", "this quantisation (MLX's `quantization` is)");
  }
  const double partial = unwrap(c.get_number_or("partial_rotary_factor", 1.0));
  if (partial != 1.0) unsupported(c.path(), "partial_rotary_factor", fmt::format("{}", partial));
}

}  // namespace

std::vector<int32_t> token_ids(
    const io::JsonObject& c, std::string_view key, const ModelConfig& config) {
  if (!c.has(key)) return {};
  const int last = config.vocab_size - 1;
  if (!c.json()[std::string(key)].is_array()) {
    return {static_cast<int32_t>(unwrap(c.get_int(key, 0, last)))};
  }
  std::vector<int32_t> ids;
  for (const int64_t id : unwrap(c.get_ints(key))) {
    if (id < 0 || id > last) {
      io::throw_failure(
          c.failure(key, fmt::format("integers from 0 to {}", last), std::to_string(id)));
    }
    ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

void validate_config(const ModelConfig& c, const std::string& path) {
  const auto require =
      [&](bool ok, const char* field, const std::string& expected, const std::string& got) {
        if (ok) return;
        throw Error(
            ErrorCode::invalid_input,
            fmt::format("[{}: {}] must be {} but is {}", path, field, expected, got));
      };
  require(
      c.head_dim % 2 == 0 && c.head_dim <= 256,
      "head_dim",
      "even and at most 256",
      std::to_string(c.head_dim));
  require(
      c.num_attention_heads % c.num_key_value_heads == 0,
      "num_attention_heads",
      fmt::format("a multiple of num_key_value_heads {}", c.num_key_value_heads),
      std::to_string(c.num_attention_heads));
  require(
      std::isfinite(c.rms_norm_eps) && c.rms_norm_eps > 0.0f && c.rms_norm_eps < 1.0f,
      "rms_norm_eps",
      "in (0, 1)",
      fmt::format("{}", c.rms_norm_eps));
  for (float f : c.inv_freq)
    require(std::isfinite(f) && f > 0.0f, "rope", "finite frequencies", fmt::format("{}", f));
}

ModelConfig parse_hf_config(const io::Json& json, const std::string& path) {
  const auto c = unwrap(io::JsonObject::of(json, path));
  ModelConfig config;
  config.architecture = unwrap(c.get_string("model_type"));
  if (std::find(kArchitectures.begin(), kArchitectures.end(), config.architecture) ==
      kArchitectures.end()) {
    unsupported(path, "model_type", config.architecture + " (llama, mistral, qwen2 and qwen3 are)");
  }
  refuse_unsupported(c);
  config.hidden_size = get_size(c, "hidden_size", kMaxDims);
  config.num_hidden_layers = get_size(c, "num_hidden_layers", kMaxLayers);
  config.intermediate_size = get_size(c, "intermediate_size", kMaxDims);
  config.num_attention_heads = get_size(c, "num_attention_heads", 4096);
  config.num_key_value_heads = static_cast<int>(
      unwrap(c.get_int_or("num_key_value_heads", config.num_attention_heads, 1, 4096)));
  if (!c.has("head_dim") && config.hidden_size % config.num_attention_heads != 0) {
    io::throw_failure(c.failure(
        "hidden_size", "a multiple of num_attention_heads", std::to_string(config.hidden_size)));
  }
  config.head_dim = static_cast<int>(
      unwrap(c.get_int_or("head_dim", config.hidden_size / config.num_attention_heads, 2, 256)));
  config.vocab_size = get_size(c, "vocab_size", kMaxVocab);
  config.max_position_embeddings = get_size(c, "max_position_embeddings", kMaxContext);
  config.rms_norm_eps =
      static_cast<float>(unwrap(c.get_number_or("rms_norm_eps", 1e-6, 1e-12, 1e-1)));
  config.tie_word_embeddings = unwrap(c.get_bool_or("tie_word_embeddings", false));
  config.eos_token_ids = token_ids(c, "eos_token_id", config);
  if (auto ids = token_ids(c, "bos_token_id", config); !ids.empty()) config.bos_token_id = ids[0];
  if (auto ids = token_ids(c, "pad_token_id", config); !ids.empty()) config.pad_token_id = ids[0];
  read_window(c, config);

  // transformers 5 moved both fields into rope_parameters.
  double theta = unwrap(c.get_number_or("rope_theta", 10000.0, 1.0, 1e12));
  const io::Json* scaling = c.has("rope_scaling") ? &json["rope_scaling"] : nullptr;
  if (c.has("rope_parameters")) {
    const auto rope = unwrap(c.get_object("rope_parameters"));
    theta = unwrap(rope.get_number_or("rope_theta", theta, 1.0, 1e12));
    scaling = &json["rope_parameters"];
  }
  auto rope =
      rope_frequencies(theta, config.head_dim, config.max_position_embeddings, scaling, path);
  config.inv_freq = std::move(rope.inv_freq);
  config.rope_factor = rope.factor;
  validate_config(config, path);
  return config;
}

ModelConfig parse_gguf_config(const io::GgufFile& file) {
  const std::string arch(unwrap(file.get_string("general.architecture")));
  ModelConfig config;
  config.architecture = arch;
  if (arch != "llama" && arch != "qwen2" && arch != "qwen3") {
    unsupported(file.path(), "general.architecture", arch + " (llama, qwen2 and qwen3 are)");
  }
  const auto get = [&](const char* name, uint32_t high) {
    const auto key = arch + "." + name;
    const uint32_t value = unwrap(file.get_u32(key));
    if (value < 1 || value > high) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[{}: {}] must be 1 … {} but is {}", file.path(), key, high, value));
    }
    return static_cast<int>(value);
  };
  config.hidden_size = get("embedding_length", kMaxDims);
  config.num_hidden_layers = get("block_count", kMaxLayers);
  config.intermediate_size = get("feed_forward_length", kMaxDims);
  config.num_attention_heads = get("attention.head_count", 4096);
  config.num_key_value_heads = file.has(arch + ".attention.head_count_kv")
                                   ? get("attention.head_count_kv", 4096)
                                   : config.num_attention_heads;
  config.head_dim = file.has(arch + ".attention.key_length")
                        ? get("attention.key_length", 256)
                        : config.hidden_size / config.num_attention_heads;
  for (const char* key : {"attention.value_length", "rope.dimension_count"}) {
    if (file.has(arch + "." + key) && get(key, kMaxDims) != config.head_dim) {
      unsupported(file.path(), arch + "." + key, "a value other than the head's width");
    }
  }
  config.max_position_embeddings = get("context_length", kMaxContext);
  config.rms_norm_eps = unwrap(file.get_f32(arch + ".attention.layer_norm_rms_epsilon"));
  const auto* embedding = file.find("token_embd.weight");
  if (embedding == nullptr || embedding->shape.size() != 2 || embedding->shape[0] > kMaxVocab) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[{}: token_embd.weight] must be a matrix [vocab, dims]", file.path()));
  }
  config.vocab_size = static_cast<int>(embedding->shape[0]);
  config.tie_word_embeddings = file.find("output.weight") == nullptr;
  config.layer_uses_window.assign(config.num_hidden_layers, false);
  if (file.has(arch + ".attention.sliding_window")) {
    config.sliding_window = get("attention.sliding_window", kMaxContext);
    config.layer_uses_window.assign(config.num_hidden_layers, true);
  }
  const auto id = [&](const char* key) -> std::optional<int32_t> {
    if (!file.has(key)) return std::nullopt;
    const uint32_t value = unwrap(file.get_u32(key));
    if (value >= static_cast<uint32_t>(config.vocab_size)) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format(
              "[{}, {}] must be below {} but is {}", file.path(), key, config.vocab_size, value));
    }
    return static_cast<int32_t>(value);
  };
  if (auto eos = id("tokenizer.ggml.eos_token_id")) config.eos_token_ids = {*eos};
  config.bos_token_id = id("tokenizer.ggml.bos_token_id");
  config.pad_token_id = id("tokenizer.ggml.padding_token_id");

  const double theta = unwrap(file.get_f32_or(arch + ".rope.freq_base", 10000.0f));
  if (!(theta >= 1.0)) unsupported(file.path(), arch + ".rope.freq_base", fmt::format("{}", theta));
  io::Json scaling;
  const auto prefix = arch + ".rope.scaling.";
  const auto type = unwrap(file.get_string_or(prefix + "type", "none"));
  if (type != "none") {
    scaling["rope_type"] = type;
    scaling["factor"] = unwrap(file.get_f32(prefix + "factor"));
    if (file.has(prefix + "original_context_length")) {
      scaling["original_max_position_embeddings"] =
          unwrap(file.get_u32(prefix + "original_context_length"));
    }
  }
  auto rope = rope_frequencies(
      theta, config.head_dim, config.max_position_embeddings, &scaling, file.path());
  config.inv_freq = std::move(rope.inv_freq);
  config.rope_factor = rope.factor;
  validate_config(config, file.path());
  return config;
}

}  // namespace metal_lora
