// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Runs Metal compute kernels on a CPU, with checks and counters. Two steps: compile() turns the text
// of a .metal file into a shared library of instrumented machine code (clang 19; cached by content),
// run() executes one dispatch of one of its kernels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace metal_emulator {

/// Text that is not Metal, that Apple's compiler would refuse (strict lint), or that the front end
/// does not understand; what() holds "file:line: message" lines.
class CompileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A dispatch that Metal itself would refuse: an unknown kernel, an unbound buffer, a threadgroup of
/// more than 1,024 threads or 32 KiB, more than 31 buffers.
class DispatchError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct CompileOptions {
  std::string file_name = "kernel.metal";            ///< used in messages
  std::vector<std::filesystem::path> include_dirs;
  std::vector<std::string> defines;                  ///< NAME or NAME=VALUE
  std::vector<std::string> kernels;                  ///< host names to build; empty: all
  bool lint = true;                                  ///< refuse what Apple's compiler would
  std::filesystem::path cache_dir;                   ///< empty: $METAL_EMULATOR_CACHE, else ~/.cache/metal-emulator
};

struct ArgumentInfo {
  enum class Kind { buffer, threadgroup_memory, built_in };
  Kind kind;
  int index;             ///< of buffer or threadgroup memory
  bool read_only;
  std::string name;
};
struct KernelInfo {
  std::string name;      ///< host name
  std::vector<ArgumentInfo> arguments;
};
struct FunctionConstantInfo {
  int index;
  std::string name;
  size_t bytes;
};

/// A compiled library. Immutable; thread-safe to share. Function constants are per dispatch.
class Library {
 public:
  const std::vector<KernelInfo>& kernels() const;
  const std::vector<FunctionConstantInfo>& function_constants() const;
  const KernelInfo* find(std::string_view kernel) const;
  struct Impl;
  explicit Library(std::shared_ptr<const Impl> impl);
  const Impl& impl() const { return *impl_; }

 private:
  std::shared_ptr<const Impl> impl_;
};

Library compile(std::string_view text, const CompileOptions& options = {});
/// A library that compile_to() or metal_emulate() made earlier.
Library load(const std::filesystem::path& library);
void compile_to(
    std::string_view text, const std::filesystem::path& library, const CompileOptions& options = {});
/// Only the strict lint; an empty result means that nothing was found.
std::vector<std::string> lint(std::string_view text, const CompileOptions& options = {});

struct Buffer {
  int index = 0;                    ///< [[buffer(index)]]
  void* data = nullptr;
  size_t bytes = 0;
  bool initialized = true;          ///< false: contents are undefined until the kernel writes them
};
struct FunctionConstant {
  int index = 0;
  std::vector<std::byte> value;
};

struct Dispatch {
  std::string kernel;
  std::vector<Buffer> buffers;
  std::array<uint32_t, 3> threads_per_grid{1, 1, 1};         ///< dispatchThreads: need not be a multiple
  std::array<uint32_t, 3> threads_per_threadgroup{1, 1, 1};
  std::vector<size_t> threadgroup_memory_bytes;              ///< by [[threadgroup(index)]]
  std::vector<FunctionConstant> function_constants;
  bool checks = true;               ///< races, bounds, uninitialised reads; off: counters only
  bool reverse_order = false;       ///< threadgroups and simdgroups scheduled last to first
  size_t max_findings = 16;         ///< distinct ones kept; all are counted
};

enum class FindingKind {
  race_threadgroup,
  race_device,
  out_of_bounds,
  uninitialized_read,
  divergent_barrier,
  divergent_matrix_operation,
  misaligned_access,
  write_to_read_only,
  deadlock,
  undefined_behavior,               ///< array index outside a fixed array, division by zero, bad shift
};
std::string_view finding_name(FindingKind kind);

struct Finding {
  FindingKind kind;
  std::string kernel, file;
  int line = 0;
  std::string text;                 ///< what, where, which threads
  uint64_t count = 1;               ///< times seen at this place
};

struct BufferCounters {
  int index = 0;
  uint64_t read_bytes = 0, written_bytes = 0;          ///< issued by all threads
  uint64_t unique_read_bytes = 0, unique_written_bytes = 0;
};

/// Registers, occupancy and time are not known to an emulator.
struct Counters {
  uint64_t threadgroups = 0, threads = 0;
  std::vector<BufferCounters> buffers;
  uint64_t threadgroup_memory_bytes = 0;               ///< per threadgroup
  uint64_t threadgroup_read_bytes = 0, threadgroup_written_bytes = 0;
  uint64_t threadgroup_barriers = 0, simdgroup_barriers = 0;
  uint64_t simd_operations = 0;                        ///< sum, shuffle, ballot, … per simdgroup
  uint64_t matrix_operations = 0;                      ///< 8x8x8 multiply-accumulates, per simdgroup
  uint64_t atomics = 0;
};

struct Report {
  Counters counters;
  std::vector<Finding> findings;
  uint64_t finding_count = 0;
};

/// Runs the dispatch to its end on the calling thread (one dispatch at a time per process; calls
/// from several threads wait for one another). Findings are reported, not thrown; a dispatch that
/// cannot go on (deadlock, an access outside everything) ends early with its finding.
Report run(const Library& library, const Dispatch& dispatch);

}  // namespace metal_emulator
