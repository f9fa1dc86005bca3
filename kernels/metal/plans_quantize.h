// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Dispatches that quantise a dense weight and make a quantised one dense. See plans.h.
#pragma once

#include "kernels/metal/plans.h"

namespace metal_lora::metal {

struct QuantizeShape {
  uint32_t n = 0, k = 0;
  WeightFormat format = WeightFormat::int4;  ///< int4, int8 or nf4
  uint32_t group_size = 0;                   ///< int4, int8: 32, 64 or 128; divides k
  DType scales_dtype = DType::f32;           ///< dequantize, int4 and int8
  bool double_quant = false;                 ///< dequantize, nf4
  DType dtype = DType::f32;                  ///< of the dense weight
};

/// Input w [n, k], p; outputs q uint32 [n, k·bits/32], then scales and biases [n, k/group] of w's
/// dtype (int4, int8: mx.quantize's affine mode, bit for bit as on MLX's CPU backend) or scales f32
/// [n, k/64], each block's absmax (nf4: the nearest level, a midpoint to the lower one). Throws
/// std::invalid_argument, naming the field.
Plan plan_quantize(const QuantizeShape& shape);
/// Inputs w, scales, then biases (affine and double-quantised), p; output dense [n, k] of `dtype`.
Plan plan_dequantize(const QuantizeShape& shape);

}  // namespace metal_lora::metal
