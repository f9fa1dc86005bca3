// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_shrink on Hopper: a warp that does nothing but ask the copy engine, eight that multiply.
// A block takes 32 rows of x, and each of its warps a part of k of every stage, so that nothing is
// read twice from shared memory and a stage costs a warp a wait, its fragments and their products.
// Every block needs all of `right`, as much as a block's x for 32 columns: blocks of a cluster
// that stand below each other share it, each asking for its part of it for all (multicast). Where
// rows are few, blocks of a cluster split k as well and add up through each other's shared memory.
//   ladder (H100, bf16, m = k = 4096, 48 columns; reading x alone: 12.2 us, 2750 GB/s)
//     cp.async, addresses worked out for each copy        34.7 us
//     ... once (lora_shrink.cu)                           21.0
//     copy engine, boxes of 64 of k: 16 requests a stage  24.8   100 cycles a request
//     a box for all of a stage's k: 4 requests            15.7   78 % of the read; 16 columns 14.2
//     (86 %), x in L2 11.4; k = 14336, 16 columns: 41.6 us, 94 %
//     sums sent (st.async) instead of fetched behind a cluster barrier: m = 64 from 5.2 to 4.6
//     dropout, a mask of its own for each of three parts: 37.2 us (one part of 16: 17.1), where
//     lora_shrink.cu takes 159; 12 instructions an element and part
//     right [k, rank], rank 64, in rows of 128 bytes instead of 32: 15.9 instead of 21.5
//   About 3 us are launch, first copies and last sums. The next 10 % would take 64 rows a block:
//   every 32 rows read all of `right` from L2, 50 MB here, and at 128 columns (24.6 us) four times
//   as much as x. Tried: stages of 128 of k (15.8, x in L2 13.7), two blocks on a multiprocessor
//   so that the next kernel's can start (18.6).
#include <algorithm>

#include "kernels/cuda/lora_shrink.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::shrink {

namespace {

constexpr uint32_t kRows = 32;
constexpr uint32_t kWarps = 8;
constexpr uint32_t kThreads = 32 * (kWarps + 1);
constexpr uint32_t kMaxStages = 10;
constexpr uint32_t kKeysAt = 1024, kBarrierBytes = kKeysAt + kMaxParts * kRows * 8;
constexpr uint32_t kBoxBytes = 64 * 16 * 2;  ///< of right

struct TmaArgs {
  Args args;
  uint32_t sharers = 1;     ///< blocks below each other that share `right`
  bool right_wide = false;  ///< right [k, rank] in boxes of 64 columns: whole lines
  CUtensorMap x;
  CUtensorMap right[kMaxParts];
};

/// kPairs: sixteens of columns of a block at most. Of `right`, boxes of 16 columns and 64 of k
/// either way it lies; parts are padded to 16 columns.
template <uint32_t kPairs>
struct TmaShape {
  static constexpr uint32_t kWidth = 16 * kPairs;
  static constexpr uint32_t kBlocks = kPairs > 4 ? 2 : 4;  ///< of 64 of k, of a stage
  static constexpr uint32_t kInner = 64 * kBlocks;
  static constexpr uint32_t kWarpSteps = kInner / 16 / kWarps;
  static constexpr uint32_t kXBytes = kBlocks * kRows * 128;
  static constexpr uint32_t kPitch = kWidth + 8;
  static constexpr uint32_t kPartialBytes = kWarps * kRows * kPitch * 4;

  static constexpr uint32_t kReceiveBytes = kRows * kWidth * 4;  ///< sums of a cluster's blocks

  static constexpr uint32_t stage_bytes(uint32_t pairs) {
    return kXBytes + pairs * kBlocks * kBoxBytes;
  }
};

/// A box of a map of blocks to all blocks of the cluster whose bit is set.
__device__ __forceinline__ void load_blocks_multicast(
    uint32_t to,
    const CUtensorMap* map,
    uint32_t full,
    uint32_t row,
    uint32_t block,
    uint16_t all) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map),
      "r"(full),
      "r"(0),
      "r"(row),
      "r"(block),
      "h"(all)
      : "memory");
}

