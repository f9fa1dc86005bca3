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
constexpr uint32_t kConsumerWarps = 8, kHelperWarps = 7;
constexpr uint32_t kStreamThreads = 32 * (kConsumerWarps + 1 + kHelperWarps);
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
  /// Each stage belongs to one set. Were it the other's in turn, a set would not see each of its
  /// phases, and one whose load is late would pass for the one that is due.
  static_assert(kStages % kSets == 0);
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

/// What a block knows of its tokens, in shared memory.
struct Tokens {
  uint32_t key[kStreamTokens], rank[kStreamTokens];
  uint32_t slot[kStreamTokens];   ///< of the adapter's rows of B
  uint32_t first[kStreamTokens];  ///< a slot's first token
  float scale[kStreamTokens];
  uint32_t leads[kStreamTokens / 32];  ///< bits: the first token of its adapter
  uint32_t next;                       ///< group of tokens that nobody has begun
};

/// Byte offsets in shared memory, behind the alignment to 1024.
template <typename Shape>
struct Layout {
  uint32_t share, u, tokens, b, barriers, bytes;
  __host__ __device__ Layout(uint32_t stages, uint32_t split, uint32_t max_rank, uint32_t b_bytes) {
    const uint32_t ring = stages * Shape::kStageBytes;
    share = ring > Shape::kSumsBytes ? ring : Shape::kSumsBytes;
    u = share + Shape::kTokens * (Shape::kRows / split) * 4;
    tokens = u + Shape::kTokens * max_rank * 4;
    b = tokens + (sizeof(Tokens) + 127) / 128 * 128;
    barriers = b + b_bytes;
    bytes = barriers + (2 * kMaxStages + 1) * 8 + 1024;
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

/// The block's rows of B by u. Helpers fetch both while W streams; then every warp that has nothing
/// else to do takes groups of tokens until none is left.
struct Expansion {
  uint32_t row0, rows;  ///< of W, that the block finishes
  uint32_t slots;       ///< adapters whose rows fit
  uint8_t* b;           ///< [slots][rows][max_rank], swizzled
  float* u;             ///< [tokens][max_rank], scaled; zeros beyond the true rank
  float* share;         ///< [tokens][rows]
  Tokens* tokens;
  uint32_t ready;  ///< barrier: u and B are there
};

__device__ __forceinline__ void helpers_meet() {
  sm90::named_barrier(2, 32 * kHelperWarps);
}

/// Eight neighbouring threads read the same of 16 bytes of as many groups of four rows: whole
/// multiples of 128 bytes apart but for this.
__device__ __forceinline__ uint32_t swizzled(uint32_t chunk) {
  return chunk ^ (chunk / 8 % 8);
}

/// Keys, and a slot for each adapter in the order of first use. Every thread that helps.
__device__ __forceinline__ void find_slots(
    const StreamArgs& args, Tokens& tokens, uint32_t thread) {
  static_assert(kStreamTokens <= 32 * kHelperWarps);
  const uint32_t t = thread;
  const uint32_t none = args.adapters;
  if (t < kStreamTokens) {
    tokens.key[t] = t < args.m ? key_of(args.index[t], args.adapters) : none;
  }
  if (t == 0) tokens.next = 0;
  helpers_meet();
  uint32_t first = t;
  if (t < kStreamTokens) {
    const uint32_t key = tokens.key[t];
    const auto* keys = reinterpret_cast<const uint4*>(tokens.key);
#pragma unroll 8
    for (uint32_t i = t / 4 + 1; i-- > 0;) {
      const uint4 v = keys[i];
      if (v.w == key) first = min(first, 4 * i + 3);
      if (v.z == key) first = min(first, 4 * i + 2);
      if (v.y == key) first = min(first, 4 * i + 1);
      if (v.x == key) first = min(first, 4 * i);
    }
    const uint32_t leads = __ballot_sync(0xffffffffu, first == t && key != none);
    if (t % 32 == 0) tokens.leads[t / 32] = leads;
  }
  helpers_meet();
  if (t < kStreamTokens) {
    uint32_t slot = __popc(tokens.leads[first / 32] & ((1u << first % 32) - 1));
    for (uint32_t i = 0; i < first / 32; ++i) slot += __popc(tokens.leads[i]);
    tokens.slot[t] = slot;
    if (first == t && tokens.key[t] != none) tokens.first[slot] = t;
  }
  helpers_meet();
}

/// Asks for the adapters' rows of B: to shared memory, and to L2 those that have no slot.
template <typename B>
__device__ __forceinline__ void fetch_b(
    const StreamArgs& args, const Expansion& e, uint32_t thread) {
  const uint32_t row_chunks = args.b.max_rank / Vec16<B>::kCount;
  const uint32_t chunks = e.rows * row_chunks;
  const uint32_t there = e.row0 < args.n ? min(e.rows, args.n - e.row0) * row_chunks : 0;
  uint32_t used = 0;
#pragma unroll
  for (uint32_t leads : e.tokens->leads) used += __popc(leads);
  const auto rows_of = [&](uint32_t slot) {
    const size_t key = e.tokens->key[e.tokens->first[slot]];
    return static_cast<const Vec16<B>*>(args.b.right) + (key * args.n + e.row0) * row_chunks;
  };
  const uint32_t to = sm90::shared_address(e.b);
#pragma unroll 4
  for (uint32_t i = thread; i < min(used, e.slots) * chunks; i += 32 * kHelperWarps) {
    const uint32_t slot = i / chunks, at = i % chunks;
    if (at >= there) continue;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + swizzled(i) * 16),
                 "l"(rows_of(slot) + at)
                 : "memory");
  }
  for (uint32_t slot = e.slots + thread; slot < used && there > 0; slot += 32 * kHelperWarps) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(rows_of(slot)), "r"(there * 16)
                 : "memory");
  }
}

