// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Preloaded, sends the matrix products of MLX's CPU wheel to OpenBLAS. The wheel links the reference
// BLAS (about 4 GFLOP/s): beating that would prove nothing.
#define FORWARD(name, type)                                                                        \
  void scipy_cblas_##name(                                                                         \
      int, int, int, int, int, int, type, const type*, int, const type*, int, type, type*, int);   \
  void cblas_##name(                                                                               \
      int order, int trans_a, int trans_b, int m, int n, int k, type alpha, const type* a,         \
      int lda, const type* b, int ldb, type beta, type* c, int ldc) {                              \
    scipy_cblas_##name(                                                                            \
        order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);                    \
  }

FORWARD(sgemm, float)
FORWARD(dgemm, double)
