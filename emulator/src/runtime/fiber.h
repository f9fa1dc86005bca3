// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// One stack of execution per GPU thread. Two implementations: a register switch of a few
// nanoseconds (x86-64), and ucontext (any POSIX machine, a system call per switch on most).
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace metal_emulator {

class Fiber {
 public:
  /// Starts `entry` at the first switch to this fiber; it must never return.
  void prepare(char* stack, size_t bytes, void (*entry)());
  /// Suspends `from` (the running one) and goes on with this one.
  void switch_from(Fiber& from);

  /// Whether fibers use ucontext; not to be changed during a dispatch. At start: where there is no
  /// register switch, or the environment says METAL_EMULATOR_FIBERS=portable.
  static void use_portable(bool portable);
  static bool portable();

 private:
  void* stack_pointer_ = nullptr;
  ucontext_t context_ = {};
};

}  // namespace metal_emulator
