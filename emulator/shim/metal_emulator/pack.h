// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Pack and unpack functions: normalised integers in a 16- or 32-bit word, lowest bits first.
#pragma once

#include "math.h"

namespace metal {
namespace _emulator {
template <class T, int N, int Bits>
ME_INLINE vec<T, N> unpack_unorm(uint x) {
  vec<T, N> r(T(0));
  const uint ones = (1u << Bits) - 1;
  for (int i = 0; i < N; i++)
    r.native_[i] =
        static_cast<T>(static_cast<float>(x >> (i * Bits) & ones) / static_cast<float>(ones));
  return r;
}
template <class T, int N, int Bits>
ME_INLINE vec<T, N> unpack_snorm(uint x) {
  vec<T, N> r(T(0));
  for (int i = 0; i < N; i++) {
    const int value = static_cast<int>(x << (32 - Bits - i * Bits)) >> (32 - Bits);
    r.native_[i] = static_cast<T>(__builtin_fmaxf(
        static_cast<float>(value) / static_cast<float>((1 << (Bits - 1)) - 1), -1.0f));
  }
  return r;
}
template <int N, int Bits, class T>
ME_INLINE uint pack_unorm(const vec<T, N>& v) {
  uint r = 0;
  const float scale = static_cast<float>((1u << Bits) - 1);
  for (int i = 0; i < N; i++) {
    const float x = __builtin_fminf(__builtin_fmaxf(static_cast<float>(v.get(i)), 0.0f), 1.0f);
    r |= static_cast<uint>(__builtin_rintf(x * scale)) << (i * Bits);
  }
  return r;
}
template <int N, int Bits, class T>
ME_INLINE uint pack_snorm(const vec<T, N>& v) {
  uint r = 0;
  const float scale = static_cast<float>((1 << (Bits - 1)) - 1);
  for (int i = 0; i < N; i++) {
    const float x = __builtin_fminf(__builtin_fmaxf(static_cast<float>(v.get(i)), -1.0f), 1.0f);
    r |= (static_cast<uint>(static_cast<int>(__builtin_rintf(x * scale))) & ((1u << Bits) - 1))
         << (i * Bits);
  }
  return r;
}
}  // namespace _emulator

ME_INLINE float4 unpack_unorm4x8_to_float(uint x) {
  return _emulator::unpack_unorm<float, 4, 8>(x);
}
ME_INLINE float4 unpack_snorm4x8_to_float(uint x) {
  return _emulator::unpack_snorm<float, 4, 8>(x);
}
ME_INLINE half4 unpack_unorm4x8_to_half(uint x) {
  return _emulator::unpack_unorm<half, 4, 8>(x);
}
ME_INLINE half4 unpack_snorm4x8_to_half(uint x) {
  return _emulator::unpack_snorm<half, 4, 8>(x);
}
ME_INLINE float2 unpack_unorm2x16_to_float(uint x) {
  return _emulator::unpack_unorm<float, 2, 16>(x);
}
ME_INLINE float2 unpack_snorm2x16_to_float(uint x) {
  return _emulator::unpack_snorm<float, 2, 16>(x);
}
ME_INLINE half2 unpack_unorm2x16_to_half(uint x) {
  return _emulator::unpack_unorm<half, 2, 16>(x);
}
ME_INLINE half2 unpack_snorm2x16_to_half(uint x) {
  return _emulator::unpack_snorm<half, 2, 16>(x);
}
ME_INLINE uint pack_float_to_unorm4x8(const float4& v) {
  return _emulator::pack_unorm<4, 8>(v);
}
ME_INLINE uint pack_float_to_snorm4x8(const float4& v) {
  return _emulator::pack_snorm<4, 8>(v);
}
ME_INLINE uint pack_half_to_unorm4x8(const half4& v) {
  return _emulator::pack_unorm<4, 8>(v);
}
ME_INLINE uint pack_half_to_snorm4x8(const half4& v) {
  return _emulator::pack_snorm<4, 8>(v);
}
ME_INLINE uint pack_float_to_unorm2x16(const float2& v) {
  return _emulator::pack_unorm<2, 16>(v);
}
ME_INLINE uint pack_float_to_snorm2x16(const float2& v) {
  return _emulator::pack_snorm<2, 16>(v);
}
ME_INLINE uint pack_half_to_unorm2x16(const half2& v) {
  return _emulator::pack_unorm<2, 16>(v);
}
ME_INLINE uint pack_half_to_snorm2x16(const half2& v) {
  return _emulator::pack_snorm<2, 16>(v);
}
}  // namespace metal
