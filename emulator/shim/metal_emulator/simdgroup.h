// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Barriers, SIMD-group and quad-group functions. Each is a meeting of the lanes that call it at one
// place of the kernel: the active lanes. A lane that reads an inactive one gets all-one bits (NaN,
// -1), since Metal leaves that value undefined.
#pragma once

#include "atomic.h"
#include "integer.h"
#include "math.h"
#include "relational.h"
#include "vector.h"

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
METAL_EMULATOR_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}
METAL_EMULATOR_INLINE constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) & static_cast<uint>(b));
}

/// A meeting place: not to be merged with, or split from, its twins by the optimizer.
#define METAL_EMULATOR_MEETING __attribute__((convergent, nomerge)) METAL_EMULATOR_RAW

METAL_EMULATOR_MEETING inline void threadgroup_barrier(mem_flags flags) {
  metal_emulator::abi::hooks->threadgroup_barrier(
      static_cast<uint>(flags), __builtin_return_address(0));
}
/// Orders nothing by itself: the checks treat data that a fence and an atomic hand over as a race.
METAL_EMULATOR_INLINE void atomic_thread_fence(
    mem_flags, memory_order = memory_order_relaxed, thread_scope = thread_scope_device) {}
METAL_EMULATOR_MEETING inline void simdgroup_barrier(mem_flags flags) {
  metal_emulator::abi::hooks->simdgroup_barrier(
      static_cast<uint>(flags), __builtin_return_address(0));
}

namespace _emulator {
METAL_EMULATOR_RAW inline uint lane() {
  return (*metal_emulator::abi::hooks->current)->lane;
}

template <class Finish, class Out, class In>
METAL_EMULATOR_MEETING Out meet(In in) {
  static constexpr metal_emulator::abi::Collective kCollective{
      metal_emulator::abi::CollectiveKind::simd, &Finish::finish};
  Out out;
  metal_emulator::abi::hooks->collective(kCollective, &in, &out, __builtin_return_address(0));
  return out;
}
template <class T>
METAL_EMULATOR_INLINE const T& in(const metal_emulator::abi::Exchange& e, uint i) {
  return *static_cast<const T*>(e.in[i]);
}
template <class T>
METAL_EMULATOR_INLINE T& out(const metal_emulator::abi::Exchange& e, uint i) {
  return *static_cast<T*>(e.out[i]);
}
METAL_EMULATOR_INLINE bool active(const metal_emulator::abi::Exchange& e, uint i) {
  return e.mask >> i & 1;
}

// Metal has no bfloat overloads of these functions.
template <class T>
using enable_simd_t =
    enable_if_t<(width_v<T> >= 1) && !is_same_v<element_t<T>, bfloat>, value_t<T>>;
template <class T>
using enable_simd_integer_t =
    enable_if_t<(width_v<T> >= 1) && is_integral_v<element_t<T>>, value_t<T>>;

struct Sum {
  template <class T>
  METAL_EMULATOR_INLINE static T combine(const T& a, const T& b) {
    return static_cast<T>(a + b);
  }
  template <class T>
  METAL_EMULATOR_INLINE static T neutral() {
    return T(element_t<T>(0));
  }
};
struct Product {
  template <class T>
  METAL_EMULATOR_INLINE static T combine(const T& a, const T& b) {
    return static_cast<T>(a * b);
  }
  template <class T>
  METAL_EMULATOR_INLINE static T neutral() {
    return T(element_t<T>(1));
  }
};
struct Max {
  template <class T>
  METAL_EMULATOR_INLINE static T combine(const T& a, const T& b) {
    return max(a, b);
  }
};
struct Min {
  template <class T>
  METAL_EMULATOR_INLINE static T combine(const T& a, const T& b) {
    return min(a, b);
  }
};
struct And {
  template <class T>
  METAL_EMULATOR_INLINE static T combine(const T& a, const T& b) {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  METAL_EMULATOR_INLINE static T combine(const T& a, const T& b) {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  METAL_EMULATOR_INLINE static T combine(const T& a, const T& b) {
    return static_cast<T>(a ^ b);
  }
};

/// A tree over the group's lanes (i with i + width/2, then width/4 …): one fixed order.
template <class T, class Op, uint Width>
struct Reduce {
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    for (uint base = 0; base < 32; base += Width) {
      T a[Width];
      bool has[Width];
      for (uint i = 0; i < Width; i++) {
        has[i] = active(e, base + i);
        if (has[i]) a[i] = in<T>(e, base + i);
      }
      for (uint s = Width / 2; s; s /= 2)
        for (uint i = 0; i < s; i++) {
          if (has[i] && has[i + s])
            a[i] = Op::template combine<T>(a[i], a[i + s]);
          else if (has[i + s])
            a[i] = a[i + s], has[i] = true;
        }
      for (uint i = 0; i < Width; i++)
        if (active(e, base + i)) out<T>(e, base + i) = a[0];
    }
  }
};
template <class T, class Op, bool Exclusive, uint Width>
struct Scan {
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    for (uint base = 0; base < 32; base += Width) {
      T sum = Op::template neutral<T>();
      for (uint i = base; i < base + Width; i++) {
        if (!active(e, i)) continue;
        const T next = Op::template combine<T>(sum, in<T>(e, i));
        out<T>(e, i) = Exclusive ? sum : next;
        sum = next;
      }
    }
  }
};
/// source: the lane to read, or kOwn. filled: read that lane's `fill` instead of its `value`.
constexpr int kOwn = -1;
template <class T>
struct ShuffleIn {
  T value, fill;
  int source;
  bool filled;
};
template <class T>
struct Shuffle {
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    for (uint i = 0; i < 32; i++) {
      if (!active(e, i)) continue;
      const ShuffleIn<T>& mine = in<ShuffleIn<T>>(e, i);
      const uint from = mine.source == kOwn ? i : static_cast<uint>(mine.source);
      if (from > 31 || !active(e, from)) {
        __builtin_memset(e.out[i], 0xff, sizeof(T));
        continue;
      }
      const ShuffleIn<T>& other = in<ShuffleIn<T>>(e, from);
      out<T>(e, i) = mine.filled ? other.fill : other.value;
    }
  }
};
struct Ballot {
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    uint votes = 0;
    for (uint i = 0; i < 32; i++)
      if (active(e, i) && in<bool>(e, i)) votes |= 1u << i;
    for (uint i = 0; i < 32; i++)
      if (active(e, i)) out<ulong>(e, i) = static_cast<ulong>(e.mask) << 32 | votes;
  }
};
}  // namespace _emulator

