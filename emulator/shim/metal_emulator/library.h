// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Included once, at the end of each generated library: its hook table, and the entry points that
// clang's thread and undefined-behaviour instrumentation calls, forwarded into that table. The
// memory entry points are tail calls: the runtime sees the kernel's return address.
#pragma once

#include "stdlib.h"

namespace metal_emulator {
namespace abi {
namespace detail {
// Before and after dispatches: initializers of program-scope values run unchecked.
METAL_EMULATOR_RAW static void idle_read(const void*) {}
METAL_EMULATOR_RAW static void idle_write(void*) {}
METAL_EMULATOR_RAW static void idle_read_range(const void*, size_t, const void*) {}
METAL_EMULATOR_RAW static void idle_write_range(void*, size_t, const void*) {}
METAL_EMULATOR_RAW static void idle_entry(void*) {}
METAL_EMULATOR_RAW static void idle_exit() {}
METAL_EMULATOR_RAW static void idle_misaligned(const void*, size_t, const void*) {}
METAL_EMULATOR_RAW static void idle_undefined(const char*, int64_t, const void*) {}
constexpr Hooks idle_hooks() {
  Hooks h{};
  h.read1 = h.read2 = h.read4 = h.read8 = h.read16 = idle_read;
  h.write1 = h.write2 = h.write4 = h.write8 = h.write16 = idle_write;
  h.read_range = idle_read_range;
  h.write_range = idle_write_range;
  h.function_entry = idle_entry;
  h.function_exit = idle_exit;
  h.misaligned = idle_misaligned;
  h.undefined = idle_undefined;
  return h;
}
static constexpr Hooks kIdleHooks = idle_hooks();
}  // namespace detail
const Hooks* hooks __attribute__((visibility("hidden"))) = &detail::kIdleHooks;
/// Null: nothing runs.
[[maybe_unused]] METAL_EMULATOR_RAW static void set_hooks(const Hooks* table) {
  hooks = table ? table : &detail::kIdleHooks;
}
static constexpr const char kThisFile[] = __FILE__;
namespace detail {
/// The folder of Metal's headers: this file's path without "/metal_emulator/library.h".
struct ShimDirectory {
  char text[sizeof(kThisFile)];
  constexpr ShimDirectory() : text{} {
    constexpr size_t kTail = sizeof("/metal_emulator/library.h");
    for (size_t i = 0; i + kTail < sizeof(kThisFile); i++) text[i] = kThisFile[i];
  }
};
static constexpr ShimDirectory kDirectory;
}  // namespace detail
static constexpr const char* kShimDirectory = detail::kDirectory.text;
}  // namespace abi
}  // namespace metal_emulator

#define ME_HOOK extern "C" __attribute__((visibility("hidden"), used)) METAL_EMULATOR_RAW
#define ME_ACCESS(n)                                                    \
  ME_HOOK void __tsan_read##n(const void* p) {                          \
    [[clang::musttail]] return metal_emulator::abi::hooks->read##n(p);  \
  }                                                                     \
  ME_HOOK void __tsan_write##n(void* p) {                               \
    [[clang::musttail]] return metal_emulator::abi::hooks->write##n(p); \
  }
#define ME_UNALIGNED(n)                                                 \
  ME_HOOK void __tsan_unaligned_read##n(const void* p) {                \
    [[clang::musttail]] return metal_emulator::abi::hooks->read##n(p);  \
  }                                                                     \
  ME_HOOK void __tsan_unaligned_write##n(void* p) {                     \
    [[clang::musttail]] return metal_emulator::abi::hooks->write##n(p); \
  }
ME_ACCESS(1)
ME_ACCESS(2)
ME_ACCESS(4)
ME_ACCESS(8)
ME_ACCESS(16)
ME_UNALIGNED(2)
ME_UNALIGNED(4)
ME_UNALIGNED(8)
ME_UNALIGNED(16)
#undef ME_ACCESS
#undef ME_UNALIGNED

