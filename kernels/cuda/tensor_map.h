// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Tensor maps for Hopper's copy engine. Host code; needs no -lcuda: the driver's entry is found
// through the runtime once.
#pragma once

#include <cuda.h>

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// A row-major matrix of 16-bit elements and the box that one copy moves: box_columns (16, 32 or
/// 64: 32, 64 or 128 bytes, swizzled over as many) x box_rows. Base aligned to 16 bytes, stride a
/// multiple of 8 elements, rows and columns > 0.
struct TensorMapRequest {
  const void* data = nullptr;
  DType dtype = DType::bf16;
  uint32_t rows = 0;
  uint32_t columns = 0;
  size_t stride = 0;  ///< elements
  uint32_t box_rows = 0;
  uint32_t box_columns = 64;
  /// n > 0: a box is n blocks of 64 columns, each [box_rows, 64] as above, one after the other; the
  /// map's coordinates are {column in its block, row, block}. columns: a multiple of 64.
  uint32_t box_blocks = 0;
};
/// Boxes beyond the matrix read as zeros and are not written. A host computation of well under
/// 1 µs that touches no device. Throws CudaError.
CUtensorMap make_tensor_map(const TensorMapRequest& request);

}  // namespace metal_lora::cuda
