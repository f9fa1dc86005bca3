// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>

namespace metal_lora::cli {

/// Installs the handlers: Ctrl-C ends the program with exit code 130 at once, unless an
/// Interruptible is alive; writing to a closed pipe becomes an error instead of a signal.
void install_signal_handlers();

/// While one lives, the first Ctrl-C only sets the flag (work stops at the next safe point and is
/// saved); a second one ends the program.
class Interruptible {
 public:
  Interruptible();
  ~Interruptible();
  Interruptible(const Interruptible&) = delete;
  Interruptible& operator=(const Interruptible&) = delete;

  const std::atomic<bool>* flag() const;
  bool requested() const { return flag()->load(std::memory_order_relaxed); }
  void clear();
};

}  // namespace metal_lora::cli