// Apple's own spelling, which third-party kernels use.
template <class T>
struct __is_valid_simdgroup_type
    : bool_constant<
          (_emulator::width_v<T> >= 1) && !is_same_v<_emulator::element_t<T>, bfloat> &&
          sizeof(_emulator::element_t<T>) <= 4> {};

#define ME_GROUP_REDUCE(group, width, name, Op, Enable)                          \
  template <class T>                                                             \
  METAL_EMULATOR_INLINE _emulator::Enable<T> group##_##name(T v) {               \
    using V = _emulator::value_t<T>;                                             \
    return _emulator::meet<_emulator::Reduce<V, _emulator::Op, width>, V, V>(v); \
  }
#define ME_GROUP_SCAN(group, width, name, Op, Exclusive)                                  \
  template <class T>                                                                      \
  METAL_EMULATOR_INLINE _emulator::enable_simd_t<T> group##_##name(T v) {                 \
    using V = _emulator::value_t<T>;                                                      \
    return _emulator::meet<_emulator::Scan<V, _emulator::Op, Exclusive, width>, V, V>(v); \
  }
#define ME_GROUP(group, width)                                                                 \
  ME_GROUP_REDUCE(group, width, sum, Sum, enable_simd_t)                                       \
  ME_GROUP_REDUCE(group, width, product, Product, enable_simd_t)                               \
  ME_GROUP_REDUCE(group, width, max, Max, enable_simd_t)                                       \
  ME_GROUP_REDUCE(group, width, min, Min, enable_simd_t)                                       \
  ME_GROUP_REDUCE(group, width, and, And, enable_simd_integer_t)                               \
  ME_GROUP_REDUCE(group, width, or, Or, enable_simd_integer_t)                                 \
  ME_GROUP_REDUCE(group, width, xor, Xor, enable_simd_integer_t)                               \
  ME_GROUP_SCAN(group, width, prefix_inclusive_sum, Sum, false)                                \
  ME_GROUP_SCAN(group, width, prefix_exclusive_sum, Sum, true)                                 \
  ME_GROUP_SCAN(group, width, prefix_inclusive_product, Product, false)                        \
  ME_GROUP_SCAN(group, width, prefix_exclusive_product, Product, true)                         \
  ME_GROUP_SHUFFLE(group, width, shuffle, base + (n & (width - 1)))                            \
  ME_GROUP_SHUFFLE(group, width, broadcast, base + (n & (width - 1)))                          \
  ME_GROUP_SHUFFLE(group, width, shuffle_up, own >= n ? base + own - n : -1)                   \
  ME_GROUP_SHUFFLE(group, width, shuffle_down, own + n < width ? base + own + n : -1)          \
  ME_GROUP_SHUFFLE(group, width, shuffle_xor, base + ((own ^ n) & (width - 1)))                \
  ME_GROUP_SHUFFLE(group, width, shuffle_rotate_up, base + ((own - n) & (width - 1)))          \
  ME_GROUP_SHUFFLE(group, width, shuffle_rotate_down, base + ((own + n) & (width - 1)))        \
  template <class T>                                                                           \
  METAL_EMULATOR_INLINE _emulator::enable_simd_t<T> group##_shuffle_and_fill_up(               \
      T v, T fill, ushort delta, ushort modulo = width) {                                      \
    using V = _emulator::value_t<T>;                                                           \
    const int lane = _emulator::lane(), own = lane % modulo, base = lane - own;                \
    const int from = own - delta;                                                              \
    return _emulator::meet<_emulator::Shuffle<V>, V>(                                          \
        _emulator::ShuffleIn<V>{v, fill, base + (from < 0 ? from + modulo : from), from < 0}); \
  }                                                                                            \
  template <class T>                                                                           \
  METAL_EMULATOR_INLINE _emulator::enable_simd_t<T> group##_shuffle_and_fill_down(             \
      T v, T fill, ushort delta, ushort modulo = width) {                                      \
    using V = _emulator::value_t<T>;                                                           \
    const int lane = _emulator::lane(), own = lane % modulo, base = lane - own;                \
    const int from = own + delta;                                                              \
    return _emulator::meet<_emulator::Shuffle<V>, V>(_emulator::ShuffleIn<V>{                  \
        v, fill, base + (from >= modulo ? from - modulo : from), from >= modulo});             \
  }                                                                                            \
  template <class T>                                                                           \
  METAL_EMULATOR_INLINE _emulator::enable_simd_t<T> group##_broadcast_first(T v) {             \
    using V = _emulator::value_t<T>;                                                           \
    return _emulator::meet<_emulator::BroadcastFirst<V, width>, V, V>(v);                      \
  }                                                                                            \
  struct group##_vote {                                                                        \
    using vote_t = conditional_t<width == 32, uint64_t, ushort>;                               \
    constexpr explicit group##_vote(vote_t v = 0, vote_t active_lanes = kAll)                  \
        : votes(v), active(active_lanes) {}                                                    \
    constexpr explicit operator vote_t() const { return votes; }                               \
    constexpr bool all() const { return votes == active; }                                     \
    constexpr bool any() const { return votes != 0; }                                          \
                                                                                               \
   private:                                                                                    \
    static constexpr vote_t kAll = vote_t(width == 32 ? ~0u : 0xfu);                           \
    vote_t votes, active;                                                                      \
  };                                                                                           \
  METAL_EMULATOR_INLINE group##_vote group##_ballot(bool vote) {                               \
    const ulong both = _emulator::meet<_emulator::Ballot, ulong>(vote);                        \
    const uint shift = width == 32 ? 0 : _emulator::lane() & ~3u;                              \
    const uint all = width == 32 ? 0xffffffffu : 0xfu;                                         \
    return group##_vote(                                                                       \
        static_cast<group##_vote::vote_t>(static_cast<uint>(both) >> shift & all),             \
        static_cast<group##_vote::vote_t>(static_cast<uint>(both >> 32) >> shift & all));      \
  }                                                                                            \
  METAL_EMULATOR_INLINE bool group##_all(bool vote) {                                          \
    return group##_ballot(vote).all();                                                         \
  }                                                                                            \
  METAL_EMULATOR_INLINE bool group##_any(bool vote) {                                          \
    return group##_ballot(vote).any();                                                         \
  }                                                                                            \
  METAL_EMULATOR_INLINE group##_vote group##_active_threads_mask() {                           \
    return group##_ballot(true);                                                               \
  }                                                                                            \
  METAL_EMULATOR_INLINE bool group##_is_first() {                                              \
    const auto active =                                                                        \
        static_cast<uint>(static_cast<group##_vote::vote_t>(group##_ballot(true)));            \
    return static_cast<uint>(__builtin_ctz(active)) == (_emulator::lane() & (width - 1));      \
  }
