// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <functional>

#include "metal_lora/model.h"
#include "src/train/batches.h"
#include "src/train/dataset.h"

namespace metal_lora::train {

struct LossSum {
  double loss = 0.0;
  int64_t tokens = 0;
};

/// Σ loss and Σ trained tokens of the planned micro-batches, forward only. `after_batch` gets the
/// fraction done and may throw to stop.
LossSum evaluate_batches(
    const Model& model,
    const AdapterWeights& adapter,
    const Dataset& dataset,
    const StepSamples& plan,
    const std::function<void(double)>& after_batch);

}  // namespace metal_lora::train
