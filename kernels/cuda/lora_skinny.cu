// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_gemv's dispatch (lora_gemv_stream.cuh) with 32 or 64 tokens: x and the partial sums take the
// room of a stage and of a second inbox.
//   ladder (H100, 4096 x 4096 bf16, rank 16; cuBLAS's base 14.6 and 14.9 µs): m 32: 28.9 µs, m 64:
//   39.9 µs, without the adapter 22.5 and 32.3. x leaves room for one or two blocks on a
//   multiprocessor, too few for one round; wgmma with W from shared memory is the next form.
#include "kernels/cuda/lora_skinny.h"

#include <stdexcept>
#include <string>

#include "kernels/cuda/lora_gemv_launch.cuh"

namespace metal_lora::cuda {
namespace gemv {

bool launch_skinny_dense(const Context& context, const Call& call, DType dtype) {
  return dtype == DType::bf16 ? launch_skinny<Dense<bf16>>(context, call)
                              : launch_skinny<Dense<f16>>(context, call);
}

}  // namespace gemv

namespace {

bool launch(const Context& context, const gemv::Call& call, DType dtype, const WeightParams& w) {
  switch (w.format) {
    case WeightFormat::f16:
    case WeightFormat::bf16:
      return gemv::launch_skinny_dense(context, call, dtype);
    case WeightFormat::int4:
      return gemv::launch_skinny_int4(context, call, dtype, w.group_size);
    case WeightFormat::nf4:
      return gemv::launch_skinny_nf4(context, call, dtype);
    case WeightFormat::f32:
    case WeightFormat::int8:
      break;
  }
  return false;
}

/// Every run of branches that are alike, in its own dispatch.
bool stream_all(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype,
    bool only_ask) {
  for (size_t i = 0; i < count;) {
    size_t end = i + 1;
    while (end < count && gemv::alike(branches[i], branches[end])) ++end;
    for (size_t j = i; j < end; ++j) {
      if (!gemv::can_stream(context, k, dtype, x, branches[j])) return false;
    }
    if (!gemv::stream(context, m, k, dtype, x, branches + i, end - i, y_dtype, launch, only_ask)) {
      return false;
    }
    i = end;
  }
  return true;
}

}  // namespace

bool can_lora_skinny(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count) {
  if (context.capability < 90 || m == 0 || m > kSkinnyMaxTokens || count > gemv::kMaxBranches) {
    return false;
  }
  return stream_all(context, m, k, dtype, x, branches, count, dtype, true);
}

void lora_skinny(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype) {
  if (!can_lora_skinny(context, m, k, dtype, x, branches, count)) {
    throw std::invalid_argument(
        "[lora_skinny] m must be 1 to " + std::to_string(kSkinnyMaxTokens) +
        " and the call one that can_lora_skinny takes; m is " + std::to_string(m));
  }
  stream_all(context, m, k, dtype, x, branches, count, y_dtype, false);
}

}  // namespace metal_lora::cuda
