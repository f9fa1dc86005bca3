// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The adapters' part of the streaming form, worked out by warps of their own beside the stream of
// W. Included by lora_multi_stream_sm90.cu alone.
#pragma once

#include <algorithm>

#include "kernels/cuda/lora_multi_shrink.cuh"
#include "kernels/cuda/lora_skinny_tile.cuh"

namespace metal_lora::cuda::multi {

using sm90::skinny::kRows;

constexpr uint32_t kConsumerWarps = 4, kExpandWarps = 8;
constexpr uint32_t kExpandThreads = 32 * kExpandWarps;
static_assert(kExpandThreads == kShrinkThreads && kExpandThreads >= kStreamTokens);
constexpr uint32_t kStreamThreads = 32 * (kConsumerWarps + 1) + kExpandThreads;
constexpr uint32_t kMaxStreamRank = 64;
constexpr uint32_t kMaxSlots = 64;
constexpr uint32_t kTable = 256;
constexpr uint32_t kPitch = kRows + 4;  ///< floats of a token's sums: no bank conflicts

struct StreamArgs {
  CUtensorMap w_map, x_map;
  uint32_t m = 0, n = 0, k = 0;
  uint32_t parts = 1;   ///< of k: blocks of a cluster
  uint32_t stages = 1;  ///< of the ring of W and x
  uint32_t slots = 1;   ///< of the ring of B
  uint32_t early = 0;   ///< steps of W that L2 is asked for ahead
  uint32_t gate = 0;    ///< the step of W that waits till A and B are asked for
  uint32_t units = 1;   ///< of u that a block makes at once
  uint32_t makers = 0;  ///< blocks that make u
  uint32_t patience_ns = 0;
  uint32_t adapters = 0;
  const int32_t* index = nullptr;
  Bank b;
  Shrink shrink;
  uint32_t* flags = nullptr;  ///< blocks that have made their part of u; that have seen all of it
  const float* bias = nullptr;
  void* y = nullptr;
};

/// What a block knows of its tokens' adapters.
struct Tokens {
  uint32_t rank[kStreamTokens];
  float scale[kStreamTokens];
  uint32_t ranks[kTable];  ///< a small bank's, which are read beside the indices, not behind them
  float scales[kTable];
  uint32_t all_there;
};

/// Byte offsets in shared memory, behind the alignment to 1024. The sums lie where the stages did.
struct Layout {
  uint32_t slot_bytes, b, a, x, share, u, list, tokens, slot_barriers, asked, barriers, bytes;
  __host__ __device__ Layout(
      uint32_t stage_bytes,
      uint32_t stages,
      uint32_t slots,
      uint32_t rows,
      uint32_t row_bytes,
      uint32_t units,
      uint32_t m,
      uint32_t max_rank) {
    slot_bytes = rows * row_bytes;
    b = stages * stage_bytes;
    a = b + slots * slot_bytes;
    x = a + units * RowsRoom<float>::kSize * 16;
    share = x + units * kTileTokens * kSlice * 2;
    u = share + m * rows * 4;
    list = u + m * max_rank * 4;
    tokens = list + (sizeof(TileList) + 15) / 16 * 16;
    slot_barriers = tokens + (sizeof(Tokens) + 15) / 16 * 16;
    asked = slot_barriers + kMaxSlots * 8;
    barriers = asked + 16;
    bytes = barriers + sm90::skinny::kMaxStages * 16 + 1024;
  }
};

/// share = B_i·u of the rows of W that the block finishes, for all tokens.
struct Expansion {
  uint32_t row0, rows;  ///< rows: a power of two
  uint32_t there;       ///< of rows: those below n
  uint32_t slot_bytes;
  uint8_t* b;    ///< [slots][rows][max_rank]
  uint4* a;      ///< [units]: their rows of A
  void* x;       ///< [units][kTileTokens][kSlice]: tiles', while u is made
  float* share;  ///< [tokens][rows]
  float* u;      ///< [tokens][max_rank], scaled; zeros beyond the true rank
  TileList* list;
  Tokens* tokens;
  uint32_t barriers;  ///< of the slots
  uint32_t asked;     ///< barrier: A and B are asked for
};

__device__ __forceinline__ void expanders_meet() {
  sm90::named_barrier(1, kExpandThreads);
}

/// `bytes` (a multiple of 16) that lie in one piece, both addresses aligned to 16.
__device__ __forceinline__ void bulk_load(
    uint32_t shared, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared),
      "l"(from),
      "r"(bytes),
      "r"(barrier)
      : "memory");
}

