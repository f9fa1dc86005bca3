// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "src/io/result.h"
#include "src/io/tensor.h"

namespace metal_lora::io {

/// The MLX affine form w = q·scale + bias that a block type becomes without loss.
struct AffineSpec {
  int bits;         ///< 4 or 8
  int group_size;   ///< elements that share scale and bias: 32
  bool f32_scales;  ///< scales and biases are f32, else f16

  uint64_t packed_words_per_row(uint64_t k) const { return k * static_cast<uint64_t>(bits) / 32; }
  uint64_t groups_per_row(uint64_t k) const { return k / static_cast<uint64_t>(group_size); }
  uint64_t scale_bytes() const { return f32_scales ? 4 : 2; }

  friend bool operator==(const AffineSpec&, const AffineSpec&) = default;
};

/// nullopt for types without such a form (Q6_K: groups of 16) and for plain types.
///   Q4_0 → 4 bit, f16   Q4_1 → 4 bit, f16   Q4_K → 4 bit, f32
///   Q5_0 → 8 bit, f16   Q5_1 → 8 bit, f16   Q5_K → 8 bit, f32   Q8_0 → 8 bit, f16
std::optional<AffineSpec> affine_spec(TensorType type);

/// Converts `n` rows of `k` elements. Outputs: q uint32 [n, k·bits/32], element j of a row at bits
/// (j·bits) mod 32 of word j·bits/32; scales and biases [n, k/32], f16 or f32 as the spec says.
///
/// Exact: evaluating q·scale + bias in f32 gives the bits that dequantize_blocks gives (a zero may
/// differ in sign). Where an f16 could round: Q4_0, Q5_0 and Q8_0 have no bias of their own; theirs
/// is −8d, −16d, −128d, the stored f16 scale times a power of two, which is exact unless it
/// overflows; that (|d| > 8188, 4094, 511: weights beyond 65504) is refused as unsupported. Q4_1
/// and Q5_1 store both numbers as f16. Q4_K and Q5_K multiply an f16 (11 bits) by 6 bits: 17 bits,
/// which f16 cannot hold and f32 can.
///
/// invalid_input when k is not a multiple of the type's block, unsupported for other types.
/// Rows are independent: callers may split n over threads.
Result<void> to_affine(
    TensorType type,
    const std::byte* source,
    uint64_t n,
    uint64_t k,
    uint32_t* q,
    void* scales,
    void* biases);

/// Undoes the row order that GGUF files of arch `llama` use for q and k projections (and their
/// biases): per head, rows come as rope pairs (0, d/2), (1, d/2 + 1), …; Hugging Face and MLX want
/// 0 … d−1. `rows` = heads · head_dim (for k: the key/value heads). Works on raw bytes, so on
/// quantised rows too, since blocks never span rows. `out` must not overlap `source`.
/// invalid_input when rows is not a multiple of heads or head_dim is odd.
Result<void> unpermute_rows(
    const std::byte* source, uint64_t rows, uint64_t row_bytes, uint64_t heads, std::byte* out);

}  // namespace metal_lora::io
