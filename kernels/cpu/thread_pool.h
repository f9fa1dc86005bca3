// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace metal_lora::cpu {

/// A borrowed callable `void(size_t)`; no allocation.
class ChunkFn {
 public:
  template <class F>
    requires(!std::is_same_v<std::decay_t<F>, ChunkFn>)
  ChunkFn(F&& f)  // NOLINT: implicit on purpose
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* o, size_t i) { (*static_cast<std::remove_reference_t<F>*>(o))(i); }) {}
  void operator()(size_t chunk) const { call_(object_, chunk); }

 private:
  void* object_;
  void (*call_)(void*, size_t);
};

/// Runs fn(0) … fn(chunks-1) on the process's thread pool and the calling thread; returns when all
/// are done. Chunks are claimed dynamically (a busy neighbour costs its share, not the whole step);
/// results must not depend on which thread runs a chunk. Nested calls run inline. Thread-safe:
/// concurrent callers take turns. Exceptions must not leave fn.
void parallel_for(size_t chunks, ChunkFn fn);

/// Threads that parallel_for uses, the caller included. Default: METAL_LORA_THREADS, else the
/// cores this process may run on (affinity and cgroup quota respected).
int thread_count();
void set_thread_count(int threads);

}  // namespace metal_lora::cpu
