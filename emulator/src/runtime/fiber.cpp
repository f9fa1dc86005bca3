// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "fiber.h"

#include <cstdint>
#include <cstdlib>

namespace metal_emulator {

#if defined(__x86_64__)
// Saves what the System V ABI asks a callee to keep (registers; the kernels never change the
// floating-point control words), swaps stacks, restores.
extern "C" void metal_emulator_switch(void** save, void* to);
asm(R"(
.text
.globl metal_emulator_switch
.hidden metal_emulator_switch
.type metal_emulator_switch,@function
metal_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size metal_emulator_switch,.-metal_emulator_switch
)");
constexpr bool kHasSwitch = true;
#else
constexpr bool kHasSwitch = false;
void metal_emulator_switch(void**, void*) {}
#endif

namespace {
bool initial_choice() {
  const char* wanted = std::getenv("METAL_EMULATOR_FIBERS");
  return !kHasSwitch || (wanted && wanted[0] == 'p');
}
bool& portable_choice() {
  static bool choice = initial_choice();
  return choice;
}
}  // namespace

void Fiber::use_portable(bool portable) {
  portable_choice() = portable || !kHasSwitch;
}
bool Fiber::portable() {
  return portable_choice();
}

void Fiber::prepare(char* stack, size_t bytes, void (*entry)()) {
  if (portable()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    return;
  }
  // The return address of a call that never was, the entry, six registers.
  auto* top =
      reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15));
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; i++) *--top = 0;
  stack_pointer_ = top;
}

void Fiber::switch_from(Fiber& from) {
  if (portable())
    swapcontext(&from.context_, &context_);
  else
    metal_emulator_switch(&from.stack_pointer_, stack_pointer_);
}

}  // namespace metal_emulator
