// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The work of one thread in attention_forward and attention_backward, one set per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/params.h"

namespace metal_lora::cpu {

/// Queries and keys are taken in blocks of this many.
inline constexpr uint32_t kAttentionBlock = 64;

/// Consecutive queries (at most kAttentionBlock) of one segment, and the keys that any of them
/// sees: [key_begin, key_end). key_begin is a whole number of blocks after the segment's first key,
/// so that a query's sums do not depend on where its segment or its query block starts.
struct QueryBlock {
  uint32_t begin = 0, count = 0;
  uint32_t key_begin = 0, key_end = 0;
  uint32_t segment = 0;  ///< first key of the segment
};

/// One query head: every pointer at this head's (or its kv head's) first element.
struct AttentionHead {
  const AttentionParams* params = nullptr;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
};

struct AttentionHeadGradient {
  const void* out = nullptr;
  const void* dout = nullptr;
  const float* logsumexp = nullptr;  ///< [q_tokens] of this head
  void* dq = nullptr;
  float* dk = nullptr;  ///< [kv_tokens, padded_dim] of this head; added to, unscaled
  float* dv = nullptr;
};

struct AttentionTiles {
  /// head_dim rounded up to whole vectors: the row stride of dk and dv above.
  uint32_t (*padded_dim)(uint32_t head_dim);
  /// Bytes of 64-byte aligned scratch for one call of forward or backward.
  size_t (*scratch_bytes)(const AttentionParams& p);
  /// Writes out and, where not null, logsumexp [q_tokens] of this head for the block's queries.
  void (*forward)(
      const AttentionHead& head,
      const QueryBlock& block,
      void* out,
      float* logsumexp,
      void* scratch);
  /// Writes dq of the block's queries and adds their part to dk and dv.
  void (*backward)(
      const AttentionHead& head,
      const AttentionHeadGradient& gradient,
      const QueryBlock& block,
      void* scratch);
  /// out [head_dim] = factor · Σ_h sums[h · stride], in the order of h.
  void (*sum_heads)(
      uint32_t heads,
      uint32_t head_dim,
      const float* sums,
      size_t stride,
      float factor,
      DType dtype,
      void* out);
};

/// The set of active_isa().
const AttentionTiles& attention_tiles();

}  // namespace metal_lora::cpu
