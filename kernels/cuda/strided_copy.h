// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// `to` [shape] row-contiguous = `from` by strides in elements of item_bytes (1, 2, 4 or 8); a
/// stride may be 0 or negative. For inputs that are views; one element a thread.
struct StridedCopy {
  static constexpr int kMaxDims = 8;
  int dims = 0;
  uint32_t item_bytes = 4;
  uint32_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
};
void strided_copy(const Context& context, const StridedCopy& p, const void* from, void* to);

/// Contiguous bytes; a kernel, since a graph with a copy node in it cannot be updated.
void copy_bytes(const Context& context, size_t bytes, const void* from, void* to);

}  // namespace metal_lora::cuda
