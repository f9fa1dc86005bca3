// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <array>

#include "kernels/metal/plan_weights.h"
#include "kernels/metal/plans_train.h"

namespace metal_lora::metal {
namespace {

constexpr const char* kName = "lora_embedding";
constexpr uint32_t kTokens = 8, kThreads = 64, kDims = 512;

Entry make_entry(WeightFormat format, bool double_quant, bool adapter, const char* name) {
  Entry entry{name, {"lora_embedding"}, {"ids"}, {"y"}, ""};
  add_weight(format, double_quant, entry);
  if (adapter) {
    entry.inputs.push_back("a");
    entry.inputs.push_back("b");
  }
  entry.inputs.push_back("p");
  entry.body = std::string("  threadgroup float us[metal_lora::kEmbedTokens * RANKS];\n") +
               "  metal_lora::lora_embedding<T, LT, RANKS>(\n      " +
               weight_policy(format, double_quant, "float", "p[1]") +
               (adapter ? ", ids, a, b,\n"
                        : ", ids, static_cast<const device LT*>(nullptr),\n"
                          "      static_cast<const device LT*>(nullptr),\n") +
               "      uint(ids_shape[0]), p[0], p[1], p[2], as_type<float>(p[3]), y, us,\n"
               "      threadgroup_position_in_grid, simdgroup_index_in_threadgroup,\n"
               "      thread_index_in_simdgroup);\n";
  return entry;
}

const Entry* embedding_entry(WeightFormat format, bool double_quant, bool adapter) {
  using F = WeightFormat;
  static const std::array<Entry, 8> entries = {
      make_entry(F::f32, false, true, "lora_embedding"),
      make_entry(F::int4, false, true, "lora_embedding_affine"),
      make_entry(F::nf4, false, true, "lora_embedding_nf4"),
      make_entry(F::nf4, true, true, "lora_embedding_nf4_nested"),
      make_entry(F::f32, false, false, "embedding"),
      make_entry(F::int4, false, false, "embedding_affine"),
      make_entry(F::nf4, false, false, "embedding_nf4"),
      make_entry(F::nf4, true, false, "embedding_nf4_nested")};
  const size_t kind = !is_packed(format) ? 0 : is_affine(format) ? 1 : double_quant ? 3 : 2;
  return &entries[kind + (adapter ? 0 : 4)];
}

}  // namespace

Plan plan_lora_embedding(const LoraEmbeddingShape& s) {
  const StoredWeight table = {
      s.vocab, s.dims, s.format, s.group_size, s.scales_dtype, s.double_quant};
  check_weight(table, kName);
  require_size(uint64_t{s.tokens} * s.dims, kName, "y");
  require(s.rank <= 256, kName, "rank must be at most 256 but is " + std::to_string(s.rank));
  Plan plan;
  plan.entry = embedding_entry(s.format, s.double_quant, s.rank > 0);
  if (s.rank > 0) {
    require_size(uint64_t{s.vocab} * s.rank, kName, "A");
    require_size(uint64_t{s.dims} * s.rank, kName, "B");
  }
  plan.template_args = {{"T", s.dtype}, {"LT", s.lora_dtype}};
  add_weight_args(table, 8, 256, plan.template_args);
  plan.template_args.emplace_back("RANKS", s.rank <= 32 ? 32 : 256);
  plan.p = {s.vocab, s.dims, s.rank, float_word(s.scale)};
  plan.threads_per_grid = {kThreads * ceil_div(s.dims, kDims), ceil_div(s.tokens, kTokens), 1};
  plan.threads_per_threadgroup = {kThreads, 1, 1};
  plan.why = "each token's row once, B once for every 8 tokens";
  return plan;
}

}  // namespace metal_lora::metal
