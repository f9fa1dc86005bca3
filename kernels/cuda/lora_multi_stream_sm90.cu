// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Up to 128 tokens with many adapters in one launch, the base at streaming speed. A block
// multiplies 128 rows of W, 64 a warpgroup, by all tokens over a share of k; the blocks of a tile
// of W leave each other their sums through L2, and each finishes some of the tokens. Eight warps
// more of each block list the tokens by adapter and make a share of all u = A_i·x (A by the copy
// engine, its ranks on the matrix unit's tall side), say so by a flag and expand the block's own
// tokens when all of u is there. B comes last, where A lay: while it does, the sums are exchanged.
// They are added in the order of k, then share and bias, in f32, and y is rounded and written once.
//
// Ladder (H100, K = N = 4096, bf16, 128 adapters of rank 16, of which 64 and 128 tokens use 47 and
// 77; W and bank rotating over more than L2; us; cuBLAS's base alone 14.4 and 15.0):
//   two launches: a shrink, then W with B and u beside it        22.9, 33.1   1.59 and 2.21
//   one launch on lora_skinny's structure, A by warps' reads     25.1, 32.6
//   A by the copy engine and the matrix unit, B where A lay,
//   two tiles of tokens expanded at once                         24.9, 29.6
//   fewer stages of W, so that A, B and u wait less              22.6, 28.2   1.56 and 1.88
//   128 rows and k in four, which reads x half as often; blocks
//   finish tokens, not rows; sums through L2                     23.0, 27.4
//   sums added up beside B, no flood of reads ahead of B         20.8, 25.7
//   fragments as they are, a sector a flag, naps between looks   20.4, 25.1   1.41 and 1.67
// Memory gives these bytes in 15.3 and 17.9 us at 3.0 TB/s: 75 and 71% of it. Where no two tokens
// share an adapter (51.4 and 69.2 MB, 16.6 and 22.3 us of plain reads): 21.3 and 27.9, 1.45 and
// 1.83. Other N, over cuBLAS's base of the same run, the form before and this: N = 1024 2.22 and
// 2.87, now 1.47 and 1.92 (12.1 and 16.2 us); N = 11008 1.61 and 1.88, now 1.27 and 1.83 (43.2 and
// 67.1 us).
//
// 128 tokens, median us from the end of the launch before: indices 0.8, listed 2.8, a block's share
// of u 11.8, all of u seen 14.8, W read 16.6 (14.6 to 18.9), u added up 17.9, expanded 22.0, end
// 23.6. A flag, or 8 KB of u, costs 2 to 3 us beside the stream: most likely it queues behind the
// 64 KB of W that each block has under way. Without adapters 18.6; in the third last form 20.0
// without reading W and x at all, so it is the chain of waits that counts, not bytes alone. The
// next 10%: W ends 4 us earlier in some blocks than in others, and the early ones' B competes with
// it.
//
// Tried, us at 128 tokens: B before W's end (26 to 27); all of B at once where W's stages were
// (26.1); more of W asked of L2 ahead of its stages (28.4); slices of half the columns and a flag
// for each warp's sums, together (28.4); with both, three warpgroups and k in six (26.3 at 64
// tokens). No change: W held till A has landed, blocks that begin at different steps of k. Tight
// polling of flags that share a line: u is seen 2 us later. Sums written back to memory, not
// discarded when they have been added: +0.4 us at 64 tokens, +1.1 at 128.
#include <algorithm>

#include "kernels/cuda/lora_multi_stream.cuh"
#include "kernels/cuda/tensor_map.h"

