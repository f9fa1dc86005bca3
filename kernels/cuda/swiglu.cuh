// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// SwiGLU of one value, for its own kernels and for the ends of products: two instructions of the
// special function unit, each off by 2 ulp of f32.
#pragma once

#include "kernels/cuda/device.cuh"

namespace metal_lora::cuda {

__device__ __forceinline__ float sigmoid(float x) {
  float s;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + exp2_fast(-1.44269504f * x)));
  return s;
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
