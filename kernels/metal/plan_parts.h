// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the plans of training, verification, quantising and many adapters share.
#pragma once

#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>

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

}  // namespace metal_lora::metal
