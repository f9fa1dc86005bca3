// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What fusing is compared with: LoRA as a sequence of plain kernels. See plans.h.
#pragma once

#include "kernels/metal/plans.h"

namespace metal_lora::metal {

/// Inputs y, z [m, n] of `dtype`, p; output sum = y + scale·z. Throws std::invalid_argument.
Plan plan_add_scaled(uint32_t m, uint32_t n, float scale, DType dtype);

/// Inputs x [m, k], w [n, k] of `dtype`, p; output y [m, n]. Throws std::invalid_argument.
Plan plan_plain_linear(uint32_t m, uint32_t n, uint32_t k, DType dtype);

}  // namespace metal_lora::metal
