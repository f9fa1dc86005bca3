// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/params.h"

namespace metal_lora::cpu {

/// Speculative verification (Leviathan et al., arXiv:2211.17192). logits [batch, drafts + 1, vocab]
/// of p.dtype, draft_tokens int32 [batch, drafts], draft_probs f32 [batch, drafts, vocab] or null
/// (each draft counts as certain). Writes accepted, next_token int32 [batch].
///
/// temperature 0: draft i is kept while it is row i's argmax (the lowest token of equals); the
/// first other argmax, or row `drafts`' own, comes next.
/// Else, with P = softmax(row / temperature): draft x is kept iff u·q(x) < P(x); the token after
/// the first one refused is drawn from max(P - q, 0), scaled to 1 (P itself where that is 0
/// everywhere; P without x where x counted as certain); after all of them from P of row `drafts`. A
/// draft outside the vocabulary is refused. A row without a distribution (NaN, +infinity, nothing
/// above -infinity) ends its sequence there with next_token -1.
///
/// Uniforms are counter_hash(seed, sequence, counter) / 2^32 cut to 24 bits, counter 2i for draft
/// i, 2i + 1 for the draw after i drafts. Same bits on every instruction set and for any number of
/// threads; a sequence does not depend on the others, only on its place. Thread-safe.
void verify_tokens(
    const VerifyParams& p,
    const void* logits,
    const int32_t* draft_tokens,
    const float* draft_probs,
    int32_t* accepted,
    int32_t* next_token);

/// The generator of dropout's masks: 32 bits for (seed, row, column).
uint32_t counter_hash(uint64_t seed, uint32_t row, uint32_t column);

}  // namespace metal_lora::cpu
