// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Dispatches of training: adapter gradients, embeddings and the optimizer. See plans.h.
#pragma once

#include <array>
#include <vector>

#include "kernels/metal/plans.h"

namespace metal_lora::metal {

/// dA [rank, k] = scale·vᵀ·drop(x), dB [n, rank] = scale·dyᵀ·u.
struct LoraGradShape {
  uint32_t m = 0, n = 0, k = 0;
  uint32_t rank = 0;  ///< 1 … 256
  float scale = 0.0f;
  DType dtype = DType::f32;  ///< of x and dy; v, u, da, db are f32
  float dropout = 0.0f;      ///< in [0, 1); the forward pass's
  uint64_t dropout_seed = 0;
};
/// Inputs x [m, k], v [m, rank] = dy·B, dy [m, n], u [m, rank] = drop(x)·Aᵀ, p; outputs da, db. One
/// dispatch, no atomics, tokens summed in order. Throws std::invalid_argument (rank, sizes).
Plan plan_lora_grad(const LoraGradShape& shape);

/// y[t] = table[ids[t]] + scale·A[:, ids[t]]ᵀ·Bᵀ, A [rank, vocab], B [dims, rank].
struct LoraEmbeddingShape {
  uint32_t tokens = 0, vocab = 0, dims = 0;
  WeightFormat format = WeightFormat::f32;  ///< of the table [vocab, dims]; as LoraShape's
  uint32_t group_size = 0;
  DType scales_dtype = DType::f32;
  bool double_quant = false;
  uint32_t rank = 0;  ///< forward: 0 = no adapter; at most 256
  float scale = 0.0f;
  DType dtype = DType::f32;       ///< of y and dy
  DType lora_dtype = DType::f32;  ///< of A and B
};
/// Inputs ids int32 [tokens], w, then scales and biases where the format has them, a and b where
/// rank > 0, p; output y [tokens, dims]. A row whose id is outside [0, vocab) becomes zero: the
/// caller checks. Throws std::invalid_argument.
Plan plan_lora_embedding(const LoraEmbeddingShape& shape);
/// Inputs ids, dy [tokens, dims], a, b, p; outputs da [rank, vocab], db [dims, rank], f32, every
/// element written. One dispatch, no atomics. Throws std::invalid_argument.
Plan plan_lora_embedding_grad(const LoraEmbeddingShape& shape);

/// Elements that one threadgroup updates alone, norm and all, in one dispatch.
inline constexpr uint32_t kAdamWSingleCount = 65536;

/// One AdamW step over one flat f32 buffer (see AdamWParams; kernels/cpu/adamw.cpp is the twin).
/// One plan up to kAdamWSingleCount elements: inputs param, grad, m, v, h, p; outputs new_param,
/// new_m, new_v [count], grad_norm f32 [1], skipped int32 [1]. Above, two: the first has inputs
/// grad, p and output partial f32 [adamw_partials(count), 3], which the second takes after v.
/// Throws std::invalid_argument (count is 0 or over 2³² - 1).
std::vector<Plan> plan_adamw(uint64_t count);
/// Rows of `partial`.
uint32_t adamw_partials(uint64_t count);
/// Input h: grad_scale, clip_norm, beta1, beta2, 1 - rate·decay, rate/bias1, 1/√bias2, eps.
std::array<float, 8> adamw_factors(const AdamWParams& params);

}  // namespace metal_lora::metal
