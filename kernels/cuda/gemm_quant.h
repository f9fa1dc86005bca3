// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The LoRA product straight from 4-bit codes, for token counts at which W's bytes or a 16-bit copy
// of W weigh more than the product: y = x·Wᵀ + u·Bᵀ + bias + residual.
#pragma once

#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {

/// x [m, k] contiguous; u [m, rank] with the scale inside and B [n, rank] of x's type, rank 0:
/// neither; y and residual [m, n].
struct QuantizedProduct {
  uint32_t m = 0;
  DType dtype = DType::bf16;
  const void* x = nullptr;
  WeightView w;
  uint32_t rank = 0;
  const void* u = nullptr;
  size_t u_stride = 0;
  const void* b = nullptr;
  size_t b_stride = 0;
  const float* bias = nullptr;
  const void* residual = nullptr;
  void* y = nullptr;
};

/// Whether gemm_quantized takes the weight at all: capability 9.0, 16-bit x, int4 in groups of 64
/// or 128 or nf4, n a multiple of 8, every pointer aligned to 16 bytes.
bool can_gemm_quantized(const Context& context, const QuantizedProduct& product);
/// Whether it is faster there than a 16-bit copy of W and the product over that.
bool prefers_gemm_quantized(const Context& context, const QuantizedProduct& product);
/// Weights are each format's formula in f32 rounded once to x's type (int4: of f32 scales within
/// 2^-16 of the scale), sums f32 in a fixed order.
void gemm_quantized(const Context& context, const QuantizedProduct& product);

namespace quant {
/// How the work is divided: tokens of a block (32, 64, 128, 256) and blocks of a cluster that split
/// k (1 … 8).
struct Form {
  uint32_t tokens = 0, splits = 1;
};
/// For the bench and the tests.
bool form_fits(const QuantizedProduct& product, const Form& form);
Form chosen_form(const Context& context, const QuantizedProduct& product);
void gemm_with_form(const Context& context, const QuantizedProduct& product, const Form& form);
}  // namespace quant

}  // namespace metal_lora::cuda
