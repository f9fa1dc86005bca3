// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/transformer_kernels.h"

namespace metal_lora::cpu {
namespace {

// 64 KiB of f32: enough work for a chunk to be worth claiming.
constexpr size_t kChunk = 16384;

// fn(first byte, elements) of each chunk.
template <class Fn>
void for_chunks(size_t count, DType dtype, const Fn& fn) {
  const size_t bytes = dtype == DType::f32 ? 4 : 2;
  parallel_for((count + kChunk - 1) / kChunk, [&](size_t chunk) {
    const size_t begin = chunk * kChunk;
    fn(begin * bytes, std::min(kChunk, count - begin));
  });
}

const char* at(const void* p, size_t bytes) {
  return static_cast<const char*>(p) + bytes;
}
char* at(void* p, size_t bytes) {
  return static_cast<char*>(p) + bytes;
}

}  // namespace

void swiglu_forward(size_t count, DType dtype, const void* gate, const void* up, void* y) {
  const Elementwise& e = elementwise();
  for_chunks(count, dtype, [&](size_t o, size_t n) {
    e.swiglu(n, dtype, at(gate, o), at(up, o), dtype, at(y, o));
  });
}

void swiglu_backward(
    size_t count,
    DType dtype,
    const void* gate,
    const void* up,
    const void* dy,
    void* dgate,
    void* dup) {
  const Elementwise& e = elementwise();
  for_chunks(count, dtype, [&](size_t o, size_t n) {
    e.swiglu_backward(n, dtype, at(gate, o), at(up, o), at(dy, o), at(dgate, o), at(dup, o));
  });
}

}  // namespace metal_lora::cpu