/// One thread asks for everything, stage by stage, in as few requests as can be: each costs it a
/// hundred cycles (with boxes of 64 of k they took longer than the copies).
template <bool kKn, uint32_t kPairs>
__device__ __forceinline__ void produce(
    const TmaArgs& t,
    uint32_t barriers,
    uint32_t stages,
    uint32_t pairs,
    uint32_t row0,
    uint32_t column0,
    uint32_t sharer,
    uint32_t first_of_share,
    uint32_t inner0,
    uint32_t count) {
  using S = TmaShape<kPairs>;
  const CUtensorMap* maps[kPairs];
  uint32_t columns[kPairs];
#pragma unroll
  for (uint32_t pair = 0; pair < kPairs; ++pair) {
    const uint32_t column = column0 + pair * 16;
    uint32_t part = 0;
    while (part + 1 < t.args.parts && t.args.part[part + 1].first <= column) ++part;
    maps[pair] = &t.right[part];
    columns[pair] = column - t.args.part[part].first;
  }
  const auto all = static_cast<uint16_t>(((1u << t.sharers) - 1) << first_of_share);
  const uint32_t stage_bytes = S::stage_bytes(pairs);
  const uint32_t mine = sharer * S::kBlocks / t.sharers;  // my blocks of 64 of k
  uint32_t stage = 0, parity = 1, block = inner0 / 64;
  for (uint32_t s = 0; s < count; ++s, block += S::kBlocks) {
    const uint32_t full = barriers + stage * 16, to = stages + stage * stage_bytes;
    sm90::barrier_wait(full + 8, parity);
    sm90::barrier_expect(full, stage_bytes);
    sm90::tensor_load_blocks(to, &t.x, full, row0, block);
#pragma unroll
    for (uint32_t pair = 0; pair < kPairs; ++pair) {
      if (pair >= pairs) break;
      uint32_t there = to + S::kXBytes + (pair * S::kBlocks + mine) * kBoxBytes;
      const uint32_t from = block + mine;
      if constexpr (kKn) {
        if (t.right_wide) {
          if (pair % 4 != 0) continue;
          there += 3 * mine * kBoxBytes;
        }
        const auto column = static_cast<int>(columns[pair]), row = static_cast<int>(from * 64);
        if (t.sharers == 1) {
          sm90::tensor_load(there, maps[pair], full, column, row);
        } else {
          sm90::tensor_load_multicast(there, maps[pair], full, column, row, all);
        }
      } else if (t.sharers == 1) {
        sm90::tensor_load_blocks(there, maps[pair], full, columns[pair], from);
      } else {
        load_blocks_multicast(there, maps[pair], full, columns[pair], from, all);
      }
    }
    if (++stage == t.args.stages) stage = 0, parity ^= 1;
  }
}

/// The masks of a block's parts: each has its own, so that x is masked anew for each.
struct Dropped {
  const Args& args;
  const DropKey* keys;      ///< [parts][rows] in shared memory
  uint32_t parts_of_pairs;  ///< four bits each
  __device__ uint32_t part(uint32_t pair) const { return parts_of_pairs >> (4 * pair) & 15; }

  /// x's fragments, of columns k, k + 1, k + 8 and k + 9, to what part p keeps of them.
  __device__ __forceinline__ void mask(
      uint32_t p, uint32_t k, const uint32_t (&x)[2][4], uint32_t (&kept)[2][4]) const {
    const DropMask mask = args.part[p].mask;
    const DropKey* row = keys + p * kRows + threadIdx.x % 32 / 4;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {  // rows + 0, 8, 16, 24; k or k + 8
      const uint32_t column = k + (i & 1) * 8;
      const DropKey key = row[i / 2 * 8];
      uint32_t bits = drop_keeps(mask, key, column) ? 0x0000ffffu : 0;
      if (drop_keeps(mask, key, column + 1)) bits |= 0xffff0000u;
      const uint32_t at = (i & 1) * 2 + (i / 2 & 1);
      kept[i / 4][at] = x[i / 4][at] & bits;
    }
  }
};

