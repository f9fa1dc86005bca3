// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Entries of gemm_sm90.cu that only its test and its benchmark call.
#pragma once

#include "kernels/cuda/gemm.h"

namespace metal_lora::cuda::sm90 {
/// How many tile widths and clusters there are.
int form_count();
const char* form_name(int form);
bool form_fits(const Context& context, const GemmGroup& group, int form);
/// As gemm_sm90 with one of them that fits; -1: the one that it would choose.
uint32_t act_parts_with_form(const Context& context, const GemmGroup& group, int form);
void gemm_with_form(const Context& context, const GemmGroup& group, int form);
int chosen_form(const Context& context, const GemmGroup& group);
}  // namespace metal_lora::cuda::sm90
