// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {

/// W [n, k] dense in `dtype`, from any format: each weight's formula in f32, rounded once.
void dequantize(const Context& context, const WeightView& w, DType dtype, void* out);
/// The formats of ops::quantize and ops::quantize_nf4 (plain absmax), bit-equal to the CPU's; w of
/// `dtype` [n, k]; scales of params.scales_dtype.
void quantize_affine(
    const Context& context,
    const WeightParams& params,
    DType dtype,
    const void* w,
    void* data,
    void* scales,
    void* biases);
void quantize_nf4(
    const Context& context,
    const WeightParams& params,
    DType dtype,
    const void* w,
    void* data,
    float* absmax);

}  // namespace metal_lora::cuda
