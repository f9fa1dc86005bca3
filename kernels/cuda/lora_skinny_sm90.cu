// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// y of up to 128 tokens, adapter included, in one launch: bound by reading W from memory. The
// matrix unit's tall side (64) takes rows of W, its wide side the tokens; a block has 64 rows of W
// and a share of k, so that all multiprocessors read. A second warpgroup multiplies the same x by
// A: the matrix unit waits for W anyway. Blocks of a cluster leave their sums in shared memory,
// each adds up some of the tokens of all (y and u), in the order of k, and puts u·Bᵀ on top.
//   ladder (H100, k = n = 4096, bf16, 64 tokens, rank 16 / 64; cuBLAS's base 14.5 us, 2.3 TB/s)
//     a shrink, then gemm_sm90's 64 tiles of 128x64, begun beside it  18.4 / 18.5 us
//     128 rows a block, k in three, B read when it was wanted         19.4 / 23.3
//     64 rows, k in two; B to L2 at the start, own sums not through
//     the cluster's network                                           17.1 / 19.1
//     dependents placed when a block has asked for its last stage,
//     their first eight steps of W asked of L2 meanwhile              16.5 / 18.8
//     a whole multiprocessor for a block's stages                     16.3 / 17.5
//     stages filled with W ahead of the wait, where it is promised    16.0 / 17.6
//     (32 tokens 15.7 / 16.2; 128 tokens 19.2 / 21.7, where the product takes 19.8 / 19.6)
//   Without the adapter 14.8 us. Memory gives W in 11.2 us; rank 64 and 128 tokens are bound by
//   what L2 gives all blocks, 7.3 TB/s: 8 KB of W a step against 8 of x and 8 of A. Start, first
//   stage and end are 4.5 us, of which the next kernel hides one. The next 10 % would take A off
//   the blocks' stages without a block that makes u for all (tried: its end comes before all
//   others' ends, 18.2 / 20.6). Tried: 128 rows with k in three, which reads x and A half as often,
//   but leaves a quarter of the multiprocessors idle (18.8 / 20.0); k in four (clusters of four
//   with a multiprocessor a block do not all find room); x sent to two blocks at once (nothing, or
//   clusters of four again); asking L2 for W when the kernel ahead begins (+6 us: it is gone when
//   it is wanted).
#include <algorithm>

#include "kernels/cuda/lora_skinny.h"
#include "kernels/cuda/lora_skinny_tile.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/tensor_map.h"

