// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Names behind Apple's headers that third-party kernels call directly.
#pragma once

#define __METAL_MAYBE_FAST_MATH__ 0
#define __METAL_FAST_MATH__ 1
#define __METAL_PRECISE_MATH__ 0

#define METAL_LINT_FLOAT(name) \
  template <class... A>        \
  float __metal_##name(float, A...);
METAL_LINT_FLOAT(acos) METAL_LINT_FLOAT(acosh) METAL_LINT_FLOAT(asin) METAL_LINT_FLOAT(asinh)
METAL_LINT_FLOAT(atan) METAL_LINT_FLOAT(atanh) METAL_LINT_FLOAT(ceil) METAL_LINT_FLOAT(cos)
METAL_LINT_FLOAT(cosh) METAL_LINT_FLOAT(cospi) METAL_LINT_FLOAT(exp) METAL_LINT_FLOAT(exp10)
METAL_LINT_FLOAT(exp2) METAL_LINT_FLOAT(fabs) METAL_LINT_FLOAT(floor) METAL_LINT_FLOAT(fract)
METAL_LINT_FLOAT(log) METAL_LINT_FLOAT(log10) METAL_LINT_FLOAT(log2) METAL_LINT_FLOAT(rint)
METAL_LINT_FLOAT(round) METAL_LINT_FLOAT(rsqrt) METAL_LINT_FLOAT(sin) METAL_LINT_FLOAT(sinh)
METAL_LINT_FLOAT(sinpi) METAL_LINT_FLOAT(sqrt) METAL_LINT_FLOAT(tan) METAL_LINT_FLOAT(tanh)
METAL_LINT_FLOAT(tanpi) METAL_LINT_FLOAT(trunc) METAL_LINT_FLOAT(atan2) METAL_LINT_FLOAT(copysign)
METAL_LINT_FLOAT(divide) METAL_LINT_FLOAT(fdim) METAL_LINT_FLOAT(fmax) METAL_LINT_FLOAT(fmin)
METAL_LINT_FLOAT(fmod) METAL_LINT_FLOAT(max) METAL_LINT_FLOAT(min) METAL_LINT_FLOAT(nextafter)
METAL_LINT_FLOAT(pow) METAL_LINT_FLOAT(powr) METAL_LINT_FLOAT(fma) METAL_LINT_FLOAT(fmax3)
METAL_LINT_FLOAT(fmin3) METAL_LINT_FLOAT(fmedian3) METAL_LINT_FLOAT(max3) METAL_LINT_FLOAT(min3)
METAL_LINT_FLOAT(median3) METAL_LINT_FLOAT(ldexp)
#undef METAL_LINT_FLOAT
float __metal_frexp(float, __private int*);
float __metal_frexp(float, __private int&, bool = false);
float __metal_modf(float, __private float*);
float __metal_modf(float, __private float&, bool = false);
float __metal_sincos(float, __private float*);
float __metal_sincos(float, __private float&, bool = false);
int __metal_ilogb(float);
bool __metal_isnan(float, bool = false);
bool __metal_isinf(float, bool = false);
bool __metal_isfinite(float, bool = false);
bool __metal_isnormal(float, bool = false);
bool __metal_signbit(float);
#define METAL_LINT_SIMD(name)  \
  template <class T, class... A> \
  T __metal_##name(T, A...);
METAL_LINT_SIMD(simd_sum) METAL_LINT_SIMD(simd_product) METAL_LINT_SIMD(simd_max)
METAL_LINT_SIMD(simd_min) METAL_LINT_SIMD(simd_xor) METAL_LINT_SIMD(simd_prefix_inclusive_sum)
METAL_LINT_SIMD(simd_prefix_exclusive_sum) METAL_LINT_SIMD(simd_prefix_inclusive_product)
METAL_LINT_SIMD(simd_prefix_exclusive_product) METAL_LINT_SIMD(simd_broadcast)
METAL_LINT_SIMD(simd_shuffle) METAL_LINT_SIMD(simd_shuffle_up) METAL_LINT_SIMD(simd_shuffle_down)
METAL_LINT_SIMD(simd_shuffle_xor) METAL_LINT_SIMD(simd_shuffle_rotate_up)
METAL_LINT_SIMD(simd_shuffle_rotate_down) METAL_LINT_SIMD(simd_shuffle_and_fill_up)
METAL_LINT_SIMD(simd_shuffle_and_fill_down)
#undef METAL_LINT_SIMD
template <class... A>
ushort __metal_get_simdgroup_size(A...);
