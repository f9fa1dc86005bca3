// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Up to 128 tokens with many adapters, the base at streaming speed. A tile of W's rows is shared by
// blocks that split K; the rows are the M side of wgmma and the tokens its N side, so every byte of
// W is read once and x a few times from L2. Meanwhile seven warps of each block fetch B's rows of
// each adapter in use, once, and u when the shrink is done, which runs in front of this kernel and
// beside it (programmatic dependent launch). Then all warps that have nothing else to do work out
// the adapters' share. At the end the blocks' sums meet in a fixed order, share and bias are added
// in f32, and y is rounded and written once.
//
// Ladder (H100, K = N = 4096, bf16, 128 adapters of rank 16, one a token, W and bank rotating over
// more than L2; us for 64 and 128 tokens; W and the adapters in use take 15.2 and 18.0 us of plain
// reads at 3.1 TB/s):
//   clusters of 4 over 128 rows, u and B read as needed       37.0, 53.0
//   pairs of blocks (only 30 clusters of 4 fit, not 32)       33.6, 43.0
//   no cooperative launch, so that launches overlap           27.8, 37.9
//   expanding warps that do not wait for each other           25.7, 35.6
//   64-row tiles up to 64 tokens, A asked for before W        24.2 (128 tokens: 36.6)
//   multiplications without a test of the rank each           24.3, 35.8   1.67 and 2.36 of cuBLAS
//   B once an adapter, all warps expand, a quicker shrink;
//   up to 64 tokens W's head in L2 ahead                      23.1, 33.0   1.60 and 2.20 of cuBLAS
// The last two in the same run, cuBLAS's base alone 14.4 and 15.0. 66 and 55% of the limit. With
// 4 warps for B and u: 23.6, 35.2; 128 tokens of 8 adapters 30.0 (33.7 before).
// Tried: the shrink inside this kernel behind a barrier of all blocks (42.8, 51.8: six dependent
// reads, each microseconds long while W streams); letting this kernel start only when the shrink is
// done (30.5, 38.0); a shrink of 128 threads a block whose reads wait for one another (29.7, 36.5);
// fewer steps of k for the pairs that pass their sums on (no change).
// The next 10%: without any adapter it is 17.4 at 64 tokens and, with B and u by 4 warps, 25.2 at
// 128, so a launch of its own for the shrink and, at 128, the exchange through L2 cost most.
// 64-row tiles of clusters of two at 128 tokens took 33.8 to the pairs' 35.0 (4 warps for B and
// u); A by the matrix unit's spare time in this launch, as lora_skinny_sm90.cu does for one
// adapter, would save the shrink's.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/lora_multi_stream.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda::multi {
namespace {

/// The steps of 64 along k of one block of the cluster.
struct Steps {
  uint32_t first, end;
  __device__ __forceinline__ Steps(const StreamArgs& args, uint32_t block) {
    const uint32_t steps = (args.k + kStepK - 1) / kStepK;
    first = steps * block / args.split;
    end = steps * (block + 1) / args.split;
  }
};

/// The first of the rows of a tile that a block finishes. Pairs share their half of the rows out.
template <typename Shape>
__device__ __forceinline__ uint32_t first_row(const StreamArgs& args, uint32_t block) {
  const uint32_t rows = Shape::kRows / args.split;
  return args.flags ? block % 2 * (Shape::kRows / 2) + block / 2 * rows : block * rows;
}

template <typename Shape>
__device__ __forceinline__ void produce(
    const StreamArgs& args,
    Steps steps,
    uint32_t row0,
    uint32_t shared,
    uint32_t full,
    uint32_t empty) {
  constexpr uint32_t kWBytes = Shape::kWBytes, kBytes = Shape::kStageBytes;
  Ring ring;
  // x was ready before the shrink let this kernel start.
  for (uint32_t step = steps.first; step < steps.end; ++step) {
    sm90::barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
    const uint32_t to = shared + ring.stage * kBytes, barrier = full + 8 * ring.stage;
    sm90::barrier_expect(barrier, kBytes);
    sm90::tensor_load(to, &args.w_map, barrier, step * kStepK, row0);
    sm90::tensor_load(to + kWBytes, &args.x_map, barrier, step * kStepK, 0);
    ring.advance(args.stages);
  }
  // Not before: what the next shrink asks L2 for ahead would be gone when it is wanted.
  sm90::dependents_launch();
}

/// 64 rows of W by all tokens of one warpgroup, left as f32 [set][token][row] where the ring was.
template <typename T, typename Shape>
__device__ __forceinline__ void consume(
    const StreamArgs& args,
    Steps steps,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    float* sums) {
  constexpr uint32_t kTokens = Shape::kTokens, kPitch = Shape::kPitch;
  const uint32_t warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  const uint32_t set = Shape::kSets == 2 ? warpgroup : 0, half = Shape::kSets == 2 ? 0 : warpgroup;
  Ring ring;
  float d[kTokens / 2];
  int accumulate = 0;
  uint32_t reading = 0;
  for (uint32_t step = steps.first; step < steps.end; ++step) {
    if (Shape::kSets == 1 || step % 2 == set) {
      sm90::barrier_wait(full + 8 * ring.stage, ring.parity);
      const uint32_t stage = shared + ring.stage * Shape::kStageBytes;
      const uint64_t left = sm90::wgmma_descriptor(stage + half * 64 * 128, 16);
      const uint64_t right = sm90::wgmma_descriptor(stage + Shape::kWBytes, 16);
      sm90::wgmma_fence();
      sm90::wgmma<T, 0>(d, left, right, accumulate);
      sm90::wgmma<T, 0>(d, left + 2, right + 2, 1);
      sm90::wgmma<T, 0>(d, left + 4, right + 4, 1);
      sm90::wgmma<T, 0>(d, left + 6, right + 6, 1);
      sm90::wgmma_commit();
      sm90::wgmma_wait<1>();
      if (accumulate != 0 && lane == 0) sm90::barrier_arrive(empty + 8 * reading);
      reading = ring.stage;
      accumulate = 1;
    }
    ring.advance(args.stages);
  }
  sm90::wgmma_wait<0>();
  sm90::wgmma_sums_fence(d);
  if (accumulate == 0) {
#pragma unroll
    for (uint32_t i = 0; i < kTokens / 2; ++i) d[i] = 0.0f;
  }
  sm90::named_barrier(1, 32 * kConsumerWarps);  // nobody reads the ring any more
  float* to = sums + (set * kTokens + lane % 4 * 2) * kPitch + half * 64 +
              threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (uint32_t j = 0; j < kTokens / 8; ++j) {
    float* column = to + 8 * j * kPitch;
    column[0] = d[4 * j];
    column[kPitch] = d[4 * j + 1];
    column[8] = d[4 * j + 2];
    column[kPitch + 8] = d[4 * j + 3];
  }
}

[[maybe_unused]] __device__ __forceinline__ void add_to(float4& sum, const float4& v) {
  sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
}

/// Four outputs of a token: sum + bias + share, rounded once.
template <typename T>
__device__ __forceinline__ void put(
    const StreamArgs& args, uint32_t t, uint32_t n, const float4& sum, const float4& share) {
  float bias[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    if (args.bias && n + i < args.n) bias[i] = __ldg(args.bias + n + i);
  }
  struct alignas(8) Four {
    T v[4];
  } out;
  out.v[0] = from_float<T>(sum.x + bias[0] + share.x);
  out.v[1] = from_float<T>(sum.y + bias[1] + share.y);
  out.v[2] = from_float<T>(sum.z + bias[2] + share.z);
  out.v[3] = from_float<T>(sum.w + bias[3] + share.w);
  T* y = static_cast<T*>(args.y) + size_t{t} * args.n + n;
  if (args.n % 4 == 0) {
    *reinterpret_cast<Four*>(y) = out;
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (n + i < args.n) y[i] = out.v[i];
    }
  }
}

