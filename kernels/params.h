// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Plain parameter structs shared by the kernels of all backends. No pointers, no framework types:
// a kernel entry takes one of these and raw pointers, so that it is tested, fuzzed and timed alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace metal_lora {

/// Storage types. Sums are always 32-bit (f32), whatever the storage.
enum class DType : uint32_t { f32 = 0, f16 = 1, bf16 = 2 };

/// How a base weight W [n, k] (out, in) is stored.
/// Affine formats follow MLX: w = q · scale[group] + bias[group], groups of `group_size` along k,
/// q packed little-endian in uint32 (int4: 8 per word; int8: 4 per word), scales/biases [n, k/group].
/// nf4 (Dettmers et al., QLoRA, arXiv:2305.14314): w = level[q] · absmax[i], blocks of 64 along k
/// (k % 64 == 0), q packed as int4's, i = (row·k + column)/64. The levels are in kernels/nf4.h.
///   plain: scales = absmax, f32 [n, k/64]; no biases.
///   double-quantised: scales = uint8 codes c [n·k/64]; biases = f32 {offset, code[256],
///   absmax2[⌈n·k/64/256⌉]}; absmax[i] = code[c[i]] · absmax2[i/256] + offset, product rounded
///   first.
enum class WeightFormat : uint32_t { f32 = 0, f16 = 1, bf16 = 2, int4 = 3, int8 = 4, nf4 = 5 };

/// row_major: as described at WeightFormat. cpu_packed: one opaque block made by
/// cpu::pack_weight (data, scales and biases interleaved for the CPU's vector width), same bits.
enum class WeightLayout : uint32_t { row_major = 0, cpu_packed = 1 };

struct WeightParams {
  uint32_t n = 0;  ///< outputs
  uint32_t k = 0;  ///< inputs
  WeightFormat format = WeightFormat::f32;
  WeightLayout layout = WeightLayout::row_major;
  uint32_t group_size = 0;           ///< affine: 32, 64 or 128; nf4: 64; divides k
  DType scales_dtype = DType::f32;   ///< of scales and biases; nf4: f32
  bool double_quant = false;         ///< nf4, row_major only: absmax is itself in 8 bits
};

/// y = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ, x [m, k], A [rank, k], B [n, rank] (PEFT's shapes).
struct LoraParams {
  uint32_t rank = 0;                 ///< 0: no adapter
  float scale = 0.0f;                ///< alpha/rank, or alpha/√rank (rsLoRA)
  DType dtype = DType::f32;          ///< of A and B; gradients dA, dB are f32
  float dropout = 0.0f;              ///< on the adapter's input only; inverted (kept values / (1-p))
  uint64_t dropout_seed = 0;         ///< counter-based: forward and backward draw the same mask
};

/// Adapters of one linear packed for one dispatch; see cpu::lora_linear_multi_forward.
struct LoraMultiParams {
  uint32_t adapters = 0;
  uint32_t max_rank = 0;             ///< rows of A, columns of B; true ranks come with the call
  DType dtype = DType::f32;          ///< of A and B; gradients are f32
};

/// Speculative verification of `drafts` proposed tokens for each of `batch` sequences.
struct VerifyParams {
  uint32_t batch = 0, drafts = 0, vocab = 0;
  DType dtype = DType::f32;          ///< of the target's logits
  float temperature = 0.0f;          ///< 0: greedy
  uint64_t seed = 0;
};

/// Attention of q_tokens queries over kv_tokens keys. Query i stands at key index kv_offset + i and
/// sees keys j with first(i) <= j <= kv_offset + i, first(i) = max(segment_start[i], i' - window + 1).
struct AttentionParams {
  uint32_t q_tokens = 0, kv_tokens = 0;
  uint32_t q_heads = 0, kv_heads = 0, head_dim = 0;
  uint32_t kv_offset = 0;
  uint32_t window = 0;               ///< sliding window in tokens; 0 = none
  float scale = 0.0f;                ///< usually 1/√head_dim
  DType dtype = DType::f32;          ///< of q, k, v, out and their gradients
  size_t q_stride = 0, k_stride = 0, v_stride = 0, o_stride = 0;  ///< elements between tokens
};

struct NormParams {
  uint32_t rows = 0, dims = 0;
  float eps = 1e-5f;
  DType dtype = DType::f32;          ///< of x, y and gradients
  DType weight_dtype = DType::f32;
};

/// Rotates the two halves of each head (NeoX order): [a, b] -> [a·cos - b·sin, b·cos + a·sin].
struct RopeParams {
  uint32_t tokens = 0, heads = 0, head_dim = 0;
  DType dtype = DType::f32;
  bool inverse = false;              ///< the backward pass turns the other way
};

struct LinearCrossEntropyParams {
  uint32_t tokens = 0, dims = 0, vocab = 0;
  DType dtype = DType::f32;          ///< of x and dx
};

struct AdamWParams {
  uint64_t count = 0;                ///< elements of the flat parameter buffer
  float learning_rate = 0.0f, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0.01f;
  uint64_t step = 1;                 ///< from 1, for bias correction
  bool bias_correction = true;
  float clip_norm = 0.0f;            ///< global norm limit; 0 = none
  float grad_scale = 1.0f;           ///< gradients are multiplied by this first (1/tokens)
};

}  // namespace metal_lora
