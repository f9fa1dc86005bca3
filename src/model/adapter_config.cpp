// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Reading adapter_config.json. The tables below decide about every key: what is read, what changes
// nothing here, and (all others) what is refused by name unless it is switched off.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "src/io/json.h"
#include "src/io/text_format.h"
#include "src/model/adapter_files.h"

namespace metal_lora {
namespace {

using io::Json;
using io::JsonObject;
using io::unwrap;

// PEFT keys that this file reads.
constexpr std::array<std::string_view, 11> kPeftRead = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
    "target_modules",
    "layers_to_transform",
    "init_lora_weights"};
// PEFT keys that say how the adapter was made or where it came from, not what it computes.
constexpr std::array<std::string_view, 14> kPeftHarmless = {
    "auto_mapping",
    "peft_version",
    "revision",
    "task_type",
    "inference_mode",
    "exclude_modules",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config"};
// Initialisations that leave the base model as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, …)
// change it, so that their adapter fits only the changed base.
constexpr std::array<std::string_view, 3> kPlainInits = {"gaussian", "eva", "orthogonal"};

template <size_t N>
bool contains(const std::array<std::string_view, N>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

[[noreturn]] void refuse_unsupported(
    const JsonObject& object, std::string_view key, std::string expected, std::string hint = {}) {
  const auto it = object.json().find(key);
  io::Failure failure = object.failure(
      key, std::move(expected), io::describe_json(it == object.json().end() ? nullptr : &*it));
  failure.code = ErrorCode::unsupported;
  failure.hint = std::move(hint);
  io::throw_failure(failure);
}

bool is_off(const Json& value) {
  return value.is_null() || value == false || value == "none" ||
         ((value.is_object() || value.is_array() || value.is_string()) && value.empty());
}

int checked_rank(const JsonObject& object, std::string_view key) {
  return static_cast<int>(unwrap(object.get_int(key, 1, kMaxAdapterRank)));
}

float checked_dropout(const JsonObject& object, std::string_view key) {
  return static_cast<float>(unwrap(object.get_number_or(key, 0.0, 0.0, 1.0)));
}

// nlohmann::json sorts keys, but in a pattern the first match counts: the order comes from a
// second, order-keeping pass over the text that was already found valid.
std::vector<std::string> keys_in_order(std::string_view text, const std::string& key) {
  const auto ordered = nlohmann::ordered_json::parse(text);
  std::vector<std::string> keys;
  const auto it = ordered.find(key);
  if (it != ordered.end() && it->is_object()) {
    for (const auto& item : it->items()) keys.push_back(item.key());
  }
  return keys;
}

void read_patterns(const JsonObject& root, std::string_view text, AdapterConfig& config) {
  for (const std::string key : {"rank_pattern", "alpha_pattern"}) {
    if (!root.has(key)) continue;
    const JsonObject patterns = unwrap(root.get_object(key));
    for (const std::string& pattern : keys_in_order(text, key)) {
      ModulePattern compiled(
          pattern, fmt::format("{}, {}.{}", root.path(), key, io::quote_text(pattern)));
      if (key == "rank_pattern") {
        config.rank_pattern.emplace_back(std::move(compiled), checked_rank(patterns, pattern));
      } else {
        config.alpha_pattern.emplace_back(
            std::move(compiled), unwrap(patterns.get_number(pattern)));
      }
    }
  }
}

void read_targets(const JsonObject& root, AdapterConfig& config) {
  const auto it = root.json().find("target_modules");
  if (it != root.json().end() && it->is_string()) {
    const auto& text = it->get_ref<const std::string&>();
    if (text != "all-linear") {
      config.target_pattern = ModulePattern(text, root.path() + ", target_modules");
    }
  } else if (root.has("target_modules")) {
    config.target_modules = unwrap(root.get_strings("target_modules"));
  }
  const auto layers = root.json().find("layers_to_transform");
  if (layers != root.json().end() && layers->is_number_integer()) {
    config.layers_to_transform = {unwrap(root.get_int("layers_to_transform", 0))};
  } else if (root.has("layers_to_transform")) {
    config.layers_to_transform = unwrap(root.get_ints("layers_to_transform"));
  }
}

void check_init(const JsonObject& root) {
  if (!root.has("init_lora_weights")) return;
  const Json& init = root.json().at("init_lora_weights");
  if (init.is_boolean()) return;
  if (init.is_string() && contains(kPlainInits, init.get_ref<const std::string&>())) return;
  refuse_unsupported(
      root,
      "init_lora_weights",
      "true, false, gaussian, eva or orthogonal",
      "other initialisations change the base model; save the adapter with PEFT's "
      "save_pretrained(…, path_initial_model_for_weight_conversion=…) first");
}

AdapterConfig parse_peft(const JsonObject& root, std::string_view text) {
  AdapterConfig config;
  config.info.format = AdapterFormat::peft;
  const std::string type = unwrap(root.get_string("peft_type"));
  if (type != "LORA") refuse_unsupported(root, "peft_type", "LORA");
  for (const auto& item : root.json().items()) {
    if (contains(kPeftRead, item.key()) || contains(kPeftHarmless, item.key())) continue;
    if (!is_off(item.value())) refuse_unsupported(root, item.key(), "absent or off");
  }
  check_init(root);
  config.rank = root.has("r") ? checked_rank(root, "r") : 8;
  config.alpha = unwrap(root.get_number_or("lora_alpha", 8.0));
  config.info.use_rslora = unwrap(root.get_bool_or("use_rslora", false));
  config.info.dropout = checked_dropout(root, "lora_dropout");
  config.info.base_model = unwrap(root.get_string_or("base_model_name_or_path", ""));
  read_patterns(root, text, config);
  read_targets(root, config);
  return config;
}

AdapterConfig parse_mlx_lm(const JsonObject& root) {
  AdapterConfig config;
  config.info.format = AdapterFormat::mlx_lm;
  if (unwrap(root.get_string_or("fine_tune_type", "lora")) != "lora") {
    refuse_unsupported(root, "fine_tune_type", "lora");
  }
  const JsonObject lora = unwrap(root.get_object("lora_parameters"));
  config.rank = checked_rank(lora, "rank");
  if (!lora.has("scale") && lora.has("alpha")) {
    io::Failure failure = lora.failure("scale", "a number", "missing");
    failure.hint = "mlx-lm's files have `scale`, a direct multiplier (alpha/rank), not `alpha`";
    io::throw_failure(failure);
  }
  constexpr double kMaxScale = std::numeric_limits<float>::max();
  config.scale = unwrap(lora.get_number("scale", -kMaxScale, kMaxScale));
  config.info.dropout = checked_dropout(lora, "dropout");
  if (lora.has("keys")) config.keys = unwrap(lora.get_strings("keys"));
  if (root.has("num_layers")) {
    config.info.num_layers = static_cast<int>(unwrap(root.get_int("num_layers", -1, 1 << 20)));
  }
  config.info.base_model = unwrap(root.get_string_or("model", ""));
  return config;
}

bool ends_with_name(std::string_view path, std::string_view name) {
  return path == name || (path.size() > name.size() && path.ends_with(name) &&
                          path[path.size() - name.size() - 1] == '.');
}

/// N of "model.layers.N.…"; −1 elsewhere.
int64_t layer_of(std::string_view path) {
  constexpr std::string_view kPrefix = "model.layers.";
  if (!path.starts_with(kPrefix)) return -1;
  int64_t layer = 0;
  size_t digits = 0;
  for (const char c : path.substr(kPrefix.size())) {
    if (c < '0' || c > '9' || digits == 9) break;
    layer = layer * 10 + (c - '0');
    ++digits;
  }
  return digits == 0 ? -1 : layer;
}

}  // namespace

AdapterConfig parse_adapter_config(std::string_view text, const std::string& where) {
  const Json json = unwrap(io::parse_json(text, where));
  const JsonObject root = unwrap(JsonObject::of(json, where));
  AdapterConfig config;
  if (root.has("peft_type")) {
    config = parse_peft(root, text);
  } else if (root.has("lora_parameters") || root.has("fine_tune_type")) {
    config = parse_mlx_lm(root);
  } else {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] must have peft_type (PEFT) or lora_parameters (mlx-lm) but has neither", where));
  }
  config.info.config_json[config.info.format] = nlohmann::ordered_json::parse(text).dump();
  return config;
}

int AdapterConfig::rank_of(std::string_view path) const {
  for (const auto& [pattern, value] : rank_pattern) {
    if (pattern.matches_suffix(path)) return value;
  }
  return rank;
}

float AdapterConfig::scale_of(std::string_view path, int module_rank) const {
  if (info.format == AdapterFormat::mlx_lm) return static_cast<float>(scale);
  double module_alpha = alpha;
  for (const auto& [pattern, value] : alpha_pattern) {
    if (!pattern.matches_suffix(path)) continue;
    module_alpha = value;
    break;
  }
  return static_cast<float>(
      module_alpha / (info.use_rslora ? std::sqrt(static_cast<double>(module_rank)) : module_rank));
}

bool AdapterConfig::targets(std::string_view path) const {
  const auto is_named = [&](const std::string& name) { return ends_with_name(path, name); };
  if (info.format == AdapterFormat::mlx_lm) {
    return keys.empty() || std::any_of(keys.begin(), keys.end(), is_named);
  }
  if (target_pattern) return target_pattern->matches_whole(path);
  if (std::find(target_modules.begin(), target_modules.end(), path) != target_modules.end()) {
    return true;
  }
  if (!target_modules.empty() &&
      std::none_of(target_modules.begin(), target_modules.end(), is_named)) {
    return false;
  }
  return layers_to_transform.empty() ||
         std::find(layers_to_transform.begin(), layers_to_transform.end(), layer_of(path)) !=
             layers_to_transform.end();
}

double alpha_for_scale(float scale, double divisor) {
  const auto gives_scale = [&](double alpha) {
    return static_cast<float>(alpha / divisor) == scale;
  };
  const double alpha = static_cast<double>(scale) * divisor;
  if (gives_scale(std::nearbyint(alpha))) return std::nearbyint(alpha);
  for (int digits = 2; digits < std::numeric_limits<double>::max_digits10; ++digits) {
    const double rounded = std::stod(fmt::format("{:.{}g}", alpha, digits));
    if (gives_scale(rounded)) return rounded;
  }
  return alpha;  // a product of two exact numbers, off by at most half an ulp of f64: rounds back
}

}  // namespace metal_lora