/// A cluster shares a tile: the sums of its blocks in their order, of this block's rows.
template <typename T, typename Shape>
__device__ __forceinline__ void finish_cluster(
    const StreamArgs& args, uint32_t sums, const float* share, uint32_t block, uint32_t tile0) {
  const uint32_t rows = Shape::kRows / args.split, quads = rows / 4;
  const uint32_t row = threadIdx.x % quads * 4, n = tile0 + block * rows + row;
  if (n >= args.n) return;
#pragma unroll 2
  for (uint32_t t = threadIdx.x / quads; t < args.m; t += kStreamThreads / quads) {
    const uint32_t address = sums + (t * Shape::kPitch + block * rows + row) * 4;
    float4 sum = {};
#pragma unroll 4
    for (uint32_t other = 0; other < args.split; ++other) {
#pragma unroll
      for (uint32_t set = 0; set < Shape::kSets; ++set) {
        add_to(sum, sm90::load_remote(address + set * Shape::kTokens * Shape::kPitch * 4, other));
      }
    }
    put<T>(args, t, n, sum, *reinterpret_cast<const float4*>(share + t * rows + row));
  }
}

/// Pairs of blocks share a tile. A pair adds its sums through distributed shared memory, each block
/// half of the rows; all pairs but the last pass theirs on through L2, with the share of the rows
/// whose adapters they expanded, and the last adds them in order. It waits only for blocks that
/// stand before it in the grid, so it does not matter whether all are resident. (Larger clusters
/// would need no exchange, but too few fit: an H100 has places for 30 of four blocks, not 32.)
template <typename T, typename Shape>
__device__ __forceinline__ void finish_pairs(
    const StreamArgs& args, uint32_t sums, const float* share, uint32_t block, uint32_t tile0) {
  constexpr uint32_t kRows = Shape::kRows, kPitch = Shape::kPitch, kHalf = kRows / 2,
                     kQuads = kHalf / 4;
  const uint32_t pairs = args.split / 2, pair = block / 2, half = block % 2;
  const uint32_t rows = kRows / args.split, row = threadIdx.x % kQuads * 4;
  const size_t size = size_t{args.m} * kHalf;
  const uint32_t place = (blockIdx.x / args.split * 2 + half) * pairs;
  float* exchange = args.exchange + place * size;
  uint32_t* flags = args.flags + place;
  const auto of_pair = [&](uint32_t t) {
    const uint32_t address = sums + (t * kPitch + half * kHalf + row) * 4;
    float4 sum = sm90::load_remote(address, 0);
    add_to(sum, sm90::load_remote(address, 1));
    if (row / rows == pair) {
      add_to(sum, *reinterpret_cast<const float4*>(share + t * rows + row % rows));
    }
    return sum;
  };
  constexpr uint32_t kStep = kStreamThreads / kQuads;
  if (pair + 1 < pairs) {
#pragma unroll 2
    for (uint32_t t = threadIdx.x / kQuads; t < args.m; t += kStep) {
      __stcg(reinterpret_cast<float4*>(exchange + pair * size + t * kHalf + row), of_pair(t));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flags + pair) : "memory");
    }
    return;
  }
  constexpr uint32_t kTurns = (Shape::kTokens + kStep - 1) / kStep;
  float4 own[kTurns];
