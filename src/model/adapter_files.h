// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The parts of metal_lora/adapter.h that tests and fuzzing call alone.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "metal_lora/adapter.h"
#include "src/model/module_pattern.h"

namespace metal_lora {

/// What an adapter_config.json says, with everything refused that this library lacks.
struct AdapterConfig {
  AdapterInfo info;
  int rank = 0;                                             ///< of modules that no pattern names
  double alpha = 0.0;                                       ///< PEFT
  double scale = 0.0;                                       ///< mlx-lm
  std::vector<std::pair<ModulePattern, int>> rank_pattern;  ///< PEFT; the first match counts
  std::vector<std::pair<ModulePattern, double>> alpha_pattern;  ///< PEFT
  std::vector<std::string> target_modules;      ///< PEFT; empty: not restricted by a list
  std::optional<ModulePattern> target_pattern;  ///< PEFT, target_modules given as one string
  std::vector<int64_t> layers_to_transform;     ///< PEFT; empty: all
  std::vector<std::string> keys;                ///< mlx-lm; empty: not restricted

  int rank_of(std::string_view module_path) const;
  float scale_of(std::string_view module_path, int module_rank) const;
  /// Whether the configuration has an adapter there: a tensor elsewhere would be ignored by the
  /// program that wrote it.
  bool targets(std::string_view module_path) const;
};

/// Parses the text of an adapter_config.json; `where` names it in errors. Throws Error.
AdapterConfig parse_adapter_config(std::string_view text, const std::string& where);

/// Module path and factor of a tensor's name in either format; throws Error unsupported for names
/// of things this library lacks (lora_magnitude_vector, modules_to_save …), invalid_input else.
struct AdapterTensorName {
  std::string module_path;  ///< "model.layers.0.mlp.up_proj"
  bool is_a = false;
  bool transposed = false;  ///< stored [in, rank] and [rank, out] as mlx-lm does
};
AdapterTensorName parse_adapter_tensor_name(std::string_view name, const std::string& where);

/// The adapter_config.json of that format for modules that fit it (one rank and scale for mlx-lm).
std::string adapter_config_text(
    AdapterFormat format, const AdapterInfo& info, const std::vector<AdapterModule>& modules);

/// The alpha that gives exactly `scale` in f32 when divided by `divisor` (rank or √rank): a whole
/// number where one does, else the shortest decimal.
double alpha_for_scale(float scale, double divisor);

}  // namespace metal_lora
