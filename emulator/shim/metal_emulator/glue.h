// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What generated code calls around a kernel: arguments from a dispatch, threadgroup variables.
#pragma once

#include "abi.h"
#include "vector.h"

namespace metal_emulator {
namespace glue {

// All of this is inlined into the thunk, which is not instrumented.
METAL_EMULATOR_INLINE uint32_t threads(const abi::Uint3& t) {
  return t.x * t.y * t.z;
}
METAL_EMULATOR_INLINE abi::Uint3 built_in(abi::ArgKind kind, const abi::Context& c) {
  using K = abi::ArgKind;
  const abi::Lane& lane = *c.lane;
  const abi::Grid& grid = *c.grid;
  const abi::Uint3 &group = grid.threadgroup, &size = grid.threads_per_threadgroup,
                   &nominal = grid.nominal_threadgroup;
  switch (kind) {
    case K::thread_position_in_grid:
      return {
          group.x * nominal.x + lane.position.x,
          group.y * nominal.y + lane.position.y,
          group.z * nominal.z + lane.position.z};
    case K::thread_position_in_threadgroup:
      return lane.position;
    case K::threadgroup_position_in_grid:
      return group;
    case K::thread_index_in_threadgroup:
      return {lane.thread, 0, 0};
    case K::thread_index_in_simdgroup:
      return {lane.lane, 0, 0};
    case K::thread_index_in_quadgroup:
      return {lane.lane & 3, 0, 0};
    case K::simdgroup_index_in_threadgroup:
      return {lane.simdgroup, 0, 0};
    case K::quadgroup_index_in_threadgroup:
      return {lane.thread / 4, 0, 0};
    case K::threads_per_threadgroup:
      return size;
    case K::threadgroups_per_grid:
      return grid.threadgroups;
    case K::threads_per_grid:
    case K::grid_size:
      return grid.threads;
    case K::threads_per_simdgroup:
    case K::thread_execution_width:
      return {abi::kSimdWidth, 1, 1};
    case K::simdgroups_per_threadgroup:
      return {(threads(size) + 31) / 32, 1, 1};
    case K::quadgroups_per_threadgroup:
      return {(threads(size) + 3) / 4, 1, 1};
    case K::dispatch_threads_per_threadgroup:
      return nominal;
    case K::dispatch_simdgroups_per_threadgroup:
      return {(threads(nominal) + 31) / 32, 1, 1};
    case K::dispatch_quadgroups_per_threadgroup:
      return {(threads(nominal) + 3) / 4, 1, 1};
    case K::grid_origin:
    case K::buffer:
    case K::threadgroup_memory:
      break;
  }
  return {0, 0, 0};
}

METAL_EMULATOR_INLINE void* address(const abi::Arg& arg, const abi::Context& c) {
  if (arg.enable && !*arg.enable) return c.dummy;
  return arg.kind == abi::ArgKind::threadgroup_memory ? c.threadgroup_memory[arg.index]
                                                      : c.buffers[arg.index];
}

template <class P>
struct Get {
  METAL_EMULATOR_INLINE static P get(const abi::Arg& arg, const abi::Context& c) {
    return static_cast<P>(built_in(arg.kind, c).x);
  }
};
template <class T>
struct Get<T*> {
  METAL_EMULATOR_INLINE static T* get(const abi::Arg& arg, const abi::Context& c) {
    return static_cast<T*>(address(arg, c));
  }
};
template <class T>
struct Get<T&> {
  METAL_EMULATOR_INLINE static T& get(const abi::Arg& arg, const abi::Context& c) {
    return *static_cast<T*>(address(arg, c));
  }
};
template <class T>
struct Get<metal::vec<T, 2>> {
  METAL_EMULATOR_INLINE static metal::vec<T, 2> get(const abi::Arg& arg, const abi::Context& c) {
    const abi::Uint3 u = built_in(arg.kind, c);
    return metal::vec<T, 2>(static_cast<T>(u.x), static_cast<T>(u.y));
  }
};
template <class T>
struct Get<metal::vec<T, 3>> {
  METAL_EMULATOR_INLINE static metal::vec<T, 3> get(const abi::Arg& arg, const abi::Context& c) {
    const abi::Uint3 u = built_in(arg.kind, c);
    return metal::vec<T, 3>(static_cast<T>(u.x), static_cast<T>(u.y), static_cast<T>(u.z));
  }
};

template <class... P, size_t... I>
METAL_EMULATOR_INLINE void call(
    void (*kernel)(P...), const abi::Arg* args, const abi::Context& c, std::index_sequence<I...>) {
  kernel(Get<metal::remove_cv_t<P>>::get(args[I], c)...);
}
/// Runs `kernel` for the thread of `c`; args[i] describes its i-th parameter.
template <class... P>
METAL_EMULATOR_INLINE void call(void (*kernel)(P...), const abi::Arg* args, const abi::Context& c) {
  call(kernel, args, c, std::make_index_sequence<sizeof...(P)>());
}

METAL_EMULATOR_RAW inline void* place_threadgroup_variable(
    abi::ThreadgroupSlot& slot, size_t bytes, size_t alignment) {
  return abi::hooks->threadgroup_variable(slot, bytes, alignment, __builtin_return_address(0));
}
/// The threadgroup variable of this declaration; the same object for all threads of a threadgroup.
template <class T>
METAL_EMULATOR_INLINE T& tgvar(abi::ThreadgroupSlot& slot) {
  return *static_cast<T*>(place_threadgroup_variable(slot, sizeof(T), alignof(T)));
}
METAL_EMULATOR_RAW inline void store_initial(void* variable, const void* value, size_t bytes) {
  abi::hooks->threadgroup_initialize(variable, value, bytes);
}
/// The initializer of a threadgroup variable: stored once per threadgroup, by the first thread.
template <class T>
METAL_EMULATOR_INLINE void tginit(abi::ThreadgroupSlot&, T& variable, const T& value) {
  store_initial(&variable, &value, sizeof(T));
}

METAL_EMULATOR_RAW inline void begin_iteration(uintptr_t number) {
  // Two frames: where the loop is, so that loops meet in the order of the code, and the iteration.
  if (number == 1)
    abi::hooks->function_entry(__builtin_return_address(0));
  else
    abi::hooks->function_exit();
  abi::hooks->function_entry((void*)number);
}
METAL_EMULATOR_RAW inline void leave_loop() {
  abi::hooks->function_exit();
  abi::hooks->function_exit();
}
/// A loop that lanes go through in step: an iteration is part of the path to a meeting, as a call
/// is.
class Loop {
 public:
  METAL_EMULATOR_INLINE Loop() {}
  METAL_EMULATOR_INLINE void next() { begin_iteration(++iteration_); }
  METAL_EMULATOR_INLINE ~Loop() {
    if (iteration_) leave_loop();
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

 private:
  uintptr_t iteration_ = 0;
};

}  // namespace glue
}  // namespace metal_emulator
