// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "metal_lora/model.h"
#include "src/io/gguf.h"

namespace metal_lora {

/// What the rounding of the target left of a linear's update ΔW = scale·B·A: with T the rounding,
/// ΔW' = T(W + ΔW) − T(W). Norms are Frobenius's, in f64.
struct KeptUpdate {
  std::string path;
  double update_norm_squared = 0.0;  ///< ‖ΔW‖²
  double inner_product = 0.0;        ///< ⟨ΔW', ΔW⟩
  double error_squared = 0.0;        ///< ‖ΔW' − ΔW‖²

  /// Share of the update that is there: ⟨ΔW', ΔW⟩/‖ΔW‖². 1 is all of it, 0 nothing.
  double kept() const;
  /// Noise beside it: ‖ΔW' − ΔW‖/‖ΔW‖. 0 is exact.
  double error() const;
  KeptUpdate& operator+=(const KeptUpdate& other);
};

struct ExportOptions {
  mlx::core::Dtype dtype = mlx::core::bfloat16;  ///< of dense tensors
  int quantize_bits = 0;  ///< 4 or 8: linears and embedding as MLX checkpoints have them
  int quantize_group = 64;
  uint64_t max_shard_bytes = 4'000'000'000;  ///< of one safetensors file
  AdapterWeights adapter;                    ///< merged into its linears when not empty
  std::function<void(const KeptUpdate&)> on_merged;
  std::function<void()> before_config;   ///< after the tensors; may throw to leave no model
  std::function<void(double)> progress;  ///< 0 … 1
};

/// Writes any readable model as a Hugging Face folder: config.json, safetensors (sharded beyond
/// max_shard_bytes, with an index), tokenizer files and generation_config.json. Those are carried
/// along from a folder and generated from a GGUF. `folder` must be new or empty. Every file appears
/// whole or not at all, config.json last. Memory: one tensor at a time, beside the mapped source.
void export_model(
    const std::filesystem::path& model,
    const std::filesystem::path& folder,
    const ExportOptions& options);

/// config.json, generation_config.json, tokenizer.json and tokenizer_config.json for a GGUF. Error
/// unsupported naming what has no Hugging Face form.
nlohmann::ordered_json hf_config_of(const io::GgufFile& file);
nlohmann::ordered_json hf_generation_config_of(const io::GgufFile& file);
nlohmann::ordered_json hf_tokenizer_of(const io::GgufFile& file);
nlohmann::ordered_json hf_tokenizer_config_of(const io::GgufFile& file);

}  // namespace metal_lora
