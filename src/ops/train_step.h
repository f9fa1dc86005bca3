// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A whole training step as one launch, where the active backend has one (CUDA).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <mlx/array.h>

#include "metal_lora/ops.h"

namespace metal_lora::ops {

/// A model's geometry and frozen weights, and where each adapter lies in the flat parameters
/// (A, then B, of each module in order). Immutable; one step at a time.
class TrainPlan {
 public:
  struct Geometry {
    int dims = 0, q_heads = 0, kv_heads = 0, head_dim = 0, ffn = 0;
    float eps = 1e-5f, attention_scale = 0.0f, rope_factor = 1.0f;
    DType dtype = DType::bf16;
  };
  struct Linear {
    Weight weight;
    std::optional<mlx::core::array> bias;
    int rank = 0;  ///< 0: no adapter
    float scale = 0.0f;
    size_t a = 0, b = 0;  ///< elements of the flat parameters
  };
  struct Layer {
    std::vector<Linear> linears;  ///< q, k, v, o, gate, up, down
    mlx::core::array input_norm, post_norm;
    int window = 0;
  };
  TrainPlan(
      const Geometry& geometry,
      const std::vector<Layer>& layers,
      const Weight& embedding,
      const Weight& head,
      const mlx::core::array& final_norm,
      const std::vector<float>& inv_freq,
      size_t parameters,
      size_t memory_budget_bytes);
  ~TrainPlan();
  TrainPlan(const TrainPlan&) = delete;
  TrainPlan& operator=(const TrainPlan&) = delete;

  /// What a stream of `tokens` takes where every layer is worked out again in the backward pass.
  size_t least_bytes(int64_t tokens) const;

 private:
  friend std::pair<mlx::core::array, mlx::core::array> train_step(
      const std::shared_ptr<TrainPlan>&,
      const mlx::core::array&,
      const mlx::core::array&,
      const Segments&,
      const mlx::core::array&,
      const mlx::core::array&);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Whether the active backend has train_step.
bool has_train_step();

/// {loss, gradient}: Σ weights·loss (f32 scalar) of a packed stream and its gradient by the flat
/// parameters [count] f32. tokens, targets int32 [tokens]; weights f32 [tokens]. Tokens and targets
/// must be in range: the caller's promise, which the trainer keeps by checking its data as it
/// loads. The workspace is the plan's and grows to the longest stream seen; layers' gate and up are
/// worked out again in the backward pass as far as the plan's budget wants it.
std::pair<mlx::core::array, mlx::core::array> train_step(
    const std::shared_ptr<TrainPlan>& plan,
    const mlx::core::array& parameters,
    const mlx::core::array& tokens,
    const Segments& segments,
    const mlx::core::array& targets,
    const mlx::core::array& weights);

}  // namespace metal_lora::ops
