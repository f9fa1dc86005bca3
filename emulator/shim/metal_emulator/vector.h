// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// vec<T, N>, packed_vec<T, N>, their swizzles, constructors and operators. A vector holds one of
// clang's native vectors, so that a float4 load is one 16-byte access for the checks, and a union
// of views: elements, letters, swizzles. Swizzles and packed vectors name their value type in a
// template argument: argument-dependent lookup then finds that type's operators.
#pragma once

#include "swizzles.h"
#include "types.h"

#define ME_INLINE METAL_EMULATOR_INLINE

namespace metal {
template <class T, int N>
struct vec;
template <class V, int Storage, int... I>
struct _swizzle;
template <class V>
struct _packed;
template <class T, int N>
using packed_vec = _packed<vec<T, N>>;

namespace _emulator {
// Native vectors of bool are bit masks in clang; Metal's are bytes.
template <class T>
using lane_t = conditional_t<is_same_v<T, bool>, unsigned char, T>;
template <class T, int N>
struct native {
  typedef lane_t<T> type __attribute__((ext_vector_type(N)));
};

/// The vector (or scalar) that an expression stands for: itself, or what a swizzle selects.
template <class X>
struct value {
  using type = X;
  static constexpr int width = is_arithmetic_v<X> ? 1 : 0;
};
template <class T, int N>
struct value<vec<T, N>> {
  using type = vec<T, N>;
  static constexpr int width = N;
};
template <class V, int S, int... I>
struct value<_swizzle<V, S, I...>> {
  using type = V;
  static constexpr int width = sizeof...(I);
};
template <class V>
struct value<_packed<V>> {
  using type = V;
  static constexpr int width = V::width;
};
template <class X>
using value_t = typename value<remove_cv_t<remove_reference_t<X>>>::type;
template <class X>
constexpr int width_v = value<remove_cv_t<remove_reference_t<X>>>::width;
template <class X>
constexpr bool is_vector_v = (width_v<X> > 1);
template <class X, class = void>
struct element {
  using type = X;
};
template <class X>
struct element<X, enable_if_t<is_vector_v<X>>> {
  using type = typename value_t<X>::element;
};
template <class X>
using element_t = typename element<remove_cv_t<remove_reference_t<X>>>::type;

template <int... I>
struct all_distinct;
template <>
struct all_distinct<> {
  static constexpr bool value = true;
};
template <int I, int... J>
struct all_distinct<I, J...> {
  static constexpr bool value = ((I != J) && ... && true) && all_distinct<J...>::value;
};

/// static_cast, and half to bfloat and back through float: exact one way, rounded once the other.
template <class T, class U>
ME_INLINE constexpr T convert_to(U x) {
  if constexpr (
      (is_same_v<T, half> && is_same_v<U, bfloat>) || (is_same_v<T, bfloat> && is_same_v<U, half>))
    return static_cast<T>(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

template <class T, int N>
struct filler {
  T data[N]{};
  int count = 0;
  template <class A>
  ME_INLINE constexpr void add(const A& a) {
    if constexpr (is_vector_v<A>) {
      const value_t<A> v = a;
      for (int i = 0; i < width_v<A>; i++) data[count++] = convert_to<T>(v.get(i));
    } else {
      data[count++] = convert_to<T>(a);
    }
  }
};
template <class... A>
constexpr int total_width() {
  return (width_v<A> + ... + 0);
}
}  // namespace _emulator

// The element type is taken from V's arguments: V itself is not complete here.
template <class T, int N, int Storage, int... I>
struct _swizzle<vec<T, N>, Storage, I...> {
  using V = vec<T, N>;
  using element = T;
  T data[Storage];

  ME_INLINE operator V() const { return V(data[I]...); }
  ME_INLINE _swizzle& operator=(const V& value) {
    static_assert(
        _emulator::all_distinct<I...>::value, "a repeated component cannot be assigned to");
    int k = 0;
    ((data[I] = value.get(k++)), ...);
    return *this;
  }
  ME_INLINE _swizzle& operator=(const _swizzle& other) { return *this = static_cast<V>(other); }
#define ME_COMPOUND(op)                            \
  ME_INLINE _swizzle& operator op##=(const V& b) { \
    return *this = static_cast<V>(*this) op b;     \
  }
  ME_COMPOUND(+)
  ME_COMPOUND(-)
  ME_COMPOUND(*)
  ME_COMPOUND(/) ME_COMPOUND(%) ME_COMPOUND(&) ME_COMPOUND(|) ME_COMPOUND(^) ME_COMPOUND(<<)
      ME_COMPOUND(>>)
#undef ME_COMPOUND
          ME_INLINE element
          operator[](int i) const {
    constexpr int index[] = {I...};
    return data[index[i]];
  }
};

// Common to vec<T, 2..4>.
#define ME_VEC_MEMBERS(N)                                                                         \
  using element = T;                                                                              \
  using native = typename _emulator::native<T, N>::type;                                          \
  static constexpr int width = N;                                                                 \
  static constexpr int kStorage = N;                                                              \
  struct from_native {};                                                                          \
  vec() = default;                                                                                \
  ME_INLINE constexpr vec(const vec& o) : native_(o.native_) {}                                   \
  ME_INLINE constexpr vec(from_native, native n) : native_(n) {}                                  \
  ME_INLINE constexpr vec(T s) : native_(static_cast<_emulator::lane_t<T>>(s)) {}                 \
  template <class U>                                                                              \
  ME_INLINE constexpr explicit vec(const vec<U, N>& o)                                            \
      : native_(convert(o, std::make_index_sequence<N>())) {}                                     \
  template <class U>                                                                              \
  ME_INLINE constexpr explicit vec(const _packed<vec<U, N>>& o) : vec(o.unpack()) {}              \
  template <                                                                                      \
      class A,                                                                                    \
      class B,                                                                                    \
      class... C,                                                                                 \
      class = enable_if_t<_emulator::total_width<A, B, C...>() == N>>                             \
  ME_INLINE constexpr vec(const A& a, const B& b, const C&... c) : native_(gather(a, b, c...)) {} \
  ME_INLINE constexpr vec& operator=(const vec& o) {                                              \
    native_ = o.native_;                                                                          \
    return *this;                                                                                 \
  }                                                                                               \
  ME_INLINE constexpr T get(int i) const {                                                        \
    return static_cast<T>(native_[i]);                                                            \
  }                                                                                               \
  ME_INLINE T& operator[](int i) {                                                                \
    return data_[i];                                                                              \
  }                                                                                               \
  ME_INLINE const T& operator[](int i) const {                                                    \
    return data_[i];                                                                              \
  }                                                                                               \
                                                                                                  \
 private:                                                                                         \
  template <class V, size_t... I>                                                                 \
  ME_INLINE static constexpr native convert(const V& o, std::index_sequence<I...>) {              \
    return native{static_cast<_emulator::lane_t<T>>(_emulator::convert_to<T>(o.get(I)))...};      \
  }                                                                                               \
  template <size_t... I>                                                                          \
  ME_INLINE static constexpr native pack(                                                         \
      const _emulator::filler<T, N>& f, std::index_sequence<I...>) {                              \
    return native{static_cast<_emulator::lane_t<T>>(f.data[I])...};                               \
  }                                                                                               \
  template <class... A>                                                                           \
  ME_INLINE static constexpr native gather(const A&... a) {                                       \
    _emulator::filler<T, N> f;                                                                    \
    (f.add(a), ...);                                                                              \
    return pack(f, std::make_index_sequence<N>());                                                \
  }                                                                                               \
                                                                                                  \
 public:                                                                                          \
  ME_VEC_OPERATORS(N)

#define ME_ARITHMETIC(op)                                                  \
  friend ME_INLINE constexpr vec operator op(const vec& a, const vec& b) { \
    return vec(from_native{}, a.native_ op b.native_);                     \
  }                                                                        \
  ME_INLINE vec& operator op##=(const vec& b) {                            \
    return *this = *this op b;                                             \
  }
#define ME_COMPARE(N, op)                                                                   \
  friend ME_INLINE constexpr vec<bool, N> operator op(const vec& a, const vec& b) {         \
    return vec<bool, N>(                                                                    \
        typename vec<bool, N>::from_native{},                                               \
        __builtin_convertvector(-(a.native_ op b.native_), typename vec<bool, N>::native)); \
  }
#define ME_LOGIC(N, op)                                                             \
  friend ME_INLINE constexpr vec<bool, N> operator op(const vec& a, const vec& b) { \
    vec<bool, N> r(false);                                                          \
    for (int i = 0; i < N; i++) r.native_[i] = (a.get(i) op b.get(i)) ? 1 : 0;      \
    return r;                                                                       \
  }
#define ME_VEC_OPERATORS(N)                                                                    \
  ME_ARITHMETIC(+)                                                                             \
  ME_ARITHMETIC(-)                                                                             \
  ME_ARITHMETIC(*)                                                                             \
  ME_ARITHMETIC(/) ME_ARITHMETIC(%) ME_ARITHMETIC(&) ME_ARITHMETIC(|) ME_ARITHMETIC(^)         \
      ME_ARITHMETIC(<<) ME_ARITHMETIC(>>) ME_COMPARE(N, ==) ME_COMPARE(N, !=) ME_COMPARE(N, <) \
          ME_COMPARE(N, >) ME_COMPARE(N, <=) ME_COMPARE(N, >=) ME_LOGIC(N, &&)                 \
              ME_LOGIC(N, ||) friend ME_INLINE constexpr vec                                   \
              operator-(const vec& a) {                                                        \
    return vec(from_native{}, -a.native_);                                                     \
  }                                                                                            \
  friend ME_INLINE constexpr vec operator+(const vec& a) {                                     \
    return a;                                                                                  \
  }                                                                                            \
  friend ME_INLINE constexpr vec operator~(const vec& a) {                                     \
    return vec(from_native{}, ~a.native_);                                                     \
  }                                                                                            \
  friend ME_INLINE constexpr vec<bool, N> operator!(const vec& a) {                            \
    vec<bool, N> r(false);                                                                     \
    for (int i = 0; i < N; i++) r.native_[i] = a.get(i) ? 0 : 1;                               \
    return r;                                                                                  \
  }                                                                                            \
  ME_INLINE vec& operator++() {                                                                \
    return *this = *this + vec(T(1));                                                          \
  }                                                                                            \
  ME_INLINE vec& operator--() {                                                                \
    return *this = *this - vec(T(1));                                                          \
  }                                                                                            \
  ME_INLINE vec operator++(int) {                                                              \
    vec old = *this;                                                                           \
    ++*this;                                                                                   \
    return old;                                                                                \
  }                                                                                            \
  ME_INLINE vec operator--(int) {                                                              \
    vec old = *this;                                                                           \
    --*this;                                                                                   \
    return old;                                                                                \
  }

template <class T>
struct vec<T, 2> {
  union {
    typename _emulator::native<T, 2>::type native_;
    T data_[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
#undef METAL_EMULATOR_SWIZZLE
#define METAL_EMULATOR_SWIZZLE(w, name, ...) _swizzle<vec<T, w>, 2, __VA_ARGS__> name;
    METAL_EMULATOR_SWIZZLES_2(x, y)
    METAL_EMULATOR_SWIZZLES_2(r, g)
  };
  ME_VEC_MEMBERS(2)
};
template <class T>
struct vec<T, 3> {
  union {
    typename _emulator::native<T, 3>::type native_;
    T data_[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
#undef METAL_EMULATOR_SWIZZLE
#define METAL_EMULATOR_SWIZZLE(w, name, ...) _swizzle<vec<T, w>, 3, __VA_ARGS__> name;
    METAL_EMULATOR_SWIZZLES_3(x, y, z)
    METAL_EMULATOR_SWIZZLES_3(r, g, b)
  };
  ME_VEC_MEMBERS(3)
};
template <class T>
struct vec<T, 4> {
  union {
    typename _emulator::native<T, 4>::type native_;
    T data_[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
#undef METAL_EMULATOR_SWIZZLE
#define METAL_EMULATOR_SWIZZLE(w, name, ...) _swizzle<vec<T, w>, 4, __VA_ARGS__> name;
    METAL_EMULATOR_SWIZZLES_4(x, y, z, w)
    METAL_EMULATOR_SWIZZLES_4(r, g, b, a)
  };
  ME_VEC_MEMBERS(4)
};

/// Elements without padding, aligned like one element.
#define ME_PACKED_MEMBERS(N)                                                                     \
  using element = T;                                                                             \
  static constexpr int width = N;                                                                \
  _packed() = default;                                                                           \
  ME_INLINE constexpr _packed(const _packed& o) : _packed(o.unpack()) {}                         \
  ME_INLINE constexpr _packed(const vec<T, N>& v) : _packed(v, std::make_index_sequence<N>()) {} \
  ME_INLINE constexpr _packed(T s) : _packed(vec<T, N>(s)) {}                                    \
  template <                                                                                     \
      class A,                                                                                   \
      class B,                                                                                   \
      class... C,                                                                                \
      class = enable_if_t<_emulator::total_width<A, B, C...>() == N>>                            \
  ME_INLINE constexpr _packed(const A& a, const B& b, const C&... c)                             \
      : _packed(vec<T, N>(a, b, c...)) {}                                                        \
  ME_INLINE _packed& operator=(const _packed& o) {                                               \
    return *this = o.unpack();                                                                   \
  }                                                                                              \
  ME_INLINE _packed& operator=(const vec<T, N>& v) {                                             \
    for (int i = 0; i < N; i++) data_[i] = v.get(i);                                             \
    return *this;                                                                                \
  }                                                                                              \
  ME_INLINE constexpr vec<T, N> unpack() const {                                                 \
    return value(std::make_index_sequence<N>());                                                 \
  }                                                                                              \
  ME_INLINE constexpr operator vec<T, N>() const {                                               \
    return unpack();                                                                             \
  }                                                                                              \
  ME_INLINE T& operator[](int i) {                                                               \
    return data_[i];                                                                             \
  }                                                                                              \
  ME_INLINE const T& operator[](int i) const {                                                   \
    return data_[i];                                                                             \
  }                                                                                              \
  ME_PACKED_COMPOUND(+)                                                                          \
  ME_PACKED_COMPOUND(-)                                                                          \
  ME_PACKED_COMPOUND(*)                                                                          \
  ME_PACKED_COMPOUND(/) ME_PACKED_COMPOUND(%) ME_PACKED_COMPOUND(&) ME_PACKED_COMPOUND(|)        \
      ME_PACKED_COMPOUND(^)                                                                      \
                                                                                                 \
          private : template <size_t... I>                                                       \
                    ME_INLINE constexpr _packed(const vec<T, N>& v, std::index_sequence<I...>)   \
      : data_{v.get(I)...} {}                                                                    \
  template <size_t... I>                                                                         \
  ME_INLINE constexpr vec<T, N> value(std::index_sequence<I...>) const {                         \
    return vec<T, N>(data_[I]...);                                                               \
  }                                                                                              \
                                                                                                 \
 public:
#define ME_PACKED_COMPOUND(op)                             \
  ME_INLINE _packed& operator op##=(const value_type& b) { \
    return *this = unpack() op b;                          \
  }

template <class T>
struct _packed<vec<T, 2>> {
  using value_type = vec<T, 2>;
  union {
    T data_[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
#undef METAL_EMULATOR_SWIZZLE
#define METAL_EMULATOR_SWIZZLE(w, name, ...) _swizzle<vec<T, w>, 2, __VA_ARGS__> name;
    METAL_EMULATOR_SWIZZLES_2(x, y)
  };
  ME_PACKED_MEMBERS(2)
};
template <class T>
struct _packed<vec<T, 3>> {
  using value_type = vec<T, 3>;
  union {
    T data_[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
#undef METAL_EMULATOR_SWIZZLE
#define METAL_EMULATOR_SWIZZLE(w, name, ...) _swizzle<vec<T, w>, 3, __VA_ARGS__> name;
    METAL_EMULATOR_SWIZZLES_3(x, y, z)
  };
  ME_PACKED_MEMBERS(3)
};
template <class T>
struct _packed<vec<T, 4>> {
  using value_type = vec<T, 4>;
  union {
    T data_[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
#undef METAL_EMULATOR_SWIZZLE
#define METAL_EMULATOR_SWIZZLE(w, name, ...) _swizzle<vec<T, w>, 4, __VA_ARGS__> name;
    METAL_EMULATOR_SWIZZLES_4(x, y, z, w)
  };
  ME_PACKED_MEMBERS(4)
};

template <class T>
struct is_vector : bool_constant<_emulator::is_vector_v<T>> {};
template <class T>
constexpr bool is_vector_v = is_vector<T>::value;
/// Element type: vec_element_t<float4> is float, as make_scalar in Metal's own headers.
template <class T>
using make_scalar_t = _emulator::element_t<T>;
template <class T>
struct make_scalar {
  using type = make_scalar_t<T>;
};

/// Elements of a vector; 1 of a scalar.
template <class T>
struct vec_elements : integral_constant<int, _emulator::width_v<T>> {};

#define ME_NAMES(name, T)                    \
  typedef vec<T, 2> name##2;                 \
  typedef vec<T, 3> name##3;                 \
  typedef vec<T, 4> name##4;                 \
  typedef packed_vec<T, 2> packed_##name##2; \
  typedef packed_vec<T, 3> packed_##name##3; \
  typedef packed_vec<T, 4> packed_##name##4;
ME_NAMES(bool, bool)
ME_NAMES(char, char)
ME_NAMES(uchar, unsigned char)
ME_NAMES(short, short)
ME_NAMES(ushort, unsigned short)
ME_NAMES(int, int)
ME_NAMES(uint, unsigned int)
ME_NAMES(long, long)
ME_NAMES(ulong, unsigned long)
ME_NAMES(half, half)
ME_NAMES(bfloat, bfloat)
ME_NAMES(float, float)
#undef ME_NAMES
}  // namespace metal

// Vector names are known without `using namespace metal`.
#define ME_GLOBAL(name)          \
  using metal::name##2;          \
  using metal::name##3;          \
  using metal::name##4;          \
  using metal::packed_##name##2; \
  using metal::packed_##name##3; \
  using metal::packed_##name##4;
ME_GLOBAL(bool)
ME_GLOBAL(char)
ME_GLOBAL(uchar)
ME_GLOBAL(short) ME_GLOBAL(ushort) ME_GLOBAL(int) ME_GLOBAL(uint) ME_GLOBAL(long) ME_GLOBAL(ulong)
    ME_GLOBAL(half) ME_GLOBAL(bfloat) ME_GLOBAL(float)
#undef ME_GLOBAL
