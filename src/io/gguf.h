// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/mapped_file.h"
#include "src/io/result.h"
#include "src/io/tensor.h"

namespace metal_lora::io {

inline constexpr uint64_t kGgufMaxKeys = 65536;
inline constexpr uint64_t kGgufMaxTensors = 131072;
inline constexpr uint64_t kGgufMaxDims = 4;
inline constexpr uint64_t kGgufMaxKeyBytes = 65535;
inline constexpr uint64_t kGgufMaxStringBytes = uint64_t{16} << 20;
inline constexpr uint64_t kGgufMaxArrayElements = uint64_t{1} << 24;
inline constexpr int kGgufMaxArrayDepth = 4;

/// The numbers are the file's.
enum class GgufValueType : uint32_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  string = 8,
  array = 9,
  u64 = 10,
  i64 = 11,
  f64 = 12,
};
std::string_view gguf_value_type_name(GgufValueType type);

/// One metadata entry, validated, still in its encoded form.
struct GgufValue {
  std::string_view key;
  GgufValueType type = GgufValueType::u8;
  GgufValueType element_type = GgufValueType::u8;  ///< arrays only
  uint64_t count = 1;                              ///< arrays: elements
  uint64_t offset = 0;                             ///< of the payload in the file
  std::span<const std::byte> payload;  ///< scalar bytes, string bytes, or the array's elements
};

/// One validated GGUF file, version 2 or 3, little-endian. Views returned by the getters point into
/// the mapping, which the file object keeps alive. Copies share it.
class GgufFile {
 public:
  const std::string& path() const { return file_->path(); }
  const std::shared_ptr<const MappedFile>& file() const { return file_; }
  uint32_t version() const { return version_; }
  uint64_t alignment() const { return alignment_; }

  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const TensorInfo* find(std::string_view name) const { return index_.find(tensors_, name); }

  /// All metadata, in the file's order.
  const std::vector<GgufValue>& values() const { return values_; }
  const GgufValue* find_value(std::string_view key) const;
  bool has(std::string_view key) const { return find_value(key) != nullptr; }

  /// Scalars. Integers are converted between widths and signs where the value fits, floats from f32
  /// and f64; everything else fails with the key's name: not found, wrong type, out of range, not
  /// finite.
  Result<uint32_t> get_u32(std::string_view key) const;
  Result<int32_t> get_i32(std::string_view key) const;
  Result<uint64_t> get_u64(std::string_view key) const;
  Result<float> get_f32(std::string_view key) const;
  Result<bool> get_bool(std::string_view key) const;
  Result<std::string_view> get_string(std::string_view key) const;

  /// The same, with a value for a key that is absent. A key that is there with a wrong type fails.
  Result<uint32_t> get_u32_or(std::string_view key, uint32_t absent) const;
  Result<uint64_t> get_u64_or(std::string_view key, uint64_t absent) const;
  Result<float> get_f32_or(std::string_view key, float absent) const;
  Result<bool> get_bool_or(std::string_view key, bool absent) const;
  Result<std::string_view> get_string_or(std::string_view key, std::string_view absent) const;

  /// Arrays. Strings are views into the mapping: 49k tokens cost one pass and 16 bytes each.
  Result<std::vector<std::string_view>> get_string_array(std::string_view key) const;
  Result<std::vector<int32_t>> get_i32_array(std::string_view key) const;
  Result<std::vector<float>> get_f32_array(std::string_view key) const;

 private:
  friend class GgufParser;

  Result<const GgufValue*> require(std::string_view key) const;
  Failure wrong_type(const GgufValue& value, std::string expected) const;
  Result<const GgufValue*> require_array(std::string_view key) const;
  template <class T>
  Result<T> get_integer(std::string_view key) const;

  std::shared_ptr<const MappedFile> file_;
  uint32_t version_ = 0;
  uint64_t alignment_ = 32;
  std::vector<GgufValue> values_;
  std::vector<uint32_t> values_by_key_;
  std::vector<TensorInfo> tensors_;
  TensorIndex index_;
};

/// Parses and checks header, metadata and tensor table: bounds of every string, array and tensor,
/// unique names, alignment, no overlap. Tensor types beyond TensorType are refused by name.
/// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Cost: one pass over the
/// metadata; no tensor data is touched.
Result<GgufFile> read_gguf(const std::string& path);
Result<GgufFile> read_gguf(std::shared_ptr<const MappedFile> file);

}  // namespace metal_lora::io
