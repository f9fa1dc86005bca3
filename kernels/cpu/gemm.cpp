// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm.h"

#include <bit>
#include <vector>

#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  const float magnitude = exponent == 0
      ? static_cast<float>(mantissa) * 0x1p-24f
      : std::bit_cast<float>(((exponent + 112) << 23) | mantissa << 13);
  return sign ? -magnitude : magnitude;
}

float element(const MatrixView& m, size_t row, size_t column) {
  const size_t at = row * m.stride + column;
  if (m.dtype == DType::f32) return static_cast<const float*>(m.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(m.data)[at];
  return m.dtype == DType::f16 ? from_f16(bits) : std::bit_cast<float>(uint32_t{bits} << 16);
}

}  // namespace

void gemm(
    uint32_t m,
    uint32_t n,
    uint32_t k,
    float alpha,
    MatrixView a,
    bool a_transposed,
    MatrixView b,
    bool b_transposed,
    float beta,
    float* c,
    size_t ldc) {
  std::vector<float> columns(size_t{k} * n);
  for (size_t p = 0; p < k; ++p) {
    for (size_t j = 0; j < n; ++j) {
      columns[p * n + j] = b_transposed ? element(b, j, p) : element(b, p, j);
    }
  }
  parallel_for(m, [&](size_t i) {
    std::vector<float> sums(n);
    for (size_t p = 0; p < k; ++p) {
      const float x = a_transposed ? element(a, p, i) : element(a, i, p);
      for (size_t j = 0; j < n; ++j) sums[j] += x * columns[p * n + j];
    }
    for (size_t j = 0; j < n; ++j) {
      float& out = c[i * ldc + j];
      out = beta == 0.0f ? alpha * sums[j] : alpha * sums[j] + beta * out;
    }
  });
}

void gemm_weight(
    uint32_t m, MatrixView a, const WeightView& w, uint32_t row0, uint32_t rows, float beta, float* c, size_t ldc) {
  const uint32_t k = w.params.k;
  std::vector<float> dense(size_t{rows} * k);
  dequantize_rows(w, row0, rows, dense.data());
  gemm(m, rows, k, 1.0f, a, false, {dense.data(), DType::f32, k}, true, beta, c, ldc);
}

void gemm_weight_backward(
    uint32_t m, MatrixView a, const WeightView& w, uint32_t row0, uint32_t rows, float beta, float* c, size_t ldc) {
  const uint32_t k = w.params.k;
  std::vector<float> dense(size_t{rows} * k);
  dequantize_rows(w, row0, rows, dense.data());
  gemm(m, k, rows, 1.0f, a, false, {dense.data(), DType::f32, k}, false, beta, c, ldc);
}

}  // namespace metal_lora::cpu
