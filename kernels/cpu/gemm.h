// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cpu/lora_kernels.h"

namespace metal_lora::cpu {

/// A dense row-major matrix; element (r, c) is data[r * stride + c].
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  size_t stride = 0;
};

/// C[m, n] (f32, row stride ldc) = alpha · op(A)[m, k] · op(B)[k, n] + beta · C.
/// A: dense, [m, k], or [k, m] when a_transposed. B: dense [k, n], or [n, k] when b_transposed.
/// 16-bit inputs are multiplied in bf16 where both are bf16 and the machine has the
/// instruction, in f32 otherwise; sums are f32 in a fixed order. beta 0 does not read C.
/// Runs on the thread pool. Thread-safe.
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
    size_t ldc);

/// C[m, n] (f32) = A[m, k] · W[n, k]ᵀ for any weight format, in the compute type that
/// lora_linear_forward uses for A's dtype; with `rows` set, only W's rows [row0, row0 + n) are used.
void gemm_weight(
    uint32_t m, MatrixView a, const WeightView& w, uint32_t row0, uint32_t rows, float beta, float* c, size_t ldc);

/// C[m, k] (f32) (+)= A[m, rows] · W[row0 : row0 + rows, :]: the product that runs back through W.
void gemm_weight_backward(
    uint32_t m, MatrixView a, const WeightView& w, uint32_t row0, uint32_t rows, float beta, float* c, size_t ldc);

}  // namespace metal_lora::cpu
