// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cuda/lora_gemv_launch.cuh"

namespace metal_lora::cuda::gemv {

bool launch_dense(const Context& context, const Call& call, DType dtype) {
  return dtype == DType::bf16 ? launch_tokens<Dense<bf16>>(context, call)
                              : launch_tokens<Dense<f16>>(context, call);
}

}  // namespace metal_lora::cuda::gemv