/// A warp's part of every stage, kPairs sixteens of columns, of which those from `pairs` on are
/// worked out from the last one's and not wanted.
template <typename T, bool kKn, uint32_t kMost, uint32_t kPairs, bool kDrop>
__device__ __forceinline__ void consume(
    const Dropped& dropped,
    bool right_wide,
    uint32_t barriers,
    uint32_t stages,
    uint32_t stage_count,
    uint32_t stage_bytes,
    uint32_t sharers,
    uint32_t first_of_share,
    uint32_t inner0,
    uint32_t count,
    uint32_t pairs,
    float (&sums)[2][2 * kMost][4]) {
  using S = TmaShape<kMost>;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t step0 = warp * S::kWarpSteps, block = step0 / 4, chunk = step0 % 4 * 2;
  const uint32_t x_at = stages + block * kRows * 128 + (lane & 15) * 128 +
                        (((chunk + (lane >> 4)) ^ (lane & 7)) << 4);
  uint32_t right_at = stages + S::kXBytes;
  if constexpr (kKn) {
    // Rows of 32 bytes, their halves exchanged in every other four of them; or of 128, eighths.
    const uint32_t row = chunk * 8 + (lane & 15), half = lane >> 4;
    right_at += right_wide ? block * 4 * kBoxBytes + row * 128 + ((half ^ (lane & 7)) << 4)
                           : block * kBoxBytes + row * 32 + ((half ^ ((lane >> 2) & 1)) << 4);
  } else {
    const uint32_t n = (lane & 7) + ((lane >> 4) << 3);
    right_at += block * kBoxBytes + n * 128 + (((chunk + ((lane >> 3) & 1)) ^ (n & 7)) << 4);
  }
  uint32_t stage = 0, parity = 0;
  for (uint32_t s = 0; s < count; ++s) {
    const uint32_t full = barriers + stage * 16, from = stage * stage_bytes;
    sm90::barrier_wait(full, parity);
#pragma unroll
    for (uint32_t step = 0; step < S::kWarpSteps; ++step) {
      uint32_t a[2][4], b[kPairs][4];
      [[maybe_unused]] uint32_t masked[2][4];
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        mma::load_x4(a[i], ((from + x_at) ^ (step * 32)) + i * 16 * 128);
      }
#pragma unroll
      for (uint32_t pair = 0; pair < kPairs; ++pair) {
        const uint32_t which = kMost > 4 ? min(pair, pairs - 1) : pair;
        if constexpr (kKn) {
          const uint32_t turn = right_wide ? (which & 3) * 32 : 0;
          const uint32_t at = (right_wide ? which & ~3u : which) * S::kBlocks * kBoxBytes;
          mma::load_x4_across(
              b[pair], ((from + right_at) ^ turn) + step * (right_wide ? 2048 : 512) + at);
        } else {
          const uint32_t at = which * S::kBlocks * kBoxBytes;
          mma::load_x4(b[pair], ((from + right_at) ^ (step * 32)) + at);
        }
      }
      uint32_t(&kept)[2][4] = kDrop ? masked : a;
#pragma unroll
      for (uint32_t pair = 0; pair < kPairs; ++pair) {
        if constexpr (kDrop) {
          if (pair == 0 || dropped.part(pair) != dropped.part(pair - 1)) {
            const uint32_t k = inner0 + s * S::kInner + (step0 + step) * 16 + lane % 4 * 2;
            dropped.mask(dropped.part(pair), k, a, masked);
          }
        }
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          mma::multiply<T>(sums[i][2 * pair], kept[i], b[pair][0], b[pair][1]);
          mma::multiply<T>(sums[i][2 * pair + 1], kept[i], b[pair][2], b[pair][3]);
        }
      }
    }
    __syncwarp();
    if (lane < sharers) sm90::barrier_arrive_remote(full + 8, first_of_share + lane);
    if (++stage == stage_count) stage = 0, parity ^= 1;
  }
}

/// Four floats to block `rank`, where the barrier counts them.
__device__ __forceinline__ void send(
    uint32_t to, uint32_t barrier, uint32_t rank, const float4& v) {
  asm volatile(
      "{\n.reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, "
      "[counter];\n}" ::"r"(to),
      "r"(barrier),
      "r"(rank),
      "f"(v.x),
      "f"(v.y),
      "f"(v.z),
      "f"(v.w)
      : "memory");
}

