// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Math and common functions for half, float and their vectors; half is computed in float and
// rounded once. fast:: and precise:: are the same functions: an emulator cannot tell how far
// Apple's fast ones are off. There are no bfloat overloads, because Metal has none.
#pragma once

#include "relational.h"

namespace metal {

#define ME_FUNCTION_1(name, expression)                                              \
  ME_INLINE float name(float x) {                                                    \
    return static_cast<float>(expression);                                           \
  }                                                                                  \
  ME_INLINE half name(half h) {                                                      \
    const float x = static_cast<float>(h);                                           \
    return static_cast<half>(static_cast<float>(expression));                        \
  }                                                                                  \
  template <class V>                                                                 \
  ME_INLINE _emulator::enable_math_vector_t<V> name(const V& v) {                    \
    const _emulator::value_t<V> a = v;                                               \
    return _emulator::map<_emulator::value_t<V>>([](auto x) { return name(x); }, a); \
  }
#define ME_FUNCTION_2(name, expression)                                              \
  ME_INLINE float name(float x, float y) {                                           \
    return static_cast<float>(expression);                                           \
  }                                                                                  \
  ME_INLINE half name(half h, half i) {                                              \
    const float x = static_cast<float>(h), y = static_cast<float>(i);                \
    return static_cast<half>(static_cast<float>(expression));                        \
  }                                                                                  \
  template <class A, class B>                                                        \
  ME_INLINE _emulator::enable_math_vectors_t<A, B> name(const A& a, const B& b) {    \
    using V = _emulator::common_vector_t<A, B>;                                      \
    return _emulator::map<V>([](auto x, auto y) { return name(x, y); }, V(a), V(b)); \
  }
#define ME_FUNCTION_3(name, expression)                                                          \
  ME_INLINE float name(float x, float y, float z) {                                              \
    return static_cast<float>(expression);                                                       \
  }                                                                                              \
  ME_INLINE half name(half h, half i, half j) {                                                  \
    const float x = static_cast<float>(h), y = static_cast<float>(i), z = static_cast<float>(j); \
    return static_cast<half>(static_cast<float>(expression));                                    \
  }                                                                                              \
  template <class A, class B, class C>                                                           \
  ME_INLINE _emulator::enable_math_vectors_t<A, B, C> name(const A& a, const B& b, const C& c) { \
    using V = _emulator::common_vector_t<A, B, C>;                                               \
    return _emulator::map<V>(                                                                    \
        [](auto x, auto y, auto z) { return name(x, y, z); }, V(a), V(b), V(c));                 \
  }

namespace _emulator {
// Exact reduction to [-1, 1], then π in double: right to the last bit of a float.
constexpr double kPi = 3.14159265358979323846264338327950288;
ME_INLINE double half_turns(float x) {
  return x - 2.0 * __builtin_rint(x * 0.5);
}
ME_INLINE float sin_pi(float x) {
  const double r = half_turns(x);
  return r == __builtin_rint(r) ? 0.0f * x : static_cast<float>(__builtin_sin(kPi * r));
}
ME_INLINE float cos_pi(float x) {
  const double r = __builtin_fabs(half_turns(x));
  return r == 0.5 ? 0.0f : static_cast<float>(__builtin_cos(kPi * r));
}
ME_INLINE float sign(float x) {
  return x > 0 ? 1.0f : x < 0 ? -1.0f : __builtin_isnan(x) ? 0.0f : x;
}
ME_INLINE float median(float x, float y, float z) {
  return __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z));
}
ME_INLINE float smooth(float low, float high, float x) {
  const float t = __builtin_fminf(__builtin_fmaxf((x - low) / (high - low), 0.0f), 1.0f);
  return t * t * (3.0f - 2.0f * t);
}
}  // namespace _emulator

