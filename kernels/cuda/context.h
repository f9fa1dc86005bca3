// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What every CUDA entry gets besides its pointers. Entries only enqueue work on the stream: they
// never synchronise, allocate or read device memory from the host, so that they can be captured
// into a CUDA graph. Host code; includes no framework.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/params.h"

namespace metal_lora::cuda {

/// 16 bytes are what one copy instruction moves.
inline bool is_aligned(const void* p, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

/// Where an entry takes temporary device memory from: 256-byte aligned, uninitialised, valid for
/// the work that the entry enqueues.
class Scratch {
 public:
  virtual void* take(size_t bytes) = 0;

 protected:
  ~Scratch() = default;
};

/// Words of Context::counters.
#define METAL_LORA_CUDA_COUNTERS 4096

struct Context {
  cudaStream_t stream = nullptr;
  Scratch* scratch = nullptr;
  int multiprocessors = 132;
  int capability = 90;  ///< 10·major + minor
  /// METAL_LORA_CUDA_COUNTERS words for tickets and flags, zeroed once: every kernel leaves them
  /// zero. One stream's at a time. Null: kernels do without.
  uint32_t* counters = nullptr;
  /// A promise: weights and adapters were not written by kernels that may still run, so that a
  /// programmatic dependent may read them before it waits. True within a step's graph.
  bool weights_ready = false;
};

/// A CUDA call that failed, by name.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw CudaError(std::string("[cuda] ") + what + ": " + cudaGetErrorString(status));
}
/// After a kernel launch.
inline void check_launch(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

}  // namespace metal_lora::cuda
