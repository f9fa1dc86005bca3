// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/metal/plans_verify.h"

#include "kernels/metal/plan_parts.h"

namespace metal_lora::metal {
namespace {

constexpr uint32_t kThreads = 512;
constexpr const char* kName = "verify_tokens";

const Entry kGreedy = {
    "verify_greedy",
    {"verify_greedy"},
    {"logits", "draft_tokens", "p"},
    {"accepted", "next_token"},
    R"(
threadgroup float values[metal_lora::kVerifySimdgroups];
threadgroup int indices[metal_lora::kVerifySimdgroups];
metal_lora::verify_greedy(
    logits, draft_tokens, p[0], p[1], accepted, next_token, values, indices,
    threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)"};

const Entry kCertain = {
    "verify_certain",
    {"verify_sampled"},
    {"logits", "draft_tokens", "p"},
    {"accepted", "next_token"},
    R"(
threadgroup float spans[metal_lora::kVerifySimdgroups];
threadgroup float maxima[metal_lora::kVerifySimdgroups];
metal_lora::verify_sampled<false>(
    logits, draft_tokens, draft_tokens, p, accepted, next_token, spans, maxima,
    threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)"};

const Entry kSampled = {
    "verify_sampled",
    {"verify_sampled"},
    {"logits", "draft_tokens", "draft_probs", "p"},
    {"accepted", "next_token"},
    R"(
threadgroup float spans[metal_lora::kVerifySimdgroups];
threadgroup float maxima[metal_lora::kVerifySimdgroups];
metal_lora::verify_sampled<true>(
    logits, draft_tokens, draft_probs, p, accepted, next_token, spans, maxima,
    threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)"};

}  // namespace

Plan plan_verify(const VerifyShape& s) {
  require_size(s.batch, kName, "batch");
  require_size(s.vocab, kName, "vocab");
  require(s.vocab < (1u << 31), kName, "vocab must be below 2^31");
  require(s.temperature >= 0.0f, kName, "temperature must be 0 or more");
  const bool greedy = s.temperature == 0.0f, probabilities = !greedy && s.has_draft_probs;
  Plan plan;
  plan.entry = greedy ? &kGreedy : probabilities ? &kSampled : &kCertain;
  plan.template_args = {{"T", s.dtype}};
  plan.p = {s.drafts, s.vocab};
  if (!greedy) {
    plan.p.push_back(float_word(1.0f / s.temperature));
    plan.p.push_back(static_cast<uint32_t>(s.seed));
    plan.p.push_back(static_cast<uint32_t>(s.seed >> 32));
  }
  plan.threads_per_grid = {s.batch * kThreads, 1, 1};
  plan.threads_per_threadgroup = {kThreads, 1, 1};
  plan.why = greedy ? "one threadgroup a sequence: each row of logits once, up to the first draft "
                      "that is not the largest"
                    : "one threadgroup a sequence: each row once up to the first rejection, that "
                      "row once more and a part of it again for the draw";
  return plan;
}

}  // namespace metal_lora::metal