namespace metal_lora::cuda {
namespace sm90 {
namespace {

using namespace skinny;

constexpr uint32_t kMaxRank = 64;
constexpr uint32_t kConsumers = 8;  ///< warps: W's, then A's
constexpr uint32_t kThreads = 32 * (kConsumers + 1);
constexpr uint32_t kSharedBytes = 224 * 1024;
constexpr uint32_t kBarrierBytes = 1024;
/// Steps of W that L2 is asked for before the kernels ahead are over.
constexpr uint32_t kEarly = 8;
constexpr uint32_t kRankPad = 8;  ///< of rows of u and B in shared memory: no bank conflicts

struct SkinnyProblem {
  CUtensorMap w, a;
  uint32_t n = 0;
  uint32_t tiles = 0;
  uint32_t rank = 0;          ///< 0: no adapter
  uint32_t rank_columns = 0;  ///< rank in sixteens
  const void* b = nullptr;
  size_t b_stride = 0;
  float factor = 1.0f;
  float* plain = nullptr;
  void* out = nullptr;
  size_t out_stride = 0;
  const float* bias = nullptr;
  const void* residual = nullptr;
  size_t residual_stride = 0;
};
struct SkinnyArgs {
  CUtensorMap x;
  SkinnyProblem problem[GemmGroup::kMaxProblems];
  uint32_t m = 0, k = 0;
  uint32_t parts = 1;                    ///< of k: blocks of a cluster
  uint32_t stages = 0, stage_bytes = 0;  ///< W, x, A
  bool w_ready = false;                  ///< GemmGroup::right0_ready
};

/// Where a block stands, and its share of the work.
struct SkinnyPlace {
  uint32_t part, problem, n0;
  Steps steps;
  __device__ __forceinline__ explicit SkinnyPlace(const SkinnyArgs& args)
      : part(blockIdx.x % args.parts), steps(args.k, part, args.parts) {
    uint32_t tile = blockIdx.x / args.parts;
    problem = 0;
    while (tile >= args.problem[problem].tiles) tile -= args.problem[problem++].tiles;
    n0 = tile * kRows;
  }
};

/// One thread: every stage.
template <uint32_t kTokens>
__device__ __forceinline__ void produce_stages(
    const SkinnyArgs& args, const SkinnyPlace& place, const Ring& ring) {
  const SkinnyProblem& problem = args.problem[place.problem];
  uint32_t filled = 0;
  if (args.w_ready) {
    filled = fill<kTokens>(ring, place.steps, problem.w, place.n0, problem.rank_columns);
  } else {
    prefetch(problem.w, place.steps, place.n0, kEarly);
  }
  dependency_wait();
  produce<kTokens>(
      ring,
      place.steps,
      problem.w,
      place.n0,
      args.x,
      problem.a,
      problem.rank_columns,
      filled);
  // Not before: what the next kernel asks L2 for ahead would be gone when it is wanted.
  dependents_launch();
}

/// This block's rows of B to shared memory, zeros beyond n and the rank. Rows of rank_columns and
/// kRankPad.
template <typename T>
__device__ __forceinline__ void load_b(const SkinnyProblem& problem, uint32_t n0, uint32_t to) {
  const uint32_t chunks = problem.rank_columns / 8;
  for (uint32_t i = threadIdx.x; i < kRows * chunks; i += kThreads) {
    const uint32_t row = i / chunks, c = i % chunks * 8, n = n0 + row;
    const uint32_t left = n < problem.n && c < problem.rank ? problem.rank - c : 0;
    const T* from = static_cast<const T*>(problem.b) + (left ? n * problem.b_stride + c : 0);
    const uint32_t at = to + (row * (problem.rank_columns + kRankPad) + c) * 2;
    mma::copy_async<16>(at, from, min(left, 8u) * 2);
  }
  mma::copies_commit();
}

template <typename T>
struct alignas(8) Four {
  T v[4];
};

/// A warp's 16 tokens x 16 columns. Column c of product t is column 4·(c/2) + 2·t + c%2 of y, so
/// that a thread has four neighbours.
template <typename T>
__device__ __forceinline__ void finish_rows(
    const SkinnyArgs& args,
    const SkinnyPlace& place,
    const T* low,
    const T* b,
    const float4 (&sum)[2],
    uint32_t token0,
    uint32_t token,
    uint32_t end,
    uint32_t column) {
  const SkinnyProblem& problem = args.problem[place.problem];
  const uint32_t g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const uint32_t low_pitch = problem.rank_columns + kRankPad;
  const uint32_t n = place.n0 + column + 4 * q;
  float d[2][4] = {};
  const auto words = [&](const T* rows, uint32_t row) {
    return reinterpret_cast<const uint32_t*>(rows + row * low_pitch) + q;
  };
  const uint32_t* u = words(low, token - token0 + g);
  const uint32_t* right = words(b, column + 4 * (g / 2) + g % 2);
  for (uint32_t c = 0; c < problem.rank_columns / 2; c += 8) {
    const uint32_t a[4] = {u[c], u[c + 4 * low_pitch], u[c + 4], u[c + 4 * low_pitch + 4]};
    mma::multiply<T>(d[0], a, right[c], right[c + 4]);
    mma::multiply<T>(d[1], a, right[c + low_pitch], right[c + low_pitch + 4]);
  }
#pragma unroll
  for (uint32_t h = 0; h < 2; ++h) {
    const uint32_t m = token + g + 8 * h;
    if (m >= min(end, args.m) || n >= problem.n) continue;
    float v[4] = {
        sum[h].x + d[0][2 * h],
        sum[h].y + d[0][2 * h + 1],
        sum[h].z + d[1][2 * h],
        sum[h].w + d[1][2 * h + 1]};
    T* to = static_cast<T*>(problem.out) + m * problem.out_stride + n;
    const T* residual = static_cast<const T*>(problem.residual) + m * problem.residual_stride + n;
    const uint32_t count = min(4u, problem.n - n);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (i >= count) break;
      if (problem.bias) v[i] += problem.bias[n + i];
      if (problem.residual) v[i] += to_float(residual[i]);
    }
    if (count == 4) {
      Four<T> four;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) four.v[i] = from_float<T>(v[i]);
      *reinterpret_cast<Four<T>*>(to) = four;
    } else {
      for (uint32_t i = 0; i < count; ++i) to[i] = from_float<T>(v[i]);
    }
  }
}

template <typename T, uint32_t kTokens>
__global__ void __launch_bounds__(kThreads, 1)
    skinny_kernel(const __grid_constant__ SkinnyArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t barriers = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t stages = barriers + kBarrierBytes;
  auto* memory = raw + (stages - shared_address(raw));
  const SkinnyPlace place(args);
  const SkinnyProblem& problem = args.problem[place.problem];
  const Ring ring = {barriers, stages, args.stages, args.stage_bytes};
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const uint32_t warpgroup = warp / 4;
  const bool adapts = problem.rank > 0;
  if (threadIdx.x == 0) {
    const uint32_t readers = adapts ? kConsumers : kConsumers - 4;
    for (uint32_t s = 0; s < args.stages; ++s) {
      barrier_init(barriers + 16 * s, 1);
      barrier_init(barriers + 16 * s + 8, readers);
    }
    barrier_init_fence();
  } else if (warp == kConsumers) {
    if (threadIdx.x % 32 == 0) tensor_map_prefetch(&problem.w);
    if (threadIdx.x % 32 == 1) tensor_map_prefetch(&args.x);
    if (threadIdx.x % 32 == 2 && adapts) tensor_map_prefetch(&problem.a);
  }
  __syncthreads();
  if (adapts && threadIdx.x < kRows) {
    const uint32_t n = min(place.n0 + threadIdx.x, problem.n - 1);
    const auto* row = static_cast<const T*>(problem.b) + n * problem.b_stride;
    prefetch_line(row);
  }
  const uint32_t columns = kRows + problem.rank_columns, pitch = columns + 4;
  auto* sums = reinterpret_cast<float*>(memory);
  auto* low = reinterpret_cast<T*>(memory + kTokens * pitch * 4);
  const T* b = low + kTokens * (problem.rank_columns + kRankPad);
  const uint32_t b_at = shared_address(b);
  float d[kTokens / 2];
  const bool consumes = warp != kConsumers && (warpgroup == 0 || adapts);
  if (warp == kConsumers) {
    if (threadIdx.x % 32 == 0) produce_stages<kTokens>(args, place, ring);
    __syncwarp();
    dependency_wait();
  } else {
    dependency_wait();
    const uint32_t left = warpgroup == 0 ? 0 : (kRows + kTokens) * 128;
    if (consumes) consume<T, kTokens>(ring, place.steps, left, d);
  }
  __syncthreads();  // all stages are read
  if (adapts) load_b<T>(problem, place.n0, b_at);
  if (consumes) leave_sums<kTokens>(sums, pitch, columns, warpgroup * 64, d);
  cluster_sync();

  // This block's tokens, in eights.
  const uint32_t token0 = place.part * (kTokens / 8) / args.parts * 8;
  const uint32_t end = (place.part + 1) * (kTokens / 8) / args.parts * 8;
  const uint32_t from = shared_address(sums);
  const uint32_t pieces = warp < kConsumers ? (end - token0 + 15) / 16 * (kRows / 16) : 0;
  const auto token_of = [&](uint32_t piece) { return token0 + piece / (kRows / 16) * 16; };
  const auto column_of = [&](uint32_t piece) { return piece % (kRows / 16) * 16; };
  float4 sum[2];
  const auto sum_piece = [&](uint32_t piece) {
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
      const uint32_t row = min(token_of(piece) + threadIdx.x % 32 / 4 + 8 * h, end - 1);
      const uint32_t column = column_of(piece) + threadIdx.x % 4 * 4;
      sum[h] = sum_parts(args.parts, place.part, from + (row * pitch + column) * 4);
    }
  };
  if (warp < pieces) sum_piece(warp);  // while u is on its way
  const uint32_t quads = problem.rank_columns / 4;
  for (uint32_t i = threadIdx.x; i < (end - token0) * quads; i += kThreads) {
    const uint32_t row = token0 + i / quads, c = i % quads * 4;
    const float4 u = sum_parts(args.parts, place.part, from + (row * pitch + kRows + c) * 4);
    const float v[4] = {u.x, u.y, u.z, u.w};
    const bool keeps = problem.plain && place.n0 == 0 && row < args.m;
    T* to = low + (row - token0) * (problem.rank_columns + kRankPad) + c;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      to[j] = from_float<T>(problem.factor * v[j]);
      if (keeps && c + j < problem.rank) {
        problem.plain[size_t{row} * problem.rank + c + j] = v[j];
      }
    }
  }
  mma::copies_wait<0>();
  __syncthreads();
  for (uint32_t piece = warp; piece < pieces; piece += kConsumers) {
    if (piece > warp) sum_piece(piece);
    finish_rows<T>(args, place, low, b, sum, token0, token_of(piece), end, column_of(piece));
  }
  cluster_sync_relaxed();  // nobody goes while others read here
