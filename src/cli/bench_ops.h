// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "src/cli/bench_timing.h"
#include "src/cli/console.h"

namespace metal_lora::cli {

struct OpResult {
  std::string name, dtype, shape;
  std::string form;  ///< which kernel the shape takes
  Timing timing;
  double flops = 0.0, bytes = 0.0;
  bool computes_in_f32 = true;  ///< which limit is its own: f32 or bf16

  double gflops() const { return flops / timing.median_ms / 1e6; }
  double gbps() const { return bytes / timing.median_ms / 1e6; }
  /// Time that the machine's limits allow, over the time taken (a roofline).
  double share_of_limit(const MachineLimits& limits) const;
};

/// lora_linear at several sizes and weight formats, attention, cross-entropy and AdamW; each result
/// goes to `on_result` as it comes.
void bench_ops(const std::function<void(const OpResult&)>& on_result);

/// Which kernel form and instruction set a lora_linear of this shape takes, in words.
std::string kernel_form(uint32_t tokens, const std::string& weight_format, uint32_t n, uint32_t k);

}  // namespace metal_lora::cli
