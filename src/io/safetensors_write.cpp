// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>

#include "src/io/atomic_file.h"
#include "src/io/safetensors.h"
#include "src/io/safetensors_types.h"
#include "src/io/text_format.h"

namespace metal_lora::io {
namespace {

Failure refused(
    const std::string& path, std::string_view name, std::string expected, std::string got) {
  return Failure{
      ErrorCode::invalid_input,
      path,
      {},
      quote_text(name),
      std::move(expected),
      std::move(got),
      ""};
}

Result<void> check_tensor(const std::string& path, const TensorInfo& tensor) {
  if (tensor.name.empty() || tensor.name.size() > kTensorNameMaxBytes ||
      tensor.name == "__metadata__" || tensor.name.find('\0') != std::string::npos) {
    return refused(
        path,
        tensor.name,
        fmt::format("a name of 1 to {} bytes without NUL, not __metadata__", kTensorNameMaxBytes),
        fmt::format("{} bytes long", tensor.name.size()));
  }
  if (!is_safetensors_type(tensor.type)) {
    Failure failure = refused(
        path,
        tensor.name,
        "of a type that safetensors has: " + safetensors_type_names(),
        std::string(tensor_type_name(tensor.type)));
    failure.code = ErrorCode::unsupported;
    return failure;
  }
  if (tensor.shape.size() > kSafetensorsMaxDims) {
    return refused(
        path,
        tensor.name,
        fmt::format("of at most {} dimensions", kSafetensorsMaxDims),
        std::to_string(tensor.shape.size()));
  }
  if (!count_bytes(tensor.type, tensor.shape).equals(tensor.nbytes)) {
    return refused(
        path,
        tensor.name,
        "as many bytes as its type and shape say",
        fmt::format("{} for {}", tensor.nbytes, format_shape(tensor.shape)));
  }
  if (tensor.data == nullptr && tensor.nbytes != 0) {
    return refused(path, tensor.name, "backed by data", "without any");
  }
  return {};
}

// Exponent bits all set: NaN or infinity.
template <class Word>
std::optional<uint64_t> find_all_ones(const std::byte* data, uint64_t elements, Word exponent) {
  for (uint64_t i = 0; i < elements; ++i) {
    Word word;
    std::memcpy(&word, data + i * sizeof(Word), sizeof(Word));
    if ((word & exponent) == exponent) return i;
  }
  return std::nullopt;
}

std::optional<uint64_t> find_non_finite(const TensorInfo& tensor) {
  const uint64_t elements = tensor.element_count();
  switch (tensor.type) {
    case TensorType::f64:
      return find_all_ones<uint64_t>(tensor.data, elements, uint64_t{0x7ff} << 52);
    case TensorType::f32:
      return find_all_ones<uint32_t>(tensor.data, elements, 0x7f800000u);
    case TensorType::f16:
      return find_all_ones<uint16_t>(tensor.data, elements, 0x7c00u);
    case TensorType::bf16:
      return find_all_ones<uint16_t>(tensor.data, elements, 0x7f80u);
    default:
      return std::nullopt;
  }
}

// JSON text of a string; nullopt when it is not valid UTF-8.
std::optional<std::string> json_text(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    return std::nullopt;
  }
}

Result<std::string> metadata_text(
    const std::string& path, const std::map<std::string, std::string>& metadata) {
  if (metadata.size() > kSafetensorsMaxMetadataEntries) {
    return refused(
        path,
        "__metadata__",
        fmt::format("at most {} entries", kSafetensorsMaxMetadataEntries),
        std::to_string(metadata.size()));
  }
  std::string text = "\"__metadata__\":{";
  bool first = true;
  for (const auto& [key, value] : metadata) {
    const auto key_text = json_text(key);
    const auto value_text = json_text(value);
    if (!key_text || !value_text || key.find('\0') != std::string::npos) {
      return refused(path, key, "metadata in UTF-8, its key without NUL", quote_text(value));
    }
    text += fmt::format("{}{}:{}", first ? "" : ",", *key_text, *value_text);
    first = false;
  }
  return text + "}";
}

}  // namespace

