// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include <fmt/format.h>
#include <mlx/allocator.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>
#include <nlohmann/json.hpp>

#include "src/io/atomic_file.h"
#include "src/io/safetensors.h"
#include "src/model/adapter_files.h"
#include "src/model/adapter_tensors.h"

namespace fs = std::filesystem;
namespace mx = mlx::core;

namespace metal_lora {
namespace {

using nlohmann::ordered_json;

constexpr const char* kWhere = "write_adapter";

io::TensorType tensor_type(mx::Dtype dtype) {
  switch (to_kernel(dtype)) {
    case DType::f32:
      return io::TensorType::f32;
    case DType::f16:
      return io::TensorType::f16;
    case DType::bf16:
      return io::TensorType::bf16;
  }
  throw Error(ErrorCode::internal, "[write_adapter] unknown dtype");
}

/// The f32 as the shortest decimal that is the same f32: 1.3333334, not 1.3333333730697632.
double shortest(float value) {
  return std::stod(fmt::format("{}", value));
}

ordered_json carried(const AdapterInfo& info, AdapterFormat format) {
  const auto it = info.config_json.find(format);
  if (it == info.config_json.end() || it->second.empty()) return ordered_json::object();
  auto json = ordered_json::parse(it->second, nullptr, false);
  if (!json.is_object()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[{}] the {} configuration must be a JSON object but is not",
            kWhere,
            adapter_format_name(format)));
  }
  return json;
}

/// Whether a carried configuration still says what the modules are, so that it can stay as it was.
bool describes(
    const ordered_json& json, AdapterFormat format, const std::vector<AdapterModule>& modules) {
  if (json.empty()) return false;
  try {
    const AdapterConfig config = parse_adapter_config(json.dump(), kWhere);
    if (config.info.format != format) return false;
    return std::all_of(modules.begin(), modules.end(), [&](const AdapterModule& m) {
      const int rank = m.lora.a.shape(0);
      return config.targets(m.path) && config.rank_of(m.path) == rank &&
             config.scale_of(m.path, rank) == m.lora.scale;
    });
  } catch (const Error&) {
    return false;  // it never described them: it is written anew
  }
}

/// "self_attn.q_proj" of "model.layers.3.self_attn.q_proj"; other paths stay whole.
std::string path_in_layer(const std::string& path) {
  const auto [layer, slot, whole] = module_order(path);
  return slot < kSlotsPerLayer ? std::string(slot_path(static_cast<Slot>(slot))) : whole;
}

std::string mlx_lm_config_text(const AdapterInfo& info, const std::vector<AdapterModule>& modules) {
  ordered_json json = carried(info, AdapterFormat::mlx_lm);
  if (!describes(json, AdapterFormat::mlx_lm, modules)) {
    std::set<std::string> keys;
    for (const AdapterModule& module : modules) keys.insert(path_in_layer(module.path));
    const AdapterModule& first = modules.front();
    json["lora_parameters"] = ordered_json{
        {"dropout", shortest(info.dropout)},
        {"keys", keys},
        {"rank", first.lora.a.shape(0)},
        {"scale", shortest(first.lora.scale)}};
  }
  json["fine_tune_type"] = "lora";
  if (info.num_layers || !json.contains("num_layers"))
    json["num_layers"] = info.num_layers.value_or(-1);
  if (!info.base_model.empty() && !json.contains("model")) json["model"] = info.base_model;
  return nlohmann::json(json).dump(4) + "\n";  // keys sorted, as mlx-lm writes them
}

/// target_modules and layers_to_transform that name exactly these modules.
void add_peft_targets(
    ordered_json& json, const AdapterInfo& info, const std::vector<AdapterModule>& modules) {
  std::set<int64_t> layers;
  std::set<std::string> names, paths;
  bool all_in_layers = true;
  for (const AdapterModule& module : modules) {
    const auto [layer, slot, path] = module_order(module.path);
    all_in_layers = all_in_layers && slot < kSlotsPerLayer;
    layers.insert(layer);
    names.insert(path.substr(path.rfind('.') + 1));
    paths.insert(path);
  }
  json["layers_to_transform"] = nullptr;
  if (!all_in_layers || names.size() * layers.size() != paths.size()) {
    json["target_modules"] = paths;
    return;
  }
  json["target_modules"] = names;
  const bool from_first =
      *layers.begin() == 0 && *layers.rbegin() + 1 == static_cast<int64_t>(layers.size());
  if (!from_first || info.num_layers.value_or(-1) >= 0) json["layers_to_transform"] = layers;
}