// `n` is the second argument, `own` the lane within its group, `base` the group's first lane.
#define ME_GROUP_SHUFFLE(group, width, name, expression)                                 \
  template <class T>                                                                     \
  METAL_EMULATOR_INLINE _emulator::enable_simd_t<T> group##_##name(T v, ushort second) { \
    using V = _emulator::value_t<T>;                                                     \
    const int n = second, own = _emulator::lane() & (width - 1);                         \
    const int base = static_cast<int>(_emulator::lane()) - own;                          \
    return _emulator::meet<_emulator::Shuffle<V>, V>(                                    \
        _emulator::ShuffleIn<V>{v, v, (void(base), expression), false});                 \
  }

namespace _emulator {
template <class T, uint Width>
struct BroadcastFirst {
  METAL_EMULATOR_RAW static void finish(const metal_emulator::abi::Exchange& e) {
    for (uint base = 0; base < 32; base += Width) {
      uint first = base;
      while (first < base + Width && !active(e, first)) first++;
      for (uint i = first; i < base + Width; i++)
        if (active(e, i)) out<T>(e, i) = in<T>(e, first);
    }
  }
};
}  // namespace _emulator
ME_GROUP(simd, 32)
ME_GROUP(quad, 4)
#undef ME_GROUP
#undef ME_GROUP_REDUCE
#undef ME_GROUP_SCAN
#undef ME_GROUP_SHUFFLE

METAL_EMULATOR_INLINE bool simd_is_helper_thread() {
  return false;
}
METAL_EMULATOR_INLINE bool quad_is_helper_thread() {
  return false;
}
}  // namespace metal
