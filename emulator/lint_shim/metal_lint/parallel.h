// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

namespace metal_emulator {
namespace abi {
struct ThreadgroupSlot {
  uint a, b;
};
}  // namespace abi
// What the front end makes of threadgroup variables.
namespace glue {
template <class T, class S>
__local T& tgvar(S&);
template <class S, class T, class V>
void tginit(S&, T&, const V&);
}  // namespace glue
}  // namespace metal_emulator

namespace metal {

enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags) { return a; }
enum thread_scope {
  thread_scope_thread,
  thread_scope_simdgroup,
  thread_scope_threadgroup,
  thread_scope_device
};
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

enum memory_order { memory_order_relaxed, memory_order_seq_cst };
void atomic_thread_fence(mem_flags, memory_order);
void atomic_thread_fence(mem_flags, memory_order, thread_scope);

// OpenCL has types of these names built in.
#define atomic_int metal_atomic_int
#define atomic_uint metal_atomic_uint
#define atomic_bool metal_atomic_bool
#define atomic_float metal_atomic_float
#define atomic_ulong metal_atomic_ulong
template <class T>
struct atomic {
  T value_;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

#define METAL_LINT_FETCH(AS, name) \
  template <class T>               \
  T atomic_##name##_explicit(      \
      volatile AS atomic<T>*, typename metal_lint::same<T>::type, memory_order);
#define METAL_LINT_ATOMIC(AS)                                                                  \
  template <class T>                                                                           \
  T atomic_load_explicit(const volatile AS atomic<T>*, memory_order);                          \
  template <class T>                                                                           \
  void atomic_store_explicit(                                                                  \
      volatile AS atomic<T>*, typename metal_lint::same<T>::type, memory_order);               \
  template <class T>                                                                           \
  bool atomic_compare_exchange_weak_explicit(                                                  \
      volatile AS atomic<T>*, __private T*, typename metal_lint::same<T>::type, memory_order,  \
      memory_order);                                                                           \
  METAL_LINT_FETCH(AS, exchange)                                                               \
  METAL_LINT_FETCH(AS, fetch_add)                                                              \
  METAL_LINT_FETCH(AS, fetch_sub)                                                              \
  METAL_LINT_FETCH(AS, fetch_and)                                                              \
  METAL_LINT_FETCH(AS, fetch_or)                                                               \
  METAL_LINT_FETCH(AS, fetch_xor)                                                              \
  METAL_LINT_FETCH(AS, fetch_max)                                                              \
  METAL_LINT_FETCH(AS, fetch_min)                                                              \
  METAL_LINT_FETCH(AS, max)                                                                    \
  METAL_LINT_FETCH(AS, min)
METAL_LINT_ATOMIC(__global)
METAL_LINT_ATOMIC(__local)
#undef METAL_LINT_ATOMIC
#undef METAL_LINT_FETCH

struct simd_vote {
  typedef ulong vote_t;
  simd_vote(vote_t);
  operator vote_t() const __private;
  bool all() const __private;
  bool any() const __private;
};
struct quad_vote {
  typedef ushort vote_t;
  quad_vote(vote_t);
  operator vote_t() const __private;
  bool all() const __private;
  bool any() const __private;
};
// Metal shuffles and reduces integers, half and float; not bfloat.
#define METAL_LINT_REDUCE(name) \
  template <class T>            \
  typename lint_no_bfloat<T>::type name(T);
#define METAL_LINT_MOVE(name) \
  template <class T>          \
  typename lint_no_bfloat<T>::type name(T, ushort);
#define METAL_LINT_FILL(name)                                 \
  template <class T>                                          \
  typename lint_no_bfloat<T>::type name(T, T, ushort);        \
  template <class T>                                          \
  typename lint_no_bfloat<T>::type name(T, T, ushort, ushort);
#define METAL_LINT_GROUP(group)                       \
  METAL_LINT_REDUCE(group##_sum)                      \
  METAL_LINT_REDUCE(group##_product)                  \
  METAL_LINT_REDUCE(group##_max)                      \
  METAL_LINT_REDUCE(group##_min)                      \
  METAL_LINT_REDUCE(group##_and)                      \
  METAL_LINT_REDUCE(group##_or)                       \
  METAL_LINT_REDUCE(group##_xor)                      \
  METAL_LINT_REDUCE(group##_prefix_inclusive_sum)     \
  METAL_LINT_REDUCE(group##_prefix_exclusive_sum)     \
  METAL_LINT_REDUCE(group##_prefix_inclusive_product) \
  METAL_LINT_REDUCE(group##_prefix_exclusive_product) \
  METAL_LINT_REDUCE(group##_broadcast_first)          \
  METAL_LINT_MOVE(group##_broadcast)                  \
  METAL_LINT_MOVE(group##_shuffle)                    \
  METAL_LINT_MOVE(group##_shuffle_up)                 \
  METAL_LINT_MOVE(group##_shuffle_down)               \
  METAL_LINT_MOVE(group##_shuffle_xor)                \
  METAL_LINT_MOVE(group##_shuffle_rotate_up)          \
  METAL_LINT_MOVE(group##_shuffle_rotate_down)        \
  METAL_LINT_FILL(group##_shuffle_and_fill_up)        \
  METAL_LINT_FILL(group##_shuffle_and_fill_down)      \
  bool group##_all(bool);                             \
  bool group##_any(bool);                             \
  bool group##_is_first();                            \
  bool group##_is_helper_thread();                    \
  group##_vote group##_ballot(bool);                  \
  group##_vote group##_active_threads_mask();
METAL_LINT_GROUP(simd)
METAL_LINT_GROUP(quad)
#undef METAL_LINT_GROUP
#undef METAL_LINT_FILL
#undef METAL_LINT_MOVE
#undef METAL_LINT_REDUCE

}  // namespace metal
