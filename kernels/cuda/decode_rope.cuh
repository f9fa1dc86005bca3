// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A head of a decode step, normed and rotated by a warp, for the kernels of decode_parts.h.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.cuh"

namespace metal_lora::cuda {

/// A head of up to 64·kPerLane values. Loaded first, so that several may be under way at once.
template <int kPerLane>
class Rotation {
 public:
  /// norm [2·half] or null; cosines [2·half]: cosines, then sines.
  template <typename T>
  __device__ __forceinline__ void load(
      const T* from, const float* norm, const float* cosines, int half) {
    half_ = half;
    normed_ = norm != nullptr;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int i = lane() + 32 * j;
      const bool there = i < half;
      x_[j] = there ? make_float2(to_float(from[i]), to_float(from[half + i])) : float2{};
      turn_[j] = there ? make_float2(cosines[i], cosines[half + i]) : float2{};
      norm_[j] = there && normed_ ? make_float2(norm[i], norm[half + i]) : float2{};
    }
  }
  /// put(column, value) of every column.
  template <typename Put>
  __device__ __forceinline__ void store(float eps, const Put& put) {
    if (normed_) {
      float squares = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) squares += x_[j].x * x_[j].x + x_[j].y * x_[j].y;
      const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(2 * half_) + eps);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        x_[j].x *= scale * norm_[j].x;
        x_[j].y *= scale * norm_[j].y;
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int i = lane() + 32 * j;
      if (i >= half_) continue;
      put(i, x_[j].x * turn_[j].x - x_[j].y * turn_[j].y);
      put(half_ + i, x_[j].y * turn_[j].x + x_[j].x * turn_[j].y);
    }
  }

 private:
  static __device__ __forceinline__ int lane() {
    return static_cast<int>(threadIdx.x) % 32;
  }
  float2 x_[kPerLane], turn_[kPerLane], norm_[kPerLane];
  int half_;
  bool normed_;
};

}  // namespace metal_lora::cuda
