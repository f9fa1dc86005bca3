// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <cmath>

#include <mlx/ops.h>

#include "kernels/cpu/lora_speculative.h"
#include "kernels/metal/plans_verify.h"
#include "metal_lora/ops.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/metal_ops.h"

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/transformer_kernels.h"
#endif

namespace mx = mlx::core;

namespace metal_lora::ops {

Verification verify_tokens(
    const mx::array& target_logits,
    const mx::array& draft_tokens,
    const std::optional<mx::array>& draft_probs,
    float temperature,
    uint64_t seed) {
  constexpr const char* kOp = "verify_tokens";
  check_shape(kOp, "draft_tokens", draft_tokens, {-1, -1});
  check_dtype(kOp, "draft_tokens", draft_tokens, mx::int32);
  const int batch = draft_tokens.shape(0), drafts = draft_tokens.shape(1);
  check_shape(kOp, "target_logits", target_logits, {batch, drafts + 1, -1});
  const int vocab = target_logits.shape(2);
  if (vocab < 1) refuse(kOp, "the vocabulary", "at least 1 token", std::to_string(vocab));
  if (!(temperature >= 0.0f && std::isfinite(temperature))) {
    refuse(kOp, "temperature", "finite and at least 0", fmt::format("{}", temperature));
  }
  VerifyParams p;
  p.batch = static_cast<uint32_t>(batch);
  p.drafts = static_cast<uint32_t>(drafts);
  p.vocab = static_cast<uint32_t>(vocab);
  p.dtype = to_kernel(target_logits.dtype());
  p.temperature = temperature;
  p.seed = seed;
  Launch verify{
      .kernel = kOp,
      .inputs = {target_logits, draft_tokens},
      .outputs = {{{batch}, mx::int32}, {{batch}, mx::int32}}};
  if (draft_probs) {
    check_shape(kOp, "draft_probs", *draft_probs, {batch, drafts, vocab});
    check_dtype(kOp, "draft_probs", *draft_probs, mx::float32);
    verify.inputs.push_back(*draft_probs);
  }
  const auto call = [p](auto, auto entry, const KernelArgs& args) {
    entry(
        p,
        args.in[0],
        static_cast<const int32_t*>(args.in[1]),
        args.in.size() > 2 ? static_cast<const float*>(args.in[2]) : nullptr,
        static_cast<int32_t*>(args.out[0]),
        static_cast<int32_t*>(args.out[1]));
  };
  verify.cpu = on_cpu(call, cpu::verify_tokens);
  verify.cuda = METAL_LORA_ON_CUDA(call, verify_tokens);
  verify.metal = [p](const Arrays& in, mx::StreamOrDevice) {
    metal::VerifyShape shape;
    shape.batch = p.batch;
    shape.drafts = p.drafts;
    shape.vocab = p.vocab;
    shape.dtype = p.dtype;
    shape.temperature = p.temperature;
    // A buffer cannot be empty: without drafts the kernel gets a word that it does not read.
    shape.has_draft_probs = in.size() > 2 && p.drafts > 0;
    shape.seed = p.seed;
    metal_ops::NamedArrays arrays{
        {"logits", in[0]}, {"draft_tokens", p.drafts > 0 ? in[1] : mx::array({0}, mx::int32)}};
    if (in.size() > 2) arrays.insert_or_assign("draft_probs", in[2]);
    const OutputSpec ints{{static_cast<int>(p.batch)}, mx::int32};
    metal_ops::run_plans(
        {metal_ops::planned(kOp, metal::plan_verify, shape)},
        arrays,
        {{"accepted", ints}, {"next_token", ints}});
    return Arrays{arrays.at("accepted"), arrays.at("next_token")};
  };
  const auto outputs = launch(std::move(verify));
  return {outputs[0], outputs[1]};
}

}  // namespace metal_lora::ops