#pragma unroll
  for (uint32_t i = 0; i < kTurns; ++i) {
    const uint32_t t = threadIdx.x / kQuads + i * kStep;
    if (t < args.m) own[i] = of_pair(t);
  }
  if (threadIdx.x < pair) {
    uint32_t there;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(there)
                   : "l"(flags + threadIdx.x)
                   : "memory");
    } while (there == 0);
    flags[threadIdx.x] = 0;
  }
  __syncthreads();
  const uint32_t n = tile0 + half * kHalf + row;
#pragma unroll
  for (uint32_t i = 0; i < kTurns; ++i) {
    const uint32_t t = threadIdx.x / kQuads + i * kStep;
    if (t >= args.m || n >= args.n) continue;
    float4 sum = {};
#pragma unroll 2
    for (uint32_t p = 0; p < pair; ++p) {
      add_to(sum, __ldcg(reinterpret_cast<const float4*>(exchange + p * size + t * kHalf + row)));
    }
    add_to(sum, own[i]);
    put<T>(args, t, n, sum, float4{});
  }
}

template <typename Shape>
__device__ __forceinline__ Expansion expansion_of(
    const StreamArgs& args,
    const Layout<Shape>& layout,
    uint8_t* memory,
    uint32_t tile0,
    uint32_t block,
    uint32_t ready) {
  Expansion e;
  e.rows = Shape::kRows / args.split;
  e.row0 = tile0 + first_row<Shape>(args, block);
  e.slots = args.b_bytes / (e.rows * args.b.max_rank * (args.b.dtype == DType::f32 ? 4 : 2));
  e.b = memory + layout.b;
  e.u = reinterpret_cast<float*>(memory + layout.u);
  e.share = reinterpret_cast<float*>(memory + layout.share);
  e.tokens = reinterpret_cast<Tokens*>(memory + layout.tokens);
  e.ready = ready;
  return e;
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kStreamThreads, 1)
    stream_kernel(const __grid_constant__ StreamArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t shared = (sm90::shared_address(raw) + 1023) & ~1023u;
  uint8_t* memory = raw + (shared - sm90::shared_address(raw));
  const Layout<Shape> layout(args.stages, args.split, args.b.max_rank, args.b_bytes);
  const uint32_t full = shared + layout.barriers, empty = full + 8 * kMaxStages;
  const uint32_t ready = empty + 8 * kMaxStages;
  auto* share = reinterpret_cast<float*>(memory + layout.share);
  const uint32_t block = blockIdx.x % args.split, tile0 = blockIdx.x / args.split * Shape::kRows;
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < args.stages; ++i) {
      sm90::barrier_init(full + 8 * i, 1);
      sm90::barrier_init(empty + 8 * i, kConsumerWarps / Shape::kSets);
    }
    sm90::barrier_init(ready, kHelperWarps);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  const Steps steps(args, block);
  const Expansion e = expansion_of(args, layout, memory, tile0, block, ready);
  if (warp == kConsumerWarps) {
    if (threadIdx.x % 32 == 0) produce<Shape>(args, steps, tile0, shared, full, empty);
    __syncwarp();
  } else if (warp < kConsumerWarps) {
    consume<T, Shape>(args, steps, shared, full, empty, reinterpret_cast<float*>(memory));
  }
  if (warp != kConsumerWarps) {
    with_bank_type(args.b.dtype, [&](auto type) {
      using B = decltype(type);
      if (warp > kConsumerWarps) prepare<B>(args, e, threadIdx.x - 32 * (kConsumerWarps + 1));
      sm90::barrier_wait(ready, 0);
      expand<B>(args, e);
    });
  }
  sm90::cluster_sync();
  if (args.flags) {
    finish_pairs<T, Shape>(args, shared, share, block, tile0);
  } else {
    finish_cluster<T, Shape>(args, shared, share, block, tile0);
  }
  sm90::cluster_sync_relaxed();  // nobody leaves while others read its sums
