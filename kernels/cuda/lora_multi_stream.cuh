// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the blocks of the streaming form share, and the warps that work out the adapters' part of
// it beside the stream of W. Included by lora_multi_stream_sm90.cu alone.
#pragma once

#include <cuda.h>

#include "kernels/cuda/lora_multi.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::multi {

constexpr uint32_t kStepK = 64;  ///< elements of a 128-byte swizzled row
constexpr uint32_t kConsumerWarps = 8, kExpandWarps = 7;
constexpr uint32_t kStreamThreads = 32 * (kConsumerWarps + 1 + kExpandWarps);
constexpr uint32_t kMaxStages = 8;
constexpr uint32_t kMaxStreamRank = 64;
constexpr uint32_t kSharedLimit = 227 * 1024;
constexpr uint32_t kFlags = 1024;  ///< words of the context's that this kernel uses

/// A tile: rows of W by tokens. With 64 rows the two warpgroups take turns along k instead of half
/// the rows each, and there are two sets of sums.
template <uint32_t kTokens_, uint32_t kRows_>
struct TileShape {
  static constexpr uint32_t kTokens = kTokens_, kRows = kRows_;
  static constexpr uint32_t kSets = kRows == 64 ? 2 : 1;
  static constexpr uint32_t kPitch = kRows + 4;  ///< floats of a token's sums: no bank conflicts
  static constexpr uint32_t kWBytes = kRows * kStepK * 2,
                            kStageBytes = kWBytes + kTokens * kStepK * 2;
  /// As many as keep the memory busy: each more makes every other read wait longer.
  static constexpr uint32_t kStages = kRows == 64 ? 6 : kTokens == 64 ? 4 : 3;
  static constexpr uint32_t kSumsBytes = kSets * kTokens * kPitch * 4;
};

struct StreamArgs {
  CUtensorMap w_map, x_map;
  uint32_t m = 0, n = 0, k = 0;
  uint32_t rows = 128;   ///< of a tile
  uint32_t split = 1;    ///< blocks that share a tile's k
  uint32_t cluster = 1;  ///< blocks of a cluster: split, or 2 where all blocks are resident
  uint32_t stages = 1;   ///< of the ring
  uint32_t b_bytes = 0;  ///< room for the adapters' rows of B
  uint32_t adapters = 0;
  const int32_t* index = nullptr;
  Bank b;
  Partials u;
  const void* w = nullptr;  ///< for the host
  const float* bias = nullptr;
  void* y = nullptr;
  uint32_t* flags = nullptr;  ///< between pairs of blocks; null: clusters share tiles
  float* exchange = nullptr;  ///< [tiles][2][pairs][tokens][64 rows]
};

/// Byte offsets in shared memory, behind the alignment to 1024.
template <typename Shape>
struct Layout {
  uint32_t share, u, b, barriers, bytes;
  __host__ __device__ Layout(uint32_t stages, uint32_t split, uint32_t max_rank, uint32_t b_bytes) {
    const uint32_t ring = stages * Shape::kStageBytes;
    share = ring > Shape::kSumsBytes ? ring : Shape::kSumsBytes;
    u = share + Shape::kTokens * (Shape::kRows / split) * 4;
    b = u + Shape::kTokens * max_rank * 4;
    barriers = b + b_bytes;
    bytes = barriers + 2 * kMaxStages * 8 + 1024;
  }
};

struct Ring {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance(uint32_t stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// What the expanding warps work on: each on tokens of its own, every kExpandWarps-th, and alone,
/// so that none waits for another. While W streams every dependent read takes microseconds, so
/// there are few: {index}, {rank, scale, B}, and {u} once the shrink is done.
struct Expansion {
  uint32_t warp, row0, rows;  ///< rows of W that the block finishes
  uint8_t* b;                 ///< the warp's slots
  uint32_t slots;             ///< for so many of its tokens' rows of B
  float* u;                   ///< [tokens][max_rank], scaled
  float* share;               ///< [tokens][rows]
};

/// Asks for the rows of B of the warp's tokens; lane i holds the key of its i-th.
template <typename B>
__device__ __forceinline__ void fetch_b(
    const StreamArgs& args, const Expansion& e, uint32_t key, uint32_t count) {
  const uint32_t max_rank = args.b.max_rank;
  const uint32_t slot = e.rows * max_rank * static_cast<uint32_t>(sizeof(B));
  const uint32_t rows = e.row0 < args.n ? min(e.rows, args.n - e.row0) : 0;
  const uint32_t bytes = rows * max_rank * static_cast<uint32_t>(sizeof(B));
  for (uint32_t i = 0; i < min(count, e.slots); ++i) {
    const uint32_t of = __shfl_sync(0xffffffffu, key, i);
    if (of >= args.adapters) continue;
    const auto* from = reinterpret_cast<const uint8_t*>(
        static_cast<const B*>(args.b.right) + (size_t{of} * args.n + e.row0) * max_rank);
    const uint32_t to = sm90::shared_address(e.b + i * slot);
    for (uint32_t at = threadIdx.x % 32 * 16; at < bytes; at += 512) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at)
                   : "memory");
    }
  }
}

