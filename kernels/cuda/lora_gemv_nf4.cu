// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cuda/lora_gemv_launch.cuh"

namespace metal_lora::cuda::gemv {
namespace {

template <typename T>
bool launch(const Context& context, const Call& call) {
  if (call.double_quant) {
    return launch_direct<DirectNf4<T, true>>(context, call) ||
           launch_tokens<Nf4<T, true>>(context, call);
  }
  return launch_direct<DirectNf4<T, false>>(context, call) ||
         launch_tokens<Nf4<T, false>>(context, call);
}

}  // namespace

bool launch_nf4(const Context& context, const Call& call, DType dtype) {
  return dtype == DType::bf16 ? launch<bf16>(context, call) : launch<f16>(context, call);
}

}  // namespace metal_lora::cuda::gemv
