// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <mlx/array.h>

#include "kernels/cpu/decode.h"
#include "metal_lora/ops.h"

namespace metal_lora::ops {

struct DecodeLayer {
  LoraLinear q, k, v, o, gate, up, down;
  mlx::core::array input_norm, post_norm;  ///< f32
  std::optional<mlx::core::array> q_norm, k_norm;
  int window = 0;
};

/// A model and an adapter made ready for decode steps: pointers resolved once, arrays kept alive.
/// Immutable, thread-safe; not differentiable.
class DecodePlan {
 public:
  struct Geometry {
    int dims = 0, q_heads = 0, kv_heads = 0, head_dim = 0, ffn = 0;
    float eps = 1e-5f, attention_scale = 0.0f, rope_factor = 1.0f;
    DType dtype = DType::f32;
  };
  DecodePlan(
      const Geometry& geometry,
      std::vector<DecodeLayer> layers,
      LoraLinear embedding,
      Weight head,
      mlx::core::array final_norm,
      std::vector<float> inv_freq);

 private:
  friend std::pair<mlx::core::array, mlx::core::array> decode_step(
      std::shared_ptr<const DecodePlan>,
      std::span<const int32_t>,
      const mlx::core::array&,
      int,
      int);
  void run(
      std::span<const int32_t> tokens,
      int position,
      int capacity,
      int rows,
      float* logits,
      void* cache) const;

  struct Cuda;  ///< the plan on a CUDA device; null elsewhere
  std::shared_ptr<Cuda> cuda_;
  Geometry geometry_;
  std::vector<DecodeLayer> layers_;
  std::vector<cpu::DecodeLayerView> views_;
  LoraLinear embedding_;
  Weight head_;
  mlx::core::array final_norm_;
  std::vector<float> inv_freq_;
};

/// One to eight tokens through all layers in one launch: {logits f32 [rows, vocab] of the last
/// `rows` tokens, cache}. The cache is [layers, 2, capacity, kv_heads, head_dim]; entries
/// position … position + tokens - 1 are written, in place where the caller lets go of it.
std::pair<mlx::core::array, mlx::core::array> decode_step(
    std::shared_ptr<const DecodePlan> plan,
    std::span<const int32_t> tokens,
    const mlx::core::array& cache,
    int position,
    int rows);

/// The most tokens that decode_step takes.
inline constexpr int kDecodeMaxTokens = static_cast<int>(cpu::kGemvMaxTokens);

/// Whether the active backend has decode_step (CPU, CUDA); the others run a token as any other
/// sequence.
bool has_decode_step();

/// f32 logits [rows, vocab] = x [rows, dims] · headᵀ. Inference only.
mlx::core::array logits(const mlx::core::array& x, const Weight& head);

}  // namespace metal_lora::ops
