// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_shrink by FFMA: f32 operands exactly, and storage types that do not go together. 64 rows by
// 64 columns of a block, k split over a cluster where rows are few.
//   ladder (H100, f32, m = k = 4096, 48 columns): not measured
#include <algorithm>

#include "kernels/cuda/lora_shrink.cuh"

namespace metal_lora::cuda::shrink {
namespace {

__global__ void __launch_bounds__(kExactThreads)
    shrink_exact_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<ExactShared*>(memory);
  const Place place = place_of(args, kExactTile, kExactTile);
  ExactOperands o;
  o.left = args.x;
  o.left_dtype = args.x_dtype;
  o.row_stride = args.x_stride;
  o.inner_stride = 1;
  o.row0 = place.row0;
  o.rows = args.m;
  const uint32_t steps = (args.k + kExactStep - 1) / kExactStep;
  o.inner0 = place.split * steps / args.splits * kExactStep;
  o.inner1 = min(args.k, (place.split + 1) * steps / args.splits * kExactStep);
  o.right_dtype = args.right_dtype;
  o.right_inner_is_contiguous = !args.right_is_kn;
  o.tokens_are_rows = true;
  for (uint32_t i = threadIdx.x; i < kExactTile; i += kExactThreads) {
    const uint32_t column = place.column0 + i, p = part_of(args, column);
    shared.column[i] = nullptr;
    if (p == args.parts) continue;
    const Part& part = args.part[p];
    const uint32_t r = column - part.first;
    const size_t size = args.right_dtype == DType::f32 ? 4 : 2;
    shared.column[i] =
        static_cast<const char*>(part.right) + (args.right_is_kn ? r : size_t{r} * args.k) * size;
    shared.stride[i] = args.right_is_kn ? part.rank : 1;
  }
  for (uint32_t p = 0; p < args.parts; ++p) {
    if (!args.part[p].drop || args.part[p].first > place.column0) continue;
    if (p + 1 < args.parts && args.part[p + 1].first <= place.column0) continue;
    o.drop = true;
    o.mask = args.part[p].mask;
  }
  wait_for_previous();
  allow_dependents();  // after the wait, see lora_shrink_sm90.cu
  __syncthreads();
  float sums[4][4];
  exact_tile(o, shared, sums);
  auto* partial = reinterpret_cast<float*>(memory);
  const uint32_t row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    *reinterpret_cast<float4*>(partial + (row + r) * kExactPitch + column) =
        make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  }
  const Quads quads = {
      4,
      kExactPitch,
      min(args.m - place.row0, kExactTile),
      args.columns > place.column0 ? min(kExactTile, args.columns - place.column0) : 0};
  reduce_tile(
      partial,
      1,
      kExactTile * kExactPitch,
      quads.count(),
      args.splits,
      place.split,
      [&](uint32_t i) { return quads.place(i); },
      [&](uint32_t i, float4 sum) {
        put(args, place.row0 + quads.row(i), place.column0 + quads.column(i), sum);
      });
  if (place.split == 0 && place.column0 == 0) put_zeros(args, place.row0, kExactTile);
}

}  // namespace

void shrink_exact(const Context& context, Args args) {
  args.chunks = std::max(1u, ceil_div(args.columns, kExactTile));
  const uint32_t tiles = ceil_div(args.m, kExactTile) * args.chunks;
  const uint32_t most = context.capability >= 90 ? 8 : 1;
  while (args.splits < most && tiles * args.splits < 2u * context.multiprocessors) args.splits *= 2;
  launch(
      context,
      shrink_exact_kernel,
      tiles * args.splits,
      kExactThreads,
      sizeof(ExactShared),
      args.splits,
      args,
      "lora_shrink");
}

}  // namespace metal_lora::cuda::shrink
