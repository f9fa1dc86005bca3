// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm.h"

#include <algorithm>

#include "kernels/cpu/gemm_driver.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

/// out = op(A) · B for one right-hand side, in pieces of m that keep the packed A bounded.
void multiply(
    Compute compute,
    uint32_t m,
    uint32_t n,
    uint32_t k,
    const MatrixView& a,
    bool a_transposed,
    const Columns& b,
    const Output& out) {
  if (m == 0 || n == 0) return;
  const GemmKernels& kernels = gemm_kernels(compute);
  const uint32_t steps = steps_of(compute, k), piece = rows_at_a_time(m, steps);
  Product product;
  product.n = n;
  product.segments = {{k, 0, b, nullptr}};
  product.out = out;
  for (uint32_t row0 = 0; row0 < m; row0 += std::min(piece, m - row0)) {
    PackedRows packed;
    packed.rows = RowPanels(std::min(piece, m - row0), kernels.max_rows);
    packed.panel_steps = steps;
    packed.data = static_cast<uint32_t*>(thread_scratch().panels.bytes(
        size_t{packed.rows.count} * packed.rows.height * std::max(1u, steps) * 4));
    parallel_for(packed.rows.count, [&](size_t panel) {
      pack_row_panel(
          kernels, a, a_transposed, row0, k, packed, 0, static_cast<uint32_t>(panel));
    });
    product.a = packed;
    product.row0 = row0;
    run_products(kernels, {&product, 1});
  }
}

Output f32_output(float alpha, float beta, float* c, size_t ldc) {
  Output out;
  out.c = c;
  out.row_stride = ldc;
  out.alpha = alpha;
  out.beta = beta;
  return out;
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
  const Compute compute = b.dtype == DType::bf16 ? compute_for(a.dtype) : Compute::f32;
  const Columns columns = {b, nullptr, 0, b_transposed, nullptr};
  multiply(compute, m, n, k, a, a_transposed, columns, f32_output(alpha, beta, c, ldc));
}

void gemm_weight(
    uint32_t m, MatrixView a, const WeightView& w, uint32_t row0, uint32_t rows, float beta, float* c, size_t ldc) {
  const Columns columns = {{}, &w, row0, true, nullptr};
  multiply(
      compute_for(a.dtype), m, rows, w.params.k, a, false, columns, f32_output(1.0f, beta, c, ldc));
}

void gemm_weight_backward(
    uint32_t m, MatrixView a, const WeightView& w, uint32_t row0, uint32_t rows, float beta, float* c, size_t ldc) {
  const Columns columns = {{}, &w, row0, false, nullptr};
  multiply(
      compute_for(a.dtype), m, w.params.k, rows, a, false, columns, f32_output(1.0f, beta, c, ldc));
}

}  // namespace metal_lora::cpu
