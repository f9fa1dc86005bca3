// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the two skinny products share (lora_shrink: x·right, a few dozen columns; lora_grad:
// largeᵀ·small, likewise): asynchronous copies, tensor-core fragments, dropout masks, the sum over
// the warps and blocks that split the inner dimension, and the exact f32 form.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/cuda/context.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda::skinny {

using mma::shared_address;

// ---- instructions ----

/// Waits until at most `left` (0 … 4) of the newest groups of copies are under way.
__device__ __forceinline__ void copies_wait(uint32_t left) {
  switch (left) {
    case 0:
      return mma::copies_wait<0>();
    case 1:
      return mma::copies_wait<1>();
    case 2:
      return mma::copies_wait<2>();
    case 3:
      return mma::copies_wait<3>();
    default:
      return mma::copies_wait<4>();
  }
}

/// All threads of the cluster, or of the block where there is none.
__device__ __forceinline__ void cluster_sync(uint32_t blocks) {
  if (blocks == 1) {
    __syncthreads();
    return;
  }
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
#endif
}
/// Ends the use of each other's shared memory: what was loaded has arrived, nothing else is asked.
__device__ __forceinline__ void cluster_leave(uint32_t blocks) {
#if __CUDA_ARCH__ >= 900
  if (blocks == 1) return;
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;\n" ::
          : "memory");
#endif
}
/// Four floats at the same place of a block of the cluster.
__device__ __forceinline__ float4 load_of_block(uint32_t address, uint32_t block) {
  float4 v = {};
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(block));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];\n"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(there)
               : "memory");
#endif
  return v;
}

// ---- the end of a tile ----

template <uint32_t kBlocks>
__device__ __forceinline__ float4 sum_of_blocks(const float* p, uint32_t first, uint32_t step) {
  const uint32_t address = shared_address(p);
  float4 v[kBlocks];
#pragma unroll
  for (uint32_t b = 0; b < kBlocks; ++b) v[b] = load_of_block(address, first + b * step);
#pragma unroll
  for (uint32_t b = 1; b < kBlocks; ++b) add_to(v[0], v[b]);
  return v[0];
}
/// The sum of four neighbours over blocks first, first + step, … of the cluster, in their order.
__device__ __forceinline__ float4
sum_of_cluster(const float* p, uint32_t blocks, uint32_t first = 0, uint32_t step = 1) {
  switch (blocks) {
    case 2:
      return sum_of_blocks<2>(p, first, step);
    case 4:
      return sum_of_blocks<4>(p, first, step);
    case 8:
      return sum_of_blocks<8>(p, first, step);
    default:
      return *reinterpret_cast<const float4*>(p);
  }
}

/// Partial sums of one block, [groups][size] f32 in shared memory, are added up in the order of the
/// groups; then emit(i, where, sum) for this block's share of the quads 0 … count - 1, summed over
/// the cluster; place(i) is where quad i lies, or a negative number where nobody wants it.
template <typename Place, typename Emit>
__device__ __forceinline__ void reduce_tile(
    float* partial,
    uint32_t groups,
    uint32_t size,
    uint32_t count,
    uint32_t blocks,
    uint32_t block,
    Place place,
    Emit emit) {
  __syncthreads();
  if (groups > 1) {
    auto* quads = reinterpret_cast<float4*>(partial);
    for (uint32_t i = threadIdx.x; i < size / 4; i += blockDim.x) {
      float4 sum = quads[i];
      for (uint32_t g = 1; g < groups; ++g) add_to(sum, quads[g * (size / 4) + i]);
      quads[i] = sum;
    }
  }
  cluster_sync(blocks);
  const uint32_t share = (count + blocks - 1) / blocks;
  const uint32_t end = min(count, (block + 1) * share);
  for (uint32_t i = block * share + threadIdx.x; i < end; i += blockDim.x) {
    const int where = place(i);
    if (where >= 0) emit(i, sum_of_cluster(partial + where, blocks));
  }
  cluster_leave(blocks);  // nobody goes while others read its sums
}

__device__ __forceinline__ float load_as_float(const void* p, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
  return to_float(static_cast<const bf16*>(p)[i]);
}

__device__ __forceinline__ void store_from_float(void* p, DType dtype, size_t i, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else if (dtype == DType::f16) {
    static_cast<f16*>(p)[i] = from_float<f16>(v);
  } else {
    static_cast<bf16*>(p)[i] = from_float<bf16>(v);
  }
}

// ---- the exact form: FFMA, any storage types, strides and alignments ----

inline constexpr uint32_t kExactTile = 64;  ///< rows and columns of a block
inline constexpr uint32_t kExactStep = 16;  ///< of the inner dimension
inline constexpr uint32_t kExactPitch = kExactTile + 4;
inline constexpr uint32_t kExactThreads = 256;

