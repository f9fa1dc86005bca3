// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/checked.h"
#include "src/io/mapped_file.h"

namespace metal_lora::io {

/// How the numbers of a stored tensor are laid out. The first group has one element per unit, the
/// second is ggml's block formats.
enum class TensorType : uint8_t {
  f64,
  f32,
  f16,
  bf16,
  i8,
  i16,
  i32,
  i64,
  u8,
  u16,
  u32,
  u64,
  boolean,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q4_k,
  q5_k,
  q6_k,
};
inline constexpr int kTensorTypeCount = 21;

struct TensorTypeTraits {
  TensorType type;
  std::string_view name;    ///< as safetensors and GGUF spell it: "F32", "Q4_K"
  uint32_t block_elements;  ///< elements in one block; 1 for plain types
  uint32_t block_bytes;     ///< bytes of one block
  bool is_float;            ///< F64, F32, F16, BF16
};

const TensorTypeTraits& tensor_type_traits(TensorType type);
std::string_view tensor_type_name(TensorType type);
inline bool is_quantized(TensorType type) {
  return tensor_type_traits(type).block_elements != 1;
}

/// One tensor of a file that was validated: `data` .. `data + nbytes` lies in the mapping and
/// nbytes is what type and shape ask for.
struct TensorInfo {
  std::string name;
  TensorType type = TensorType::f32;
  std::vector<uint64_t>
      shape;  ///< row-major, outermost first (GGUF's dims reversed); {} is a scalar
  const std::byte* data = nullptr;
  uint64_t nbytes = 0;
  std::shared_ptr<const MappedFile> file;  ///< keeps `data` alive; null for tensors made in memory

  /// Number of elements. Cannot wrap for a tensor that a reader of io/ returned.
  uint64_t element_count() const;
  /// The last dimension (1 for a scalar), and how many such rows there are.
  uint64_t row_elements() const;
  uint64_t row_count() const;
  /// Bytes of one row; 0 when row_elements() is 0.
  uint64_t row_bytes() const;
  /// Whether `data` may be read through a pointer to its element type. safetensors files may start
  /// their data anywhere; an unaligned tensor has to be copied before use. Block types: 2 bytes.
  bool is_aligned() const;
};

/// A tensor name of any format is at most this long.
inline constexpr uint64_t kTensorNameMaxBytes = 256;

/// Elements, or invalid when the product leaves 64 bits.
CheckedSize count_elements(std::span<const uint64_t> shape);

/// Bytes of a tensor; invalid when they leave 64 bits or when the last dimension is not a whole
/// number of blocks.
CheckedSize count_bytes(TensorType type, std::span<const uint64_t> shape);

/// "[2, 3]"
std::string format_shape(std::span<const uint64_t> shape);

/// By index of name order, in O(log n): null when there is none. For readers' own use.
class TensorIndex {
 public:
  TensorIndex() = default;
  explicit TensorIndex(const std::vector<TensorInfo>& tensors);
  const TensorInfo* find(const std::vector<TensorInfo>& tensors, std::string_view name) const;
  /// A name that occurs twice, if any.
  std::optional<std::string> duplicate(const std::vector<TensorInfo>& tensors) const;

 private:
  std::vector<uint32_t> by_name_;
};

}  // namespace metal_lora::io