#endif
}

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}
uint32_t tiles_of(const GemmGroup& group) {
  uint32_t tiles = 0;
  for (int i = 0; i < group.problems; ++i) tiles += ceil_div(group.problem[i].n, kRows);
  return tiles;
}

/// The part that makes the left of a problem's second pair.
const GemmShrink::Part* part_of(const GemmGroup& group, const GemmProblem& problem) {
  if (group.shrinks != 1 || problem.pairs < 2) return nullptr;
  const GemmShrink& shrink = group.shrink[0];
  for (int p = 0; p < shrink.parts; ++p) {
    if (shrink.part[p].out == problem.pair[1].left) return &shrink.part[p];
  }
  return nullptr;
}

void fill_problem(SkinnyProblem& to, const GemmGroup& group, const GemmProblem& from) {
  const GemmPair& base = from.pair[0];
  to.n = from.n;
  to.tiles = ceil_div(from.n, kRows);
  to.w = make_tensor_map({base.right, group.dtype, from.n, base.k, base.right_stride, kRows});
  if (const GemmShrink::Part* part = part_of(group, from); part && part->rank > 0) {
    to.rank = part->rank;
    to.rank_columns = ceil_div(part->rank, 16) * 16;
    to.a = make_tensor_map(
        {part->right, group.dtype, part->rank, base.k, part->right_stride, to.rank_columns});
    to.b = from.pair[1].right;
    to.b_stride = from.pair[1].right_stride;
    to.factor = part->factor;
    to.plain = part->plain;
  }
  to.out = from.out;
  to.out_stride = from.out_stride;
  to.bias = from.bias;
  to.residual = from.residual;
  to.residual_stride = from.residual_stride;
}

