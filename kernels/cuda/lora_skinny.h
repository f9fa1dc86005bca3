// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The form for a few dozen tokens, between lora_gemv and the tiled products: lora_gemv's dispatch
// with a wider side of tokens.
#pragma once

#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {

/// The largest m of the skinny form.
inline constexpr uint32_t kSkinnyMaxTokens = 64;

/// Whether lora_skinny takes the call: compute capability 9.0, x 16-bit and W of its type, int4 or
/// nf4, k a multiple of 32 and of two groups, pointers aligned to 16 bytes, adapters of x's type
/// without dropout, and a slice of x, its sums and u within a block's shared memory.
bool can_lora_skinny(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count);
/// As lora_gemv, for 1 … kSkinnyMaxTokens tokens, in one dispatch.
void lora_skinny(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype);

}  // namespace metal_lora::cuda
