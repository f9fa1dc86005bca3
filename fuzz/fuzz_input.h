// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <vector>

#include "src/io/dequantize.h"
#include "src/io/mapped_file.h"
#include "src/io/tensor.h"

namespace metal_lora::fuzz {

/// The input as a file in memory, without a copy: libFuzzer's block has exactly its size.
inline std::shared_ptr<const io::MappedFile> as_file(const uint8_t* data, size_t bytes) {
  return io::MappedFile::from_memory(std::as_bytes(std::span(data, bytes)), "input", nullptr);
}

/// A broken promise of the reader: stops the fuzzer with this input.
inline void require(bool promise) {
  if (!promise) std::abort();
}

/// Reads every element of every tensor.
inline void use_tensors(const std::vector<io::TensorInfo>& tensors) {
  for (const io::TensorInfo& tensor : tensors) {
    if (tensor.nbytes == 0) continue;
    require(tensor.row_bytes() * tensor.row_count() == tensor.nbytes);
    std::vector<float> row(tensor.row_elements());
    for (uint64_t r = 0; r < tensor.row_count(); ++r) {
      require(io::dequantize_rows(tensor, r, 1, row.data()).ok());
    }
  }
}

}  // namespace metal_lora::fuzz
