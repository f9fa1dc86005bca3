// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/model/adapter_tensors.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include <fmt/format.h>
#include <mlx/allocator.h>

#include "src/io/text_format.h"
#include "src/model/adapter_files.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

constexpr std::string_view kPeftPrefix = "base_model.model.";
constexpr std::string_view kLayersPrefix = "model.layers.";
constexpr size_t kMaxLayerDigits = 9;

template <class T>
void transpose_elements(const std::byte* source, uint64_t rows, uint64_t columns, std::byte* out) {
  T value;
  for (uint64_t c = 0; c < columns; ++c) {
    for (uint64_t r = 0; r < rows; ++r) {
      // memcpy: a safetensors file may start its data at any byte.
      std::memcpy(&value, source + (r * columns + c) * sizeof(T), sizeof(T));
      std::memcpy(out + (c * rows + r) * sizeof(T), &value, sizeof(T));
    }
  }
}

template <class T>
std::optional<uint64_t> find_exponent(const mx::array& values, T exponent) {
  const T* data = reinterpret_cast<const T*>(values.data<char>());
  for (uint64_t i = 0; i < values.size(); ++i) {
    if ((data[i] & exponent) == exponent) return i;
  }
  return std::nullopt;
}

/// "x.default" or "x.weight" or "x.default.weight" → "x"; the adapter's own name may stand between.
std::string_view without_suffix(std::string_view rest) {
  constexpr std::string_view kWeight = ".weight";
  if (rest.ends_with(kWeight)) rest.remove_suffix(kWeight.size());
  return rest.substr(0, rest.find('.'));
}

[[noreturn]] void refuse_name(
    ErrorCode code, const std::string& where, std::string_view name, std::string got) {
  io::Failure failure;
  failure.code = code;
  failure.path = where;
  failure.field = io::quote_text(name, 256);
  failure.expected = "a factor A or B of a LoRA module";
  failure.got = std::move(got);
  io::throw_failure(failure);
}

}  // namespace

std::string carried_config_key(AdapterFormat format) {
  return format == AdapterFormat::mlx_lm ? "metal_lora.mlx_lm_config" : "metal_lora.peft_config";
}

void transpose_bytes(
    const std::byte* source,
    uint64_t rows,
    uint64_t columns,
    size_t element_bytes,
    std::byte* out) {
  if (element_bytes == 2) {
    transpose_elements<uint16_t>(source, rows, columns, out);
  } else {
    transpose_elements<uint32_t>(source, rows, columns, out);
  }
}

mx::array copy_block(const mx::array& matrix, int rows, int columns) {
  const size_t element = mx::size_of(matrix.dtype());
  const size_t row_bytes = static_cast<size_t>(columns) * element;
  const size_t source_row_bytes = static_cast<size_t>(matrix.shape(1)) * element;
  auto buffer = mx::allocator::malloc(std::max<size_t>(1, row_bytes * static_cast<size_t>(rows)));
  auto* out = static_cast<std::byte*>(buffer.buffer().raw_ptr());
  const auto* source = reinterpret_cast<const std::byte*>(matrix.data<char>());
  std::memset(out, 0, row_bytes * static_cast<size_t>(rows));
  for (int r = 0; r < std::min(rows, matrix.shape(0)); ++r) {
    std::memcpy(
        out + static_cast<size_t>(r) * row_bytes,
        source + static_cast<size_t>(r) * source_row_bytes,
        std::min(row_bytes, source_row_bytes));
  }
  return mx::array(std::move(buffer), mx::Shape{rows, columns}, matrix.dtype());
}

uint64_t count_nonzero_bytes(const mx::array& matrix) {
  const auto* data = reinterpret_cast<const unsigned char*>(matrix.data<char>());
  return matrix.nbytes() - static_cast<uint64_t>(std::count(data, data + matrix.nbytes(), 0));
}

std::optional<uint64_t> find_non_finite(const mx::array& values) {
  if (values.dtype() == mx::float32) return find_exponent<uint32_t>(values, 0x7f800000u);
  const uint16_t exponent = values.dtype() == mx::float16 ? 0x7c00 : 0x7f80;
  return find_exponent<uint16_t>(values, exponent);
}

std::tuple<int64_t, int, std::string> module_order(const std::string& path) {
  const auto last = std::make_tuple(std::numeric_limits<int64_t>::max(), kSlotsPerLayer, path);
  if (!path.starts_with(kLayersPrefix)) return last;
  const size_t dot = path.find('.', kLayersPrefix.size());
  const std::string digits = path.substr(kLayersPrefix.size(), dot - kLayersPrefix.size());
  if (dot == std::string::npos || digits.empty() || digits.size() > kMaxLayerDigits ||
      digits.find_first_not_of("0123456789") != std::string::npos) {
    return last;
  }
  const std::string_view rest = std::string_view(path).substr(dot + 1);
  int slot = 0;
  while (slot < kSlotsPerLayer && slot_path(static_cast<Slot>(slot)) != rest) ++slot;
  return {std::stoll(digits), slot, path};
}

AdapterTensorName parse_adapter_tensor_name(std::string_view name, const std::string& where) {
  std::string_view path = name;
  const bool has_prefix = path.starts_with(kPeftPrefix);
  if (has_prefix) path.remove_prefix(kPeftPrefix.size());
  const size_t marker = path.rfind(".lora_");
  if (marker == std::string_view::npos) {
    if (path.ends_with(".m")) refuse_name(ErrorCode::unsupported, where, name, "DoRA's magnitude");
    if (path.ends_with(".weight") || path.ends_with(".bias")) {
      refuse_name(
          ErrorCode::unsupported,
          where,
          name,
          "a whole weight or bias (modules_to_save, bias or full fine-tuning)");
    }
    refuse_name(ErrorCode::invalid_input, where, name, "something else");
  }
  AdapterTensorName result{std::string(path.substr(0, marker)), false, false};
  const std::string_view factor = path.substr(marker + 1);
  if (factor == "lora_a" || factor == "lora_b") {
    result.transposed = true;
    result.is_a = factor == "lora_a";
    if (!has_prefix && !result.module_path.empty()) return result;
    refuse_name(ErrorCode::invalid_input, where, name, "a mixture of mlx-lm's and PEFT's names");
  }
  const std::string_view kind = without_suffix(factor);
  if (kind == "lora_magnitude_vector") {
    refuse_name(ErrorCode::unsupported, where, name, "DoRA's magnitude");
  }
  if (factor.ends_with(".bias")) {
    refuse_name(ErrorCode::unsupported, where, name, "a bias of the adapter (lora_bias)");
  }
  const bool is_linear = factor.ends_with(".weight") && (kind == "lora_A" || kind == "lora_B");
  const bool is_embedding = kind == "lora_embedding_A" || kind == "lora_embedding_B";
  if (!has_prefix || result.module_path.empty() || (!is_linear && !is_embedding)) {
    refuse_name(ErrorCode::unsupported, where, name, "something else");
  }
  result.is_a = kind.back() == 'A';
  return result;
}

}  // namespace metal_lora
