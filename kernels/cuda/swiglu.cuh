// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// SwiGLU of one value, for its own kernels and for the ends of products. The approximate division
// is off by 2 ulp of f32.
#pragma once

#include "kernels/cuda/device.cuh"

namespace metal_lora::cuda {

__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
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
