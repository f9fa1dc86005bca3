// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/transformer_kernels.h"

namespace metal_lora::cpu {
namespace {

// Fixed, so that the norm's sum has the same order for any number of threads.
constexpr size_t kChunk = 65536;

double sum_of_squares(size_t count, const float* x, const Elementwise& e) {
  const size_t chunks = (count + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks);
  parallel_for(chunks, [&](size_t c) {
    partial[c] = e.sum_of_squares(std::min(kChunk, count - c * kChunk), x + c * kChunk);
  });
  double sum = 0;
  for (const double part : partial) sum += part;
  return sum;
}

}  // namespace

AdamWResult adamw(const AdamWParams& p, float* param, const float* grad, float* m, float* v) {
  const Elementwise& e = elementwise();
  // Squares of f32 stay finite in f64, so the sum is finite exactly where every gradient is.
  const double norm = std::sqrt(sum_of_squares(p.count, grad, e)) * std::fabs(double{p.grad_scale});
  const float grad_norm = static_cast<float>(norm);
  if (!std::isfinite(grad_norm)) return {.grad_norm = grad_norm, .skipped = true};

  const double clip = p.clip_norm > 0 ? std::min(1.0, p.clip_norm / (norm + 1e-6)) : 1.0;
  const double t = static_cast<double>(p.step), rate = p.learning_rate;
  const double bias1 = p.bias_correction ? 1.0 - std::pow(double{p.beta1}, t) : 1.0;
  const double bias2 = p.bias_correction ? 1.0 - std::pow(double{p.beta2}, t) : 1.0;
  const Elementwise::AdamWStep step = {
      .grad_factor = static_cast<float>(p.grad_scale * clip),
      .beta1 = p.beta1,
      .beta2 = p.beta2,
      .keep = static_cast<float>(1.0 - rate * p.weight_decay),
      .step_size = static_cast<float>(rate / bias1),
      .inv_sqrt_bias2 = static_cast<float>(1.0 / std::sqrt(bias2)),
      .eps = p.eps,
  };
  parallel_for((p.count + kChunk - 1) / kChunk, [&](size_t c) {
    const size_t o = c * kChunk;
    e.adamw(std::min<size_t>(kChunk, p.count - o), step, param + o, grad + o, m + o, v + o);
  });
  return {.grad_norm = grad_norm, .skipped = false};
}

}  // namespace metal_lora::cpu
