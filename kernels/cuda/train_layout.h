// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Where everything of a training step lies in its workspace.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "kernels/cuda/pack_adapter.h"
#include "kernels/cuda/train_step.h"

namespace metal_lora::cuda {

inline constexpr size_t kTrainElement = 2;  ///< bytes of a bf16 or f16
inline constexpr size_t kTrainLossScratchBytes = size_t{320} << 20;
inline constexpr size_t kTrainStageScratchBytes = size_t{64} << 20;

/// The linears of a layer, in order.
enum TrainSlot { kQ, kK, kV, kO, kGate, kUp, kDown, kTrainSlots };

inline std::array<const TrainLinear*, kTrainSlots> linears_of(const TrainLayer& layer) {
  return {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
}

/// W is read as it lies; others go through a 16-bit copy.
inline bool is_dense(const WeightParams& w, DType dtype) {
  return w.format == (dtype == DType::bf16 ? WeightFormat::bf16 : WeightFormat::f16);
}

inline size_t aligned_bytes(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/// Offsets into the workspace.
struct TrainLayout {
  struct Layer {
    size_t h = 0, qkv = 0, attended = 0, logsumexp = 0, h2 = 0;
    size_t gate_up = 0, x1 = 0, x2 = 0, act = 0;
    bool keeps_gate_up = false, keeps_norms = false, keeps_act = false;
    std::array<size_t, kTrainSlots> u{};  ///< linears with one input: columns of one matrix
    std::array<uint32_t, kTrainSlots> u_stride{};
  };
  size_t packed = 0, flags = 0, rope = 0, final_h = 0, normed = 0, d_normed = 0;
  std::vector<Layer> layers;
  // One at a time.
  size_t loss_scratch = 0;
  size_t act_parts = 0;  ///< where d_act lies, which the backward pass alone has
  size_t d_act = 0, d_attended = 0, d_qkv = 0, d_x = 0;
  std::array<size_t, 2> d_h{};
  std::array<size_t, kTrainSlots> v{};
  size_t dense = 0, dense_bytes = 0;
  size_t stage = 0;
  size_t bytes = 0;
  // Of the packed adapters, in elements.
  std::vector<std::array<PackedAdapter, kTrainSlots>> adapters;
};

TrainLayout make_train_layout(const TrainModel& model, uint32_t max_tokens, const Retention& kept);

}  // namespace metal_lora::cuda