Result<SafetensorsLayout> lay_out_safetensors(
    const std::string& path,
    std::span<const TensorInfo> tensors,
    const std::map<std::string, std::string>& metadata) {
  if (tensors.size() > kSafetensorsMaxTensors) {
    return refused(
        path,
        "tensors",
        fmt::format("at most {}", kSafetensorsMaxTensors),
        std::to_string(tensors.size()));
  }
  SafetensorsLayout layout;
  layout.order.resize(tensors.size());
  std::iota(layout.order.begin(), layout.order.end(), 0u);
  std::sort(layout.order.begin(), layout.order.end(), [&](uint32_t a, uint32_t b) {
    const int rank_a = safetensors_layout_rank(tensors[a].type);
    const int rank_b = safetensors_layout_rank(tensors[b].type);
    return rank_a != rank_b ? rank_a < rank_b : tensors[a].name < tensors[b].name;
  });
  std::vector<std::string_view> names;
  names.reserve(tensors.size());
  std::string json = "{";
  if (!metadata.empty()) {
    auto text = metadata_text(path, metadata);
    if (!text) return std::move(text).error();
    json += *text;
  }
  CheckedSize begin(0u);
  for (const uint32_t at : layout.order) {
    const TensorInfo& tensor = tensors[at];
    if (auto checked = check_tensor(path, tensor); !checked) return std::move(checked).error();
    const auto name = json_text(tensor.name);
    if (!name) return refused(path, tensor.name, "a name in UTF-8", "not UTF-8");
    const CheckedSize end = begin + tensor.nbytes;
    if (!end.valid()) return refused(path, tensor.name, "within 2^64 bytes", "beyond");
    std::string dims = format_shape(tensor.shape);
    dims.erase(std::remove(dims.begin(), dims.end(), ' '), dims.end());
    json += fmt::format(
        "{}{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}",
        json.size() > 1 ? "," : "",
        *name,
        tensor_type_name(tensor.type),
        dims,
        *begin.get(),
        *end.get());
    begin = end;
    names.push_back(tensor.name);
  }
  std::sort(names.begin(), names.end());
  if (const auto twice = std::adjacent_find(names.begin(), names.end()); twice != names.end()) {
    return refused(path, *twice, "a name that occurs once", "there twice");
  }
  json += "}";
  // Spaces up to a multiple of 8 align the data.
  json.resize((json.size() + 7) / 8 * 8, ' ');
  if (json.size() > kSafetensorsMaxHeaderBytes) {
    return refused(
        path,
        "header",
        fmt::format("at most {} bytes", kSafetensorsMaxHeaderBytes),
        std::to_string(json.size()));
  }
  const uint64_t header_bytes = json.size();
  layout.header.assign(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  layout.header += json;
  return layout;
}

Result<void> write_safetensors(
    const std::string& path,
    std::span<const TensorInfo> tensors,
    const std::map<std::string, std::string>& metadata,
    const SafetensorsWriteOptions& options) {
  auto layout = lay_out_safetensors(path, tensors, metadata);
  if (!layout) return std::move(layout).error();
  if (options.refuse_non_finite) {
    for (const uint32_t at : layout->order) {
      if (const auto element = find_non_finite(tensors[at])) {
        return refused(
            path,
            tensors[at].name,
            "finite throughout",
            fmt::format("NaN or infinite at element {}", *element));
      }
    }
  }
  FileCalls& calls = options.calls == nullptr ? system_file_calls() : *options.calls;
  auto file = AtomicFile::create(path, calls);
  if (!file) return std::move(file).error();
  if (auto written = file->write(layout->header); !written) return written;
  for (const uint32_t at : layout->order) {
    if (auto written = file->write({tensors[at].data, tensors[at].nbytes}); !written) {
      return written;
    }
  }
  return file->commit();
}

}  // namespace metal_lora::io
