// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "src/io/tensor.h"

namespace metal_lora::io {

/// The type that a safetensors header calls `name`; nullopt for what the format knows and we do not
/// (F8_*, F4, F6_*, C64) and for what nobody knows.
std::optional<TensorType> safetensors_type(std::string_view name);

/// Whether the format has a name for the type: every type but the block ones.
inline bool is_safetensors_type(TensorType type) {
  return !is_quantized(type);
}

/// "F64, F32, …", for messages.
std::string safetensors_type_names();

/// The writer's order of types: like the reference, widest first so that every tensor is aligned.
int safetensors_layout_rank(TensorType type);

}  // namespace metal_lora::io
