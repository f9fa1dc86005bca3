// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The ladder, one Zen 4 core (AVX-512 at half width), M = 512, K = N = 2048, as a share of the
// limit that the tile alone reaches on panels in the first-level cache (f32 110, bf16 222 GFLOP/s;
// the bench's tile_limit prints both for the machine at hand):
//   v1  three loops over f32 copies of the operands, baseline instructions: f32 0.06
//   v2  packed panels of 14 rows and 16 columns, tiles of 14 x 32, k in blocks of 768 steps:
//       f32 0.72-0.79, bf16 0.73-0.84 (in the same runs: OpenBLAS 0.82, MKL 0.83, oneDNN bf16 0.88)
//   v3  W dequantised straight into panels (INT4 by a permutation of its 16 levels), strided rows
//       of W prefetched in the backward product: packing W costs 0.05-0.5 ns a weight forward
//       and 0.1-0.9 backward, against 2·M/222 = 4.6 ns of multiplication
// The next tenth: A panels prefetched while the tile runs (they come from the third level when
// K ≥ 1536: f32 loses 5 to 10 % there), the C block's read and write folded into the tile's last
// block, and a dense f32 W whose rows lie a page apart (the backward product, 1.4 ns a weight:
// address translation) read in wider strips.
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
      pack_row_panel(kernels, a, a_transposed, row0, k, packed, 0, static_cast<uint32_t>(panel));
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
    uint32_t m,
    MatrixView a,
    const WeightView& w,
    uint32_t row0,
    uint32_t rows,
    float beta,
    float* c,
    size_t ldc) {
  const Columns columns = {{}, &w, row0, true, nullptr};
  multiply(
      compute_for(a.dtype), m, rows, w.params.k, a, false, columns, f32_output(1.0f, beta, c, ldc));
}

void gemm_weight_backward(
    uint32_t m,
    MatrixView a,
    const WeightView& w,
    uint32_t row0,
    uint32_t rows,
    float beta,
    float* c,
    size_t ldc) {
  const Columns columns = {{}, &w, row0, false, nullptr};
  multiply(
      compute_for(a.dtype), m, w.params.k, rows, a, false, columns, f32_output(1.0f, beta, c, ldc));
}

}  // namespace metal_lora::cpu
