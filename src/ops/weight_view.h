// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include "kernels/cpu/lora_kernels.h"
#include "metal_lora/ops.h"

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/lora_kernels.h"
#include "src/launch/device_memory.h"
#endif

namespace metal_lora::ops {

inline cpu::WeightView weight_view(const Weight& w) {
  return {w.params(), w.data(), w.scales(), w.biases()};
}

#ifdef METAL_LORA_CUDA
/// Device pointers; copies a weight of the host to the device at the first call. Whatever is
/// launched with them must hold the weight.
inline cuda::WeightView cuda_view(const Weight& w) {
  const auto& arrays = w.device_arrays();
  const auto part = [&](size_t i) -> const void* {
    return i < arrays.size() ? device_pointer(arrays[i]) : nullptr;
  };
  return {w.params(), part(0), part(1), part(2)};
}
#endif

}  // namespace metal_lora::ops
