// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// y of up to 128 tokens, adapter included, in one launch: bound by reading W from memory. The
// matrix unit's tall side (64) takes rows of W, its wide side the tokens; a block has 128 rows of W
// and a share of k, so that all multiprocessors read. A third warpgroup multiplies the same x by A:
// every block needs u of its share of k, and the matrix unit waits for W anyway. Blocks of a
// cluster leave their sums in shared memory, each adds up some of the tokens of all (y and u), in
// the order of k, and puts u·Bᵀ on top.
#include <algorithm>

#include "kernels/cuda/lora_skinny.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda {
namespace sm90 {
namespace {

constexpr uint32_t kRowsW = 128;
constexpr uint32_t kStepK = 64;
constexpr uint32_t kMaxRank = 64;
constexpr uint32_t kMaxBlocks = 8;  ///< of a cluster
constexpr uint32_t kMaxStages = 12;
constexpr uint32_t kProducer = 32;  ///< threads
constexpr uint32_t kThreads = 3 * 128 + kProducer;
constexpr uint32_t kSharedBytes = 112 * 1024;  ///< two blocks on a multiprocessor
constexpr uint32_t kBarrierBytes = 1024;
constexpr uint32_t kRankPad = 8;  ///< of rows of u and B in shared memory: no bank conflicts

struct SkinnyProblem {
  CUtensorMap w, a;
  uint32_t n = 0;
  uint32_t tiles = 0;         ///< of kRowsW, in clusters' units
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
  uint32_t parts_k = 1, parts_n = 1;
  uint32_t tiles_m = 1;
  uint32_t stages = 0, stage_bytes = 0;  ///< W, x, A
  uint32_t early = 0;                    ///< steps of W that L2 is asked for ahead
};

__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map),
               "r"(column),
               "r"(row)
               : "memory");
}
__device__ __forceinline__ float4 load_block(uint32_t shared, uint32_t block) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared), "r"(block)
      : "memory");
  return v;
}

/// Where a block stands, and its share of the work.
struct SkinnyPlace {
  uint32_t rank_k, rank_n, first_block;  ///< first_block: of those that share x and A
  uint32_t problem, n0, m0;
  uint32_t first, count;  ///< steps
  __device__ __forceinline__ SkinnyPlace(const SkinnyArgs& args, uint32_t tokens) {
    const uint32_t blocks = args.parts_k * args.parts_n, rank = blockIdx.x % blocks;
    rank_k = rank / args.parts_n;
    rank_n = rank % args.parts_n;
    first_block = rank_k * args.parts_n;
    uint32_t tile = blockIdx.x / blocks;
    m0 = tile % args.tiles_m * tokens;  // tiles of the same W one after the other: L2 has it
    tile /= args.tiles_m;
    problem = 0;
    while (tile >= args.problem[problem].tiles) tile -= args.problem[problem++].tiles;
    n0 = (tile * args.parts_n + rank_n) * kRowsW;
    const uint32_t steps = (args.k + kStepK - 1) / kStepK;
    first = rank_k * steps / args.parts_k;
    count = (rank_k + 1) * steps / args.parts_k - first;
  }
};

/// One thread: every stage. Blocks with the same x load a part of it and of A each, for all.
template <uint32_t kTokens>
__device__ __forceinline__ void produce(
    const SkinnyArgs& args, const SkinnyPlace& place, uint32_t barriers, uint32_t stages) {
  const SkinnyProblem& problem = args.problem[place.problem];
  const uint32_t early = min(args.early, place.count);
  for (uint32_t s = 0; s < early; ++s) {  // L2 may have W before the kernels ahead are over
    tensor_prefetch(&problem.w, (place.first + s) * kStepK, place.n0);
  }
  dependency_wait();
  const uint32_t x_rows = kTokens / args.parts_n, a_rows = problem.rank_columns / args.parts_n;
  const auto all = static_cast<uint16_t>(((1u << args.parts_n) - 1) << place.first_block);
  const uint32_t bytes = (kRowsW + kTokens + problem.rank_columns) * 128;
  uint32_t stage = 0, parity = 1;
  for (uint32_t s = 0; s < place.count; ++s) {
    const uint32_t full = barriers + 16 * stage, w = stages + stage * args.stage_bytes;
    const uint32_t x = w + kRowsW * 128, a = x + kTokens * 128;
    const uint32_t k0 = (place.first + s) * kStepK;
    const uint32_t x_row = place.rank_n * x_rows, a_row = place.rank_n * a_rows;
    barrier_wait(full + 8, parity);
    barrier_expect(full, bytes);
    tensor_load(w, &problem.w, full, k0, place.n0);
    if (args.parts_n == 1) {
      tensor_load(x, &args.x, full, k0, place.m0);
      if (a_rows > 0) tensor_load(a, &problem.a, full, k0, 0);
    } else {
      tensor_load_multicast(
          x + x_row * 128, &args.x, full, k0, place.m0 + x_row, all);
      if (a_rows > 0) tensor_load_multicast(a + a_row * 128, &problem.a, full, k0, a_row, all);
    }
    if (++stage == args.stages) stage = 0, parity ^= 1;
  }
}

