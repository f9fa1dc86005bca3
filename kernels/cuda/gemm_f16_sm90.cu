// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// gemm_sm90.cu's kernels of f16.
#include "kernels/cuda/gemm_sm90_launch.cuh"

namespace metal_lora::cuda::sm90 {

void launch_f16(const Context& context, const Kernel& kernel, const Args& args) {
  launch_kernel<f16>(context, kernel, args);
}

}  // namespace metal_lora::cuda::sm90
