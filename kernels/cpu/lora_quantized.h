// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cpu/lora_kernels.h"

namespace metal_lora::cpu {

/// Whether a row_major weight of these params has a cpu_packed form that pays (today: int4, int8
/// and nf4 with n a multiple of 16).
bool can_pack(const WeightParams& params);
/// Bytes of the cpu_packed form; ≤ the row_major form's data + scales + biases, rounded up to 64.
size_t packed_weight_bytes(const WeightParams& params);
/// row_major -> cpu_packed, bit-exact (unpack_weight gives the same row_major bits back, except
/// that a double-quantised absmax is packed as the f32 that it stands for: the packed params have
/// double_quant = false). nf4 has no biases: unpack_weight writes none.
void pack_weight(const WeightView& row_major, void* packed);
void unpack_weight(const WeightView& packed, void* data, void* scales, void* biases);

/// W as f32 [rows, k] for rows row0 … row0+rows-1, from any format and layout.
void dequantize_rows(const WeightView& w, uint32_t row0, uint32_t rows, float* out);

/// Entries absmax[first …] of an NF4 weight, row_major.
void nf4_absmax(const WeightView& w, size_t first, size_t count, float* out);

/// NF4 quantisation as bitsandbytes does it: per block of 64 the largest magnitude, then the level
/// nearest to x/absmax (a tie goes to the lower one). x f32 [n, k] finite; writes data, scales and,
/// where params.double_quant, biases of a row_major weight.
void quantize_nf4(const WeightParams& params, const float* x, void* data, void* scales, void* biases);

/// Affine quantisation as mx::quantize does it (min/max per group, the edge of larger magnitude
/// exact). x f32 [n, k]; writes data, scales and biases of a row_major weight of `params`.
void quantize_affine(
    const WeightParams& params, const float* x, void* data, void* scales, void* biases);

}  // namespace metal_lora::cpu
