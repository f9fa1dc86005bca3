// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The operations once more in plain MLX, f32 throughout and rounded once at the end: what tests
// compare with, and what jvp and vmap fall back to.
#include <cmath>
#include <limits>

#include <mlx/ops.h>

#include "metal_lora/ops.h"
#include "src/ops/checks.h"

namespace mx = mlx::core;

namespace metal_lora::ops::reference {
namespace {

mx::array f32(const mx::array& a) {
  return mx::astype(a, mx::float32);
}

}  // namespace

mx::array lora_linear(const mx::array& x, const LoraLinear& linear) {
  auto y = mx::matmul(f32(x), mx::transpose(linear.weight.dequantized()));
  if (linear.bias) y = mx::add(y, *linear.bias);
  if (linear.lora) {
    const auto& lora = *linear.lora;
    if (lora.dropout > 0.0f) {
      throw Error(
          ErrorCode::unsupported,
          "[lora_linear] the plain-MLX reference has no dropout: its masks belong to the kernels");
    }
    auto u = mx::matmul(f32(x), mx::transpose(f32(lora.a)));
    y = mx::add(y, mx::multiply(mx::array(lora.scale), mx::matmul(u, mx::transpose(f32(lora.b)))));
  }
  return mx::astype(y, x.dtype());
}

mx::array lora_embedding(const mx::array& ids, const LoraLinear& table, mx::Dtype dtype) {
  auto y = mx::take(table.weight.dequantized(), ids, 0);
  if (table.lora) {
    const auto& lora = *table.lora;
    auto u = mx::take(mx::transpose(f32(lora.a)), ids, 0);
    y = mx::add(y, mx::multiply(mx::array(lora.scale), mx::matmul(u, mx::transpose(f32(lora.b)))));
  }
  return mx::astype(y, dtype);
}

mx::array attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& segment_start,
    float scale,
    int window) {
  const int tokens = q.shape(0), repeats = q.shape(1) / k.shape(1);
  auto heads_first = [](const mx::array& a) { return mx::transpose(f32(a), {1, 0, 2}); };
  auto keys = mx::repeat(heads_first(k), repeats, 0);
  auto values = mx::repeat(heads_first(v), repeats, 0);
  auto scores =
      mx::multiply(mx::array(scale), mx::matmul(heads_first(q), mx::transpose(keys, {0, 2, 1})));
  auto i = mx::reshape(mx::arange(tokens, mx::int32), {tokens, 1});
  auto j = mx::reshape(mx::arange(tokens, mx::int32), {1, tokens});
  auto first = mx::reshape(segment_start, {tokens, 1});
  if (window > 0) first = mx::maximum(first, mx::subtract(i, mx::array(window - 1)));
  auto visible = mx::logical_and(mx::less_equal(j, i), mx::greater_equal(j, first));
  scores = mx::where(visible, scores, mx::array(-std::numeric_limits<float>::infinity()));
  auto out = mx::matmul(mx::softmax(scores, -1), values);
  return mx::astype(mx::transpose(out, {1, 0, 2}), q.dtype());
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  auto h = f32(x);
  auto inverse = mx::rsqrt(mx::add(mx::mean(mx::square(h), -1, true), mx::array(eps)));
  return mx::astype(mx::multiply(mx::multiply(h, inverse), f32(weight)), x.dtype());
}

mx::array rope(const mx::array& x, const mx::array& table) {
  auto cos_sin = mx::split(mx::reshape(table, {x.shape(0), 1, x.shape(2)}), 2, -1);
  auto halves = mx::split(f32(x), 2, -1);
  auto rotated = mx::concatenate(
      {mx::subtract(mx::multiply(halves[0], cos_sin[0]), mx::multiply(halves[1], cos_sin[1])),
       mx::add(mx::multiply(halves[1], cos_sin[0]), mx::multiply(halves[0], cos_sin[1]))},
      -1);
  return mx::astype(rotated, x.dtype());
}

mx::array swiglu(const mx::array& gate, const mx::array& up) {
  auto g = f32(gate);
  return mx::astype(mx::multiply(mx::multiply(g, mx::sigmoid(g)), f32(up)), gate.dtype());
}

mx::array linear_cross_entropy(
    const mx::array& x, const Weight& head, const mx::array& targets, const mx::array& weights) {
  auto logits = mx::matmul(f32(x), mx::transpose(head.dequantized()));
  auto index = mx::reshape(targets, {targets.shape(0), 1});
  auto chosen = mx::squeeze(mx::take_along_axis(logits, index, -1), -1);
  auto losses = mx::subtract(mx::logsumexp(logits, -1), chosen);
  auto counted = mx::where(
      mx::equal(weights, mx::array(0.0f)), mx::array(0.0f), mx::multiply(weights, losses));
  return mx::sum(counted);
}

AdamWOutput adamw(
    const mx::array& param,
    const mx::array& grad,
    const mx::array& m,
    const mx::array& v,
    AdamWParams p) {
  auto scalar = [](double value) { return mx::array(static_cast<float>(value)); };
  auto g = mx::multiply(grad, scalar(p.grad_scale));
  auto norm = mx::sqrt(mx::sum(mx::square(g)));
  auto finite = mx::isfinite(norm);
  if (p.clip_norm > 0.0f) {
    auto factor =
        mx::minimum(scalar(1.0), mx::divide(scalar(p.clip_norm), mx::add(norm, scalar(1e-6))));
    g = mx::multiply(g, factor);
  }
  auto m1 = mx::add(mx::multiply(scalar(p.beta1), m), mx::multiply(scalar(1.0 - p.beta1), g));
  auto v1 =
      mx::add(mx::multiply(scalar(p.beta2), v), mx::multiply(scalar(1.0 - p.beta2), mx::square(g)));
  const double step = static_cast<double>(p.step);
  const double c1 = p.bias_correction ? 1.0 - std::pow(static_cast<double>(p.beta1), step) : 1.0;
  const double c2 = p.bias_correction ? 1.0 - std::pow(static_cast<double>(p.beta2), step) : 1.0;
  auto update = mx::divide(
      mx::divide(m1, scalar(c1)), mx::add(mx::sqrt(mx::divide(v1, scalar(c2))), scalar(p.eps)));
  auto decayed =
      mx::multiply(param, scalar(1.0 - static_cast<double>(p.learning_rate) * p.weight_decay));
  auto param1 = mx::subtract(decayed, mx::multiply(scalar(p.learning_rate), update));
  return {
      mx::where(finite, param1, param),
      mx::where(finite, m1, m),
      mx::where(finite, v1, v),
      norm,
      mx::astype(mx::logical_not(finite), mx::int32)};
}

}  // namespace metal_lora::ops::reference
