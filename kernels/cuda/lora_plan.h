// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What a linear's kernels find as they want it and what has to be copied first. plan_linear and the
// composition (lora_kernels.cpp) ask the same questions here. Host code.
#pragma once

#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {

/// Columns of the copy of B, and of u and v where they lie side by side: 16 bytes' worth for the
/// tensor cores. By themselves u and v have low_stride.
inline uint32_t padded_rank(DType dtype, uint32_t rank) {
  return dtype == DType::f32 ? rank : (rank + 7) / 8 * 8;
}

/// W is not dense in x's type: it goes through a copy.
bool needs_dense_copy(DType dtype, const WeightView& w);
/// B [n, rank] is not of x's type, or its rows are no multiples of 16 bytes.
bool needs_packed_b(DType dtype, const LoraView& lora);
/// A [rank, k] is not of x's type, or it alone would keep the products from copies of 16 bytes.
bool needs_packed_a(DType dtype, const LoraView& lora, uint32_t k);
/// Elements are dropped from the adapter's input.
bool drops(const LoraView& lora);
/// The product of a branch reads W's codes (gemm_quant.h) instead of a 16-bit copy.
bool reads_codes(
    const Context& context, uint32_t m, DType dtype, const void* x, const LoraBranch& branch);

}  // namespace metal_lora::cuda
