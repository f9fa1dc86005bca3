// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Scalar conversions between f32 and the 16-bit types, exact or rounded to nearest even. Internal
// linkage: files built for different instruction sets must not share a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/params.h"

namespace metal_lora::cpu {

[[maybe_unused]] static inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

[[maybe_unused]] static inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

[[maybe_unused]] static inline float float_of_bf16(uint16_t b) {
  return float_of_bits(uint32_t{b} << 16);
}

[[maybe_unused]] static inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

[[maybe_unused]] static inline float float_of_half(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, nan
    return float_of_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals exact.
  const float value = float_of_bits(magnitude << 13) * float_of_bits(0x77800000u);
  return float_of_bits(bits_of_float(value) | sign);
}

[[maybe_unused]] static inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or is infinite
  if (magnitude < 0x38800000u) {                        // subnormal: the adder rounds
    const float aligned = float_of_bits(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(bits_of_float(aligned) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return sign | static_cast<uint16_t>(rounded >> 13);
}

constexpr size_t dtype_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

[[maybe_unused]] static inline float read_float(const void* data, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::f16 ? float_of_half(bits) : float_of_bf16(bits);
}

[[maybe_unused]] static inline void write_float(void* data, DType dtype, size_t i, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        dtype == DType::f16 ? half_of_float(value) : bf16_of_float(value);
  }
}

}  // namespace metal_lora::cpu
