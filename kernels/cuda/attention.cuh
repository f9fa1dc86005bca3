// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the attention kernels share: their arguments, which keys a query sees, swizzled tiles of
// rows in shared memory and the launch that may begin before its predecessor is over.
#pragma once

#include <climits>
#include <cstdint>

#include "kernels/cuda/context.h"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda::attention {

inline constexpr int kInfoRows = 64;  ///< queries of a block of the backward pass

struct Arguments {
  AttentionParams p;
  const void* q = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  const int32_t* segment_start = nullptr;
  const int32_t* kv_offset = nullptr;
  void* out = nullptr;
  float* logsumexp = nullptr;
  // Backward.
  const void* dout = nullptr;
  void* dq = nullptr;
  void* dk = nullptr;
  void* dv = nullptr;
  const float* rope = nullptr;  ///< or null
  // Of the rows rounded up to kInfoRows; behind the last one infinity, 0 and INT_MAX.
  float2* row_info = nullptr;    ///< [q_heads, rows]: logsumexp·log2(e), Σ dout·out
  int32_t* row_first = nullptr;  ///< [rows]: first key
  int2* block_first = nullptr;   ///< per kInfoRows queries: smallest and largest first key
};

// Forms; `attention.cu` chooses.
void forward_plain(const Context& context, const Arguments& a);
void backward_plain(const Context& context, const Arguments& a);
void forward_tiled(const Context& context, const Arguments& a);
/// Whether dq and dk have been turned back by a.rope.
bool backward_tiled(const Context& context, const Arguments& a);
void forward_decode(const Context& context, const Arguments& a);
/// False: not for these arguments or this device.
bool forward_sm90(const Context& context, const Arguments& a);
/// After the backward pass's row_info and the like have been made.
bool backward_sm90(const Context& context, const Arguments& a);

/// The rows that row_info and row_first hold.
__host__ __device__ inline uint32_t padded_rows(const Arguments& a) {
  return (a.p.q_tokens + kInfoRows - 1) / kInfoRows * kInfoRows;
}

// ---- which keys ----

__device__ __forceinline__ int offset_of(const Arguments& a) {
  return a.kv_offset != nullptr ? *a.kv_offset : static_cast<int>(a.p.kv_offset);
}
/// The first key that query i sees; its last one is last_key.
__device__ __forceinline__ int first_key(const Arguments& a, int offset, int i) {
  int first = a.segment_start != nullptr ? a.segment_start[i] : 0;
  if (a.p.window != 0) first = max(first, offset + i + 1 - static_cast<int>(a.p.window));
  return max(first, 0);
}
__device__ __forceinline__ int last_key(const Arguments& a, int offset, int i) {
  return min(offset + i, static_cast<int>(a.p.kv_tokens) - 1);
}
/// Smallest and largest first key of queries [begin, end), the same in every lane: each warp reads
/// them itself, which is faster than waiting for another one.
__device__ __forceinline__ int2 first_keys(const Arguments& a, int offset, int begin, int end) {
  if (a.segment_start == nullptr) {  // rises with i
    return make_int2(first_key(a, offset, begin), first_key(a, offset, end - 1));
  }
  int low = INT_MAX, high = 0;
  for (int i = begin + static_cast<int>(threadIdx.x) % 32; i < end; i += 32) {
    const int first = first_key(a, offset, i);
    low = min(low, first), high = max(high, first);
  }
  return make_int2(__reduce_min_sync(0xffffffffu, low), __reduce_max_sync(0xffffffffu, high));
}

// ---- tiles: rows of kDim 16-bit elements, 16-byte chunks swizzled by the row ----

template <int kDim>
__device__ __forceinline__ uint32_t tile_at(uint32_t tile, int row, int chunk) {
  return tile + row * (kDim * 2) + ((chunk ^ (row & 7)) << 4);
}
/// Rows [begin, begin + kRows) of `from`, of which those in [0, end) exist; head_dim % 8 == 0.
template <int kDim, int kRows, int kThreads>
__device__ __forceinline__ void load_tile(
    uint32_t tile, const uint16_t* from, size_t stride, int begin, int end, int head_dim) {
  constexpr int kChunks = kDim / 8;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = at / kChunks, chunk = at % kChunks;
    const bool there = begin + row < end && chunk * 8 < head_dim;
    const uint16_t* source = there ? from + (begin + row) * stride + chunk * 8 : from;
    mma::copy_async<16>(tile_at<kDim>(tile, row, chunk), source, there ? 16 : 0);
  }
}
/// a [16, 16] of a row-major tile.
template <int kDim>
__device__ __forceinline__ void load_left(uint32_t (&r)[4], uint32_t tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  mma::load_x4(r, tile_at<kDim>(tile, row + lane % 16, k / 8 + lane / 16));
}
/// b of two products, whose columns are the tile's rows row … row+15: r[0], r[1] and r[2], r[3].
template <int kDim>
__device__ __forceinline__ void load_right_rows(uint32_t (&r)[4], uint32_t tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  mma::load_x4(r, tile_at<kDim>(tile, row + lane / 16 * 8 + lane % 8, k / 8 + lane / 8 % 2));
}
/// b of two products, summed over the tile's rows row … row+15, columns n … n+15.
template <int kDim>
__device__ __forceinline__ void load_right_columns(
    uint32_t (&r)[4], uint32_t tile, int row, int n) {
  const int lane = threadIdx.x % 32;
  mma::load_x4_across(r, tile_at<kDim>(tile, row + lane % 16, n / 8 + lane / 16));
}
/// Two blocks of sums, as the left operand of the next product.
template <typename T>
__device__ __forceinline__ void pack_left(
    uint32_t (&r)[4], const float (&a)[4], const float (&b)[4]) {
  r[0] = mma::pack2<T>(a[0], a[1]);
  r[1] = mma::pack2<T>(a[2], a[3]);
  r[2] = mma::pack2<T>(b[0], b[1]);
  r[3] = mma::pack2<T>(b[2], b[3]);
}

/// -r, pairs of 16-bit numbers of either type.
__device__ __forceinline__ void negate(uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] ^= 0x80008000u;
}

// ---- launches ----

/// Until the kernels before this one are over; the next one may start to launch.
__device__ __forceinline__ void begin_dependent() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}
template <typename Kernel, typename... Values>
void launch(
    const Context& context,
    const char* name,
    Kernel kernel,
    dim3 grid,
    int threads,
    size_t shared_bytes,
    const Values&... values) {
  if (shared_bytes > 40 * 1024) {  // 48 KiB with the fixed arrays need no leave
    check(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel),
            cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(shared_bytes)),
        name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = context.capability >= 90 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, values...), name);
  check_launch(name);
}

}  // namespace metal_lora::cuda::attention