/// One warpgroup: 64 rows of W, or A's, by all tokens.
template <typename T, uint32_t kTokens>
__device__ __forceinline__ void consume(
    const SkinnyArgs& args,
    const SkinnyPlace& place,
    uint32_t barriers,
    uint32_t stages,
    uint32_t left_offset,
    float (&d)[kTokens / 2]) {
  const uint32_t lane = threadIdx.x % 32;
  const bool releases = lane < args.parts_n;
  uint32_t stage = 0, parity = 0, reading = 0;
#pragma unroll
  for (uint32_t i = 0; i < kTokens / 2; ++i) d[i] = 0.0f;
  for (uint32_t s = 0; s < place.count; ++s) {
    const uint32_t full = barriers + 16 * stage, at = stages + stage * args.stage_bytes;
    barrier_wait(full, parity);
    const uint64_t left = wgmma_descriptor(at + left_offset, 16);
    const uint64_t right = wgmma_descriptor(at + kRowsW * 128, 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) wgmma<T, 0>(d, left + 2 * i, right + 2 * i, 1);
    wgmma_commit();
    wgmma_wait<1>();
    if (s > 0 && releases) barrier_arrive_remote(barriers + 16 * reading + 8, place.first_block + lane);
    reading = stage;
    if (++stage == args.stages) stage = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  wgmma_sums_fence(d);
  if (place.count > 0 && releases) {
    barrier_arrive_remote(barriers + 16 * reading + 8, place.first_block + lane);
  }
}

/// A block's sums by the tokens: rows of `pitch` floats, 128 of y and then u.
template <uint32_t kTokens>
__device__ __forceinline__ void leave_sums(
    float* sums, uint32_t pitch, uint32_t columns, uint32_t column0, const float (&d)[kTokens / 2]) {
  const uint32_t warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (column0 + warp * 16 >= columns) return;
  float* to = sums + lane % 4 * 2 * pitch + column0 + warp * 16 + lane / 4;
#pragma unroll
  for (uint32_t j = 0; j < kTokens / 8; ++j) {
    to[8 * j * pitch] = d[4 * j];
    to[(8 * j + 1) * pitch] = d[4 * j + 1];
    to[8 * j * pitch + 8] = d[4 * j + 2];
    to[(8 * j + 1) * pitch + 8] = d[4 * j + 3];
  }
}

/// The cluster's sum of four neighbours, four parts under way at a time.
__device__ __forceinline__ float4
sum_parts(const SkinnyArgs& args, const SkinnyPlace& place, uint32_t at) {
  float4 sum = make_float4(0, 0, 0, 0);
  for (uint32_t p0 = 0; p0 < args.parts_k; p0 += 4) {
    float4 v[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      v[i] = load_block(at, min(p0 + i, args.parts_k - 1) * args.parts_n + place.rank_n);
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (p0 + i >= args.parts_k) break;
      sum.x += v[i].x;
      sum.y += v[i].y;
      sum.z += v[i].z;
      sum.w += v[i].w;
    }
  }
  return sum;
}

/// This block's rows of B to shared memory, zeros beyond n and the rank. Rows of rank_columns and
/// kRankPad.
template <typename T>
__device__ __forceinline__ void load_b(const SkinnyProblem& problem, uint32_t n0, uint32_t to) {
  const uint32_t chunks = problem.rank_columns / 8;
  for (uint32_t i = threadIdx.x; i < kRowsW * chunks; i += kThreads) {
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
    uint32_t sums,
    uint32_t pitch,
    uint32_t token0,
    uint32_t token,
    uint32_t end,
    uint32_t column) {
  const SkinnyProblem& problem = args.problem[place.problem];
  const uint32_t g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const uint32_t low_pitch = problem.rank_columns + kRankPad;
  const uint32_t n = place.n0 + column + 4 * q;
  float4 sum[2];
#pragma unroll
  for (uint32_t h = 0; h < 2; ++h) {
    const uint32_t row = token + g + 8 * h;
    sum[h] = make_float4(0, 0, 0, 0);
    if (row < end) sum[h] = sum_parts(args, place, sums + (row * pitch + column + 4 * q) * 4);
  }
  float d[2][4] = {};
  const auto words = [&](const T* rows, uint32_t row) {
    return reinterpret_cast<const uint32_t*>(rows + row * low_pitch) + q;
  };
  const uint32_t* u = words(low, token - token0 + g);
  const uint32_t* right = words(b, column + 4 * (g / 2) + g % 2);
  for (uint32_t c = 0; c < problem.rank_columns / 2; c += 8) {
    const uint32_t a[4] = {
        u[c], u[c + 4 * low_pitch], u[c + 4], u[c + 4 * low_pitch + 4]};
    mma::multiply<T>(d[0], a, right[c], right[c + 4]);
    mma::multiply<T>(d[1], a, right[c + low_pitch], right[c + low_pitch + 4]);
  }
#pragma unroll
  for (uint32_t h = 0; h < 2; ++h) {
    const uint32_t row = token + g + 8 * h, m = place.m0 + row;
    if (row >= end || m >= args.m || n >= problem.n) continue;
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
__global__ void __launch_bounds__(kThreads, kTokens > 64 ? 1 : 2)
    skinny_kernel(const __grid_constant__ SkinnyArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t raw[];
  const uint32_t barriers = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t stages = barriers + kBarrierBytes;
  auto* memory = raw + (stages - shared_address(raw));
  const SkinnyPlace place(args, kTokens);
  const SkinnyProblem& problem = args.problem[place.problem];
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int warpgroup = warp / 4;
  const bool adapts = problem.rank > 0;
  if (threadIdx.x == 0) {
    const uint32_t readers = (adapts ? 12 : 8) * args.parts_n;
    for (uint32_t s = 0; s < args.stages; ++s) {
      barrier_init(barriers + 16 * s, 1);
      barrier_init(barriers + 16 * s + 8, readers);
    }
    barrier_init_fence();
  } else if (warp == 12) {
    if (threadIdx.x % 32 == 0) tensor_map_prefetch(&problem.w);
    if (threadIdx.x % 32 == 1) tensor_map_prefetch(&args.x);
    if (threadIdx.x % 32 == 2 && adapts) tensor_map_prefetch(&problem.a);
  }
  __syncthreads();
  if (args.parts_n > 1) cluster_sync_relaxed();
  if (threadIdx.x == 0) dependents_launch();
  if (adapts && threadIdx.x < kRowsW) {
    const uint32_t n = min(place.n0 + threadIdx.x, problem.n - 1);
    const auto* row = static_cast<const T*>(problem.b) + n * problem.b_stride;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(row));
  }
  const uint32_t columns = kRowsW + problem.rank_columns, pitch = columns + 4;
  auto* sums = reinterpret_cast<float*>(memory);
  auto* low = reinterpret_cast<T*>(memory + kTokens * pitch * 4);
  const T* b = low + kTokens * (problem.rank_columns + kRankPad);
  const uint32_t b_at = shared_address(b);
  if (warp == 12) {
    if (threadIdx.x % 32 == 0) produce<kTokens>(args, place, barriers, stages);
    __syncwarp();
    dependency_wait();
    __syncthreads();
    if (adapts) load_b<T>(problem, place.n0, b_at);
  } else {
    dependency_wait();
    float d[kTokens / 2];
    const bool works = warpgroup < 2 || adapts;
    const uint32_t left = warpgroup < 2 ? warpgroup * 64 * 128 : (kRowsW + kTokens) * 128;
    if (works) consume<T, kTokens>(args, place, barriers, stages, left, d);
    __syncthreads();  // all stages are read
    if (adapts) load_b<T>(problem, place.n0, b_at);
    if (works) leave_sums<kTokens>(sums, pitch, columns, warpgroup * 64, d);
  }
  cluster_sync();

  // This block's tokens, in eights.
  const uint32_t token0 = place.rank_k * (kTokens / 8) / args.parts_k * 8;
  const uint32_t end = (place.rank_k + 1) * (kTokens / 8) / args.parts_k * 8;
  const uint32_t from = shared_address(sums);
  const uint32_t quads = problem.rank_columns / 4;
  for (uint32_t i = threadIdx.x; i < (end - token0) * quads; i += kThreads) {
    const uint32_t row = token0 + i / quads, c = i % quads * 4;
    const float4 u = sum_parts(args, place, from + (row * pitch + kRowsW + c) * 4);
    const float v[4] = {u.x, u.y, u.z, u.w};
    const bool keeps = problem.plain && place.n0 == 0 && place.m0 + row < args.m;
    T* to = low + (row - token0) * (problem.rank_columns + kRankPad) + c;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      to[j] = from_float<T>(problem.factor * v[j]);
      if (keeps && c + j < problem.rank) {
        problem.plain[size_t{place.m0 + row} * problem.rank + c + j] = v[j];
      }
    }
  }
  mma::copies_wait<0>();
  __syncthreads();
  if (warp < 12) {
    const uint32_t pieces = (end - token0 + 15) / 16 * (kRowsW / 16);
    for (uint32_t piece = warp; piece < pieces; piece += 12) {
      const uint32_t token = token0 + piece / (kRowsW / 16) * 16;
      const uint32_t column = piece % (kRowsW / 16) * 16;
      finish_rows<T>(args, place, low, b, from, pitch, token0, token, end, column);
    }
  }
  cluster_sync_relaxed();  // nobody goes while others read here
#endif
}

const uint32_t early_steps = getenv("EARLY") ? atoi(getenv("EARLY")) : 4;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}
uint32_t tokens_of(uint32_t m) {
  return m <= 32 ? 32 : m <= 64 ? 64 : 128;
}

uint32_t clusters_of(const GemmGroup& group, const SkinnyForm& form) {
  uint32_t tiles = 0;
  for (int i = 0; i < group.problems; ++i) {
    tiles += ceil_div(group.problem[i].n, kRowsW * form.parts_n);
  }
  return tiles * ceil_div(group.m, form.tokens);
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

void fill_problem(
    SkinnyProblem& to, const GemmGroup& group, const GemmProblem& from, const SkinnyForm& form) {
  const GemmPair& base = from.pair[0];
  to.n = from.n;
  to.tiles = ceil_div(from.n, kRowsW * form.parts_n);
  to.w = make_tensor_map({base.right, group.dtype, from.n, base.k, base.right_stride, kRowsW});
  if (const GemmShrink::Part* part = part_of(group, from); part && part->rank > 0) {
    to.rank = part->rank;
    to.rank_columns = ceil_div(part->rank, 16) * 16;
    to.a = make_tensor_map(
        {part->right,
         group.dtype,
         part->rank,
         base.k,
         part->right_stride,
         to.rank_columns / form.parts_n});
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

template <typename T, uint32_t kTokens>
void launch(const Context& context, SkinnyArgs& args, uint32_t clusters, uint32_t rank_columns) {
  const auto kernel = skinny_kernel<T, kTokens>;
  args.stage_bytes = (kRowsW + kTokens + rank_columns) * 128;
  // The A side reads 64 rows, whatever the rank: the last stage's lie within the block's memory.
  const uint32_t slack = rank_columns > 0 ? (kMaxRank - rank_columns) * 128 : 0;
  const uint32_t shared = kTokens > 64 ? 2 * kSharedBytes : kSharedBytes;
  args.stages = std::min(kMaxStages, (shared - 2 * kBarrierBytes - slack) / args.stage_bytes);
  args.early = early_steps;
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
      "lora_skinny");
  const uint32_t blocks = args.parts_k * args.parts_n;
  cudaLaunchConfig_t config = {};
  config.gridDim = clusters * blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {blocks, 1, 1};
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, args), "lora_skinny");
}

template <typename T>
void launch_tokens(
    const Context& context,
    SkinnyArgs& args,
    uint32_t tokens,
    uint32_t clusters,
    uint32_t rank_columns) {
  switch (tokens) {
    case 32:
      return launch<T, 32>(context, args, clusters, rank_columns);
    case 64:
      return launch<T, 64>(context, args, clusters, rank_columns);
    default:
      return launch<T, 128>(context, args, clusters, rank_columns);
  }
}

}  // namespace

