// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Dispatch of the forward pass of many adapters at once. See plans.h.
#pragma once

#include "kernels/metal/plans.h"

namespace metal_lora::metal {

/// y[t] = W·x[t] + bias + scales[i]·B_i·(A_i·x[t]), i = index[t]; -1: the base alone.
struct LoraMultiShape {
  uint32_t m = 0, n = 0, k = 0;
  WeightFormat format = WeightFormat::f32;
  uint32_t group_size = 0;
  DType scales_dtype = DType::f32;
  bool double_quant = false;
  uint32_t adapters = 0, max_rank = 0;  ///< at least 1; max_rank at most 256
  DType dtype = DType::f32;             ///< of x and y
  DType lora_dtype = DType::f32;        ///< of A and B
  bool has_bias = false;
};

/// Inputs x [m, k], w, scales and biases where the format has them, a [adapters, max_rank, k],
/// b [adapters, n, max_rank], ranks int32 [adapters] (true ranks, 0 … max_rank), adapter_scales f32
/// [adapters], index int32 [m] (outside [0, adapters): the base alone), bias f32 [n] where
/// has_bias, p; output y [m, n]. One dispatch: up to 8 tokens in the matrix-vector form, more in
/// the tiled one. Within a form a token's result does not depend, to the bit, on the other tokens
/// of the batch. Throws std::invalid_argument as plan_lora_forward.
Plan plan_lora_multi(const LoraMultiShape& shape);

}  // namespace metal_lora::metal
