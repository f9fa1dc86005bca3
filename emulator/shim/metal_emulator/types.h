// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Scalar types, constants, numeric limits, type traits, as_type, array.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <limits>
#include <type_traits>
#include <utility>

#define __METAL__ 1
#ifndef __METAL_VERSION__
#define __METAL_VERSION__ 310
#endif
#define __METAL_MACOS__ 1
#define __HAVE_BFLOAT__ 1
#define __HAVE_SIMDGROUP_MATRIX__ 1
#define __HAVE_ATOMIC_ULONG_MIN_MAX__ 1

#define METAL_FUNC inline __attribute__((always_inline))
#define METAL_CONST __attribute__((const))
#define METAL_PURE __attribute__((pure))
#define METAL_INTERNAL inline __attribute__((always_inline))
#define METAL_ALIGN(n) alignas(n)
/// Known without an include; Apple's compiler drops it.
#define assert(condition) ((void)0)

/// Library functions disappear into the kernel, so that its own line carries their accesses. No
/// line tables of their own: a third of the compiler's work.
#define METAL_EMULATOR_INLINE inline __attribute__((always_inline, nodebug))
/// Library code that runs on behalf of the emulator: not instrumented.
#define METAL_EMULATOR_RAW \
  __attribute__((noinline, nodebug, no_sanitize("undefined"), disable_sanitizer_instrumentation))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;
// What MLX's preamble adds.
typedef half float16_t;
typedef bfloat bfloat16_t;

#undef INFINITY
#undef NAN
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define HUGE_VALH ((half)__builtin_huge_valf())
#define MAXFLOAT 3.40282346638528860e+38f
#define MAXHALF ((half)65504.0f)
#define FLT_DIG 6
#define FLT_MANT_DIG 24
#define FLT_MAX_10_EXP 38
#define FLT_MAX_EXP 128
#define FLT_MIN_10_EXP (-37)
#define FLT_MIN_EXP (-125)
#define FLT_RADIX 2
#define FLT_MAX 3.40282346638528860e+38f
#define FLT_MIN 1.17549435082228751e-38f
#define FLT_EPSILON 1.19209289550781250e-07f
#define HALF_DIG 2
#define HALF_MANT_DIG 11
#define HALF_MAX ((half)65504.0f)
#define HALF_MIN ((half)6.103515625e-05f)
#define HALF_EPSILON ((half)0.0009765625f)
#define CHAR_BIT 8
#define SCHAR_MAX 127
#define SCHAR_MIN (-128)
#define CHAR_MAX SCHAR_MAX
#define CHAR_MIN SCHAR_MIN
#define UCHAR_MAX 255
#define SHRT_MAX 32767
#define SHRT_MIN (-32768)
#define USHRT_MAX 65535
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u
#define LONG_MAX 9223372036854775807l
#define LONG_MIN (-9223372036854775807l - 1)
#define ULONG_MAX 18446744073709551615ul
#define FP_ILOGB0 (-2147483647 - 1)
#define FP_ILOGBNAN (-2147483647 - 1)

#define M_E_F 2.71828182845904523536028747135266250f
#define M_LOG2E_F 1.44269504088896340735992468100189214f
#define M_LOG10E_F 0.434294481903251827651128918916605082f
#define M_LN2_F 0.693147180559945309417232121458176568f
#define M_LN10_F 2.30258509299404568401799145468436421f
#define M_PI_F 3.14159265358979323846264338327950288f
#define M_PI_2_F 1.57079632679489661923132169163975144f
#define M_PI_4_F 0.785398163397448309615660845819875721f
#define M_1_PI_F 0.318309886183790671537767526745028724f
#define M_2_PI_F 0.636619772367581343075535053490057448f
#define M_2_SQRTPI_F 1.12837916709551257389615890312154517f
#define M_SQRT2_F 1.41421356237309504880168872420969808f
#define M_SQRT1_2_F 0.707106781186547524400844362104849039f
#define M_E_H ((half)M_E_F)
#define M_LOG2E_H ((half)M_LOG2E_F)
#define M_LOG10E_H ((half)M_LOG10E_F)
#define M_LN2_H ((half)M_LN2_F)
#define M_LN10_H ((half)M_LN10_F)
#define M_PI_H ((half)M_PI_F)
#define M_PI_2_H ((half)M_PI_2_F)
#define M_PI_4_H ((half)M_PI_4_F)
#define M_1_PI_H ((half)M_1_PI_F)
#define M_2_PI_H ((half)M_2_PI_F)
#define M_2_SQRTPI_H ((half)M_2_SQRTPI_F)
#define M_SQRT2_H ((half)M_SQRT2_F)
#define M_SQRT1_2_H ((half)M_SQRT1_2_F)

