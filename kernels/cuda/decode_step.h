// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A decode step on CUDA: a few tokens of one sequence through all layers and the head, as one
// sequence of kernels that is captured once and replayed: positions and ids come from device
// memory.
#pragma once

#include <map>
#include <vector>

#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {

struct DecodeLinear {
  WeightView weight;
  LoraView lora;
  const float* bias = nullptr;  ///< [out] or null
};

struct DecodeLayer {
  const float* input_norm = nullptr;  ///< [dims]
  const float* post_norm = nullptr;
  const float* q_norm = nullptr;  ///< per-head norms [head_dim], or null
  const float* k_norm = nullptr;
  DecodeLinear q, k, v, o, gate, up, down;
  uint32_t window = 0;
};

/// By device pointers; see cpu::decode_layer for the formulas. dtype: of the cache and of what
/// linears read.
struct DecodeModel {
  uint32_t dims = 0, q_heads = 0, kv_heads = 0, head_dim = 0, ffn = 0;
  float eps = 1e-5f, attention_scale = 0.0f, rope_factor = 1.0f;
  DType dtype = DType::bf16;
  std::vector<DecodeLayer> layers;
  WeightView embedding, head;
  LoraView embedding_lora;
  const float* final_norm = nullptr;
  const float* inv_freq = nullptr;  ///< [head_dim/2]
};

/// The model made ready for steps of up to kVectorMaxTokens tokens. One step at a time.
class DecodeStep {
 public:
  explicit DecodeStep(DecodeModel model);
  ~DecodeStep();
  DecodeStep(const DecodeStep&) = delete;
  DecodeStep& operator=(const DecodeStep&) = delete;

  /// Bytes of the workspace that run() needs.
  size_t workspace_bytes() const { return workspace_bytes_; }

  /// The residual stream stays f32 between layers. Writes rows position … position + count - 1 of
  /// the cache [layers, 2, capacity, kv_heads, head_dim] and the logits f32 [rows, vocab] of the
  /// last `rows` tokens. ids are host memory, in range; position + count ≤ capacity. Launches onto
  /// context.stream, which must not be capturing; the graph for (count, rows, cache, capacity) is
  /// captured at its first use.
  void run(
      const Context& context,
      void* workspace,
      const int32_t* ids,
      uint32_t count,
      uint32_t position,
      uint32_t capacity,
      uint32_t rows,
      void* cache,
      float* logits);

 private:
  class Run;
  struct Layout;
  Layout layout() const;
  struct Key {
    uint32_t count, rows, capacity;
    void* cache;
    void* workspace;
    auto operator<=>(const Key&) const = default;
  };

  DecodeModel model_;
  size_t workspace_bytes_ = 0;
  std::map<Key, cudaGraphExec_t> graphs_;
};

}  // namespace metal_lora::cuda
