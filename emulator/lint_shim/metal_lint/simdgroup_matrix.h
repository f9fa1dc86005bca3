// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

namespace metal {

template <class T, int C, int R>
struct simdgroup_matrix {
  static_assert(C == 8 && R == 8, "Metal's simdgroup matrices are 8x8");
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  typedef vec<T, 2> storage;
  __private storage& thread_elements() __private;
  storage& thread_elements();  // of a member: its address space is not known
  storage thread_elements() const __private;

 private:
  storage elements_;
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int C, int R = C>
simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
template <class T, int N>
simdgroup_matrix<T, N, N> make_diagonal_simdgroup_matrix(T);

#define METAL_LINT_MEMORY(AS)                                                                     \
  template <class T, int C, int R>                                                                \
  void simdgroup_load(                                                                            \
      __private simdgroup_matrix<T, C, R>&, const AS T*, ulong elements_per_row = C,              \
      ulong2 origin = ulong2{0, 0}, bool transpose = false);                                      \
  template <class T, int C, int R>                                                                \
  void simdgroup_store(                                                                           \
      simdgroup_matrix<T, C, R>, AS T*, ulong elements_per_row = C, ulong2 origin = ulong2{0, 0}, \
      bool transpose = false);
METAL_LINT_MEMORY(__global)
METAL_LINT_MEMORY(__local)
#undef METAL_LINT_MEMORY

template <class D, class A, class B, class E>
void simdgroup_multiply_accumulate(
    __private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>,
    simdgroup_matrix<E, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(
    __private simdgroup_matrix<D, 8, 8>&, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);

}  // namespace metal