ordered_json whole_or_decimal(double value) {
  constexpr double kExactIntegers = 9007199254740992.0;  // 2^53
  if (std::nearbyint(value) == value && std::abs(value) < kExactIntegers) {
    return static_cast<int64_t>(value);
  }
  return value;
}

template <class T>
T most_common(const std::vector<T>& values) {
  std::map<T, size_t> counts;
  for (const T& value : values) ++counts[value];
  return std::max_element(
             counts.begin(),
             counts.end(),
             [](const auto& x, const auto& y) { return x.second < y.second; })
      ->first;
}

void add_peft_ranks(
    ordered_json& json, const AdapterInfo& info, const std::vector<AdapterModule>& modules) {
  std::vector<int> ranks;
  std::vector<double> alphas;
  for (const AdapterModule& module : modules) {
    const int rank = module.lora.a.shape(0);
    const double divisor = info.use_rslora ? std::sqrt(static_cast<double>(rank)) : rank;
    ranks.push_back(rank);
    alphas.push_back(alpha_for_scale(module.lora.scale, divisor));
  }
  const int rank = most_common(ranks);
  const double alpha = most_common(alphas);
  ordered_json rank_pattern = ordered_json::object(), alpha_pattern = ordered_json::object();
  for (size_t i = 0; i < modules.size(); ++i) {
    if (ranks[i] != rank) rank_pattern[modules[i].path] = ranks[i];
    if (alphas[i] != alpha) alpha_pattern[modules[i].path] = whole_or_decimal(alphas[i]);
  }
  json["r"] = rank;
  json["lora_alpha"] = whole_or_decimal(alpha);
  json["use_rslora"] = info.use_rslora;
  json["rank_pattern"] = rank_pattern;
  json["alpha_pattern"] = alpha_pattern;
}

std::string peft_config_text(const AdapterInfo& info, const std::vector<AdapterModule>& modules) {
  ordered_json json = carried(info, AdapterFormat::peft);
  if (!describes(json, AdapterFormat::peft, modules)) {
    const ordered_json defaults = {
        {"bias", "none"},
        {"fan_in_fan_out", false},
        {"inference_mode", true},
        {"init_lora_weights", true},
        {"modules_to_save", nullptr},
        {"task_type", "CAUSAL_LM"},
        {"base_model_name_or_path", nullptr}};
    for (const auto& item : defaults.items()) {
      if (!json.contains(item.key())) json[item.key()] = item.value();
    }
    json["peft_type"] = "LORA";
    json["lora_dropout"] = shortest(info.dropout);
    add_peft_ranks(json, info, modules);
    add_peft_targets(json, info, modules);
  }
  if (!info.base_model.empty()) json["base_model_name_or_path"] = info.base_model;
  return nlohmann::json(json).dump(2) + "\n";  // keys sorted, as PEFT writes them
}

bool is_power_of_two_ratio(float x, float y) {
  int exponent = 0;
  const double mantissa = std::frexp(static_cast<double>(x) / y, &exponent);
  return std::abs(mantissa) == 0.5 && std::ldexp(mantissa, exponent) * y == x;
}

/// One scale and one rank for all, as mlx-lm needs it.
std::vector<AdapterModule> unified(
    std::vector<AdapterModule> modules,
    const WriteAdapterOptions& options,
    std::map<std::string, std::string>& metadata) {
  std::vector<float> scales;
  int rank = 0;
  for (const AdapterModule& module : modules) {
    scales.push_back(module.lora.scale);
    rank = std::max(rank, module.lora.a.shape(0));
  }
  const float scale = most_common(scales);
  ordered_json ranks = ordered_json::object();
  for (AdapterModule& module : modules) {
    Lora& lora = module.lora;
    if (lora.scale != scale) {
      const bool exact = scale != 0 && lora.scale != 0 && is_power_of_two_ratio(lora.scale, scale);
      if (!exact && (!options.fold_scale || scale == 0)) {
        throw Error(
            ErrorCode::unsupported,
            fmt::format(
                "[{}] {} must have the scale {} of the other modules but has {}",
                kWhere,
                module.path,
                scale,
                lora.scale),
            "mlx-lm's format has one scale for all; fold the difference into B (--fold-scale)");
      }
      const mx::array factor(lora.scale / scale);
      lora.b = mx::astype(mx::multiply(mx::astype(lora.b, mx::float32), factor), lora.b.dtype());
      lora.b.eval();
      lora.scale = scale;
    }
    if (const int own = lora.a.shape(0); own < rank) {
      ranks[module.path] = own;
      lora.a = copy_block(lora.a, rank, lora.a.shape(1));
      lora.b = copy_block(lora.b, lora.b.shape(0), rank);
    }
  }
  if (!ranks.empty()) metadata[std::string(kRanksMetadata)] = ranks.dump();
  return modules;
}