template <typename T, bool kKn, uint32_t kPairs, bool kDrop>
__global__ void __launch_bounds__(kThreads, kPairs > 4 || kDrop ? 1 : 2)
    shrink_tma_kernel(const __grid_constant__ TmaArgs t) {
  using S = TmaShape<kPairs>;
  extern __shared__ __align__(1024) char memory[];
  const Args& args = t.args;
  const uint32_t cluster = t.sharers * args.splits, rank = blockIdx.x % cluster;
  const uint32_t sharer = rank % t.sharers, split = rank / t.sharers;
  const uint32_t tile = blockIdx.x / cluster;
  const uint32_t column0 = tile % args.chunks * S::kWidth;
  const uint32_t row0 = (tile / args.chunks * t.sharers + sharer) * kRows;
  const uint32_t columns = args.columns > column0 ? min(S::kWidth, args.columns - column0) : 0;
  const uint32_t pairs = (columns + 15) / 16;
  const uint32_t stage_bytes = S::stage_bytes(pairs);
  const uint32_t barriers = shared_address(memory), received = barriers + kMaxStages * 16;
  const uint32_t receive = barriers + kBarrierBytes, stages = receive + S::kReceiveBytes;
  const uint32_t first_of_share = split * t.sharers;
  const uint32_t warp = threadIdx.x / 32;
  if (threadIdx.x == kThreads - 1) {
    sm90::tensor_map_prefetch(&t.x);
    for (uint32_t p = 0; p < args.parts; ++p) sm90::tensor_map_prefetch(&t.right[p]);
  }
  auto* keys = reinterpret_cast<DropKey*>(memory + kKeysAt);
  Dropped dropped = {args, keys, 0};
  if constexpr (kDrop) {
    if (warp < args.parts) {
      keys[threadIdx.x] = drop_key(args.part[warp].mask, row0 + threadIdx.x % 32);
    }
    for (uint32_t pair = 0, part = 0; pair < pairs; ++pair) {
      while (part + 1 < args.parts && args.part[part + 1].first <= column0 + pair * 16) ++part;
      dropped.parts_of_pairs |= part << (4 * pair);
    }
  }
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < args.stages; ++s) {
      sm90::barrier_init(barriers + s * 16, 1);
      sm90::barrier_init(barriers + s * 16 + 8, kWarps * t.sharers);
    }
    sm90::barrier_init(received, 1);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  if (cluster > 1) sm90::cluster_sync_relaxed();

  const uint32_t steps = (args.k + S::kInner - 1) / S::kInner;
  const uint32_t first = split * steps / args.splits;
  const uint32_t count = (split + 1) * steps / args.splits - first;
  float sums[2][2 * kPairs][4] = {};
  wait_for_previous();
  allow_dependents();  // after the wait: a product may begin on what was written before this kernel
  if (warp == kWarps) {
    if (threadIdx.x % 32 == 0) {
      produce<kKn, kPairs>(
          t,
          barriers,
          stages,
          pairs,
          row0,
          column0,
          sharer,
          first_of_share,
          first * S::kInner,
          count);
    }
    __syncwarp();
  } else {
    const auto run = [&](auto some) {
      consume<T, kKn, kPairs, decltype(some)::value, kDrop>(
          dropped,
          t.right_wide,
          barriers,
          stages,
          args.stages,
          stage_bytes,
          t.sharers,
          first_of_share,
          first * S::kInner,
          count,
          pairs,
          sums);
    };
    if constexpr (kPairs > 4) {
      run(std::integral_constant<uint32_t, kPairs>());
    } else {
      switch (pairs) {
        case 1:
          run(std::integral_constant<uint32_t, 1>());
          break;
        case 2:
          run(std::integral_constant<uint32_t, 2>());
          break;
        case 3:
          run(std::integral_constant<uint32_t, 3>());
          break;
        default:
          run(std::integral_constant<uint32_t, 4>());
      }
    }
  }
  __syncthreads();  // all stages are read

  auto* partial = reinterpret_cast<float*>(memory + kBarrierBytes + S::kReceiveBytes);
  if (warp < kWarps) {
    const uint32_t lane = threadIdx.x % 32;
    float* mine = partial + (warp * kRows + lane / 4) * S::kPitch + lane % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
      for (uint32_t n = 0; n < 2 * kPairs; ++n) {
        float* at = mine + i * 16 * S::kPitch + n * 8;
        const float(&v)[4] = sums[i][n];
        *reinterpret_cast<float2*>(at) = make_float2(v[0], v[1]);
        *reinterpret_cast<float2*>(at + 8 * S::kPitch) = make_float2(v[2], v[3]);
      }
    }
  }
  __syncthreads();
  const uint32_t rows = row0 < args.m ? min(args.m - row0, kRows) : 0;
  // Quads of four columns of a row; columns are sixteens here.
  const uint32_t per_row = columns / 4, quads = rows * per_row;
  const auto place = [&](uint32_t i) { return i / per_row * S::kPitch + i % per_row * 4; };
  const auto emit = [&](uint32_t i, float4 sum) {
    put(args, row0 + i / per_row, column0 + i % per_row * 4, sum);
  };
  const auto sum_of_warps = [&](uint32_t where) {
    float4 sum = *reinterpret_cast<const float4*>(partial + where);
#pragma unroll
    for (uint32_t w = 1; w < kWarps; ++w) {
      add_to(sum, *reinterpret_cast<const float4*>(partial + w * kRows * S::kPitch + where));
    }
    return sum;
  };
  if (args.splits == 1) {
    for (uint32_t i = threadIdx.x; i < quads; i += kThreads) emit(i, sum_of_warps(place(i)));
  } else {
    // Each block of the cluster finishes a share of the quads, to which all send their sums.
    const uint32_t share = ceil_div(quads, args.splits);
    const uint32_t begin = min(quads, split * share), end = min(quads, begin + share);
    if (threadIdx.x == 0) sm90::barrier_expect(received, (end - begin) * args.splits * 16);
    for (uint32_t i = threadIdx.x; i < quads; i += kThreads) {
      const uint32_t owner = i / share, slot = split * share + (i - owner * share);
      send(receive + slot * 16, received, sharer + owner * t.sharers, sum_of_warps(place(i)));
    }
    sm90::barrier_wait(received, 0);
    const auto* sent = reinterpret_cast<const float4*>(memory + kBarrierBytes);
    for (uint32_t i = begin + threadIdx.x; i < end; i += kThreads) {
      float4 sum = sent[i - begin];
      for (uint32_t b = 1; b < args.splits; ++b) add_to(sum, sent[b * share + i - begin]);
      emit(i, sum);
    }
  }
  if (split == 0 && column0 == 0 && rows > 0) put_zeros(args, row0, kRows);
  if (t.sharers > 1) sm90::cluster_sync_relaxed();  // nobody goes while others signal here
}