namespace metal_lora::cuda::multi {
namespace {

namespace skinny = sm90::skinny;

constexpr uint32_t kEarly = 4;  ///< steps of W that L2 is asked for ahead
constexpr uint32_t kGate = 4;   ///< the step of W that waits till A is asked for

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

/// A stage: W's rows of the first warpgroup, x, the other warpgroups' rows.
template <uint32_t kTokens, uint32_t kGroups>
constexpr uint32_t kStageBytes = (kGroups * kRows + kTokens) * 128;
template <uint32_t kTokens>
__device__ __forceinline__ constexpr uint32_t offset_of(uint32_t group) {
  return group == 0 ? 0 : (group * kRows + kTokens) * 128;
}

__device__ __forceinline__ uint32_t* arrivals_of(const StreamArgs& args) {
  return args.flags + (2 + blockIdx.x / args.parts) * kFlagStride;
}

/// One thread: every stage of W and x, and B.
template <uint32_t kTokens, uint32_t kGroups>
__device__ __forceinline__ void produce(
    const StreamArgs& args,
    const Expansion& e,
    const skinny::Ring& ring,
    const skinny::Steps& steps) {
  for (uint32_t s = 0; s < min(kEarly, steps.count); ++s) {
#pragma unroll
    for (uint32_t g = 0; g < kGroups; ++g) {
      sm90::tensor_prefetch(&args.w_map, (steps.first + s) * skinny::kStepK, e.row0 + g * kRows);
    }
  }
  sm90::dependency_wait();
  // B comes behind W where the blocks exchange their sums meanwhile.
  const uint32_t b_step = args.parts > 1 ? steps.count : steps.count / 2;
  uint32_t stage = 0, parity = 1;
  for (uint32_t s = 0; s < steps.count; ++s) {
    const uint32_t full = ring.barriers + 16 * stage, w = ring.stages + stage * ring.stage_bytes;
    const uint32_t k0 = (steps.first + s) * skinny::kStepK;
    // A read that stands behind the stream of W waits for microseconds: A's come first.
    if (s == kGate || s == b_step) sm90::barrier_wait(e.asked, 0);
    if (s == b_step) load_first_b(args, e);
    sm90::barrier_wait(full + 8, parity);
    sm90::barrier_expect(full, kStageBytes<kTokens, kGroups>);
#pragma unroll
    for (uint32_t g = 0; g < kGroups; ++g) {
      sm90::tensor_load(w + offset_of<kTokens>(g), &args.w_map, full, k0, e.row0 + g * kRows);
    }
    sm90::tensor_load(w + kRows * 128, &args.x_map, full, k0, 0);
    if (++stage == ring.count) stage = 0, parity ^= 1;
  }
  sm90::barrier_wait(e.asked, 0);
  if (b_step == steps.count) load_first_b(args, e);
  // Not before: what the next kernel asks L2 for ahead would be gone when it is wanted.
  sm90::dependents_launch();
}

/// The same thread, beside those that go on: the last to have seen a flag clears it.
__device__ __forceinline__ void clear_flags(const StreamArgs& args, const Expansion& e) {
  if (e.tokens->all.count > 0) {
    sm90::barrier_wait(e.seen, 0);
    // What the block added to the first flag is not to come after it is cleared.
    __threadfence();
    uint32_t* left = args.flags + kFlagStride;
    if (atomicAdd(left, 1) + 1 == gridDim.x) *args.flags = *left = 0;
  }
  if (args.parts > 1) {
    sm90::barrier_wait(e.met, 0);
    uint32_t* arrivals = arrivals_of(args);
    if (atomicAdd(arrivals, 1) + 1 == 2 * args.parts) *arrivals = 0;
  }
}

/// Where a lane's fragments of a group of tokens lie: two rows eight apart, two tokens.
struct Fragment {
  uint32_t row, token;
  __device__ __forceinline__ Fragment()
      : row(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4), token(threadIdx.x % 4 * 2) {}
  __device__ __forceinline__ float4 load(const float* sums, uint32_t pitch, uint32_t t) const {
    const float* from = sums + (t + token) * pitch + row;
    return make_float4(from[0], from[pitch], from[8], from[pitch + 8]);
  }
  __device__ __forceinline__ void store(
      float* sums, uint32_t pitch, uint32_t t, const float4& v) const {
    float* to = sums + (t + token) * pitch + row;
    to[0] = v.x, to[pitch] = v.y, to[8] = v.z, to[pitch + 8] = v.w;
  }
};

/// One of the multiplying warps: its sums of own tokens to shared memory, the others to the blocks
/// that finish them.
template <uint32_t kTokens, uint32_t kGroups>
__device__ __forceinline__ void leave_sums(
    const StreamArgs& args, const Range& own, float* own_sums, const float (&d)[kTokens / 2]) {
  constexpr uint32_t kLanes = 128 * kGroups;
  const Fragment fragment;
  float4* sums =
      args.sums + size_t{blockIdx.x} * up(args.m, kGroup) / kGroup * kLanes + threadIdx.x;
#pragma unroll
  for (uint32_t j = 0; j < kTokens / kGroup; ++j) {
    if (kGroup * j >= args.m) break;
    const float4 v = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
    if (kGroup * j - own.first < own.count) {
      fragment.store(own_sums, pitch_of(kGroups * kRows), kGroup * j - own.first, v);
    } else {
      __stcg(sums + j * kLanes, v);
    }
  }
}

/// One thread, when the block's sums are left: until those of the tile's other blocks are. Blocks
/// are placed in the order of their numbers, and only the last tile's can wait for one that is not:
/// the others end and make room.
__device__ __forceinline__ void meet_parts(const StreamArgs& args) {
  uint32_t* arrivals = arrivals_of(args);
  sm90::flag_add_release(arrivals, 1);
  while (sm90::flag_load_acquire(arrivals) < args.parts) __nanosleep(kNapNs);
}

/// One of the multiplying warps: own tokens' sums of all parts, in the order of k, to shared
/// memory.
template <uint32_t kGroups>
__device__ __forceinline__ void gather_sums(
    const StreamArgs& args, const Range& own, uint32_t part, float* own_sums) {
  constexpr uint32_t kLanes = 128 * kGroups, kPitch = pitch_of(kGroups * kRows);
  constexpr uint32_t kAtOnce = 4, kParts = 4;  ///< reads under way
  const Fragment fragment;
  const size_t stride = size_t{up(args.m, kGroup)} / kGroup * kLanes;
  const float4* sums =
      args.sums + (blockIdx.x - part) * stride + size_t{own.first / kGroup} * kLanes + threadIdx.x;
  for (uint32_t t0 = 0; t0 < own.count; t0 += kAtOnce * kGroup, sums += kAtOnce * kLanes) {
    float4 sum[kAtOnce] = {};
    for (uint32_t p0 = 0; p0 < args.parts; p0 += kParts) {
      float4 v[kAtOnce][kParts];
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        const uint32_t t = t0 + i * kGroup;
#pragma unroll
        for (uint32_t q = 0; q < kParts; ++q) {
          if (t >= own.count || p0 + q >= args.parts) break;
          v[i][q] = p0 + q == part ? fragment.load(own_sums, kPitch, t)
                                   : __ldcg(sums + (p0 + q) * stride + i * kLanes);
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (uint32_t q = 0; q < kParts; ++q) {
          if (p0 + q >= args.parts) break;
          add_to(sum[i], v[i][q]);
        }
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t t = t0 + i * kGroup;
      if (t < own.count) fragment.store(own_sums, kPitch, t, sum[i]);
    }
  }
  // What has been added is not worth its way to memory: four lines a warp, group and part.
  __syncwarp();
  sums = args.sums + (blockIdx.x - part) * stride + size_t{own.first / kGroup} * kLanes +
         threadIdx.x / 32 * 32 + threadIdx.x % 4 * 8;
  for (uint32_t t = 0; t < own.count; t += kGroup, sums += kLanes) {
    for (uint32_t p = threadIdx.x % 32 / 4; p < args.parts; p += 8) {
      if (p == part) continue;
      asm volatile("discard.global.L2 [%0], 128;" ::"l"(sums + p * stride) : "memory");
    }
  }
}

/// The block's own tokens; thread: of all but the producing warp's.
template <typename T, uint32_t kGroups>
__device__ __forceinline__ void finish(
    const StreamArgs& args, const Expansion& e, const float* own_sums, uint32_t thread) {
  constexpr uint32_t kQuads = kGroups * kRows / 4, kPitch = pitch_of(kGroups * kRows);
  for (uint32_t i = thread; i < e.own.count * kQuads; i += threads_of(kGroups) - 32) {
    const uint32_t t = i / kQuads, row = i % kQuads * 4;
    if (e.row0 + row >= args.n) continue;
    const float4 sum = *reinterpret_cast<const float4*>(own_sums + t * kPitch + row);
    const float4 share = reinterpret_cast<const float4*>(e.share)[i];
    put<T>(args, e.own.first + t, e.row0 + row, sum, share);
  }
}

template <typename T, uint32_t kTokens, uint32_t kGroups>
__global__ void __launch_bounds__(threads_of(kGroups), 1)
    stream_kernel(const __grid_constant__ StreamArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  constexpr uint32_t kWarps = 4 * kGroups;  ///< that multiply
  const uint32_t shared = (sm90::shared_address(raw) + 1023) & ~1023u;
  uint8_t* memory = raw + (shared - sm90::shared_address(raw));
  const uint32_t part = blockIdx.x % args.parts;
  const Layout layout(args, kStageBytes<kTokens, kGroups>);
  const uint32_t row0 = blockIdx.x / args.parts * (kGroups * kRows);
  const uint32_t asked = shared + layout.asked;
  const Expansion e = {
      row0,
      min(kGroups * kRows, args.n - row0),
      Range(args.m, part, args.parts),
      layout.slot_bytes,
      memory,
      reinterpret_cast<float*>(memory + layout.share),
      reinterpret_cast<float*>(memory + layout.share),
      reinterpret_cast<float*>(memory + layout.u),
      reinterpret_cast<Tokens*>(memory + layout.tokens),
      shared + layout.slot_barriers,
      shared + layout.buffer_barriers,
      asked,
      asked + 8,
      asked + 16,
      asked + 24};
  const skinny::Ring ring = {
      shared + layout.barriers, shared + layout.ring, args.stages, kStageBytes<kTokens, kGroups>};
  const skinny::Steps steps(args.k, part, args.parts);
  auto* own_sums = reinterpret_cast<float*>(memory + layout.sums);
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp == 0) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < args.stages) {
      sm90::barrier_init(ring.barriers + 16 * lane, 1);
      sm90::barrier_init(ring.barriers + 16 * lane + 8, kWarps);
    }
    for (uint32_t i = lane; i < args.slots; i += 32) sm90::barrier_init(e.slot_barriers + 8 * i, 1);
    if (lane < args.buffers) sm90::barrier_init(e.buffer_barriers + 8 * lane, 1);
    if (lane == 0) {
      sm90::barrier_init(e.asked, 1);
      sm90::barrier_init(e.made, 1);
      sm90::barrier_init(e.seen, 1);
      sm90::barrier_init(e.met, 1);
    }
    sm90::barrier_init_fence();
  } else if (warp == kWarps) {
    if (threadIdx.x % 32 == 0) sm90::tensor_map_prefetch(&args.w_map);
    if (threadIdx.x % 32 == 1) sm90::tensor_map_prefetch(&args.x_map);
    if (threadIdx.x % 32 == 2) sm90::tensor_map_prefetch(&args.a_map);
  }
  __syncthreads();
  if (warp == kWarps) {
    if (threadIdx.x % 32 == 0) {
      produce<kTokens, kGroups>(args, e, ring, steps);
      clear_flags(args, e);
    }
    return;
  }
  uint32_t thread = threadIdx.x;
  if (warp < kWarps) {
    float d[kTokens / 2];
    skinny::consume<T, kTokens>(ring, steps, offset_of<kTokens>(warp / 4), d);
    sm90::named_barrier(2, 32 * kWarps);  // all stages are read
    leave_sums<kTokens, kGroups>(args, e.own, own_sums, d);
    if (args.parts > 1) {
      sm90::named_barrier(2, 32 * kWarps);
      if (threadIdx.x == 0) {
        meet_parts(args);
        sm90::barrier_arrive(e.met);
      }
      sm90::named_barrier(2, 32 * kWarps);
      gather_sums<kGroups>(args, e.own, part, own_sums);
    }
  } else {
    thread -= 32;
    expand<T>(args, e, thread - 32 * kWarps);
  }
  sm90::named_barrier(3, threads_of(kGroups) - 32);
  finish<T, kGroups>(args, e, own_sums, thread);
#endif
}

