// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the plans of training, verification, quantising and many adapters share.
#pragma once

#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/metal/plans.h"

namespace metal_lora::metal {

inline void require(bool holds, const char* kernel, const std::string& what) {
  if (!holds) throw std::invalid_argument("[" + std::string(kernel) + "] " + what);
}

/// Kernels index with 32 bits.
inline void require_size(uint64_t elements, const char* kernel, const char* array) {
  require(
      elements > 0 && elements < (uint64_t{1} << 32),
      kernel,
      std::string(array) + " must have 1 to 2^32 - 1 elements but has " + std::to_string(elements));
}

constexpr uint32_t ceil_div(uint64_t a, uint64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

inline uint32_t float_word(float value) {
  return std::bit_cast<uint32_t>(value);
}

/// One bit for each input that MLX passes in the constant space. It is part of the signature, and a
/// kernel's name must differ where its text does: MLX compiles again when one name's text changes.
inline int constant_inputs(const std::vector<uint64_t>& sizes) {
  int mask = 0, bit = 1;
  for (const uint64_t size : sizes) {
    if (size < 8) mask |= bit;
    bit *= 2;
  }
  return mask;
}

}  // namespace metal_lora::metal
