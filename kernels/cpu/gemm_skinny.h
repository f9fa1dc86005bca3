// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Products with a handful of columns (an adapter's rank), one packed row panel at a time: they
// ride on the packing of the panel, while it is in the second-level cache. Internal to kernels/cpu.
#pragma once

#include "kernels/cpu/gemm_driver.h"

namespace metal_lora::cpu {

/// An adapter matrix as B panels over the whole of k.
struct SkinnyColumns {
  uint32_t columns = 0;
  uint32_t k = 0;
  uint32_t* panels = nullptr;
};

/// Words of 4 bytes that the panels of such a matrix take.
size_t skinny_words(Compute compute, uint32_t columns, uint32_t k);

/// Packs B (see pack_columns) into `panels`, which has skinny_words of room.
SkinnyColumns pack_skinny(
    const GemmKernels& kernels, const Columns& b, uint32_t columns, uint32_t k, uint32_t* panels);

/// sums[height, ld] = A panel · B; ld ≥ columns rounded up to 16. In blocks of kBlockSteps.
void skinny_product(
    const GemmKernels& kernels,
    uint32_t height,
    const uint32_t* a_panel,
    const SkinnyColumns& b,
    float* sums,
    size_t ld);

/// Packs scale · values[rows, columns] (row stride ld) into a panel of `height` rows; values are
/// scaled in place.
void pack_scaled(
    const GemmKernels& kernels,
    float scale,
    float* values,
    size_t ld,
    uint32_t rows,
    uint32_t height,
    uint32_t columns,
    uint32_t* panel);

/// The mask of an adapter's dropout.
DropMask drop_mask(const LoraParams& lora);

}  // namespace metal_lora::cpu
