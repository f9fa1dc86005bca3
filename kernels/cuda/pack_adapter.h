// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <span>

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// One adapter of f32 parameters and its 16-bit copy, whose rank is padded with zeros to a multiple
/// of 8. Offsets in elements: A [rank, in] and B [out, rank] -> A [padded_rank, in] and
/// B [out, padded_rank].
struct PackedAdapter {
  uint32_t rank = 0, padded_rank = 0, in = 0, out = 0;
  size_t from_a = 0, from_b = 0, to_a = 0, to_b = 0;
};

/// A launch for 64 adapters that have a rank.
void pack_adapters(
    const Context& context,
    std::span<const PackedAdapter> adapters,
    const float* from,
    DType dtype,
    void* to);

}  // namespace metal_lora::cuda
