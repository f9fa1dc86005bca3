// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Packing: 6 bytes a value of matrices of some 100 kB, bound by the launch. The masked share of dx:
// 2·rank operations a value against 8 to 10 bytes moved, so that FFMA does up to rank ≈ 32; the
// mask is drawn once a value. Neither is measured on its own.
#include "kernels/cuda/lora_pack.h"

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kThreads = 256;

__device__ __forceinline__ float load_any(const void* p, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
  return to_float(static_cast<const bf16*>(p)[i]);
}

/// grid (blocks, jobs)
template <typename T>
__global__ void pack_kernel(const __grid_constant__ PackCall call) {
  allow_dependents();
  wait_for_previous();
  const PackJob& job = call.job[blockIdx.y];
  const size_t count = size_t{job.rows} * job.to_stride;
  for (size_t i = blockIdx.x * size_t{kThreads} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    const auto row = static_cast<uint32_t>(i / job.to_stride);
    const auto column = static_cast<uint32_t>(i - size_t{row} * job.to_stride);
    const float v = column < job.columns
                        ? load_any(job.from, job.from_dtype, size_t{row} * job.columns + column)
                        : 0.0f;
    static_cast<T*>(job.to)[i] = from_float<T>(v);
  }
}

constexpr uint32_t kTile = 64;
constexpr uint32_t kStep = 16;
constexpr uint32_t kPitch = kTile + 4;

struct Operands {
  float v[kStep][kPitch];  ///< turned: [rank][token]
  float a[kStep][kPitch];  ///< [rank][column]
};

__device__ __forceinline__ void load_operands(
    const MaskedCall& call,
    const MaskedShare& share,
    uint32_t row0,
    uint32_t column0,
    uint32_t rank0,
    Operands& to) {
  for (uint32_t i = threadIdx.x; i < kTile * kStep; i += kThreads) {
    const uint32_t j = i % kStep, t = i / kStep;
    const bool there = row0 + t < call.m && rank0 + j < share.rank;
    to.v[j][t] = there ? share.v[(row0 + t) * share.v_stride + rank0 + j] : 0.0f;
    const uint32_t r = i / kTile, c = i % kTile;
    to.a[r][c] =
        column0 + c < call.columns && rank0 + r < share.rank
            ? load_any(share.a, share.a_dtype, size_t{rank0 + r} * call.columns + column0 + c)
            : 0.0f;
  }
}

/// Thread t: tokens 4·(t / 16) …, columns 4·(t % 16) … of a 64 x 64 tile.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    masked_kernel(const __grid_constant__ MaskedCall call, bool vectors) {
  __shared__ __align__(16) Operands operands;
  allow_dependents();
  wait_for_previous();
  const uint32_t tiles = (call.columns + kTile - 1) / kTile;
  const uint32_t row0 = blockIdx.x / tiles * kTile, column0 = blockIdx.x % tiles * kTile;
  const uint32_t row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float total[4][4] = {};
  for (int s = 0; s < call.shares; ++s) {
    const MaskedShare& share = call.share[s];
    float sums[4][4] = {};
    for (uint32_t rank0 = 0; rank0 < share.rank; rank0 += kStep) {
      __syncthreads();
      load_operands(call, share, row0, column0, rank0, operands);
      __syncthreads();
#pragma unroll
      for (uint32_t p = 0; p < kStep; ++p) {
        const float4 v = *reinterpret_cast<const float4*>(&operands.v[p][row]);
        const float4 a = *reinterpret_cast<const float4*>(&operands.a[p][column]);
        const float vs[4] = {v.x, v.y, v.z, v.w}, as[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(vs[i], as[j], sums[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const DropKey key = drop_key(share.mask, row0 + row + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float factor = share.factor * drop_factor(share.mask, key, column0 + column + j);
        total[i][j] += factor * sums[i][j];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t t = row0 + row + i, c = column0 + column;
    if (t >= call.m) continue;
    const size_t at = size_t{t} * call.columns + c;
    T* out = static_cast<T*>(call.dx) + at;
    if (vectors && c + 3 < call.columns) {
      const float4 base = *reinterpret_cast<const float4*>(call.base + at);
      struct alignas(4 * sizeof(T)) Four {
        T v[4];
      };
      *reinterpret_cast<Four*>(out) = {
          from_float<T>(base.x + total[i][0]),
          from_float<T>(base.y + total[i][1]),
          from_float<T>(base.z + total[i][2]),
          from_float<T>(base.w + total[i][3])};
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c + j < call.columns) out[j] = from_float<T>(call.base[at + j] + total[i][j]);
    }
  }
}

}  // namespace

void pack_matrices(const Context& context, const PackCall& call, DType dtype) {
  size_t largest = 0;
  for (int i = 0; i < call.jobs; ++i) {
    largest = std::max(largest, size_t{call.job[i].rows} * call.job[i].to_stride);
  }
  if (largest == 0) return;
  const auto blocks =
      static_cast<unsigned>(std::min<size_t>((largest + 4 * kThreads - 1) / (4 * kThreads), 512));
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_pdl(
        pack_kernel<T>,
        dim3(blocks, static_cast<unsigned>(call.jobs)),
        kThreads,
        0,
        context.stream,
        call);
  });
}

void add_masked(const Context& context, const MaskedCall& call) {
  if (call.m == 0 || call.columns == 0) return;
  const unsigned tiles = ((call.m + kTile - 1) / kTile) * ((call.columns + kTile - 1) / kTile);
  const bool vectors = call.columns % 4 == 0 && is_aligned(call.dx) && is_aligned(call.base);
  with_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_pdl(masked_kernel<T>, tiles, kThreads, 0, context.stream, call, vectors);
  });
}

}  // namespace metal_lora::cuda
