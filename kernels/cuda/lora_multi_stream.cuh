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

using sm90::skinny::kRows;

constexpr uint32_t kConsumerWarps = 4, kExpandWarps = 8;
constexpr uint32_t kExpandThreads = 32 * kExpandWarps;
static_assert(kExpandThreads >= kStreamTokens);
constexpr uint32_t kStreamThreads = 32 * (kConsumerWarps + 1) + kExpandThreads;
constexpr uint32_t kMaxStreamRank = 64;
constexpr uint32_t kMaxSlots = kStreamTokens, kMaxBuffers = 8;
constexpr uint32_t kTable = 256;
constexpr uint32_t kPitch = kRows + 4;  ///< floats of a token's sums: no bank conflicts
/// A unit of u: up to 16 rows of an adapter's A, a slice of k, a tile's tokens. Each warp
/// multiplies its share of the columns, on the matrix unit with the ranks as its 16 rows and the
/// tokens as its 8 columns; the warps' sums meet in shared memory.
constexpr uint32_t kUnitRanks = 16;
constexpr uint32_t kBoxes = kSlice / 64, kWarpBoxes = kBoxes / kExpandWarps;
constexpr uint32_t kUnitSums = kUnitRanks * kTileTokens;
constexpr uint32_t kUnitSumsBytes = 2 * kExpandWarps * kUnitSums * 4;
static_assert(kTileTokens == 8 && kUnitSums <= kExpandThreads);

struct StreamArgs {
  CUtensorMap w_map, x_map, a_map;
  uint32_t m = 0, n = 0, k = 0;
  uint32_t parts = 1;       ///< of k: blocks of a cluster
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
  float* u = nullptr;         ///< [slices, m, max_rank], unscaled
  uint32_t* flags = nullptr;  ///< blocks that have made their part of u; that have seen all of it
  const float* bias = nullptr;
  void* y = nullptr;
};

/// Up to kTileTokens tokens of one adapter.
struct StreamTile {
  uint32_t key, count, rank;
  uint8_t token[kTileTokens];
};
/// What a block knows of its tokens, and their tiles in the order of their first tokens.
struct Tokens {
  alignas(16) uint32_t key[kStreamTokens];  ///< beyond m none
  uint32_t rank[kStreamTokens];
  float scale[kStreamTokens];
  uint32_t leads[kStreamTokens / 32];  ///< bits: a tile's first token
  uint32_t tiles;
  uint32_t all_there;
  StreamTile tile[kStreamTokens];
  uint32_t ranks[kTable];  ///< a small bank's, which are read beside the indices, not behind them
  float scales[kTable];
};

/// Byte offsets in shared memory, behind the alignment to 1024. The sums lie where the stages did.
struct Layout {
  uint32_t slot_bytes, room, share, u, tokens, slot_barriers, buffer_barriers, asked, barriers,
      bytes;
  __host__ __device__ Layout(const StreamArgs& args, uint32_t stage_bytes) {
    const uint32_t rows = kRows / args.parts;
    slot_bytes = rows * args.b.max_rank * 2;
    room = args.stages * stage_bytes;
    share = room + args.room_bytes;
    u = share + args.m * rows * 4;
    const uint32_t u_bytes = args.m * args.b.max_rank * 4;
    tokens = u + (u_bytes > kUnitSumsBytes ? u_bytes : kUnitSumsBytes);
    slot_barriers = tokens + (sizeof(Tokens) + 15) / 16 * 16;
    buffer_barriers = slot_barriers + kMaxSlots * 8;
    asked = buffer_barriers + kMaxBuffers * 8;
    barriers = asked + 16;
    bytes = barriers + sm90::skinny::kMaxStages * 16 + 1024;
  }
};

/// share = B_i·u of the rows of W that the block finishes, for all tokens.
struct Expansion {
  uint32_t row0, rows;  ///< rows: a power of two
  uint32_t there;       ///< of rows: those below n
  uint32_t slot_bytes;
  uint8_t* room;  ///< A [buffers][boxes][box_rows][64], then B [slots][rows][max_rank]
  float* share;   ///< [tokens][rows]
  float* u;       ///< [tokens][max_rank], scaled; zeros beyond the true rank. Before: units' sums
  Tokens* tokens;
  uint32_t slot_barriers, buffer_barriers;
  uint32_t asked;  ///< barrier: A is asked for
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
};
/// Those of the bits that stand for tokens before this one.
__device__ __forceinline__ uint32_t bits_before(uint32_t word, uint32_t w, uint32_t token) {
  return w < token / 32 ? word : w == token / 32 ? word & ((1u << token % 32) - 1) : 0;
}