void check_modules(const std::vector<AdapterModule>& modules) {
  if (modules.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[{}] the adapter must have modules but is empty", kWhere));
  }
  for (const AdapterModule& module : modules) {
    const Lora& lora = module.lora;
    if (lora.a.ndim() != 2 || lora.b.ndim() != 2 || lora.a.shape(0) != lora.b.shape(1)) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[{}] {} must have factors of one rank but has not", kWhere, module.path));
    }
    if (!std::isfinite(lora.scale)) {
      throw Error(
          ErrorCode::invalid_input,
          fmt::format("[{}] {} must have a finite scale but has not", kWhere, module.path));
    }
  }
}

/// Names, types and bytes of the tensor file; `kept` owns what the infos point to.
std::vector<io::TensorInfo> tensors_of(
    const std::vector<AdapterModule>& modules, AdapterFormat format, std::vector<mx::array>& kept) {
  kept.reserve(2 * modules.size());
  std::vector<io::TensorInfo> infos;
  for (const AdapterModule& module : modules) {
    const bool embedding = module.path.ends_with("embed_tokens");
    for (const bool is_a : {true, false}) {
      mx::array matrix = mx::contiguous(is_a ? module.lora.a : module.lora.b);
      matrix.eval();
      io::TensorInfo info;
      info.type = tensor_type(matrix.dtype());
      if (format == AdapterFormat::mlx_lm) {
        auto buffer = mx::allocator::malloc(std::max<size_t>(1, matrix.nbytes()));
        transpose_bytes(
            reinterpret_cast<const std::byte*>(matrix.data<char>()),
            matrix.shape(0),
            matrix.shape(1),
            mx::size_of(matrix.dtype()),
            static_cast<std::byte*>(buffer.buffer().raw_ptr()));
        matrix = mx::array(
            std::move(buffer), mx::Shape{matrix.shape(1), matrix.shape(0)}, matrix.dtype());
        info.name = module.path + (is_a ? ".lora_a" : ".lora_b");
      } else {
        info.name = "base_model.model." + module.path +
                    (embedding ? (is_a ? ".lora_embedding_A" : ".lora_embedding_B")
                               : (is_a ? ".lora_A.weight" : ".lora_B.weight"));
      }
      kept.push_back(matrix);
      info.shape = {static_cast<uint64_t>(matrix.shape(0)), static_cast<uint64_t>(matrix.shape(1))};
      info.data = reinterpret_cast<const std::byte*>(kept.back().data<char>());
      info.nbytes = matrix.nbytes();
      infos.push_back(std::move(info));
    }
  }
  return infos;
}

}  // namespace

std::string adapter_config_text(
    AdapterFormat format, const AdapterInfo& info, const std::vector<AdapterModule>& modules) {
  return format == AdapterFormat::mlx_lm ? mlx_lm_config_text(info, modules)
                                         : peft_config_text(info, modules);
}

fs::path write_adapter(
    const fs::path& folder,
    AdapterFormat format,
    const AdapterFile& adapter,
    const WriteAdapterOptions& options) {
  check_modules(adapter.modules);
  std::map<std::string, std::string> metadata;
  metadata["format"] = format == AdapterFormat::mlx_lm ? "mlx" : "pt";
  for (const auto& [other, text] : adapter.info.config_json) {
    if (other != format && !text.empty()) metadata[carried_config_key(other)] = text;
  }
  const auto modules = format == AdapterFormat::mlx_lm ? unified(adapter.modules, options, metadata)
                                                       : adapter.modules;
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) {
    throw Error(
        ErrorCode::io,
        fmt::format(
            "[{}] must be a folder that can be made but is not: {}",
            folder.string(),
            error.message()));
  }
  const fs::path file = folder / (options.file_name.empty() ? std::string(adapter_file_name(format))
                                                            : options.file_name);
  std::vector<mx::array> kept;
  const auto tensors = tensors_of(modules, format, kept);
  io::unwrap(io::write_safetensors(file.string(), tensors, metadata));
  io::unwrap(io::write_file_atomic(
      (folder / "adapter_config.json").string(),
      adapter_config_text(format, adapter.info, modules)));
  return file;
}

fs::path write_adapter(
    const fs::path& folder,
    AdapterFormat format,
    const AdapterWeights& weights,
    const AdapterInfo& info,
    const WriteAdapterOptions& options) {
  return write_adapter(folder, format, AdapterFile{info, weights.modules()}, options);
}

}  // namespace metal_lora
