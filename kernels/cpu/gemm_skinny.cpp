// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm_skinny.h"

#include <algorithm>
#include <array>

namespace metal_lora::cpu {
namespace {

constexpr uint32_t panels_of(uint32_t columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns;
}

}  // namespace

size_t skinny_words(Compute compute, uint32_t columns, uint32_t k) {
  return size_t{panels_of(columns)} * steps_of(compute, k) * kPanelColumns;
}

SkinnyColumns pack_skinny(
    const GemmKernels& kernels, const Columns& b, uint32_t columns, uint32_t k, uint32_t* panels) {
  pack_columns(kernels, b, 0, k, 0, columns, panels);
  return {columns, k, panels};
}

void skinny_product(
    const GemmKernels& kernels,
    uint32_t height,
    const uint32_t* a_panel,
    const SkinnyColumns& b,
    float* sums,
    size_t ld) {
  const uint32_t steps = steps_of(kernels.compute, b.k), panels = panels_of(b.columns);
  if (steps == 0) {
    for (uint32_t i = 0; i < height; ++i) std::fill_n(sums + i * ld, b.columns, 0.0f);
    return;
  }
  for (uint32_t s = 0; s < steps; s += kBlockSteps) {
    const uint32_t count = std::min(kBlockSteps, steps - s);
    for (uint32_t p = 0; p < panels; p += kernels.max_panels) {
      const PanelRun run = {
          a_panel + size_t{s} * height,
          b.panels + (size_t{p} * steps + s) * kPanelColumns,
          steps,
          count};
      const uint32_t wide = std::min(kernels.max_panels, panels - p);
      kernels.tile(height, wide, &run, 1, sums + p * kPanelColumns, ld, s != 0);
    }
  }
}

void pack_scaled(
    const GemmKernels& kernels,
    float scale,
    float* values,
    size_t ld,
    uint32_t rows,
    uint32_t height,
    uint32_t columns,
    uint32_t* panel) {
  constexpr uint32_t kStrip = 64;
  const size_t size = kernels.compute == Compute::bf16 ? 2 : 4;
  alignas(64) std::array<char, 16 * kStrip * 4> strip;
  for (uint32_t c = 0; c < columns; c += kStrip) {
    const uint32_t count = std::min(kStrip, columns - c);
    for (uint32_t i = 0; i < rows; ++i) {
      float* row = values + i * ld + c;
      for (uint32_t j = 0; j < count; ++j) row[j] *= scale;
      kernels.load(DType::f32, row, count, strip.data() + i * kStrip * size);
    }
    kernels.pack_transposed(
        strip.data(),
        kStrip,
        rows,
        height,
        count,
        panel + size_t{steps_of(kernels.compute, c)} * height);
  }
}

DropMask drop_mask(const LoraParams& lora) {
  DropMask mask;
  mask.seed = lora.dropout_seed;
  mask.threshold = static_cast<uint32_t>(
      std::min(4294967295.0, static_cast<double>(lora.dropout) * 4294967296.0));
  mask.keep_scale = lora.dropout < 1.0f ? 1.0f / (1.0f - lora.dropout) : 0.0f;
  return mask;
}

}  // namespace metal_lora::cpu
