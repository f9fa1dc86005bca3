// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "metal_lora/model.h"

#include <cmath>
#include <numeric>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "metal_lora/error.h"
#include "src/ops/decode.h"
#include "src/ops/train_step.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

constexpr int kCacheStepTokens = 256;

mx::array int_array(std::span<const int32_t> values) {
  return mx::array(values.data(), {static_cast<int>(values.size())}, mx::int32);
}

mx::array float_array(const std::vector<float>& values) {
  return mx::array(values.data(), {static_cast<int>(values.size())}, mx::float32);
}

}  // namespace

KVCache::KVCache(const Model& model)
    : data_(mx::zeros(
          {model.config().num_hidden_layers,
           2,
           0,
           model.config().num_key_value_heads,
           model.config().head_dim},
          model.dtype())),
      max_length_(model.config().max_position_embeddings) {}
KVCache::~KVCache() = default;
KVCache::KVCache(KVCache&&) noexcept = default;
KVCache& KVCache::operator=(KVCache&&) noexcept = default;

void KVCache::truncate(int length) {
  if (length < 0 || length > length_) {
    throw Error(
        ErrorCode::internal,
        fmt::format("[cache] length must be 0 … {} but is {}", length_, length));
  }
  length_ = length;
}

void KVCache::reserve(int tokens) {
  if (tokens > max_length_) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[context] the model sees at most {} tokens but {} are needed", max_length_, tokens),
        "shorten the prompt or lower --max-tokens");
  }
  const int capacity = data_.shape(2);
  if (tokens <= capacity) return;
  int wanted = (tokens + kCacheStepTokens - 1) / kCacheStepTokens * kCacheStepTokens;
  wanted = std::max(tokens, std::min(wanted, max_length_));
  auto shape = data_.shape();
  shape[2] = wanted - capacity;
  data_ = mx::concatenate({data_, mx::zeros(shape, data_.dtype())}, 2);
  data_.eval();
}

size_t KVCache::nbytes() const {
  return data_.nbytes();
}

size_t Model::weight_bytes() const {
  size_t bytes = embedding_.nbytes();
  if (head_.data() != embedding_.data()) bytes += head_.nbytes();
  for (const auto& layer : layers_) {
    for (const auto& linear : layer.linears) bytes += linear.weight.nbytes();
  }
  return bytes;
}

std::pair<size_t, size_t> Model::linear_index(std::string_view path) const {
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    const auto prefix = fmt::format("model.layers.{}.", layer);
    if (!path.starts_with(prefix)) continue;
    for (size_t slot = 0; slot < kSlotsPerLayer; ++slot) {
      if (path.substr(prefix.size()) == slot_path(static_cast<Slot>(slot))) return {layer, slot};
    }
  }
  throw Error(ErrorCode::not_found, fmt::format("[model] has no linear {}", path));
}

const LoraLinear& Model::linear(std::string_view path) const {
  const auto [layer, slot] = linear_index(path);
  return layers_[layer].linears[slot];
}

float Model::attention_scale() const {
  return 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
}

LoraLinear Model::with_adapter(int layer, Slot slot, const AdapterWeights& adapter) const {
  LoraLinear linear = layers_[layer].linears[static_cast<size_t>(slot)];
  if (const auto* lora = adapter.find(layer, slot)) linear.lora = *lora;
  return linear;
}

