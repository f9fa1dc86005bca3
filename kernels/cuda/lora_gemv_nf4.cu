// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cuda/lora_gemv_launch.cuh"

namespace metal_lora::cuda::gemv {
namespace {

template <typename T, bool kDouble>
bool launch(const Context& context, const Call& call) {
  return launch_single<DirectNf4<T, kDouble, 32>>(context, call) ||
         launch_direct<DirectNf4<T, kDouble>>(context, call) ||
         launch_tokens<Nf4<T, kDouble>>(context, call);
}
template <typename T>
bool launch(const Context& context, const Call& call) {
  return call.double_quant ? launch<T, true>(context, call) : launch<T, false>(context, call);
}

}  // namespace

bool launch_nf4(const Context& context, const Call& call, DType dtype) {
  return dtype == DType::bf16 ? launch<bf16>(context, call) : launch<f16>(context, call);
}

}  // namespace metal_lora::cuda::gemv
