// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The form for some dozen tokens, between lora_gemv and gemm_sm90's tiles.
#pragma once

#include "kernels/cuda/gemm.h"

namespace metal_lora::cuda {

/// The largest m of the skinny form.
inline constexpr uint32_t kSkinnyMaxTokens = 128;

/// Whether lora_skinny takes the group: can_gemm_sm90, right [n, k], a plain end, results of the
/// operands' type, no empty problem, one left that all problems' first pairs share, and each
/// problem's second pair, where there is one, the output of a part of the one shrink.
bool can_lora_skinny(const Context& context, const GemmGroup& group);
/// Whether it beats gemm_sm90 there: two blocks a tile find room at once, and stages are not more x
/// and A than L2 can give (above 64 tokens: rank 16 at most).
bool prefers_lora_skinny(const Context& context, const GemmGroup& group);
/// The group in one launch. u stays in shared memory: parts' `out` is not written, `plain` is.
void lora_skinny(const Context& context, const GemmGroup& group);

namespace sm90 {
/// For the bench and the tests: in how many parts k is split, 1 … 8 blocks of a cluster.
uint32_t skinny_parts(const Context& context, const GemmGroup& group);
void skinny_with_parts(const Context& context, const GemmGroup& group, uint32_t parts);
}  // namespace sm90

}  // namespace metal_lora::cuda