struct Division {
  uint32_t sharers = 1, splits = 1;
};

/// As measured (us, H100, 48 columns; splits 1, 2, 4, 8): m = 4096, k = 4096: 15.7 16.0 24.3 32.8;
/// 1024: 8.6 6.0 10.0 11.0; 512: 8.5 6.0 5.3 9.1; 64: 8.5 5.9 4.7 4.5. Clusters of 4 and 8 with a
/// whole multiprocessor for a block find room for far less than all of them. Sharing `right` pays
/// where it comes in rows of 32 bytes (16 columns of right [k, rank]: 15.9, by twos 14.6).
Division divide(const Context& context, const Args& args, uint32_t inner) {
  Division d;
  const uint32_t tiles = ceil_div(args.m, kRows) * args.chunks, steps = ceil_div(args.k, inner);
  const auto room = static_cast<uint32_t>(context.multiprocessors);
  if (steps >= 2 && tiles * 2 <= room) d.splits = 2;
  if (steps >= 4 && tiles * 4 <= room * 6 / 10) d.splits = 4;
  if (steps >= 8 && tiles * 8 <= room * 6 / 10) d.splits = 8;
  if (d.splits == 1 && args.right_is_kn && args.m > kRows) d.sharers = 2;
  return d;
}

template <bool kKn, uint32_t kPairs>
void make_maps(TmaArgs& t) {
  using S = TmaShape<kPairs>;
  const Args& args = t.args;
  TensorMapRequest x{args.x, args.x_dtype, args.m, args.k, args.x_stride, kRows};
  x.box_blocks = S::kBlocks;
  t.x = make_tensor_map(x);
  const uint32_t blocks = S::kBlocks / t.sharers;
  for (uint32_t p = 0; p < args.parts; ++p) {
    TensorMapRequest right;
    right.data = args.part[p].right;
    right.dtype = args.x_dtype;
    right.rows = kKn ? args.k : args.part[p].rank;
    right.columns = kKn ? args.part[p].rank : args.k;
    right.stride = right.columns;
    right.box_rows = kKn ? blocks * 64 : 16;
    right.box_columns = kKn && !t.right_wide ? 16 : 64;
    right.box_blocks = kKn ? 0 : blocks;
    t.right[p] = make_tensor_map(right);
  }
}

