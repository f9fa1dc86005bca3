// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cuda/lora_gemv_launch.cuh"

namespace metal_lora::cuda::gemv {
namespace {

template <typename T>
bool launch_int4(const Context& context, const Call& call, uint32_t group_size) {
  switch (group_size) {
    case 32:
      return launch_skinny<Int4<T, 32>>(context, call);
    case 64:
      return launch_skinny<Int4<T, 64>>(context, call);
    case 128:
      return launch_skinny<Int4<T, 128>>(context, call);
  }
  return false;
}

template <typename T>
bool launch_nf4(const Context& context, const Call& call) {
  return call.double_quant ? launch_skinny<Nf4<T, true>>(context, call)
                           : launch_skinny<Nf4<T, false>>(context, call);
}

}  // namespace

bool launch_skinny_int4(
    const Context& context, const Call& call, DType dtype, uint32_t group_size) {
  return dtype == DType::bf16 ? launch_int4<bf16>(context, call, group_size)
                              : launch_int4<f16>(context, call, group_size);
}

bool launch_skinny_nf4(const Context& context, const Call& call, DType dtype) {
  return dtype == DType::bf16 ? launch_nf4<bf16>(context, call) : launch_nf4<f16>(context, call);
}

}  // namespace metal_lora::cuda::gemv
