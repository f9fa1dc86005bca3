// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_grad of few tokens on Hopper.
#pragma once

#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {

/// Whether lora_grad_sm90 takes all of them: compute capability 9.0, up to kFewGradTokens tokens,
/// large and small of one 16-bit type and aligned to 16 bytes, ranks to 64, no dropout.
bool can_grad_sm90(
    const Context& context, uint32_t m, DType large_dtype, const AdapterGrad* grads, size_t count);
constexpr uint32_t kFewGradTokens = 1024;

/// The same as lora_grad.
void lora_grad_sm90(
    const Context& context,
    uint32_t m,
    DType large_dtype,
    const AdapterGrad* grads,
    size_t count,
    bool read_early);

}  // namespace metal_lora::cuda