#endif
}

// ---- host ----

/// Steps of each block's W that the shrink asks L2 for.
constexpr uint32_t kAheadSteps = 4;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

/// Blocks of a cluster where not all are resident: the least waves · (steps of a block + what a
/// tile costs besides).
uint32_t choose_split(const Context& context, uint32_t n, uint32_t k) {
  constexpr uint32_t kRows = 128;
  uint32_t best = 2;
  float best_cost = 0.0f;
  for (uint32_t split : {2u, 4u, 8u}) {
    const uint32_t slots = std::max(1u, context.multiprocessors / split);
    const float waves = static_cast<float>(ceil_div(ceil_div(n, kRows), slots));
    const float steps = static_cast<float>(ceil_div(ceil_div(k, kStepK), split));
    const float cost = waves * (steps + 8.0f + split);
    if (split == 2 || cost < best_cost) best = split, best_cost = cost;
  }
  return best;
}
/// Blocks to a tile, in pairs: as many as there are places for; 0: not even two.
uint32_t choose_paired_split(const Context& context, uint32_t n, uint32_t k) {
  constexpr uint32_t kRows = 128;
  const uint32_t slots = static_cast<uint32_t>(context.multiprocessors);
  uint32_t best = 0;
  for (uint32_t split : {2u, 4u, 8u}) {
    const bool worth = split == 2 || ceil_div(k, kStepK) >= 2 * split;
    if (worth && ceil_div(n, kRows) * split <= slots) best = split;
  }
  return best;
}

bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

