// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cuda/lora_gemv_launch.cuh"

namespace metal_lora::cuda::gemv {
namespace {

template <typename T, typename S>
bool direct(const Context& context, const Call& call) {
  using Format = DirectInt4<T, S>;
  return launch_single<Format>(context, call) || launch_direct<Format>(context, call);
}
template <typename T>
bool direct(const Context& context, const Call& call) {
  switch (call.scales_dtype) {
    case DType::f32:
      return direct<T, float>(context, call);
    case DType::f16:
      return direct<T, f16>(context, call);
    case DType::bf16:
      return direct<T, bf16>(context, call);
  }
  return false;
}

template <typename T>
bool launch(const Context& context, const Call& call, uint32_t group_size) {
  switch (group_size) {
    case 32:
      return launch_tokens<Int4<T, 32>>(context, call);
    case 64:
      if (direct<T>(context, call)) return true;
      return launch_tokens<Int4<T, 64>>(context, call);
    case 128:
      return launch_tokens<Int4<T, 128>>(context, call);
  }
  return false;
}

}  // namespace

bool launch_int4(const Context& context, const Call& call, DType dtype, uint32_t group_size) {
  return dtype == DType::bf16 ? launch<bf16>(context, call, group_size)
                              : launch<f16>(context, call, group_size);
}

}  // namespace metal_lora::cuda::gemv