/// Asks for the rows of B of a tile's adapter.
template <typename B>
__device__ __forceinline__ void load_b(
    const StreamArgs& args, const Expansion& e, uint32_t tile, uint32_t slot) {
  const uint32_t barrier = e.barriers + 8 * slot;
  const uint32_t row_bytes = args.b.max_rank * static_cast<uint32_t>(sizeof(B));
  const size_t row = size_t{e.list->tile[tile].key} * args.n + e.row0;
  sm90::barrier_expect(barrier, e.there * row_bytes);
  bulk_load(
      sm90::shared_address(e.b) + slot * e.slot_bytes,
      static_cast<const char*>(args.b.right) + row * row_bytes,
      e.there * row_bytes,
      barrier);
}

/// u of the tiles' slices first, first + step, …
template <typename T, typename A>
__device__ __forceinline__ void make_u(
    const StreamArgs& args, const Expansion& e, uint32_t thread, uint32_t first, uint32_t step) {
  const uint32_t slices = args.shrink.slices, units = e.list->count * slices;
  const auto rank_at = [&](uint32_t unit) {
    return e.tokens->rank[e.list->tile[unit / slices].token[0]];
  };
  auto* x = static_cast<T(*)[kTileTokens][kSlice]>(e.x);
  const auto meet = [] { expanders_meet(); };
  using Room = RowsRoom<A>;
  for (uint32_t i = first; i < units; i += args.units * step) {
    const uint32_t end = min(args.units, (units - i + step - 1) / step);
    uint32_t rank = 0;
    for (uint32_t u = 0; u < end; ++u) rank = max(rank, rank_at(u * step + i));
    for (uint32_t j = 0; j < rank; j += Room::kStride) {
      const uint32_t j0 = j + thread / 32 * Room::kCount;
      for (uint32_t u = 0; u < end; ++u) {
        const uint32_t at = i + u * step, r = rank_at(at);
        if (j >= r) continue;
        const Tile& tile = e.list->tile[at / slices];
        if (j == 0) stage_x<T, true>(args.shrink, tile, at % slices, thread, x[u]);
        Room::load(args.shrink.a, tile, r, at % slices, j0, e.a + u * Room::kSize + thread);
      }
      mma::copies_commit();
      mma::copies_wait<0>();
      meet();  // x is there
      for (uint32_t u = 0; u < end; ++u) {
        const uint32_t at = i + u * step, r = rank_at(at);
        if (j >= r) continue;
        const Tile& tile = e.list->tile[at / slices];
        Room::multiply(
            args.shrink, x[u], tile, r, at % slices, j0, e.a + u * Room::kSize + thread);
      }
    }
    meet();  // x is read
  }
}

/// To L2: the rows of A that make_u reads.
template <typename A>
__device__ __forceinline__ void prefetch_a(
    const StreamArgs& args, const Expansion& e, uint32_t thread) {
  const Bank& a = args.shrink.a;
  const uint32_t slices = args.shrink.slices, units = e.list->count * slices, k = a.columns;
  const uint32_t warp = thread / 32;
  for (uint32_t unit = blockIdx.x + warp * args.makers; unit < units;
       unit += kExpandWarps * args.makers) {
    const Tile& tile = e.list->tile[unit / slices];
    const uint32_t rank = e.tokens->rank[tile.token[0]], k0 = unit % slices * kSlice;
    const A* rows = static_cast<const A*>(a.right) + size_t{tile.key} * a.max_rank * k + k0;
    const uint32_t bytes = min(k - k0, kSlice) * static_cast<uint32_t>(sizeof(A));
    for (uint32_t j = thread % 32; j < rank; j += 32) {
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(rows + size_t{j} * k),
                   "r"(bytes)
                   : "memory");
    }
  }
}

