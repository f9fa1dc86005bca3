// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Up to 128 tokens with many adapters in one launch, the base at streaming speed. The base as
// lora_skinny_sm90.cu has it: a block multiplies 64 rows of W by all tokens, a cluster shares k.
// Eight warps more of each block list the tokens by adapter and make a share of all u = A_i·x (A by
// the copy engine, its ranks on the matrix unit's tall side), say so by a flag, ask for the rows of
// B that the block wants where A lay, and expand when all of u is there. At the end the cluster's
// sums meet in the order of k, share and bias are added in f32, and y is rounded and written once.
//
// Ladder (H100, K = N = 4096, bf16, 128 adapters of rank 16, one a token, W and bank rotating over
// more than L2; us for 64 and 128 tokens; cuBLAS's base alone 14.4 and 15.0):
//   two launches: a shrink, then W with B and u beside it        22.9, 33.1   1.59 and 2.21
//   one launch on lora_skinny's structure, A by warps' reads     25.1, 32.6
//   A by the copy engine and the matrix unit, B where A lay,
//   two tiles of tokens expanded at once                         24.9, 29.6
//   fewer stages of W, so that A, B and u wait less              22.2, 27.6   1.54 and 1.83
// W and the adapters in use take 16.2 and 21.7 us of plain reads at 3.1 TB/s: 73 and 79% of it. The
// same run: 16 tokens 19.7 (two launches 20.9); 8 adapters for 128 tokens 22.4; N = 14336, 64 tokens
// 58.5 (60.4); but N = 1024, 64 tokens 18.1 (15.3): u takes 14 us there, W but 8.
// Tried: 8 stages of W (A waits: u is there at 20 us, not 17); 32 KiB of room for A and B (28.2).
// The next 10%: of 27 us at 128 tokens 2.3 pass from the end of the launch before until the indices
// may be read, 2 until they are listed, 10 until A is read beside W, 3 until u is added up
// everywhere and 4 until it is expanded: u in one piece from whoever made all of its k would save
// two reads' latency.
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

/// This block's rows of the tile: the cluster's sums in the order of k.
template <typename T>
__device__ __forceinline__ void finish(
    const StreamArgs& args, const Expansion& e, uint32_t part, uint32_t sums) {
  constexpr uint32_t kAtOnce = 4;  // of reads of other blocks' shared memory
  const uint32_t quads = e.rows / 4, step = kStreamThreads / quads;
  const uint32_t row = threadIdx.x % quads * 4, n = e.row0 + row;
  if (n >= args.n) return;
  const uint32_t from = sums + (part * e.rows + row) * 4;
  for (uint32_t t0 = threadIdx.x / quads; t0 < args.m; t0 += kAtOnce * step) {
    float4 sum[kAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t t = t0 + i * step;
      if (t < args.m) sum[i] = skinny::sum_parts(args.parts, part, from + t * kPitch * 4);
    }
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      const uint32_t t = t0 + i * step;
      if (t >= args.m) break;
      put<T>(args, t, n, sum[i], *reinterpret_cast<const float4*>(e.share + t * e.rows + row));
    }
  }
}

