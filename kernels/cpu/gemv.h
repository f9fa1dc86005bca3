// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cpu/lora_kernels.h"

namespace metal_lora::cpu {

/// lora_linear_forward for 1 … kGemvMaxTokens tokens: the form whose price is reading the weights.
/// Same arguments and formula, for adapters without dropout (the caller routes dropout > 0 to the
/// tiled form). Each token's result is bitwise independent of m, of its neighbours and of the
/// thread count: sums over k run in a fixed order and only rows of W are split among threads.
/// One trip to the thread pool for all branches, adapters included. Thread-safe.
void lora_gemv_forward(
    uint32_t m, uint32_t k, DType dtype, const void* x, const LoraBranch* branches, size_t count);

}  // namespace metal_lora::cpu
