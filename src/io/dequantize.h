// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include "src/io/result.h"
#include "src/io/tensor.h"

namespace metal_lora::io {

/// `elements` numbers of any TensorType to f32. `source` needs no alignment and holds whole blocks;
/// `elements` must be a multiple of the type's block. f64 and 64-bit integers round to nearest.
/// Block formats as ggml-quants.c and PyPI `gguf` define them, bit for bit. Thread-safe.
void dequantize_blocks(TensorType type, const std::byte* source, uint64_t elements, float* out);

/// Rows [first_row, first_row + rows) of a tensor seen as [row_count(), row_elements()], to f32
/// `out` [rows, row_elements()]. invalid_input when the range leaves the tensor. Thread-safe.
Result<void> dequantize_rows(
    const TensorInfo& tensor, uint64_t first_row, uint64_t rows, float* out);

}  // namespace metal_lora::io