/// The tokens' adapters and their tiles.
__device__ __forceinline__ void list_tiles(
    const StreamArgs& args, Tokens& tokens, uint32_t thread) {
  constexpr uint32_t kWords = kStreamTokens / 32;
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
  uint32_t before = 0, all = 0, own_rank = 0;
  bool leads = false;
  if (takes_part) {
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) {
      before += __popc(bits_before(same.word[w], w, thread));
      all += __popc(same.word[w]);
    }
    leads = key < adapters && before % kTileTokens == 0;
    const uint32_t word = __ballot_sync(0xffffffffu, leads);
    if (thread % 32 == 0) tokens.leads[thread / 32] = word;
    if (key < adapters) {
      own_rank = table ? tokens.ranks[key] : rank_of(args.b, key, adapters);
      tokens.scale[thread] = table ? tokens.scales[key] : args.b.scales[key];
    } else {
      tokens.scale[thread] = 0.0f;
    }
    tokens.rank[thread] = own_rank;
  }
  expanders_meet();
  const auto leaders_before = [&](uint32_t token) {
    uint32_t count = 0;
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) count += __popc(bits_before(tokens.leads[w], w, token));
    return count;
  };
  if (leads) {
    StreamTile& tile = tokens.tile[leaders_before(thread)];
    tile.key = key;
    tile.rank = own_rank;
    tile.count = min(kTileTokens, all - before);
    uint32_t found = 0;
#pragma unroll
    for (uint32_t w = 0; w < kWords; ++w) {
      uint32_t word = same.word[w] & ~bits_before(~0u, w, thread);
      for (; word != 0 && found < kTileTokens; word &= word - 1) {
        tile.token[found++] = static_cast<uint8_t>(32 * w + __ffs(word) - 1);
      }
    }
  }
  if (thread == 0) tokens.tiles = leaders_before(kStreamTokens);
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
  __device__ __forceinline__ bool left() const { return tile < tokens->tiles; }
  __device__ __forceinline__ void advance() {
    rank0 += kUnitRanks;
    if (rank0 < tokens->tile[tile].rank) return;
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
    while (left() && tokens->tile[tile].rank == 0) step();
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
        unit.tokens->tile[unit.tile].key * args.b.max_rank + unit.rank0);
  }
}

