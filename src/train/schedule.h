// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "metal_lora/train.h"

namespace metal_lora::train {

/// Learning rate by number of optimizer steps already taken (0 for the first). Pure; any thread.
using Schedule = std::function<double(int64_t step)>;

/// MLX's formulas (mlx.optimizers.schedulers) in f64, joined with a linear warm-up as mlx-lm does:
/// warm-up over steps 0 … warmup, then the schedule from its own step 0 at warmup + 1.
/// Error invalid_input for an unknown name or wrong arguments, naming `where`.
Schedule make_schedule(const ScheduleConfig& config, const std::string& where = "lr_schedule");

/// The schedule of a run: lr_schedule with what it leaves open taken from the configuration (no
/// name: constant; no arguments: from learning_rate down to 0 over the iterations that remain after
/// the warm-up), or a constant learning_rate.
ScheduleConfig resolve_schedule(const TrainingConfig& config);

}  // namespace metal_lora::train
