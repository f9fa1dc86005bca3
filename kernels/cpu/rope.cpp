// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <cmath>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/transformer_kernels.h"

namespace metal_lora::cpu {

void rope_table(
    uint32_t tokens,
    uint32_t head_dim,
    const int32_t* positions,
    const float* inv_freq,
    float factor,
    float* cos_sin) {
  const uint32_t half = head_dim / 2;
  constexpr size_t kTokensPerChunk = 16;
  parallel_for((tokens + kTokensPerChunk - 1) / kTokensPerChunk, [&](size_t chunk) {
    const size_t begin = chunk * kTokensPerChunk;
    for (size_t t = begin; t < tokens && t < begin + kTokensPerChunk; ++t) {
      float* row = cos_sin + t * head_dim;
      for (uint32_t i = 0; i < half; ++i) {
        // f64: at position 1e5 an f32 angle would be off by 4e-3.
        const double angle = static_cast<double>(positions[t]) * static_cast<double>(inv_freq[i]);
        row[i] = static_cast<float>(std::cos(angle) * factor);
        row[half + i] = static_cast<float>(std::sin(angle) * factor);
      }
    }
  });
}

void rope(const RopeParams& p, const void* x, const float* cos_sin, void* y) {
  const size_t head_bytes = p.head_dim * (p.dtype == DType::f32 ? size_t{4} : size_t{2});
  constexpr size_t kTokensPerChunk = 16;
  const Elementwise& e = elementwise();
  parallel_for((p.tokens + kTokensPerChunk - 1) / kTokensPerChunk, [&](size_t chunk) {
    const size_t begin = chunk * kTokensPerChunk;
    for (size_t t = begin; t < p.tokens && t < begin + kTokensPerChunk; ++t) {
      for (uint32_t head = 0; head < p.heads; ++head) {
        const size_t at = (t * p.heads + head) * head_bytes;
        const char* from = static_cast<const char*>(x) + at;
        char* to = static_cast<char*>(y) + at;
        e.rope_head(p.head_dim, cos_sin + t * p.head_dim, p.inverse, p.dtype, from, p.dtype, to);
      }
    }
  });
}

}  // namespace metal_lora::cpu