ME_FUNCTION_1(acos, __builtin_acosf(x))
ME_FUNCTION_1(acosh, __builtin_acoshf(x))
ME_FUNCTION_1(asin, __builtin_asinf(x))
ME_FUNCTION_1(asinh, __builtin_asinhf(x))
ME_FUNCTION_1(atan, __builtin_atanf(x))
ME_FUNCTION_1(atanh, __builtin_atanhf(x))
ME_FUNCTION_1(ceil, __builtin_ceilf(x))
ME_FUNCTION_1(cos, __builtin_cosf(x))
ME_FUNCTION_1(cosh, __builtin_coshf(x))
ME_FUNCTION_1(cospi, _emulator::cos_pi(x))
ME_FUNCTION_1(exp, __builtin_expf(x))
ME_FUNCTION_1(exp10, __builtin_pow(10.0, static_cast<double>(x)))
ME_FUNCTION_1(exp2, __builtin_exp2f(x))
ME_FUNCTION_1(fabs, __builtin_fabsf(x))
ME_FUNCTION_1(abs, __builtin_fabsf(x))
ME_FUNCTION_1(floor, __builtin_floorf(x))
ME_FUNCTION_1(log, __builtin_logf(x))
ME_FUNCTION_1(log10, __builtin_log10f(x))
ME_FUNCTION_1(log2, __builtin_log2f(x))
ME_FUNCTION_1(rint, __builtin_rintf(x))
ME_FUNCTION_1(round, __builtin_roundf(x))
ME_FUNCTION_1(rsqrt, 1.0 / __builtin_sqrt(static_cast<double>(x)))
ME_FUNCTION_1(sin, __builtin_sinf(x))
ME_FUNCTION_1(sinh, __builtin_sinhf(x))
ME_FUNCTION_1(sinpi, _emulator::sin_pi(x))
ME_FUNCTION_1(sqrt, __builtin_sqrtf(x))
ME_FUNCTION_1(tan, __builtin_tanf(x))
ME_FUNCTION_1(tanh, __builtin_tanhf(x))
ME_FUNCTION_1(tanpi, _emulator::sin_pi(x) / _emulator::cos_pi(x))
ME_FUNCTION_1(trunc, __builtin_truncf(x))
ME_FUNCTION_1(sign, _emulator::sign(x))
ME_FUNCTION_1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))

ME_FUNCTION_2(atan2, __builtin_atan2f(x, y))
ME_FUNCTION_2(copysign, __builtin_copysignf(x, y))
ME_FUNCTION_2(divide, x / y)
ME_FUNCTION_2(fdim, __builtin_fdimf(x, y))
ME_FUNCTION_2(fmax, __builtin_fmaxf(x, y))
ME_FUNCTION_2(fmin, __builtin_fminf(x, y))
ME_FUNCTION_2(max, __builtin_fmaxf(x, y))
ME_FUNCTION_2(min, __builtin_fminf(x, y))
ME_FUNCTION_2(fmod, __builtin_fmodf(x, y))
ME_FUNCTION_2(pow, __builtin_powf(x, y))
ME_FUNCTION_2(powr, x < 0 ? __builtin_nanf("") : __builtin_powf(x, y))
ME_FUNCTION_2(step, y < x ? 0.0f : 1.0f)

ME_FUNCTION_3(fma, __builtin_fmaf(x, y, z))
ME_FUNCTION_3(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z)))
ME_FUNCTION_3(fmin3, __builtin_fminf(x, __builtin_fminf(y, z)))
ME_FUNCTION_3(fmedian3, _emulator::median(x, y, z))
ME_FUNCTION_3(max3, __builtin_fmaxf(x, __builtin_fmaxf(y, z)))
ME_FUNCTION_3(min3, __builtin_fminf(x, __builtin_fminf(y, z)))
ME_FUNCTION_3(median3, _emulator::median(x, y, z))
ME_FUNCTION_3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))
ME_FUNCTION_3(mix, x + (y - x) * z)
ME_FUNCTION_3(smoothstep, _emulator::smooth(x, y, z))
#undef ME_FUNCTION_1
#undef ME_FUNCTION_2
#undef ME_FUNCTION_3

// The largest value below 1 is the upper bound: half's differs from float's.
ME_INLINE float fract(float x) {
  return __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f);
}
ME_INLINE half fract(half x) {
  const float f = static_cast<float>(x);
  return static_cast<half>(__builtin_fminf(f - __builtin_floorf(f), 0x1.ffcp-1f));
}
template <class V>
ME_INLINE _emulator::enable_math_vector_t<V> fract(const V& v) {
  const _emulator::value_t<V> a = v;
  return _emulator::map<_emulator::value_t<V>>([](auto x) { return fract(x); }, a);
}

ME_INLINE float nextafter(float x, float y) {
  return __builtin_nextafterf(x, y);
}
ME_INLINE half nextafter(half x, half y) {
  if (isnan(x) || isnan(y)) return static_cast<half>(__builtin_nanf(""));
  if (x == y) return y;
  const ushort bits = as_type<ushort>(x);
  if (x == static_cast<half>(0.0f)) return as_type<half>(static_cast<ushort>(y > x ? 1 : 0x8001));
  const bool away = (y > x) == !(bits & 0x8000);
  return as_type<half>(static_cast<ushort>(away ? bits + 1 : bits - 1));
}

