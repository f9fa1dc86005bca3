// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What happens at each memory access of a kernel: bounds, initialisation, races, counters.
//
// Races: two accesses to a byte conflict when one writes, they are not both atomic, and nothing
// orders them. Threads of different threadgroups are never ordered; within a threadgroup a
// threadgroup_barrier that names the memory orders all, a simdgroup_barrier one simdgroup. Clocks
// count barriers (per simdgroup and memory); a byte keeps the last writer and the last reader,
// with marks that say whether other lanes or other simdgroups have read it since: that suffices to
// find the conflict of a write with any reader.
#include <cstdio>
#include <cstring>

#include "machine.h"
#include "shadow.h"

namespace metal_emulator {

namespace {

// atomic_update reads and writes; atomic_store only writes.
enum class Access { read, write, atomic_read, atomic_update, atomic_store };
constexpr bool writes(Access a) {
  return a != Access::read && a != Access::atomic_read;
}
constexpr bool is_atomic(Access a) {
  return a != Access::read && a != Access::write;
}

/// The machine, without the check of Machine::instance() whether it exists; set with the hooks.
Machine* the_machine = nullptr;

/// A lane that goes on for so many accesses without a meeting, barrier or end never ends.
constexpr uint64_t kAccessBudget = uint64_t(1) << 31;
uint64_t access_budget = kAccessBudget;

/// Who accesses: the running lane, or its whole simdgroup (wide).
struct Accessor {
  uint32_t thread, simdgroup, clock, window, first, tag;
  bool device, wide;
};

Accessor accessor(const Machine& m, Space space, bool wide) {
  const auto s = static_cast<size_t>(space);
  const LaneState& lane = *m.current;
  const uint32_t clock = lane.simdgroup->clock[s];
  return {
      lane.info.thread,
      lane.info.simdgroup,
      clock,
      m.window[s],
      m.first[s],
      clock << kClockShift | lane.info.thread | (wide ? kManyLanes : 0),
      space == Space::device,
      wide};
}

/// Whether an earlier access is not ordered before this one.
bool unordered(const Accessor& me, uint32_t tag) {
  const uint32_t clock = tag >> kClockShift;
  if (clock < me.first) return clock != 0 && me.device;
  if (clock < me.window) return false;
  if ((tag & kThreadMask) / 32 != me.simdgroup || (tag & kManySimdgroups)) return true;
  if (clock != me.clock) return false;
  return (tag & kThreadMask) != me.thread || (tag & kManyLanes) || me.wide;
}

/// The reader tag of a byte after a read, given the one before; may set kForeignReader.
uint32_t merge_reader(const Accessor& me, uint32_t old, uint8_t& flags) {
  const uint32_t clock = old >> kClockShift;
  if (clock < me.window) {
    if (clock != 0 && clock < me.first && me.device) flags |= kForeignReader;
    return me.tag;
  }
  if ((old & kThreadMask) / 32 != me.simdgroup) return me.tag | kManySimdgroups;
  if (clock == me.clock && (old & kManyLanes)) return old;  // says it all: no store
  uint32_t tag = me.tag | (old & kManySimdgroups);
  if (clock == me.clock && ((old & kThreadMask) != me.thread || (old & kManyLanes)))
    tag |= kManyLanes;
  return tag;
}

void report_race(
    Machine& m,
    const Region& region,
    size_t offset,
    Access access,
    uint32_t other,
    bool other_wrote,
    const Accessor& me,
    const void* site) {
  const FindingKind kind = me.device ? FindingKind::race_device : FindingKind::race_threadgroup;
  if (!m.findings.add(kind, site)) return;
  const bool foreign = (other >> kClockShift) < me.first;
  char text[192];
  std::snprintf(
      text,
      sizeof text,
      "; %s by %s%u%s without a barrier between%s",
      other_wrote ? "written" : "read",
      foreign ? "a thread of another threadgroup, number " : "thread ",
      other & kThreadMask,
      other & (kManyLanes | kManySimdgroups) ? " and others" : "",
      !foreign && m.unfenced[static_cast<size_t>(region.space)]
          ? " that names this memory (mem_flags)"
          : "");
  m.findings.set_text(
      std::string(
          is_atomic(access) ? "atomic access"
          : writes(access)  ? "write"
                            : "read") +
      " of " + m.where(region, region.data + offset) + " by " + m.who() + text);
}

[[gnu::noinline]] void report_outside(
    Machine& m,
    const Region& region,
    const volatile void* p,
    size_t n,
    Access access,
    const void* site) {
  if (m.findings.add(FindingKind::out_of_bounds, site)) {
    const std::string place =
        region.bytes == 0 ? "an address that belongs to no buffer" : m.where(region, p);
    m.findings.set_text(
        std::string(writes(access) ? "write" : "read") + " of " + std::to_string(n) + " bytes at " +
        place + " by " + m.who());
  }
  if (!m.memory.is_mapped(p, n)) m.abandon();
}

[[gnu::noinline]] void report_wild(
    Machine& m, const volatile void* p, size_t n, Access access, const void* site) {
  char text[64];
  std::snprintf(text, sizeof text, "address %p, outside everything, by ", const_cast<void*>(p));
  m.report(
      FindingKind::out_of_bounds,
      site,
      std::string(writes(access) ? "write" : "read") + " of " + std::to_string(n) + " bytes at " +
          text + m.who());
  m.abandon();
}

[[gnu::noinline]] void out_of_budget(Machine& m, const void* site) {
  m.report(FindingKind::deadlock, site, m.who() + " does not come to an end");
  m.abandon();
}

[[gnu::noinline]] void report_uninitialized(
    Machine& m, const Region& region, const void* p, size_t n, const void* site) {
  if (!m.findings.add(FindingKind::uninitialized_read, site)) return;
  m.findings.set_text(
      "read of " + std::to_string(n) + " bytes that nothing has written: " + m.where(region, p) +
      ", by " + m.who());
}

[[gnu::noinline]] void report_read_only(
    Machine& m, const Region& region, const volatile void* p, const void* site) {
  if (!m.findings.add(FindingKind::write_to_read_only, site)) return;
  m.findings.set_text("write to " + m.where(region, p) + ", which is read-only, by " + m.who());
}

void track_read(
    Machine& m, Region& r, size_t at, size_t n, Access access, bool wide, const void* site) {
  const Accessor me = accessor(m, r.space, wide);
  uint8_t* flags = r.flags.data() + at;
  const uint32_t* writer = r.writer.data() + at;
  uint32_t* reader = r.reader.data() + at;
  bool reported = false;
  uint32_t last_writer = 0, last_reader = 0, merged = 0;
  for (size_t i = 0; i < n; i++) {
    if (writer[i] != last_writer) {
      last_writer = writer[i];
      if (!reported && unordered(me, last_writer) &&
          !(access == Access::atomic_read && (flags[i] & kAtomicWriter))) {
        reported = true;
        report_race(m, r, at + i, access, last_writer, true, me, site);
      }
    }
    if (access == Access::atomic_read) continue;
    if (i == 0 || reader[i] != last_reader) {
      last_reader = reader[i];
      merged = last_reader == me.tag ? me.tag : merge_reader(me, last_reader, flags[i]);
    } else if (
        (last_reader >> kClockShift) != 0 && (last_reader >> kClockShift) < me.first && me.device) {
      flags[i] |= kForeignReader;
    }
    reader[i] = merged;
  }
}

void track_write(
    Machine& m, Region& r, size_t at, size_t n, Access access, bool wide, const void* site) {
  const Accessor me = accessor(m, r.space, wide);
  uint8_t* flags = r.flags.data() + at;
  uint32_t* writer = r.writer.data() + at;
  const uint32_t* reader = r.reader.data() + at;
  const bool atomic = is_atomic(access);
  bool reported = false;
  for (size_t i = 0; i < n; i++) {
    const bool both_atomic = atomic && (flags[i] & kAtomicWriter);
    if (!reported && !both_atomic && unordered(me, writer[i])) {
      reported = true;
      report_race(m, r, at + i, access, writer[i], true, me, site);
    }
    if (!reported && ((flags[i] & kForeignReader) || unordered(me, reader[i]))) {
      reported = true;
      const uint32_t other = unordered(me, reader[i]) ? reader[i] : 0;
      report_race(m, r, at + i, access, other, false, me, site);
    }
    // A plain write that nothing orders before other threads' atomics must stay visible to them.
    const bool keep =
        atomic && !(flags[i] & kAtomicWriter) && (writer[i] >> kClockShift) >= me.window;
    if (keep) continue;
    writer[i] = me.tag;
    flags[i] = static_cast<uint8_t>(atomic ? flags[i] | kAtomicWriter : flags[i] & ~kAtomicWriter);
  }
}

inline void access_region(
    Machine& m,
    Region& r,
    const volatile void* p,
    size_t n,
    Access access,
    bool wide,
    const void* site) {
  const size_t at = static_cast<size_t>(static_cast<const volatile char*>(p) - r.data);
  const bool write = writes(access);
  (write ? r.written_bytes : r.read_bytes) += n;
  if (access == Access::atomic_update) r.read_bytes += n;
  if (at >= r.bytes || n > r.bytes - at) [[unlikely]]
    return report_outside(m, r, p, n, access, site);
  uint8_t* flags = r.flags.data() + at;
  if (write) {
    if (r.read_only) [[unlikely]]
      report_read_only(m, r, p, site);
    if (m.checks && r.tracked) track_write(m, r, at, n, access, wide, site);
    if (access == Access::atomic_update && m.checks) {
      uint8_t all = kInitialized;
      for (size_t i = 0; i < n; i++) all &= flags[i];
      if (!all) report_uninitialized(m, r, const_cast<const void*>(p), n, site);
    }
    for (size_t i = 0; i < n; i++) flags[i] |= kWritten | kInitialized;
    return;
  }
  uint8_t all = kInitialized;
  for (size_t i = 0; i < n; i++) {
    all &= flags[i];
    flags[i] |= kRead;
  }
  if (!m.checks) return;
  if (!all) [[unlikely]] {
    report_uninitialized(m, r, const_cast<const void*>(p), n, site);
    for (size_t i = 0; i < n; i++) flags[i] |= kInitialized;
  }
  if (r.tracked) track_read(m, r, at, n, access, wide, site);
}

[[gnu::noinline]] void access(
    const volatile void* p, size_t n, Access kind, bool wide, const void* site) {
  Machine& m = *the_machine;
  if (--access_budget == 0) [[unlikely]]
    out_of_budget(m, site);
  if (Region* r = m.memory.find(p)) [[likely]]
    return access_region(m, *r, p, n, kind, wide, site);
  if (m.owns(const_cast<const void*>(p))) return;
  if (m.in_library(p)) {
    if (writes(kind)) report_wild(m, p, n, kind, site);
    return;
  }
  const volatile char* c = static_cast<const volatile char*>(p);
  if (c >= m.dummy && c + n <= m.dummy + sizeof m.dummy) return;
  report_wild(m, p, n, kind, site);
}

/// A read of N bytes inside a region that share one state and bring nothing to report. Returns
/// false, having changed nothing, where that is not so.
template <size_t N>
inline bool read_uniform(Machine& m, Region& r, size_t at, bool wide) {
  shadow::Flags<N> flags(r.flags.data() + at);
  if (m.checks) {
    if (!flags.all(kInitialized)) return false;
    if (r.tracked) {
      const uint32_t* writer = r.writer.data() + at;
      uint32_t* reader = r.reader.data() + at;
      if (!shadow::uniform<N>(writer) || !shadow::uniform<N>(reader)) return false;
      const Accessor me = accessor(m, r.space, wide);
      if (unordered(me, *writer)) return false;
      if (*reader != me.tag) {
        uint8_t foreign = 0;
        const uint32_t merged = merge_reader(me, *reader, foreign);
        if (foreign) return false;
        if (merged != *reader) shadow::fill<N>(reader, merged);
      }
    }
  }
  flags.set(kRead, r.flags.data() + at);
  r.read_bytes += N;
  return true;
}

template <size_t N>
inline bool write_uniform(Machine& m, Region& r, size_t at, bool wide) {
  if (r.read_only) return false;
  shadow::Flags<N> flags(r.flags.data() + at);
  if (m.checks && r.tracked) {
    uint32_t* writer = r.writer.data() + at;
    const uint32_t* reader = r.reader.data() + at;
    if (!flags.none(kAtomicWriter | kForeignReader)) return false;
    if (!shadow::uniform<N>(writer) || !shadow::uniform<N>(reader)) return false;
    const Accessor me = accessor(m, r.space, wide);
    if (unordered(me, *writer) || unordered(me, *reader)) return false;
    if (*writer != me.tag) shadow::fill<N>(writer, me.tag);
  }
  flags.set(kWritten | kInitialized, r.flags.data() + at);
  r.written_bytes += N;
  return true;
}

template <size_t N, Access kind>
inline void access_n(const volatile void* p, bool wide, const void* site) {
  Machine& m = *the_machine;
  Region* r = m.memory.find(p);
  if (r) [[likely]] {
    const size_t at = static_cast<size_t>(static_cast<const volatile char*>(p) - r->data);
    if (at < r->bytes && N <= r->bytes - at && access_budget > 1) [[likely]] {
      const bool done =
          writes(kind) ? write_uniform<N>(m, *r, at, wide) : read_uniform<N>(m, *r, at, wide);
      if (done) [[likely]] {
        access_budget--;
        return;
      }
    }
  } else if (m.owns(const_cast<const void*>(p)) && access_budget > 1) {
    access_budget--;
    return;
  }
  access(p, N, kind, wide, site);
}

template <size_t N>
void read_hook(const void* p) {
  access_n<N, Access::read>(p, false, __builtin_return_address(0));
}
template <size_t N>
void write_hook(void* p) {
  access_n<N, Access::write>(p, false, __builtin_return_address(0));
}
void read_range(const void* p, size_t n, const void* site) {
  if (n) access(p, n, Access::read, false, site);
}
void write_range(void* p, size_t n, const void* site) {
  if (n) access(p, n, Access::write, false, site);
}
void simdgroup_read(const void* p, size_t n, const void* site) {
  if (n == 16) return access_n<16, Access::read>(p, true, site);
  if (n == 32) return access_n<32, Access::read>(p, true, site);
  access(p, n, Access::read, true, site);
}
void simdgroup_write(void* p, size_t n, const void* site) {
  if (n == 16) return access_n<16, Access::write>(p, true, site);
  if (n == 32) return access_n<32, Access::write>(p, true, site);
  access(p, n, Access::write, true, site);
}

void function_entry(void* caller) {
  LaneState& lane = *the_machine->current;
  if (lane.depth < kMaxCallDepth) {
    lane.frames[lane.depth] = {caller, lane.path};
    lane.path = (lane.path ^ reinterpret_cast<uintptr_t>(caller)) * 0xff51afd7ed558ccdull + 1;
  }
  lane.depth++;
}
void function_exit() {
  LaneState& lane = *the_machine->current;
  if (lane.depth == 0) return;
  if (--lane.depth < kMaxCallDepth) lane.path = lane.frames[lane.depth].path_before;
}

void atomic_access(const volatile void* p, uint32_t n, Access kind, const void* site) {
  Machine& m = *the_machine;
  m.counters.atomics++;
  m.note_atomic(p, site);
  if (reinterpret_cast<uintptr_t>(p) % n != 0) {
    m.report(FindingKind::misaligned_access, site, "misaligned atomic, by " + m.who());
  }
  access(p, n, kind, false, site);
}
void atomic_hook(const volatile void* p, uint32_t n, bool write, const void* site) {
  atomic_access(p, n, write ? Access::atomic_update : Access::atomic_read, site);
}
void atomic_store(const volatile void* p, uint32_t n, const void* site) {
  atomic_access(p, n, Access::atomic_store, site);
}

void collective(const abi::Collective& c, const void* in, void* out, const void* site) {
  access_budget = kAccessBudget;
  the_machine->meet(c, in, out, site);
}
void threadgroup_barrier(uint32_t flags, const void* site) {
  access_budget = kAccessBudget;
  the_machine->barrier(flags, site);
}
uint32_t simdgroup_barrier_flags = 0;
void finish_simdgroup_barrier(const abi::Exchange&) {
  the_machine->order_simdgroup(simdgroup_barrier_flags);
}
void simdgroup_barrier(uint32_t flags, const void* site) {
  static constexpr abi::Collective kBarrier{
      abi::CollectiveKind::simdgroup_barrier, &finish_simdgroup_barrier};
  simdgroup_barrier_flags = flags;
  access_budget = kAccessBudget;
  the_machine->meet(kBarrier, nullptr, nullptr, site);
}
void* threadgroup_variable(
    abi::ThreadgroupSlot& slot, size_t bytes, size_t alignment, const void*) {
  return the_machine->place(slot, bytes, alignment);
}
void threadgroup_initialize(void* variable, const void* value, size_t bytes) {
  the_machine->initialize(variable, value, bytes);
}

void misaligned(const void* address, size_t alignment, const void* site) {
  Machine& m = *the_machine;
  m.note_misaligned();
  if (!m.findings.add(FindingKind::misaligned_access, site)) return;
  const Region* r = m.memory.find(address);
  m.findings.set_text(
      "needs alignment " + std::to_string(alignment) + ": " +
      (r && r->bytes ? m.where(*r, address) : std::string("an address outside buffers")) + ", by " +
      m.who());
}
void undefined(const char* what, int64_t value, const void* site) {
  Machine& m = *the_machine;
  if (m.findings.add(FindingKind::undefined_behavior, site))
    m.findings.set_text(std::string(what) + " (" + std::to_string(value) + "), by " + m.who());
}

}  // namespace

void reset_access_budget() {
  access_budget = kAccessBudget;
}

const abi::Hooks& hooks() {
  static const abi::Hooks table = [] {
    the_machine = &Machine::instance();
    abi::Hooks h{};
    h.current = reinterpret_cast<const abi::Lane* const*>(&Machine::instance().current);
    h.read1 = &read_hook<1>;
    h.read2 = &read_hook<2>;
    h.read4 = &read_hook<4>;
    h.read8 = &read_hook<8>;
    h.read16 = &read_hook<16>;
    h.write1 = &write_hook<1>;
    h.write2 = &write_hook<2>;
    h.write4 = &write_hook<4>;
    h.write8 = &write_hook<8>;
    h.write16 = &write_hook<16>;
    h.read_range = &read_range;
    h.write_range = &write_range;
    h.function_entry = &function_entry;
    h.function_exit = &function_exit;
    h.atomic = &atomic_hook;
    h.atomic_store = &atomic_store;
    h.simdgroup_read = &simdgroup_read;
    h.simdgroup_write = &simdgroup_write;
    h.collective = &collective;
    h.threadgroup_barrier = &threadgroup_barrier;
    h.simdgroup_barrier = &simdgroup_barrier;
    h.threadgroup_variable = &threadgroup_variable;
    h.threadgroup_initialize = &threadgroup_initialize;
    h.misaligned = &misaligned;
    h.undefined = &undefined;
    return h;
  }();
  return table;
}

}  // namespace metal_emulator
