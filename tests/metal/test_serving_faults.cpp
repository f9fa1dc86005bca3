// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Faults planted in the kernels of serving: many adapters, verification of drafts, quantising.
#include <limits>

#include "kernels/metal/plans_multi.h"
#include "kernels/metal/plans_quantize.h"
#include "kernels/metal/plans_verify.h"
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

// ---- many adapters ----

/// Three adapters of ranks max_rank, 0 and max_rank - 3; NaN beyond a true rank.
FaultyKernel multi(
    int n, int k, int max_rank, const std::vector<int32_t>& index, std::vector<Edit> edits) {
  Random random(81);
  constexpr int kAdapters = 3;
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const int m = static_cast<int>(index.size());
  const std::vector<int32_t> ranks = {max_rank, 0, max_rank - 3};
  auto a = random.normal(size_t(kAdapters) * max_rank * k, 0.2f);
  auto b = random.normal(size_t(kAdapters) * n * max_rank, 0.2f);
  for (size_t i = 0; i < a.size(); ++i) {
    const int row = static_cast<int>(i / k);
    if (row % max_rank >= ranks[row / max_rank]) a[i] = kNan;
  }
  for (size_t i = 0; i < b.size(); ++i) {
    if (int(i % max_rank) >= ranks[i / (size_t(n) * max_rank)]) b[i] = kNan;
  }
  metal::LoraMultiShape shape;
  shape.m = static_cast<uint32_t>(m);
  shape.n = static_cast<uint32_t>(n);
  shape.k = static_cast<uint32_t>(k);
  shape.format = WeightFormat::f16;
  shape.adapters = kAdapters;
  shape.max_rank = static_cast<uint32_t>(max_rank);
  shape.dtype = DType::f16;
  shape.lora_dtype = DType::f16;
  return faulty_kernel(
      "lora_multi.metal",
      metal::plan_lora_multi(shape),
      {{"x", random_array(random, {m, k}, mx::float16)},
       {"w", random_array(random, {n, k}, mx::float16, 0.2f)},
       {"a", stored(a, {kAdapters, max_rank, k}, mx::float16)},
       {"b", stored(b, {kAdapters, n, max_rank}, mx::float16)},
       {"ranks", int_array(ranks, {kAdapters})},
       {"adapter_scales", stored({1.0f, 2.0f, -3.0f}, {kAdapters}, mx::float32)},
       {"index", int_array(index, {m})}},
      {{"y", {{m, n}, mx::float16}}},
      std::move(edits));
}

const std::vector<Fault> kMultiVectorFaults = {
    {"u read before other simdgroups made theirs", FindingKind::race_threadgroup},
    {"columns of B beyond the true rank", FindingKind::uninitialized_read},
    {"an index that no adapter has", FindingKind::out_of_bounds},
    {"an adapter's share for all tokens", FindingKind::uninitialized_read},
    {"another adapter's scale", std::nullopt},
    {"indices past the last token", FindingKind::out_of_bounds},
    {"another adapter's A", std::nullopt},
};

FaultyKernel multi_vector() {
  return multi(
      37,
      1100,
      8,
      {2, -1, 9},
      {{"if (pass == 0) " BARRIER, "if (pass == 0 && planted != 1) " BARRIER},
       {"const uint rank = bank.rank(i);\n    const float scale",
        "const uint rank = planted == 2 ? bank.max_rank : bank.rank(i);\n    const float scale"},
       {"return adapter >= 0 && uint(adapter) < adapters ?",
        "return adapter >= 0 && (uint(adapter) < adapters || planted == 3) ?"},
       {"if (adapter[t] == i) sums[row][t] +=",
        "if (adapter[t] == i || planted == 4) sums[row][t] +="},
       {"float(bank.scales[i]);", "float(bank.scales[planted == 5 ? 0 : i]);"},
       {"const int adapter = token < m ?", "const int adapter = token < m || planted == 6 ?"},
       {"bank.a + (uint(i) * bank.max_rank + r) * k",
        "bank.a + (uint(planted == 7 ? 0 : i) * bank.max_rank + r) * k"}});
}
METAL_LORA_FAULTS(MultiVectorFault, multi_vector, kMultiVectorFaults);

const std::vector<Fault> kMultiTiledFaults = {
    {"tiles overwritten while others read them", FindingKind::race_threadgroup},
    {"tiles read before they are there", FindingKind::race_threadgroup},
    {"h takes the tiles' place too early", FindingKind::race_threadgroup},
    {"B read before it is there", FindingKind::race_threadgroup},
    {"an adapter's share for other adapters' tokens", std::nullopt},
    {"rows of A beyond the true rank", std::nullopt},
    {"the bases' rows go through the loop", FindingKind::out_of_bounds},
};

