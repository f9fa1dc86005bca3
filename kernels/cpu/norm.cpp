// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <vector>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/transformer_kernels.h"

namespace metal_lora::cpu {
namespace {

// Rows to a chunk: fixed, so that dweight's partial sums are the same for any number of threads.
constexpr uint32_t kRowsPerChunk = 32;

size_t element_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// Row r of a matrix that may be absent.
template <class Pointer>
Pointer row_of(Pointer base, size_t r, size_t row_bytes) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return base == nullptr ? nullptr : static_cast<Byte*>(base) + r * row_bytes;
}

}  // namespace

void add_rms_norm_forward(
    const NormParams& p,
    const void* x,
    const void* residual,
    const void* weight,
    void* h,
    void* y) {
  const size_t row_bytes = p.dims * element_bytes(p.dtype);
  const Elementwise& e = elementwise();
  parallel_for((p.rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](size_t chunk) {
    const size_t begin = chunk * kRowsPerChunk;
    for (size_t r = begin; r < p.rows && r < begin + kRowsPerChunk; ++r) {
      e.add_rms_norm(
          p,
          row_of(x, r, row_bytes),
          row_of(residual, r, row_bytes),
          weight,
          row_of(h, r, row_bytes),
          row_of(y, r, row_bytes));
    }
  });
}

void add_rms_norm_backward(
    const NormParams& p,
    const void* h,
    const void* weight,
    const void* dy,
    const void* dh,
    void* dx,
    float* dweight) {
  const size_t row_bytes = p.dims * element_bytes(p.dtype);
  const size_t chunks = (p.rows + kRowsPerChunk - 1) / kRowsPerChunk;
  const Elementwise& e = elementwise();
  std::vector<float> partial(dweight != nullptr ? chunks * p.dims : 0);
  parallel_for(chunks, [&](size_t chunk) {
    const size_t begin = chunk * kRowsPerChunk;
    float* sum = dweight != nullptr ? partial.data() + chunk * p.dims : nullptr;
    for (size_t r = begin; r < p.rows && r < begin + kRowsPerChunk; ++r) {
      e.add_rms_norm_backward(
          p,
          row_of(h, r, row_bytes),
          weight,
          row_of(dy, r, row_bytes),
          row_of(dh, r, row_bytes),
          row_of(dx, r, row_bytes),
          sum);
    }
  });
  if (dweight == nullptr) return;
  for (uint32_t i = 0; i < p.dims; ++i) dweight[i] = 0.0f;
  for (size_t c = 0; c < chunks; ++c) e.add_in_place(p.dims, partial.data() + c * p.dims, dweight);
}

}  // namespace metal_lora::cpu
