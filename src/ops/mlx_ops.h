// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The operations for which the Metal backend runs MLX's own kernels: differentiable by MLX, on the
// stream they are given (an exported step must not depend on the default device).
#pragma once

#include <mlx/utils.h>

#include "metal_lora/ops.h"
#include "src/launch/launch.h"

namespace metal_lora::ops::with_mlx {

using mlx::core::StreamOrDevice;

/// As ops::attention. Makes a mask [tokens, tokens] of booleans; MLX's fused attention reads it.
mlx::core::array attention(
    const Arrays& q_k_v_segment_start, float scale, int window, StreamOrDevice s);
/// As ops::cached_attention: {out, cache}. Attends over the whole capacity, masked: the shapes are
/// those of every step, so that a step is compiled once.
Arrays cached_attention(
    const Arrays& q_k_v_cache_position, int layer, float scale, int window, StreamOrDevice s);
mlx::core::array rms_norm(
    const mlx::core::array& x, const mlx::core::array& weight, float eps, StreamOrDevice s);
mlx::core::array rope_table(
    const mlx::core::array& positions,
    const mlx::core::array& inv_freq,
    float factor,
    StreamOrDevice s);
mlx::core::array rope(const mlx::core::array& x, const mlx::core::array& table, StreamOrDevice s);
mlx::core::array swiglu(const mlx::core::array& gate, const mlx::core::array& up, StreamOrDevice s);
/// −log softmax(x·Wᵀ)[targets] f32 [tokens], in slices of tokens whose f32 logits stay below
/// 64 MiB; NaN for a target outside the vocabulary.
mlx::core::array token_losses(
    const mlx::core::array& x,
    const Weight& head,
    const mlx::core::array& targets,
    StreamOrDevice s);

}  // namespace metal_lora::ops::with_mlx
