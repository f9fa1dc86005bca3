// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cpu/lora_kernels.h"
#include "metal_lora/ops.h"

namespace metal_lora::ops {

inline cpu::WeightView weight_view(const Weight& w) {
  return {w.params(), w.data(), w.scales(), w.biases()};
}

}  // namespace metal_lora::ops
