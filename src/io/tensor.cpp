// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/tensor.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

namespace metal_lora::io {
namespace {

constexpr TensorTypeTraits kTensorTypes[kTensorTypeCount] = {
    {TensorType::f64, "F64", 1, 8, true},        {TensorType::f32, "F32", 1, 4, true},
    {TensorType::f16, "F16", 1, 2, true},        {TensorType::bf16, "BF16", 1, 2, true},
    {TensorType::i8, "I8", 1, 1, false},         {TensorType::i16, "I16", 1, 2, false},
    {TensorType::i32, "I32", 1, 4, false},       {TensorType::i64, "I64", 1, 8, false},
    {TensorType::u8, "U8", 1, 1, false},         {TensorType::u16, "U16", 1, 2, false},
    {TensorType::u32, "U32", 1, 4, false},       {TensorType::u64, "U64", 1, 8, false},
    {TensorType::boolean, "BOOL", 1, 1, false},  {TensorType::q4_0, "Q4_0", 32, 18, false},
    {TensorType::q4_1, "Q4_1", 32, 20, false},   {TensorType::q5_0, "Q5_0", 32, 22, false},
    {TensorType::q5_1, "Q5_1", 32, 24, false},   {TensorType::q8_0, "Q8_0", 32, 34, false},
    {TensorType::q4_k, "Q4_K", 256, 144, false}, {TensorType::q5_k, "Q5_K", 256, 176, false},
    {TensorType::q6_k, "Q6_K", 256, 210, false},
};

}  // namespace

const TensorTypeTraits& tensor_type_traits(TensorType type) {
  return kTensorTypes[static_cast<size_t>(type)];
}

std::string_view tensor_type_name(TensorType type) {
  return tensor_type_traits(type).name;
}

CheckedSize count_elements(std::span<const uint64_t> shape) {
  CheckedSize elements(1u);
  for (const uint64_t dim : shape) elements *= dim;
  return elements;
}

CheckedSize count_bytes(TensorType type, std::span<const uint64_t> shape) {
  const TensorTypeTraits& traits = tensor_type_traits(type);
  if (traits.block_elements == 1) return count_elements(shape) * traits.block_bytes;
  // Blocks never span rows.
  if (shape.empty()) return CheckedSize(-1);
  return CheckedSize(shape.back()).divided_exactly_by(traits.block_elements) * traits.block_bytes *
         count_elements(shape.first(shape.size() - 1));
}

uint64_t TensorInfo::element_count() const {
  return count_elements(shape).get().value_or(0);
}

uint64_t TensorInfo::row_elements() const {
  return shape.empty() ? 1 : shape.back();
}

uint64_t TensorInfo::row_count() const {
  if (shape.empty()) return 1;
  return count_elements(std::span(shape).first(shape.size() - 1)).get().value_or(0);
}

uint64_t TensorInfo::row_bytes() const {
  const uint64_t rows = row_count();
  return rows == 0 ? 0 : nbytes / rows;
}

bool TensorInfo::is_aligned() const {
  const uint64_t alignment = is_quantized(type) ? 2 : tensor_type_traits(type).block_bytes;
  return reinterpret_cast<uintptr_t>(data) % alignment == 0;
}

std::string format_shape(std::span<const uint64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape.begin(), shape.end(), ", "));
}

TensorIndex::TensorIndex(const std::vector<TensorInfo>& tensors) : by_name_(tensors.size()) {
  std::iota(by_name_.begin(), by_name_.end(), 0u);
  std::sort(by_name_.begin(), by_name_.end(), [&](uint32_t a, uint32_t b) {
    return tensors[a].name < tensors[b].name;
  });
}

const TensorInfo* TensorIndex::find(
    const std::vector<TensorInfo>& tensors, std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name, [&](uint32_t at, std::string_view wanted) {
        return tensors[at].name < wanted;
      });
  if (found == by_name_.end() || tensors[*found].name != name) return nullptr;
  return &tensors[*found];
}

std::optional<std::string> TensorIndex::duplicate(const std::vector<TensorInfo>& tensors) const {
  for (size_t i = 1; i < by_name_.size(); ++i) {
    if (tensors[by_name_[i]].name == tensors[by_name_[i - 1]].name) {
      return tensors[by_name_[i]].name;
    }
  }
  return std::nullopt;
}

}  // namespace metal_lora::io
