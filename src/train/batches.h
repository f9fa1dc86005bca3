// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/train/dataset.h"

namespace metal_lora::train {

/// Samples end to end as one packed stream: no padding, and attention never crosses segments. A
/// sample of n tokens takes n − 1 places: its last token is only a target.
struct MicroBatch {
  std::vector<int32_t> tokens, targets;
  std::vector<int32_t> positions;      ///< from 0 in each segment
  std::vector<int32_t> segment_start;  ///< index of the segment's first token
  std::vector<float> weights;          ///< 1 where the target is trained on, else 0
  int64_t trained_tokens = 0;
  int64_t sample_tokens = 0;  ///< tokens of the samples, the last ones included
};
MicroBatch make_micro_batch(const Dataset& dataset, std::span<const uint32_t> samples);

/// The samples of one optimizer step, by micro-batch.
using StepSamples = std::vector<std::vector<uint32_t>>;

struct BatchOptions {
  int batch_size = 4;
  int grad_accumulation_steps = 1;
  bool packing = false;  ///< batch_size streams of up to max_seq_length tokens each
  int max_seq_length = 2048;
  uint64_t seed = 0;
};

/// Which samples each step of an epoch sees. Every sample comes once per epoch. Samples of like
/// length share a step (sorted within the shuffled epoch), and the steps come in shuffled order.
/// Steps depend on batch_size · grad_accumulation_steps alone, so that 1 × 4, 2 × 2 and 4 × 1 train
/// alike. A pure function of (dataset, options, epoch): {epoch, index} is all that resuming needs.
std::vector<StepSamples> plan_epoch(
    const Dataset& dataset, const BatchOptions& options, uint64_t epoch);

/// Micro-batches for measuring a loss: `batches` of batch_size samples drawn once with a fixed seed
/// (−1: all samples).
StepSamples plan_evaluation(const Dataset& dataset, int batch_size, int batches);

/// The most tokens that a micro-batch of any epoch can have.
int64_t largest_micro_batch(const Dataset& dataset, const BatchOptions& options);

}  // namespace metal_lora::train