/// u = scale·Σ slices of the warp's tokens, four ranks a lane and all loads in flight. Beyond the
/// true rank: garbage.
__device__ __forceinline__ void sum_u(
    const StreamArgs& args, const Expansion& e, float scale, uint32_t count) {
  constexpr uint32_t kAtOnce = 3;
  const uint32_t lane = threadIdx.x % 32, row = args.b.max_rank / 4, quads = count * row;
  const size_t stride = size_t{args.m} * row;
  const auto* from = reinterpret_cast<const float4*>(args.u.data);
  for (uint32_t first = 0; first < quads; first += kAtOnce * 32) {
    float4 sum[kAtOnce] = {};
    uint32_t place[kAtOnce], token[kAtOnce];
    bool there[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t at = first + 32 * i + lane;
      there[i] = at < quads;
      token[i] = there[i] ? at / row : 0;
      place[i] = (e.warp + kExpandWarps * token[i]) * row + at % row;
    }
#pragma unroll 4
    for (uint32_t s = 0; s < args.u.slices; ++s) {
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (there[i]) {
          const float4 v = __ldcg(from + s * stride + place[i]);
          sum[i].x += v.x, sum[i].y += v.y, sum[i].z += v.z, sum[i].w += v.w;
        }
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const float f = __shfl_sync(0xffffffffu, scale, token[i]);
      if (there[i]) {
        reinterpret_cast<float4*>(e.u)[place[i]] =
            make_float4(f * sum[i].x, f * sum[i].y, f * sum[i].z, f * sum[i].w);
      }
    }
  }
}

/// One row of B by u, of several tokens at once, each in the order of its ranks.
template <typename B, uint32_t kTokens>
__device__ __forceinline__ void dot_u(
    const Vec16<B>* const (&b)[kTokens],
    const float* const (&u)[kTokens],
    const uint32_t (&rank)[kTokens],
    float (&sum)[kTokens]) {
  constexpr uint32_t kCount = Vec16<B>::kCount;
  uint32_t most = 0;
#pragma unroll
  for (uint32_t i = 0; i < kTokens; ++i) sum[i] = 0.0f, most = max(most, rank[i]);
  for (uint32_t j = 0; j < most; j += kCount) {
    Vec16<B> v[kTokens];
#pragma unroll
    for (uint32_t i = 0; i < kTokens; ++i) {
      if (j < rank[i]) v[i] = b[i][j / kCount];
    }
#pragma unroll
    for (uint32_t i = 0; i < kTokens; ++i) {
      if (j >= rank[i]) continue;
      const bool whole = j + kCount <= rank[i];
#pragma unroll
      for (uint32_t e = 0; e < kCount; e += 4) {
        const float4 u4 = *reinterpret_cast<const float4*>(u[i] + j + e);
        const float us[4] = {u4.x, u4.y, u4.z, u4.w};
        if (whole) {
#pragma unroll
          for (uint32_t q = 0; q < 4; ++q) sum[i] = fmaf(to_float(v[i].v[e + q]), us[q], sum[i]);
        } else {  // what lies beyond the rank may be NaN
#pragma unroll
          for (uint32_t q = 0; q < 4; ++q) {
            if (j + e + q < rank[i]) sum[i] = fmaf(to_float(v[i].v[e + q]), us[q], sum[i]);
          }
        }
      }
    }
  }
}

/// share [token][row] = B_i[row0 + row]·u[token] of the warp's tokens.
template <typename B>
__device__ __forceinline__ void expand(const StreamArgs& args, const Expansion& e) {
  const uint32_t lane = threadIdx.x % 32, max_rank = args.b.max_rank;
  const uint32_t count = args.m > e.warp ? (args.m - e.warp + kExpandWarps - 1) / kExpandWarps : 0;
  uint32_t key = args.adapters, rank = 0;
  float scale = 0.0f;
  if (lane < count) key = key_of(args.index[e.warp + kExpandWarps * lane], args.adapters);
  fetch_b<B>(args, e, key, count);
  if (key < args.adapters) {
    rank = rank_of(args.b, key, args.adapters);
    scale = args.b.scales[key];
  }
  sm90::dependency_wait();  // what lies above was there before the shrink let this kernel start
  sum_u(args, e, scale, count);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  const auto* all = static_cast<const Vec16<B>*>(args.b.right);
  const uint32_t vectors = max_rank / Vec16<B>::kCount;  // of a row of B
  constexpr uint32_t kAtOnce = 4;
  for (uint32_t first = 0; first < count; first += kAtOnce) {
    uint32_t of[kAtOnce], true_rank[kAtOnce];
#pragma unroll
    for (uint32_t q = 0; q < kAtOnce; ++q) {
      of[q] = __shfl_sync(0xffffffffu, key, (first + q) % 32);
      true_rank[q] = __shfl_sync(0xffffffffu, rank, (first + q) % 32);
      if (first + q >= count) true_rank[q] = 0;
    }
    for (uint32_t row = lane; row < e.rows; row += 32) {
      const Vec16<B>* b[kAtOnce];
      const float* u[kAtOnce];
      uint32_t ranks[kAtOnce];
      float sum[kAtOnce];
#pragma unroll
      for (uint32_t q = 0; q < kAtOnce; ++q) {
        const uint32_t i = first + q;
        ranks[q] = e.row0 + row < args.n ? true_rank[q] : 0;
        b[q] = i < e.slots ? reinterpret_cast<const Vec16<B>*>(e.b) + (i * e.rows + row) * vectors
                           : all + (size_t{of[q]} * args.n + e.row0 + row) * vectors;
        u[q] = e.u + (e.warp + kExpandWarps * i) * max_rank;
      }
      dot_u<B>(b, u, ranks, sum);
#pragma unroll
      for (uint32_t q = 0; q < kAtOnce; ++q) {
        if (first + q < count) {
          e.share[(e.warp + kExpandWarps * (first + q)) * e.rows + row] = sum[q];
        }
      }
    }
  }
}

}  // namespace metal_lora::cuda::multi
