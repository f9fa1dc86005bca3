// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The contract between a generated library (rewritten Metal text, compiled by clang), the library
// headers it includes (this folder's parent) and the runtime that executes it. Plain structs and
// function pointers only: a generated library has no undefined symbols but libc's.
//
// A library exports one C function:
//   extern "C" const metal_emulator::abi::Library* metal_emulator_library();
// The runtime calls library->set_hooks(&hooks) before the first dispatch.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace metal_emulator {
namespace abi {

constexpr uint32_t kVersion = 1;
constexpr uint32_t kSimdWidth = 32;

struct Uint3 {
  uint32_t x, y, z;
};

/// What a kernel argument is. Built-in arguments carry the name of their Metal attribute.
enum class ArgKind : uint32_t {
  buffer,
  threadgroup_memory,
  thread_position_in_grid,
  thread_position_in_threadgroup,
  threadgroup_position_in_grid,
  thread_index_in_threadgroup,
  thread_index_in_simdgroup,
  thread_index_in_quadgroup,
  simdgroup_index_in_threadgroup,
  quadgroup_index_in_threadgroup,
  threads_per_threadgroup,
  threadgroups_per_grid,
  threads_per_grid,
  threads_per_simdgroup,
  thread_execution_width,
  simdgroups_per_threadgroup,
  quadgroups_per_threadgroup,
  dispatch_threads_per_threadgroup,
  dispatch_simdgroups_per_threadgroup,
  dispatch_quadgroups_per_threadgroup,
  grid_origin,
  grid_size,
};

struct Arg {
  ArgKind kind;
  int32_t index;       ///< buffer or threadgroup index; 0 for built-ins
  bool is_constant;    ///< declared in `constant`
  bool read_only;      ///< `constant`, or pointer/reference to const
  const bool* enable;  ///< function constant of [[function_constant(c)]]; null: always there
  const char* name;
};

/// The running thread, as generated code sees it.
struct Lane {
  uint32_t lane;       ///< in its simdgroup
  uint32_t simdgroup;  ///< in its threadgroup
  uint32_t thread;     ///< in its threadgroup, x fastest
  Uint3 position;      ///< in its threadgroup
};

struct Grid {
  Uint3 threadgroup;              ///< position of the running threadgroup
  Uint3 threadgroups;             ///< per grid, rounded up
  Uint3 threads;                  ///< per grid
  Uint3 threads_per_threadgroup;  ///< of the running threadgroup: smaller at a ragged edge
  Uint3 nominal_threadgroup;      ///< as dispatched
};

struct Context {
  void* const* buffers;             ///< [31]
  void* const* threadgroup_memory;  ///< [31]
  void* dummy;                      ///< 4 KiB behind arguments that a function constant disables
  const Grid* grid;
  const Lane* lane;
};

struct Kernel {
  const char* name;               ///< host name
  void (*thunk)(const Context&);  ///< glue::call(&function, args, context)
  const Arg* args;
  uint32_t arg_count;
};

struct FunctionConstant {
  int32_t index;
  const char* name;
  void* value;
  uint32_t bytes;
  bool* defined;  ///< what is_function_constant_defined() reads; may be null
};

/// Where a threadgroup variable lives; one static object per declaration (and instantiation).
struct ThreadgroupSlot {
  uint32_t index;
  uint32_t generation;  ///< of the dispatch that assigned the index; 0 at start
};

enum class CollectiveKind : uint32_t { simd, simdgroup_barrier, matrix, matrix_multiply };

/// What the lanes that meet at one call site hand over; entries outside `mask` are stale.
struct Exchange {
  const void* in[kSimdWidth];
  void* out[kSimdWidth];
  uint32_t mask;     ///< lanes that take part
  const void* site;  ///< return address of the call in the kernel
};

struct Collective {
  CollectiveKind kind;
  void (*finish)(const Exchange&);  ///< runs once, on behalf of all lanes of the mask; may be null
};

/// Filled by the runtime. `site` is a return address inside the kernel's code, for file and line.
struct Hooks {
  const Lane* const* current;

  // Called directly by the instrumentation: the runtime takes their return address as the site.
  void (*read1)(const void*);
  void (*read2)(const void*);
  void (*read4)(const void*);
  void (*read8)(const void*);
  void (*read16)(const void*);
  void (*write1)(void*);
  void (*write2)(void*);
  void (*write4)(void*);
  void (*write8)(void*);
  void (*write16)(void*);
  void (*read_range)(const void*, size_t bytes, const void* site);
  void (*write_range)(void*, size_t bytes, const void* site);
  void (*function_entry)(void* caller);
  void (*function_exit)();

  void (*atomic)(const volatile void*, uint32_t bytes, bool writes, const void* site);
  void (*atomic_store)(const volatile void*, uint32_t bytes, const void* site);
  /// On behalf of the whole simdgroup, from a matrix collective's finish.
  void (*simdgroup_read)(const void*, size_t bytes, const void* site);
  void (*simdgroup_write)(void*, size_t bytes, const void* site);
  void (*collective)(const Collective&, const void* in, void* out, const void* site);
  void (*threadgroup_barrier)(uint32_t mem_flags, const void* site);
  void (*simdgroup_barrier)(uint32_t mem_flags, const void* site);
  void* (*threadgroup_variable)(ThreadgroupSlot&, size_t bytes, size_t alignment, const void* site);
  /// Copies value, once per threadgroup; later calls for the same variable do nothing.
  void (*threadgroup_initialize)(void* variable, const void* value, size_t bytes);

  // UBSan's minimal news; `what` is a literal.
  void (*misaligned)(const void* address, size_t alignment, const void* site);
  void (*undefined)(const char* what, int64_t value, const void* site);
};

struct Library {
  uint32_t version;  ///< kVersion
  const Kernel* kernels;
  uint32_t kernel_count;
  const FunctionConstant* constants;
  uint32_t constant_count;
  void (*set_hooks)(const Hooks*);  ///< abi::set_hooks of library.h
  void (*constants_changed)();      ///< recomputes program-scope values derived from function
                                    ///< constants; may be null
  const char* shim_directory;       ///< abi::kShimDirectory of library.h: frames there are skipped
};

/// The table of this generated library; hidden, so that each library has its own.
extern const Hooks* hooks __attribute__((visibility("hidden")));

}  // namespace abi
}  // namespace metal_emulator