FaultyKernel multi_tiled() {
  return multi(
      70,
      64,
      40,
      {0, 2, -1, 1, 0, 0, 2, 9, 2, 2, 2, 2, 2, 2, 2, 2, -1, -1, 0, 1},
      {{"for (uint d0 = 0; d0 < k; d0 += BK) {\n    " BARRIER,
        "for (uint d0 = 0; d0 < k; d0 += BK) {\n    if (planted != 1) " BARRIER},
       {BARRIER "\n    for (int s = 0; s < Tile::STRIPS; ++s) {\n      const uint strip",
        "if (planted != 2) " BARRIER
        "\n    for (int s = 0; s < Tile::STRIPS; ++s) {\n      const uint strip"},
       {"\n  " BARRIER "\n  for (int s = 0; s < Tile::STRIPS; ++s) {\n    const uint strip",
        "\n  if (planted != 3) " BARRIER
        "\n  for (int s = 0; s < Tile::STRIPS; ++s) {\n    const uint strip"},
       {BARRIER "\n  const float scale", "if (planted != 4) " BARRIER "\n  const float scale"},
       {"if (mine) acc", "if (mine || planted == 5) acc"},
       {"const int valid = adapter[row] == i ?",
        "const int valid = adapter[row] == i || (planted == 5 && adapter[row] >= 0) ?"},
       {"const int valid = r0 + row < rank ? int(k)",
        "const int valid = r0 + row < (planted == 6 ? bank.max_rank : rank) ? int(k)"},
       {"bool first = i >= 0;", "bool first = i >= 0 || planted == 7;"}});
}
METAL_LORA_FAULTS(MultiTiledFault, multi_tiled, kMultiTiledFaults);

// ---- verification ----

/// Sequence 0 keeps all its drafts, 1 the first, the others none; greedily, each row's largest
/// logit is at `largest`, twice in the rows of sequence 1.
struct Rows {
  static constexpr int kBatch = 5, kDrafts = 4, kVocab = 1027;
  std::vector<float> logits;
  std::vector<int32_t> drafts;

  Rows() {
    Random random(82);
    logits = random.normal(size_t(kBatch) * (kDrafts + 1) * kVocab, 1.0f);
    for (int b = 0; b < kBatch; ++b) {
      for (int i = 0; i <= kDrafts; ++i) {
        const int largest = 100 * b + i;
        row(b, i)[largest] = 9.0f;
        if (b == 1) row(b, i)[largest + 600] = 9.0f;
        if (i == kDrafts) continue;
        const bool kept = b == 0 || (b == 1 && i == 0) || (b == 4 && i < 4);
        drafts.push_back(kept ? largest : largest + 50);
      }
    }
  }
  float* row(int b, int i) { return &logits[(size_t(b) * (kDrafts + 1) + i) * kVocab]; }
};

const ops::metal_ops::NamedOutputs kTokens = {
    {"accepted", {{Rows::kBatch}, mx::int32}}, {"next_token", {{Rows::kBatch}, mx::int32}}};

const std::vector<Fault> kGreedyFaults = {
    {"a row's largest overwritten while others read", FindingKind::race_threadgroup},
    {"largest read before other simdgroups found theirs", FindingKind::race_threadgroup},
    {"the highest token of equals", std::nullopt},
    {"logits past the last", FindingKind::out_of_bounds},
    {"another sequence's row", std::nullopt},
    {"every thread answers", FindingKind::race_device},
};

FaultyKernel greedy() {
  const Rows rows;
  const metal::VerifyShape shape{
      .batch = Rows::kBatch, .drafts = Rows::kDrafts, .vocab = Rows::kVocab};
  return faulty_kernel(
      "lora_speculative.metal",
      metal::plan_verify(shape),
      {{"logits",
        stored(rows.logits, {Rows::kBatch, Rows::kDrafts + 1, Rows::kVocab}, mx::float32)},
       {"draft_tokens", int_array(rows.drafts, {Rows::kBatch, Rows::kDrafts})}},
      kTokens,
      {{BARRIER "\n  if (lane == 0) {\n    values",
        "if (planted != 1) " BARRIER "\n  if (lane == 0) {\n    values"},
       {"indices[simd_id] = index;\n  }\n  " BARRIER,
        "indices[simd_id] = index;\n  }\n  if (planted != 2) " BARRIER},
       {"(value == best && at < index)", "(value == best && (planted == 3) != (at < index))"},
       {"v < vocab; v += kVerifyThreads",
        "v < vocab + (planted == 4 ? 1 : 0); v += kVerifyThreads"},
       {"(ulong(sequence) * (count + 1) + i) * vocab",
        "(ulong(sequence) * (planted == 5 ? count : count + 1) + i) * vocab"},
       {"if (simd_id == 0 && lane == 0) {\n    accepted",
        "if ((simd_id == 0 || planted == 6) && lane == 0) {\n    accepted"}});
}
METAL_LORA_FAULTS(GreedyFault, greedy, kGreedyFaults);

const std::vector<Fault> kSampledFaults = {
    {"parts' sums overwritten by the draw's", FindingKind::race_threadgroup},
    {"the draw's sums read before they are there", FindingKind::race_threadgroup},
    {"a row's sums overwritten while others read", FindingKind::race_threadgroup},
    {"a row's maxima read before they are there", FindingKind::race_threadgroup},
    {"rescaled sums read before they are there", FindingKind::race_threadgroup},
    {"drawn from the target, not from what is left", std::nullopt},
    {"the draft's own number drawn again", std::nullopt},
    {"every simdgroup answers", FindingKind::race_device},
    {"a draft outside the vocabulary", FindingKind::out_of_bounds},
};