std::pair<mx::array, mx::array> Model::layer_forward(
    int index,
    const mx::array& residual,
    const mx::array* update,
    const mx::array& table,
    const AdapterWeights& adapter,
    const Attend& attend) const {
  const auto& layer = layers_[index];
  const auto stream = ops::stream();
  const int tokens = residual.shape(0), head_dim = config_.head_dim;
  const float eps = config_.rms_norm_eps;

  auto h = residual;
  auto n = residual;
  if (update == nullptr) {
    n = ops::rms_norm(residual, *layer.input_norm, eps);
  } else {
    std::tie(h, n) = ops::add_rms_norm(*update, residual, *layer.input_norm, eps);
  }
  const LoraLinear qkv_linears[] = {
      with_adapter(index, Slot::q_proj, adapter),
      with_adapter(index, Slot::k_proj, adapter),
      with_adapter(index, Slot::v_proj, adapter)};
  auto qkv = ops::lora_linear(n, qkv_linears);
  auto q = mx::reshape(qkv[0], {tokens, config_.num_attention_heads, head_dim}, stream);
  auto k = mx::reshape(qkv[1], {tokens, config_.num_key_value_heads, head_dim}, stream);
  auto v = mx::reshape(qkv[2], {tokens, config_.num_key_value_heads, head_dim}, stream);
  if (layer.q_norm) {
    q = ops::rms_norm(q, *layer.q_norm, eps);
    k = ops::rms_norm(k, *layer.k_norm, eps);
  }
  auto attended = attend(ops::rope(q, table), ops::rope(k, table), v);
  auto o = ops::lora_linear(
      mx::reshape(attended, {tokens, config_.num_attention_heads * head_dim}, stream),
      with_adapter(index, Slot::o_proj, adapter));

  auto [h2, n2] = ops::add_rms_norm(o, h, *layer.post_norm, eps);
  const LoraLinear mlp_linears[] = {
      with_adapter(index, Slot::gate_proj, adapter), with_adapter(index, Slot::up_proj, adapter)};
  auto gate_up = ops::lora_linear(n2, mlp_linears);
  auto down = ops::lora_linear(
      ops::swiglu(gate_up[0], gate_up[1]), with_adapter(index, Slot::down_proj, adapter));
  return {h2, down};
}

mx::array Model::hidden(
    const mx::array& tokens,
    const ops::Segments& segments,
    const AdapterWeights& adapter,
    bool checkpoint) const {
  LoraLinear embedding{embedding_, std::nullopt, std::nullopt};
  if (const auto* lora = adapter.find_embedding()) embedding.lora = *lora;
  auto residual = ops::lora_embedding(tokens, embedding, dtype_);
  auto table =
      ops::rope_table(segments.positions, float_array(config_.inv_freq), config_.rope_factor);

  std::optional<mx::array> update;
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    const Attend attend = [&, window = layers_[i].window](
                              const auto& q, const auto& k, const auto& v) {
      return ops::attention(q, k, v, segments.segment_start, attention_scale(), window);
    };
    if (!checkpoint || !update) {
      auto [h, u] = layer_forward(i, residual, update ? &*update : nullptr, table, adapter, attend);
      residual = h;
      update = u;
      continue;
    }
    // mx::checkpoint differentiates with respect to its inputs alone: the residual stream and this
    // layer's adapter go in as such. Everything else is constant and captured by value, since the
    // function runs again in the backward pass.
    std::vector<mx::array> inputs{residual, *update};
    std::vector<size_t> trained;
    auto parameters = adapter.parameters();
    const auto prefix = fmt::format("model.layers.{}.", i);
    for (size_t m = 0; m < adapter.modules().size(); ++m) {
      if (!adapter.modules()[m].path.starts_with(prefix)) continue;
      trained.push_back(m);
      inputs.push_back(parameters[2 * m]);
      inputs.push_back(parameters[2 * m + 1]);
    }
    auto layer =
        mx::checkpoint([this, i, table, segments, window = layers_[i].window, trained, adapter](
                           const std::vector<mx::array>& in) {
          auto values = adapter.parameters();
          for (size_t t = 0; t < trained.size(); ++t) {
            values[2 * trained[t]] = in[2 + 2 * t];
            values[2 * trained[t] + 1] = in[3 + 2 * t];
          }
          const Attend attend = [&](const auto& q, const auto& k, const auto& v) {
            return ops::attention(q, k, v, segments.segment_start, attention_scale(), window);
          };
          auto [h, u] =
              layer_forward(i, in[0], &in[1], table, adapter.with_parameters(values), attend);
          return std::vector<mx::array>{h, u};
        });
    auto out = layer(inputs);
    residual = out[0];
    update = out[1];
  }
  if (!update) return ops::rms_norm(residual, *final_norm_, config_.rms_norm_eps);
  return ops::add_rms_norm(*update, residual, *final_norm_, config_.rms_norm_eps).second;
}

