// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Several small products as two jobs of the thread pool: all left sides packed, then all
// multiplied. Internal to kernels/cpu.
#pragma once

#include "kernels/cpu/gemm_driver.h"

namespace metal_lora::cpu {

/// product = op(left)[rows, k] · …; `left` is [rows, k], or [k, rows] when transposed.
/// product.a is filled in by run_jobs.
struct GemmJob {
  MatrixView left;
  bool transposed = false;
  uint32_t rows = 0, k = 0;
  Product product;
};

/// Uses this thread's `panels` for the packed left sides of all jobs together.
void run_jobs(const GemmKernels& kernels, std::span<GemmJob> jobs);

}  // namespace metal_lora::cpu
