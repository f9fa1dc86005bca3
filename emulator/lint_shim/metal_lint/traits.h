// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

namespace metal {

template <class T, T V>
struct integral_constant {
  static constexpr __constant T value = V;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  typedef T type;
};
template <class T, class F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

template <class T, class U>
struct is_same : false_type {};
template <class T>
struct is_same<T, T> : true_type {};

#define METAL_LINT_REMOVE(name, pattern) \
  template <class T>                     \
  struct name {                          \
    typedef T type;                      \
  };                                     \
  template <class T>                     \
  struct name<pattern> {                 \
    typedef T type;                      \
  };                                     \
  template <class T>                     \
  using name##_t = typename name<T>::type;
METAL_LINT_REMOVE(remove_const, const T)
METAL_LINT_REMOVE(remove_volatile, volatile T)
#undef METAL_LINT_REMOVE
template <class T>
struct remove_cv {
  typedef remove_const_t<remove_volatile_t<T>> type;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;

#define METAL_LINT_SPACES(M) M(__private) M(__global) M(__local) M(__constant)
template <class T>
struct remove_reference {
  typedef T type;
};
#define METAL_LINT_REFERENCE(AS)    \
  template <class T>                \
  struct remove_reference<AS T&> {  \
    typedef T type;                 \
  };
METAL_LINT_SPACES(METAL_LINT_REFERENCE)
#undef METAL_LINT_REFERENCE
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
struct remove_pointer {
  typedef T type;
};
template <class T>
struct is_pointer : false_type {};
#define METAL_LINT_POINTER(AS)    \
  template <class T>              \
  struct remove_pointer<AS T*> {  \
    typedef AS T type;            \
  };                              \
  template <class T>              \
  struct is_pointer<AS T*> : true_type {};
METAL_LINT_SPACES(METAL_LINT_POINTER)
#undef METAL_LINT_POINTER
#undef METAL_LINT_SPACES
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
using decay_t = remove_cv_t<remove_reference_t<T>>;

template <class T>
struct is_const : false_type {};
template <class T>
struct is_const<const T> : true_type {};

template <class T>
struct is_integral : false_type {};
template <class T>
struct is_floating_point : false_type {};
template <class T>
struct is_signed : false_type {};
template <class T>
struct is_unsigned : false_type {};
#define METAL_LINT_IS(trait, T) \
  template <>                   \
  struct trait<T> : true_type {};
METAL_LINT_IS(is_integral, bool)
METAL_LINT_IS(is_integral, char)
METAL_LINT_IS(is_integral, signed char)
METAL_LINT_IS(is_integral, uchar)
METAL_LINT_IS(is_integral, short)
METAL_LINT_IS(is_integral, ushort)
METAL_LINT_IS(is_integral, int)
METAL_LINT_IS(is_integral, uint)
METAL_LINT_IS(is_integral, long)
METAL_LINT_IS(is_integral, ulong)
METAL_LINT_IS(is_floating_point, half)
METAL_LINT_IS(is_floating_point, float)
METAL_LINT_IS(is_floating_point, bfloat)
METAL_LINT_IS(is_signed, char)
METAL_LINT_IS(is_signed, signed char)
METAL_LINT_IS(is_signed, short)
METAL_LINT_IS(is_signed, int)
METAL_LINT_IS(is_signed, long)
METAL_LINT_IS(is_signed, half)
METAL_LINT_IS(is_signed, float)
METAL_LINT_IS(is_signed, bfloat)
METAL_LINT_IS(is_unsigned, bool)
METAL_LINT_IS(is_unsigned, uchar)
METAL_LINT_IS(is_unsigned, ushort)
METAL_LINT_IS(is_unsigned, uint)
METAL_LINT_IS(is_unsigned, ulong)
#undef METAL_LINT_IS
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T>
struct is_scalar : bool_constant<is_arithmetic<T>::value || is_pointer<T>::value> {};
template <class T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <class T>
struct is_class : bool_constant<__is_class(T)> {};
template <class F, class T>
struct is_convertible : bool_constant<__is_convertible(F, T)> {};
template <class T, class... A>
struct is_constructible : bool_constant<__is_constructible(T, A...)> {};
template <class B, class D>
struct is_base_of : bool_constant<__is_base_of(B, D)> {};

#define METAL_LINT_VALUE(trait) \
  template <class T>            \
  constexpr __constant bool trait##_v = trait<T>::value;
METAL_LINT_VALUE(is_integral)
METAL_LINT_VALUE(is_floating_point)
METAL_LINT_VALUE(is_signed)
METAL_LINT_VALUE(is_unsigned)
METAL_LINT_VALUE(is_arithmetic)
METAL_LINT_VALUE(is_scalar)
METAL_LINT_VALUE(is_pointer)
METAL_LINT_VALUE(is_const)
METAL_LINT_VALUE(is_enum)
METAL_LINT_VALUE(is_class)
#undef METAL_LINT_VALUE
template <class T, class U>
constexpr __constant bool is_same_v = is_same<T, U>::value;
template <class T, class U>
constexpr __constant bool is_convertible_v = is_convertible<T, U>::value;
template <class T, class U>
constexpr __constant bool is_base_of_v = is_base_of<T, U>::value;

template <class T>
struct make_unsigned {
  typedef T type;
};
template <class T>
struct make_signed {
  typedef T type;
};
#define METAL_LINT_SIGN(S, U)    \
  template <>                    \
  struct make_unsigned<S> {      \
    typedef U type;              \
  };                             \
  template <>                    \
  struct make_signed<U> {        \
    typedef S type;              \
  };
METAL_LINT_SIGN(char, uchar)
METAL_LINT_SIGN(short, ushort)
METAL_LINT_SIGN(int, uint)
METAL_LINT_SIGN(long, ulong)
#undef METAL_LINT_SIGN
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
using make_signed_t = typename make_signed<T>::type;
template <class...>
using void_t = void;
template <class T>
T declval();

template <class T>
struct numeric_limits {
  static constexpr __constant bool is_signed = metal::is_signed<T>::value;
  static constexpr __constant bool is_integer = metal::is_integral<T>::value;
  static constexpr __constant bool is_specialized = true;
  static constexpr __constant int digits = sizeof(T) * 8;
  static constexpr T max() { return T(0); }
  static constexpr T min() { return T(0); }
  static constexpr T lowest() { return T(0); }
  static constexpr T epsilon() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
  static constexpr T denorm_min() { return T(0); }
};

}  // namespace metal