__device__ __forceinline__ uint64_t time_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

/// Until all of u is there. A block that loses patience makes all of it, the same bits: so it does
/// not matter whether all makers find room at once.
template <typename T, typename A>
__device__ __forceinline__ void await_u(
    const StreamArgs& args, const Expansion& e, uint32_t thread) {
  if (thread == 0) {
    const uint64_t begin = time_ns();
    bool there;
    do {
      there = sm90::flag_load_acquire(args.flags) == args.makers;
    } while (!there && time_ns() - begin < args.patience_ns);
    e.tokens->all_there = there;
  }
  expanders_meet();
  if (!e.tokens->all_there) make_u<T, A>(args, e, thread, 0, 1);
}

/// The last block to have seen all of u clears the flags.
__device__ __forceinline__ void leave_u(const StreamArgs& args) {
  __threadfence();  // what the block added to the first flag is not to come after they are cleared
  if (atomicAdd(args.flags + 1, 1) + 1 == gridDim.x) args.flags[0] = args.flags[1] = 0;
}

/// u = scale·Σ slices, four ranks a thread and all loads in flight.
__device__ __forceinline__ void sum_u(const StreamArgs& args, const Expansion& e, uint32_t thread) {
  constexpr uint32_t kAtOnce = 2;
  const uint32_t row = args.b.max_rank / 4, quads = args.m * row;
  const auto* from = reinterpret_cast<const float4*>(args.shrink.out);
  for (uint32_t first = thread; first < quads; first += kAtOnce * kExpandThreads) {
    float4 sum[kAtOnce] = {};
#pragma unroll 4
    for (uint32_t s = 0; s < args.shrink.slices; ++s) {
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (first + i * kExpandThreads >= quads) break;
        const float4 v = __ldcg(from + s * size_t{quads} + first + i * kExpandThreads);
        sum[i].x += v.x, sum[i].y += v.y, sum[i].z += v.z, sum[i].w += v.w;
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t at = first + i * kExpandThreads;
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

/// A row of B by a token's u, from chunk `shift` of 16 bytes on.
template <typename B, bool kWhole>
__device__ __forceinline__ float expand_row(
    const Vec16<B>* b, const float* u, uint32_t shift, uint32_t chunks, uint32_t rank) {
  constexpr uint32_t kCount = Vec16<B>::kCount;
  float sum[2] = {};
#pragma unroll 2
  for (uint32_t i = 0; i < chunks; ++i) {
    const uint32_t c = i + shift < chunks ? i + shift : i + shift - chunks, j = c * kCount;
    const Vec16<B> v = b[c];
    float us[kCount];
#pragma unroll
    for (uint32_t q = 0; q < kCount; q += 4) {
      const float4 u4 = *reinterpret_cast<const float4*>(u + j + q);
      us[q] = u4.x, us[q + 1] = u4.y, us[q + 2] = u4.z, us[q + 3] = u4.w;
    }
#pragma unroll
    for (uint32_t q = 0; q < kCount; ++q) {
      // What lies beyond the rank may be NaN.
      if (kWhole || j + q < rank) sum[q % 2] = fmaf(to_float(v.v[q]), us[q], sum[q % 2]);
    }
  }
  return sum[0] + sum[1];
}

/// Where a lane of an expanding warp stands among a tile's rows and tokens.
struct Lane {
  uint32_t row, token, tokens;  ///< tokens: that the warp takes at a time
  uint32_t chunks;              ///< of a row of B
  uint32_t shift;  ///< neighbouring rows begin at different chunks, not to meet in the same banks
  __device__ __forceinline__ Lane(uint32_t rows, uint32_t row_chunks) : chunks(row_chunks) {
    const uint32_t lane = threadIdx.x % 32, across = min(rows, 32u);
    row = lane % across, token = lane / across, tokens = 32 / across;
    shift = row * chunks / 8 % chunks;  // the same 32 rows on
  }
};

/// One warp: the block's rows by a tile's tokens.
template <typename B, bool kWhole>
__device__ __forceinline__ void expand_tile(
    const StreamArgs& args,
    const Expansion& e,
    const Lane& lane,
    const Tile& tile,
    uint32_t rank,
    uint32_t slot) {
  const uint32_t count = tile.count;
  for (uint32_t row = lane.row; row < e.there; row += 32) {
    const auto* b =
        reinterpret_cast<const Vec16<B>*>(e.b + slot * e.slot_bytes) + row * lane.chunks;
    for (uint32_t i = lane.token; i < count; i += lane.tokens) {
      const uint32_t t = tile.token[i];
      e.share[t * e.rows + row] =
          expand_row<B, kWhole>(b, e.u + t * args.b.max_rank, lane.shift, lane.chunks, rank);
    }
  }
}

/// The expanding warps' part. A slot of the ring belongs to one of them.
template <typename T, typename B>
__device__ __forceinline__ void expand(
    const StreamArgs& args, const Expansion& e, uint32_t thread) {
  const uint32_t warp = thread / 32, adapters = args.adapters;
  TileList& list = *e.list;
  Tokens& tokens = *e.tokens;
  sm90::dependency_wait();
  const bool table = adapters <= kTable;
  if (table && thread < adapters) {
    tokens.ranks[thread] = rank_of(args.b, thread, adapters);
    tokens.scales[thread] = args.b.scales[thread];
  }
  list_tiles(args.index, args.m, adapters, thread, list, [] { expanders_meet(); });
  if (thread < args.m) {
    const uint32_t key = list.key[thread];
    const bool has = key < adapters;
    tokens.rank[thread] = table && has ? tokens.ranks[key] : rank_of(args.b, key, adapters);
    tokens.scale[thread] = !has ? 0.0f : table ? tokens.scales[key] : args.b.scales[key];
  }
  for (uint32_t i = thread; i < args.m * e.rows / 4; i += kExpandThreads) {
    reinterpret_cast<float4*>(e.share)[i] = float4{};  // of tokens without an adapter
  }
  expanders_meet();
  const bool makes = blockIdx.x < args.makers;
  if (makes) prefetch_a<B>(args, e, thread);
  const uint32_t tiles = e.there > 0 ? list.count : 0;
  const uint32_t own = warp + kExpandWarps * (thread % 32);
  if (own < min(args.slots, tiles)) load_b<B>(args, e, own, own);
  __syncwarp();
  if (thread % 32 == 0) sm90::barrier_arrive(e.asked);
  if (list.count == 0) return;
  if (makes) {
    make_u<T, B>(args, e, thread, blockIdx.x, args.makers);
    expanders_meet();
    if (thread == 0) sm90::flag_add_release(args.flags, 1);
  }
  await_u<T, B>(args, e, thread);
  sum_u(args, e, thread);
  expanders_meet();
  const Lane lane(e.rows, args.b.max_rank / Vec16<B>::kCount);
  uint32_t parity = 0;
  for (uint32_t first = 0; first < tiles; first += args.slots, parity ^= 1) {
    const uint32_t end = min(args.slots, tiles - first);
    for (uint32_t slot = warp; slot < end; slot += kExpandWarps) {
      sm90::barrier_wait(e.barriers + 8 * slot, parity);
      const Tile& tile = list.tile[first + slot];
      const uint32_t rank = tokens.rank[tile.token[0]];
      if (rank == args.b.max_rank) {
        expand_tile<B, true>(args, e, lane, tile, rank, slot);
      } else {
        expand_tile<B, false>(args, e, lane, tile, rank, slot);
      }
      __syncwarp();
      const uint32_t next = first + slot + args.slots;
      if (thread % 32 == 0 && next < tiles) load_b<B>(args, e, next, slot);
    }
  }
  if (thread == 0) leave_u(args);
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
