// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The adapters' part of the streaming form, worked out by warps of their own beside the stream of
// W. Included by lora_multi_stream_sm90.cu alone.
#pragma once

#include <algorithm>

#include "kernels/cuda/lora_multi.cuh"
#include "kernels/cuda/lora_skinny_tile.cuh"
#include "kernels/cuda/mma.cuh"

namespace metal_lora::cuda::multi {

constexpr uint32_t kExpandWarps = 8;
constexpr uint32_t kExpandThreads = 32 * kExpandWarps;
static_assert(kExpandThreads >= kStreamTokens);
using sm90::skinny::kRows;  ///< of W, of a warpgroup
/// Of a block, with this many warpgroups that multiply.
constexpr uint32_t threads_of(uint32_t groups) {
  return 128 * groups + 32 + kExpandThreads;
}
constexpr uint32_t kMaxStreamRank = 64;
constexpr uint32_t kMaxSlots = kStreamTokens, kMaxBuffers = 8;
constexpr uint32_t kTable = 256;
constexpr uint32_t kGroup = 8;  ///< tokens that the fragments of a warp hold side by side
/// A unit of u: up to 16 rows of an adapter's A, a slice of k, a tile's tokens. Each warp
/// multiplies its share of the columns, on the matrix unit with the ranks as its 16 rows and the
/// tokens as its 8 columns; the warps' sums meet in shared memory.
constexpr uint32_t kUnitRanks = 16;
constexpr uint32_t kBoxes = kSlice / 64, kWarpBoxes = kBoxes / kExpandWarps;
constexpr uint32_t kUnitSums = kUnitRanks * kTileTokens;
constexpr uint32_t kUnitSumsBytes = 2 * kExpandWarps * kUnitSums * 4;
static_assert(kTileTokens == 8 && kUnitSums <= kExpandThreads);

constexpr uint32_t kFlagStride = 8;  ///< words: a sector each

struct StreamArgs {
  CUtensorMap w_map, x_map, a_map;
  uint32_t m = 0, n = 0, k = 0;
  uint32_t rows = 0;        ///< of W, of a block
  uint32_t parts = 1;       ///< of k: blocks of a tile of W, each of which finishes some tokens
  uint32_t stages = 1;      ///< of the ring of W and x
  uint32_t room_bytes = 0;  ///< for A, and for B when u is made
  uint32_t box_rows = 0;    ///< of A: kUnitRanks, or 8 where no adapter has more
  uint32_t buffers = 1;     ///< units that find room
  uint32_t slots = 1;       ///< adapters' rows of B that find room
  uint32_t makers = 0;      ///< blocks that make u
  uint32_t slices = 0;      ///< of k
  uint32_t patience_ns = 0;
  uint32_t adapters = 0;
  const int32_t* index = nullptr;
  const void* x = nullptr;
  Bank b;
  float* u = nullptr;  ///< [slices, m, max_rank], unscaled
  /// kFlagStride apart: blocks that have made their part of u, that have seen all of it; of each
  /// tile, blocks that left their sums or saw all.
  uint32_t* flags = nullptr;
  /// [tiles, parts, groups of tokens, warps, lanes]: fragments, for the blocks that finish them.
  float4* sums = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;
};

/// Up to kTileTokens tokens of one adapter.
struct StreamTile {
  uint32_t key, count, rank;
  uint8_t token[kTileTokens];
};
/// In the order of their first tokens.
struct Tiles {
  uint32_t leads[kStreamTokens / 32];  ///< bits: a tile's first token
  uint32_t count;
  StreamTile tile[kStreamTokens];
};
/// What a block knows of the tokens.
struct Tokens {
  alignas(16) uint32_t key[kStreamTokens];  ///< beyond m none
  uint32_t rank[kStreamTokens];
  float scale[kStreamTokens];
  uint32_t all_there;
  Tiles all, own;          ///< own: of the tokens that the block finishes
  uint32_t ranks[kTable];  ///< a small bank's, which are read beside the indices, not behind them
  float scales[kTable];
};

/// The tokens that a block finishes.
struct Range {
  uint32_t first, count;
  __host__ __device__ Range(uint32_t m, uint32_t part, uint32_t parts) {
    const uint32_t groups = (m + kGroup - 1) / kGroup;
    const uint32_t end = (part + 1) * groups / parts * kGroup;
    first = part * groups / parts * kGroup;
    count = (end < m ? end : m) - first;
  }
};
__host__ __device__ constexpr uint32_t up(uint32_t a, uint32_t to) {
  return (a + to - 1) / to * to;
}
/// The most that a block finishes.
__host__ __device__ constexpr uint32_t own_max(uint32_t m, uint32_t parts) {
  return (up(m, kGroup) / kGroup + parts - 1) / parts * kGroup;
}

/// Floats of an own token's sums: no bank conflicts.
__host__ __device__ constexpr uint32_t pitch_of(uint32_t rows) {
  return rows + 4;
}

/// Byte offsets in shared memory, behind the alignment to 1024.
struct Layout {
  uint32_t slot_bytes, ring, sums, share, u, tokens, slot_barriers, buffer_barriers, asked,
      barriers, bytes;
  __host__ __device__ Layout(const StreamArgs& args, uint32_t stage_bytes) {
    const uint32_t own = own_max(args.m, args.parts);
    slot_bytes = args.rows * args.b.max_rank * 2;
    ring = args.room_bytes;
    share = ring + args.stages * stage_bytes;
    sums = share - up(own * pitch_of(args.rows) * 4, 16);  // where the last stages were
    const uint32_t share_bytes = own * args.rows * 4;      // where the units' sums were
    u = share + (share_bytes > kUnitSumsBytes ? share_bytes : kUnitSumsBytes);
    tokens = u + own * args.b.max_rank * 4;
    slot_barriers = tokens + (sizeof(Tokens) + 15) / 16 * 16;
    buffer_barriers = slot_barriers + kMaxSlots * 8;
    asked = buffer_barriers + kMaxBuffers * 8;
    barriers = asked + 32;
    bytes = barriers + sm90::skinny::kMaxStages * 16 + 1024;
  }
};

/// share = B_i·u of the block's rows of W, for its own tokens.
struct Expansion {
  uint32_t row0;
  uint32_t there;  ///< of the rows: those below n
  Range own;
  uint32_t slot_bytes;
  uint8_t* room;     ///< A [buffers][boxes][box_rows][64], then B [slots][rows][max_rank]
  float* unit_sums;  ///< where share will be
  float* share;      ///< [own][rows]
  float* u;          ///< [own][max_rank], scaled; zeros beyond the true rank
  Tokens* tokens;
  uint32_t slot_barriers, buffer_barriers;
  /// Barriers: A is asked for (and the tokens are listed); A has been read; all of u was there; all
  /// parts' sums were.
  uint32_t asked, made, seen, met;
};

__device__ __forceinline__ void expanders_meet() {
  sm90::named_barrier(1, kExpandThreads);
}

/// To L2, which is what all see: what list_tiles reads.
__device__ __forceinline__ void prefetch_lists(const StreamArgs& args, uint32_t thread) {
  const uint32_t at = thread % 32 * 32;
  if (thread < 32 && at < args.m) prefetch_line(args.index + at);
  if (thread / 32 == 1 && at < min(args.adapters, kTable)) prefetch_line(args.b.ranks + at);
  if (thread / 32 == 2 && at < min(args.adapters, kTable)) prefetch_line(args.b.scales + at);
}

/// Those of the bits that stand for tokens before this one.
__device__ __forceinline__ uint32_t bits_before(uint32_t word, uint32_t w, uint32_t token) {
  return w < token / 32 ? word : w == token / 32 ? word & ((1u << token % 32) - 1) : 0;
}

/// Bits of the tokens with this key.
struct SameKey {
  uint32_t word[kStreamTokens / 32] = {};
  __device__ __forceinline__ SameKey(const Tokens& tokens, uint32_t key) {
    const auto* keys = reinterpret_cast<const uint4*>(tokens.key);
#pragma unroll
    for (uint32_t i = 0; i < kStreamTokens / 4; ++i) {
      const uint4 v = keys[i];
      word[i / 8] |= (uint32_t{v.x == key} | uint32_t{v.y == key} << 1 | uint32_t{v.z == key} << 2 |
                      uint32_t{v.w == key} << 3)
                     << i % 8 * 4;
    }
  }
  __device__ __forceinline__ void keep(const Range& range) {
#pragma unroll
    for (uint32_t w = 0; w < kStreamTokens / 32; ++w) {
      word[w] =
          bits_before(word[w], w, range.first + range.count) & ~bits_before(~0u, w, range.first);
    }
  }
};

__device__ __forceinline__ uint32_t leaders_before(const Tiles& tiles, uint32_t token) {
  uint32_t count = 0;
#pragma unroll
  for (uint32_t w = 0; w < kStreamTokens / 32; ++w) {
    count += __popc(bits_before(tiles.leads[w], w, token));
  }
  return count;
}
/// Whether this thread's token is the first of a tile of those with its key. Whole warps.
__device__ __forceinline__ bool mark_lead(
    const SameKey& same, uint32_t thread, bool has_adapter, Tiles& tiles) {
  uint32_t before = 0;
#pragma unroll
  for (uint32_t w = 0; w < kStreamTokens / 32; ++w) {
    before += __popc(bits_before(same.word[w], w, thread));
  }
  const bool leads = has_adapter && before % kTileTokens == 0;
  const uint32_t word = __ballot_sync(0xffffffffu, leads);
  if (thread % 32 == 0) tiles.leads[thread / 32] = word;
  return leads;
}
/// The tile that begins at this thread's token.
__device__ __forceinline__ void form_tile(
    const SameKey& same, uint32_t thread, uint32_t key, uint32_t rank, Tiles& tiles) {
  StreamTile& tile = tiles.tile[leaders_before(tiles, thread)];
  tile.key = key;
  tile.rank = rank;
  uint32_t found = 0;
#pragma unroll
  for (uint32_t w = 0; w < kStreamTokens / 32; ++w) {
    uint32_t word = same.word[w] & ~bits_before(~0u, w, thread);
    for (; word != 0 && found < kTileTokens; word &= word - 1) {
      tile.token[found++] = static_cast<uint8_t>(32 * w + __ffs(word) - 1);
    }
  }
  tile.count = found;
}

/// The tokens' adapters and their tiles.
__device__ __forceinline__ void list_tiles(
    const StreamArgs& args, const Range& range, Tokens& tokens, uint32_t thread) {
  const uint32_t adapters = args.adapters;
  const bool table = adapters <= kTable, takes_part = thread < kStreamTokens;  // whole warps
  // All reads are under way before the first is waited for.
  const int32_t index = thread < args.m ? __ldg(args.index + thread) : -1;
  int32_t rank = 0;
  float scale = 0.0f;
  if (table && thread < adapters) {
    rank = __ldg(args.b.ranks + thread);
    scale = __ldg(args.b.scales + thread);
  }
  const uint32_t key = key_of(index, adapters);
  if (takes_part) tokens.key[thread] = key;
  if (table) {
    tokens.ranks[thread] = min(static_cast<uint32_t>(max(rank, 0)), args.b.max_rank);
    tokens.scales[thread] = scale;
  }
  expanders_meet();
  const SameKey same(tokens, key);
  SameKey same_own = same;
  same_own.keep(range);
  uint32_t own_rank = 0;
  bool leads = false, leads_own = false;
  if (takes_part) {
    const bool has_adapter = key < adapters;
    leads = mark_lead(same, thread, has_adapter, tokens.all);
    const bool is_own = thread - range.first < range.count;
    leads_own = mark_lead(same_own, thread, has_adapter && is_own, tokens.own);
    if (has_adapter) {
      own_rank = table ? tokens.ranks[key] : rank_of(args.b, key, adapters);
      tokens.scale[thread] = table ? tokens.scales[key] : args.b.scales[key];
    } else {
      tokens.scale[thread] = 0.0f;
    }
    tokens.rank[thread] = own_rank;
  }
  expanders_meet();
  if (leads) form_tile(same, thread, key, own_rank, tokens.all);
  if (leads_own) form_tile(same_own, thread, key, own_rank, tokens.own);
  if (thread == 0) {
    tokens.all.count = leaders_before(tokens.all, kStreamTokens);
    tokens.own.count = leaders_before(tokens.own, kStreamTokens);
  }
  expanders_meet();
}

/// A block's units: every so many tiles and slices, all of a tile's groups of ranks.
struct Units {
  const Tokens* tokens;
  uint32_t slices, step_tiles, step_slices;
  uint32_t tile, slice, rank0 = 0;
  __device__ __forceinline__
  Units(const Tokens& tokens, uint32_t slices, uint32_t first, uint32_t step)
      : tokens(&tokens),
        slices(slices),
        step_tiles(step / slices),
        step_slices(step % slices),
        tile(first / slices),
        slice(first % slices) {
    skip_empty();
  }
  __device__ __forceinline__ bool left() const { return tile < tokens->all.count; }
  __device__ __forceinline__ void advance() {
    rank0 += kUnitRanks;
    if (rank0 < tokens->all.tile[tile].rank) return;
    step();
    skip_empty();
  }

