// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

namespace metal_lora::cli {

struct Timing {
  double median_ms = 0.0, p10_ms = 0.0, p90_ms = 0.0;
  int runs = 0;
};

/// Median and percentiles (nearest rank) of values, in their own unit.
Timing summarize(std::vector<double> values);

/// Wall time of `run(i)`, i = 0, 1, …: two warm-up calls, then at least 30 (fewer only when each
/// takes so long that `budget_seconds` are over after 5).
Timing measure(const std::function<void(int)>& run, double budget_seconds = 3.0);

/// What this machine can do at most, measured now: figures are given as a share of it.
struct MachineLimits {
  double f32_gflops = 0.0;  ///< multiply-adds on registers, all threads
  double bf16_gflops =
      0.0;                 ///< bf16 dot products on registers; f32's where there is no instruction
  double read_gbps = 0.0;  ///< streaming read of a buffer beyond the caches
};
MachineLimits measure_limits();
nlohmann::ordered_json to_json(const MachineLimits& limits);

}  // namespace metal_lora::cli