template <typename T, bool kKn, uint32_t kPairs, bool kDrop>
void launch_tma(const Context& context, TmaArgs& t) {
  using S = TmaShape<kPairs>;
  Args& args = t.args;
  args.chunks = ceil_div(args.columns, S::kWidth);
  const Division division = divide(context, args, S::kInner);
  t.sharers = std::min(division.sharers, S::kBlocks);
  make_maps<kKn, kPairs>(t);
  args.splits = division.splits;
  const uint32_t tiles = ceil_div(ceil_div(args.m, kRows), t.sharers) * t.sharers;
  const uint32_t blocks = tiles * args.splits * args.chunks;
  const uint32_t pairs = std::min(kPairs, ceil_div(args.columns, 16));
  const uint32_t stage = S::stage_bytes(pairs);
  // Two blocks on a multiprocessor where there are many.
  const bool two = kPairs <= 4 && !kDrop && blocks > static_cast<uint32_t>(context.multiprocessors);
  const uint32_t limit = (two ? 113 : 227) * 1024 - kBarrierBytes - S::kReceiveBytes;
  args.stages = std::min(kMaxStages, limit / stage);
  launch(
      context,
      shrink_tma_kernel<T, kKn, kPairs, kDrop>,
      blocks,
      kThreads,
      kBarrierBytes + S::kReceiveBytes + std::max(args.stages * stage, S::kPartialBytes),
      t.sharers * args.splits,
      t,
      "lora_shrink");
}

}  // namespace

bool can_shrink_sm90(const Context& context, const Args& args) {
  return context.capability == 90 && args.x_vectors && args.right_vectors && args.parts > 0 &&
         args.k > 0 && args.k % 64 == 0;
}

void shrink_sm90(const Context& context, Args args) {
  TmaArgs t;
  args.columns = 0;
  for (uint32_t p = 0; p < args.parts; ++p) {
    Part& part = args.part[p];
    part.first = args.columns;
    args.columns += ceil_div(part.rank, 16) * 16;
  }
  t.right_wide = args.right_is_kn && std::all_of(args.part, args.part + args.parts, [](auto& p) {
                   return p.rank % 64 == 0;
                 });
  t.args = args;
  const bool bf = args.x_dtype == DType::bf16;
  const bool wide = args.columns > 64;
  const auto go = [&](auto zero, auto kn) {
    using T = decltype(zero);
    constexpr bool kKn = decltype(kn)::value;
    if (args.drop) return launch_tma<T, kKn, 4, true>(context, t);
    wide ? launch_tma<T, kKn, 8, false>(context, t) : launch_tma<T, kKn, 4, false>(context, t);
  };
  if (args.right_is_kn) {
    bf ? go(bf16{}, std::true_type()) : go(f16{}, std::true_type());
  } else {
    bf ? go(bf16{}, std::false_type()) : go(f16{}, std::false_type());
  }
}

}  // namespace metal_lora::cuda::shrink
