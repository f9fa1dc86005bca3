// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "src/io/float16.h"
#include "src/io/tensor.h"

namespace metal_lora::io {

/// ggml's block formats, read field by field from unaligned bytes (ggml-common.h gives the
/// layouts). What dequantising and the affine conversion share: groups of 32 levels with their
/// constants.

template <class T>
T load_le(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

/// 32 consecutive weights: unsigned levels, and what turns them into numbers.
struct LevelGroup {
  std::array<uint8_t, 32> levels;
  float scale;
  float bias;           ///< Q4_1, Q5_1, Q4_K, Q5_K: w = level·scale + bias
  uint16_t scale_half;  ///< the stored halves, where scale and bias are stored so
  uint16_t bias_half;
};

/// Types whose weights are (level − kZero)·scale have kZero > 0; the others level·scale + bias.
template <TensorType kType>
struct QuantFormat;

template <>
struct QuantFormat<TensorType::q4_0> {
  static constexpr int kZero = 8;
  static constexpr int kGroups = 1;  ///< groups per block
};
template <>
struct QuantFormat<TensorType::q4_1> {
  static constexpr int kZero = 0;
  static constexpr int kGroups = 1;
};
template <>
struct QuantFormat<TensorType::q5_0> {
  static constexpr int kZero = 16;
  static constexpr int kGroups = 1;
};
template <>
struct QuantFormat<TensorType::q5_1> {
  static constexpr int kZero = 0;
  static constexpr int kGroups = 1;
};
template <>
struct QuantFormat<TensorType::q8_0> {
  static constexpr int kZero = 128;
  static constexpr int kGroups = 1;
};
template <>
struct QuantFormat<TensorType::q4_k> {
  static constexpr int kZero = 0;
  static constexpr int kGroups = 8;
};
template <>
struct QuantFormat<TensorType::q5_k> {
  static constexpr int kZero = 0;
  static constexpr int kGroups = 8;
};

inline void split_nibbles(const std::byte* packed, std::array<uint8_t, 32>& levels) {
  for (int j = 0; j < 16; ++j) {
    const auto byte = std::to_integer<uint8_t>(packed[j]);
    levels[j] = byte & 15;
    levels[j + 16] = byte >> 4;
  }
}

// Bit j of `high` is the fifth bit of level j.
inline void add_fifth_bits(uint32_t high, std::array<uint8_t, 32>& levels) {
  for (int j = 0; j < 32; ++j) levels[j] |= static_cast<uint8_t>(((high >> j) & 1u) << 4);
}

/// The 6-bit scale and minimum of group `g` (0 … 7) of a Q4_K or Q5_K block, from its 12 bytes.
inline void unpack_scale_min(const std::byte* packed, int g, uint8_t& scale, uint8_t& minimum) {
  const auto byte = [&](int i) { return std::to_integer<uint8_t>(packed[i]); };
  if (g < 4) {
    scale = byte(g) & 63;
    minimum = byte(g + 4) & 63;
  } else {
    scale = static_cast<uint8_t>((byte(g + 4) & 15) | ((byte(g - 4) >> 6) << 4));
    minimum = static_cast<uint8_t>((byte(g + 4) >> 4) | ((byte(g) >> 6) << 4));
  }
}

/// Group `g` of the block at `block`.
template <TensorType kType>
void read_group(const std::byte* block, int g, LevelGroup& group) {
  if constexpr (kType == TensorType::q4_k || kType == TensorType::q5_k) {
    uint8_t scale = 0;
    uint8_t minimum = 0;
    unpack_scale_min(block + 4, g, scale, minimum);
    // Exact: 11 bits times 6.
    group.scale = f16_to_f32(load_le<uint16_t>(block)) * static_cast<float>(scale);
    group.bias = -(f16_to_f32(load_le<uint16_t>(block + 2)) * static_cast<float>(minimum));
    constexpr bool kFive = kType == TensorType::q5_k;
    const std::byte* nibbles = block + (kFive ? 48 : 16) + (g / 2) * 32;
    const int shift = (g % 2) * 4;
    for (int j = 0; j < 32; ++j) {
      auto level = static_cast<uint8_t>((std::to_integer<uint8_t>(nibbles[j]) >> shift) & 15);
      if constexpr (kFive) {
        level |= static_cast<uint8_t>(((std::to_integer<uint8_t>(block[16 + j]) >> g) & 1) << 4);
      }
      group.levels[j] = level;
    }
  } else {
    constexpr bool kHasBias = QuantFormat<kType>::kZero == 0;
    group.scale_half = load_le<uint16_t>(block);
    group.scale = f16_to_f32(group.scale_half);
    if constexpr (kHasBias) {
      group.bias_half = load_le<uint16_t>(block + 2);
      group.bias = f16_to_f32(group.bias_half);
    }
    const std::byte* levels = block + (kHasBias ? 4 : 2);
    if constexpr (kType == TensorType::q8_0) {
      for (int j = 0; j < 32; ++j) group.levels[j] = std::to_integer<uint8_t>(levels[j]) ^ 0x80;
    } else if constexpr (kType == TensorType::q5_0 || kType == TensorType::q5_1) {
      split_nibbles(levels + 4, group.levels);
      add_fifth_bits(load_le<uint32_t>(levels), group.levels);
    } else {
      split_nibbles(levels, group.levels);
    }
  }
}

}  // namespace metal_lora::io
