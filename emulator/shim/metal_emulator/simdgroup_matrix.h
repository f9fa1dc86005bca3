// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// simdgroup_matrix<T, 8, 8>. Each lane keeps two neighbours of a row, in the arrangement that Apple
// GPUs show: row = 4·bit4 + (lane >> 1 & 3), column = 4·bit3 + 2·bit0. Products are summed in f32,
// k ascending, whatever the storage; the hardware's order is not documented.
#pragma once

#include "simdgroup.h"

namespace metal {
namespace _emulator {
METAL_EMULATOR_INLINE constexpr uint fragment_row(uint lane) {
  return (lane >> 4 & 1) * 4 + (lane >> 1 & 3);
}
METAL_EMULATOR_INLINE constexpr uint fragment_column(uint lane) {
  return (lane >> 3 & 1) * 4 + (lane & 1) * 2;
}
template <class T>
constexpr bool is_matrix_element_v =
    is_same_v<T, half> || is_same_v<T, bfloat> || is_same_v<T, float>;
typedef float float8 __attribute__((ext_vector_type(8)));
}  // namespace _emulator

template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "Metal has 8x8 simdgroup matrices only");
  static_assert(_emulator::is_matrix_element_v<T>, "half, bfloat or float");
  using storage_type = vec<T, 2>;

  simdgroup_matrix() = default;
  /// A diagonal matrix.
  METAL_EMULATOR_INLINE explicit simdgroup_matrix(T diagonal) {
    const uint row = _emulator::fragment_row(_emulator::lane());
    const uint column = _emulator::fragment_column(_emulator::lane());
    elements_ = storage_type(row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0));
  }
  METAL_EMULATOR_INLINE storage_type& thread_elements() { return elements_; }
  METAL_EMULATOR_INLINE const storage_type& thread_elements() const { return elements_; }

 private:
  storage_type elements_;
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

template <class T, int C, int R = C>
METAL_EMULATOR_INLINE simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, C, R> m;
  m.thread_elements() = vec<T, 2>(value);
  return m;
}
template <class T, int C, int R = C>
METAL_EMULATOR_INLINE simdgroup_matrix<T, C, R> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, C, R>(value);
}

namespace _emulator {
template <class Finish, class In>
METAL_EMULATOR_MEETING void meet_matrix(const In& in, void* out) {
  static constexpr metal_emulator::abi::Collective kCollective{Finish::kKind, &Finish::finish};
  metal_emulator::abi::hooks->collective(kCollective, &in, out, __builtin_return_address(0));
}
/// Where an 8x8 tile lies: element (row, column) at first[row · stride + column].
template <class T>
struct Tile {
  T* first;
  ulong stride;
  bool transpose;
  vec<remove_const_t<T>, 2> elements;  // of a store
};
METAL_EMULATOR_INLINE uint first_lane(const metal_emulator::abi::Exchange& e) {
  return __builtin_ctz(e.mask);
}
template <class T>
METAL_EMULATOR_RAW const Tile<T>& agreed_tile(const metal_emulator::abi::Exchange& e) {
  const Tile<T>& tile = in<Tile<T>>(e, first_lane(e));
  for (uint i = 0; i < 32; i++) {
    if (!active(e, i)) continue;
    const Tile<T>& other = in<Tile<T>>(e, i);
    if (other.first != tile.first || other.stride != tile.stride ||
        other.transpose != tile.transpose) {
      metal_emulator::abi::hooks->undefined(
          "lanes give a simdgroup matrix operation different addresses", i, e.site);
      break;
    }
  }
  return tile;
}
template <class T>
struct LoadTile {
  static constexpr metal_emulator::abi::CollectiveKind kKind =
      metal_emulator::abi::CollectiveKind::matrix;
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    const Tile<const T>& tile = agreed_tile<const T>(e);
    alignas(32) T values[8][8];
    for (uint r = 0; r < 8; r++) {
      const T* row = tile.first + r * tile.stride;
      metal_emulator::abi::hooks->simdgroup_read(row, 8 * sizeof(T), e.site);
      __builtin_memcpy(values[r], row, 8 * sizeof(T));
    }
    for (uint i = 0; i < 32; i++) {
      if (!active(e, i)) continue;
      const uint r = fragment_row(i), c = fragment_column(i);
      T* to = static_cast<T*>(e.out[i]);
      to[0] = tile.transpose ? values[c][r] : values[r][c];
      to[1] = tile.transpose ? values[c + 1][r] : values[r][c + 1];
    }
  }
};
template <class T>
struct StoreTile {
  static constexpr metal_emulator::abi::CollectiveKind kKind =
      metal_emulator::abi::CollectiveKind::matrix;
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    const Tile<T>& tile = agreed_tile<T>(e);
    alignas(32) T values[8][8] = {};
    for (uint i = 0; i < 32; i++) {
      if (!active(e, i)) continue;
      const uint r = fragment_row(i), c = fragment_column(i);
      const vec<T, 2>& pair = in<Tile<T>>(e, i).elements;
      (tile.transpose ? values[c][r] : values[r][c]) = pair.get(0);
      (tile.transpose ? values[c + 1][r] : values[r][c + 1]) = pair.get(1);
    }
    for (uint r = 0; r < 8; r++) {
      T* row = tile.first + r * tile.stride;
      metal_emulator::abi::hooks->simdgroup_write(row, 8 * sizeof(T), e.site);
      __builtin_memcpy(row, values[r], 8 * sizeof(T));
    }
  }
};
template <class A, class B, class C>
struct Multiplicands {
  vec<A, 2> a;
  vec<B, 2> b;
  vec<C, 2> c;
};
template <class D, class A, class B, class C>
struct MultiplyAccumulate {
  static constexpr metal_emulator::abi::CollectiveKind kKind =
      metal_emulator::abi::CollectiveKind::matrix_multiply;
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    // Rows of B and C as float8, elements of A alone: eight 8-wide products per row.
    alignas(32) float a[8][8] = {}, b[8][8] = {}, c[8][8] = {};
    for (uint i = 0; i < 32; i++) {
      if (!active(e, i)) continue;
      const Multiplicands<A, B, C>& m = in<Multiplicands<A, B, C>>(e, i);
      const uint row = fragment_row(i), column = fragment_column(i);
      a[row][column] = m.a.native_[0];
      a[row][column + 1] = m.a.native_[1];
      b[row][column] = m.b.native_[0];
      b[row][column + 1] = m.b.native_[1];
      c[row][column] = m.c.native_[0];
      c[row][column + 1] = m.c.native_[1];
    }
    for (uint row = 0; row < 8; row++) {
      float8 sum = *reinterpret_cast<const float8*>(c[row]);
      for (uint k = 0; k < 8; k++) sum += a[row][k] * *reinterpret_cast<const float8*>(b[k]);
      *reinterpret_cast<float8*>(c[row]) = sum;
    }
    for (uint i = 0; i < 32; i++) {
      if (!active(e, i)) continue;
      const float* from = &c[fragment_row(i)][fragment_column(i)];
      D* to = static_cast<D*>(e.out[i]);
      to[0] = static_cast<D>(from[0]);
      to[1] = static_cast<D>(from[1]);
    }
  }
};
}  // namespace _emulator

