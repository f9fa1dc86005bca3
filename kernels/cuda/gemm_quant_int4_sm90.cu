// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "kernels/cuda/gemm_quant_sm90.cuh"

namespace metal_lora::cuda::quant {

void launch_int4(const Context& context, const Args& args, DType dtype, const Form& form) {
  launch_format<Int4>(context, args, dtype, form);
}

}  // namespace metal_lora::cuda::quant
