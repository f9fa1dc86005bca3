// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Atomics. Lanes are switched at calls into the emulator only, so that plain operations here are
// atomic; the hook tells the checks. Metal has relaxed order alone.
#pragma once

#include "abi.h"
#include "types.h"

namespace metal {
enum memory_order : int { memory_order_relaxed = 0, memory_order_seq_cst = 5 };
enum thread_scope : int {
  thread_scope_thread = 0,
  thread_scope_simdgroup = 4,
  thread_scope_threadgroup = 1,
  thread_scope_device = 2
};

template <class T>
struct _atomic {
  static_assert(
      is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, bool> || is_same_v<T, float> ||
          is_same_v<T, ulong> || is_same_v<T, long>,
      "Metal has atomics of int, uint, bool, float and ulong");
  T __s;
};
template <class T>
using atomic = _atomic<T>;
typedef _atomic<int> atomic_int;
typedef _atomic<uint> atomic_uint;
typedef _atomic<bool> atomic_bool;
typedef _atomic<float> atomic_float;
typedef _atomic<ulong> atomic_ulong;

namespace _emulator {
template <class T, bool Writes>
METAL_EMULATOR_RAW inline T* atomic_cell(const volatile _atomic<T>* object, const void* site) {
  metal_emulator::abi::hooks->atomic(object, sizeof(T), Writes, site);
  return const_cast<T*>(&object->__s);
}
template <class T>
struct exactly {
  using type = T;
};
template <class T>
using exactly_t = typename exactly<T>::type;
}  // namespace _emulator

#define ME_ATOMIC METAL_EMULATOR_RAW inline
template <class T>
ME_ATOMIC T atomic_load_explicit(const volatile _atomic<T>* object, memory_order) {
  return *_emulator::atomic_cell<T, false>(object, __builtin_return_address(0));
}
template <class T>
ME_ATOMIC void atomic_store_explicit(
    volatile _atomic<T>* object, _emulator::exactly_t<T> desired, memory_order) {
  metal_emulator::abi::hooks->atomic_store(object, sizeof(T), __builtin_return_address(0));
  const_cast<_atomic<T>*>(object)->__s = desired;
}
template <class T>
ME_ATOMIC T atomic_exchange_explicit(
    volatile _atomic<T>* object, _emulator::exactly_t<T> desired, memory_order) {
  T* cell = _emulator::atomic_cell<T, true>(object, __builtin_return_address(0));
  const T old = *cell;
  *cell = desired;
  return old;
}
/// Compares bits, as the hardware does. Never fails spuriously here.
template <class T>
ME_ATOMIC bool atomic_compare_exchange_weak_explicit(
    volatile _atomic<T>* object,
    _emulator::exactly_t<T>* expected,
    _emulator::exactly_t<T> desired,
    memory_order,
    memory_order) {
  T* cell = _emulator::atomic_cell<T, true>(object, __builtin_return_address(0));
  if (__builtin_memcmp(cell, expected, sizeof(T)) == 0) {
    *cell = desired;
    return true;
  }
  *expected = *cell;
  return false;
}
#define ME_FETCH(name, condition, expression)                                       \
  template <class T>                                                                \
  ME_ATOMIC enable_if_t<condition, T> atomic_fetch_##name##_explicit(               \
      volatile _atomic<T>* object, _emulator::exactly_t<T> operand, memory_order) { \
    T* cell = _emulator::atomic_cell<T, true>(object, __builtin_return_address(0)); \
    const T old = *cell;                                                            \
    *cell = static_cast<T>(expression);                                             \
    return old;                                                                     \
  }
ME_FETCH(add, (!is_same_v<T, bool>), old + operand)
ME_FETCH(sub, (!is_same_v<T, bool>), old - operand)
ME_FETCH(and, (is_integral_v<T>), old& operand)
ME_FETCH(or, (is_integral_v<T>), old | operand)
ME_FETCH(xor, (is_integral_v<T>), old ^ operand)
ME_FETCH(min, (is_integral_v<T> && !is_same_v<T, bool>), operand < old ? operand : old)
ME_FETCH(max, (is_integral_v<T> && !is_same_v<T, bool>), old < operand ? operand : old)
#undef ME_FETCH
/// Without a result: of 64-bit integers Metal has these alone.
template <class T>
ME_ATOMIC void atomic_min_explicit(
    volatile _atomic<T>* object, _emulator::exactly_t<T> operand, memory_order) {
  T* cell = _emulator::atomic_cell<T, true>(object, __builtin_return_address(0));
  if (operand < *cell) *cell = operand;
}
template <class T>
ME_ATOMIC void atomic_max_explicit(
    volatile _atomic<T>* object, _emulator::exactly_t<T> operand, memory_order) {
  T* cell = _emulator::atomic_cell<T, true>(object, __builtin_return_address(0));
  if (*cell < operand) *cell = operand;
}
#undef ME_ATOMIC
}  // namespace metal
