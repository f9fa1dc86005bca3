// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace metal_emulator {

namespace {
constexpr size_t kPageBytes = 64 << 10;  // the largest page of the machines we know
/// Above this, a region's pages go back to the system before they are used again.
constexpr size_t kKeepBytes = size_t(64) << 20;
size_t round_up(size_t n) {
  return (n + kPageBytes - 1) / kPageBytes * kPageBytes;
}
}  // namespace

Memory::Memory() {
  void* base =
      mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(base);
  for (int i = 0; i < kRegions; i++) regions_[i].data = base_ + (size_t(i) << kSlotShift) + kOffset;
}

Memory::~Memory() {
  munmap(base_, kArenaBytes);
}

void Memory::open(Region& region, size_t bytes, Space space, bool tracked) {
  const size_t slot = size_t(&region - regions_);
  char* start = base_ + (slot << kSlotShift);
  const size_t wanted = round_up(kOffset + bytes + kGuardBytes);
  if (wanted >= (size_t(1) << kSlotShift)) throw std::bad_alloc();
  if (wanted > mapped_[slot]) {
    // The first kGuardBytes stay unmapped: 64 KiB in front are.
    if (mprotect(start + kGuardBytes, wanted - kGuardBytes, PROT_READ | PROT_WRITE) != 0)
      throw std::bad_alloc();
    mapped_[slot] = wanted;
  } else if (mapped_[slot] > kKeepBytes && wanted < mapped_[slot] / 4) {
    mprotect(start, mapped_[slot], PROT_NONE);
    madvise(start, mapped_[slot], MADV_DONTNEED);
    mprotect(start + kGuardBytes, wanted - kGuardBytes, PROT_READ | PROT_WRITE);
    mapped_[slot] = wanted;
  }
  region.bytes = bytes;
  region.space = space;
  region.tracked = tracked;
  region.read_only = false;
  region.read_bytes = region.written_bytes = 0;
  region.flags.assign(bytes, 0);
  region.writer.assign(tracked ? bytes : 0, 0);
  region.reader.assign(tracked ? bytes : 0, 0);
}

bool Memory::is_mapped(const volatile void* address, size_t bytes) const {
  const size_t offset = size_t(static_cast<const volatile char*>(address) - base_);
  if (offset >= kArenaBytes) return false;
  const size_t slot = offset >> kSlotShift, inside = offset & ((size_t(1) << kSlotShift) - 1);
  return inside >= kGuardBytes && inside + bytes <= mapped_[slot];
}

void Memory::rebase(Space space, uint32_t first) {
  const auto shift = [first](uint32_t& tag) {
    if (tag == 0) return;
    const uint32_t clock = tag >> kClockShift, rest = tag & ((1u << kClockShift) - 1);
    tag = (clock < first ? 1 : clock - first + 2) << kClockShift | rest;
  };
  for (Region& region : regions_) {
    if (region.space != space || !region.tracked || region.bytes == 0) continue;
    std::for_each(region.writer.begin(), region.writer.end(), shift);
    std::for_each(region.reader.begin(), region.reader.end(), shift);
  }
}

}  // namespace metal_emulator
