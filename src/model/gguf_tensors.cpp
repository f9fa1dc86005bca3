// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <set>

#include <fmt/format.h>
#include <mlx/ops.h>

#include "metal_lora/error.h"
#include "src/model/loader.h"
#include "src/model/tensor_weight.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

constexpr std::pair<std::string_view, std::string_view> kGlobalNames[] = {
    {"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}};
constexpr std::pair<std::string_view, std::string_view> kLayerNames[] = {
    {"input_layernorm", "attn_norm"},
    {"post_attention_layernorm", "ffn_norm"},
    {"self_attn.q_proj", "attn_q"},
    {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},
    {"self_attn.o_proj", "attn_output"},
    {"self_attn.q_norm", "attn_q_norm"},
    {"self_attn.k_norm", "attn_k_norm"},
    {"mlp.gate_proj", "ffn_gate"},
    {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"}};

/// "model.layers.3.self_attn.q_proj.weight" -> "blk.3.attn_q.weight"
std::string gguf_name(const std::string& name) {
  const auto dot = name.rfind('.');
  const auto stem = name.substr(0, dot), kind = name.substr(dot);
  for (const auto& [hf, gguf] : kGlobalNames) {
    if (stem == hf) return std::string(gguf) + kind;
  }
  constexpr std::string_view kPrefix = "model.layers.";
  if (stem.starts_with(kPrefix)) {
    const auto end = stem.find('.', kPrefix.size());
    for (const auto& [hf, gguf] : kLayerNames) {
      if (stem.substr(end + 1) == hf) {
        return fmt::format(
            "blk.{}.{}{}", stem.substr(kPrefix.size(), end - kPrefix.size()), gguf, kind);
      }
    }
  }
  throw Error(ErrorCode::internal, "[gguf] no name for " + name);
}

class GgufTensors : public TensorSource {
 public:
  GgufTensors(io::GgufFile file, const ModelConfig& config)
      : file_(std::move(file)), config_(config) {}

  bool has(const std::string& name) const override {
    return file_.find(gguf_name(name)) != nullptr;
  }

  Weight weight(const std::string& name, int out, int in, mx::Dtype dense_dtype) override {
    const auto* tensor = find(name);
    if (tensor == nullptr) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[{}] has no tensor {}", file_.path(), gguf_name(name)));
    }
    return tensor_weight(
        *tensor, file_.path() + ": " + tensor->name, out, in, dense_dtype, heads(name));
  }

  std::optional<mx::array> vector(const std::string& name, int size) override {
    const auto* tensor = find(name);
    if (tensor == nullptr) return std::nullopt;
    return tensor_vector(*tensor, file_.path() + ": " + tensor->name, size, heads(name));
  }

  std::vector<std::string> unused() const override {
    std::vector<std::string> names;
    for (const auto& tensor : file_.tensors()) {
      // Llama 3's frequency factors are read with the configuration.
      if (!used_.contains(tensor.name) && tensor.name != "rope_freqs.weight")
        names.push_back(tensor.name);
    }
    return names;
  }

 private:
  const io::TensorInfo* find(const std::string& name) {
    const auto* tensor = file_.find(gguf_name(name));
    if (tensor != nullptr) used_.insert(tensor->name);
    return tensor;
  }

  /// llama.cpp stores q and k of `llama` with interleaved rope pairs; norms of single heads are
  /// not.
  int heads(const std::string& name) const {
    if (config_.architecture != "llama") return 0;
    if (name.find(".q_proj.") != std::string::npos) return config_.num_attention_heads;
    if (name.find(".k_proj.") != std::string::npos) return config_.num_key_value_heads;
    return 0;
  }

  io::GgufFile file_;
  const ModelConfig& config_;
  std::set<std::string> used_;
};

}  // namespace

std::unique_ptr<TensorSource> open_gguf_tensors(io::GgufFile file, const ModelConfig& config) {
  return std::make_unique<GgufTensors>(std::move(file), config);
}

}  // namespace metal_lora