uint32_t rank_columns_of(const GemmGroup& group) {
  uint32_t most = 0;
  for (int i = 0; i < group.problems; ++i) {
    const GemmShrink::Part* part = part_of(group, group.problem[i]);
    if (part) most = std::max(most, ceil_div(part->rank, 16) * 16);
  }
  return most;
}

template <typename T, uint32_t kTokens>
void launch(const Context& context, SkinnyArgs& args, uint32_t blocks, uint32_t rank_columns) {
  const auto kernel = skinny_kernel<T, kTokens>;
  args.stage_bytes = (kRows + kTokens + rank_columns) * 128;
  // The A side reads 64 rows, whatever the rank: the last stage's lie within the block's memory.
  const uint32_t slack = rank_columns > 0 ? (kMaxRank - rank_columns) * 128 : 0;
  args.stages = std::min(kMaxStages, (kSharedBytes - 2 * kBarrierBytes - slack) / args.stage_bytes);
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "lora_skinny");
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {args.parts, 1, 1};
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, args), "lora_skinny");
}

template <typename T>
void launch_tokens(
    const Context& context, SkinnyArgs& args, uint32_t blocks, uint32_t rank_columns) {
  switch (tokens_of(args.m)) {
    case 32:
      return launch<T, 32>(context, args, blocks, rank_columns);
    case 64:
      return launch<T, 64>(context, args, blocks, rank_columns);
    default:
      return launch<T, 128>(context, args, blocks, rank_columns);
  }
}

}  // namespace

