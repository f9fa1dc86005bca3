// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The form for some dozen tokens, between lora_gemv and gemm_sm90's tiles.
#pragma once

#include "kernels/cuda/gemm.h"

namespace metal_lora::cuda {

/// The largest m of the skinny form.
inline constexpr uint32_t kSkinnyMaxTokens = 256;

/// Whether lora_skinny takes the group: can_gemm_sm90, right [n, k], results of the operands' type,
/// one left that all problems' first pairs share, and each problem's second pair, where there is
/// one, the output of a part of the one shrink.
bool can_lora_skinny(const Context& context, const GemmGroup& group);
/// Whether it beats gemm_sm90 there: W is split finely enough for every multiprocessor to read.
bool prefers_lora_skinny(const Context& context, const GemmGroup& group);
/// The group in one launch. u stays in shared memory: parts' `out` is not written, `plain` is.
void lora_skinny(const Context& context, const GemmGroup& group);

namespace sm90 {
/// For the bench and the tests: blocks of a cluster along k (0: as lora_skinny chooses) and along n,
/// tokens of a tile: 32, 64 or 128 (0: as many as there are).
struct SkinnyForm {
  uint32_t parts_k = 0, parts_n = 1, tokens = 0;
};
SkinnyForm skinny_form(const Context& context, const GemmGroup& group);
void skinny_with_form(const Context& context, const GemmGroup& group, SkinnyForm form);
}  // namespace sm90

}  // namespace metal_lora::cuda
