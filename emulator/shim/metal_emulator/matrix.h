// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// matrix<T, C, R>: C columns of R rows, stored by columns.
#pragma once

#include "geometric.h"

namespace metal {
template <class T, int C, int R>
struct matrix {
  static_assert(
      is_floating_point_v<T> && C >= 2 && C <= 4 && R >= 2 && R <= 4, "half, bfloat or float, 2-4");
  using column = vec<T, R>;
  column columns[C];

  matrix() = default;
  /// A diagonal matrix.
  ME_INLINE explicit matrix(T diagonal) {
    for (int c = 0; c < C; c++) {
      columns[c] = column(T(0));
      if (c < R) columns[c].native_[c] = diagonal;
    }
  }
  /// Columns, or all elements column by column.
  template <
      class A,
      class B,
      class... X,
      class = enable_if_t<
          (sizeof...(X) + 2 == C && _emulator::width_v<A> == R) ||
          (sizeof...(X) + 2 == C * R && _emulator::width_v<A> == 1)>>
  ME_INLINE matrix(const A& a, const B& b, const X&... x) {
    if constexpr (_emulator::width_v<A> == R) {
      const column all[] = {column(a), column(b), column(x)...};
      for (int c = 0; c < C; c++) columns[c] = all[c];
    } else {
      const T all[] = {static_cast<T>(a), static_cast<T>(b), static_cast<T>(x)...};
      for (int c = 0; c < C; c++)
        for (int r = 0; r < R; r++) columns[c].native_[r] = all[c * R + r];
    }
  }
  template <class U>
  ME_INLINE explicit matrix(const matrix<U, C, R>& o) {
    for (int c = 0; c < C; c++) columns[c] = column(o.columns[c]);
  }
  ME_INLINE column& operator[](int c) { return columns[c]; }
  ME_INLINE const column& operator[](int c) const { return columns[c]; }

  friend ME_INLINE matrix operator+(const matrix& a, const matrix& b) {
    return each([&](int c) { return a.columns[c] + b.columns[c]; });
  }
  friend ME_INLINE matrix operator-(const matrix& a, const matrix& b) {
    return each([&](int c) { return a.columns[c] - b.columns[c]; });
  }
  friend ME_INLINE matrix operator-(const matrix& a) {
    return each([&](int c) { return -a.columns[c]; });
  }
  friend ME_INLINE matrix operator*(const matrix& a, T s) {
    return each([&](int c) { return a.columns[c] * s; });
  }
  friend ME_INLINE matrix operator*(T s, const matrix& a) { return a * s; }
  friend ME_INLINE vec<T, R> operator*(const matrix& a, const vec<T, C>& v) {
    vec<T, R> sum = a.columns[0] * v.get(0);
    for (int c = 1; c < C; c++) sum += a.columns[c] * v.get(c);
    return sum;
  }
  friend ME_INLINE vec<T, C> operator*(const vec<T, R>& v, const matrix& a) {
    vec<T, C> r(T(0));
    for (int c = 0; c < C; c++) r.native_[c] = dot(v, a.columns[c]);
    return r;
  }
  ME_INLINE matrix& operator+=(const matrix& b) { return *this = *this + b; }
  ME_INLINE matrix& operator-=(const matrix& b) { return *this = *this - b; }
  ME_INLINE matrix& operator*=(T s) { return *this = *this * s; }
  friend ME_INLINE bool operator==(const matrix& a, const matrix& b) {
    for (int c = 0; c < C; c++)
      if (!all(a.columns[c] == b.columns[c])) return false;
    return true;
  }
  friend ME_INLINE bool operator!=(const matrix& a, const matrix& b) { return !(a == b); }

 private:
  template <class F>
  ME_INLINE static matrix each(F f) {
    matrix m;
    for (int c = 0; c < C; c++) m.columns[c] = f(c);
    return m;
  }
};

template <class T, int K, int R, int C>
ME_INLINE matrix<T, C, R> operator*(const matrix<T, K, R>& a, const matrix<T, C, K>& b) {
  matrix<T, C, R> m;
  for (int c = 0; c < C; c++) m.columns[c] = a * b.columns[c];
  return m;
}
template <class T, int C, int R>
ME_INLINE matrix<T, R, C> transpose(const matrix<T, C, R>& a) {
  matrix<T, R, C> m;
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) m.columns[r].native_[c] = a.columns[c].native_[r];
  return m;
}
template <class T>
ME_INLINE T determinant(const matrix<T, 2, 2>& a) {
  return a[0].get(0) * a[1].get(1) - a[1].get(0) * a[0].get(1);
}
template <class T>
ME_INLINE T determinant(const matrix<T, 3, 3>& a) {
  return dot(a[0], cross(a[1], a[2]));
}
template <class T>
ME_INLINE T determinant(const matrix<T, 4, 4>& a) {
  // Laplace expansion by the first two columns against the last two.
  const auto minor = [&](int c, int i, int j) {
    return a[c].get(i) * a[c + 1].get(j) - a[c].get(j) * a[c + 1].get(i);
  };
  return minor(0, 0, 1) * minor(2, 2, 3) - minor(0, 0, 2) * minor(2, 1, 3) +
         minor(0, 0, 3) * minor(2, 1, 2) + minor(0, 1, 2) * minor(2, 0, 3) -
         minor(0, 1, 3) * minor(2, 0, 2) + minor(0, 2, 3) * minor(2, 0, 1);
}

#define ME_MATRICES(name, T)         \
  typedef matrix<T, 2, 2> name##2x2; \
  typedef matrix<T, 2, 3> name##2x3; \
  typedef matrix<T, 2, 4> name##2x4; \
  typedef matrix<T, 3, 2> name##3x2; \
  typedef matrix<T, 3, 3> name##3x3; \
  typedef matrix<T, 3, 4> name##3x4; \
  typedef matrix<T, 4, 2> name##4x2; \
  typedef matrix<T, 4, 3> name##4x3; \
  typedef matrix<T, 4, 4> name##4x4;
ME_MATRICES(half, half)
ME_MATRICES(float, float)
#undef ME_MATRICES
}  // namespace metal
