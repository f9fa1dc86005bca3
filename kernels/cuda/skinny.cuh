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

namespace metal_lora::cuda::skinny {

// ---- instructions ----

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// 16 bytes to shared memory of which the first `bytes` are read and the rest are zeros.
__device__ __forceinline__ void copy16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to),
               "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy4(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/// Waits until at most `left` (0 … 4) of the newest groups are under way.
__device__ __forceinline__ void copies_wait(uint32_t left) {
  switch (left) {
    case 0:
      asm volatile("cp.async.wait_group 0;\n" ::: "memory");
      break;
    case 1:
      asm volatile("cp.async.wait_group 1;\n" ::: "memory");
      break;
    case 2:
      asm volatile("cp.async.wait_group 2;\n" ::: "memory");
      break;
    case 3:
      asm volatile("cp.async.wait_group 3;\n" ::: "memory");
      break;
    default:
      asm volatile("cp.async.wait_group 4;\n" ::: "memory");
  }
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_across(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

/// d [16, 8] += a [16, 16]·b [16, 8].
template <typename T>
__device__ __forceinline__ void mma(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// Programmatic dependent launch: the kernel behind this one may be made ready …
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
/// … and this one waits here until all before it are done and their writes are visible.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
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
/// A float at the same place of another block of the cluster.
__device__ __forceinline__ float load_of_block(const float* p, uint32_t block) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  float v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(address)
               : "r"(shared_address(p)), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(v) : "r"(address) : "memory");
  return v;
#else
  return *p;
#endif
}

// ---- dropout: the mask of kernels/cpu/gemm_kernels-inl.h, bit by bit ----

__host__ __device__ inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

struct Mask {
  uint64_t seed = 0;  ///< mixed once
  uint32_t threshold = 0;
};
inline Mask make_mask(float dropout, uint64_t seed) {
  return {
      mix64(seed + 0x9e3779b97f4a7c15ull),
      static_cast<uint32_t>(
          std::min(4294967295.0, static_cast<double>(dropout) * 4294967296.0))};
}
/// Kept values are divided by 1-p once, in the factor of the finished f32 sum.
inline float keep_scale(float dropout) {
  if (dropout <= 0.0f) return 1.0f;
  return dropout < 1.0f ? 1.0f / (1.0f - dropout) : 0.0f;
}
/// The key of a token: {add, flip}.
__device__ __forceinline__ uint2 token_key(const Mask& mask, uint32_t token) {
  const uint64_t key = mix64(mask.seed + token);
  return make_uint2(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ bool keeps(uint2 key, uint32_t column, uint32_t threshold) {
  uint32_t h = column * 0x9e3779b9u + key.x;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ key.y) ^ (h >> 13)) * 0xc2b2ae35u;
  h ^= h >> 16;
  return h >= threshold;
}

// ---- the end of a tile ----

/// Partial sums of one block, [groups][size] f32 in shared memory, are added up in the order of the
/// groups; then emit(i, sum) for this block's share of [0, count), the sum over the cluster's
/// blocks in their order; place(i) says where value i lies. count ≤ size: what is wanted of it.
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
      for (uint32_t g = 1; g < groups; ++g) {
        const float4 v = quads[g * (size / 4) + i];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      quads[i] = sum;
    }
  }
  cluster_sync(blocks);
  const uint32_t share = (count + blocks - 1) / blocks;
  const uint32_t end = min(count, (block + 1) * share);
#pragma unroll 2
  for (uint32_t i = block * share + threadIdx.x; i < end; i += blockDim.x) {
    const float* from = partial + place(i);
    float sum = 0.0f;
    if (blocks == 1) {
      sum = *from;
    } else {
#pragma unroll 4
      for (uint32_t b = 0; b < blocks; ++b) sum += load_of_block(from, b);
    }
    emit(i, sum);
  }
  if (blocks > 1) cluster_sync(blocks);  // nobody leaves while others read its sums
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
  Mask mask;
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
        if (!keeps(token_key(o.mask, token), column, o.mask.threshold)) left[j] = 0.0f;
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
