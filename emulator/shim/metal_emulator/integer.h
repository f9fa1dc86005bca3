// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Integer functions: real overloads for each scalar type, as Metal has them (a call with mixed
// types is ambiguous there too), and maps for vectors.
#pragma once

#include "relational.h"

namespace metal {
namespace _emulator {
template <class T>
constexpr uint bits_v = sizeof(T) * 8;
template <class T>
using wide_t = conditional_t<
    (sizeof(T) < 8),
    conditional_t<std::is_signed<T>::value, int64_t, uint64_t>,
    conditional_t<std::is_signed<T>::value, __int128, unsigned __int128>>;
template <class T>
ME_INLINE T saturate_to(wide_t<T> x) {
  const wide_t<T> low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
  return static_cast<T>(x < low ? low : x > high ? high : x);
}
template <class T>
ME_INLINE T int_median(T x, T y, T z) {
  const T low = y < x ? y : x, high = y < x ? x : y;
  return z < low ? low : z > high ? high : z;
}
template <class T>
ME_INLINE T int_rotate(T x, T n) {
  using U = std::make_unsigned_t<T>;
  const uint k = static_cast<uint>(n) & (bits_v<T> - 1);
  const U u = static_cast<U>(x);
  return static_cast<T>(k == 0 ? u : static_cast<U>(u << k | u >> (bits_v<T> - k)));
}
template <class T>
ME_INLINE T int_reverse(T x) {
  using U = std::make_unsigned_t<T>;
  U u = static_cast<U>(x), r = 0;
  for (uint i = 0; i < bits_v<T>; i++) r = static_cast<U>(r << 1 | (u >> i & 1));
  return static_cast<T>(r);
}
template <class T>
ME_INLINE T int_clz(T x) {
  using U = std::make_unsigned_t<T>;
  const uint64_t u = static_cast<U>(x);
  return static_cast<T>(u ? __builtin_clzll(u) - (64 - static_cast<int>(bits_v<T>)) : bits_v<T>);
}
template <class T>
ME_INLINE T int_ctz(T x) {
  using U = std::make_unsigned_t<T>;
  const uint64_t u = static_cast<U>(x);
  return static_cast<T>(u ? __builtin_ctzll(u) : bits_v<T>);
}
template <class T>
ME_INLINE T int_popcount(T x) {
  using U = std::make_unsigned_t<T>;
  return static_cast<T>(__builtin_popcountll(static_cast<U>(x)));
}
template <class T>
ME_INLINE std::make_unsigned_t<T> int_absdiff(T x, T y) {
  using U = std::make_unsigned_t<T>;
  return x > y ? static_cast<U>(static_cast<U>(x) - static_cast<U>(y))
               : static_cast<U>(static_cast<U>(y) - static_cast<U>(x));
}
/// offset + bits must not exceed the width; 0 bits give 0.
template <class T>
ME_INLINE T int_extract(T x, uint offset, uint bits) {
  if (bits == 0) return 0;
  using U = std::make_unsigned_t<T>;
  const U up = static_cast<U>(static_cast<U>(x) << (bits_v<T> - offset - bits));
  return static_cast<T>(static_cast<T>(up) >> (bits_v<T> - bits));
}
template <class T>
ME_INLINE T int_insert(T base, T value, uint offset, uint bits) {
  if (bits == 0) return base;
  using U = std::make_unsigned_t<T>;
  const U ones = static_cast<U>(~U(0)) >> (bits_v<T> - bits);
  const U mask = static_cast<U>(ones << offset);
  return static_cast<T>(
      (static_cast<U>(base) & static_cast<U>(~mask)) |
      (static_cast<U>(static_cast<U>(value) << offset) & mask));
}
template <class X>
using enable_integer_vector_t = enable_if_t<
    is_vector_v<X> && is_integral_v<element_t<X>> && !is_same_v<element_t<X>, bool>,
    value_t<X>>;
template <class... X>
using enable_integer_vectors_t = enable_integer_vector_t<common_vector_t<X...>>;
}  // namespace _emulator

#define ME_INTEGER_TYPES(M) \
  M(char) M(int8_t) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)