 private:
  __device__ __forceinline__ void step() {
    rank0 = 0;
    tile += step_tiles;
    slice += step_slices;
    if (slice >= slices) slice -= slices, ++tile;
  }
  __device__ __forceinline__ void skip_empty() {
    while (left() && tokens->all.tile[tile].rank == 0) step();
  }
};

/// One warp: a unit's rows of A to a buffer.
__device__ __forceinline__ void ask_unit(
    const StreamArgs& args, const Expansion& e, const Units& unit, uint32_t buffer) {
  const uint32_t lane = threadIdx.x % 32, barrier = e.buffer_barriers + 8 * buffer;
  const uint32_t box_bytes = args.box_rows * 128;
  if (lane == 0) sm90::barrier_expect(barrier, kBoxes * box_bytes);
  __syncwarp();
  if (lane < kBoxes) {
    sm90::tensor_load(
        sm90::shared_address(e.room) + (buffer * kBoxes + lane) * box_bytes,
        &args.a_map,
        barrier,
        unit.slice * kSlice + 64 * lane,
        unit.tokens->all.tile[unit.tile].key * args.b.max_rank + unit.rank0);
  }
}

/// A lane's part of the unit's x, as the matrix unit wants it: zeros beyond k and the tokens.
template <typename T>
__device__ __forceinline__ void load_x(
    const StreamArgs& args, const Units& unit, uint32_t warp, uint32_t (&x)[8 * kWarpBoxes]) {
  const uint32_t lane = threadIdx.x % 32;
  const StreamTile& tile = unit.tokens->all.tile[unit.tile];
  const uint32_t p = unit.slice * kSlice + warp * kWarpBoxes * 64, at = lane / 4;
  const bool there = at < tile.count;
  const T* from = static_cast<const T*>(args.x) + p + lane % 4 * 2;
  if (there) from += size_t{tile.token[at]} * args.k;
#pragma unroll
  for (uint32_t i = 0; i < 8 * kWarpBoxes; ++i) {
    x[i] = there && p + 8 * i < args.k ? __ldg(reinterpret_cast<const uint32_t*>(from + 8 * i)) : 0;
  }
}

/// u of the units. open: the gate of W opens when all of their A is asked for. parities: of the
/// buffers, a bit each.
template <typename T>
__device__ __forceinline__ void make_u(
    const StreamArgs& args,
    const Expansion& e,
    uint32_t thread,
    Units unit,
    bool open,
    uint32_t& parities) {
  const uint32_t warp = thread / 32, lane = thread % 32;
  Units ahead = unit;
  if (warp == 0) {
    for (uint32_t i = 0; i < args.buffers && ahead.left(); ++i, ahead.advance()) {
      ask_unit(args, e, ahead, i);
    }
    if (open && !ahead.left() && lane == 0) sm90::barrier_arrive(e.asked);
  }
  uint32_t x[8 * kWarpBoxes];
  if (unit.left()) load_x<T>(args, unit, warp, x);
  const uint32_t box_bytes = args.box_rows * 128, row = lane % kUnitRanks % args.box_rows;
  const uint32_t room = sm90::shared_address(e.room) + row * 128;
  uint32_t buffer = 0;
  for (uint32_t turn = 0; unit.left(); turn ^= 1) {
    Units next = unit;
    next.advance();
    uint32_t next_x[8 * kWarpBoxes];
    if (next.left()) load_x<T>(args, next, warp, next_x);
    sm90::barrier_wait(e.buffer_barriers + 8 * buffer, parities >> buffer & 1);
    parities ^= 1u << buffer;
    float d[2][4] = {};
#pragma unroll
    for (uint32_t i = 0; i < 4 * kWarpBoxes; ++i) {
      const uint32_t box = buffer * kBoxes + warp * kWarpBoxes + i / 4;
      const uint32_t chunk = i % 4 * 2 + lane / 16;
      uint32_t a[4];
      mma::load_x4(a, room + box * box_bytes + ((chunk ^ row % 8) << 4));
      mma::multiply<T>(d[i % 2], a, x[2 * i], x[2 * i + 1]);
    }
    float* sums = e.unit_sums + turn * kExpandWarps * kUnitSums;
    auto* own = reinterpret_cast<float2*>(sums + warp * kUnitSums) + lane;
    own[0] = make_float2(d[0][0] + d[1][0], d[0][1] + d[1][1]);
    own[32] = make_float2(d[0][2] + d[1][2], d[0][3] + d[1][3]);
    expanders_meet();  // the buffer is read; the sums of two turns before, too
    if (warp == 0 && ahead.left()) {
      ask_unit(args, e, ahead, buffer);
      ahead.advance();
      if (open && !ahead.left() && lane == 0) sm90::barrier_arrive(e.asked);
    }
    const StreamTile& tile = e.tokens->all.tile[unit.tile];
    const uint32_t j = unit.rank0 + thread / kTileTokens, i = thread % kTileTokens;
    if (thread < kUnitSums && i < tile.count && j < tile.rank) {
      float sum = 0.0f;
#pragma unroll
      for (uint32_t w = 0; w < kExpandWarps; ++w) sum += sums[w * kUnitSums + thread];
      args.u[(size_t{unit.slice} * args.m + tile.token[i]) * args.b.max_rank + j] = sum;
    }
    unit = next;
#pragma unroll
    for (uint32_t q = 0; q < 8 * kWarpBoxes; ++q) x[q] = next_x[q];
    if (++buffer == args.buffers) buffer = 0;
  }
  expanders_meet();
}

/// Of a tile's adapter, those of the block.
__device__ __forceinline__ const void* rows_of_b(
    const StreamArgs& args, const Expansion& e, uint32_t tile) {
  const size_t row = size_t{e.tokens->own.tile[tile].key} * args.n + e.row0;
  return static_cast<const char*>(args.b.right) + row * args.b.max_rank * 2;
}
/// One thread.
__device__ __forceinline__ void load_b(
    const StreamArgs& args, const Expansion& e, uint32_t tile, uint32_t slot) {
  const uint32_t barrier = e.slot_barriers + 8 * slot, bytes = e.there * args.b.max_rank * 2;
  const uint32_t to = sm90::shared_address(e.room) + slot * e.slot_bytes;
  sm90::barrier_expect(barrier, bytes);
  sm90::bulk_load(to, rows_of_b(args, e, tile), bytes, barrier);
}
/// One thread: those that find room, as soon as A has been read.
__device__ __forceinline__ void load_first_b(const StreamArgs& args, const Expansion& e) {
  if (e.there == 0) return;
  sm90::barrier_wait(e.made, 0);
  for (uint32_t i = 0; i < min(args.slots, e.tokens->own.count); ++i) load_b(args, e, i, i);
}

__device__ __forceinline__ uint64_t time_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

/// Threads that wait for a flag stand in the way of those that add to it: they ask now and then.
constexpr uint32_t kNapNs = 100;

/// Until all of u is there; false: patience is lost.
__device__ __forceinline__ bool await_u(
    const StreamArgs& args, const Expansion& e, uint32_t thread) {
  if (thread == 0) {
    const uint64_t begin = time_ns();
    bool there = sm90::flag_load_acquire(args.flags) == args.makers;
    while (!there && time_ns() - begin < args.patience_ns) {
      __nanosleep(kNapNs);
      there = sm90::flag_load_acquire(args.flags) == args.makers;
    }
    e.tokens->all_there = there;
  }
  expanders_meet();
  return e.tokens->all_there;
}

/// Own tokens' u = scale·Σ slices, four ranks a thread and all loads in flight.
__device__ __forceinline__ void sum_u(const StreamArgs& args, const Expansion& e, uint32_t thread) {
  const uint32_t row = args.b.max_rank / 4, quads = e.own.count * row;
  const size_t stride = size_t{args.m} * row;
  const auto* from = reinterpret_cast<const float4*>(args.u) + size_t{e.own.first} * row;
  for (uint32_t at = thread; at < quads; at += kExpandThreads) {
    float4 sum = {};
#pragma unroll 8
    for (uint32_t s = 0; s < args.slices; ++s) {
      add_to(sum, __ldcg(from + s * stride + at));
    }
    const uint32_t t = e.own.first + at / row, j = at % row * 4, rank = e.tokens->rank[t];
    const float f = e.tokens->scale[t];
    reinterpret_cast<float4*>(e.u)[at] = make_float4(  // garbage beyond the rank
        j < rank ? f * sum.x : 0.0f,
        j + 1 < rank ? f * sum.y : 0.0f,
        j + 2 < rank ? f * sum.z : 0.0f,
        j + 3 < rank ? f * sum.w : 0.0f);
  }
}

/// How a lane of an expanding warp reads a row of B.
struct Lane {
  uint32_t row;
  uint32_t chunks;  ///< of 16 bytes, of a row of B
  uint32_t shift;   ///< neighbouring rows begin at different chunks, not to meet in the same banks
  __device__ __forceinline__ explicit Lane(uint32_t row_chunks) : chunks(row_chunks) {
    row = threadIdx.x % 32;
    shift = row * chunks / 8 % chunks;  // the same 32 rows on
  }
};

/// One warp: the block's rows by two tiles' tokens at a time, so that one's reads are under way
/// while the other's are waited for. kWhole: both have all ranks.
template <typename T, bool kWhole>
__device__ __forceinline__ void expand_tiles(
    const StreamArgs& args,
    const Expansion& e,
    const Lane& lane,
    const StreamTile* const (&tile)[2],
    const uint32_t (&count)[2],
    const uint8_t* const (&b)[2]) {
  constexpr uint32_t kCount = Vec16<T>::kCount;
  for (uint32_t row = lane.row; row < e.there; row += 32) {
    for (uint32_t i = 0; i < max(count[0], count[1]); ++i) {
      uint32_t t[2];
      float sum[2][2] = {};
#pragma unroll
      for (uint32_t p = 0; p < 2; ++p) t[p] = tile[p]->token[i < count[p] ? i : 0] - e.own.first;
#pragma unroll 2
      for (uint32_t s = 0; s < lane.chunks; ++s) {
        const uint32_t c =
            s + lane.shift < lane.chunks ? s + lane.shift : s + lane.shift - lane.chunks;
#pragma unroll
        for (uint32_t p = 0; p < 2; ++p) {
          const Vec16<T> v = reinterpret_cast<const Vec16<T>*>(b[p])[row * lane.chunks + c];
          const float* u = e.u + t[p] * args.b.max_rank + c * kCount;
#pragma unroll
          for (uint32_t q = 0; q < kCount; q += 4) {
            const float4 u4 = *reinterpret_cast<const float4*>(u + q);
            const float us[] = {u4.x, u4.y, u4.z, u4.w};
#pragma unroll
            for (uint32_t o = 0; o < 4; ++o) {
              // What lies beyond the rank may be NaN.
              if (kWhole || c * kCount + q + o < tile[p]->rank) {
                sum[p][o % 2] = fmaf(to_float(v.v[q + o]), us[o], sum[p][o % 2]);
              }
            }
          }
        }
      }
#pragma unroll
      for (uint32_t p = 0; p < 2; ++p) {
        if (i < count[p]) e.share[t[p] * args.rows + row] = sum[p][0] + sum[p][1];
      }
    }
  }
}

/// The expanding warps' part. A slot of the ring belongs to one of them.
template <typename T>
__device__ __forceinline__ void expand(
    const StreamArgs& args, const Expansion& e, uint32_t thread) {
  const uint32_t warp = thread / 32;
  Tokens& tokens = *e.tokens;
  prefetch_lists(args, thread);
  sm90::dependency_wait();
  list_tiles(args, e.own, tokens, thread);
  const bool makes = blockIdx.x < args.makers && tokens.all.count > 0;
  if (!makes && thread == 0) sm90::barrier_arrive(e.asked);
  uint32_t parities = 0, parity = 0;
  if (makes) {
    const Units units(tokens, args.slices, blockIdx.x, args.makers);
    make_u<T>(args, e, thread, units, true, parities);
    if (thread == 0) sm90::flag_add_release(args.flags, 1);
  }
  if (thread == 0) sm90::barrier_arrive(e.made);
  const uint32_t tiles = e.there > 0 ? tokens.own.count : 0;
  if (tiles > 0 && !await_u(args, e, thread)) {
    // It makes all of u itself, the same bits: so it does not matter whether all makers find room
    // at once. B gives its room back.
    for (uint32_t slot = warp; slot < min(args.slots, tiles); slot += kExpandWarps) {
      sm90::barrier_wait(e.slot_barriers + 8 * slot, parity);
    }
    parity ^= 1;
    expanders_meet();
    make_u<T>(args, e, thread, Units(tokens, args.slices, 0, 1), false, parities);
    if (thread == 0) load_first_b(args, e);
  }
  if (thread == 0) sm90::barrier_arrive(e.seen);
  for (uint32_t i = thread; i < e.own.count * args.rows / 4; i += kExpandThreads) {
    reinterpret_cast<float4*>(e.share)[i] = float4{};  // of tokens without an adapter
  }
  if (tiles > 0) sum_u(args, e, thread);
  expanders_meet();
  const Lane lane(args.b.max_rank / Vec16<T>::kCount);
  for (uint32_t first = 0; first < tiles; first += args.slots, parity ^= 1) {
    const uint32_t end = min(args.slots, tiles - first);
    for (uint32_t slot = warp; slot < end; slot += 2 * kExpandWarps) {
      const bool two = slot + kExpandWarps < end;
      const uint32_t slots[2] = {slot, two ? slot + kExpandWarps : slot};
      const StreamTile* tile[2];
      const uint8_t* b[2];
#pragma unroll
      for (uint32_t p = 0; p < 2; ++p) {
        tile[p] = &tokens.own.tile[first + slots[p]];
        b[p] = e.room + slots[p] * e.slot_bytes;
        sm90::barrier_wait(e.slot_barriers + 8 * slots[p], parity);
      }
      const uint32_t count[2] = {tile[0]->count, two ? tile[1]->count : 0};
      if (min(tile[0]->rank, tile[1]->rank) == args.b.max_rank) {
        expand_tiles<T, true>(args, e, lane, tile, count, b);
      } else {
        expand_tiles<T, false>(args, e, lane, tile, count, b);
      }
      __syncwarp();
      const uint32_t p = thread % 32, free = slot + p * kExpandWarps;
      const uint32_t next = first + args.slots + free;
      if (p < 2 && free < end && next < tiles) load_b(args, e, next, free);
    }
  }
}

}  // namespace metal_lora::cuda::multi
