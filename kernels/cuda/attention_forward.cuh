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

/// From scores to probabilities; the sums so far are scaled to the new maximum.
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.top[m][half];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[m][n][2 * half + c];
          if constexpr (kMask) {
            const int j = column + 8 * n + c;
            if (j < state.first[m][half] || j > state.last[m][half]) x = -INFINITY;
          }
          top = fmaxf(top, x);
        }
      }
      top = quad_max(top);
      const float base = top == -INFINITY ? 0.0f : top * scale;
      const float fade = exp2_fast(state.top[m][half] * scale - base);
      state.top[m][half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[m][n][2 * half + c];
          x = exp2_fast(x * scale - base);
          sum += x;
        }
      }
      state.sum[m][half] = state.sum[m][half] * fade + sum;
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        o[m][n][2 * half] *= fade;
        o[m][n][2 * half + 1] *= fade;
      }
    }
  }
}

}  // namespace metal_lora::cuda::attention