/// A lane's part of the unit's x, as the matrix unit wants it: zeros beyond k and the tokens.
template <typename T>
__device__ __forceinline__ void load_x(
    const StreamArgs& args, const Units& unit, uint32_t warp, uint32_t (&x)[8 * kWarpBoxes]) {
  const uint32_t lane = threadIdx.x % 32;
  const StreamTile& tile = unit.tokens->tile[unit.tile];
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
    float* sums = e.u + turn * kExpandWarps * kUnitSums;
    auto* own = reinterpret_cast<float2*>(sums + warp * kUnitSums) + lane;
    own[0] = make_float2(d[0][0] + d[1][0], d[0][1] + d[1][1]);
    own[32] = make_float2(d[0][2] + d[1][2], d[0][3] + d[1][3]);
    expanders_meet();  // the buffer is read; the sums of two turns before, too
    if (warp == 0 && ahead.left()) {
      ask_unit(args, e, ahead, buffer);
      ahead.advance();
      if (open && !ahead.left() && lane == 0) sm90::barrier_arrive(e.asked);
    }
    const StreamTile& tile = e.tokens->tile[unit.tile];
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
  const size_t row = size_t{e.tokens->tile[tile].key} * args.n + e.row0;
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
/// Each warp those that it expands first; L2 is asked for the others, which wait for a slot.
__device__ __forceinline__ void load_first_b(
    const StreamArgs& args, const Expansion& e, uint32_t thread, uint32_t tiles) {
  static_assert(kStreamTokens <= kExpandThreads);
  const uint32_t own = thread / 32 + kExpandWarps * (thread % 32);
  if (own < min(args.slots, tiles)) {
    load_b(args, e, own, own);
  } else if (own < tiles) {
    sm90::bulk_prefetch(rows_of_b(args, e, own), e.there * args.b.max_rank * 2);
  }
  __syncwarp();
}

__device__ __forceinline__ uint64_t time_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

/// Until all of u is there; false: patience is lost.
__device__ __forceinline__ bool await_u(
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
  return e.tokens->all_there;
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
  const auto* from = reinterpret_cast<const float4*>(args.u);
  for (uint32_t first = thread; first < quads; first += kAtOnce * kExpandThreads) {
    float4 sum[kAtOnce] = {};
#pragma unroll 4
    for (uint32_t s = 0; s < args.slices; ++s) {
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

/// Where a lane of an expanding warp stands among a tile's rows and tokens.
struct Lane {
  uint32_t row, token, tokens;  ///< tokens: that the warp takes at a time
  uint32_t chunks;              ///< of 16 bytes, of a row of B
  uint32_t shift;  ///< neighbouring rows begin at different chunks, not to meet in the same banks
  __device__ __forceinline__ Lane(uint32_t rows, uint32_t row_chunks) : chunks(row_chunks) {
    const uint32_t lane = threadIdx.x % 32, across = min(rows, 32u);
    row = lane % across, token = lane / across, tokens = 32 / across;
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
    for (uint32_t i = lane.token; i < max(count[0], count[1]); i += lane.tokens) {
      uint32_t t[2];
      float sum[2][2] = {};
#pragma unroll
      for (uint32_t p = 0; p < 2; ++p) t[p] = tile[p]->token[i < count[p] ? i : 0];
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
        if (i < count[p]) e.share[t[p] * e.rows + row] = sum[p][0] + sum[p][1];
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
  list_tiles(args, tokens, thread);
  const bool makes = blockIdx.x < args.makers;
  if ((!makes || tokens.tiles == 0) && thread == 0) sm90::barrier_arrive(e.asked);
  for (uint32_t i = thread; i < args.m * e.rows / 4; i += kExpandThreads) {
    reinterpret_cast<float4*>(e.share)[i] = float4{};  // of tokens without an adapter
  }
  if (tokens.tiles == 0) return;
  uint32_t parities = 0, parity = 0;
  if (makes) {
    const Units units(tokens, args.slices, blockIdx.x, args.makers);
    make_u<T>(args, e, thread, units, true, parities);
    if (thread == 0) sm90::flag_add_release(args.flags, 1);
  }
  const uint32_t tiles = e.there > 0 ? tokens.tiles : 0;
  load_first_b(args, e, thread, tiles);
  if (!await_u(args, e, thread)) {
    // It makes all of u itself, the same bits: so it does not matter whether all makers find room
    // at once. B gives its room back.
    for (uint32_t slot = warp; slot < min(args.slots, tiles); slot += kExpandWarps) {
      sm90::barrier_wait(e.slot_barriers + 8 * slot, parity);
    }
    parity ^= 1;
    expanders_meet();
    make_u<T>(args, e, thread, Units(tokens, args.slices, 0, 1), false, parities);
    load_first_b(args, e, thread, tiles);
  }
  sum_u(args, e, thread);
  expanders_meet();
  const Lane lane(e.rows, args.b.max_rank / Vec16<T>::kCount);
  for (uint32_t first = 0; first < tiles; first += args.slots, parity ^= 1) {
    const uint32_t end = min(args.slots, tiles - first);
    for (uint32_t slot = warp; slot < end; slot += 2 * kExpandWarps) {
      const bool two = slot + kExpandWarps < end;
      const uint32_t slots[2] = {slot, two ? slot + kExpandWarps : slot};
      const StreamTile* tile[2];
      const uint8_t* b[2];
#pragma unroll
      for (uint32_t p = 0; p < 2; ++p) {
        tile[p] = &tokens.tile[first + slots[p]];
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
  if (thread == 0) leave_u(args);
}

}  // namespace metal_lora::cuda::multi