template <typename T, uint32_t kTokens>
__global__ void __launch_bounds__(kStreamThreads, 1)
    stream_kernel(const __grid_constant__ StreamArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  constexpr uint32_t kStageBytes = (kRows + kTokens) * 128;
  const uint32_t shared = (sm90::shared_address(raw) + 1023) & ~1023u;
  uint8_t* memory = raw + (shared - sm90::shared_address(raw));
  const uint32_t rows = kRows / args.parts, part = blockIdx.x % args.parts;
  const uint32_t tile0 = blockIdx.x / args.parts * kRows;
  const Layout layout(args, kStageBytes);
  Expansion e;
  e.rows = rows;
  e.row0 = tile0 + part * rows;
  e.there = e.row0 < args.n ? min(rows, args.n - e.row0) : 0;
  e.slot_bytes = layout.slot_bytes;
  e.room = memory + layout.room;
  e.share = reinterpret_cast<float*>(memory + layout.share);
  e.u = reinterpret_cast<float*>(memory + layout.u);
  e.tokens = reinterpret_cast<Tokens*>(memory + layout.tokens);
  e.slot_barriers = shared + layout.slot_barriers;
  e.buffer_barriers = shared + layout.buffer_barriers;
  e.asked = shared + layout.asked;
  const skinny::Ring ring = {shared + layout.barriers, shared, args.stages, kStageBytes};
  const skinny::Steps steps(args.k, part, args.parts);
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp == 0) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < args.stages) {
      sm90::barrier_init(ring.barriers + 16 * lane, 1);
      sm90::barrier_init(ring.barriers + 16 * lane + 8, kConsumerWarps);
    }
    for (uint32_t i = lane; i < args.slots; i += 32) sm90::barrier_init(e.slot_barriers + 8 * i, 1);
    if (lane < args.buffers) sm90::barrier_init(e.buffer_barriers + 8 * lane, 1);
    if (lane == 0) sm90::barrier_init(e.asked, 1);
    sm90::barrier_init_fence();
  } else if (warp == kConsumerWarps) {
    if (threadIdx.x % 32 == 0) sm90::tensor_map_prefetch(&args.w_map);
    if (threadIdx.x % 32 == 1) sm90::tensor_map_prefetch(&args.x_map);
    if (threadIdx.x % 32 == 2) sm90::tensor_map_prefetch(&args.a_map);
  }
  __syncthreads();
  if (warp == kConsumerWarps) {
    if (threadIdx.x % 32 == 0) {
      skinny::prefetch(args.w_map, steps, tile0, kEarly);
      sm90::dependency_wait();
      // A read that stands behind the stream of W waits for microseconds: A's come first.
      const auto begin = [&](uint32_t step) {
        if (step == kGate) sm90::barrier_wait(e.asked, 0);
      };
      skinny::produce<kTokens>(ring, steps, args.w_map, tile0, args.x_map, args.x_map, 0, begin);
      // Not before: what the next kernel asks L2 for ahead would be gone when it is wanted.
      sm90::dependents_launch();
    }
    __syncwarp();
  } else if (warp < kConsumerWarps) {
    float d[kTokens / 2];
    skinny::consume<T, kTokens>(ring, steps, 0, d);
    sm90::named_barrier(2, 32 * kConsumerWarps);  // all stages are read
    skinny::leave_sums<kTokens>(reinterpret_cast<float*>(memory), kPitch, kRows, 0, d);
  } else {
    const uint32_t thread = threadIdx.x - 32 * (kConsumerWarps + 1);
    expand<T>(args, e, thread);
  }
  sm90::cluster_sync();
  finish<T>(args, e, part, shared);
  sm90::cluster_sync_relaxed();  // nobody leaves while others read its sums
#endif
}

// ---- host ----

constexpr uint32_t kSharedLimit = 227 * 1024;
constexpr uint32_t kFlags = 2;  ///< words of the context's, the last

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}
bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

/// Room for the rings; all bytes.
template <uint32_t kTokens>
uint32_t share_out(StreamArgs& args) {
  constexpr uint32_t kStageBytes = (kRows + kTokens) * 128;
  const uint32_t slot_bytes = kRows / args.parts * args.b.max_rank * 2;
  const uint32_t unit_bytes = kBoxes * args.box_rows * 128;
  args.room_bytes = 64 * 1024;
  args.buffers = std::min(kMaxBuffers, args.room_bytes / unit_bytes);
  args.slots = std::min({kMaxSlots, args.m, args.room_bytes / slot_bytes});
  args.stages = 0;
  const uint32_t fit = (kSharedLimit - Layout(args, kStageBytes).bytes) / kStageBytes;
  // As many as keep the memory busy: each more makes A, B and u wait longer.
  args.stages = std::min(fit, kTokens == 128 ? 4u : 5u);
  return Layout(args, kStageBytes).bytes;
}

template <typename T, uint32_t kTokens>
void launch(const Context& context, StreamArgs& args, uint32_t blocks) {
  const auto kernel = stream_kernel<T, kTokens>;
  const uint32_t bytes = share_out<kTokens>(args);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kStreamThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {args.parts, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
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
      return launch<T, 32>(context, args, blocks);
    case 64:
      return launch<T, 64>(context, args, blocks);
    default:
      return launch<T, 128>(context, args, blocks);
  }
}

}  // namespace

bool can_stream(const Context& context, const Stream& call) {
  return context.capability == 90 && call.dtype != DType::f32 && call.m > 0 &&
         call.m <= kStreamTokens && call.n > 0 && call.k > 0 && call.k % 8 == 0 &&
         aligned(call.x) && aligned(call.w) && aligned(call.y) && aligned(call.a.right) &&
         aligned(call.b.right) && context.counters && call.a.dtype == call.dtype &&
         call.b.dtype == call.dtype && call.b.max_rank <= kMaxStreamRank &&
         call.b.max_rank % 8 == 0;
}

void stream(const Context& context, const Stream& call) {
  const uint32_t tiles = ceil_div(call.n, kRows);
  StreamArgs args;
  args.parts = skinny::parts_of(tiles, static_cast<uint32_t>(context.multiprocessors));
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
  call.dtype == DType::bf16 ? launch_tokens<bf16>(context, args, blocks)
                            : launch_tokens<f16>(context, args, blocks);
}

}  // namespace metal_lora::cuda::multi