/// Sequence 3's first draft is no token: it is refused, and the draw is from what is left.
FaultyKernel sampled() {
  Rows rows;
  rows.drafts[3 * Rows::kDrafts] = Rows::kVocab * Rows::kBatch * (Rows::kDrafts + 1);
  std::vector<float> q;
  for (int b = 0; b < Rows::kBatch; ++b) {
    for (int i = 0; i < Rows::kDrafts; ++i) {
      // Most on the target's favourite: what is left of the target is spread over the others.
      std::vector<float> row(Rows::kVocab, 0.0f);
      std::fill_n(row.begin(), 512, 0.02f / 512);
      row[100 * b + i] += 0.98f;
      q.insert(q.end(), row.begin(), row.end());
    }
  }
  metal::VerifyShape shape{.batch = Rows::kBatch, .drafts = Rows::kDrafts, .vocab = Rows::kVocab};
  shape.temperature = 0.8f;
  shape.has_draft_probs = true;
  shape.seed = 11;
  return faulty_kernel(
      "lora_speculative.metal",
      metal::plan_verify(shape),
      {{"logits",
        stored(rows.logits, {Rows::kBatch, Rows::kDrafts + 1, Rows::kVocab}, mx::float32)},
       {"draft_tokens", int_array(rows.drafts, {Rows::kBatch, Rows::kDrafts})},
       {"draft_probs", stored(q, {Rows::kBatch, Rows::kDrafts, Rows::kVocab}, mx::float32)}},
      kTokens,
      {{"sum = simd_sum(sum);\n  " BARRIER, "sum = simd_sum(sum);\n  if (planted != 1) " BARRIER},
       {"if (lane == 0) spans[simd_id] = sum;\n  " BARRIER,
        "if (lane == 0) spans[simd_id] = sum;\n  if (planted != 2) " BARRIER},
       {"* inv_t));\n  " BARRIER, "* inv_t));\n  if (planted != 3) " BARRIER},
       {"maxima[simd_id] = top;\n  }\n  " BARRIER,
        "maxima[simd_id] = top;\n  }\n  if (planted != 4) " BARRIER},
       {"(top - out.largest) * inv_t);\n  " BARRIER,
        "(top - out.largest) * inv_t);\n  if (planted != 5) " BARRIER},
       {"max(e / sum - float(q[q_row + v]), 0.0f)",
        "max(e / sum - (planted == 6 ? 0.0f : float(q[q_row + v])), 0.0f)"},
       {"verify_uniform(key, 2 * i + 1)", "verify_uniform(key, 2 * i + (planted == 7 ? 0 : 1))"},
       {"if (simd_id != 0) return;", "if (simd_id != 0 && planted != 8) return;"},
       {"if (draft >= 0 && uint(draft) < vocab) {",
        "if (draft >= 0 && (uint(draft) < vocab || planted == 9)) {"}});
}
METAL_LORA_FAULTS(SampledFault, sampled, kSampledFaults);

// ---- quantising ----

const std::vector<Fault> kQuantizeFaults = {
    {"weights past the last are read", FindingKind::out_of_bounds},
    {"extremes of a part of the group", std::nullopt},
    {"codes rounded down", std::nullopt},
    {"a scale from every lane", FindingKind::race_device},
    {"weights past the last are written", FindingKind::out_of_bounds},
};

FaultyKernel quantize() {
  Random random(83);
  constexpr int kN = 17, kK = 128;
  const metal::QuantizeShape shape{
      .n = kN, .k = kK, .format = WeightFormat::int4, .group_size = 64, .dtype = DType::f16};
  const OutputSpec groups{{kN, kK / 64}, mx::float16};
  return faulty_kernel(
      "lora_quantize.metal",
      metal::plan_quantize(shape),
      {{"w", random_array(random, {kN, kK}, mx::float16)}},
      {{"q", {{kN, kK / 8}, mx::uint32}}, {"scales", groups}, {"biases", groups}},
      {{"w + first, inside ? 8 : 0)", "w + first, inside || planted == 1 ? 8 : 0)"},
       {"step = LANES / 2; step > 0;", "step = LANES / 2; step > (planted == 2 ? 1 : 0);"},
       {"const float value = rint((float(in.v[word * 8 / WORDS + i]) - bias) / scale);",
        "const float exact = (float(in.v[word * 8 / WORDS + i]) - bias) / scale;\n"
        "      const float value = planted == 3 ? floor(exact) : rint(exact);"},
       {"if (lane8 % LANES == 0) {", "if (lane8 % LANES == 0 || planted == 4) {"},
       {"if (!inside) return;", "if (!inside && planted != 5) return;"}});
}
METAL_LORA_FAULTS(QuantizeFault, quantize, kQuantizeFaults);

}  // namespace
}  // namespace metal_lora::test
