// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/lora_quantized.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/gemv_kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

/// Where value i (of step_k) of a row sits in its dword of a packed step.
uint32_t packed_shift(WeightFormat format, uint32_t i) {
  const uint32_t bits = format == WeightFormat::int8 ? 8 : 4;
  return (i & 1) * 16 + (i >> 1) * bits;
}

/// Runs fn(row) for all rows, in chunks worth a thread.
template <class F>
void for_rows(uint32_t rows, F fn) {
  constexpr uint32_t kRows = 16;
  parallel_for((rows + kRows - 1) / kRows, [&](size_t chunk) {
    const uint32_t first = static_cast<uint32_t>(chunk) * kRows;
    for (uint32_t r = first; r < std::min(rows, first + kRows); ++r) fn(r);
  });
}

void copy_scale(const WeightParams& p, const void* from, size_t from_i, void* to, size_t to_i) {
  const size_t bytes = dtype_bytes(p.scales_dtype);
  std::memcpy(
      static_cast<char*>(to) + to_i * bytes,
      static_cast<const char*>(from) + from_i * bytes,
      bytes);
}

}  // namespace

bool can_pack(const WeightParams& p) {
  const bool nf4 = p.format == WeightFormat::nf4;
  const bool affine = p.format == WeightFormat::int4 || p.format == WeightFormat::int8;
  const bool grouped = nf4 ? p.group_size == kNf4Block
                           : p.group_size == 32 || p.group_size == 64 || p.group_size == 128;
  return (affine || nf4) && grouped && p.n > 0 && p.n % kPanelRows == 0 && p.k > 0 &&
         p.k % p.group_size == 0;
}

size_t packed_weight_bytes(const WeightParams& p) {
  return panel_geometry(p).panel_bytes * (p.n / kPanelRows);
}

void pack_weight(const WeightView& w, void* packed) {
  const WeightParams& p = w.params;
  const PanelGeometry g = panel_geometry(p);
  const uint32_t bits = 32 / g.step_k, mask = (1u << bits) - 1;
  const size_t row_words = p.k / g.step_k;
  for_rows(p.n / kPanelRows, [&](uint32_t panel) {
    uint8_t* block = static_cast<uint8_t*>(packed) + panel * g.panel_bytes;
    for (uint32_t group = 0; group < g.groups; ++group, block += g.block_bytes) {
      for (uint32_t r = 0; r < kPanelRows; ++r) {
        const size_t row = size_t{panel} * kPanelRows + r;
        if (p.format == WeightFormat::nf4) {
          const float absmax = nf4_absmax(w, row * g.groups + group);
          std::memcpy(block + r * sizeof(absmax), &absmax, sizeof(absmax));
        } else {
          copy_scale(p, w.scales, row * g.groups + group, block, r);
          copy_scale(p, w.biases, row * g.groups + group, block + g.scales_bytes, r);
        }
        const uint32_t* words = static_cast<const uint32_t*>(w.data) + row * row_words +
                                group * (p.group_size / g.step_k);
        uint8_t* to = block + g.data_offset + r * sizeof(uint32_t);
        for (uint32_t s = 0; s < p.group_size / g.step_k; ++s, to += kPanelStepBytes) {
          uint32_t out = 0;
          for (uint32_t i = 0; i < g.step_k; ++i) {
            out |= (words[s] >> (i * bits) & mask) << packed_shift(p.format, i);
          }
          std::memcpy(to, &out, sizeof(out));
        }
      }
    }
  });
}

