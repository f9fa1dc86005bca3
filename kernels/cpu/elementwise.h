// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Single-threaded loops of the memory-bound kernels, one set per instruction set. The entries of
// transformer_kernels.h and transformer_inline.h choose a set with elementwise() and add threads.
#pragma once

#include "kernels/cpu/transformer_inline.h"

namespace metal_lora::cpu {

struct Elementwise {
  void (*convert)(size_t n, DType x_dtype, const void* x, DType y_dtype, void* y);
  void (*rms_norm)(
      uint32_t dims,
      float eps,
      const float* x,
      DType weight_dtype,
      const void* weight,
      DType y_dtype,
      void* y);
  /// One row; residual and h may be null. With a residual, h is rounded to dtype before the norm,
  /// so that the backward pass, which starts from the stored h, sees the same numbers.
  void (*add_rms_norm)(
      const NormParams& p,
      const void* x,
      const void* residual,
      const void* weight,
      void* h,
      void* y);
  /// One row; dweight_sum [dims] is added to, or null.
  void (*add_rms_norm_backward)(
      const NormParams& p,
      const void* h,
      const void* weight,
      const void* dy,
      const void* dh,
      void* dx,
      float* dweight_sum);
  void (*rope_head)(
      uint32_t head_dim,
      const float* cos_sin,
      bool inverse,
      DType x_dtype,
      const void* x,
      DType y_dtype,
      void* y);
  void (*swiglu)(size_t n, DType x_dtype, const void* gate, const void* up, DType y_dtype, void* y);
  void (*swiglu_backward)(
      size_t n,
      DType dtype,
      const void* gate,
      const void* up,
      const void* dy,
      void* dgate,
      void* dup);
  void (*add_in_place)(size_t n, const float* x, float* sum);
  float (*logsumexp)(size_t n, const float* logits);
  /// d[i] = weight·(exp(logits[i] - logsumexp) - (i == target)), written over the logits: as f32,
  /// or as bf16 into the first half of the row's bytes.
  void (*softmax_gradient)(
      size_t n, float logsumexp, float weight, size_t target, bool to_bf16, float* logits);
  double (*sum_of_squares)(size_t n, const float* x);
  /// The coefficients of one AdamW step, the same for every element.
  struct AdamWStep {
    float grad_factor;  ///< grad_scale · clipping
    float beta1, beta2;
    float keep;            ///< 1 - learning_rate · weight_decay
    float step_size;       ///< learning_rate / (1 - beta1^t)
    float inv_sqrt_bias2;  ///< 1 / sqrt(1 - beta2^t)
    float eps;
  };
  void (*adamw)(size_t n, const AdamWStep& s, float* param, const float* grad, float* m, float* v);
  decltype(&metal_lora::cpu::attend_keys) attend_keys;
  decltype(&metal_lora::cpu::combine_attention) combine_attention;
};

/// The set of active_isa().
const Elementwise& elementwise();

}  // namespace metal_lora::cpu
