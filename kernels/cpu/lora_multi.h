// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cpu/lora_kernels.h"

namespace metal_lora::cpu {

/// lora_linear_multi_forward for 1 … kGemvMaxTokens tokens: one trip to the thread pool, W read
/// once.
void lora_multi_gemv(
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& bank,
    const int32_t* adapter_index,
    const float* bias,
    void* y);

}  // namespace metal_lora::cpu
