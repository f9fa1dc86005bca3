// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The one machine of the process: lanes, simdgroups, the running threadgroup. Not thread-safe:
// run() holds a lock while a dispatch is on it.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "fiber.h"
#include "findings.h"
#include "memory.h"
#include "metal_emulator/emulator.h"

namespace metal_emulator {

constexpr uint32_t kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr uint32_t kMaxCallDepth = 48;
constexpr size_t kThreadgroupMemoryLimit = 32 << 10;

struct Simdgroup;

struct LaneState {
  abi::Lane info;
  Fiber fiber;
  Simdgroup* simdgroup;
  bool prepared = false;
  // The call path: which call of a helper function a meeting belongs to.
  uint32_t depth;
  uint64_t path;
  struct Frame {
    const void* caller;
    uint64_t path_before;
  } frames[kMaxCallDepth];
  // The meeting or barrier that the lane waits at.
  const abi::Collective* collective;
  const void* site;
  uint64_t key;
  // Spinning on an atomic.
  const volatile void* last_atomic;
  const void* last_atomic_site;
  uint32_t spins;
};

struct Simdgroup {
  uint32_t index;
  uint32_t present, live;  ///< lanes that exist; that have not returned
  uint32_t ready, waiting, at_barrier;
  bool mixed;         ///< lanes wait at different places
  uint64_t key;       ///< of the first that waits
  uint32_t clock[2];  ///< by Space
  abi::Exchange exchange;
};

class Machine {
 public:
  static Machine& instance();

  Memory memory;
  Findings findings;
  Counters counters;
  bool checks = true;
  bool reverse = false;

  LaneState* current = nullptr;
  abi::Grid grid;
  Simdgroup simdgroups[kMaxThreads / 32];
  LaneState lanes[kMaxThreads];
  uint32_t threads = 0, live = 0, simdgroup_count = 0;
  uint32_t window[2];  ///< clock of the last barrier, by Space
  uint32_t first[2];   ///< clock of the threadgroup's start
  bool unfenced[2];    ///< a barrier since the last one named other memory; by Space

  // The dispatch.
  const abi::Library* library = nullptr;
  const abi::Kernel* kernel = nullptr;
  const char *library_begin = nullptr, *library_end = nullptr;
  void* buffers[Memory::kBuffers];
  void* threadgroup_memory[Memory::kBuffers];
  alignas(64) char dummy[4096];
  int threadgroup_variables = 0;
  size_t threadgroup_bytes = 0;
  uint32_t generation = 0;
  std::string refusal;  ///< a DispatchError met while running
  bool ended = false;   ///< abandoned before its end

  /// Runs the threadgroup that `grid` describes.
  void run_threadgroup();
  /// From a lane: ends the dispatch.
  [[noreturn]] void abandon();
  /// From a signal handler: whether the fault is a lane's; records it and leaves.
  void fault(int signal, const void* address, const void* code);
  bool owns(const void* stack_address) const {
    const char* p = static_cast<const char*>(stack_address);
    return stacks_ && p >= stacks_ && p < stacks_ + kMaxThreads * kStackBytes;
  }
  bool in_library(const volatile void* address) const {
    const volatile char* p = static_cast<const volatile char*>(address);
    return p >= library_begin && p < library_end;
  }

  void meet(const abi::Collective& collective, const void* in, void* out, const void* site);
  void barrier(uint32_t mem_flags, const void* site);
  void order_simdgroup(uint32_t mem_flags);
  void progress() { idle_yields_ = 0; }
  /// An atomic of the running lane, for the deadlock check: may let others run.
  void note_atomic(const volatile void* address, const void* site);
  void* place(abi::ThreadgroupSlot& slot, size_t bytes, size_t alignment);
  void initialize(void* variable, const void* value, size_t bytes);
  Region& open_threadgroup_region(size_t bytes);

  /// Text for a finding: "thread 5 (simdgroup 0, lane 5) of threadgroup (0, 1, 0)".
  std::string who() const;
  /// "buffer 3 (y) + 128 of 4096 bytes"
  std::string where(const Region& region, const volatile void* address) const;
  void report(FindingKind kind, const void* site, const std::string& text);
  /// The access that follows may fault for it: already said.
  void note_misaligned() { misaligned_ = current; }

 private:
  Machine();
  static void lane_main();
  void start_lanes();
  void prepare(LaneState& lane, uint32_t index);
  void leave(LaneState& lane);  ///< runs somebody else
  void finish_lane(LaneState& lane);
  void resolve(Simdgroup& group);
  void check_convergence(Simdgroup& group, uint32_t mask, const LaneState& lane);
  void release_barrier();
  void advance_clocks(uint32_t mem_flags);
  uint32_t choose_meeting(const Simdgroup& group) const;
  uint32_t pick(uint32_t ready) const;

  char* stacks_ = nullptr;
  Fiber scheduler_;
  sigjmp_buf escape_;
  bool running_ = false;
  bool restart_lanes_ = false;
  bool lanes_portable_ = false;  ///< the kind of fiber that prepared lanes have
  uint32_t barrier_count_ = 0, barrier_flags_ = 0;
  uint64_t barrier_key_ = 0;
  const void* barrier_site_ = nullptr;
  bool barrier_mixed_ = false;
  uint64_t idle_yields_ = 0;
  LaneState* misaligned_ = nullptr;  ///< that last reported a misaligned address
  std::vector<uint8_t> initialized_variable_;
};

/// The functions that generated code calls.
const abi::Hooks& hooks();
/// Region access on behalf of the running lane, as the hooks do it.
void reset_access_budget();

}  // namespace metal_emulator
