// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "metal_lora/model.h"
#include "src/io/gguf.h"
#include "src/io/json.h"
#include "src/io/tensor.h"

namespace metal_lora {

/// config.json of a Hugging Face folder. Error unsupported naming the field that asks for what the
/// model code does not do; invalid_input for impossible sizes.
ModelConfig parse_hf_config(const io::Json& json, const std::string& path);
/// The same from a GGUF's metadata (llama, qwen2, qwen3).
ModelConfig parse_gguf_config(const io::GgufFile& file);
/// The id or list of ids under `key`, none where it is absent. Error invalid_input for ids outside
/// the config's vocabulary.
std::vector<int32_t> token_ids(
    const io::JsonObject& json, std::string_view key, const ModelConfig& config);
/// Checks what every config must satisfy (positive, bounded, consistent); fills layer_uses_window.
void validate_config(const ModelConfig& config, const std::string& path);

/// Where a model's tensors come from, by Hugging Face names ("model.layers.0.mlp.up_proj").
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  /// The weight of a linear or an embedding, as stored; Error when absent or of another shape.
  virtual Weight weight(const std::string& name, int out, int in, mlx::core::Dtype dense_dtype) = 0;
  /// A vector as f32, or nothing when absent.
  virtual std::optional<mlx::core::array> vector(const std::string& name, int size) = 0;
  virtual bool has(const std::string& name) const = 0;
  /// Names of tensors that nobody asked for: a model that has them is not the one we would run.
  virtual std::vector<std::string> unused() const = 0;
};

std::unique_ptr<TensorSource> open_gguf_tensors(io::GgufFile file, const ModelConfig& config);
std::unique_ptr<TensorSource> open_hf_tensors(const std::string& folder, const io::Json& config);

}  // namespace metal_lora
