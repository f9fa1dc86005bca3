// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/gguf.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/io/gguf_parser.h"
#include "src/io/text_format.h"

namespace metal_lora::io {
namespace {

template <class T>
T load(const std::byte* data) {
  T value;
  std::memcpy(&value, data, sizeof(T));
  return value;
}

// An integer of any stored width; nullopt for other types.
struct WideInteger {
  bool negative;
  uint64_t magnitude;
};

std::optional<WideInteger> load_integer(GgufValueType type, const std::byte* data) {
  const auto from_signed = [](int64_t value) {
    const auto bits = static_cast<uint64_t>(value);
    return WideInteger{value < 0, value < 0 ? ~bits + 1 : bits};
  };
  switch (type) {
    case GgufValueType::u8:
      return WideInteger{false, load<uint8_t>(data)};
    case GgufValueType::i8:
      return from_signed(load<int8_t>(data));
    case GgufValueType::u16:
      return WideInteger{false, load<uint16_t>(data)};
    case GgufValueType::i16:
      return from_signed(load<int16_t>(data));
    case GgufValueType::u32:
      return WideInteger{false, load<uint32_t>(data)};
    case GgufValueType::i32:
      return from_signed(load<int32_t>(data));
    case GgufValueType::u64:
      return WideInteger{false, load<uint64_t>(data)};
    case GgufValueType::i64:
      return from_signed(load<int64_t>(data));
    default:
      return std::nullopt;
  }
}

template <class T>
std::optional<T> narrow(WideInteger integer) {
  constexpr auto kMax = static_cast<uint64_t>(std::numeric_limits<T>::max());
  if (!integer.negative) {
    if (integer.magnitude > kMax) return std::nullopt;
    return static_cast<T>(integer.magnitude);
  }
  if (std::is_unsigned_v<T> || integer.magnitude > kMax + 1) return std::nullopt;
  return static_cast<T>(~integer.magnitude + 1);
}

std::string describe(const GgufValue& value) {
  if (value.type == GgufValueType::array) {
    return fmt::format("an array of {} {}", value.count, gguf_value_type_name(value.element_type));
  }
  if (value.type == GgufValueType::string) {
    return "the string " +
           quote_text({reinterpret_cast<const char*>(value.payload.data()), value.payload.size()});
  }
  if (const auto integer = load_integer(value.type, value.payload.data())) {
    return fmt::format(
        "{}{} ({})",
        integer->negative ? "-" : "",
        integer->magnitude,
        gguf_value_type_name(value.type));
  }
  return "a " + std::string(gguf_value_type_name(value.type));
}

}  // namespace

std::string_view gguf_value_type_name(GgufValueType type) {
  constexpr std::string_view kNames[] = {
      "u8",
      "i8",
      "u16",
      "i16",
      "u32",
      "i32",
      "f32",
      "bool",
      "string",
      "array",
      "u64",
      "i64",
      "f64"};
  return kNames[static_cast<size_t>(type)];
}

const GgufValue* GgufFile::find_value(std::string_view key) const {
  const auto found = std::lower_bound(
      values_by_key_.begin(), values_by_key_.end(), key, [&](uint32_t at, std::string_view wanted) {
        return values_[at].key < wanted;
      });
  if (found == values_by_key_.end() || values_[*found].key != key) return nullptr;
  return &values_[*found];
}

Result<const GgufValue*> GgufFile::require(std::string_view key) const {
  const GgufValue* value = find_value(key);
  if (value == nullptr) {
    return Failure{
        ErrorCode::invalid_input, path(), {}, std::string(key), "in the metadata", "missing", ""};
  }
  return value;
}

Failure GgufFile::wrong_type(const GgufValue& value, std::string expected) const {
  return Failure{
      ErrorCode::invalid_input,
      path(),
      value.offset,
      std::string(value.key),
      std::move(expected),
      describe(value),
      ""};
}

template <class T>
Result<T> GgufFile::get_integer(std::string_view key) const {
  const auto value = require(key);
  if (!value) return value.error();
  const auto integer = load_integer((*value)->type, (*value)->payload.data());
  const auto number = integer ? narrow<T>(*integer) : std::nullopt;
  if (!number) {
    return wrong_type(
        **value,
        fmt::format(
            "an integer from {} to {}",
            std::numeric_limits<T>::min(),
            std::numeric_limits<T>::max()));
  }
  return *number;
}

Result<uint32_t> GgufFile::get_u32(std::string_view key) const {
  return get_integer<uint32_t>(key);
}
Result<int32_t> GgufFile::get_i32(std::string_view key) const {
  return get_integer<int32_t>(key);
}
Result<uint64_t> GgufFile::get_u64(std::string_view key) const {
  return get_integer<uint64_t>(key);
}

Result<float> GgufFile::get_f32(std::string_view key) const {
  const auto value = require(key);
  if (!value) return value.error();
  float number = std::numeric_limits<float>::quiet_NaN();
  if ((*value)->type == GgufValueType::f32) {
    number = load<float>((*value)->payload.data());
  } else if ((*value)->type == GgufValueType::f64) {
    const auto wide = load<double>((*value)->payload.data());
    // Converting a double beyond the range of float is undefined.
    if (std::abs(wide) <= std::numeric_limits<float>::max()) number = static_cast<float>(wide);
  }
  if (!std::isfinite(number)) return wrong_type(**value, "a finite f32");
  return number;
}

Result<bool> GgufFile::get_bool(std::string_view key) const {
  const auto value = require(key);
  if (!value) return value.error();
  if ((*value)->type != GgufValueType::boolean) return wrong_type(**value, "a bool");
  return (*value)->payload[0] != std::byte{0};
}

Result<std::string_view> GgufFile::get_string(std::string_view key) const {
  const auto value = require(key);
  if (!value) return value.error();
  if ((*value)->type != GgufValueType::string) return wrong_type(**value, "a string");
  const auto payload = (*value)->payload;
  return std::string_view(reinterpret_cast<const char*>(payload.data()), payload.size());
}

Result<uint32_t> GgufFile::get_u32_or(std::string_view key, uint32_t absent) const {
  if (!has(key)) return absent;
  return get_u32(key);
}
Result<uint64_t> GgufFile::get_u64_or(std::string_view key, uint64_t absent) const {
  if (!has(key)) return absent;
  return get_u64(key);
}
Result<float> GgufFile::get_f32_or(std::string_view key, float absent) const {
  if (!has(key)) return absent;
  return get_f32(key);
}
Result<bool> GgufFile::get_bool_or(std::string_view key, bool absent) const {
  if (!has(key)) return absent;
  return get_bool(key);
}
Result<std::string_view> GgufFile::get_string_or(
    std::string_view key, std::string_view absent) const {
  if (!has(key)) return absent;
  return get_string(key);
}

Result<const GgufValue*> GgufFile::require_array(std::string_view key) const {
  auto value = require(key);
  if (value && (*value)->type != GgufValueType::array) return wrong_type(**value, "an array");
  return value;
}

Result<std::vector<std::string_view>> GgufFile::get_string_array(std::string_view key) const {
  const auto value = require_array(key);
  if (!value) return value.error();
  if ((*value)->element_type != GgufValueType::string) {
    return wrong_type(**value, "an array of strings");
  }
  std::vector<std::string_view> strings;
  strings.reserve((*value)->count);
  // The parser has checked every length.
  const std::byte* at = (*value)->payload.data();
  for (uint64_t i = 0; i < (*value)->count; ++i) {
    const auto length = load<uint64_t>(at);
    strings.emplace_back(reinterpret_cast<const char*>(at) + 8, length);
    at += 8 + length;
  }
  return strings;
}

Result<std::vector<int32_t>> GgufFile::get_i32_array(std::string_view key) const {
  const auto value = require_array(key);
  if (!value) return value.error();
  const GgufValueType type = (*value)->element_type;
  const uint64_t stride = gguf_scalar_bytes(type);
  std::vector<int32_t> numbers;
  if (stride > 0) numbers.reserve((*value)->count);
  for (uint64_t i = 0; i < (*value)->count; ++i) {
    const auto integer = load_integer(type, (*value)->payload.data() + i * stride);
    const auto number = integer ? narrow<int32_t>(*integer) : std::nullopt;
    if (!number) return wrong_type(**value, "an array of 32-bit integers");
    numbers.push_back(*number);
  }
  return numbers;
}

Result<std::vector<float>> GgufFile::get_f32_array(std::string_view key) const {
  const auto value = require_array(key);
  if (!value) return value.error();
  if ((*value)->element_type != GgufValueType::f32) return wrong_type(**value, "an array of f32");
  std::vector<float> numbers((*value)->count);
  if (!numbers.empty()) {
    std::memcpy(numbers.data(), (*value)->payload.data(), (*value)->payload.size());
  }
  for (const float number : numbers) {
    if (!std::isfinite(number)) return wrong_type(**value, "an array of finite numbers");
  }
  return numbers;
}

Result<GgufFile> read_gguf(const std::string& path) {
  auto file = MappedFile::open(path);
  if (!file) return std::move(file).error();
  return read_gguf(std::move(*file));
}

Result<GgufFile> read_gguf(std::shared_ptr<const MappedFile> file) {
  return GgufParser(std::move(file)).parse();
}

}  // namespace metal_lora::io