// ---- host ----

constexpr uint32_t kSharedLimit = 227 * 1024;
constexpr uint32_t kMaxParts = 16;
constexpr uint32_t kFlags = 1024;  ///< the context's last words: for 126 tiles

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

/// Room for the rings; all bytes.
template <uint32_t kTokens, uint32_t kGroups>
uint32_t share_out(StreamArgs& args) {
  const uint32_t unit_bytes = kBoxes * args.box_rows * 128;
  args.room_bytes = 64 * 1024;
  args.buffers = std::min(kMaxBuffers, args.room_bytes / unit_bytes);
  args.stages = 0;
  constexpr uint32_t kBytes = kStageBytes<kTokens, kGroups>;
  const uint32_t fit = (kSharedLimit - Layout(args, kBytes).bytes) / kBytes;
  // As many as keep the memory busy: each more makes A, B and u wait longer.
  args.stages = std::min(fit, 4u);
  const Layout layout(args, kBytes);
  args.slots = std::min({kMaxSlots, args.m, args.room_bytes / layout.slot_bytes});
  return layout.bytes;
}

template <typename T, uint32_t kTokens, uint32_t kGroups>
void launch(const Context& context, StreamArgs& args, uint32_t blocks) {
  const auto kernel = stream_kernel<T, kTokens, kGroups>;
  const uint32_t bytes = share_out<kTokens, kGroups>(args);
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads_of(kGroups));
  config.dynamicSmemBytes = bytes;
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "lora_multi_stream");
  check(cudaLaunchKernelEx(&config, kernel, args), "lora_multi_stream");
}

