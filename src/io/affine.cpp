// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/affine.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>

#include "src/io/quant_blocks.h"

namespace metal_lora::io {
namespace {

constexpr uint64_t kGroup = 32;

// Eight levels below 16, one per byte, into the nibbles of a word: element 0 lowest.
uint32_t pack_nibbles(const uint8_t* levels) {
  uint64_t x = 0;
  std::memcpy(&x, levels, 8);
  x = (x | (x >> 4)) & 0x00ff00ff00ff00ffull;
  x = (x | (x >> 8)) & 0x0000ffff0000ffffull;
  return static_cast<uint32_t>(x | (x >> 16));
}

template <int kBits>
uint32_t* pack_levels(const std::array<uint8_t, 32>& levels, uint32_t* q) {
  if constexpr (kBits == 4) {
    for (int w = 0; w < 4; ++w) q[w] = pack_nibbles(levels.data() + 8 * w);
    return q + 4;
  } else {
    std::memcpy(q, levels.data(), 32);
    return q + 8;
  }
}

// −2^p · value for the half `value`, exact unless it overflows to infinity.
uint16_t negated_times(uint16_t half, int power_of_two) {
  return f32_to_f16(-f16_to_f32(half) * static_cast<float>(power_of_two));
}

bool is_infinite_half(uint16_t half) {
  return (half & 0x7fff) == 0x7c00;
}

Result<void> overflowed(TensorType type, uint64_t row) {
  return Failure{
      ErrorCode::unsupported,
      "",
      {},
      fmt::format("row {}", row),
      fmt::format("{} blocks whose weights stay within f16", tensor_type_name(type)),
      "a larger scale",
      "dequantise the tensor instead"};
}

template <TensorType kType, int kBits, class Scale>
Result<void> convert(
    const std::byte* source,
    uint64_t n,
    uint64_t k,
    uint32_t* q,
    void* scales_out,
    void* biases_out) {
  using Format = QuantFormat<kType>;
  const TensorTypeTraits& traits = tensor_type_traits(kType);
  auto* scales = static_cast<Scale*>(scales_out);
  auto* biases = static_cast<Scale*>(biases_out);
  const uint64_t blocks_per_row = k / traits.block_elements;
  LevelGroup group{};
  for (uint64_t row = 0; row < n; ++row) {
    for (uint64_t b = 0; b < blocks_per_row; ++b) {
      for (int g = 0; g < Format::kGroups; ++g) {
        read_group<kType>(source, g, group);
        q = pack_levels<kBits>(group.levels, q);
        if constexpr (sizeof(Scale) == 4) {
          *scales++ = group.scale;
          *biases++ = group.bias;
        } else {
          if constexpr (Format::kZero > 0) {
            group.bias_half = negated_times(group.scale_half, Format::kZero);
            if (is_infinite_half(group.bias_half) && !is_infinite_half(group.scale_half)) {
              return overflowed(kType, row);
            }
          }
          *scales++ = group.scale_half;
          *biases++ = group.bias_half;
        }
      }
      source += traits.block_bytes;
    }
  }
  return {};
}

}  // namespace

std::optional<AffineSpec> affine_spec(TensorType type) {
  switch (type) {
    case TensorType::q4_0:
    case TensorType::q4_1:
      return AffineSpec{4, kGroup, false};
    case TensorType::q4_k:
      return AffineSpec{4, kGroup, true};
    case TensorType::q5_0:
    case TensorType::q5_1:
    case TensorType::q8_0:
      return AffineSpec{8, kGroup, false};
    case TensorType::q5_k:
      return AffineSpec{8, kGroup, true};
    default:
      return std::nullopt;
  }
}

Result<void> to_affine(
    TensorType type,
    const std::byte* source,
    uint64_t n,
    uint64_t k,
    uint32_t* q,
    void* scales,
    void* biases) {
  if (k % tensor_type_traits(type).block_elements != 0) {
    return Failure{
        ErrorCode::invalid_input,
        "",
        {},
        "k",
        fmt::format("a multiple of {}", tensor_type_traits(type).block_elements),
        std::to_string(k),
        ""};
  }
  switch (type) {
    case TensorType::q4_0:
      return convert<TensorType::q4_0, 4, uint16_t>(source, n, k, q, scales, biases);
    case TensorType::q4_1:
      return convert<TensorType::q4_1, 4, uint16_t>(source, n, k, q, scales, biases);
    case TensorType::q4_k:
      return convert<TensorType::q4_k, 4, float>(source, n, k, q, scales, biases);
    case TensorType::q5_0:
      return convert<TensorType::q5_0, 8, uint16_t>(source, n, k, q, scales, biases);
    case TensorType::q5_1:
      return convert<TensorType::q5_1, 8, uint16_t>(source, n, k, q, scales, biases);
    case TensorType::q5_k:
      return convert<TensorType::q5_k, 8, float>(source, n, k, q, scales, biases);
    case TensorType::q8_0:
      return convert<TensorType::q8_0, 8, uint16_t>(source, n, k, q, scales, biases);
    default:
      return Failure{
          ErrorCode::unsupported,
          "",
          {},
          "type",
          "one with an affine form",
          std::string(tensor_type_name(type)),
          "dequantise the tensor instead"};
  }
}

Result<void> unpermute_rows(
    const std::byte* source, uint64_t rows, uint64_t row_bytes, uint64_t heads, std::byte* out) {
  const auto head_rows = CheckedSize(rows).divided_exactly_by(heads).get();
  if (!head_rows || *head_rows % 2 != 0) {
    return Failure{
        ErrorCode::invalid_input,
        "",
        {},
        "rows",
        fmt::format("{} heads of an even size", heads),
        std::to_string(rows),
        ""};
  }
  const uint64_t half = *head_rows / 2;
  for (uint64_t head = 0; head < heads; ++head) {
    for (uint64_t i = 0; i < half; ++i) {
      for (uint64_t side = 0; side < 2; ++side) {
        const uint64_t from = head * *head_rows + 2 * i + side;
        const uint64_t to = head * *head_rows + side * half + i;
        if (row_bytes > 0) std::memcpy(out + to * row_bytes, source + from * row_bytes, row_bytes);
      }
    }
  }
  return {};
}

}  // namespace metal_lora::io
