// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Scheduling. Lanes are fibers; a lane runs until it meets others or returns. A meeting (simd,
// matrix or simdgroup barrier) completes when no lane of its simdgroup can run: all lanes that wait
// at one place, under one call path, take part. Where lanes wait at several places, the one first
// in the code goes first, so that branches run before the code behind them.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <new>

namespace metal_emulator {

namespace {
constexpr size_t kGuardPage = 16 << 10;
constexpr uint64_t kIdleYieldLimit = 400'000;  // x64 atomics each: about a second
constexpr uint32_t kSpinsPerYield = 64;

uint64_t mix(uint64_t h, const void* p) {
  return (h ^ reinterpret_cast<uintptr_t>(p)) * 0x9e3779b97f4a7c15ull + 1;
}
}  // namespace

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

Machine::Machine() {
  void* p = mmap(
      nullptr,
      kMaxThreads * kStackBytes,
      PROT_NONE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  stacks_ = static_cast<char*>(p);
  initialized_variable_.resize(Memory::kThreadgroupVariables);
}

void Machine::prepare(LaneState& lane, uint32_t index) {
  char* stack = stacks_ + size_t(index) * kStackBytes;
  if (mprotect(stack + kGuardPage, kStackBytes - kGuardPage, PROT_READ | PROT_WRITE) != 0)
    throw std::bad_alloc();
  // Stacks start at different cache sets: lanes touch the same frame one after another.
  const size_t color = size_t(index * 5 % 64) * 64;
  lane.fiber.prepare(stack + kGuardPage, kStackBytes - kGuardPage - color, &lane_main);
  lane.prepared = true;
}

void Machine::lane_main() {
  Machine& m = instance();
  for (;;) {
    LaneState& lane = *m.current;
    const abi::Context context{m.buffers, m.threadgroup_memory, m.dummy, &m.grid, &lane.info};
    m.kernel->thunk(context);
    m.finish_lane(lane);
  }
}

void Machine::start_lanes() {
  const abi::Uint3 size = grid.threads_per_threadgroup;
  threads = live = size.x * size.y * size.z;
  simdgroup_count = (threads + 31) / 32;
  if (lanes_portable_ != Fiber::portable()) {
    lanes_portable_ = Fiber::portable();
    restart_lanes_ = true;
  }
  for (uint32_t i = 0; i < threads; i++) {
    LaneState& lane = lanes[i];
    if (!lane.prepared || restart_lanes_) prepare(lane, i);
    lane.info = {i % 32, i / 32, i, {i % size.x, i / size.x % size.y, i / size.x / size.y}};
    lane.simdgroup = &simdgroups[i / 32];
    lane.depth = 0;
    lane.path = 0;
    lane.last_atomic = nullptr;
    lane.spins = 0;
  }
  for (uint32_t i = threads; restart_lanes_ && i < kMaxThreads; i++) lanes[i].prepared = false;
  restart_lanes_ = false;
  for (int s = 0; s < 2; s++) {
    uint32_t clock = 0;
    for (const Simdgroup& g : simdgroups) clock = std::max(clock, g.clock[s]);
    clock++;
    if (clock >= kClockLimit / 2) {
      memory.rebase(static_cast<Space>(s), clock);
      clock = 2;
    }
    first[s] = window[s] = clock;
    unfenced[s] = false;
    for (Simdgroup& g : simdgroups) g.clock[s] = clock;
  }
  for (uint32_t i = 0; i < simdgroup_count; i++) {
    Simdgroup& g = simdgroups[i];
    const uint32_t width = std::min(32u, threads - i * 32);
    g.index = i;
    g.present = g.live = g.ready = width == 32 ? ~0u : (1u << width) - 1;
    g.waiting = g.at_barrier = 0;
    g.mixed = false;
  }
  barrier_count_ = 0;
  barrier_flags_ = 0;
  barrier_mixed_ = false;
  idle_yields_ = 0;
  misaligned_ = nullptr;
  std::fill(initialized_variable_.begin(), initialized_variable_.end(), 0);
}

uint32_t Machine::pick(uint32_t ready) const {
  return reverse ? 31u - static_cast<uint32_t>(__builtin_clz(ready))
                 : static_cast<uint32_t>(__builtin_ctz(ready));
}

void Machine::run_threadgroup() {
  start_lanes();
  running_ = true;
  if (sigsetjmp(escape_, 0) == 0) {
    while (live > 0 && !ended) {
      bool any = false;
      for (uint32_t q = 0; q < simdgroup_count && !ended; q++) {
        Simdgroup& g = simdgroups[reverse ? simdgroup_count - 1 - q : q];
        if (!g.ready) continue;
        any = true;
        current = &lanes[g.index * 32 + pick(g.ready)];
        current->fiber.switch_from(scheduler_);
      }
      if (!any && live > 0 && !ended) {
        report(FindingKind::deadlock, barrier_site_, "no thread can go on");
        ended = true;
      }
    }
  }
  running_ = false;
  current = nullptr;
  if (ended) restart_lanes_ = true;
}

void Machine::abandon() {
  ended = true;
  LaneState& lane = *current;
  scheduler_.switch_from(lane.fiber);
  __builtin_unreachable();
}

void Machine::leave(LaneState& lane) {
  Simdgroup& g = *lane.simdgroup;
  if (g.ready) {
    LaneState& next = lanes[g.index * 32 + pick(g.ready)];
    if (&next == &lane) return;
    current = &next;
    next.fiber.switch_from(lane.fiber);
  } else {
    scheduler_.switch_from(lane.fiber);
  }
}

void Machine::finish_lane(LaneState& lane) {
  Simdgroup& g = *lane.simdgroup;
  const uint32_t bit = 1u << lane.info.lane;
  g.live &= ~bit;
  g.ready &= ~bit;
  live--;
  progress();
  if (live > 0 && barrier_count_ == live)
    release_barrier();
  else if (!g.ready && g.waiting)
    resolve(g);
  leave(lane);
}

/// Lanes of the meeting to hold next: of those waiting, the place first in the code, compared from
/// the outermost call inwards.
uint32_t Machine::choose_meeting(const Simdgroup& g) const {
  const LaneState* best = nullptr;
  uint32_t mask = 0;
  const auto before = [](const LaneState& a, const LaneState& b) {
    const uint32_t depth = std::min({a.depth, b.depth, kMaxCallDepth});
    for (uint32_t i = 0; i < depth; i++)
      if (a.frames[i].caller != b.frames[i].caller) return a.frames[i].caller < b.frames[i].caller;
    const auto at = [depth](const LaneState& l) {
      return l.depth > depth && depth < kMaxCallDepth ? l.frames[depth].caller : l.site;
    };
    return at(a) < at(b);
  };
  for (uint32_t i = 0; i < 32; i++) {
    if (!(g.waiting >> i & 1)) continue;
    const LaneState& lane = lanes[g.index * 32 + i];
    if (best && lane.key == best->key) {
      mask |= 1u << i;
    } else if (!best || before(lane, *best)) {
      best = &lane;
      mask = 1u << i;
    }
  }
  return mask;
}

void Machine::check_convergence(Simdgroup& g, uint32_t mask, const LaneState& lane) {
  const bool matrix = lane.collective->kind == abi::CollectiveKind::matrix ||
                      lane.collective->kind == abi::CollectiveKind::matrix_multiply;
  if (matrix ? mask == ~0u : mask == g.present) return;
  char text[160];
  std::snprintf(
      text,
      sizeof text,
      "%s reached by lanes 0x%08x of simdgroup %u, which has lanes 0x%08x%s",
      matrix ? "a simdgroup matrix operation is" : "simdgroup_barrier is",
      mask,
      g.index,
      g.present,
      matrix && g.present != ~0u ? " (matrix operations need all 32)" : "");
  report(
      matrix ? FindingKind::divergent_matrix_operation : FindingKind::divergent_barrier,
      lane.site,
      text);
}

void Machine::resolve(Simdgroup& g) {
  const uint32_t mask = g.mixed ? choose_meeting(g) : g.waiting;
  const LaneState& lane = lanes[g.index * 32 + static_cast<uint32_t>(__builtin_ctz(mask))];
  const abi::Collective& collective = *lane.collective;
  if (collective.kind != abi::CollectiveKind::simd) check_convergence(g, mask, lane);
  switch (collective.kind) {
    case abi::CollectiveKind::simd:
      counters.simd_operations++;
      break;
    case abi::CollectiveKind::simdgroup_barrier:
      counters.simdgroup_barriers++;
      break;
    case abi::CollectiveKind::matrix:
      break;
    case abi::CollectiveKind::matrix_multiply:
      counters.matrix_operations++;
      break;
  }
  progress();
  g.exchange.mask = mask;
  g.exchange.site = lane.site;
  if (collective.finish) collective.finish(g.exchange);
  g.waiting &= ~mask;
  g.ready |= mask;
  if (g.waiting) {
    g.key = lanes[g.index * 32 + static_cast<uint32_t>(__builtin_ctz(g.waiting))].key;
    g.mixed = true;  // cheap and right: choose_meeting() compares again
  }
}

void Machine::meet(const abi::Collective& collective, const void* in, void* out, const void* site) {
  LaneState& lane = *current;
  Simdgroup& g = *lane.simdgroup;
  const uint32_t bit = 1u << lane.info.lane;
  g.exchange.in[lane.info.lane] = in;
  g.exchange.out[lane.info.lane] = out;
  lane.collective = &collective;
  lane.site = site;
  lane.key = mix(lane.path, site);
  lane.spins = 0;
  if (!g.waiting) {
    g.key = lane.key;
    g.mixed = false;
  } else if (lane.key != g.key) {
    g.mixed = true;
  }
  g.waiting |= bit;
  g.ready &= ~bit;
  if (!g.ready) resolve(g);
  while (!(g.ready & bit)) leave(lane);
}

void Machine::barrier(uint32_t mem_flags, const void* site) {
  LaneState& lane = *current;
  Simdgroup& g = *lane.simdgroup;
  const uint32_t bit = 1u << lane.info.lane;
  lane.site = site;
  lane.spins = 0;
  const uint64_t key = mix(lane.path, site);
  if (barrier_count_ == 0) {
    barrier_key_ = key;
    barrier_site_ = site;
    barrier_flags_ = mem_flags;
  } else if (key != barrier_key_) {
    barrier_mixed_ = true;
  }
  g.at_barrier |= bit;
  g.ready &= ~bit;
  if (++barrier_count_ == live)
    release_barrier();
  else if (!g.ready && g.waiting)
    resolve(g);
  while (!(g.ready & bit)) leave(lane);
}

void Machine::release_barrier() {
  char text[128];
  if (barrier_count_ != threads) {
    std::snprintf(
        text,
        sizeof text,
        "threadgroup_barrier is reached by %u of %u threads; the others have returned",
        barrier_count_,
        threads);
    report(FindingKind::divergent_barrier, barrier_site_, text);
  } else if (barrier_mixed_) {
    report(
        FindingKind::divergent_barrier,
        barrier_site_,
        "threads of a threadgroup wait at different threadgroup_barriers");
  }
  counters.threadgroup_barriers++;
  advance_clocks(barrier_flags_);
  progress();
  barrier_count_ = 0;
  barrier_mixed_ = false;
  for (uint32_t i = 0; i < simdgroup_count; i++) {
    simdgroups[i].ready |= simdgroups[i].at_barrier;
    simdgroups[i].at_barrier = 0;
  }
}

void Machine::advance_clocks(uint32_t mem_flags) {
  for (uint32_t s = 0; s < 2; s++) {
    const uint32_t flag = s == uint32_t(Space::device) ? 1 : 2;  // mem_flags' values
    unfenced[s] = !(mem_flags & flag);
    if (unfenced[s]) continue;
    uint32_t clock = 0;
    for (uint32_t i = 0; i < simdgroup_count; i++) clock = std::max(clock, simdgroups[i].clock[s]);
    clock++;
    if (clock >= kClockLimit - kMaxThreads) {
      // Tags of this threadgroup are all ordered by this barrier: 1 to 2 keeps them apart from
      // other threadgroups' and before the window.
      memory.rebase(static_cast<Space>(s), first[s]);
      clock = clock - first[s] + 2;
      first[s] = 2;
    }
    window[s] = clock;
    for (Simdgroup& g : simdgroups) g.clock[s] = clock;
  }
}

void Machine::order_simdgroup(uint32_t mem_flags) {
  Simdgroup& g = *current->simdgroup;
  for (uint32_t s = 0; s < 2; s++) {
    const uint32_t flag = s == uint32_t(Space::device) ? 1 : 2;
    if (!(mem_flags & flag)) continue;
    if (++g.clock[s] + 1 < kClockLimit) continue;
    refusal = "more than a million simdgroup barriers between two threadgroup barriers";
    abandon();
  }
}

void Machine::note_atomic(const volatile void* address, const void* site) {
  LaneState& lane = *current;
  if (lane.last_atomic != address || lane.last_atomic_site != site) {
    lane.last_atomic = address;
    lane.last_atomic_site = site;
    lane.spins = 0;
    return;
  }
  if (++lane.spins % kSpinsPerYield != 0) return;
  if (++idle_yields_ > kIdleYieldLimit) {
    report(
        FindingKind::deadlock,
        site,
        who() + " waits at an atomic for a change that no thread brings about");
    abandon();
  }
  // Somebody else's turn: the lanes behind this one in scheduling order, then other simdgroups.
  Simdgroup& g = *lane.simdgroup;
  const uint32_t bit = 1u << lane.info.lane;
  const uint32_t behind = g.ready & (reverse ? bit - 1 : ~(bit | (bit - 1)));
  if (behind) {
    LaneState& next = lanes[g.index * 32 + pick(behind)];
    current = &next;
    next.fiber.switch_from(lane.fiber);
  } else {
    scheduler_.switch_from(lane.fiber);
  }
}

Region& Machine::open_threadgroup_region(size_t bytes) {
  if (threadgroup_variables == Memory::kThreadgroupVariables) {
    refusal = "more than 96 threadgroup variables";
    abandon();
  }
  Region& region = memory.threadgroup_variable(threadgroup_variables);
  memory.open(region, bytes, Space::threadgroup, checks);
  region.index = threadgroup_variables++;
  // Garbage that shows: NaN, -1.
  std::memset(region.data, 0xff, bytes);
  return region;
}

void* Machine::place(abi::ThreadgroupSlot& slot, size_t bytes, size_t alignment) {
  if (slot.generation != generation) {
    threadgroup_bytes = (threadgroup_bytes + alignment - 1) / alignment * alignment + bytes;
    if (threadgroup_bytes > kThreadgroupMemoryLimit) {
      refusal = "threadgroup memory: " + std::to_string(threadgroup_bytes) +
                " bytes, but Metal allows 32768";
      abandon();
    }
    slot.index = static_cast<uint32_t>(open_threadgroup_region(bytes).index);
    slot.generation = generation;
  }
  return memory.threadgroup_variable(static_cast<int>(slot.index)).data;
}

void Machine::initialize(void* variable, const void* value, size_t bytes) {
  Region& region = *memory.find(variable);
  uint8_t& done = initialized_variable_[size_t(region.index)];
  if (done) return;
  done = 1;
  std::memcpy(variable, value, bytes);
  std::fill(region.flags.begin(), region.flags.end(), uint8_t(kInitialized));
}

std::string Machine::who() const {
  if (!current) return "a thread";
  char text[128];
  std::snprintf(
      text,
      sizeof text,
      "thread %u (simdgroup %u, lane %u) of threadgroup (%u, %u, %u)",
      current->info.thread,
      current->info.simdgroup,
      current->info.lane,
      grid.threadgroup.x,
      grid.threadgroup.y,
      grid.threadgroup.z);
  return text;
}

std::string Machine::where(const Region& region, const volatile void* address) const {
  const ptrdiff_t offset =
      static_cast<const volatile char*>(address) - static_cast<const volatile char*>(region.data);
  std::string name;
  if (region.space == Space::threadgroup) {
    name = "threadgroup variable " + std::to_string(region.index);
  } else {
    name = "buffer " + std::to_string(region.index);
    for (uint32_t i = 0; i < kernel->arg_count; i++)
      if (kernel->args[i].kind == abi::ArgKind::buffer && kernel->args[i].index == region.index)
        name += std::string(" (") + kernel->args[i].name + ")";
  }
  return name + ", byte " + std::to_string(offset) + " of " + std::to_string(region.bytes);
}

void Machine::report(FindingKind kind, const void* site, const std::string& text) {
  if (findings.add(kind, site)) findings.set_text(text);
}

void Machine::fault(int signal, const void* address, const void* code) {
  if (!running_ || !current) return;
  char text[160];
  const char* p = static_cast<const char*>(address);
  const char* stack = stacks_ + size_t(current->info.thread) * kStackBytes;
  if (misaligned_ == current && !address) {
    // x86 faults so, without an address, where a vector is not aligned.
  } else if (signal == SIGFPE) {
    report(
        FindingKind::undefined_behavior,
        static_cast<const char*>(code) + 1,
        "integer division by zero");
  } else {
    std::snprintf(
        text,
        sizeof text,
        p >= stack && p < stack + kGuardPage ? "the stack of a thread overflows (address %p)"
                                             : "access to address %p, outside everything",
        address);
    report(
        FindingKind::out_of_bounds,
        in_library(code) ? static_cast<const char*>(code) + 1 : current->site,
        std::string(text) + ", by " + who());
  }
  ended = true;
  siglongjmp(escape_, 1);
}

}  // namespace metal_emulator
