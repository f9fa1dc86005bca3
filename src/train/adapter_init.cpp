// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/adapter_init.h"

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <set>

#include "src/train/config_fields.h"
#include "src/train/rng.h"

namespace metal_lora::train {
namespace {

namespace mx = mlx::core;

constexpr std::string_view kLayerPrefix = "model.layers.";

/// Layer of a path and what follows it ("self_attn.q_proj"); −1 outside the layers.
std::pair<int, std::string_view> split_path(std::string_view path) {
  if (!path.starts_with(kLayerPrefix)) return {-1, path};
  const std::string_view rest = path.substr(kLayerPrefix.size());
  int layer = -1;
  const auto [end, code] = std::from_chars(rest.data(), rest.data() + rest.size(), layer);
  if (code != std::errc()) return {-1, path};
  return {layer, rest.substr(static_cast<size_t>(end - rest.data()) + 1)};
}

bool matches(std::string_view path, std::string_view key) {
  const std::string_view inner = split_path(path).second;
  return path == key || inner == key || inner.ends_with(fmt::format(".{}", key));
}

void check_keys(const std::vector<LinearInfo>& linears, const TrainingConfig& config) {
  for (const auto& key : config.lora_keys) {
    const bool found = std::any_of(linears.begin(), linears.end(), [&](const LinearInfo& info) {
      return matches(info.path, key);
    });
    if (found) continue;
    std::set<std::string> known;
    for (const auto& info : linears) known.emplace(split_path(info.path).second);
    const std::string near = nearest_key(key, {known.begin(), known.end()});
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[lora_parameters.keys] \"{}\" must name a linear of the model", key),
        near.empty() ? fmt::format("it has {}", fmt::join(known, ", "))
                     : fmt::format("did you mean {}?", near));
  }
}

mx::array uniform(const mx::Shape& shape, float bound, uint64_t key) {
  mx::array out = mx::zeros(shape, mx::float32);
  out.eval();
  float* values = out.data<float>();
  for (size_t i = 0; i < out.size(); ++i) {
    values[i] = (2.0f * random_unit(key, i) - 1.0f) * bound;
  }
  return out;
}

AdapterModule fresh_module(const LinearInfo& info, const TrainingConfig& config) {
  const uint64_t key = random_key(static_cast<uint64_t>(config.seed), info.path);
  const float bound = static_cast<float>(1.0 / std::sqrt(static_cast<double>(info.in_features)));
  Lora lora{
      uniform({config.lora_rank, info.in_features}, bound, key),
      mx::zeros({info.out_features, config.lora_rank}, mx::float32)};
  lora.scale = static_cast<float>(config.effective_scale());
  return {info.path, std::move(lora)};
}

/// A and B as f32 arrays of their own.
void to_f32(Lora& lora) {
  lora.a = mx::contiguous(mx::astype(lora.a, mx::float32));
  lora.b = mx::contiguous(mx::astype(lora.b, mx::float32));
  mx::eval(lora.a, lora.b);
  lora.dropout = 0.0f;
  lora.dropout_seed = 0;
}

bool gives_scale(const TrainingConfig& config) {
  return config.given.contains("lora_parameters.scale") ||
         config.given.contains("lora_parameters.alpha");
}

}  // namespace

std::vector<LinearInfo> target_linears(const ModelConfig& model, const TrainingConfig& config) {
  const auto linears = adaptable_linears(model);
  check_keys(linears, config);
  if (config.num_layers > model.num_hidden_layers && config.given.contains("num_layers")) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[num_layers] must be at most the model's {} but is {}",
            model.num_hidden_layers,
            config.num_layers),
        "-1 adapts all layers");
  }
  const int first =
      config.num_layers < 0 ? 0 : std::max(0, model.num_hidden_layers - config.num_layers);
  std::vector<LinearInfo> out;
  for (const auto& info : linears) {
    const int layer = split_path(info.path).first;
    const bool named =
        std::any_of(config.lora_keys.begin(), config.lora_keys.end(), [&](const auto& key) {
          return matches(info.path, key);
        });
    // Outside the layers (the embedding) only by name, as in mlx-lm.
    if (layer >= 0 ? layer >= first && (named || config.lora_keys.empty()) : named) {
      out.push_back(info);
    }
  }
  if (out.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[lora_parameters.keys] must name a linear in the last {} layers", config.num_layers));
  }
  return out;
}

AdapterWeights initial_adapter(const ModelConfig& model, const TrainingConfig& config) {
  std::vector<AdapterModule> modules;
  for (const auto& info : target_linears(model, config)) {
    modules.push_back(fresh_module(info, config));
  }
  return {model, std::move(modules)};
}

AdapterWeights adapter_from_file(const ModelConfig& model, const TrainingConfig& config) {
  const std::string& path = config.resume_adapter_file;
  ReadAdapterOptions options;
  options.scale = static_cast<float>(config.effective_scale());
  AdapterFile file = read_adapter(path, options);
  for (auto& module : file.modules) {
    to_f32(module.lora);
    if (gives_scale(config)) module.lora.scale = static_cast<float>(config.effective_scale());
    const int rank = module.lora.a.shape(0);
    if (config.given.contains("lora_parameters.rank") && rank != config.lora_rank) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format(
              "[{}, {}] must have rank {} (lora_parameters.rank) but has {}",
              path,
              module.path,
              config.lora_rank,
              rank));
    }
  }
  if (!config.given.contains("lora_parameters.keys") && !config.given.contains("num_layers")) {
    return {model, std::move(file.modules)};
  }
  std::map<std::string, AdapterModule> from_file;
  for (auto& module : file.modules) from_file.emplace(module.path, module);
  std::vector<AdapterModule> modules;
  for (const auto& info : target_linears(model, config)) {
    const auto at = from_file.find(info.path);
    modules.push_back(at == from_file.end() ? fresh_module(info, config) : at->second);
    if (at != from_file.end()) from_file.erase(at);
  }
  if (!from_file.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] has {}, which num_layers and lora_parameters.keys leave out",
            path,
            from_file.begin()->first),
        "leave both out to train the modules of the file");
  }
  return {model, std::move(modules)};
}

}  // namespace metal_lora::train