#define ME_INTEGER_1(name)                                                           \
  template <class V>                                                                 \
  ME_INLINE _emulator::enable_integer_vector_t<V> name(const V& v) {                 \
    const _emulator::value_t<V> a = v;                                               \
    return _emulator::map<_emulator::value_t<V>>([](auto x) { return name(x); }, a); \
  }
#define ME_INTEGER_2(name)                                                           \
  template <class A, class B>                                                        \
  ME_INLINE _emulator::enable_integer_vectors_t<A, B> name(const A& a, const B& b) { \
    using V = _emulator::common_vector_t<A, B>;                                      \
    return _emulator::map<V>([](auto x, auto y) { return name(x, y); }, V(a), V(b)); \
  }
#define ME_INTEGER_3(name)                                                       \
  template <class A, class B, class C>                                           \
  ME_INLINE _emulator::enable_integer_vectors_t<A, B, C> name(                   \
      const A& a, const B& b, const C& c) {                                      \
    using V = _emulator::common_vector_t<A, B, C>;                               \
    return _emulator::map<V>(                                                    \
        [](auto x, auto y, auto z) { return name(x, y, z); }, V(a), V(b), V(c)); \
  }
#define ME_SCALARS(T)                                                                            \
  ME_INLINE constexpr T min(T x, T y) {                                                          \
    return y < x ? y : x;                                                                        \
  }                                                                                              \
  ME_INLINE constexpr T max(T x, T y) {                                                          \
    return x < y ? y : x;                                                                        \
  }                                                                                              \
  ME_INLINE constexpr T clamp(T x, T low, T high) {                                              \
    return min(max(x, low), high);                                                               \
  }                                                                                              \
  ME_INLINE T min3(T x, T y, T z) {                                                              \
    return min(x, min(y, z));                                                                    \
  }                                                                                              \
  ME_INLINE T max3(T x, T y, T z) {                                                              \
    return max(x, max(y, z));                                                                    \
  }                                                                                              \
  ME_INLINE T median3(T x, T y, T z) {                                                           \
    return _emulator::int_median<T>(x, y, z);                                                    \
  }                                                                                              \
  ME_INLINE T abs(T x) {                                                                         \
    return static_cast<T>(x < 0 ? T(0) - x : x);                                                 \
  }                                                                                              \
  ME_INLINE auto absdiff(T x, T y) {                                                             \
    return _emulator::int_absdiff<T>(x, y);                                                      \
  }                                                                                              \
  ME_INLINE T addsat(T x, T y) {                                                                 \
    using W = _emulator::wide_t<T>;                                                              \
    return _emulator::saturate_to<T>(static_cast<W>(x) + static_cast<W>(y));                     \
  }                                                                                              \
  ME_INLINE T subsat(T x, T y) {                                                                 \
    using W = _emulator::wide_t<T>;                                                              \
    if (!std::is_signed<T>::value && x < y) return 0;                                            \
    return _emulator::saturate_to<T>(static_cast<W>(x) - static_cast<W>(y));                     \
  }                                                                                              \
  ME_INLINE T hadd(T x, T y) {                                                                   \
    using W = _emulator::wide_t<T>;                                                              \
    return static_cast<T>((static_cast<W>(x) + static_cast<W>(y)) >> 1);                         \
  }                                                                                              \
  ME_INLINE T rhadd(T x, T y) {                                                                  \
    using W = _emulator::wide_t<T>;                                                              \
    return static_cast<T>((static_cast<W>(x) + static_cast<W>(y) + 1) >> 1);                     \
  }                                                                                              \
  ME_INLINE T mulhi(T x, T y) {                                                                  \
    using W = _emulator::wide_t<T>;                                                              \
    return static_cast<T>(static_cast<W>(x) * static_cast<W>(y) >> _emulator::bits_v<T>);        \
  }                                                                                              \
  ME_INLINE T madhi(T x, T y, T z) {                                                             \
    return static_cast<T>(mulhi(x, y) + z);                                                      \
  }                                                                                              \
  ME_INLINE T madsat(T x, T y, T z) {                                                            \
    using W = _emulator::wide_t<T>;                                                              \
    return _emulator::saturate_to<T>(static_cast<W>(x) * static_cast<W>(y) + static_cast<W>(z)); \
  }                                                                                              \
  ME_INLINE T clz(T x) {                                                                         \
    return _emulator::int_clz<T>(x);                                                             \
  }                                                                                              \
  ME_INLINE T ctz(T x) {                                                                         \
    return _emulator::int_ctz<T>(x);                                                             \
  }                                                                                              \
  ME_INLINE T popcount(T x) {                                                                    \
    return _emulator::int_popcount<T>(x);                                                        \
  }                                                                                              \
  ME_INLINE T reverse_bits(T x) {                                                                \
    return _emulator::int_reverse<T>(x);                                                         \
  }                                                                                              \
  ME_INLINE T rotate(T x, T n) {                                                                 \
    return _emulator::int_rotate<T>(x, n);                                                       \
  }                                                                                              \
  ME_INLINE T extract_bits(T x, uint offset, uint bits) {                                        \
    return _emulator::int_extract<T>(x, offset, bits);                                           \
  }                                                                                              \
  ME_INLINE T insert_bits(T base, T value, uint offset, uint bits) {                             \
    return _emulator::int_insert<T>(base, value, offset, bits);                                  \
  }
