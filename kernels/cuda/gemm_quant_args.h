// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the kernel of gemm_quant_sm90.cuh is given, and its launches.
#pragma once

#include <cuda.h>

#include "kernels/cuda/gemm_quant.h"

namespace metal_lora::cuda::quant {

constexpr uint32_t kRows = 128;   ///< of W in a block
constexpr uint32_t kChunk = 256;  ///< of k: 128 bytes of codes in a row
constexpr uint32_t kStep = 64;    ///< of k: 128 bytes of x in a row

struct Args {
  CUtensorMap codes, x, u, b, out;
  uint32_t m = 0, n = 0;
  uint32_t chunks = 0;  ///< along k
  uint32_t tiles_m = 0, tiles_n = 0;
  uint32_t band = 1;  ///< tiles of tokens that are swept together along n
  uint32_t splits = 1;
  uint32_t rank = 0;
  uint32_t groups = 0;      ///< of a row
  uint32_t group_log2 = 0;  ///< steps of a group
  DType scales_dtype = DType::f32;
  bool double_quant = false;
  bool weights_ready = false;
  const void* scales = nullptr;
  const void* biases = nullptr;
  const float* bias = nullptr;
  const void* residual = nullptr;
};

void launch_int4(const Context& context, const Args& args, DType dtype, const Form& form);
void launch_nf4(const Context& context, const Args& args, DType dtype, const Form& form);
/// Blocks of the kernel that fit on a multiprocessor.
constexpr uint32_t blocks_of(uint32_t tokens) {
  return tokens <= 64 ? 2 : 1;
}

}  // namespace metal_lora::cuda::quant
