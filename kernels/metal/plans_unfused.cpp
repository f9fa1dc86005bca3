// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/metal/plans_unfused.h"

#include "kernels/metal/plan_parts.h"

namespace metal_lora::metal {

Plan plan_add_scaled(uint32_t m, uint32_t n, float scale, DType dtype) {
  constexpr const char* kKernel = "add_scaled";
  constexpr uint32_t kThreads = 256;
  static const Entry entry{
      kKernel,
      {kKernel},
      {"y", "z", "p"},
      {"sum"},
      "  metal_lora::add_scaled<T>(y, z, sum, as_type<float>(p[1]), p[0], "
      "thread_position_in_grid.x);\n"};
  const uint64_t count = uint64_t{m} * n;
  require_size(count, kKernel, "y");
  Plan plan;
  plan.entry = &entry;
  plan.template_args = {{"T", dtype}};
  plan.p = {static_cast<uint32_t>(count), float_word(scale)};
  plan.threads_per_grid = {kThreads * ceil_div(count, kThreads), 1, 1};
  plan.threads_per_threadgroup = {kThreads, 1, 1};
  plan.why = "elementwise, one thread an element";
  return plan;
}

Plan plan_plain_linear(uint32_t m, uint32_t n, uint32_t k, DType dtype) {
  constexpr const char* kKernel = "plain_linear";
  static const Entry entry{
      kKernel,
      {kKernel},
      {"x", "w", "p"},
      {"y"},
      "  metal_lora::plain_linear<T>(x, w, y, p[0], p[1], threadgroup_position_in_grid.x,\n"
      "      thread_index_in_simdgroup);\n"};
  require_size(uint64_t{m} * n, kKernel, "y");
  require_size(uint64_t{m} * k, kKernel, "x");
  require_size(uint64_t{n} * k, kKernel, "w");
  require(uint64_t{m} * n < (uint64_t{1} << 27), kKernel, "y must have fewer than 2^27 elements");
  Plan plan;
  plan.entry = &entry;
  plan.template_args = {{"T", dtype}};
  plan.p = {n, k};
  plan.threads_per_grid = {32 * m * n, 1, 1};
  plan.threads_per_threadgroup = {32, 1, 1};
  plan.why = "plain form, a simdgroup for each output";
  return plan;
}

}  // namespace metal_lora::metal
