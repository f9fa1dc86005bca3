// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The per-instruction-set part of the matrix product: a table of small functions over packed
// panels. gemm_driver.h builds every product of the library from them. Internal to kernels/cpu.
//
// A panel holds `width` rows (or columns) of an operand, k-major: panel[step * width + i]. One
// step is four bytes: one f32, or two neighbouring bf16 of k (low half first; an odd k ends in a
// zero). So both compute types share the layout and the transposes.
#pragma once

#include "kernels/cpu/lora_kernels.h"

namespace metal_lora::cpu {

/// What products are multiplied in. Sums are f32 in both.
enum class Compute : uint32_t { f32 = 0, bf16 = 1 };

constexpr uint32_t steps_of(Compute compute, uint32_t k) {
  return compute == Compute::bf16 ? (k + 1) / 2 : k;
}

/// Columns of a B panel, whatever the vector length: one block of weights packed for the CPU
/// (lora_quantized_panel.h) dequantises straight into it.
inline constexpr uint32_t kPanelColumns = 16;

/// One stretch of k: `steps` steps of an A panel (width = the tile's rows) and of one or two B
/// panels, the second b_stride steps of 16 lanes after the first.
struct PanelRun {
  const void* a;
  const void* b;
  size_t b_stride;
  uint32_t steps;
};

/// A row of an affine or NF4 weight (row_major format) that one call reads.
struct AffineRow {
  const uint32_t* words;
  const void* scales;
  const void* biases;  ///< null: NF4, whose codes stand for levels
  DType scales_dtype;
  uint32_t bits;
  uint32_t group_size;
};

/// Dropout of one adapter input: element (token, column) is kept iff its hash ≥ threshold, and
/// then multiplied by `keep_scale` = 1/(1-p).
struct DropMask {
  uint64_t seed = 0;
  uint32_t threshold = 0;  ///< p · 2³²
  float keep_scale = 1.0f;
};

struct GemmKernels {
  Compute compute;
  uint32_t max_rows;    ///< of a tile
  uint32_t max_panels;  ///< of a tile: 1 or 2

  /// C[rows, panels · 16] (row stride ldc) = (accumulate ? C : 0) + Σ_runs A·B, each element's
  /// sum in the order of k.
  void (*tile)(
      uint32_t rows,
      uint32_t panels,
      const PanelRun* runs,
      uint32_t count,
      float* c,
      size_t ldc,
      bool accumulate);

  /// count elements -> the compute type (to bf16: nearest, ties to even).
  void (*load)(DType from, const void* source, size_t count, void* out);
  /// Columns [column0, column0 + count) of an affine row -> the compute type. column0 % 32 == 0.
  void (*load_affine)(const AffineRow& row, uint32_t column0, uint32_t count, void* out);
  /// Sixteen rows of a cpu_packed weight (rows 16·panel …), k in [k0, k1), multiples of 8, as one
  /// B panel [steps][16] …
  void (*load_packed)(const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, void* out);
  /// … or as elements [k1 - k0][16], rows running fastest.
  void (*load_packed_across)(
      const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, void* out);
  /// f32 -> any storage type.
  void (*store)(DType to, const float* source, size_t count, void* out);
  /// out = acc + bias + residual, each null or as stated, in `dtype`.
  void (*finish_row)(
      DType dtype,
      const float* acc,
      size_t count,
      const float* bias,
      const void* residual,
      void* out);
  /// Source rows run along k: panel[step, i] = source[i, step], `rows` of them, zeros up to width.
  /// ld in elements of the compute type; k in elements.
  void (*pack_transposed)(
      const void* source, size_t ld, uint32_t rows, uint32_t width, uint32_t k, void* panel);
  /// Source rows run along the panel's width: panel[step, i] = source[step, i].
  void (*pack_straight)(
      const void* source, size_t ld, uint32_t columns, uint32_t width, uint32_t k, void* panel);
  /// values[i] *= keep(token, column0 + i) ? keep_scale : 0.
  void (*drop)(
      const DropMask& mask, uint32_t token, uint32_t column0, uint32_t count, float* values);
};

/// The table for active_isa(). bf16 only where has_bf16_multiply().
const GemmKernels& gemm_kernels(Compute compute);
bool has_bf16_multiply();

// One per instruction set; null where this build has none.
const GemmKernels* gemm_kernels_scalar();
const GemmKernels* gemm_kernels_avx2();
const GemmKernels* gemm_kernels_avx512();
const GemmKernels* gemm_kernels_avx512_bf16();
const GemmKernels* gemm_kernels_neon();

}  // namespace metal_lora::cpu
