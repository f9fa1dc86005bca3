// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What gemv.cpp and decode.cpp call, one table per instruction set. Nothing here uses the thread
// pool or allocates.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/cpu/lora_quantized_panel.h"

namespace metal_lora::cpu {

/// absmax i of a row_major NF4 weight. The double-quantised form is rounded twice, not fused, in
/// every instruction set, so it has one definition. (static: as in gemv_convert.h.)
float nested_nf4_absmax(const WeightView& w, size_t i);
[[maybe_unused]] static inline float nf4_absmax(const WeightView& w, size_t i) {
  return w.params.double_quant ? nested_nf4_absmax(w, i) : static_cast<const float*>(w.scales)[i];
}

/// Tokens' inputs of a linear, in the forms that the kernels read.
struct GemvInput {
  uint32_t m = 0;  ///< tokens, 1 … kGemvMaxTokens
  uint32_t k = 0;
  const float* f32 = nullptr;      ///< [m, k], the values of x exactly
  const uint16_t* bf16 = nullptr;  ///< [m, k], null unless x is bf16
  const float* sums = nullptr;     ///< [m, k / 32] sums of 32 values; null unless 32 divides k
};

struct GemvKernels {
  /// acc[t·16 + r] = W[row0 + r]·x_t for r < rows ≤ 16, row0 a multiple of 16; other r: any value.
  void (*panel)(const WeightView& w, const GemvInput& in, uint32_t row0, uint32_t rows, float* acc);
  /// acc[t·16 + r] += scale · B[row0 + r]·u_t, u [m, rank] f32.
  void (*expand)(
      const LoraView& lora, uint32_t m, const float* u, uint32_t row0, uint32_t rows, float* acc);
  /// f32 [count] = x [count] of dtype; sums as in GemvInput.
  void (*widen)(size_t count, DType dtype, const void* x, float* f32);
  void (*sums)(uint32_t m, uint32_t k, const float* f32, float* sums);
  /// out [rows, k] f32 from W.
  void (*dequantize_rows)(const WeightView& w, uint32_t row0, uint32_t rows, float* out);
  /// dequantize_panel_bf16 of a cpu_packed weight.
  void (*panel_bf16)(const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, uint16_t* out);
};

const GemvKernels& gemv_kernels_scalar();
#if defined(__x86_64__)
const GemvKernels& gemv_kernels_avx2();
const GemvKernels& gemv_kernels_avx512();
const GemvKernels& gemv_kernels_avx512_bf16();
#elif defined(__aarch64__)
const GemvKernels& gemv_kernels_neon();
#endif

/// The table of the active instruction set.
const GemvKernels& gemv_kernels();

}  // namespace metal_lora::cpu
