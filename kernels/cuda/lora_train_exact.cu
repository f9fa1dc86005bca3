// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_grad by FFMA: f32 operands exactly, and storage types that do not go together. Blocks of 64
// columns by 64 ranks, one chain of sums for each result; not timed.
#include "kernels/cuda/lora_train.cuh"

namespace metal_lora::cuda::grads {
namespace {

__global__ void __launch_bounds__(kExactThreads)
    grad_exact_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char memory[];
  allow_dependents();
  auto& shared = *reinterpret_cast<ExactShared*>(memory);
  const Place place = place_of(args, kExactTile);
  const Group& group = args.group[place.group];
  ExactOperands o;
  o.left = group.large;
  o.left_dtype = args.large_dtype;
  o.row_stride = 1;
  o.inner_stride = group.large_stride;
  o.row0 = place.column0;
  o.rows = group.columns;
  const uint32_t steps = (args.m + kExactStep - 1) / kExactStep;
  o.inner0 = place.split * steps / args.splits * kExactStep;
  o.inner1 = min(args.m, (place.split + 1) * steps / args.splits * kExactStep);
  o.right_dtype = group.small_dtype;
  o.drop = group.drop;
  o.mask = group.mask;
  const size_t size = group.small_dtype == DType::f32 ? 4 : 2;
  for (uint32_t i = threadIdx.x; i < kExactTile; i += kExactThreads) {
    const uint32_t rank = place.rank0 + i;
    const Part* part = part_of(args, group, rank);
    shared.column[i] =
        part ? static_cast<const char*>(part->small) + (rank - part->first) * size : nullptr;
    shared.stride[i] = part ? part->small_stride : 0;
  }
  wait_for_previous();
  __syncthreads();
  float sums[4][4];
  exact_tile(o, shared, sums);
  auto* partial = reinterpret_cast<float*>(memory);
  const uint32_t column = threadIdx.x / 16 * 4, rank = threadIdx.x % 16 * 4;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    *reinterpret_cast<float4*>(partial + (rank + r) * kExactPitch + column) =
        make_float4(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
  }
  finish<kExactTile, kExactPitch>(args, place, partial, 1);
}

}  // namespace

void grad_exact(const Context& context, Args& args) {
  const uint32_t tiles = count_tiles(args, kExactTile);
  args.splits = splits_for(context, tiles, ceil_div(args.m, kExactStep));
  launch(
      context,
      grad_exact_kernel,
      tiles * args.splits,
      kExactThreads,
      sizeof(ExactShared),
      args.splits,
      args,
      "lora_grad");
}

}  // namespace metal_lora::cuda::grads