mx::array Model::loss(
    const mx::array& tokens,
    const ops::Segments& segments,
    const mx::array& targets,
    const mx::array& weights,
    const AdapterWeights& adapter,
    bool needs_grad,
    bool checkpoint) const {
  return ops::linear_cross_entropy(
      hidden(tokens, segments, adapter, checkpoint), head_, targets, weights, needs_grad);
}

std::string Model::train_step_refusal(const AdapterWeights& adapter) const {
  if (!ops::has_train_step()) return "the active backend has no fused step";
  if (dtype_ == mx::float32) return "activations are float32";
  if (adapter.empty()) return "there is no adapter";
  if (adapter.find_embedding() != nullptr) return "the embedding has an adapter";
  for (const auto& module : adapter.modules()) {
    if (module.lora.dropout > 0.0f) return "the adapter has dropout";
  }
  for (const auto& layer : layers_) {
    if (layer.q_norm) return "heads are normed (Qwen3)";
  }
  return "";
}

std::shared_ptr<ops::TrainPlan> Model::make_train_plan(
    const AdapterWeights& adapter, size_t memory_budget_bytes) const {
  ops::TrainPlan::Geometry g;
  g.dims = config_.hidden_size;
  g.q_heads = config_.num_attention_heads;
  g.kv_heads = config_.num_key_value_heads;
  g.head_dim = config_.head_dim;
  g.ffn = config_.intermediate_size;
  g.eps = config_.rms_norm_eps;
  g.attention_scale = attention_scale();
  g.rope_factor = config_.rope_factor;
  g.dtype = to_kernel(dtype_);
  std::vector<ops::TrainPlan::Layer> layers;
  for (const auto& layer : layers_) {
    layers.push_back({{}, *layer.input_norm, *layer.post_norm, layer.window});
    for (const auto& linear : layer.linears) {
      layers.back().linears.push_back({linear.weight, linear.bias});
    }
  }
  size_t at = 0;
  for (const auto& module : adapter.modules()) {
    const auto [layer, slot] = linear_index(module.path);
    auto& linear = layers[layer].linears[slot];
    linear.rank = module.lora.a.shape(0);
    linear.scale = module.lora.scale;
    linear.a = at;
    at += module.lora.a.size();
    linear.b = at;
    at += module.lora.b.size();
  }
  return std::make_shared<ops::TrainPlan>(
      g, layers, embedding_, head_, *final_norm_, config_.inv_freq, at, memory_budget_bytes);
}

std::pair<mx::array, mx::array> Model::cached_forward(
    const mx::array& tokens,
    const mx::array& position,
    mx::array cache,
    const AdapterWeights& adapter,
    int rows) const {
  const auto stream = ops::stream();
  const int count = tokens.shape(0);
  LoraLinear embedding{embedding_, std::nullopt, std::nullopt};
  if (const auto* lora = adapter.find_embedding()) embedding.lora = *lora;
  auto residual = ops::lora_embedding(tokens, embedding, dtype_);
  auto positions = mx::add(mx::arange(0, count, 1, mx::int32, stream), position, stream);
  auto table = ops::rope_table(positions, float_array(config_.inv_freq), config_.rope_factor);

  std::optional<mx::array> update;
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    const Attend attend = [&](const auto& q, const auto& k, const auto& v) {
      auto [out, next] =
          ops::cached_attention(q, k, v, cache, i, position, attention_scale(), layers_[i].window);
      cache = next;
      return out;
    };
    auto [h, u] = layer_forward(i, residual, update ? &*update : nullptr, table, adapter, attend);
    residual = h;
    update = u;
  }
  const auto last_rows = [&](const mx::array& a) {
    return mx::slice(a, {count - rows, 0}, {count, config_.hidden_size}, stream);
  };
  auto normed =
      update ? ops::add_rms_norm(
                   last_rows(*update), last_rows(residual), *final_norm_, config_.rms_norm_eps)
                   .second
             : ops::rms_norm(last_rows(residual), *final_norm_, config_.rms_norm_eps);
  return {ops::logits(normed, head_), cache};
}

