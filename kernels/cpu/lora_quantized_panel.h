// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The cpu_packed form of affine weights and the inline panel dequantisation of the tiled GEMM.
//
// 16 rows of W make a panel, panels follow each other. A panel is one block per group of k:
//   scales[16] | biases[16] (in scales_dtype) | data, 64-byte steps of one dword per row:
//   int4: a step holds 8 k. Low word: nibbles k0 k2 k4 k6; high word: k1 k3 k5 k7.
//   int8: a step holds 4 k. Low word: bytes k0 k2; high word: k1 k3.
//   nf4: as int4; the scales are absmax, f32, and there are no biases.
// So the two halves of a dword, shifted alike, are a pair (k, k+1) as bf16 dot products want it,
// and a dword shifted by 4·j (8·j) is one k as f32 code wants it. Every block is a multiple of
// 64 bytes when scales are f32 and group_size ≥ 32, and for 16-bit scales too; one panel is one
// sequential stream of exactly the row_major bytes.
#pragma once

#include "kernels/cpu/gemv_simd.h"
#include "kernels/cpu/lora_kernels.h"

namespace metal_lora::cpu {

inline constexpr uint32_t kPanelRows = 16;
inline constexpr size_t kPanelStepBytes = 64;

/// Byte geometry of a cpu_packed weight.
struct PanelGeometry {
  uint32_t groups = 0;      ///< blocks of a panel
  uint32_t step_k = 0;      ///< k values of a 64-byte step: 8 (int4, nf4) or 4 (int8)
  size_t scales_bytes = 0;  ///< of the 16 scales of a block
  size_t data_offset = 0;   ///< where the steps start: past the scales and the biases, if any
  size_t block_bytes = 0;
  size_t panel_bytes = 0;
};

constexpr PanelGeometry panel_geometry(const WeightParams& p) {
  PanelGeometry g;
  g.groups = p.k / p.group_size;
  g.step_k = p.format == WeightFormat::int8 ? 4 : 8;
  g.scales_bytes = kPanelRows * (p.scales_dtype == DType::f32 ? 4 : 2);
  g.data_offset = p.format == WeightFormat::nf4 ? g.scales_bytes : 2 * g.scales_bytes;
  g.block_bytes = g.data_offset + p.group_size / g.step_k * kPanelStepBytes;
  g.panel_bytes = g.block_bytes * g.groups;
  return g;
}

// The functions below are compiled anew for each instruction set (their own namespace each), so
// call them only from a file built for the instruction set that runs.
namespace METAL_LORA_SIMD_NS {

/// Scales or biases of the 16 rows of a block as f32.
inline V16 load_panel_scales(const uint8_t* p, DType dtype) {
  if (dtype == DType::f16) return load_f16(reinterpret_cast<const uint16_t*>(p));
  if (dtype == DType::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p));
  return load(reinterpret_cast<const float*>(p));
}

/// The pairs (k, k+1) of one 64-byte step of 4-bit codes, in order: value(codes) turns the low
/// nibble of each dword into the 16 rows' weights.
template <class Value, class Emit>
inline void emit_nibble_step(const I16& v, uint32_t k, const Value& value, Emit& emit) {
  emit(k, value(v), value(shift_right<16>(v)));
  emit(k + 2, value(shift_right<4>(v)), value(shift_right<20>(v)));
  emit(k + 4, value(shift_right<8>(v)), value(shift_right<24>(v)));
  emit(k + 6, value(shift_right<12>(v)), value(shift_right<28>(v)));
}

/// Calls emit(k, even, odd) for pairs (k, k+1) of [k0, k1) in order; even and odd hold the 16 rows'
/// weights: fma(q, scale, bias), nf4: level[q]·absmax. k0 and k1: multiples of 8, k1 ≤ params.k.
template <class Emit>
inline void for_each_panel_pair(
    const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, Emit&& emit) {
  const PanelGeometry g = panel_geometry(w.params);
  const uint8_t* base = static_cast<const uint8_t*>(w.data) + panel * g.panel_bytes;
  const uint32_t group_size = w.params.group_size;
  for (uint32_t k = k0; k < k1;) {
    const uint32_t group = k / group_size;
    const uint8_t* block = base + group * g.block_bytes;
    const V16 scale = load_panel_scales(block, w.params.scales_dtype);
    const uint8_t* step =
        block + g.data_offset + (k - group * group_size) / g.step_k * kPanelStepBytes;
    const uint32_t end = (group + 1) * group_size < k1 ? (group + 1) * group_size : k1;
    if (w.params.format == WeightFormat::nf4) {
      const auto value = [&](const I16& v) { return mul(nf4_level(v), scale); };
      for (; k < end; k += 8, step += kPanelStepBytes) {
        emit_nibble_step(load_int(step), k, value, emit);
      }
      continue;
    }
    const V16 bias = load_panel_scales(block + g.scales_bytes, w.params.scales_dtype);
    if (w.params.format == WeightFormat::int4) {
      const auto value = [&](const I16& v) { return fma(low_nibble(v), scale, bias); };
      for (; k < end; k += 8, step += kPanelStepBytes) {
        emit_nibble_step(load_int(step), k, value, emit);
      }
    } else {
      const auto value = [&](const I16& v) { return fma(low_byte(v), scale, bias); };
      for (; k < end; k += 4, step += kPanelStepBytes) {
        const I16 v = load_int(step);
        emit(k, value(v), value(shift_right<16>(v)));
        emit(k + 2, value(shift_right<8>(v)), value(shift_right<24>(v)));
      }
    }
  }
}

/// out[(k - k0)·16 + row] = W[16·panel + row, k] as f32 for k in [k0, k1); k0, k1 multiples of 8.
inline void dequantize_panel_f32(
    const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, float* out) {
  for_each_panel_pair(w, panel, k0, k1, [&](uint32_t k, V16 even, V16 odd) {
    store(out + size_t{k - k0} * 16, even);
    store(out + size_t{k - k0} * 16 + 16, odd);
  });
}

/// out[((k - k0)/2·16 + row)·2 + (k & 1)] = bf16 (nearest even) of the same f32 values: rows'
/// pairs (k, k+1) side by side as a bf16 dot product reads them; k0, k1 multiples of 8.
inline void dequantize_panel_bf16(
    const WeightView& w, uint32_t panel, uint32_t k0, uint32_t k1, uint16_t* out) {
  for_each_panel_pair(w, panel, k0, k1, [&](uint32_t k, V16 even, V16 odd) {
    store_bf16_pairs(out + size_t{k - k0} * 16, even, odd);
  });
}

}  // namespace METAL_LORA_SIMD_NS
}  // namespace metal_lora::cpu
