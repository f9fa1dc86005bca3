// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef long intptr_t;
typedef __bf16 bfloat;
#define assert(condition) ((void)0)
// What MLX puts before a kernel's text.
typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal_lint {

// OpenCL compares vectors to vectors of integers; Metal's are of bool. This takes any of them.
template <int N>
struct boolean_vector {
  bool x, y, z, w;
  boolean_vector() = default;
  template <class V>
  boolean_vector(V);
  bool& operator[](int) __private;
  bool operator[](int) const __private;
  boolean_vector operator!() const __private;
  boolean_vector operator&&(boolean_vector) const __private;
  boolean_vector operator||(boolean_vector) const __private;
  boolean_vector operator&(boolean_vector) const __private;
  boolean_vector operator|(boolean_vector) const __private;
};

template <class T, int N>
struct vector_of {
  typedef T type __attribute__((ext_vector_type(N)));
};
template <int N>
struct vector_of<bool, N> {
  typedef boolean_vector<N> type;
};

template <class V, class... A>
constexpr V make(A...) {
  return V{};
}
// (half4)x → cast<half4>() ->* x: OpenCL's casts keep the size; ->* binds as a cast does, nearly.
template <class V>
struct cast {};
template <class V, class A>
V operator->*(cast<V>, A);

template <class T>
struct same {
  typedef T type;
};

}  // namespace metal_lint

#define METAL_LINT_VECTORS(T)                                      \
  typedef T T##2 __attribute__((ext_vector_type(2)));              \
  typedef T T##3 __attribute__((ext_vector_type(3)));              \
  typedef T T##4 __attribute__((ext_vector_type(4)));              \
  typedef T packed_##T##2 __attribute__((ext_vector_type(2)));     \
  typedef T packed_##T##3 __attribute__((ext_vector_type(3)));     \
  typedef T packed_##T##4 __attribute__((ext_vector_type(4)));     \
  namespace metal {                                                \
  using ::T##2;                                                    \
  using ::T##3;                                                    \
  using ::T##4;                                                    \
  using ::packed_##T##2;                                           \
  using ::packed_##T##3;                                           \
  using ::packed_##T##4;                                           \
  }
METAL_LINT_VECTORS(char)
METAL_LINT_VECTORS(uchar)
METAL_LINT_VECTORS(short)
METAL_LINT_VECTORS(ushort)
METAL_LINT_VECTORS(int)
METAL_LINT_VECTORS(uint)
METAL_LINT_VECTORS(long)
METAL_LINT_VECTORS(ulong)
METAL_LINT_VECTORS(half)
METAL_LINT_VECTORS(float)
METAL_LINT_VECTORS(bfloat)
#undef METAL_LINT_VECTORS
typedef metal_lint::boolean_vector<2> bool2;
typedef metal_lint::boolean_vector<3> bool3;
typedef metal_lint::boolean_vector<4> bool4;

namespace metal {

using ::bfloat;
using ::bool2;
using ::bool3;
using ::bool4;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <class T>
struct vec_elements {
  static constexpr __constant int value = 1;
};
template <class T, int N>
struct vec_elements<T __attribute__((ext_vector_type(N)))> {
  static constexpr __constant int value = N;
};
template <class T, int N>
using packed_vec = T __attribute__((ext_vector_type(N)));

/// C columns of R rows.
template <class T, int C, int R>
struct matrix {
  vec<T, R> columns[C];
  matrix() = default;
  explicit matrix(T);
  template <class U>
  explicit matrix(matrix<U, C, R>);
  template <class... A>
  explicit matrix(vec<T, R>, A...);
  __private vec<T, R>& operator[](int) __private;
  vec<T, R> operator[](int) const __private;
};
#define METAL_LINT_MATRIX_UPDATE(AS)                                            \
  template <class T, int C, int R>                                              \
  AS matrix<T, C, R>& operator+=(AS matrix<T, C, R>&, matrix<T, C, R>);         \
  template <class T, int C, int R>                                              \
  AS matrix<T, C, R>& operator-=(AS matrix<T, C, R>&, matrix<T, C, R>);         \
  template <class T, int C, int R>                                              \
  AS matrix<T, C, R>& operator*=(AS matrix<T, C, R>&, T);
METAL_LINT_MATRIX_UPDATE(__private)
METAL_LINT_MATRIX_UPDATE(__global)
METAL_LINT_MATRIX_UPDATE(__local)
#undef METAL_LINT_MATRIX_UPDATE
template <class T, int C, int R>
matrix<T, C, R> operator*(T, matrix<T, C, R>);
template <class T, int C, int R>
matrix<T, C, R> operator-(matrix<T, C, R>);
template <class T, int C, int R>
bool operator==(matrix<T, C, R>, matrix<T, C, R>);
template <class T, int C, int R>
bool operator!=(matrix<T, C, R>, matrix<T, C, R>);
template <class T, int C, int R>
vec<T, R> operator*(matrix<T, C, R>, vec<T, C>);
template <class T, int C, int R>
vec<T, C> operator*(vec<T, R>, matrix<T, C, R>);
template <class T, int C, int R, int D>
matrix<T, D, R> operator*(matrix<T, C, R>, matrix<T, D, C>);
template <class T, int C, int R>
matrix<T, C, R> operator*(matrix<T, C, R>, T);
template <class T, int C, int R>
matrix<T, C, R> operator+(matrix<T, C, R>, matrix<T, C, R>);
template <class T, int C, int R>
matrix<T, C, R> operator-(matrix<T, C, R>, matrix<T, C, R>);
template <class T, int C, int R>
matrix<T, R, C> transpose(matrix<T, C, R>);
template <class T, int N>
T determinant(matrix<T, N, N>);
#define METAL_LINT_MATRICES(T)  \
  typedef matrix<T, 2, 2> T##2x2; \
  typedef matrix<T, 2, 3> T##2x3; \
  typedef matrix<T, 2, 4> T##2x4; \
  typedef matrix<T, 3, 2> T##3x2; \
  typedef matrix<T, 3, 3> T##3x3; \
  typedef matrix<T, 3, 4> T##3x4; \
  typedef matrix<T, 4, 2> T##4x2; \
  typedef matrix<T, 4, 3> T##4x3; \
  typedef matrix<T, 4, 4> T##4x4;
METAL_LINT_MATRICES(half)
METAL_LINT_MATRICES(float)
#undef METAL_LINT_MATRICES

template <class T>
struct uniform {
  uniform(T);
  operator T() const __private;
};
template <class T>
uniform<T> make_uniform(T);

template <class T, size_t N>
struct array {
  T elements[N];
  T& operator[](size_t) __private;
  T operator[](size_t) const __private;
  T operator[](size_t) const __constant;
  static constexpr size_t size() { return N; }
};

}  // namespace metal

template <class T, class U>
T as_type(U);
template <class T>
bool is_function_constant_defined(const __constant T&);
