// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Dispatch of the verification of drafted tokens. See plans.h.
#pragma once

#include "kernels/metal/plans.h"

namespace metal_lora::metal {

struct VerifyShape {
  /// drafts 0: one token of each sequence; draft_tokens is then not read (nor may it be empty).
  uint32_t batch = 0, drafts = 0, vocab = 0;
  DType dtype = DType::f32;      ///< of the logits
  float temperature = 0.0f;      ///< 0: greedy
  bool has_draft_probs = false;  ///< false and temperature > 0: drafts count as certain
  uint64_t seed = 0;
};

/// Inputs logits [batch, drafts + 1, vocab], draft_tokens int32 [batch, drafts], draft_probs f32
/// [batch, drafts, vocab] where temperature > 0 and has_draft_probs, p; outputs accepted and
/// next_token int32 [batch]. A sequence that meets a row without a distribution (NaN, +infinity or
/// nothing but -infinity) stops there with next_token -1. Rejection sampling keeps the target's
/// distribution: Leviathan et al., Fast inference from transformers via speculative decoding
/// (arXiv:2211.17192). Without drafts the next token is drawn from the one row; draft_tokens is
/// then any array. Throws std::invalid_argument (a batch or vocab of 0, a temperature below 0).
Plan plan_verify(const VerifyShape& shape);

}  // namespace metal_lora::metal
