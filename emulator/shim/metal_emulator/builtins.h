// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Names behind Metal's own headers that third-party kernels call directly, mostly to give bfloat
// the functions that Metal leaves out.
#pragma once

#include "simdgroup.h"

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define ME_FORWARD_1(name)                                            \
  METAL_EMULATOR_INLINE float __metal_##name(float x, bool = false) { \
    return metal::name(x);                                            \
  }
#define ME_FORWARD_2(name)                                                     \
  METAL_EMULATOR_INLINE float __metal_##name(float x, float y, bool = false) { \
    return metal::name(x, y);                                                  \
  }
#define ME_FORWARD_3(name)                                                              \
  METAL_EMULATOR_INLINE float __metal_##name(float x, float y, float z, bool = false) { \
    return metal::name(x, y, z);                                                        \
  }
ME_FORWARD_1(acos)
ME_FORWARD_1(acosh)
ME_FORWARD_1(asin)
ME_FORWARD_1(asinh) ME_FORWARD_1(atan) ME_FORWARD_1(atanh) ME_FORWARD_1(ceil) ME_FORWARD_1(cos)
    ME_FORWARD_1(cosh) ME_FORWARD_1(cospi) ME_FORWARD_1(exp) ME_FORWARD_1(exp10) ME_FORWARD_1(exp2)
        ME_FORWARD_1(fabs) ME_FORWARD_1(floor) ME_FORWARD_1(fract) ME_FORWARD_1(log)
            ME_FORWARD_1(log10) ME_FORWARD_1(log2) ME_FORWARD_1(rint) ME_FORWARD_1(round)
                ME_FORWARD_1(rsqrt) ME_FORWARD_1(sin) ME_FORWARD_1(sinh) ME_FORWARD_1(sinpi)
                    ME_FORWARD_1(sqrt) ME_FORWARD_1(tan) ME_FORWARD_1(tanh) ME_FORWARD_1(tanpi)
                        ME_FORWARD_1(trunc) ME_FORWARD_2(atan2) ME_FORWARD_2(copysign)
                            ME_FORWARD_2(divide) ME_FORWARD_2(fdim) ME_FORWARD_2(fmax)
                                ME_FORWARD_2(fmin) ME_FORWARD_2(fmod) ME_FORWARD_2(max)
                                    ME_FORWARD_2(min) ME_FORWARD_2(nextafter) ME_FORWARD_2(pow)
                                        ME_FORWARD_2(powr) ME_FORWARD_3(fma) ME_FORWARD_3(fmax3)
                                            ME_FORWARD_3(fmin3) ME_FORWARD_3(fmedian3)
                                                ME_FORWARD_3(max3) ME_FORWARD_3(min3)
                                                    ME_FORWARD_3(median3)
#undef ME_FORWARD_1
#undef ME_FORWARD_2
#undef ME_FORWARD_3
                                                        METAL_EMULATOR_INLINE
    float __metal_frexp(float x, int* exponent) {
  return metal::frexp(x, *exponent);
}
METAL_EMULATOR_INLINE float __metal_modf(float x, float* whole) {
  return metal::modf(x, *whole);
}
METAL_EMULATOR_INLINE float __metal_sincos(float x, float* cosine) {
  return metal::sincos(x, *cosine);
}
METAL_EMULATOR_INLINE int __metal_ilogb(float x) {
  return metal::ilogb(x);
}
METAL_EMULATOR_INLINE float __metal_ldexp(float x, int k, bool = false) {
  return metal::ldexp(x, k);
}
METAL_EMULATOR_INLINE bool __metal_isnan(float x, bool = false) {
  return metal::isnan(x);
}
METAL_EMULATOR_INLINE bool __metal_isinf(float x, bool = false) {
  return metal::isinf(x);
}
METAL_EMULATOR_INLINE bool __metal_isfinite(float x, bool = false) {
  return metal::isfinite(x);
}
METAL_EMULATOR_INLINE bool __metal_isnormal(float x, bool = false) {
  return metal::isnormal(x);
}
METAL_EMULATOR_INLINE bool __metal_signbit(float x) {
  return metal::signbit(x);
}

#define ME_FORWARD(name)                        \
  template <class T>                            \
  METAL_EMULATOR_INLINE T __metal_##name(T v) { \
    return metal::name(v);                      \
  }
ME_FORWARD(simd_sum)
ME_FORWARD(simd_product)
ME_FORWARD(simd_max)
ME_FORWARD(simd_min) ME_FORWARD(simd_prefix_inclusive_sum) ME_FORWARD(simd_prefix_exclusive_sum)
    ME_FORWARD(simd_prefix_inclusive_product) ME_FORWARD(simd_prefix_exclusive_product)
#undef ME_FORWARD
        template <class T>
        METAL_EMULATOR_INLINE T __metal_simd_xor(T v) {
  static_assert(sizeof(T) <= 8, "a scalar");
  using Bits = metal::conditional_t<
      sizeof(T) == 1,
      uchar,
      metal::
          conditional_t<sizeof(T) == 2, ushort, metal::conditional_t<sizeof(T) == 4, uint, ulong>>>;
  return metal::as_type<T>(metal::simd_xor(metal::as_type<Bits>(v)));
}
#define ME_FORWARD(name)                                  \
  template <class T>                                      \
  METAL_EMULATOR_INLINE T __metal_##name(T v, ushort n) { \
    return metal::name(v, n);                             \
  }
ME_FORWARD(simd_broadcast)
ME_FORWARD(simd_shuffle)
ME_FORWARD(simd_shuffle_up)
ME_FORWARD(simd_shuffle_down) ME_FORWARD(simd_shuffle_xor) ME_FORWARD(simd_shuffle_rotate_up)
    ME_FORWARD(simd_shuffle_rotate_down)
#undef ME_FORWARD
        template <class T>
        METAL_EMULATOR_INLINE T
    __metal_simd_shuffle_and_fill_up(T v, T fill, ushort n, ushort modulo) {
  return metal::simd_shuffle_and_fill_up(v, fill, n, modulo);
}
template <class T>
METAL_EMULATOR_INLINE T __metal_simd_shuffle_and_fill_down(T v, T fill, ushort n, ushort modulo) {
  return metal::simd_shuffle_and_fill_down(v, fill, n, modulo);
}
METAL_EMULATOR_INLINE ushort __metal_get_simdgroup_size(ushort) {
  return 32;
}
METAL_EMULATOR_INLINE ushort __metal_get_simdgroup_size(bool = false) {
  return 32;
}
