// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the attention kernels add to wgmma.cuh: products whose left operand lies in registers, as
// probabilities do, over fragments grouped as mma.sync's. Needs sm_90a.
#pragma once

#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::attention {

#define METAL_LORA_F16(i)                                                         \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]),  \
      "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), "+f"(d[i + 1][3]), "+f"(d[i + 2][0]), \
      "+f"(d[i + 2][1]), "+f"(d[i + 2][2]), "+f"(d[i + 2][3]), "+f"(d[i + 3][0]), \
      "+f"(d[i + 3][1]), "+f"(d[i + 3][2]), "+f"(d[i + 3][3])
#define METAL_LORA_LIST32                                                          \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define METAL_LORA_LIST64                                                                 \
  METAL_LORA_LIST32                                                                       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define METAL_LORA_WGMMA_REGISTERS(n, type, list, a0, a1, a2, a3, b, p, t, ...)            \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p                                 \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list   \
               "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", add, 1, 1, %" #t ";\n}" \
               : __VA_ARGS__                                                               \
               : "r"(left[0]),                                                             \
                 "r"(left[1]),                                                             \
                 "r"(left[2]),                                                             \
                 "r"(left[3]),                                                             \
                 "l"(right),                                                               \
                 "r"(accumulate),                                                          \
                 "n"(kRightMajorN))

/// d [64, 8·kBlocks] (+)= left [64, 16], each warp's 16 rows as mma.sync's, · right.
template <typename T, int kRightMajorN, int kBlocks>
__device__ __forceinline__ void wgmma_registers(
    float (&d)[kBlocks][4], const uint32_t (&left)[4], uint64_t right, int accumulate) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  if constexpr (kBlocks == 8) {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA_REGISTERS(
          64,
          "bf16",
          METAL_LORA_LIST32,
          32,
          33,
          34,
          35,
          36,
          37,
          38,
          METAL_LORA_F16(0),
          METAL_LORA_F16(4));
    } else {
      METAL_LORA_WGMMA_REGISTERS(
          64,
          "f16",
          METAL_LORA_LIST32,
          32,
          33,
          34,
          35,
          36,
          37,
          38,
          METAL_LORA_F16(0),
          METAL_LORA_F16(4));
    }
  } else {
    if constexpr (kBf16) {
      METAL_LORA_WGMMA_REGISTERS(
          128,
          "bf16",
          METAL_LORA_LIST64,
          64,
          65,
          66,
          67,
          68,
          69,
          70,
          METAL_LORA_F16(0),
          METAL_LORA_F16(4),
          METAL_LORA_F16(8),
          METAL_LORA_F16(12));
    } else {
      METAL_LORA_WGMMA_REGISTERS(
          128,
          "f16",
          METAL_LORA_LIST64,
          64,
          65,
          66,
          67,
          68,
          69,
          70,
          METAL_LORA_F16(0),
          METAL_LORA_F16(4),
          METAL_LORA_F16(8),
          METAL_LORA_F16(12));
    }
  }
}
#define METAL_LORA_WGMMA_SHARED(type)                                                    \
  asm volatile(                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" METAL_LORA_LIST32 \
      "}, %32, %33, add, 1, 1, 0, 0;\n}"                                                 \
      : METAL_LORA_F16(0), METAL_LORA_F16(4)                                             \
      : "l"(left), "l"(right), "r"(accumulate))

/// d [64, 64] (+)= left [64, 16] · right^T, both in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_shared(
    float (&d)[8][4], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (std::is_same_v<T, bf16>) {
    METAL_LORA_WGMMA_SHARED("bf16");
  } else {
    METAL_LORA_WGMMA_SHARED("f16");
  }
}
#undef METAL_LORA_WGMMA_SHARED
#undef METAL_LORA_WGMMA_REGISTERS
#undef METAL_LORA_LIST64
#undef METAL_LORA_LIST32
#undef METAL_LORA_F16

/// Keeps reads of the sums behind the wait.
template <int kBlocks>
__device__ __forceinline__ void sums_fence(float (&d)[kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(d[i][c])::"memory");
  }
}

/// Tiles of 64 rows in shared memory are blocks of 64 columns, 8 KiB each, as the copy engine's
/// 128-byte swizzle lays them: load_left<64> and the like read them too.
inline constexpr int kTileRows = 64, kColumnBlockBytes = kTileRows * 128;