namespace metal {
using ::bfloat;
using ::half;
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

using std::add_const;
using std::add_const_t;
using std::bool_constant;
using std::common_type;
using std::common_type_t;
using std::conditional;
using std::conditional_t;
using std::decay;
using std::decay_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_array;
using std::is_array_v;
using std::is_base_of;
using std::is_base_of_v;
using std::is_class;
using std::is_class_v;
using std::is_const;
using std::is_const_v;
using std::is_constructible;
using std::is_constructible_v;
using std::is_convertible;
using std::is_convertible_v;
using std::is_enum;
using std::is_enum_v;
using std::is_integral;
using std::is_integral_v;
using std::is_pointer;
using std::is_pointer_v;
using std::is_reference;
using std::is_reference_v;
using std::is_same;
using std::is_same_v;
using std::is_trivially_copyable;
using std::is_unsigned;
using std::is_unsigned_v;
using std::is_void;
using std::is_void_v;
using std::make_signed;
using std::make_signed_t;
using std::make_unsigned;
using std::make_unsigned_t;
using std::remove_const;
using std::remove_const_t;
using std::remove_cv;
using std::remove_cv_t;
using std::remove_pointer;
using std::remove_pointer_t;
using std::remove_reference;
using std::remove_reference_t;
using std::true_type;
using std::underlying_type;
using std::underlying_type_t;

// Apple's own spelling, which third-party kernels use.
template <class... T>
struct _disjunction : bool_constant<(T::value || ... || false)> {};

template <class T>
struct is_floating_point
    : bool_constant<
          is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> ||
          is_same_v<remove_cv_t<T>, bfloat>> {};
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<is_floating_point<T>::value || is_integral<T>::value> {};
template <class T>
constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
struct is_scalar : bool_constant<is_arithmetic_v<T> || is_pointer_v<T> || is_enum_v<T>> {};
template <class T>
constexpr bool is_scalar_v = is_scalar<T>::value;
template <class T>
struct is_signed : bool_constant<is_floating_point_v<T> || std::is_signed<T>::value> {};
template <class T>
constexpr bool is_signed_v = is_signed<T>::value;
// Address spaces are erased before this header is seen.
template <class T>
using remove_addrspace_t = T;

// Kernels specialise Apple's own base for their types.
template <class T>
struct _numeric_limits_impl : std::numeric_limits<T> {};
template <class T>
struct numeric_limits : _numeric_limits_impl<T> {};
template <class T>
struct numeric_limits<const T> : numeric_limits<T> {};
template <>
struct _numeric_limits_impl<half> {
  static constexpr bool is_specialized = true, is_signed = true, is_integer = false;
  static constexpr bool has_infinity = true, has_quiet_NaN = true;
  static constexpr int digits = 11, digits10 = 3, max_digits10 = 5, radix = 2;
  static constexpr int min_exponent = -13, max_exponent = 16;
  static constexpr half max() { return (half)65504.0f; }
  static constexpr half lowest() { return (half)-65504.0f; }
  static constexpr half min() { return (half)6.103515625e-05f; }
  static constexpr half denorm_min() { return (half)5.9604644775390625e-08f; }
  static constexpr half infinity() { return (half)__builtin_inff(); }
  static constexpr half quiet_NaN() { return (half)__builtin_nanf(""); }
  static constexpr half signaling_NaN() { return (half)__builtin_nanf(""); }
  static constexpr half epsilon() { return (half)0.0009765625f; }
  static constexpr half round_error() { return (half)0.5f; }
};
template <>
struct _numeric_limits_impl<bfloat> {
  static constexpr bool is_specialized = true, is_signed = true, is_integer = false;
  static constexpr bool has_infinity = true, has_quiet_NaN = true;
  static constexpr int digits = 8, digits10 = 2, max_digits10 = 4, radix = 2;
  static constexpr int min_exponent = -125, max_exponent = 128;
  static constexpr bfloat max() { return (bfloat)3.38953138925153547590470800371487867e38f; }
  static constexpr bfloat lowest() { return (bfloat)-3.38953138925153547590470800371487867e38f; }
  static constexpr bfloat min() { return (bfloat)1.17549435082228751e-38f; }
  static constexpr bfloat denorm_min() {
    return (bfloat)9.18354961579912115600575419704879436e-41f;
  }
  static constexpr bfloat infinity() { return (bfloat)__builtin_inff(); }
  static constexpr bfloat quiet_NaN() { return (bfloat)__builtin_nanf(""); }
  static constexpr bfloat signaling_NaN() { return (bfloat)__builtin_nanf(""); }
  static constexpr bfloat epsilon() { return (bfloat)0.0078125f; }
  static constexpr bfloat round_error() { return (bfloat)0.5f; }
};

template <class T, size_t N>
struct array {
  T __elems_[N];
  METAL_EMULATOR_INLINE constexpr T& operator[](size_t i) { return __elems_[i]; }
  METAL_EMULATOR_INLINE constexpr const T& operator[](size_t i) const { return __elems_[i]; }
  METAL_EMULATOR_INLINE constexpr size_t size() const { return N; }
  METAL_EMULATOR_INLINE constexpr bool empty() const { return N == 0; }
  METAL_EMULATOR_INLINE constexpr T* begin() { return __elems_; }
  METAL_EMULATOR_INLINE constexpr T* end() { return __elems_ + N; }
  METAL_EMULATOR_INLINE constexpr const T* begin() const { return __elems_; }
  METAL_EMULATOR_INLINE constexpr const T* end() const { return __elems_ + N; }
  METAL_EMULATOR_INLINE constexpr T* data() { return __elems_; }
  METAL_EMULATOR_INLINE constexpr const T* data() const { return __elems_; }
};

/// A value that is equal in all threads (a hint to Apple's compiler).
template <class T>
struct uniform {
  T value;
  constexpr uniform(T x = T()) : value(x) {}
  template <class U>
  constexpr uniform(uniform<U> o) : value((T)o.value) {}
  constexpr operator T() const { return value; }
};
template <class T>
METAL_EMULATOR_INLINE constexpr uniform<T> make_uniform(T x) {
  return uniform<T>(x);
}

/// The same bits as another type of the same size.
template <class D, class S>
METAL_EMULATOR_INLINE D as_type(const S& source) {
  static_assert(sizeof(D) == sizeof(S), "as_type: sizes differ");
  D result;
  __builtin_memcpy((void*)&result, (const void*)&source, sizeof(D));
  return result;
}
}  // namespace metal

// as_type is a keyword in Metal: it needs no `using namespace metal`.
using metal::as_type;
