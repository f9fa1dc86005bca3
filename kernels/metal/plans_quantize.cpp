// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/metal/plans_quantize.h"

#include <array>

#include "kernels/metal/plan_weights.h"

namespace metal_lora::metal {
namespace {

constexpr uint32_t kThreads = 256;

const Entry kQuantizeAffine = {
    "quantize_affine",
    {"quantize_affine"},
    {"w", "p"},
    {"q", "scales", "biases"},
    R"(
  metal_lora::quantize_affine<BITS, GROUP>(
      w, p[0], q, scales, biases, thread_position_in_grid.x);
)"};

const Entry kQuantizeNf4 = {
    "quantize_nf4",
    {"quantize_nf4"},
    {"w", "p"},
    {"q", "scales"},
    R"(
  metal_lora::quantize_nf4<T>(w, p[0], q, scales, thread_position_in_grid.x);
)"};

Entry make_dequantize(WeightFormat format, bool double_quant, const char* name) {
  Entry entry{name, {"dequantize"}, {}, {"dense"}, ""};
  add_weight(format, double_quant, entry);
  entry.inputs.push_back("p");
  entry.body = "\n  metal_lora::dequantize(\n      " +
               weight_policy(format, double_quant, "T", "p[1]") +
               ", p[0], p[1], dense, thread_position_in_grid.x, thread_index_in_simdgroup);\n";
  return entry;
}

StoredWeight weight_of(const QuantizeShape& s) {
  return {s.n, s.k, s.format, s.group_size, s.scales_dtype, s.double_quant};
}

/// One thread for 8 weights, in whole simdgroups: lanes exchange values.
void set_grid(const QuantizeShape& s, Plan& plan) {
  const uint64_t lanes = uint64_t{s.n} * s.k / 8;
  plan.threads_per_grid = {ceil_div(lanes, kThreads) * kThreads, 1, 1};
  plan.threads_per_threadgroup = {kThreads, 1, 1};
}

void check(const QuantizeShape& s, const char* kernel) {
  require(is_packed(s.format), kernel, "format must be int4, int8 or nf4");
  check_weight(weight_of(s), kernel);
}

}  // namespace

Plan plan_quantize(const QuantizeShape& s) {
  check(s, "quantize");
  require(!s.double_quant, "quantize", "absmax is double-quantised on the CPU");
  const bool nf4 = s.format == WeightFormat::nf4;
  Plan plan;
  plan.entry = nf4 ? &kQuantizeNf4 : &kQuantizeAffine;
  plan.template_args = {{"T", s.dtype}};
  if (!nf4) {
    plan.template_args.emplace_back("BITS", packed_bits(s.format));
    plan.template_args.emplace_back("GROUP", static_cast<int>(s.group_size));
  }
  plan.p = {s.n * s.k};
  set_grid(s, plan);
  plan.why = "each weight once; groups within a simdgroup";
  return plan;
}

Plan plan_dequantize(const QuantizeShape& s) {
  static const std::array<Entry, 3> entries = {
      make_dequantize(WeightFormat::int4, false, "dequantize_affine"),
      make_dequantize(WeightFormat::nf4, false, "dequantize_nf4"),
      make_dequantize(WeightFormat::nf4, true, "dequantize_nf4_nested")};
  check(s, "dequantize");
  Plan plan;
  plan.entry = &entries[is_affine(s.format) ? 0 : s.double_quant ? 2 : 1];
  plan.template_args = {{"T", s.dtype}};
  add_weight_args(weight_of(s), 8, 256, plan.template_args);
  plan.p = {s.n, s.k};
  set_grid(s, plan);
  plan.why = "each word once; a group's scale once";
  return plan;
}

}  // namespace metal_lora::metal
