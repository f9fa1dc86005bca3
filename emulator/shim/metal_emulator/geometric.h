// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Geometric functions of half and float vectors. Sums run from the first component, in the type.
#pragma once

#include "math.h"

namespace metal {
template <class A, class B>
ME_INLINE _emulator::element_t<_emulator::enable_math_vectors_t<A, B>> dot(const A& a, const B& b) {
  using V = _emulator::common_vector_t<A, B>;
  const V x(a), y(b);
  auto sum = x.get(0) * y.get(0);
  for (int i = 1; i < V::width; i++) sum += x.get(i) * y.get(i);
  return sum;
}
template <class A>
ME_INLINE _emulator::element_t<_emulator::enable_math_vector_t<A>> length_squared(const A& a) {
  return dot(a, a);
}
template <class A>
ME_INLINE _emulator::element_t<_emulator::enable_math_vector_t<A>> length(const A& a) {
  return sqrt(dot(a, a));
}
template <class A, class B>
ME_INLINE _emulator::element_t<_emulator::enable_math_vectors_t<A, B>> distance_squared(
    const A& a, const B& b) {
  return length_squared(_emulator::value_t<A>(a) - _emulator::value_t<B>(b));
}
template <class A, class B>
ME_INLINE _emulator::element_t<_emulator::enable_math_vectors_t<A, B>> distance(
    const A& a, const B& b) {
  return length(_emulator::value_t<A>(a) - _emulator::value_t<B>(b));
}
template <class A>
ME_INLINE _emulator::enable_math_vector_t<A> normalize(const A& a) {
  const _emulator::value_t<A> x = a;
  return x * rsqrt(dot(x, x));
}
template <class T>
ME_INLINE vec<T, 3> cross(const vec<T, 3>& a, const vec<T, 3>& b) {
  return a.yzx * b.zxy - a.zxy * b.yzx;
}
template <class T, int N>
ME_INLINE vec<T, N> reflect(const vec<T, N>& i, const vec<T, N>& n) {
  return i - T(2) * dot(n, i) * n;
}
template <class T, int N>
ME_INLINE vec<T, N> faceforward(
    const vec<T, N>& n, const vec<T, N>& i, const vec<T, N>& reference) {
  return dot(reference, i) < T(0) ? n : -n;
}
template <class T, int N>
ME_INLINE vec<T, N> refract(const vec<T, N>& i, const vec<T, N>& n, T eta) {
  const T d = dot(n, i), k = T(1) - eta * eta * (T(1) - d * d);
  return k < T(0) ? vec<T, N>(T(0)) : eta * i - (eta * d + sqrt(k)) * n;
}

namespace fast {
using metal::cross;
using metal::distance;
using metal::dot;
using metal::length;
using metal::normalize;
}  // namespace fast
namespace precise {
using metal::cross;
using metal::distance;
using metal::dot;
using metal::length;
using metal::normalize;
}  // namespace precise
}  // namespace metal
