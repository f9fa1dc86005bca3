// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Between gemm_sm90.cu, which chooses a kernel, and the files that hold them, one a type.
#pragma once

#include "kernels/cuda/gemm_sm90_args.cuh"

namespace metal_lora::cuda::sm90 {

/// Which of a type's kernels. With args.cluster_k > 1: plain or store, of 128 or 256 columns.
struct Kernel {
  int tile_n;
  bool right_is_kn;
  GemmEnd end;
};

constexpr bool is_softmax(GemmEnd end) {
  return end == GemmEnd::softmax || end == GemmEnd::exponential;
}
/// The tile width of a product that ends otherwise: the softmax's, all of gate and up beside each
/// other, or room for both in shared memory.
constexpr int end_width(GemmEnd end) {
  if (is_softmax(end)) return kGemmSoftmaxColumns;
  return end == GemmEnd::swiglu ? 2 * kGateColumns : 128;
}

void launch_bf16(const Context& context, const Kernel& kernel, const Args& args);
void launch_f16(const Context& context, const Kernel& kernel, const Args& args);

}  // namespace metal_lora::cuda::sm90
