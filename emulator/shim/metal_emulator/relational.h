// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Relational functions, and the maps from scalar functions to vectors that other headers use.
#pragma once

#include "vector.h"

namespace metal {
namespace _emulator {
/// half or float (Metal has no bfloat functions), scalar or vector.
template <class X>
constexpr bool is_math_v = is_same_v<element_t<X>, float> || is_same_v<element_t<X>, half>;
template <class X>
using enable_math_vector_t = enable_if_t<is_vector_v<X> && is_math_v<X>, value_t<X>>;

/// The vector among the arguments' types; scalars follow it. void where vectors differ or miss.
template <class... X>
struct common_vector;
template <>
struct common_vector<> {
  using type = void;
};
template <class A, class... B>
struct common_vector<A, B...> {
  using rest = typename common_vector<B...>::type;
  static constexpr bool is_vector = is_vector_v<A>;
  using own = value_t<A>;
  using type = conditional_t<
      !is_vector,
      conditional_t<is_arithmetic_v<own>, rest, char>,
      conditional_t<is_void_v<rest> || is_same_v<rest, own>, own, char>>;
};
template <class... X>
using common_vector_t = typename common_vector<remove_cv_t<remove_reference_t<X>>...>::type;
template <class... X>
using enable_math_vectors_t = enable_if_t<
    _emulator::is_vector_v<common_vector_t<X...>> && is_math_v<common_vector_t<X...>>,
    common_vector_t<X...>>;

template <class R, class F, class... V>
ME_INLINE constexpr R map(F f, const V&... v) {
  R r(element_t<R>(0));
  for (int i = 0; i < R::width; i++)
    r.native_[i] = static_cast<lane_t<typename R::element>>(f(v.get(i)...));
  return r;
}
}  // namespace _emulator

#define ME_CLASSIFY(name, expression)                                                           \
  ME_INLINE bool name(float x) {                                                                \
    return expression;                                                                          \
  }                                                                                             \
  ME_INLINE bool name(half h) {                                                                 \
    const float x = static_cast<float>(h);                                                      \
    return expression;                                                                          \
  }                                                                                             \
  template <class V, class = _emulator::enable_math_vector_t<V>>                                \
  ME_INLINE vec<bool, _emulator::width_v<V>> name(const V& v) {                                 \
    const _emulator::value_t<V> a = v;                                                          \
    return _emulator::map<vec<bool, _emulator::width_v<V>>>([](auto x) { return name(x); }, a); \
  }
ME_CLASSIFY(isnan, __builtin_isnan(x))
ME_CLASSIFY(isinf, __builtin_isinf(x))
ME_CLASSIFY(isfinite, __builtin_isfinite(x))
ME_CLASSIFY(signbit, __builtin_signbit(x))
#undef ME_CLASSIFY
ME_INLINE bool isnormal(float x) {
  return __builtin_isnormal(x);
}
ME_INLINE bool isnormal(half x) {
  const uint exponent = as_type<ushort>(x) >> 10 & 31;
  return exponent != 0 && exponent != 31;
}
template <class V, class = _emulator::enable_math_vector_t<V>>
ME_INLINE vec<bool, _emulator::width_v<V>> isnormal(const V& v) {
  const _emulator::value_t<V> a = v;
  return _emulator::map<vec<bool, _emulator::width_v<V>>>([](auto x) { return isnormal(x); }, a);
}
template <class T, class = enable_if_t<_emulator::is_math_v<T> && is_arithmetic_v<T>>>
ME_INLINE bool isunordered(T a, T b) {
  return isnan(a) || isnan(b);
}
template <class T, class = enable_if_t<_emulator::is_math_v<T> && is_arithmetic_v<T>>>
ME_INLINE bool isordered(T a, T b) {
  return !isunordered(a, b);
}
template <class T, int N>
ME_INLINE vec<bool, N> isunordered(const vec<T, N>& a, const vec<T, N>& b) {
  return isnan(a) || isnan(b);
}
template <class T, int N>
ME_INLINE vec<bool, N> isordered(const vec<T, N>& a, const vec<T, N>& b) {
  return !isunordered(a, b);
}

ME_INLINE bool all(bool x) {
  return x;
}
ME_INLINE bool any(bool x) {
  return x;
}
template <int N>
ME_INLINE bool all(const vec<bool, N>& v) {
  for (int i = 0; i < N; i++)
    if (!v.get(i)) return false;
  return true;
}
template <int N>
ME_INLINE bool any(const vec<bool, N>& v) {
  for (int i = 0; i < N; i++)
    if (v.get(i)) return true;
  return false;
}

/// c ? b : a
template <class T, class = enable_if_t<is_arithmetic_v<T>>>
ME_INLINE constexpr T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
ME_INLINE vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& c) {
  vec<T, N> r(a);
  for (int i = 0; i < N; i++)
    if (c.get(i)) r.native_[i] = b.native_[i];
  return r;
}
}  // namespace metal