/// u = scale·Σ slices, four ranks a thread and all loads in flight.
__device__ __forceinline__ void sum_u(const StreamArgs& args, const Expansion& e, uint32_t thread) {
  constexpr uint32_t kAtOnce = 3, kThreads = 32 * kHelperWarps;
  const uint32_t row = args.b.max_rank / 4, quads = args.m * row;
  const size_t stride = size_t{args.m} * row;
  const auto* from = reinterpret_cast<const float4*>(args.u.data);
  for (uint32_t first = thread; first < quads; first += kAtOnce * kThreads) {
    float4 sum[kAtOnce] = {};
#pragma unroll 4
    for (uint32_t s = 0; s < args.u.slices; ++s) {
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (first + i * kThreads >= quads) break;
        const float4 v = __ldcg(from + s * stride + first + i * kThreads);
        sum[i].x += v.x, sum[i].y += v.y, sum[i].z += v.z, sum[i].w += v.w;
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t at = first + i * kThreads;
      if (at >= quads) break;
      const uint32_t t = at / row, j = at % row * 4, rank = e.tokens->rank[t];
      const float f = e.tokens->scale[t];
      reinterpret_cast<float4*>(e.u)[at] = make_float4(  // garbage beyond the rank
          j < rank ? f * sum[i].x : 0.0f,
          j + 1 < rank ? f * sum[i].y : 0.0f,
          j + 2 < rank ? f * sum[i].z : 0.0f,
          j + 3 < rank ? f * sum[i].w : 0.0f);
    }
  }
}

/// The helpers' part: B and u to shared memory.
template <typename B>
__device__ __forceinline__ void prepare(
    const StreamArgs& args, const Expansion& e, uint32_t thread) {
  Tokens& tokens = *e.tokens;
  find_slots(args, tokens, thread);
  fetch_b<B>(args, e, thread);
  if (thread < args.m) {
    const uint32_t key = tokens.key[thread];
    tokens.rank[thread] = rank_of(args.b, key, args.adapters);
    tokens.scale[thread] = key < args.adapters ? args.b.scales[key] : 0.0f;
  }
  helpers_meet();
  sm90::dependency_wait();  // what lies above was there before the shrink let this kernel start
  sum_u(args, e, thread);
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
  if (thread % 32 == 0) sm90::barrier_arrive(e.ready);
}

/// Four rows of B by a token's u, each in the order of its ranks.
template <typename B>
__device__ __forceinline__ float4
expand_rows(const StreamArgs& args, const Expansion& e, uint32_t t, uint32_t row) {
  constexpr uint32_t kCount = Vec16<B>::kCount;
  const uint32_t row_chunks = args.b.max_rank / kCount;
  const uint32_t slot = e.tokens->slot[t], rank = e.tokens->rank[t];
  const uint32_t chunk = (slot * e.rows + row) * row_chunks;
  const float* u = e.u + t * args.b.max_rank;
  const auto* all = static_cast<const Vec16<B>*>(args.b.right) +
                    (size_t{e.tokens->key[t]} * args.n + e.row0 + row) * row_chunks;
  const uint32_t there = e.row0 + row < args.n ? min(4u, args.n - e.row0 - row) : 0;
  float sum[4] = {};
  for (uint32_t j = 0; j < rank; j += kCount) {
    Vec16<B> v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t at = i * row_chunks + j / kCount;
      if (slot < e.slots) {
        v[i] = reinterpret_cast<const Vec16<B>*>(e.b)[swizzled(chunk + at)];
      } else {
        v[i] = i < there ? all[at] : Vec16<B>{};
      }
    }
    float us[kCount];
#pragma unroll
    for (uint32_t q = 0; q < kCount; q += 4) {
      const float4 u4 = *reinterpret_cast<const float4*>(u + j + q);
      us[q] = u4.x, us[q + 1] = u4.y, us[q + 2] = u4.z, us[q + 3] = u4.w;
    }
    const bool whole = j + kCount <= rank;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (uint32_t q = 0; q < kCount; ++q) {
        // What lies beyond the rank may be NaN.
        if (whole || j + q < rank) sum[i] = fmaf(to_float(v[i].v[q]), us[q], sum[i]);
      }
    }
  }
  return make_float4(sum[0], sum[1], sum[2], sum[3]);
}

/// share [token][row] = B_i[row0 + row]·u[token], by any warp, four tokens at a time.
template <typename B>
__device__ __forceinline__ void expand(const StreamArgs& args, const Expansion& e) {
  const uint32_t lane = threadIdx.x % 32;
  for (;;) {
    uint32_t group = 0;
    if (lane == 0) group = atomicAdd(&e.tokens->next, 1);
    const uint32_t t = __shfl_sync(0xffffffffu, group, 0) * 4 + lane / 8;
    if (t - lane / 8 >= args.m) break;
    if (t >= args.m) continue;
    for (uint32_t row = lane % 8 * 4; row < e.rows; row += 32) {
      *reinterpret_cast<float4*>(e.share + t * e.rows + row) = expand_rows<B>(args, e, t, row);
    }
  }
}

template <typename F>
__device__ __forceinline__ void with_bank_type(DType dtype, const F& f) {
  if (dtype == DType::bf16) {
    f(bf16{});
  } else if (dtype == DType::f16) {
    f(f16{});
  } else {
    f(float{});
  }
}

}  // namespace metal_lora::cuda::multi
