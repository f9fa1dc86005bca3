// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/interrupt.h"

#include <unistd.h>
#include <csignal>

#include "metal_lora/error.h"

namespace metal_lora::cli {
namespace {

std::atomic<bool> interrupted{false};
std::atomic<int> listeners{0};

// Async-signal-safe: lock-free atomics and _exit only.
void on_interrupt(int) {
  if (listeners.load() > 0 && !interrupted.exchange(true)) return;
  _exit(error_traits(ErrorCode::interrupted).exit_code);
}

}  // namespace

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_interrupt;
  sigemptyset(&action.sa_mask);
  action.sa_flags = 0;  // no SA_RESTART: a read of the terminal returns, so that chat sees it
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

Interruptible::Interruptible() {
  interrupted.store(false);
  ++listeners;
}
Interruptible::~Interruptible() {
  --listeners;
}
const std::atomic<bool>* Interruptible::flag() const {
  return &interrupted;
}
void Interruptible::clear() {
  interrupted.store(false);
}

}  // namespace metal_lora::cli