/// d(row, column) = source[(origin.y + row) · elements_per_row + origin.x + column], or its
/// transpose. Device and threadgroup memory.
template <class T>
METAL_EMULATOR_INLINE void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& d,
    const T* source,
    ulong elements_per_row = 8,
    ulong2 origin = ulong2(0),
    bool transpose = false) {
  const _emulator::Tile<const T> tile{
      source + origin.get(1) * elements_per_row + origin.get(0), elements_per_row, transpose, {}};
  vec<T, 2> elements;
  _emulator::meet_matrix<_emulator::LoadTile<T>>(tile, &elements);
  d.thread_elements() = elements;
}
template <class T>
METAL_EMULATOR_INLINE void simdgroup_store(
    const simdgroup_matrix<T, 8, 8>& s,
    T* target,
    ulong elements_per_row = 8,
    ulong2 origin = ulong2(0),
    bool transpose = false) {
  const _emulator::Tile<T> tile{
      target + origin.get(1) * elements_per_row + origin.get(0),
      elements_per_row,
      transpose,
      s.thread_elements()};
  _emulator::meet_matrix<_emulator::StoreTile<T>>(tile, nullptr);
}
/// d = a·b + c
template <class D, class A, class B, class C>
METAL_EMULATOR_INLINE void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d,
    const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b,
    const simdgroup_matrix<C, 8, 8>& c) {
  const _emulator::Multiplicands<A, B, C> m{
      a.thread_elements(), b.thread_elements(), c.thread_elements()};
  vec<D, 2> elements;
  _emulator::meet_matrix<_emulator::MultiplyAccumulate<D, A, B, C>>(m, &elements);
  d.thread_elements() = elements;
}
/// d = a·b
template <class D, class A, class B>
METAL_EMULATOR_INLINE void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d,
    const simdgroup_matrix<A, 8, 8>& a,
    const simdgroup_matrix<B, 8, 8>& b) {
  const _emulator::Multiplicands<A, B, float> m{
      a.thread_elements(), b.thread_elements(), vec<float, 2>(0.0f)};
  vec<D, 2> elements;
  _emulator::meet_matrix<_emulator::MultiplyAccumulate<D, A, B, float>>(m, &elements);
  d.thread_elements() = elements;
}
template <class T>
METAL_EMULATOR_INLINE simdgroup_matrix<T, 8, 8> operator*(
    const simdgroup_matrix<T, 8, 8>& a, const simdgroup_matrix<T, 8, 8>& b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
