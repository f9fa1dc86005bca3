// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Products whose rows are no multiples of 16 bytes run at a sixth of the speed. Where the product
// is large, copies of its operands with padded rows (and of its result, for the form that stores
// whole boxes) cost less than that.
#pragma once

#include "kernels/cuda/gemm.h"

namespace metal_lora::cuda {

/// rows x columns elements from one stride to another.
struct StageJob {
  const void* from = nullptr;
  void* to = nullptr;
  size_t from_stride = 0, to_stride = 0;  ///< elements
  uint32_t rows = 0, columns = 0;
  uint32_t element_bytes = 2;
};
struct StageCall {
  static constexpr int kMaxJobs = 48;
  int jobs = 0;
  StageJob job[kMaxJobs];
};

/// The same product over aligned copies, and the copies.
struct Staging {
  GemmGroup group;
  StageCall in, out;
};
/// Which copies a group is worth; its own `group` where none.
struct StagePlan {
  bool pairs = false;   ///< lefts and rights that are not aligned
  bool result = false;  ///< and the result with what is added to it
};
StagePlan plan_staging(const Context& context, const GemmGroup& group);
/// Memory comes from the context's scratch.
Staging make_staging(const Context& context, const GemmGroup& group, const StagePlan& plan);
void copy_staged(const Context& context, const StageCall& call);

/// How many kernels gemm() launches.
int gemm_dispatches(const Context& context, const GemmGroup& group);

}  // namespace metal_lora::cuda
