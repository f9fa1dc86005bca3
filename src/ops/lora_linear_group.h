// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Linears that share one input, without their arrays: what lora_linear's CPU and Metal forms share.
#pragma once

#include <optional>
#include <vector>

#include <mlx/array.h>

#include "metal_lora/ops.h"
#include "src/launch/launch.h"

namespace metal_lora::ops {

/// What a branch is, without its arrays: those are graph inputs.
struct Branch {
  Weight weight;
  LoraParams lora;
  std::optional<mlx::core::array> bias;
  /// On CUDA u goes from forward to backward as its products read it: scaled, in x's type.
  bool keeps_low = false;
  int u_columns = 0;  ///< the rank, or more
  bool has_lora() const { return lora.rank > 0; }
};

struct Group {
  uint32_t tokens = 0, in_features = 0;
  DType dtype = DType::f32;
  std::vector<Branch> branches;
};

/// Which gradients a backward launch makes.
struct Wanted {
  bool dx = false;
  std::vector<bool> adapter;  ///< per branch
};

/// inputs: x, then A and B of each branch that has an adapter; outputs: y, then u where there is
/// one, of each branch. One dispatch a branch in the fused form, two in the split one.
Arrays lora_linear_metal(const Group& group, const Arrays& inputs);

/// inputs: x, then per branch dy, and A, B, u where there is an adapter; outputs: dx if wanted,
/// then dA and dB (f32) of each branch whose adapter's gradient is.
Arrays lora_linear_backward_metal(
    const Group& group, const Wanted& wanted, const Arrays& inputs, mlx::core::StreamOrDevice s);

}  // namespace metal_lora::ops
