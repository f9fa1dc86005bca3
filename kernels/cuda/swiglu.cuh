// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// SwiGLU of one value, for its own kernels and for the ends of products: two instructions of the
// special function unit, each off by 2 ulp of f32.
#pragma once

#include "kernels/cuda/device.cuh"

namespace metal_lora::cuda {

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_fast(1.0f + exp2_fast(-kLog2e * x));
}
/// Of two values by one reciprocal: three instructions of that unit instead of four. What is less
/// than 2⁻⁶³ becomes that, so that the reciprocal's argument is finite.
__device__ __forceinline__ float2 sigmoid2(float x, float y) {
  const float of_x = 1.0f + exp2_fast(fminf(-kLog2e * x, 63.0f));
  const float of_y = 1.0f + exp2_fast(fminf(-kLog2e * y, 63.0f));
  const float r = reciprocal_fast(of_x * of_y);
  return {r * of_y, r * of_x};
}
__device__ __forceinline__ float swiglu(float gate, float up) {
  return gate * sigmoid(gate) * up;
}
struct SwigluGradient {
  float act, gate, up;
  __device__ __forceinline__ SwigluGradient(float g, float u, float d_act) {
    const float s = sigmoid(g), silu = g * s;
    act = silu * u;
    up = d_act * silu;
    gate = d_act * u * s * (1.0f + g * (1.0f - s));
  }
};

}  // namespace metal_lora::cuda