SkinnyForm skinny_form(const Context& context, const GemmGroup& group) {
  SkinnyForm best;
  const uint32_t steps = ceil_div(group.problem[0].pair[0].k, kStepK);
  uint32_t best_cost = 0;
  for (uint32_t parts : {1u, 2u, 4u, 8u}) {
    const SkinnyForm form = {parts, 1, tokens_of(group.m)};
    const uint32_t slots = context.multiprocessors / parts;
    const uint32_t waves = ceil_div(clusters_of(group, form), slots);
    const uint32_t cost = waves * (ceil_div(steps, parts) + 4) + parts;
    if (best.parts_k != 0 && cost >= best_cost) continue;
    best = form;
    best_cost = cost;
  }
  return best;
}

void skinny_with_form(const Context& context, const GemmGroup& group, SkinnyForm form) {
  if (form.parts_k == 0) form = skinny_form(context, group);
  SkinnyArgs args;
  args.m = group.m;
  args.parts_k = form.parts_k;
  args.parts_n = form.parts_n;
  if (form.tokens == 0) form.tokens = tokens_of(group.m);
  const uint32_t tokens = form.tokens;
  args.tiles_m = ceil_div(group.m, tokens);
  uint32_t problems = 0, rank_columns = 0;
  for (int i = 0; i < group.problems; ++i) {
    if (group.problem[i].n == 0) continue;
    SkinnyProblem& to = args.problem[problems++];
    fill_problem(to, group, group.problem[i], form);
    rank_columns = std::max(rank_columns, to.rank_columns);
  }
  if (problems == 0 || group.m == 0) return;
  const GemmPair& base = group.problem[0].pair[0];
  args.k = base.k;
  args.x = make_tensor_map(
      {base.left, group.dtype, group.m, base.k, base.left_stride, tokens / form.parts_n});
  const uint32_t clusters = clusters_of(group, form);
  group.dtype == DType::bf16 ? launch_tokens<bf16>(context, args, tokens, clusters, rank_columns)
                             : launch_tokens<f16>(context, args, tokens, clusters, rank_columns);
}

}  // namespace sm90

bool can_lora_skinny(const Context& context, const GemmGroup& group) {
  if (!can_gemm_sm90(context, group) || group.right_is_kn || group.out_dtype != group.dtype ||
      group.m > kSkinnyMaxTokens || group.problems == 0 || group.shrinks > 1) {
    return false;
  }
  const GemmPair& first = group.problem[0].pair[0];
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    if (problem.pairs == 0 || problem.pairs > 2) return false;
    const GemmPair& pair = problem.pair[0];
    if (pair.left != first.left || pair.k != first.k || pair.k == 0) return false;
    if (problem.pairs == 2 && !sm90::part_of(group, problem)) return false;
  }
  return true;
}

bool prefers_lora_skinny(const Context& context, const GemmGroup& group) {
  return can_lora_skinny(context, group);
}

void lora_skinny(const Context& context, const GemmGroup& group) {
  if (!can_lora_skinny(context, group)) {
    throw std::invalid_argument(
        "[lora_skinny] group must be one that can_lora_skinny takes, but is not");
  }
  sm90::skinny_with_form(context, group, {});
}

}  // namespace metal_lora::cuda