ME_HOOK void __tsan_init() {}
ME_HOOK void __tsan_func_entry(void* caller) {
  [[clang::musttail]] return metal_emulator::abi::hooks->function_entry(caller);
}
ME_HOOK void __tsan_func_exit() {
  [[clang::musttail]] return metal_emulator::abi::hooks->function_exit();
}
ME_HOOK void __tsan_read_range(const void* p, size_t bytes) {
  metal_emulator::abi::hooks->read_range(p, bytes, __builtin_return_address(0));
}
ME_HOOK void __tsan_write_range(void* p, size_t bytes) {
  metal_emulator::abi::hooks->write_range(p, bytes, __builtin_return_address(0));
}
ME_HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  metal_emulator::abi::hooks->read_range(from, bytes, __builtin_return_address(0));
  metal_emulator::abi::hooks->write_range(to, bytes, __builtin_return_address(0));
  return __builtin_memcpy(to, from, bytes);
}
ME_HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  metal_emulator::abi::hooks->read_range(from, bytes, __builtin_return_address(0));
  metal_emulator::abi::hooks->write_range(to, bytes, __builtin_return_address(0));
  return __builtin_memmove(to, from, bytes);
}
ME_HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  metal_emulator::abi::hooks->write_range(to, bytes, __builtin_return_address(0));
  return __builtin_memset(to, value, bytes);
}

namespace metal_emulator {
namespace abi {
// Clang's records: file, line and column (the runtime symbolises the return address instead).
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};
struct UbsanType {
  uint16_t kind, info;  // kind 0: integer; info: 2·log2(bits) + signed
};
struct UbsanAlignment {
  UbsanLocation location;
  const UbsanType* type;
  uint8_t log2_alignment, check;
};
struct UbsanBounds {
  UbsanLocation location;
  const UbsanType *array, *index;
};
struct UbsanShift {
  UbsanLocation location;
  const UbsanType *left, *right;
};
METAL_EMULATOR_RAW inline int64_t ubsan_value(const UbsanType& type, uintptr_t value) {
  const uint32_t bits = 1u << (type.info >> 1);
  if (!(type.info & 1) || bits >= 64) return static_cast<int64_t>(value);
  return static_cast<int64_t>(value << (64 - bits)) >> (64 - bits);
}
}  // namespace abi
}  // namespace metal_emulator

ME_HOOK void __ubsan_handle_type_mismatch_v1(
    const metal_emulator::abi::UbsanAlignment* data, uintptr_t address) {
  metal_emulator::abi::hooks->misaligned(
      (const void*)address, size_t(1) << data->log2_alignment, __builtin_return_address(0));
}
ME_HOOK void __ubsan_handle_out_of_bounds(
    const metal_emulator::abi::UbsanBounds* data, uintptr_t index) {
  metal_emulator::abi::hooks->undefined(
      "index outside a fixed array",
      metal_emulator::abi::ubsan_value(*data->index, index),
      __builtin_return_address(0));
}
ME_HOOK void __ubsan_handle_shift_out_of_bounds(
    const metal_emulator::abi::UbsanShift* data, uintptr_t, uintptr_t right) {
  metal_emulator::abi::hooks->undefined(
      "shift by a count outside the type",
      metal_emulator::abi::ubsan_value(*data->right, right),
      __builtin_return_address(0));
}
ME_HOOK void __ubsan_handle_divrem_overflow(const void*, uintptr_t, uintptr_t right) {
  metal_emulator::abi::hooks->undefined(
      "integer division by zero or overflow",
      static_cast<int64_t>(right),
      __builtin_return_address(0));
}

// What clang calls to round to bfloat where the machine has no instruction: nearest, ties to even.
ME_HOOK bfloat __truncsfbf2(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  uint16_t high;
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    high = static_cast<uint16_t>((bits >> 16) | 0x40);
  else
    high = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  return __builtin_bit_cast(bfloat, high);
}
#undef ME_HOOK
