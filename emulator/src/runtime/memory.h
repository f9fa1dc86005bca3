// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Where buffers and threadgroup variables live while a dispatch runs, and what is known of each of
// their bytes. Every region has 16 GiB of address space to itself, so that a wrong 32-bit index
// does not reach another one; 64 KiB around its bytes are mapped, and touching them is reported.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace metal_emulator {

enum class Space : uint8_t { threadgroup = 0, device = 1 };

// Per byte: a flag octet and, where races are looked for, the last writer and the last reader as
// tags: clock (20 bits), kManyLanes, kManySimdgroups, thread (10 bits). 0: none.
constexpr uint8_t kRead = 1, kWritten = 2, kInitialized = 4, kAtomicWriter = 8, kForeignReader = 16;
constexpr uint32_t kThreadMask = 0x3ff;
constexpr uint32_t kManySimdgroups = 1u << 10;
constexpr uint32_t kManyLanes = 1u << 11;
constexpr uint32_t kClockShift = 12;
constexpr uint32_t kClockLimit = 1u << 20;

struct Region {
  char* data = nullptr;
  size_t bytes = 0;
  Space space = Space::device;
  bool tracked = false;  ///< writer and reader tags are kept
  bool read_only = false;
  int index = 0;  ///< buffer index, or number of the threadgroup variable
  uint64_t read_bytes = 0, written_bytes = 0;
  std::vector<uint8_t> flags;
  std::vector<uint32_t> writer, reader;
};

class Memory {
 public:
  static constexpr int kBuffers = 31;
  static constexpr int kThreadgroupVariables = 96;
  static constexpr int kRegions = kBuffers + kThreadgroupVariables;
  static constexpr int kSlotShift = 34;
  static constexpr size_t kGuardBytes = 64 << 10;
  static constexpr size_t kOffset = 2 * kGuardBytes;  ///< of the data in its slot

  /// Reserves the address space; throws std::bad_alloc where the system refuses.
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  Region& buffer(int index) { return regions_[size_t(index)]; }
  Region& threadgroup_variable(int number) { return regions_[size_t(kBuffers + number)]; }

  /// Makes `bytes` usable; all flags are 0, no tags. Contents are stale.
  void open(Region& region, size_t bytes, Space space, bool tracked);
  void close(Region& region) { region.bytes = 0; }

  /// The region whose slot holds the address; null outside the arena. Not bounds-checked.
  Region* find(const volatile void* address) {
    const size_t offset = size_t(static_cast<const volatile char*>(address) - base_);
    return offset < kArenaBytes ? &regions_[offset >> kSlotShift] : nullptr;
  }
  /// Whether a stray access next to a region hits memory that exists.
  bool is_mapped(const volatile void* address, size_t bytes) const;

  /// Clocks start again: tags older than `first` become clock 1, `first` becomes 2.
  void rebase(Space space, uint32_t first);

 private:
  static constexpr size_t kArenaBytes = size_t(kRegions) << kSlotShift;
  char* base_;
  Region regions_[kRegions];
  size_t mapped_[kRegions] = {};  ///< bytes from the slot's start
};

}  // namespace metal_emulator
