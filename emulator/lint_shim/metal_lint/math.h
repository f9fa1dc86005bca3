// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define MAXFLOAT 0x1.fffffep127f
#define HUGE_VALH ((half)__builtin_huge_valf())
#define MAXHALF ((half)65504.0f)
#define FLT_MAX 0x1.fffffep127f
#define FLT_MIN 0x1.0p-126f
#define FLT_EPSILON 0x1.0p-23f
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)0x1.0p-14f)
#define HALF_EPSILON ((half)0x1.0p-10f)
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define SHRT_MAX 32767
#define USHRT_MAX 65535
#define CHAR_BIT 8
#define METAL_LINT_CONSTANT(name, value) \
  constexpr __constant float name##_F = value; \
  constexpr __constant half name##_H = value;
METAL_LINT_CONSTANT(M_E, 2.7182818284590452f)
METAL_LINT_CONSTANT(M_LOG2E, 1.4426950408889634f)
METAL_LINT_CONSTANT(M_LOG10E, 0.4342944819032518f)
METAL_LINT_CONSTANT(M_LN2, 0.6931471805599453f)
METAL_LINT_CONSTANT(M_LN10, 2.3025850929940457f)
METAL_LINT_CONSTANT(M_PI, 3.1415926535897932f)
METAL_LINT_CONSTANT(M_PI_2, 1.5707963267948966f)
METAL_LINT_CONSTANT(M_PI_4, 0.7853981633974483f)
METAL_LINT_CONSTANT(M_1_PI, 0.3183098861837907f)
METAL_LINT_CONSTANT(M_2_PI, 0.6366197723675814f)
METAL_LINT_CONSTANT(M_2_SQRTPI, 1.1283791670955126f)
METAL_LINT_CONSTANT(M_SQRT2, 1.4142135623730950f)
METAL_LINT_CONSTANT(M_SQRT1_2, 0.7071067811865476f)
#undef METAL_LINT_CONSTANT

