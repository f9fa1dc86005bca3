// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/metal/plans_train.h"

#include <algorithm>
#include <cmath>

#include "kernels/metal/plan_parts.h"

namespace metal_lora::metal {
namespace {

constexpr uint32_t kTileColumns = 128;
constexpr uint32_t kEmbeddingRanks = 16;
constexpr uint32_t kThreads = 256;
constexpr uint32_t kChunk = 4096;  // elements of an AdamW threadgroup: 16 a thread

const Entry kGrad = {
    "lora_grad",
    {"lora_grad"},
    {"x", "v", "dy", "u", "p"},
    {"da", "db"},
    R"(
threadgroup float left_tile[metal_lora::kGradTokens * (RT + 4)];
threadgroup float right_tile[metal_lora::kGradTokens * (metal_lora::kGradColumns + 4)];
metal_lora::lora_grad<RT, DROP>(
    x, v, dy, u, p, uint(x_shape[0]), uint(x_shape[1]), uint(dy_shape[1]), uint(v_shape[1]), da,
    db, left_tile, right_tile, threadgroup_position_in_grid, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
)"};

const Entry kEmbeddingGrad = {
    "lora_embedding_grad",
    {"lora_embedding_grad"},
    {"ids", "dy", "a", "b", "p"},
    {"da", "db"},
    R"(
threadgroup float left_tile[metal_lora::kGradTokens * (metal_lora::kEmbedRanks + 4)];
threadgroup float right_tile[metal_lora::kGradTokens * (metal_lora::kGradColumns + 4)];
threadgroup uint matches[8];
metal_lora::lora_embedding_grad(
    ids, dy, a, b, p, uint(ids_shape[0]), uint(a_shape[1]), uint(dy_shape[1]), uint(a_shape[0]),
    da, db, left_tile, right_tile, matches, threadgroup_position_in_grid,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)"};

const Entry kAdamWSingle = {
    "adamw",
    {"adamw"},
    {"param", "grad", "m", "v", "h", "p"},
    {"new_param", "new_m", "new_v", "grad_norm", "skipped"},
    R"(
threadgroup float scratch[24];
metal_lora::adamw_single(
    param, grad, m, v, h, p, new_param, new_m, new_v, grad_norm, skipped, scratch,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)"};

const Entry kAdamWNorm = {
    "adamw_norm",
    {"adamw_norm"},
    {"grad", "p"},
    {"partial"},
    R"(
threadgroup float scratch[24];
metal_lora::adamw_norm(
    grad, p, partial, scratch, threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup,
    thread_index_in_simdgroup);
)"};

const Entry kAdamWUpdate = {
    "adamw_update",
    {"adamw"},
    {"param", "grad", "m", "v", "partial", "h", "p"},
    {"new_param", "new_m", "new_v", "grad_norm", "skipped"},
    R"(
threadgroup float scratch[24];
metal_lora::adamw_update(
    param, grad, m, v, partial, h, p, new_param, new_m, new_v, grad_norm, skipped, scratch,
    threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)"};

/// Threadgroups of 256 threads.
void set_grid(Plan& plan, uint32_t groups_x, uint32_t groups_y = 1) {
  plan.threads_per_grid = {groups_x * kThreads, groups_y, 1};
  plan.threads_per_threadgroup = {kThreads, 1, 1};
}

void require_rank(uint32_t rank, const char* kernel) {
  require(
      rank >= 1 && rank <= 256, kernel, "rank must be in [1, 256] but is " + std::to_string(rank));
}

}  // namespace

Plan plan_lora_grad(const LoraGradShape& s) {
  require_rank(s.rank, "lora_grad");
  require_size(uint64_t{s.m} * s.k, "lora_grad", "x");
  require_size(uint64_t{s.m} * s.n, "lora_grad", "dy");
  require_size(uint64_t{std::max(s.n, s.k)} * s.rank, "lora_grad", "dA or dB");
  require(s.dropout >= 0.0f && s.dropout < 1.0f, "lora_grad", "dropout must be in [0, 1)");
  const uint32_t ranks = s.rank <= 8 ? 8 : s.rank <= 16 ? 16 : 32;
  const uint32_t chunks = ceil_div(s.rank, ranks);
  const bool drop = s.dropout > 0.0f;
  Plan plan;
  plan.entry = &kGrad;
  plan.template_args = {{"T", s.dtype}, {"RT", static_cast<int>(ranks)}, {"DROP", drop}};
  // As the CPU's: threshold = p·2³² in f64, the factor in f32.
  const auto threshold =
      static_cast<uint32_t>(std::min(4294967295.0, static_cast<double>(s.dropout) * 4294967296.0));
  plan.p = {
      float_word(s.scale),
      threshold,
      float_word(1.0f / (1.0f - s.dropout)),
      static_cast<uint32_t>(s.dropout_seed),
      static_cast<uint32_t>(s.dropout_seed >> 32)};
  set_grid(plan, ceil_div(s.k, kTileColumns) + ceil_div(s.n, kTileColumns), chunks);
  plan.why = "one dispatch for dA and dB: x and dy are read " + std::to_string(chunks) +
             " time(s) (chunks of " + std::to_string(ranks) +
             " ranks), v and u once for each 128 columns";
  return plan;
}

Plan plan_lora_embedding_grad(const LoraEmbeddingShape& s) {
  require_rank(s.rank, "lora_embedding_grad");
  require_size(uint64_t{s.tokens} * s.dims, "lora_embedding_grad", "dy");
  require_size(uint64_t{s.vocab} * s.rank, "lora_embedding_grad", "dA");
  require_size(uint64_t{s.dims} * s.rank, "lora_embedding_grad", "dB");
  Plan plan;
  plan.entry = &kEmbeddingGrad;
  plan.template_args = {{"T", s.dtype}, {"LT", s.lora_dtype}};
  plan.p = {float_word(s.scale)};
  const uint32_t chunks = ceil_div(s.rank, kEmbeddingRanks);
  set_grid(plan, ceil_div(s.vocab, kThreads) + ceil_div(s.dims, kTileColumns), chunks);
  plan.why =
      "one dispatch for dA and dB: each token's product with B is made by the threadgroup "
      "that owns its id, once for each of " +
      std::to_string(chunks) + " chunk(s) of 16 ranks";
  return plan;
}

uint32_t adamw_partials(uint64_t count) {
  return std::min<uint32_t>(256, ceil_div(count, 4 * kChunk));
}

std::vector<Plan> plan_adamw(uint64_t count) {
  require_size(count, "adamw", "param");
  const auto n = static_cast<uint32_t>(count);
  Plan update;
  if (count <= kAdamWSingleCount) {
    update.entry = &kAdamWSingle;
    update.p = {n};
    set_grid(update, 1);
    update.why = "one threadgroup takes the norm and updates: gradients are read twice";
    return {update};
  }
  const uint32_t partials = adamw_partials(count);
  Plan norm;
  norm.entry = &kAdamWNorm;
  norm.p = {n, ceil_div(count, partials)};
  set_grid(norm, partials);
  norm.why = "partial norms of " + std::to_string(partials) + " chunks: 4 bytes an element";
  update.entry = &kAdamWUpdate;
  update.p = {n, kChunk, partials};
  set_grid(update, ceil_div(count, kChunk));
  update.why =
      "the update after the norm, which needs every gradient first: 28 bytes an element, "
      "and the partial norms once for each 4096";
  return {norm, update};
}

std::array<float, 8> adamw_factors(const AdamWParams& p) {
  const double t = static_cast<double>(p.step), rate = p.learning_rate;
  const double bias1 = p.bias_correction ? 1.0 - std::pow(double{p.beta1}, t) : 1.0;
  const double bias2 = p.bias_correction ? 1.0 - std::pow(double{p.beta2}, t) : 1.0;
  return {
      p.grad_scale,
      p.clip_norm,
      p.beta1,
      p.beta2,
      static_cast<float>(1.0 - rate * p.weight_decay),
      static_cast<float>(rate / bias1),
      static_cast<float>(1.0 / std::sqrt(bias2)),
      p.eps};
}

}  // namespace metal_lora::metal
