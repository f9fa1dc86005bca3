// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A whole training step of a decoder (loss and the gradient of every adapter) as one enqueued
// sequence of kernels over one workspace: nothing is allocated, nothing returns to the host, and
// what the backward pass needs is kept or worked out again by a budget.
#pragma once

#include <vector>

#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {

/// A linear of a layer. A [rank, in] lies at element `a` of the flat parameters, B [out, rank] at
/// `b`; gradients alike. rank 0: no adapter.
struct TrainLinear {
  WeightView weight;
  const float* bias = nullptr;  ///< [out] or null
  uint32_t rank = 0;
  float scale = 0.0f;
  size_t a = 0, b = 0;
};

struct TrainLayer {
  const float* input_norm = nullptr;  ///< [dims]
  const float* post_norm = nullptr;
  TrainLinear q, k, v, o, gate, up, down;
  uint32_t window = 0;
};

/// Llama's geometry, by device pointers. dtype: of activations, bf16 or f16.
struct TrainModel {
  uint32_t dims = 0, q_heads = 0, kv_heads = 0, head_dim = 0, ffn = 0;
  float eps = 1e-5f, attention_scale = 0.0f, rope_factor = 1.0f;
  DType dtype = DType::bf16;
  std::vector<TrainLayer> layers;
  WeightView embedding, head;
  const float* final_norm = nullptr;
  const float* inv_freq = nullptr;  ///< [head_dim/2]
  size_t parameters = 0;            ///< f32 values of all adapters
};

/// A packed stream of tokens, device pointers; see ops::Segments.
struct TrainBatch {
  uint32_t tokens = 0;
  const int32_t* ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* segment_start = nullptr;
  const int32_t* targets = nullptr;
  const float* weights = nullptr;
};

/// What of the activations stays until the backward pass, as a number of layers from the last one
/// down (the first layers to be needed again); the others work it out again. By what a byte saves:
/// gate and up (two products), the norms' outputs, SwiGLU's output.
struct Retention {
  uint32_t gate_up = 0, norms = 0, act = 0;
  bool operator==(const Retention&) const = default;
};

/// The step's shape and memory, fixed by the number of tokens. Immutable; run() is for one stream
/// at a time, since it works in the one workspace.
class TrainStep {
 public:
  TrainStep(const TrainModel& model, uint32_t max_tokens, const Retention& kept);

  /// The most that fits a workspace of `budget_bytes`; nothing if even that does not fit.
  static Retention fit(const TrainModel& model, uint32_t max_tokens, size_t budget_bytes);

  /// Bytes of the workspace that run() needs, aligned to 256.
  size_t workspace_bytes() const { return workspace_bytes_; }
  const Retention& kept() const { return kept_; }

  /// loss f32 [1] = Σ weights·loss; grads f32 [parameters] overwritten, or null: the loss alone.
  void run(
      const Context& context,
      void* workspace,
      const TrainBatch& batch,
      const float* parameters,
      float* grads,
      float* loss) const;

 private:
  class Run;

  TrainModel model_;
  uint32_t max_tokens_ = 0;
  Retention kept_;
  size_t workspace_bytes_ = 0;
};

}  // namespace metal_lora::cuda
