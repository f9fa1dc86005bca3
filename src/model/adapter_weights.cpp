// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <fmt/format.h>
#include <mlx/ops.h>

#include "metal_lora/error.h"
#include "metal_lora/model.h"
#include "src/ops/checks.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

constexpr const char* kEmbeddingPath = "model.embed_tokens";

std::pair<int, int> slot_features(const ModelConfig& c, Slot slot) {
  const int q = c.num_attention_heads * c.head_dim, kv = c.num_key_value_heads * c.head_dim;
  switch (slot) {
    case Slot::q_proj:
      return {q, c.hidden_size};
    case Slot::k_proj:
    case Slot::v_proj:
      return {kv, c.hidden_size};
    case Slot::o_proj:
      return {c.hidden_size, q};
    case Slot::gate_proj:
    case Slot::up_proj:
      return {c.intermediate_size, c.hidden_size};
    case Slot::down_proj:
      return {c.hidden_size, c.intermediate_size};
  }
  throw Error(ErrorCode::internal, "[slot] unknown");
}

std::string linear_path(int layer, Slot slot) {
  return fmt::format("model.layers.{}.{}", layer, slot_path(slot));
}

/// Position in State::index, or -1 for a path that the model does not have.
int index_of(const ModelConfig& config, const std::string& path) {
  if (path == kEmbeddingPath) return config.num_hidden_layers * kSlotsPerLayer;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    const auto prefix = fmt::format("model.layers.{}.", layer);
    if (!path.starts_with(prefix)) continue;
    for (int slot = 0; slot < kSlotsPerLayer; ++slot) {
      if (path.substr(prefix.size()) == slot_path(static_cast<Slot>(slot))) {
        return layer * kSlotsPerLayer + slot;
      }
    }
  }
  return -1;
}

/// splitmix64's finaliser: unrelated seeds for neighbouring modules.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

}  // namespace

std::string_view slot_path(Slot slot) {
  static constexpr std::string_view kPaths[kSlotsPerLayer] = {
      "self_attn.q_proj",
      "self_attn.k_proj",
      "self_attn.v_proj",
      "self_attn.o_proj",
      "mlp.gate_proj",
      "mlp.up_proj",
      "mlp.down_proj"};
  return kPaths[static_cast<size_t>(slot)];
}

std::vector<LinearInfo> adaptable_linears(const ModelConfig& config) {
  std::vector<LinearInfo> linears;
  for (int layer = 0; layer < config.num_hidden_layers; ++layer) {
    for (int slot = 0; slot < kSlotsPerLayer; ++slot) {
      const auto [out, in] = slot_features(config, static_cast<Slot>(slot));
      linears.push_back({linear_path(layer, static_cast<Slot>(slot)), out, in});
    }
  }
  return linears;
}

AdapterWeights::AdapterWeights(const ModelConfig& config, std::vector<AdapterModule> modules) {
  if (modules.empty()) return;
  State state;
  state.index.assign(static_cast<size_t>(config.num_hidden_layers) * kSlotsPerLayer + 1, -1);
  for (size_t i = 0; i < modules.size(); ++i) {
    const auto& [path, lora] = modules[i];
    const int at = index_of(config, path);
    if (at < 0) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[adapter] the model has no linear {}", path),
          fmt::format("it has {} layers of {}", config.num_hidden_layers, config.architecture));
    }
    if (state.index[at] >= 0) {
      throw Error(ErrorCode::invalid_input, fmt::format("[adapter] {} occurs twice", path));
    }
    state.index[at] = static_cast<int>(i);
    // The embedding's A is [rank, vocab], B [dims, rank]: a linear from vocab to dims.
    const bool embedding = path == kEmbeddingPath;
    const auto [out, in] = embedding
                               ? std::pair(config.hidden_size, config.vocab_size)
                               : slot_features(config, static_cast<Slot>(at % kSlotsPerLayer));
    const int rank = lora.a.ndim() == 2 ? lora.a.shape(0) : 0;
    if (rank < 1 || rank > 1024)
      ops::refuse(
          "adapter", path + ".A", fmt::format("(rank ≤ 1024, {})", in), ops::shape_text(lora.a));
    ops::check_shape(path.c_str(), "A", lora.a, {rank, in});
    ops::check_shape(path.c_str(), "B", lora.b, {out, rank});
  }
  state.modules = std::move(modules);
  state_ = std::make_shared<const State>(std::move(state));
}

const std::vector<AdapterModule>& AdapterWeights::modules() const {
  static const std::vector<AdapterModule> none;
  return state_ ? state_->modules : none;
}

const Lora* AdapterWeights::find(int layer, Slot slot) const {
  if (!state_) return nullptr;
  const int i =
      state_->index[static_cast<size_t>(layer) * kSlotsPerLayer + static_cast<size_t>(slot)];
  return i < 0 ? nullptr : &state_->modules[i].lora;
}

const Lora* AdapterWeights::find_embedding() const {
  if (!state_ || state_->index.back() < 0) return nullptr;
  return &state_->modules[state_->index.back()].lora;
}

std::vector<mx::array> AdapterWeights::parameters() const {
  std::vector<mx::array> parameters;
  for (const auto& module : modules()) {
    parameters.push_back(module.lora.a);
    parameters.push_back(module.lora.b);
  }
  return parameters;
}

AdapterWeights AdapterWeights::with_parameters(std::span<const mx::array> parameters) const {
  if (parameters.size() != 2 * modules().size()) {
    ops::refuse(
        "adapter",
        "parameters",
        fmt::format("{} arrays", 2 * modules().size()),
        std::to_string(parameters.size()));
  }
  if (!state_) return {};
  auto state = std::make_shared<State>(*state_);
  for (size_t i = 0; i < state->modules.size(); ++i) {
    auto& lora = state->modules[i].lora;
    if (parameters[2 * i].shape() != lora.a.shape() ||
        parameters[2 * i + 1].shape() != lora.b.shape()) {
      ops::refuse(
          "adapter",
          state->modules[i].path,
          ops::shape_text(lora.a) + " and " + ops::shape_text(lora.b),
          ops::shape_text(parameters[2 * i]) + " and " + ops::shape_text(parameters[2 * i + 1]));
    }
    lora.a = parameters[2 * i];
    lora.b = parameters[2 * i + 1];
  }
  AdapterWeights result;
  result.state_ = std::move(state);
  return result;
}

AdapterWeights AdapterWeights::with_dropout(float dropout, uint64_t seed) const {
  if (!state_) return {};
  auto state = std::make_shared<State>(*state_);
  for (size_t i = 0; i < state->modules.size(); ++i) {
    state->modules[i].lora.dropout = dropout;
    state->modules[i].lora.dropout_seed = mix(seed ^ mix(i));
  }
  AdapterWeights result;
  result.state_ = std::move(state);
  return result;
}

AdapterWeights AdapterWeights::astype(mx::Dtype dtype) const {
  std::vector<mx::array> parameters;
  for (const auto& p : this->parameters()) parameters.push_back(mx::astype(p, dtype));
  return with_parameters(parameters);
}

}  // namespace metal_lora
