// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Whole steps of a model as graphs for MLX on a Mac. Linear layers, embedding and optimizer are
// this project's kernels. Attention and norms are MLX's: written on a machine without a GPU they
// are its plain operations, not its fused kernels, and a few of MLX's own gradient nodes (of
// softmax) are on the CPU stream. Weights are constants of the graph.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "metal_lora/model.h"

namespace metal_lora {

struct ExportedArray {
  std::string name;
  mlx::core::Shape shape;
  mlx::core::Dtype dtype;
};
struct ExportedFunction {
  std::filesystem::path file;
  std::vector<ExportedArray> inputs, outputs;
};

using StepFunction =
    std::function<std::vector<mlx::core::array>(const std::vector<mlx::core::array>&)>;

/// The step that export_train_step writes, for the active backend, which must run Metal kernels.
/// Keeps references to its arguments.
StepFunction train_step_function(const Model& model, const AdapterWeights& adapter);

/// One training step over a packed stream of `tokens`: loss, gradients of all adapter tensors and
/// AdamW. Inputs tokens, positions, segment_start, targets int32 [tokens], weights f32 [tokens],
/// param, m, v f32 [count] (adapter tensors a0, b0, a1, … laid end to end), factors f32 [8]
/// (grad_scale, clip_norm, beta1, beta2, 1 - rate·decay, rate/bias1, 1/√bias2, eps); outputs loss,
/// param, m, v, grad_norm, skipped. Errors as export_for_metal.
ExportedFunction export_train_step(
    const Model& model,
    const AdapterWeights& adapter,
    int tokens,
    const std::filesystem::path& file);

/// One token through a cache of `capacity` tokens. Inputs token int32 [1], position int32 scalar,
/// cache [layers, 2, capacity, kv_heads, head_dim]; outputs logits f32 [1, vocab], cache.
ExportedFunction export_decode_step(
    const Model& model,
    const AdapterWeights& adapter,
    int capacity,
    const std::filesystem::path& file);

}  // namespace metal_lora