uint32_t skinny_parts(const Context& context, const GemmGroup& group) {
  return parts_of(tiles_of(group), context.multiprocessors);
}

void skinny_with_parts(const Context& context, const GemmGroup& group, uint32_t parts) {
  if (group.m == 0) return;
  SkinnyArgs args;
  args.m = group.m;
  args.parts = parts;
  args.w_ready = group.right0_ready;
  for (int i = 0; i < group.problems; ++i) fill_problem(args.problem[i], group, group.problem[i]);
  const GemmPair& base = group.problem[0].pair[0];
  args.k = base.k;
  args.x = make_tensor_map(
      {base.left, group.dtype, group.m, base.k, base.left_stride, tokens_of(group.m)});
  const uint32_t blocks = tiles_of(group) * parts, rank_columns = rank_columns_of(group);
  group.dtype == DType::bf16 ? launch_tokens<bf16>(context, args, blocks, rank_columns)
                             : launch_tokens<f16>(context, args, blocks, rank_columns);
}

}  // namespace sm90

bool can_lora_skinny(const Context& context, const GemmGroup& group) {
  if (!can_gemm_sm90(context, group) || group.right_is_kn || group.out_dtype != group.dtype ||
      group.end != GemmEnd::plain || group.m > kSkinnyMaxTokens || group.problems == 0 ||
      group.shrinks > 1) {
    return false;
  }
  const GemmPair& first = group.problem[0].pair[0];
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    if (problem.pairs == 0 || problem.pairs > 2) return false;
    const GemmPair& pair = problem.pair[0];
    if (pair.left != first.left || pair.k != first.k || pair.k == 0 || problem.n == 0 ||
        problem.rope) {
      return false;
    }
    if (problem.pairs == 2 && !sm90::part_of(group, problem)) return false;
  }
  return true;
}

bool prefers_lora_skinny(const Context& context, const GemmGroup& group) {
  if (!can_lora_skinny(context, group)) return false;
  if (sm90::tiles_of(group) * 2 > static_cast<uint32_t>(context.multiprocessors)) return false;
  const uint32_t rank_columns = sm90::rank_columns_of(group);
  return group.m <= 64 || rank_columns == 16;
}

void lora_skinny(const Context& context, const GemmGroup& group) {
  if (!can_lora_skinny(context, group)) {
    throw std::invalid_argument(
        "[lora_skinny] group must be one that can_lora_skinny takes, but is not");
  }
  sm90::skinny_with_parts(context, group, sm90::skinny_parts(context, group));
}

}  // namespace metal_lora::cuda
