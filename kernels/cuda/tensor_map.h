// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Tensor maps for Hopper's copy engine. Host code; needs no -lcuda: the driver's entry is found
// through the runtime once.
#pragma once

#include <cuda.h>

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// A row-major matrix of 16-bit elements and the box that one copy moves: 64 columns (128 bytes,
/// swizzled) x box_rows. Base aligned to 16 bytes, stride a multiple of 8 elements, rows and
/// columns > 0.
struct TensorMapRequest {
  const void* data = nullptr;
  DType dtype = DType::bf16;
  uint32_t rows = 0;
  uint32_t columns = 0;
  size_t stride = 0;  ///< elements
  uint32_t box_rows = 0;
};
/// Boxes beyond the matrix read as zeros and are not written. A host computation of well under
/// 1 µs that touches no device. Throws CudaError.
CUtensorMap make_tensor_map(const TensorMapRequest& request);

}  // namespace metal_lora::cuda
