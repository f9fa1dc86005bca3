// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// C[M,N] = A[M,K]·B[K,N], one 32x32 tile per threadgroup of 4 simdgroups, tiles of A and B staged in
// threadgroup memory, 8x8x8 products on the matrix units. M, N multiples of 32; K of 16.
#include <metal_simdgroup_matrix>
#include <metal_stdlib>
using namespace metal;

struct GemmShape {
  uint m, n, k;
};

kernel void gemm(
    const device half* a [[buffer(0)]],
    const device half* b [[buffer(1)]],
    device float* c [[buffer(2)]],
    constant GemmShape& shape [[buffer(3)]],
    uint2 group [[threadgroup_position_in_grid]],
    ushort thread_index [[thread_index_in_threadgroup]],
    ushort simdgroup_index [[simdgroup_index_in_threadgroup]]) {
  constexpr short kTile = 32, kDepth = 16, kStrideA = kDepth + 8, kStrideB = kTile + 8;
  threadgroup half tile_a[kTile * kStrideA];
  threadgroup half tile_b[kDepth * kStrideB];
  const uint row0 = group.y * kTile, column0 = group.x * kTile;
  const short block_row = (simdgroup_index / 2) * 16, block_column = (simdgroup_index % 2) * 16;

  simdgroup_matrix<float, 8, 8> sum[2][2];
  for (short i = 0; i < 2; i++)
    for (short j = 0; j < 2; j++) sum[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);

  for (uint k0 = 0; k0 < shape.k; k0 += kDepth) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // before the tiles are overwritten
    {
      const short r = thread_index / 4, q = (thread_index % 4) * 4;
      *(threadgroup half4*)(tile_a + r * kStrideA + q) =
          *(const device half4*)(a + (row0 + r) * shape.k + k0 + q);
    }
    {
      const short r = thread_index / 8, q = (thread_index % 8) * 4;
      *(threadgroup half4*)(tile_b + r * kStrideB + q) =
          *(const device half4*)(b + (k0 + r) * shape.n + column0 + q);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // after the tiles are written
    for (short kk = 0; kk < kDepth; kk += 8) {
      simdgroup_matrix<half, 8, 8> left[2], right[2];
      for (short i = 0; i < 2; i++)
        simdgroup_load(left[i], tile_a + (block_row + 8 * i) * kStrideA + kk, kStrideA);
      for (short j = 0; j < 2; j++)
        simdgroup_load(right[j], tile_b + kk * kStrideB + block_column + 8 * j, kStrideB);
      for (short i = 0; i < 2; i++)
        for (short j = 0; j < 2; j++)
          simdgroup_multiply_accumulate(sum[i][j], left[i], right[j], sum[i][j]);
    }
  }
  for (short i = 0; i < 2; i++)
    for (short j = 0; j < 2; j++)
      simdgroup_store(
          sum[i][j],
          c + (row0 + block_row + 8 * i) * shape.n + column0 + block_column + 8 * j,
          shape.n);
}