ME_INLINE float ldexp(float x, int k) {
  return __builtin_ldexpf(x, k);
}
ME_INLINE half ldexp(half x, int k) {
  return static_cast<half>(__builtin_ldexpf(static_cast<float>(x), k));
}
ME_INLINE int ilogb(float x) {
  return __builtin_ilogbf(x);
}
ME_INLINE int ilogb(half x) {
  return __builtin_ilogbf(static_cast<float>(x));
}
ME_INLINE float frexp(float x, int& exponent) {
  return __builtin_frexpf(x, &exponent);
}
ME_INLINE half frexp(half x, int& exponent) {
  return static_cast<half>(__builtin_frexpf(static_cast<float>(x), &exponent));
}
ME_INLINE float modf(float x, float& whole) {
  whole = __builtin_truncf(x);
  return __builtin_isinf(x) ? __builtin_copysignf(0.0f, x) : __builtin_copysignf(x - whole, x);
}
ME_INLINE half modf(half x, half& whole) {
  float w;
  const float fraction = modf(static_cast<float>(x), w);
  whole = static_cast<half>(w);
  return static_cast<half>(fraction);
}
ME_INLINE float sincos(float x, float& cosine) {
  cosine = __builtin_cosf(x);
  return __builtin_sinf(x);
}
ME_INLINE half sincos(half x, half& cosine) {
  cosine = cos(x);
  return sin(x);
}
template <class T, int N>
ME_INLINE enable_if_t<_emulator::is_math_v<T>, vec<T, N>> ldexp(
    const vec<T, N>& x, const vec<int, N>& k) {
  return _emulator::map<vec<T, N>>([](T a, int b) { return ldexp(a, b); }, x, k);
}
template <class T, int N>
ME_INLINE enable_if_t<_emulator::is_math_v<T>, vec<int, N>> ilogb(const vec<T, N>& x) {
  return _emulator::map<vec<int, N>>([](T a) { return ilogb(a); }, x);
}
template <class T, int N>
ME_INLINE enable_if_t<_emulator::is_math_v<T>, vec<T, N>> frexp(
    const vec<T, N>& x, vec<int, N>& e) {
  vec<T, N> r(T(0));
  for (int i = 0; i < N; i++) {
    int k;
    r.native_[i] = frexp(x.get(i), k);
    e.native_[i] = k;
  }
  return r;
}
template <class T, int N>
ME_INLINE enable_if_t<_emulator::is_math_v<T>, vec<T, N>> modf(
    const vec<T, N>& x, vec<T, N>& whole) {
  vec<T, N> r(T(0));
  for (int i = 0; i < N; i++) {
    T w;
    r.native_[i] = modf(x.get(i), w);
    whole.native_[i] = w;
  }
  return r;
}
template <class T, int N>
ME_INLINE enable_if_t<_emulator::is_math_v<T>, vec<T, N>> sincos(
    const vec<T, N>& x, vec<T, N>& cosine) {
  cosine = cos(x);
  return sin(x);
}
template <class T, int N>
ME_INLINE enable_if_t<_emulator::is_math_v<T>, vec<T, N>> nextafter(
    const vec<T, N>& x, const vec<T, N>& y) {
  return _emulator::map<vec<T, N>>([](T a, T b) { return nextafter(a, b); }, x, y);
}

#define ME_BOTH(M)                                                                                 \
  M(acos)                                                                                          \
  M(acosh)                                                                                         \
  M(asin)                                                                                          \
  M(asinh) M(atan) M(atan2) M(atanh) M(ceil) M(copysign) M(cos) M(cosh) M(cospi) M(divide) M(exp)  \
      M(exp10) M(exp2) M(fabs) M(abs) M(fdim) M(floor) M(fma) M(fmax) M(fmax3) M(fmedian3) M(fmin) \
          M(fmin3) M(fmod) M(fract) M(frexp) M(ilogb) M(ldexp) M(log) M(log10) M(log2) M(max)      \
              M(max3) M(median3) M(min) M(min3) M(modf) M(nextafter) M(pow) M(powr) M(rint)        \
                  M(round) M(rsqrt) M(sin) M(sincos) M(sinh) M(sinpi) M(sqrt) M(tan) M(tanh)       \
                      M(tanpi) M(trunc) M(clamp) M(mix) M(saturate) M(sign) M(smoothstep) M(step)  \
                          M(isnan) M(isinf) M(isfinite) M(isnormal) M(signbit)
#define ME_USING(name) using metal::name;
namespace fast {
ME_BOTH(ME_USING)
}
namespace precise {
ME_BOTH(ME_USING)
}
#undef ME_USING
#undef ME_BOTH
}  // namespace metal