template <int kDim>
__device__ __forceinline__ void copy_tile(
    uint32_t tile, const CUtensorMap* map, uint32_t barrier, int head, int row) {
#pragma unroll
  for (int c = 0; c < kDim / 64; ++c) {
    sm90::tensor_load(tile + c * kColumnBlockBytes, map, barrier, head * kDim + 64 * c, row);
  }
}
/// A tile's address in the unit that wgmma's descriptors hold: so a step to another tile or part
/// of one is a single addition.
__device__ __forceinline__ uint32_t descriptor_address(uint32_t tile) {
  return tile >> 4;
}
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t low) {
  constexpr uint64_t kStride = uint64_t{1024 >> 4} << 32, kSwizzle128 = 1ull << 62;
  return low | kStride | kSwizzle128;
}
/// sums [64, 64] = left · (rows of the tile)^T.
template <typename T, int kDim>
__device__ __forceinline__ void wgmma_rows(
    float (&sums)[8][4], const uint32_t (&left)[kDim / 16][4], uint32_t tile_address) {
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    const uint32_t at = tile_address + (d / 4 * kColumnBlockBytes + d % 4 * 32) / 16;
    wgmma_registers<T, 0>(sums, left[d], tile_descriptor(at), d > 0);
  }
}
/// The same with a left operand that stays in its tile.
template <typename T, int kDim>
__device__ __forceinline__ void wgmma_rows(
    float (&sums)[8][4], uint32_t left_address, uint32_t tile_address) {
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    const uint32_t step = (d / 4 * kColumnBlockBytes + d % 4 * 32) / 16;
    wgmma_shared<T>(
        sums, tile_descriptor(left_address + step), tile_descriptor(tile_address + step), d > 0);
  }
}
/// sums [64, kDim] += left [64, 64] · the tile.
template <typename T, int kDim>
__device__ __forceinline__ void wgmma_columns(
    float (&sums)[kDim / 8][4], const uint32_t (&left)[4][4], uint32_t tile_address) {
  constexpr uint32_t kLeading = kColumnBlockBytes / 16 << 16;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    wgmma_registers<T, 1>(sums, left[n], tile_descriptor(tile_address + kLeading + n * 128), 1);
  }
}

/// A warp's 16 rows of sums · scale[half], through its own rows of a tile in shared memory, to
/// rows row + 16·warp … of `to`.
template <typename T, int kDim>
__device__ __forceinline__ void store_tile(
    T* to,
    size_t stride,
    uint8_t* tile,
    int row,
    int rows,
    const float (&sums)[kDim / 8][4],
    const float (&scale)[2]) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int local = warp_row + lane / 4 + 8 * half;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const uint32_t at =
          d / 8 * kColumnBlockBytes + local * 128 + (((d % 8) ^ (local & 7)) << 4) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(tile + at) =
          mma::pack2<T>(sums[d][2 * half] * scale[half], sums[d][2 * half + 1] * scale[half]);
    }
  }
  __syncwarp();
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int c = 0; c < 16 * kChunks / 32; ++c) {
    const int at = c * 32 + lane, local = warp_row + at / kChunks, chunk = at % kChunks;
    if (row + local >= rows) continue;
    const uint32_t from =
        chunk / 8 * kColumnBlockBytes + local * 128 + (((chunk % 8) ^ (local & 7)) << 4);
    *reinterpret_cast<uint4*>(to + (row + local) * stride + chunk * 8) =
        *reinterpret_cast<const uint4*>(tile + from);
  }
}

/// Turns a warp's 16 rows of sums back by their rows of rope_table: a thread holds both values of
/// each pair.
template <int kDim>
__device__ __forceinline__ void turn_back(
    float (&sums)[kDim / 8][4], const float* rope, int row, int rows) {
  constexpr int kHalf = kDim / 2;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = row + threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * half;
    if (token >= rows) continue;
    const float* cosines = rope + static_cast<size_t>(token) * kDim + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < kHalf / 8; ++d) {
      const float2 c = __ldg(reinterpret_cast<const float2*>(cosines + 8 * d));
      const float2 s = __ldg(reinterpret_cast<const float2*>(cosines + kHalf + 8 * d));
      float* low = &sums[d][2 * half];
      float* high = &sums[d + kHalf / 8][2 * half];
      const float x0 = low[0], x1 = low[1], y0 = high[0], y1 = high[1];
      low[0] = x0 * c.x + y0 * s.x;
      low[1] = x1 * c.y + y1 * s.y;
      high[0] = y0 * c.x - x0 * s.x;
      high[1] = y1 * c.y - x1 * s.y;
    }
  }
}

}  // namespace metal_lora::cuda::attention