void unpack_weight(const WeightView& w, void* data, void* scales, void* biases) {
  const WeightParams& p = w.params;
  const PanelGeometry g = panel_geometry(p);
  const uint32_t bits = 32 / g.step_k, mask = (1u << bits) - 1;
  const size_t row_words = p.k / g.step_k;
  for_rows(p.n / kPanelRows, [&](uint32_t panel) {
    const uint8_t* block = static_cast<const uint8_t*>(w.data) + panel * g.panel_bytes;
    for (uint32_t group = 0; group < g.groups; ++group, block += g.block_bytes) {
      for (uint32_t r = 0; r < kPanelRows; ++r) {
        const size_t row = size_t{panel} * kPanelRows + r;
        copy_scale(p, block, r, scales, row * g.groups + group);
        if (p.format != WeightFormat::nf4) {
          copy_scale(p, block + g.scales_bytes, r, biases, row * g.groups + group);
        }
        uint32_t* words =
            static_cast<uint32_t*>(data) + row * row_words + group * (p.group_size / g.step_k);
        const uint8_t* from = block + g.data_offset + r * sizeof(uint32_t);
        for (uint32_t s = 0; s < p.group_size / g.step_k; ++s, from += kPanelStepBytes) {
          uint32_t in, out = 0;
          std::memcpy(&in, from, sizeof(in));
          for (uint32_t i = 0; i < g.step_k; ++i) {
            out |= (in >> packed_shift(p.format, i) & mask) << (i * bits);
          }
          words[s] = out;
        }
      }
    }
  });
}

void dequantize_rows(const WeightView& w, uint32_t row0, uint32_t rows, float* out) {
  const GemvKernels& kernels = gemv_kernels();
  // 64 rows a chunk, on panel boundaries: a packed panel is transposed once for its 16 rows.
  constexpr uint32_t kRows = 64;
  const uint32_t first = row0 / kRows, last = row0 + rows;
  if (rows == 0) return;
  parallel_for((last - 1) / kRows - first + 1, [&](size_t chunk) {
    const uint32_t begin = std::max(row0, (first + static_cast<uint32_t>(chunk)) * kRows);
    const uint32_t end = std::min(last, (first + static_cast<uint32_t>(chunk) + 1) * kRows);
    kernels.dequantize_rows(w, begin, end - begin, out + size_t{begin - row0} * w.params.k);
  });
}

namespace {

/// One group: scale and bias from min and max, so that the edge of larger magnitude and zero are
/// both exact (mx::quantize's affine mode).
void quantize_group(
    uint32_t size, uint32_t bins, const float* x, float* scale_out, float* bias_out, uint8_t* q) {
  constexpr float kSmallestScale = 1e-7f;
  const auto [least, greatest] = std::minmax_element(x, x + size);
  const float low = *least, high = *greatest, top = static_cast<float>(bins);
  const bool low_is_edge = std::fabs(low) > std::fabs(high);
  float scale = std::max((high - low) / top, kSmallestScale);
  if (!low_is_edge) scale = -scale;
  const float edge = low_is_edge ? low : high;
  const float q0 = std::rint(edge / scale);
  float bias = 0.0f;
  if (q0 != 0.0f) {
    scale = edge / q0;
    bias = edge;
  }
  for (uint32_t i = 0; i < size; ++i) {
    const float level = std::rint((x[i] - bias) / scale);
    q[i] = static_cast<uint8_t>(std::min(std::max(level, 0.0f), top));
  }
  *scale_out = scale;
  *bias_out = bias;
}

}  // namespace

void quantize_affine(
    const WeightParams& p, const float* x, void* data, void* scales, void* biases) {
  const bool nibbles = p.format == WeightFormat::int4;
  const uint32_t groups = p.k / p.group_size, step = nibbles ? 8 : 4, bits = 32 / step;
  for_rows(p.n, [&](uint32_t row) {
    uint32_t* words = static_cast<uint32_t*>(data) + size_t{row} * (p.k / step);
    for (uint32_t g = 0; g < groups; ++g) {
      uint8_t q[128];
      float scale, bias;
      const float* from = x + size_t{row} * p.k + size_t{g} * p.group_size;
      quantize_group(p.group_size, nibbles ? 15 : 255, from, &scale, &bias, q);
      write_float(scales, p.scales_dtype, size_t{row} * groups + g, scale);
      write_float(biases, p.scales_dtype, size_t{row} * groups + g, bias);
      for (uint32_t i = 0; i < p.group_size; i += step) {
        uint32_t word = 0;
        for (uint32_t j = 0; j < step; ++j) word |= uint32_t{q[i + j]} << (j * bits);
        *words++ = word;
      }
    }
  });
}

}  // namespace metal_lora::cpu
