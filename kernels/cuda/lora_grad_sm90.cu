// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_grad of some hundred tokens, which is over in microseconds, so that its start, the first
// bytes' way and its end are most of it, and instructions that run once cost the time of a fetch. A
// block takes 64 columns of `large` a warpgroup and all tokens: the copy engine brings a whole
// share in one go where there is room, the matrix unit reads both operands along the tokens as they
// lie, and a thread writes its sums to whole 32-byte sectors. Nothing is exchanged between blocks.
#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/lora_grad_sm90.h"
#include "kernels/cuda/skinny.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda {
namespace sm90 {
namespace {

constexpr uint32_t kTokens = 64;      ///< of a stage
constexpr uint32_t kBoxBytes = 8192;  ///< 64 tokens x 64 columns
constexpr uint32_t kMaxGrads = 16;
constexpr uint32_t kMaxStages = 12;
constexpr uint32_t kMaxRank = 64;

/// Boxes of large, one of small.
constexpr uint32_t stage_bytes(uint32_t groups, uint32_t ranks) {
  return groups * kBoxBytes + kTokens * ranks * 2;
}

struct Grad {
  CUtensorMap large, small;
  float* grad = nullptr;
  uint32_t columns = 0, rank = 0;
  uint32_t end_tile = 0;  ///< tiles of this product and all before it
  float factor = 1.0f;
  bool transposed = false;
  bool pairs = false;  ///< neighbouring ranks lie together, at multiples of 8 bytes
  bool large_early = false, small_early = false;  ///< may be read ahead of the wait
};
struct GradArgs {
  Grad grad[kMaxGrads];
  uint32_t steps = 0;   ///< of kTokens
  uint32_t stages = 0;  ///< large of each warpgroup, small
};

/// One column's sums: of each eight ranks a quad's lanes hold two neighbours each.
template <uint32_t kRanks>
__device__ __forceinline__ void store_column(
    const Grad& grad, uint32_t column, const float (&d)[kRanks / 2], uint32_t half) {
  if (column >= grad.columns) return;
  const size_t along = grad.transposed ? 1 : grad.columns;
  float* to = grad.grad + (grad.transposed ? size_t{column} * grad.rank : column);
#pragma unroll
  for (uint32_t j = 0; j < kRanks / 8; ++j) {
    const uint32_t rank = 8 * j + threadIdx.x % 4 * 2;
    if (rank >= grad.rank) break;
    const float low = grad.factor * d[4 * j + 2 * half],
                high = grad.factor * d[4 * j + 2 * half + 1];
    if (grad.pairs) {
      *reinterpret_cast<float2*>(to + rank) = make_float2(low, high);
      continue;
    }
    to[rank * along] = low;
    if (rank + 1 < grad.rank) to[(rank + 1) * along] = high;
  }
}

/// kRanks: of the instruction and of small's boxes, 16, 32 or 64; a product of fewer reads zeros.
template <typename T, uint32_t kGroups, uint32_t kRanks>
__global__ void __launch_bounds__(128 * kGroups + 32, 1)
    grad_kernel(const __grid_constant__ GradArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr uint32_t kStageBytes = stage_bytes(kGroups, kRanks);
  extern __shared__ uint8_t raw[];
  const uint32_t ring = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t full = ring + args.stages * kStageBytes, empty = full + 8 * kMaxStages;
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  dependents_launch();
  uint32_t g = 0, before = 0;
  while (blockIdx.x >= args.grad[g].end_tile) before = args.grad[g++].end_tile;
  const Grad& grad = args.grad[g];
  const uint32_t column0 = (blockIdx.x - before) * 64 * kGroups;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&grad.large);
    tensor_map_prefetch(&grad.small);
    for (uint32_t s = 0; s < args.stages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * kGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();
  uint32_t stage = 0, parity = 0;
  const auto advance = [&] {
    if (++stage == args.stages) stage = 0, parity ^= 1;
  };
  if (warp == 4 * kGroups) {
    if (!elect_lane()) return;
    // Ahead of the wait what may be read, then the rest: one loop for both, its code is fetched.
    const uint32_t first = min(args.steps, args.stages);  // they find their stages empty
    uint32_t at = 0, round = 1;
#pragma unroll 1
    for (uint32_t turn = 0; turn < first + args.steps; ++turn) {
      const bool late = turn >= first;
      const uint32_t s = late ? turn - first : turn;
      if (turn == first) {
        dependency_wait();
        at = 0;
      }
      const bool refill = late && s >= first;
      const uint32_t barrier = full + 8 * at, to = ring + at * kStageBytes;
      if (refill) barrier_wait(empty + 8 * at, round ^ 1);
      if (refill || late != grad.large_early) {
        barrier_expect(barrier, kStageBytes);
#pragma unroll
        for (uint32_t i = 0; i < kGroups; ++i) {
          tensor_load(to + i * kBoxBytes, &grad.large, barrier, column0 + 64 * i, s * kTokens);
        }
      }
      if (refill || late != grad.small_early) {
        tensor_load(to + kGroups * kBoxBytes, &grad.small, barrier, 0, s * kTokens);
      }
      if (++at == args.stages) {
        at = 0;
        if (refill) round ^= 1;
      }
    }
    return;
  }
  const uint32_t group = warp / 4, lane = threadIdx.x % 32;
  float d[kRanks / 2];
#pragma unroll
  for (uint32_t i = 0; i < kRanks / 2; ++i) d[i] = 0.0f;
  uint32_t reading = 0;
  for (uint32_t s = 0; s < args.steps; ++s) {
    barrier_wait(full + 8 * stage, parity);
    const uint32_t at = ring + stage * kStageBytes;
    const uint64_t left = wgmma_descriptor(at + group * kBoxBytes, kBoxBytes);
    const uint64_t right = wgmma_box_descriptor<kRanks>(at + kGroups * kBoxBytes);
    wgmma_fence();
#pragma unroll
    for (uint32_t i = 0; i < kTokens / 16; ++i) {
      wgmma<T, 1, 1>(d, left + i * (16 * 128 >> 4), right + i * (16 * kRanks * 2 >> 4), 1);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (s > 0 && lane == 0) barrier_arrive(empty + 8 * reading);
    reading = stage;
    advance();
  }
  wgmma_wait<0>();
  wgmma_sums_fence(d);
  dependency_wait();  // the kernels ahead may still read what is written here
  const uint32_t column = column0 + group * 64 + warp % 4 * 16 + lane / 4;
  store_column<kRanks>(grad, column, d, 0);
  store_column<kRanks>(grad, column + 8, d, 1);
#endif
}

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

template <typename T, uint32_t kGroups, uint32_t kRanks>
void launch_grads(const Context& context, GradArgs& args, uint32_t tiles) {
  constexpr uint32_t kStageBytes = stage_bytes(kGroups, kRanks);
  constexpr uint32_t kOther = 16 * kMaxStages + 1024;
  const uint32_t room = (227 * 1024 - kOther) / kStageBytes;
  args.stages = std::min({args.steps, kMaxStages, room});
  const uint32_t bytes = args.stages * kStageBytes + kOther;
  skinny::launch(
      context,
      grad_kernel<T, kGroups, kRanks>,
      tiles,
      128 * kGroups + 32,
      bytes,
      1,
      args,
      "lora_grad");
}

template <typename T, uint32_t kGroups>
void launch_grads(const Context& context, GradArgs& args, uint32_t tiles, uint32_t box_ranks) {
  if (box_ranks == 16) return launch_grads<T, kGroups, 16>(context, args, tiles);
  if (box_ranks == 32) return launch_grads<T, kGroups, 32>(context, args, tiles);
  launch_grads<T, kGroups, 64>(context, args, tiles);
}

template <typename T>
void launch_grads(
    const Context& context, GradArgs& args, uint32_t tiles, int groups, uint32_t box_ranks) {
  groups == 1 ? launch_grads<T, 1>(context, args, tiles, box_ranks)
              : launch_grads<T, 2>(context, args, tiles, box_ranks);
}

}  // namespace
}  // namespace sm90

bool can_grad_sm90(
    const Context& context, uint32_t m, DType large_dtype, const AdapterGrad* grads, size_t count) {
  if (context.capability != 90 || large_dtype == DType::f32 || m == 0 || m > kFewGradTokens ||
      count > sm90::kMaxGrads) {
    return false;
  }
  return std::all_of(grads, grads + count, [&](const AdapterGrad& g) {
    return g.grad != nullptr && g.small_dtype == large_dtype && g.dropout <= 0.0f && g.rank > 0 &&
           g.rank <= sm90::kMaxRank && g.columns > 0 && is_aligned(g.large) &&
           is_aligned(g.small) && g.large_stride % 8 == 0 && g.small_stride % 8 == 0;
  });
}

void lora_grad_sm90(
    const Context& context,
    uint32_t m,
    DType large_dtype,
    const AdapterGrad* grads,
    size_t count,
    bool read_early) {
  if (!can_grad_sm90(context, m, large_dtype, grads, count)) {
    throw std::invalid_argument(
        "[lora_grad_sm90] products must be what can_grad_sm90 takes, but are not");
  }
  sm90::GradArgs args;
  args.steps = sm90::ceil_div(m, sm90::kTokens);
  // A block's columns: as few as still find room at once.
  int groups = 1;
  uint32_t tiles = 0, box_ranks = 16;  // a swizzled box has 16, 32 or 64 columns
  const auto count_tiles = [&] {
    tiles = 0;
    for (size_t i = 0; i < count; ++i) {
      tiles += sm90::ceil_div(grads[i].columns, 64 * groups);
      args.grad[i].end_tile = tiles;
    }
  };
  count_tiles();
  if (tiles > static_cast<uint32_t>(context.multiprocessors)) groups = 2;
  count_tiles();
  for (size_t i = 0; i < count; ++i) {
    while (box_ranks < grads[i].rank) box_ranks *= 2;
  }
  for (size_t i = 0; i < count; ++i) {
    const AdapterGrad& from = grads[i];
    sm90::Grad& to = args.grad[i];
    to.large = make_tensor_map(
        {from.large, large_dtype, m, from.columns, from.large_stride, sm90::kTokens});
    to.small = make_tensor_map(
        {from.small, large_dtype, m, from.rank, from.small_stride, sm90::kTokens, box_ranks});
    to.grad = from.grad;
    to.columns = from.columns;
    to.rank = from.rank;
    to.factor = from.factor;
    to.transposed = from.transposed;
    to.pairs = from.transposed && from.rank % 2 == 0 && is_aligned(from.grad, 8);
    to.large_early = read_early;
    to.small_early = read_early && !from.small_is_new;
  }
  large_dtype == DType::bf16 ? sm90::launch_grads<bf16>(context, args, tiles, groups, box_ranks)
                             : sm90::launch_grads<f16>(context, args, tiles, groups, box_ranks);
}

}  // namespace metal_lora::cuda
