// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The form for some dozen tokens, between lora_gemv and gemm_sm90's tiles.
#pragma once

#include "kernels/cuda/gemm.h"

namespace metal_lora::cuda {

/// The largest m of the skinny form.
inline constexpr uint32_t kSkinnyMaxTokens = 128;

/// Whether lora_skinny takes the group: can_gemm_sm90, right [n, k], results of the operands' type,
/// one left that all problems' first pairs share, and each problem's second pair, where there is
/// one, the output of a part of the one shrink.
bool can_lora_skinny(const Context& context, const GemmGroup& group);
/// Whether it beats gemm_sm90 there: W is split finely enough for every multiprocessor to read.
bool prefers_lora_skinny(const Context& context, const GemmGroup& group);
/// The group in one launch. u stays in shared memory: parts' `out` is not written, `plain` is.
void lora_skinny(const Context& context, const GemmGroup& group);

namespace sm90 {
/// For the bench and the tests.
struct SkinnyForm {
  uint32_t parts = 0;  ///< of k: blocks of a cluster, at most 8; 0: as lora_skinny chooses
  uint32_t rows = 64;  ///< of W, of a tile: 64 or 128
  bool wide = false;   ///< a block has a multiprocessor for itself
};
/// Whether three stages find room.
bool skinny_form_fits(const GemmGroup& group, const SkinnyForm& form);
SkinnyForm skinny_form(const Context& context, const GemmGroup& group);
void skinny_with_form(const Context& context, const GemmGroup& group, SkinnyForm form);
}  // namespace sm90

}  // namespace metal_lora::cuda
