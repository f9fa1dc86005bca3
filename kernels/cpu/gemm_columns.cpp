// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The B side of a product: dense matrices and base weights of any format, packed into panels of 16
// columns in the compute type.
#include <algorithm>
#include <array>

#include "kernels/cpu/gemm_driver.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/nf4.h"

namespace metal_lora::cpu {
namespace {

bool is_quantized(const WeightParams& p) {
  return p.format >= WeightFormat::int4;
}

constexpr uint32_t kStripElements = 256;  // of k at a time: 16 rows stay in the first-level cache

/// Columns of a stored NF4 row; their absmax values are decoded first. count ≤ kStripElements.
void load_nf4_row(
    const GemmKernels& kernels,
    const WeightView& w,
    uint32_t row,
    uint32_t c0,
    uint32_t count,
    void* out) {
  const uint32_t skipped = c0 / kNf4Block, end = ceil_div(c0 + count, kNf4Block);
  const size_t row_block = size_t{row} * (w.params.k / kNf4Block);
  std::array<float, kStripElements / kNf4Block + 1> absmax;
  nf4_absmax(w, row_block + skipped, end - skipped, absmax.data());
  const AffineRow from = {
      static_cast<const uint32_t*>(w.data) + (row_block + skipped) * (kNf4Block / 8),
      absmax.data(),
      nullptr,
      DType::f32,
      4,
      kNf4Block};
  kernels.load_affine(from, c0 - skipped * kNf4Block, count, out);
}

/// A stored row's columns [c0, c0 + count) in the compute type.
void load_stored_row(
    const GemmKernels& kernels,
    const WeightView& w,
    uint32_t row,
    uint32_t c0,
    uint32_t count,
    void* out) {
  const WeightParams& p = w.params;
  if (p.format == WeightFormat::nf4) return load_nf4_row(kernels, w, row, c0, count, out);
  if (is_quantized(p)) {
    const uint32_t bits = p.format == WeightFormat::int4 ? 4 : 8;
    const size_t groups = p.k / p.group_size, scale_bytes = p.scales_dtype == DType::f32 ? 4 : 2;
    const size_t words = size_t{p.k} * bits / 32;
    const AffineRow affine = {
        static_cast<const uint32_t*>(w.data) + row * words,
        static_cast<const char*>(w.scales) + row * groups * scale_bytes,
        static_cast<const char*>(w.biases) + row * groups * scale_bytes,
        p.scales_dtype,
        bits,
        p.group_size};
    kernels.load_affine(affine, c0, count, out);
    return;
  }
  const DType dtype = static_cast<DType>(p.format);
  const size_t size = dtype == DType::f32 ? 4 : 2;
  kernels.load(
      dtype, static_cast<const char*>(w.data) + (size_t{row} * p.k + c0) * size, count, out);
}

MatrixView dense_of(const Columns& b) {
  if (!b.weight) return b.dense;
  return {b.weight->data, static_cast<DType>(b.weight->params.format), b.weight->params.k};
}

/// Whether stored rows can be read in place: already in the compute type and not masked.
bool in_place(const GemmKernels& kernels, const Columns& b) {
  if (b.drop || (b.weight && is_quantized(b.weight->params))) return false;
  return dense_of(b).dtype == (kernels.compute == Compute::bf16 ? DType::bf16 : DType::f32);
}

/// One stored row, columns [c0, c0 + count), in the compute type, masked if asked.
void load_row(
    const GemmKernels& kernels,
    const Columns& b,
    uint32_t row,
    uint32_t c0,
    uint32_t count,
    void* out) {
  if (b.weight) return load_stored_row(kernels, *b.weight, b.row0 + row, c0, count, out);
  const char* source = element_at(b.dense, b.row0 + row, c0);
  if (!b.drop) return kernels.load(b.dense.dtype, source, count, out);
  std::array<float, kTaskColumns> wide;
  gemm_kernels(Compute::f32).load(b.dense.dtype, source, count, wide.data());
  kernels.drop(*b.drop, row, c0, count, wide.data());
  kernels.load(DType::f32, wide.data(), count, out);
}

bool is_packed(const Columns& b) {
  return b.weight && b.weight->params.layout == WeightLayout::cpu_packed;
}

/// The CPU's own layout, rows starting in the middle of a block of 16: through dense f32 rows.
void pack_columns_unaligned(
    const GemmKernels& kernels,
    const Columns& b,
    uint32_t k0,
    uint32_t k1,
    uint32_t n0,
    uint32_t n1,
    uint32_t* panels) {
  const uint32_t width = b.weight->params.k;
  const uint32_t first = b.row0 + (b.along_k ? n0 : k0), rows = b.along_k ? n1 - n0 : k1 - k0;
  std::vector<float> wide(size_t{rows} * width);
  dequantize_rows(*b.weight, first, rows, wide.data());
  const Columns dense = {{wide.data(), DType::f32, width}, nullptr, 0, b.along_k, nullptr};
  if (b.along_k) return pack_columns(kernels, dense, k0, k1, 0, rows, panels);
  pack_columns(kernels, dense, 0, rows, n0, n1, panels);
}

/// The CPU's own layout: a block of 16 rows is a B panel already, or its transpose.
void pack_columns_packed(
    const GemmKernels& kernels,
    const Columns& b,
    uint32_t k0,
    uint32_t k1,
    uint32_t n0,
    uint32_t n1,
    uint32_t* panels) {
  const uint32_t steps = steps_of(kernels.compute, k1 - k0);
  if ((b.row0 + (b.along_k ? n0 : k0)) % kPanelColumns != 0) {
    return pack_columns_unaligned(kernels, b, k0, k1, n0, n1, panels);
  }
  if (b.along_k) {
    for (uint32_t n = n0; n < n1; n += kPanelColumns, panels += size_t{steps} * kPanelColumns) {
      kernels.load_packed(*b.weight, (b.row0 + n) / kPanelColumns, k0, k1, panels);
    }
    return;
  }
  alignas(64) std::array<char, kTaskColumns * kPanelColumns * 4> block;
  const size_t size = bytes_per_element(kernels.compute);
  for (uint32_t k = k0; k < k1; k += kPanelColumns) {
    const uint32_t rows = std::min(kPanelColumns, k1 - k);
    const size_t step = steps_of(kernels.compute, k - k0);
    for (uint32_t c0 = n0; c0 < n1; c0 += kTaskColumns) {
      const uint32_t c1 = std::min(n1, c0 + kTaskColumns);
      kernels.load_packed_across(*b.weight, (b.row0 + k) / kPanelColumns, c0, c1, block.data());
      for (uint32_t c = c0; c < c1; c += kPanelColumns) {
        kernels.pack_transposed(
            block.data() + (c - c0) * kPanelColumns * size,
            kPanelColumns,
            std::min(kPanelColumns, c1 - c),
            kPanelColumns,
            rows,
            panels + ((c - n0) / kPanelColumns * size_t{steps} + step) * kPanelColumns);
      }
    }
  }
}

void pack_along_k(
    const GemmKernels& kernels,
    const Columns& b,
    uint32_t k0,
    uint32_t k1,
    uint32_t n0,
    uint32_t n1,
    uint32_t* panels) {
  const uint32_t steps = steps_of(kernels.compute, k1 - k0);
  const size_t size = bytes_per_element(kernels.compute);
  alignas(64) std::array<char, kPanelColumns * kStripElements * 4> strip;
  for (uint32_t n = n0; n < n1; n += kPanelColumns, panels += size_t{steps} * kPanelColumns) {
    const uint32_t rows = std::min(kPanelColumns, n1 - n);
    if (in_place(kernels, b)) {
      const MatrixView m = dense_of(b);
      kernels.pack_transposed(
          element_at(m, b.row0 + n, k0), m.stride, rows, kPanelColumns, k1 - k0, panels);
      continue;
    }
    for (uint32_t k = k0; k < k1; k += kStripElements) {
      const uint32_t count = std::min(kStripElements, k1 - k);
      for (uint32_t i = 0; i < rows; ++i) {
        load_row(kernels, b, n + i, k, count, strip.data() + i * kStripElements * size);
      }
      uint32_t* out = panels + size_t{steps_of(kernels.compute, k - k0)} * kPanelColumns;
      kernels.pack_transposed(strip.data(), kStripElements, rows, kPanelColumns, count, out);
    }
  }
}

/// Asks for the strip of stored rows that is packed next. Rows lie a stride apart, often a page
/// each, which the processor's own prefetchers do not follow: without this, packing W for the
/// backward product ran at 1/5 of the speed (2048 × 2048).
void prefetch_rows(const Columns& b, uint32_t row, uint32_t rows, uint32_t c0, uint32_t columns) {
  size_t row_bytes, first_byte, bytes;
  const char* data;
  if (b.weight && is_quantized(b.weight->params)) {
    const size_t bits = b.weight->params.format == WeightFormat::int8 ? 8 : 4;
    data = static_cast<const char*>(b.weight->data);
    row_bytes = b.weight->params.k * bits / 8;
    first_byte = c0 * bits / 8;
    bytes = columns * bits / 8;
  } else {
    const MatrixView m = dense_of(b);
    const size_t size = m.dtype == DType::f32 ? 4 : 2;
    data = static_cast<const char*>(m.data);
    row_bytes = m.stride * size;
    first_byte = c0 * size;
    bytes = columns * size;
  }
  for (uint32_t i = 0; i < rows; ++i) {
    const char* at = data + (size_t{b.row0} + row + i) * row_bytes + first_byte;
    for (size_t byte = 0; byte < bytes + 63; byte += 64) {
      __builtin_prefetch(at + std::min(byte, bytes - 1));
    }
  }
  if (!b.weight || !is_quantized(b.weight->params)) return;
  const WeightParams& p = b.weight->params;
  const size_t size = p.double_quant ? 1 : p.scales_dtype == DType::f32 ? 4 : 2;
  const size_t groups = p.k / p.group_size;
  for (uint32_t i = 0; i < rows; ++i) {
    const size_t at = ((size_t{b.row0} + row + i) * groups + c0 / p.group_size) * size;
    __builtin_prefetch(static_cast<const char*>(b.weight->scales) + at);
    if (p.format == WeightFormat::nf4) continue;
    __builtin_prefetch(static_cast<const char*>(b.weight->biases) + at);
  }
}

void pack_across_k(
    const GemmKernels& kernels,
    const Columns& b,
    uint32_t k0,
    uint32_t k1,
    uint32_t n0,
    uint32_t n1,
    uint32_t* panels) {
  const uint32_t steps = steps_of(kernels.compute, k1 - k0);
  const size_t size = bytes_per_element(kernels.compute);
  constexpr uint32_t kStripRows = 32;
  alignas(64) std::array<char, kStripRows * kTaskColumns * 4> strip;
  const bool direct = in_place(kernels, b);
  const MatrixView m = direct ? dense_of(b) : MatrixView{};
  for (uint32_t k = k0; k < k1; k += kStripRows) {
    const uint32_t rows = std::min(kStripRows, k1 - k), next = k + rows;
    for (uint32_t c0 = n0; c0 < n1; c0 += kTaskColumns) {
      const uint32_t columns = std::min(kTaskColumns, n1 - c0);
      prefetch_rows(b, next, std::min(kStripRows, k1 - next), c0, columns);
      const char* source = strip.data();
      size_t ld = kTaskColumns;
      if (direct) {
        source = element_at(m, b.row0 + k, c0);
        ld = m.stride;
      } else {
        for (uint32_t i = 0; i < rows; ++i) {
          load_row(kernels, b, k + i, c0, columns, strip.data() + i * kTaskColumns * size);
        }
      }
      for (uint32_t j = 0; j < columns; j += kPanelColumns) {
        uint32_t* out = panels + (size_t{(c0 - n0 + j) / kPanelColumns} * steps +
                                  steps_of(kernels.compute, k - k0)) *
                                     kPanelColumns;
        kernels.pack_straight(
            source + j * size, ld, std::min(kPanelColumns, columns - j), kPanelColumns, rows, out);
      }
    }
  }
}

}  // namespace

void pack_columns(
    const GemmKernels& kernels,
    const Columns& b,
    uint32_t k0,
    uint32_t k1,
    uint32_t n0,
    uint32_t n1,
    uint32_t* panels) {
  if (is_packed(b)) return pack_columns_packed(kernels, b, k0, k1, n0, n1, panels);
  (b.along_k ? pack_along_k : pack_across_k)(kernels, b, k0, k1, n0, n1, panels);
}

}  // namespace metal_lora::cpu
