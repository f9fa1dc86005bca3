// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/safetensors_types.h"

namespace metal_lora::io {
namespace {

// In the order of the reference's Dtype, from which it sorts in reverse.
constexpr TensorType kAscending[] = {
    TensorType::boolean,
    TensorType::u8,
    TensorType::i8,
    TensorType::i16,
    TensorType::u16,
    TensorType::f16,
    TensorType::bf16,
    TensorType::i32,
    TensorType::u32,
    TensorType::f32,
    TensorType::f64,
    TensorType::i64,
    TensorType::u64};

}  // namespace

std::optional<TensorType> safetensors_type(std::string_view name) {
  for (const TensorType type : kAscending) {
    if (tensor_type_name(type) == name) return type;
  }
  return std::nullopt;
}

std::string safetensors_type_names() {
  std::string names;
  for (const TensorType type : kAscending) {
    if (!names.empty()) names += ", ";
    names += tensor_type_name(type);
  }
  return names;
}

int safetensors_layout_rank(TensorType type) {
  int rank = static_cast<int>(std::size(kAscending));
  for (const TensorType candidate : kAscending) {
    if (candidate == type) return rank;
    --rank;
  }
  return 0;
}

}  // namespace metal_lora::io
