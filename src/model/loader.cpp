// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/loader.h"

#include <filesystem>

#include <fmt/format.h>
#include <mlx/ops.h>

#include "kernels/nf4.h"
#include "metal_lora/error.h"
#include "src/io/result.h"
#include "src/model/tensor_weight.h"

namespace mx = mlx::core;

namespace metal_lora {

/// Fills a Model from a TensorSource; the one friend that may.
class ModelLoader {
 public:
  ModelLoader(ModelConfig config, const std::filesystem::path& path, const LoadOptions& options)
      : model_(new Model()), options_(options) {
    model_->config_ = std::move(config);
    model_->dtype_ = options.dtype;
    model_->path_ = path;
  }

  const ModelConfig& config() const { return model_->config_; }

  std::shared_ptr<const Model> load(TensorSource& source) {
    const auto& c = config();
    model_->embedding_ = weight(
        source, "model.embed_tokens.weight", c.vocab_size, c.hidden_size, c.tie_word_embeddings);
    // Like transformers: a tied model's own head, if the file has one, is not used.
    model_->head_ = c.tie_word_embeddings
                        ? model_->embedding_
                        : weight(source, "lm_head.weight", c.vocab_size, c.hidden_size, true);
    if (c.tie_word_embeddings && source.has("lm_head.weight")) {
      weight(source, "lm_head.weight", c.vocab_size, c.hidden_size, false);
    }
    model_->final_norm_ = norm(source, "model.norm.weight", c.hidden_size);
    for (int i = 0; i < c.num_hidden_layers; ++i) {
      load_layer(source, i);
      if (options_.progress) options_.progress((i + 1.0) / c.num_hidden_layers);
    }
    if (const auto left = source.unused(); !left.empty()) {
      throw Error(
          ErrorCode::unsupported,
          fmt::format(
              "[{}] {} tensors do not belong to a {} model, the first is {}",
              model_->path_.string(),
              left.size(),
              c.architecture,
              left[0]));
    }
    return std::move(model_);
  }

 private:
  Weight weight(
      TensorSource& source, const std::string& name, int out, int in, bool multiplied) const {
    auto w = source.weight(name, out, in, options_.dtype);
    if (options_.dequantize && w.is_quantized())
      w = Weight::dense(mx::astype(w.dequantized(), options_.dtype));
    w = quantized(w, name);
    return multiplied ? w.prepared() : w;
  }

  Weight quantized(const Weight& w, const std::string& name) const {
    switch (options_.quantize) {
      case Quantization::none:
        return w;
      case Quantization::int4:
        return w.quantized(4, options_.quantize_group);
      case Quantization::int8:
        return w.quantized(8, options_.quantize_group);
      case Quantization::nf4:
        break;
    }
    if (!w.is_quantized() && w.params().k % kNf4Block != 0) {
      throw Error(
          ErrorCode::unsupported,
          fmt::format(
              "[{}: {}] rows must be a multiple of {} wide for quantize nf4 but are {}",
              model_->path_.string(),
              name,
              kNf4Block,
              w.params().k),
          "quantize 4 or 8 takes groups of 32 and leaves narrower matrices as they are");
    }
    return w.quantized_nf4(options_.double_quant);
  }

  mx::array norm(TensorSource& source, const std::string& name, int size) const {
    auto v = source.vector(name, size);
    if (!v) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[{}] has no tensor {}", model_->path_.string(), name));
    }
    return *v;
  }

  void load_layer(TensorSource& source, int index) {
    const auto& c = config();
    Model::Layer layer;
    const auto prefix = fmt::format("model.layers.{}.", index);
    const auto linears = adaptable_linears(c);
    for (int slot = 0; slot < kSlotsPerLayer; ++slot) {
      const auto& info = linears[static_cast<size_t>(index) * kSlotsPerLayer + slot];
      layer.linears[slot].weight =
          weight(source, info.path + ".weight", info.out_features, info.in_features, true);
      layer.linears[slot].bias = source.vector(info.path + ".bias", info.out_features);
    }
    layer.input_norm = norm(source, prefix + "input_layernorm.weight", c.hidden_size);
    layer.post_norm = norm(source, prefix + "post_attention_layernorm.weight", c.hidden_size);
    if (c.architecture == "qwen3") {
      layer.q_norm = norm(source, prefix + "self_attn.q_norm.weight", c.head_dim);
      layer.k_norm = norm(source, prefix + "self_attn.k_norm.weight", c.head_dim);
    }
    if (c.layer_uses_window[index]) layer.window = c.sliding_window;
    model_->layers_.push_back(std::move(layer));
  }

  std::shared_ptr<Model> model_;
  const LoadOptions& options_;
};

namespace {

/// llama.cpp stores Llama 3's per-frequency divisors as a tensor.
void apply_rope_factors(const io::GgufFile& file, ModelConfig& config) {
  const auto* tensor = file.find("rope_freqs.weight");
  if (tensor == nullptr) return;
  const auto factors =
      tensor_vector(*tensor, file.path() + ": rope_freqs.weight", config.head_dim / 2);
  for (size_t i = 0; i < config.inv_freq.size(); ++i)
    config.inv_freq[i] /= factors.data<float>()[i];
  validate_config(config, file.path());
}

/// A folder's generation_config.json overrides the end tokens, as in transformers.
void read_generation_config(const std::filesystem::path& folder, ModelConfig& config) {
  const auto path = folder / "generation_config.json";
  if (!std::filesystem::exists(path)) return;
  const auto json = io::unwrap(io::read_json_file(path.string()));
  const auto generation = io::unwrap(io::JsonObject::of(json, path.string()));
  if (generation.has("eos_token_id")) {
    config.eos_token_ids = token_ids(generation, "eos_token_id", config);
  }
}

}  // namespace

std::shared_ptr<const Model> Model::load(
    const std::filesystem::path& path, const LoadOptions& options) {
  options.validate();
  if (!std::filesystem::exists(path)) {
    throw Error(
        ErrorCode::not_found,
        fmt::format("[model] {} does not exist", path.string()),
        "a .gguf file or a Hugging Face folder; `scripts/get-model --list` shows what can be "
        "fetched");
  }
  if (std::filesystem::is_directory(path)) {
    const auto config_path = (path / "config.json").string();
    const auto json = io::unwrap(io::read_json_file(config_path));
    auto config = parse_hf_config(json, config_path);
    read_generation_config(path, config);
    ModelLoader loader(std::move(config), path, options);
    return loader.load(*open_hf_tensors(path.string(), json));
  }
  auto file = io::unwrap(io::read_gguf(path.string()));
  auto config = parse_gguf_config(file);
  apply_rope_factors(file, config);
  ModelLoader loader(std::move(config), path, options);
  return loader.load(*open_gguf_tensors(std::move(file), loader.config()));
}

}  // namespace metal_lora