/// left(row, i) = left[row·row_stride + i·inner_stride]; a column of the right side is a pointer
/// (null: zeros) and its stride along i, in shared memory.
struct ExactOperands {
  const void* left = nullptr;
  size_t row_stride = 0, inner_stride = 0;
  DType left_dtype = DType::f32, right_dtype = DType::f32;
  uint32_t row0 = 0, rows = 0;  ///< rows: the end
  uint32_t inner0 = 0, inner1 = 0;
  bool right_inner_is_contiguous = false;
  bool drop = false;
  bool tokens_are_rows = false;  ///< else they are the inner dimension
  DropMask mask;
};
struct ExactShared {
  float left[2][kExactStep][kExactPitch];
  float right[2][kExactStep][kExactPitch];
  const void* column[kExactTile];
  size_t stride[kExactTile];
};

/// Thread t of 256: four values along the contiguous side.
__device__ __forceinline__ void exact_place(
    bool inner_is_contiguous, uint32_t j, uint32_t* outer, uint32_t* inner) {
  const uint32_t t = threadIdx.x;
  *outer = inner_is_contiguous ? t / 4 : t % 16 * 4 + j;
  *inner = inner_is_contiguous ? t % 4 * 4 + j : t / 16;
}

__device__ inline void exact_load(
    const ExactOperands& o,
    const ExactShared& shared,
    uint32_t inner_first,
    float (&left)[4],
    float (&right)[4]) {
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    uint32_t outer, inner;
    exact_place(o.inner_stride == 1, j, &outer, &inner);
    const uint32_t row = o.row0 + outer, i = inner_first + inner;
    left[j] = 0.0f;
    if (row < o.rows && i < o.inner1) {
      left[j] = load_as_float(o.left, o.left_dtype, row * o.row_stride + i * o.inner_stride);
      if (o.drop) {
        const uint32_t token = o.tokens_are_rows ? row : i, column = o.tokens_are_rows ? i : row;
        if (!drop_keeps(o.mask, drop_key(o.mask, token), column)) left[j] = 0.0f;
      }
    }
  }
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    uint32_t outer, inner;
    exact_place(o.right_inner_is_contiguous, j, &outer, &inner);
    const uint32_t i = inner_first + inner;
    const void* column = shared.column[outer];
    right[j] = column && i < o.inner1
                   ? load_as_float(column, o.right_dtype, i * shared.stride[outer])
                   : 0.0f;
  }
}

__device__ inline void exact_store(
    const ExactOperands& o,
    ExactShared& shared,
    uint32_t buffer,
    const float (&left)[4],
    const float (&right)[4]) {
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    uint32_t outer, inner;
    exact_place(o.inner_stride == 1, j, &outer, &inner);
    shared.left[buffer][inner][outer] = left[j];
    exact_place(o.right_inner_is_contiguous, j, &outer, &inner);
    shared.right[buffer][inner][outer] = right[j];
  }
}

/// sums [row][column] of rows 4·(t / 16) … and columns 4·(t % 16) … of the tile, each one chain of
/// FFMAs in the order of i. shared.column and .stride are set.
__device__ inline void exact_tile(
    const ExactOperands& o, ExactShared& shared, float (&sums)[4][4]) {
#pragma unroll
  for (auto& row : sums) {
#pragma unroll
    for (float& sum : row) sum = 0.0f;
  }
  const uint32_t row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float left[4], right[4];
  exact_load(o, shared, o.inner0, left, right);
  exact_store(o, shared, 0, left, right);
  __syncthreads();
  uint32_t buffer = 0;
  for (uint32_t i = o.inner0; i < o.inner1; i += kExactStep, buffer ^= 1) {
    const bool more = i + kExactStep < o.inner1;
    if (more) exact_load(o, shared, i + kExactStep, left, right);
#pragma unroll
    for (uint32_t p = 0; p < kExactStep; ++p) {
      const float4 a = *reinterpret_cast<const float4*>(&shared.left[buffer][p][row]);
      const float4 b = *reinterpret_cast<const float4*>(&shared.right[buffer][p][column]);
      const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] = fmaf(as[r], bs[c], sums[r][c]);
      }
    }
    if (more) exact_store(o, shared, buffer ^ 1, left, right);
    __syncthreads();
  }
}

// ---- launches ----

/// The shared memory that a block may have, of the device that the context is about.
inline uint32_t shared_limit(const Context& context) {
  switch (context.capability) {
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * 1024;
    default:
      return context.capability >= 90 ? 227 * 1024 : 64 * 1024;
  }
}

/// Clusters of `cluster` blocks (1: none), as a programmatic dependent of the kernel before it.
template <typename Kernel, typename Args>
void launch(
    const Context& context,
    Kernel kernel,
    uint32_t blocks,
    uint32_t threads,
    uint32_t shared_bytes,
    uint32_t cluster,
    const Args& args,
    const char* name) {
  if (shared_bytes > 48 * 1024) {
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  if (context.capability >= 90) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
    }
  }
  check(cudaLaunchKernelEx(&config, kernel, args), name);
}

}  // namespace metal_lora::cuda::skinny
