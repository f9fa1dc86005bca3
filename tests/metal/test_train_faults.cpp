// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Faults planted in the kernels of training: adapter gradients, both forms of AdamW, embeddings.
#include "kernels/metal/plans_train.h"
#include "tests/metal/faults.h"
#include "tests/metal/stored_weight.h"

namespace metal_lora::test {
namespace {

namespace mx = mlx::core;

#define BARRIER "threadgroup_barrier(mem_flags::mem_threadgroup);"

mx::array random_array(Random& random, mx::Shape shape, mx::Dtype dtype, float deviation = 1.0f) {
  size_t count = 1;
  for (const auto d : shape) count *= static_cast<size_t>(d);
  return stored(random.normal(count, deviation), std::move(shape), dtype);
}

// ---- dA and dB: three steps of tokens, columns and ranks that fill no tile ----

const std::vector<Fault> kGradFaults = {
    {"tiles overwritten while others read them", FindingKind::race_threadgroup},
    {"tiles read before they are there", FindingKind::race_threadgroup},
    {"another token's dropout", std::nullopt},
    {"tokens past the last are read", FindingKind::out_of_bounds},
    {"columns past the last are written", FindingKind::out_of_bounds},
    {"the scale forgotten", std::nullopt},
    {"dB written transposed", std::nullopt},
};

FaultyKernel grad() {
  Random random(71);
  constexpr int kM = 33, kN = 40, kK = 140, kRank = 7;
  const metal::LoraGradShape shape{
      .m = kM,
      .n = kN,
      .k = kK,
      .rank = kRank,
      .scale = 0.75f,
      .dtype = DType::f16,
      .dropout = 0.3f,
      .dropout_seed = 5};
  return faulty_kernel(
      "lora_train.metal",
      metal::plan_lora_grad(shape),
      {{"x", random_array(random, {kM, kK}, mx::float16)},
       {"dy", random_array(random, {kM, kN}, mx::float16)},
       {"v", random_array(random, {kM, kRank}, mx::float32)},
       {"u", random_array(random, {kM, kRank}, mx::float32)}},
      {{"da", {{kRank, kK}, mx::float32}}, {"db", {{kN, kRank}, mx::float32}}},
      {{"m0 += kGradTokens) {\n    " BARRIER,
        "m0 += kGradTokens) {\n    if (planted != 1) " BARRIER},
       {BARRIER "\n    for (uint m = 0; m < kGradTokens; m += 8) {",
        "if (planted != 2) " BARRIER "\n    for (uint m = 0; m < kGradTokens; m += 8) {"},
       {"key.add = simd_shuffle(own.add, ushort(m));",
        "key.add = simd_shuffle(own.add, ushort(planted == 3 ? m ^ 1u : m));"},
       {"if (m0 + m < tokens && column0 + column < columns) {",
        "if ((m0 + m < tokens || planted == 4) && column0 + column < columns) {"},
       {"if (r < rank && c + e < columns) {",
        "if (r < rank && (c + e < columns || planted == 5)) {"},
       {"scale * acc[i][j].thread_elements()[e];",
        "(planted == 6 ? 1.0f : scale) * acc[i][j].thread_elements()[e];"},
       {"out.row_stride = 1;\n    out.column_stride = rank;",
        "out.row_stride = planted == 7 ? n : 1;\n"
        "    out.column_stride = planted == 7 ? 1 : rank;"}});
}
METAL_LORA_FAULTS(GradFault, grad, kGradFaults);

// ---- AdamW in one threadgroup, and the second of its two dispatches ----

/// Inputs of a step that clips; outputs of either form.
ops::metal_ops::NamedArrays adam_arrays(int count) {
  Random random(72);
  AdamWParams params;
  params.count = static_cast<uint64_t>(count);
  params.learning_rate = 1e-2f;
  params.clip_norm = 1e-3f;
  params.step = 3;
  const auto factors = metal::adamw_factors(params);
  return {
      {"param", random_array(random, {count}, mx::float32)},
      {"grad", random_array(random, {count}, mx::float32)},
      {"m", random_array(random, {count}, mx::float32, 0.1f)},
      {"v", mx::full({count}, 0.01f)},
      {"h", mx::array(factors.data(), {8})}};
}
ops::metal_ops::NamedOutputs adam_outputs(int count) {
  const OutputSpec flat{{count}, mx::float32};
  const auto partials = static_cast<int>(metal::adamw_partials(static_cast<uint64_t>(count)));
  return {
      {"partial", {{partials, 3}, mx::float32}},
      {"new_param", flat},
      {"new_m", flat},
      {"new_v", flat},
      {"grad_norm", {{1}, mx::float32}},
      {"skipped", {{1}, mx::int32}}};
}

const std::vector<Fault> kAdamFaults = {
    {"sums read before other simdgroups made theirs", FindingKind::race_threadgroup},
    {"two lanes write a simdgroup's sum", FindingKind::race_threadgroup},
    {"elements past the last", FindingKind::out_of_bounds},
    {"the norm written by every thread", FindingKind::race_device},
    {"not clipped", std::nullopt},
    {"the second moment with the first one's decay", std::nullopt},
    {"a part of the gradients left out of the norm", std::nullopt},
};

FaultyKernel adam_single() {
  constexpr int kCount = 2000;
  auto arrays = adam_arrays(kCount);
  arrays.at("v").eval();
  return faulty_kernel(
      "lora_train.metal",
      metal::plan_adamw(kCount).at(0),
      arrays,
      adam_outputs(kCount),
      {{BARRIER "\n  sums.large = scratch[0];",
        "if (planted != 1) " BARRIER "\n  sums.large = scratch[0];"},
       {"if (lane == 0) {\n    scratch[simd_id * 3]",
        "if (lane < (planted == 2 ? 2 : 1)) {\n    scratch[simd_id * 3]"},
       {"i < end; i += kAdamThreads) {\n    const float g = grad[i] * factor;",
        "i < end + (planted == 3 ? 1 : 0); i += kAdamThreads) {\n"
        "    const float g = grad[i] * factor;"},
       {"if (group == 0 && thread_id == 0) {",
        "if (group == 0 && (thread_id == 0 || planted == 4)) {"},
       {"const float factor = grad_scale * clip;",
        "const float factor = grad_scale * (planted == 5 ? 1.0f : clip);"},
       {"fma(beta2, v[i], rest2 * g * g)",
        "fma(planted == 6 ? beta1 : beta2, v[i], rest2 * g * g)"},
       {"i < end; i += kAdamThreads) {\n    const float g = grad[i], size",
        "i < (planted == 7 ? end / 2 : end); i += kAdamThreads) {\n"
        "    const float g = grad[i], size"}});
}
METAL_LORA_FAULTS(AdamFault, adam_single, kAdamFaults);

const std::vector<Fault> kAdamUpdateFaults = {
    {"the last chunk not cut", FindingKind::out_of_bounds},
    {"chunks that overlap", FindingKind::race_device},
    {"partial sums past the last", FindingKind::out_of_bounds},
    {"partial sums of the small values taken for the middling", std::nullopt},
};

FaultyKernel adam_update() {
  constexpr int kCount = metal::kAdamWSingleCount + 4097;
  const auto plans = metal::plan_adamw(kCount);
  auto arrays = adam_arrays(kCount);
  arrays.at("v").eval();
  arrays = run({plans.at(0)}, arrays, adam_outputs(kCount));
  return faulty_kernel(
      "lora_train.metal",
      plans.at(1),
      arrays,
      adam_outputs(kCount),
      {{"begin,\n      min(p[0], begin + p[1]),",
        "begin,\n      planted == 1 ? begin + p[1] : min(p[0], begin + p[1]),"},
       {"const uint begin = group * p[1];\n  adamw_apply(",
        "const uint begin = group * p[1] - (planted == 2 && group > 0 ? 1 : 0);\n  adamw_apply("},
       {"thread_id < p[2] ? partial[thread_id * 3] : 0.0f;",
        "thread_id < p[2] || planted == 3 ? partial[thread_id * 3] : 0.0f;"},
       {"partial[thread_id * 3 + 1] : 0.0f;",
        "partial[thread_id * 3 + (planted == 4 ? 2 : 1)] : 0.0f;"}});
}
METAL_LORA_FAULTS(AdamUpdateFault, adam_update, kAdamUpdateFaults);

// ---- embedding ----

const std::vector<Fault> kEmbeddingFaults = {
    {"A's columns read before they are there", FindingKind::race_threadgroup},
    {"ids past the last are read", FindingKind::out_of_bounds},
    {"tokens past the last are written", FindingKind::out_of_bounds},
    {"dims past the last", FindingKind::out_of_bounds},
    {"another rank's value", std::nullopt},
    {"ids outside the table", FindingKind::out_of_bounds},
};

FaultyKernel embedding() {
  Random random(73);
  constexpr int kTokens = 13, kVocab = 30, kDims = 636, kRank = 5;
  auto ids = random.integers(kTokens, 0, kVocab - 1);
  ids[3] = kVocab + 4;
  const metal::LoraEmbeddingShape shape{
      .tokens = kTokens,
      .vocab = kVocab,
      .dims = kDims,
      .format = WeightFormat::f16,
      .rank = kRank,
      .scale = 0.5f,
      .dtype = DType::f16,
      .lora_dtype = DType::f16};
  return faulty_kernel(
      "lora_embedding.metal",
      metal::plan_lora_embedding(shape),
      {{"ids", int_array(ids, {kTokens})},
       {"w", random_array(random, {kVocab, kDims}, mx::float16)},
       {"a", random_array(random, {kRank, kVocab}, mx::float16)},
       {"b", random_array(random, {kDims, kRank}, mx::float16)}},
      {{"y", {{kTokens, kDims}, mx::float16}}},
      {{BARRIER "\n  Pack<float, 8> rows", "if (planted != 1) " BARRIER "\n  Pack<float, 8> rows"},
       {"const uint id = t < tokens ?", "const uint id = t < tokens || planted == 2 ?"},
       {"if (token0 + t < tokens) y[", "if (token0 + t < tokens || planted == 3) y["},
       {"i < 8 && column + i < dims; ++i", "i < 8 && (column + i < dims || planted == 4); ++i"},
       {"us[t * RANKS + r + j]", "us[t * RANKS + r + (planted == 5 ? 0 : j)]"},
       {"const int valid = id < vocab ?", "const int valid = id < vocab || planted == 6 ?"}});
}
METAL_LORA_FAULTS(EmbeddingFault, embedding, kEmbeddingFaults);

const std::vector<Fault> kEmbeddingGradFaults = {
    {"masks overwritten while others read them", FindingKind::race_threadgroup},
    {"masks read before they are there", FindingKind::race_threadgroup},
    {"products read before they are there", FindingKind::race_threadgroup},
    {"products overwritten while others read them", FindingKind::race_threadgroup},
    {"ids past the last are written", FindingKind::out_of_bounds},
    {"a batch's first id for all of it", std::nullopt},
    {"tokens past the last are read", FindingKind::out_of_bounds},
    {"one simdgroup leaves the loop", FindingKind::divergent_barrier},
};

/// Two steps of 256 tokens. The first threadgroup's tokens all lie among the first 32: behind its
/// last batch its simdgroups go through the other masks, and nothing but the barrier before the
/// next masks are written keeps a fast one from overwriting what a slow one still reads.
FaultyKernel embedding_grad() {
  Random random(74);
  constexpr int kTokens = 300, kVocab = 600, kDims = 40, kRank = 5;
  auto ids = random.integers(kTokens, 256, kVocab - 1);
  for (int t = 0; t < 12; ++t) ids[t] = t % 5;
  const metal::LoraEmbeddingShape shape{
      .tokens = kTokens,
      .vocab = kVocab,
      .dims = kDims,
      .rank = kRank,
      .scale = 2.0f,
      .dtype = DType::f16,
      .lora_dtype = DType::f32};
  return faulty_kernel(
      "lora_embedding.metal",
      metal::plan_lora_embedding_grad(shape),
      {{"ids", int_array(ids, {kTokens})},
       {"dy", random_array(random, {kTokens, kDims}, mx::float16)},
       {"a", random_array(random, {kRank, kVocab}, mx::float32)},
       {"b", random_array(random, {kDims, kRank}, mx::float32)}},
      {{"da", {{kRank, kVocab}, mx::float32}}, {"db", {{kDims, kRank}, mx::float32}}},
      {{BARRIER "\n    if (lane == 0) matches",
        "if (planted != 1) " BARRIER "\n    if (lane == 0) matches"},
       {"matches[simd_id] = bits;\n    " BARRIER,
        "matches[simd_id] = bits;\n    if (planted != 2) " BARRIER},
       {"rank0, products, simd_id, lane);\n      " BARRIER,
        "rank0, products, simd_id, lane);\n      if (planted != 3) " BARRIER},
       {BARRIER "\n    }\n  }\n  if (own", "if (planted != 4) " BARRIER "\n    }\n  }\n  if (own"},
       {"if (own >= vocab) return;", "if (own >= vocab && planted != 5) return;"},
       {"if (uint(ids[batch[i]]) != own) continue;",
        "if (uint(ids[batch[planted == 6 ? 0 : i]]) != own) continue;"},
       {"const bool match = mine < tokens &&",
        "const bool match = (mine < tokens || planted == 7) &&"},
       {"if (count == 0) break;", "if (count == 0 || (planted == 8 && simd_id == 1)) break;"}});
}
METAL_LORA_FAULTS(EmbeddingGradFault, embedding_grad, kEmbeddingGradFaults);

}  // namespace
}  // namespace metal_lora::test
