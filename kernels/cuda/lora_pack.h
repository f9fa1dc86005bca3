// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The small kernels of the composed linear (lora_kernels.cu): adapters as the products read them,
// and the adapters' share of dx under dropout.
#pragma once

#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {

/// to [rows, to_stride] = from [rows, columns] rounded to the call's type, zeros beyond.
struct PackJob {
  const void* from = nullptr;
  DType from_dtype = DType::f32;
  uint32_t rows = 0, columns = 0;
  void* to = nullptr;
  uint32_t to_stride = 0;
};
struct PackCall {
  static constexpr int kMaxJobs = 12;
  int jobs = 0;
  PackJob job[kMaxJobs];
};
/// All jobs in one launch; none: no launch.
void pack_matrices(const Context& context, const PackCall& call, DType dtype);

/// One adapter's share of dx: factor·mask ∘ (v·A), v [m, v_stride] f32, A [rank, columns].
struct MaskedShare {
  const float* v = nullptr;
  size_t v_stride = 0;
  const void* a = nullptr;
  DType a_dtype = DType::f32;
  uint32_t rank = 0;
  float factor = 1.0f;  ///< without the mask's keep_scale
  DropMask mask;
};
struct MaskedCall {
  static constexpr int kMaxShares = 4;
  uint32_t m = 0, columns = 0;
  int shares = 0;
  MaskedShare share[kMaxShares];
  const float* base = nullptr;  ///< [m, columns]
  DType dtype = DType::bf16;
  void* dx = nullptr;  ///< [m, columns] of dtype: base + shares, rounded once; may be base
};
void add_masked(const Context& context, const MaskedCall& call);

}  // namespace metal_lora::cuda
