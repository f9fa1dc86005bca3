// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <mlx/array.h>

#include <cstdint>
#include <string>

#include "metal_lora/train.h"

namespace metal_lora::train {

/// AdamW (Loshchilov and Hutter 2019), Adam (Kingma and Ba 2015) or SGD with momentum, over one
/// flat f32 buffer. A gradient that is not finite changes nothing, moments and step count included.
class Optimizer {
 public:
  /// `param` f32 [count]; moments start at zero.
  Optimizer(
      std::string name, const OptimizerConfig& settings, double grad_clip, mlx::core::array param);

  struct StepResult {
    double grad_norm = 0.0;  ///< of grad · grad_scale, before clipping
    bool skipped = false;
  };
  /// Evaluates. grad f32 [count] is multiplied by grad_scale first.
  StepResult step(mlx::core::array grad, double grad_scale, double learning_rate);

  const mlx::core::array& param() const { return param_; }
  const mlx::core::array& first_moment() const { return m_; }
  /// Empty for SGD.
  const mlx::core::array& second_moment() const { return v_; }
  /// Steps that changed the parameters.
  int64_t updates() const { return updates_; }
  /// Takes a saved state; shapes must be those of this one.
  void restore(mlx::core::array param, mlx::core::array m, mlx::core::array v, int64_t updates);

 private:
  StepResult adam_step(const mlx::core::array& grad, double grad_scale, double learning_rate);
  StepResult sgd_step(const mlx::core::array& grad, double grad_scale, double learning_rate);

  std::string name_;
  OptimizerConfig settings_;
  double grad_clip_;
  mlx::core::array param_, m_, v_;
  int64_t updates_ = 0;
};

}  // namespace metal_lora::train