ME_INTEGER_TYPES(ME_SCALARS)
#undef ME_SCALARS
#undef ME_INTEGER_TYPES

ME_INTEGER_1(abs)
ME_INTEGER_1(clz)
ME_INTEGER_1(ctz)
ME_INTEGER_1(popcount)
ME_INTEGER_1(reverse_bits)
ME_INTEGER_2(min)
ME_INTEGER_2(max)
ME_INTEGER_2(addsat)
ME_INTEGER_2(subsat)
ME_INTEGER_2(hadd)
ME_INTEGER_2(rhadd)
ME_INTEGER_2(mulhi)
ME_INTEGER_2(rotate)
ME_INTEGER_3(clamp)
ME_INTEGER_3(min3)
ME_INTEGER_3(max3)
ME_INTEGER_3(median3)
ME_INTEGER_3(madhi)
ME_INTEGER_3(madsat)
#undef ME_INTEGER_1
#undef ME_INTEGER_2
#undef ME_INTEGER_3

template <class T, int N>
ME_INLINE auto absdiff(const vec<T, N>& a, const vec<T, N>& b) {
  return _emulator::map<vec<std::make_unsigned_t<T>, N>>(
      [](T x, T y) { return absdiff(x, y); }, a, b);
}
template <class T, int N>
ME_INLINE vec<T, N> extract_bits(const vec<T, N>& a, uint offset, uint bits) {
  return _emulator::map<vec<T, N>>([=](T x) { return extract_bits(x, offset, bits); }, a);
}
template <class T, int N>
ME_INLINE vec<T, N> insert_bits(const vec<T, N>& a, const vec<T, N>& b, uint offset, uint bits) {
  return _emulator::map<vec<T, N>>([=](T x, T y) { return insert_bits(x, y, offset, bits); }, a, b);
}

// 24-bit factors; higher bits are ignored, as the instruction does.
ME_INLINE int mul24(int x, int y) {
  return ((x << 8) >> 8) * ((y << 8) >> 8);
}
ME_INLINE uint mul24(uint x, uint y) {
  return (x & 0xffffffu) * (y & 0xffffffu);
}
ME_INLINE int mad24(int x, int y, int z) {
  return mul24(x, y) + z;
}
ME_INLINE uint mad24(uint x, uint y, uint z) {
  return mul24(x, y) + z;
}
}  // namespace metal
