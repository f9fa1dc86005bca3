// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The running softmax of the forward kernels, over fragments of mma.sync (and of wgmma: a warp's 16
// rows lie the same way).
#pragma once

#include "kernels/cuda/attention.cuh"

namespace metal_lora::cuda::attention {

/// What one lane keeps of its warp's rows: 2 rows of each block of 16.
template <int kRows>
struct RowState {
  float top[kRows][2], sum[kRows][2];
  int first[kRows][2], last[kRows][2];
};

/// How far scores may rise above the maximum that sums are scaled to, in powers of 2, before the
/// sums are scaled again: past a row's first tiles they hardly ever are. (Probabilities of up to
/// 2^8 lose nothing in f32 sums, and as little when rounded as those up to 1.)
inline constexpr float kSlack = 8.0f;

/// From scores to probabilities, relative to a maximum up to kSlack too small.
template <bool kMask, int kRows, int kBlocks, int kOut>
__device__ __forceinline__ void soften(
    float (&s)[kRows][kBlocks][4],
    float (&o)[kRows][kOut][4],
    RowState<kRows>& state,
    int key,
    float scale) {
  const int column = key + 2 * (static_cast<int>(threadIdx.x) % 4);
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    float fade[2];
    bool grew[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& top = state.top[m][half];
      float tops[2] = {top, top};
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[m][n][2 * half + c];
          if constexpr (kMask) {
            const int j = column + 8 * n + c;
            if (j < state.first[m][half] || j > state.last[m][half]) x = -INFINITY;
          }
          tops[c] = fmaxf(tops[c], x);
        }
      }
      const float highest = quad_max(fmaxf(tops[0], tops[1]));
      grew[half] = (highest - top) * scale > kSlack;  // from -infinity too
      fade[half] = grew[half] ? exp2_fast((top - highest) * scale) : 1.0f;
      top = grew[half] ? highest : top;
      const float base = top == -INFINITY ? 0.0f : top * scale;
      float sums[2] = {0.0f, 0.0f};
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[m][n][2 * half + c];
          x = exp2_fast(x * scale - base);
          sums[c] += x;
        }
      }
      state.sum[m][half] = state.sum[m][half] * fade[half] + (sums[0] + sums[1]);
    }
    if (!__any_sync(0xffffffffu, grew[0] || grew[1])) continue;
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) o[m][n][c] *= fade[c / 2];
    }
  }
}

}  // namespace metal_lora::cuda::attention
