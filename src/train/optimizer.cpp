// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/optimizer.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include <cmath>

#include "metal_lora/ops.h"

namespace metal_lora::train {

namespace mx = mlx::core;

Optimizer::Optimizer(
    std::string name, const OptimizerConfig& settings, double grad_clip, mx::array param)
    : name_(std::move(name)),
      settings_(settings),
      grad_clip_(grad_clip),
      param_(std::move(param)),
      m_(mx::zeros(param_.shape(), mx::float32)),
      v_(mx::zeros(name_ == "sgd" ? mx::Shape{0} : param_.shape(), mx::float32)) {
  mx::eval(param_, m_, v_);
}

Optimizer::StepResult Optimizer::step(mx::array grad, double grad_scale, double learning_rate) {
  const StepResult result = name_ == "sgd" ? sgd_step(grad, grad_scale, learning_rate)
                                           : adam_step(grad, grad_scale, learning_rate);
  if (!result.skipped) ++updates_;
  return result;
}

Optimizer::StepResult Optimizer::adam_step(
    const mx::array& grad, double grad_scale, double learning_rate) {
  AdamWParams params;
  params.count = param_.size();
  params.learning_rate = static_cast<float>(learning_rate);
  params.beta1 = static_cast<float>(settings_.beta1);
  params.beta2 = static_cast<float>(settings_.beta2);
  params.eps = static_cast<float>(settings_.eps);
  params.weight_decay = static_cast<float>(settings_.weight_decay);
  params.step = static_cast<uint64_t>(updates_) + 1;
  params.bias_correction = settings_.bias_correction;
  params.clip_norm = static_cast<float>(grad_clip_);
  params.grad_scale = static_cast<float>(grad_scale);
  ops::AdamWOutput out = ops::adamw(param_, grad, m_, v_, params);
  // Letting go of the old arrays before evaluation lets the kernel work in place.
  param_ = out.param;
  m_ = out.m;
  v_ = out.v;
  mx::eval(param_, m_, v_, out.grad_norm, out.skipped);
  return {static_cast<double>(out.grad_norm.item<float>()), out.skipped.item<int32_t>() != 0};
}

Optimizer::StepResult Optimizer::sgd_step(
    const mx::array& grad, double grad_scale, double learning_rate) {
  mx::array g = mx::multiply(grad, mx::array(static_cast<float>(grad_scale)));
  const mx::array norm_array = mx::sqrt(mx::sum(mx::square(g)));
  const mx::array finite = mx::all(mx::isfinite(g));
  mx::eval(g, norm_array, finite);
  const double norm = static_cast<double>(norm_array.item<float>());
  // A finite gradient may still overflow the sum of squares; clipping by it would zero the step.
  if (!finite.item<bool>() || !std::isfinite(norm)) return {norm, true};
  if (grad_clip_ > 0.0 && norm > grad_clip_) {
    g = mx::multiply(g, mx::array(static_cast<float>(grad_clip_ / (norm + 1e-6))));
  }
  if (settings_.weight_decay != 0.0) {
    g = mx::add(g, mx::multiply(param_, mx::array(static_cast<float>(settings_.weight_decay))));
  }
  mx::array update = g;
  if (settings_.momentum > 0.0) {
    const mx::array momentum(static_cast<float>(settings_.momentum));
    const mx::array share(
        static_cast<float>(settings_.dampening > 0.0 ? 1.0 - settings_.dampening : 1.0));
    m_ = mx::add(mx::multiply(m_, momentum), mx::multiply(g, share));
    update = settings_.nesterov ? mx::add(g, mx::multiply(momentum, m_)) : m_;
  }
  param_ = mx::subtract(param_, mx::multiply(update, mx::array(static_cast<float>(learning_rate))));
  mx::eval(param_, m_);
  return {norm, false};
}

void Optimizer::restore(mx::array param, mx::array m, mx::array v, int64_t updates) {
  if (param.shape() != param_.shape() || m.shape() != m_.shape() || v.shape() != v_.shape()) {
    throw Error(
        ErrorCode::invalid_input, "[resume] saved weights and moments must fit the adapter");
  }
  param_ = std::move(param);
  m_ = std::move(m);
  v_ = std::move(v);
  updates_ = updates;
}

}  // namespace metal_lora::train