/// Tiles of 64 rows, each shared by a cluster of two, where all are resident.
bool has_narrow_tiles(const Context& context, uint32_t m, uint32_t n) {
  return m <= 64 && ceil_div(n, 64) * 2 <= static_cast<uint32_t>(context.multiprocessors);
}

/// Behind the shrink, as its programmatic dependent.
template <typename Kernel>
void launch_kernel(const Context& context, Kernel kernel, uint32_t bytes, const StreamArgs& args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ceil_div(args.n, args.rows) * args.split);
  config.blockDim = dim3(kStreamThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {args.cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "lora_multi_stream");
  check(cudaLaunchKernelEx(&config, kernel, args), "lora_multi_stream");
}

/// Room for the ring and for the rows of B of as many tokens as fit; the bytes of all.
template <typename Shape>
uint32_t share_out(StreamArgs& args) {
  args.stages = Shape::kStages;
  const auto bytes = [&] {
    return Layout<Shape>(args.stages, args.split, args.b.max_rank, args.b_bytes).bytes;
  };
  args.b_bytes = 0;
  const uint32_t slot =
      Shape::kRows / args.split * args.b.max_rank * (args.b.dtype == DType::f32 ? 4 : 2);
  args.b_bytes = slot * std::min({(kSharedLimit - bytes()) / slot, args.m, args.adapters});
  return bytes();
}

template <typename T, uint32_t kTokens, uint32_t kRows>
void launch(const Context& context, StreamArgs& args) {
  using Shape = TileShape<kTokens, kRows>;
  args.rows = kRows;
  const DType dtype = std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
  args.w_map = make_tensor_map({args.w, dtype, args.n, args.k, args.k, kRows});
  launch_kernel(context, stream_kernel<T, Shape>, share_out<Shape>(args), args);
}

template <typename T>
void launch_tile(const Context& context, StreamArgs& args) {
  if (has_narrow_tiles(context, args.m, args.n)) {
    args.split = args.cluster = 2;
    return launch<T, 64, 64>(context, args);
  }
  const uint32_t paired = context.counters ? choose_paired_split(context, args.n, args.k) : 0;
  args.split = paired > 0 ? paired : choose_split(context, args.n, args.k);
  args.cluster = paired > 0 ? 2 : args.split;
  if (paired > 0) args.flags = context.counters + METAL_LORA_CUDA_COUNTERS - kFlags;
  if (paired > 2) {
    args.exchange = static_cast<float*>(context.scratch->take(
        size_t{ceil_div(args.n, 128)} * (paired / 2) * args.m * 128 * sizeof(float)));
  }
  args.m <= 64 ? launch<T, 64, 128>(context, args) : launch<T, 128, 128>(context, args);
}

}  // namespace

bool can_stream(const Context& context, const Stream& call) {
  const size_t b_row_bytes = size_t{call.b.max_rank} * (call.b.dtype == DType::f32 ? 4 : 2);
  return context.capability == 90 && call.dtype != DType::f32 && call.m > 0 &&
         call.m <= kStreamTokens && call.n > 0 && call.k > 0 && call.k % 8 == 0 &&
         aligned(call.x) && aligned(call.w) && aligned(call.y) && aligned(call.a.right) &&
         aligned(call.b.right) && call.b.max_rank <= kMaxStreamRank && b_row_bytes % 16 == 0;
}

void stream(const Context& context, const Stream& call) {
  StreamArgs args;
  args.x_map =
      make_tensor_map({call.x, call.dtype, call.m, call.k, call.k, call.m <= 64 ? 64u : 128u});
  args.w = call.w;
  args.m = call.m;
  args.n = call.n;
  args.k = call.k;
  args.adapters = call.adapters;
  args.index = call.index;
  args.b = call.b;
  args.bias = call.bias;
  args.y = call.y;
  Ahead ahead;
  if (has_narrow_tiles(context, call.m, call.n)) {
    ahead = {call.w, call.n, call.k * 2, 2, kAheadSteps * kStepK * 2};
  }
  args.u = shrink(context, {call.index, call.m, call.adapters}, call.a, call.dtype, call.x, ahead);
  call.dtype == DType::bf16 ? launch_tile<bf16>(context, args) : launch_tile<f16>(context, args);
}

}  // namespace metal_lora::cuda::multi