template <typename T>
void launch_tokens(const Context& context, StreamArgs& args, uint32_t blocks) {
  switch (skinny::tokens_of(args.m)) {
    case 32:
      return launch<T, 32, 2>(context, args, blocks);
    case 64:
      return launch<T, 64, 2>(context, args, blocks);
    default:
      return args.rows == kRows ? launch<T, 128, 1>(context, args, blocks)
                                : launch<T, 128, 2>(context, args, blocks);
  }
}

}  // namespace

bool can_stream(const Context& context, const Stream& call) {
  return context.capability == 90 && call.dtype != DType::f32 && call.m > 0 &&
         call.m <= kStreamTokens && call.n > 0 && call.k > 0 && call.k % 8 == 0 &&
         is_aligned(call.x) && is_aligned(call.w) && is_aligned(call.y) &&
         is_aligned(call.a.right) && is_aligned(call.b.right) && context.counters &&
         call.a.dtype == call.dtype && call.b.dtype == call.dtype &&
         call.b.max_rank <= kMaxStreamRank && call.b.max_rank % 8 == 0;
}

void stream(const Context& context, const Stream& call) {
  StreamArgs args;
  const auto multiprocessors = static_cast<uint32_t>(context.multiprocessors);
  const uint32_t most = std::min(kMaxParts, ceil_div(call.k, skinny::kStepK));
  const auto parts_of = [&](uint32_t rows) {
    return std::clamp(multiprocessors / ceil_div(call.n, rows), 1u, most);
  };
  // One warpgroup where the matrix unit of those that two would use is the limit.
  args.rows = call.m > 64 && parts_of(2 * kRows) == 1 ? kRows : 2 * kRows;
  args.parts = parts_of(args.rows);
  const uint32_t tiles = ceil_div(call.n, args.rows);
  const uint32_t blocks = tiles * args.parts;
  args.makers = std::min(blocks, static_cast<uint32_t>(context.multiprocessors));
  args.patience_ns = call.patience_ns;
  args.w_map = make_tensor_map({call.w, call.dtype, call.n, call.k, call.k, kRows});
  args.x_map =
      make_tensor_map({call.x, call.dtype, call.m, call.k, call.k, skinny::tokens_of(call.m)});
  args.m = call.m;
  args.n = call.n;
  args.k = call.k;
  args.adapters = call.adapters;
  args.index = call.index;
  args.b = call.b;
  args.bias = call.bias;
  args.y = call.y;
  args.x = call.x;
  args.box_rows = std::min(kUnitRanks, call.a.max_rank);
  args.a_map = make_tensor_map(
      {call.a.right, call.dtype, call.adapters * call.a.max_rank, call.k, call.k, args.box_rows});
  args.slices = ceil_div(call.k, kSlice);
  args.u = static_cast<float*>(
      context.scratch->take(size_t{args.slices} * call.m * call.a.max_rank * sizeof(float)));
  args.flags = context.counters + METAL_LORA_CUDA_COUNTERS - kFlags;
  if (args.parts > 1) {
    args.sums = static_cast<float4*>(
        context.scratch->take(size_t{blocks} * up(call.m, kGroup) * args.rows * sizeof(float)));
  }
  call.dtype == DType::bf16 ? launch_tokens<bf16>(context, args, blocks)
                            : launch_tokens<f16>(context, args, blocks);
}

}  // namespace metal_lora::cuda::multi