namespace metal {

// Of bfloat alone; a template, so that a kernel's own overloads win.
template <class T>
struct lint_bfloat {};
template <>
struct lint_bfloat<bfloat> {
  typedef bfloat type;
};

// Each for float and half and their vectors: an integer argument is ambiguous, as in Metal; bfloat
// has none.
#define METAL_LINT_FLOATS(M) M(float) M(float2) M(float3) M(float4) M(half) M(half2) M(half3) M(half4)
#define METAL_LINT_UNARY(name)                                                             \
  float name(float);                                                                       \
  float2 name(float2);                                                                     \
  float3 name(float3);                                                                     \
  float4 name(float4);                                                                     \
  half name(half);                                                                         \
  half2 name(half2);                                                                       \
  half3 name(half3);                                                                       \
  half4 name(half4);                                                                       \
  template <class T>                                                                       \
  typename lint_bfloat<T>::type name(T)                                                    \
      __attribute__((unavailable("Metal has no bfloat " #name "(); convert to float")));
#define METAL_LINT_BINARY(name)                                                            \
  float name(float, float);                                                                \
  float2 name(float2, float2);                                                             \
  float3 name(float3, float3);                                                             \
  float4 name(float4, float4);                                                             \
  half name(half, half);                                                                   \
  half2 name(half2, half2);                                                                \
  half3 name(half3, half3);                                                                \
  half4 name(half4, half4);                                                                \
  template <class T>                                                                       \
  typename lint_bfloat<T>::type name(T, T)                                                 \
      __attribute__((unavailable("Metal has no bfloat " #name "(); convert to float")));
#define METAL_LINT_TERNARY(name)                                                           \
  float name(float, float, float);                                                         \
  float2 name(float2, float2, float2);                                                     \
  float3 name(float3, float3, float3);                                                     \
  float4 name(float4, float4, float4);                                                     \
  half name(half, half, half);                                                             \
  half2 name(half2, half2, half2);                                                         \
  half3 name(half3, half3, half3);                                                         \
  half4 name(half4, half4, half4);                                                         \
  template <class T>                                                                       \
  typename lint_bfloat<T>::type name(T, T, T)                                              \
      __attribute__((unavailable("Metal has no bfloat " #name "(); convert to float")));
#define METAL_LINT_OUT(name, OUT)            \
  float name(float, __private OUT(float)&);   \
  float2 name(float2, __private OUT(float2)&); \
  float3 name(float3, __private OUT(float3)&); \
  float4 name(float4, __private OUT(float4)&); \
  half name(half, __private OUT(half)&);

// Of any arithmetic type but bfloat; both arguments of one type, as Metal's overloads want.
template <class T>
struct lint_no_bfloat {
  typedef T type;
};
template <>
struct lint_no_bfloat<bfloat> {};
#define METAL_LINT_ANY1(name) \
  template <class T>          \
  typename lint_no_bfloat<T>::type name(T);
#define METAL_LINT_ANY2(name) \
  template <class T>          \
  typename lint_no_bfloat<T>::type name(T, T);
#define METAL_LINT_ANY3(name) \
  template <class T>          \
  typename lint_no_bfloat<T>::type name(T, T, T);
// A vector against scalars too.
#define METAL_LINT_COMMON                                                                    \
  METAL_LINT_ANY1(abs) METAL_LINT_ANY2(max) METAL_LINT_ANY2(min) METAL_LINT_ANY3(max3)       \
  METAL_LINT_ANY3(min3) METAL_LINT_ANY3(median3) METAL_LINT_ANY3(clamp)                      \
  METAL_LINT_UNARY(saturate) METAL_LINT_UNARY(sign) METAL_LINT_BINARY(step)                  \
  METAL_LINT_TERNARY(mix) METAL_LINT_TERNARY(smoothstep)                                     \
  template <class T, int N> vec<T, N> clamp(vec<T, N>, T, T);                                \
  template <class T, int N> vec<T, N> max(vec<T, N>, T);                                     \
  template <class T, int N> vec<T, N> min(vec<T, N>, T);                                     \
  float2 mix(float2, float2, float);                                                         \
  float3 mix(float3, float3, float);                                                         \
  float4 mix(float4, float4, float);                                                         \
  half2 mix(half2, half2, half);                                                             \
  half3 mix(half3, half3, half);                                                             \
  half4 mix(half4, half4, half);

#define METAL_LINT_MATH                                                                         \
  METAL_LINT_UNARY(acos) METAL_LINT_UNARY(acosh) METAL_LINT_UNARY(asin) METAL_LINT_UNARY(asinh) \
  METAL_LINT_UNARY(atan) METAL_LINT_UNARY(atanh) METAL_LINT_UNARY(ceil) METAL_LINT_UNARY(cos)   \
  METAL_LINT_UNARY(cosh) METAL_LINT_UNARY(cospi) METAL_LINT_UNARY(exp) METAL_LINT_UNARY(exp2)   \
  METAL_LINT_UNARY(exp10) METAL_LINT_UNARY(fabs) METAL_LINT_UNARY(floor)                        \
  METAL_LINT_UNARY(fract) METAL_LINT_UNARY(log) METAL_LINT_UNARY(log2) METAL_LINT_UNARY(log10)  \
  METAL_LINT_UNARY(rint) METAL_LINT_UNARY(round) METAL_LINT_UNARY(rsqrt) METAL_LINT_UNARY(sin)  \
  METAL_LINT_UNARY(sinh) METAL_LINT_UNARY(sinpi) METAL_LINT_UNARY(sqrt) METAL_LINT_UNARY(tan)   \
  METAL_LINT_UNARY(tanh) METAL_LINT_UNARY(tanpi) METAL_LINT_UNARY(trunc)                        \
  METAL_LINT_BINARY(atan2) METAL_LINT_BINARY(copysign) METAL_LINT_BINARY(divide)                \
  METAL_LINT_BINARY(fdim) METAL_LINT_BINARY(fmax) METAL_LINT_BINARY(fmin)                       \
  METAL_LINT_BINARY(fmod) METAL_LINT_BINARY(nextafter) METAL_LINT_BINARY(pow)                   \
  METAL_LINT_BINARY(powr) METAL_LINT_TERNARY(fma) METAL_LINT_TERNARY(fmax3)                     \
  METAL_LINT_TERNARY(fmin3) METAL_LINT_TERNARY(fmedian3)
METAL_LINT_MATH
METAL_LINT_COMMON
namespace fast {
METAL_LINT_MATH
METAL_LINT_COMMON
}
namespace precise {
METAL_LINT_MATH
METAL_LINT_COMMON
}
#undef METAL_LINT_MATH
#undef METAL_LINT_COMMON

#define METAL_LINT_SPLIT(T)        \
  T sincos(T, __private T&);       \
  T modf(T, __private T&);
METAL_LINT_FLOATS(METAL_LINT_SPLIT)
#undef METAL_LINT_SPLIT
float frexp(float, __private int&);
half frexp(half, __private int&);
float ldexp(float, int);
half ldexp(half, int);
int ilogb(float);
int ilogb(half);

METAL_LINT_ANY1(clz)
METAL_LINT_ANY1(ctz)
METAL_LINT_ANY1(popcount)
METAL_LINT_ANY1(reverse_bits)
METAL_LINT_ANY2(absdiff)
METAL_LINT_ANY2(addsat)
METAL_LINT_ANY2(subsat)
METAL_LINT_ANY2(hadd)
METAL_LINT_ANY2(rhadd)
METAL_LINT_ANY2(mulhi)
METAL_LINT_ANY2(rotate)
METAL_LINT_ANY2(mul24)
METAL_LINT_ANY3(mad24)
METAL_LINT_ANY3(madhi)
METAL_LINT_ANY3(madsat)
template <class T>
T extract_bits(T, uint, uint);
template <class T>
T insert_bits(T, T, uint, uint);

#define METAL_LINT_TEST(name) \
  bool name(float);           \
  bool2 name(float2);         \
  bool3 name(float3);         \
  bool4 name(float4);         \
  bool name(half);            \
  bool2 name(half2);          \
  bool3 name(half3);          \
  bool4 name(half4);
METAL_LINT_TEST(isfinite)
METAL_LINT_TEST(isinf)
METAL_LINT_TEST(isnan)
METAL_LINT_TEST(isnormal)
METAL_LINT_TEST(signbit)
#undef METAL_LINT_TEST
#define METAL_LINT_COMPARE(name) \
  bool name(float, float);       \
  bool2 name(float2, float2);    \
  bool3 name(float3, float3);    \
  bool4 name(float4, float4);    \
  bool name(half, half);         \
  bool2 name(half2, half2);      \
  bool3 name(half3, half3);      \
  bool4 name(half4, half4);
METAL_LINT_COMPARE(isordered)
METAL_LINT_COMPARE(isunordered)
#undef METAL_LINT_COMPARE
bool isfinite(bfloat);
bool isinf(bfloat);
bool isnan(bfloat);
template <class V>
bool all(V);
template <class V>
bool any(V);
template <class T, class C>
T select(T, T, C);

template <class T, int N>
T dot(vec<T, N>, vec<T, N>);
template <class T, int N>
T distance(vec<T, N>, vec<T, N>);
template <class T, int N>
T distance_squared(vec<T, N>, vec<T, N>);
template <class T, int N>
T length(vec<T, N>);
template <class T, int N>
T length_squared(vec<T, N>);
template <class T, int N>
vec<T, N> normalize(vec<T, N>);
template <class T, int N>
vec<T, N> faceforward(vec<T, N>, vec<T, N>, vec<T, N>);
template <class T, int N>
vec<T, N> reflect(vec<T, N>, vec<T, N>);
template <class T, int N>
vec<T, N> refract(vec<T, N>, vec<T, N>, T);
template <class T>
vec<T, 3> cross(vec<T, 3>, vec<T, 3>);

#define METAL_LINT_PACK(kind)                     \
  float4 unpack_##kind##4x8_to_float(uint);       \
  half4 unpack_##kind##4x8_to_half(uint);         \
  uint pack_float_to_##kind##4x8(float4);         \
  uint pack_half_to_##kind##4x8(half4);           \
  float2 unpack_##kind##2x16_to_float(uint);      \
  half2 unpack_##kind##2x16_to_half(uint);        \
  uint pack_float_to_##kind##2x16(float2);
METAL_LINT_PACK(unorm)
METAL_LINT_PACK(snorm)
#undef METAL_LINT_PACK

#undef METAL_LINT_ANY1
#undef METAL_LINT_ANY2
#undef METAL_LINT_ANY3
#undef METAL_LINT_UNARY
#undef METAL_LINT_BINARY
#undef METAL_LINT_TERNARY
#undef METAL_LINT_OUT
#undef METAL_LINT_FLOATS

}  // namespace metal