mx::array Model::prefill(
    std::span<const int32_t> tokens,
    KVCache& cache,
    const AdapterWeights& adapter,
    int rows) const {
  // The only reference to the cache's array goes through the chain of layers, so that each writes
  // in place. A failure on the way leaves the cache empty-handed: generations do not outlive one.
  auto [logits, next] = cached_forward(
      int_array(tokens),
      mx::array(cache.length_),
      std::exchange(cache.data_, mx::array(0.0f)),
      adapter,
      rows);
  cache.data_ = next;
  return logits;
}

std::shared_ptr<const ops::DecodePlan> Model::make_plan(const AdapterWeights& wide) const {
  // Reading the adapter is most of what it costs here: 16 bits halve that, and the products round
  // A and B to bf16 anyway where the inputs are.
  const auto adapter = dtype_ == mx::float32 ? wide : wide.astype(dtype_);
  ops::DecodePlan::Geometry g;
  g.dims = config_.hidden_size;
  g.q_heads = config_.num_attention_heads;
  g.kv_heads = config_.num_key_value_heads;
  g.head_dim = config_.head_dim;
  g.ffn = config_.intermediate_size;
  g.eps = config_.rms_norm_eps;
  g.attention_scale = attention_scale();
  g.rope_factor = config_.rope_factor;
  g.dtype = to_kernel(dtype_);
  std::vector<ops::DecodeLayer> layers;
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    const auto linear = [&](Slot slot) { return with_adapter(i, slot, adapter); };
    const auto& layer = layers_[i];
    layers.push_back(
        {linear(Slot::q_proj),
         linear(Slot::k_proj),
         linear(Slot::v_proj),
         linear(Slot::o_proj),
         linear(Slot::gate_proj),
         linear(Slot::up_proj),
         linear(Slot::down_proj),
         *layer.input_norm,
         *layer.post_norm,
         layer.q_norm,
         layer.k_norm,
         layer.window});
  }
  LoraLinear embedding{embedding_, std::nullopt, std::nullopt};
  if (const auto* lora = adapter.find_embedding()) embedding.lora = *lora;
  return std::make_shared<const ops::DecodePlan>(
      g, std::move(layers), std::move(embedding), head_, *final_norm_, config_.inv_freq);
}

mx::array Model::decode(
    std::span<const int32_t> tokens,
    KVCache& cache,
    const AdapterWeights& adapter,
    int rows) const {
  const int count = static_cast<int>(tokens.size());
  if (count < 1 || rows < 1 || rows > count) {
    throw Error(
        ErrorCode::internal,
        fmt::format("[decode] rows must be 1 … tokens ({}) but is {}", count, rows));
  }
  for (int32_t token : tokens) {
    if (token < 0 || token >= config_.vocab_size) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[decode] token must be in [0, {}) but is {}", config_.vocab_size, token),
          "is this the model's own tokenizer?");
    }
  }
  cache.reserve(cache.length_ + count);
  auto logits = [&] {
    if (count > ops::kDecodeMaxTokens || !ops::has_decode_step())
      return prefill(tokens, cache, adapter, rows);
    if (!cache.plan_ || !cache.plan_adapter_.same(adapter)) {
      cache.plan_ = make_plan(adapter);
      cache.plan_adapter_ = adapter;
    }
    mx::array data = cache.data_;
    cache.data_ = mx::array(0.0f);
    auto [out, next] = ops::decode_step(cache.plan_, tokens, data, cache.length_, rows);
    cache.data_ = next;
    return out;
  }();
  mx::eval(logits, cache.data_);
  cache.length_ += count;
  return logits;
}

}  // namespace metal_lora
