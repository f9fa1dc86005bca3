// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// v = s·dy·B and dB = dyᵀ·u in one read of dy, which bounds both: v is what dx and dA wait for, dB
// would read all of dy again when it is no longer in the second-level cache. A block takes a strip
// of columns and a share of the tokens; eight warps multiply what one lane lets the copy engine
// bring, once as it lies (v: the warps share the tile's columns by four) and once transposed (dB:
// each has columns of its own). dB stays in registers until the block's tokens are over; v leaves
// stage by stage. A second kernel adds up what the blocks have of both, in a fixed order.
//
// Ladder (H100, bf16, 4096 tokens, rank 16, gate and up of 8192 columns each: 134 MB, 46 us at the
// speed of a copy; caches cold, us):
//   two shrinks, then dB among the layer's gradients                57 + 66
//   this kernel 53 (87 % of a copy), its sums 9; the sums' launch hides behind the product
//   q, k and v (25 MB): three shrinks 28 and 10 of gradients; this 15 and 7
// The next 10 %: sums through the shared memory of a cluster instead of 12 MB through L2.
#include <algorithm>
#include <span>

#include "kernels/cuda/lora_kernels.h"
#include "kernels/cuda/skinny.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kMaxLinears = 4;
constexpr uint32_t kTokens = 32;  ///< of a stage
constexpr uint32_t kWarps = 8;
constexpr uint32_t kThreads = 32 * (kWarps + 1);      ///< the last warp asks the copy engine
constexpr uint32_t kWarpColumns = 64;                 ///< of dB
constexpr uint32_t kColumns = kWarps * kWarpColumns;  ///< of a strip
constexpr uint32_t kQuarters = kWarps / 2;            ///< of a strip's columns, for v
constexpr uint32_t kMaxRank = 32;
/// Of both sums. At ranks beyond 32 v's would be half as many bytes as dy itself.
constexpr size_t kMaxSumBytes = size_t{48} << 20;
constexpr uint32_t kSumThreads = 256;

/// kPairs: sixteens of ranks.
template <uint32_t kPairs>
struct Shape {
  static constexpr uint32_t kRanks = 16 * kPairs;
  static constexpr uint32_t kDyBytes = kTokens * kColumns * 2;  ///< [columns / 64][tokens][64]
  static constexpr uint32_t kPairBytes = kTokens * 32;          ///< of u: [tokens][16]
  static constexpr uint32_t kStageBytes = kDyBytes + kPairs * kPairBytes;
  /// A stage's v: [quarters][tokens][pitch], twice, where B comes in before.
  static constexpr uint32_t kPitch = kRanks + 4;
  static constexpr uint32_t kSumBytes = kQuarters * kTokens * kPitch * 4;
  static constexpr uint32_t kBBytes = kColumns * 32 * kPairs;  ///< [pairs][columns][16]
  static constexpr uint32_t kStagesAt = 2 * kSumBytes;
  static constexpr uint32_t kStages = (226 * 1024 - 256 - kStagesAt) / kStageBytes;
  static constexpr uint32_t kBarriersAt = kStagesAt + kStages * kStageBytes;
  static constexpr uint32_t kBytes = kBarriersAt + (2 * kStages + 1) * 8 + 1024;  // alignment
  static_assert(kBBytes <= kStagesAt && kStagesAt % 1024 == 0 && kBytes <= 227 * 1024);
};

struct Linear {
  CUtensorMap dy, b, u;
  uint32_t end_strip = 0;
};
struct Args {
  Linear linear[kMaxLinears];
  uint32_t m = 0, strips = 0, splits = 1;
  float* v = nullptr;     ///< [strips][m][ranks]
  float* grad = nullptr;  ///< [splits][strips · columns][ranks]
};

/// Strip `strip` of all: whose, and its first column there.
struct Place {
  uint32_t linear = 0, column0;
  __device__ Place(const Args& args, uint32_t strip, uint32_t columns) {
    uint32_t before = 0;
    while (strip >= args.linear[linear].end_strip) before = args.linear[linear++].end_strip;
    column0 = (strip - before) * columns;
  }
};

template <uint32_t kPairs>
__device__ __forceinline__ void produce(
    const Args& args,
    const Place& place,
    uint32_t shared,
    uint32_t full,
    uint32_t empty,
    uint32_t b_ready,
    uint32_t first,
    uint32_t count) {
  using S = Shape<kPairs>;
  const Linear& linear = args.linear[place.linear];
  sm90::barrier_expect(b_ready, S::kBBytes);
  for (uint32_t i = 0; i < kPairs * kColumns / 256; ++i) {
    const uint32_t pair = i / (kColumns / 256), row = i % (kColumns / 256) * 256;
    sm90::tensor_load(shared + i * 256 * 32, &linear.b, b_ready, pair * 16, place.column0 + row);
  }
  uint32_t stage = 0, parity = 1;
  for (uint32_t s = 0; s < count; ++s) {
    const uint32_t barrier = full + 8 * stage, token0 = (first + s) * kTokens;
    const uint32_t to = shared + S::kStagesAt + stage * S::kStageBytes;
    sm90::barrier_wait(empty + 8 * stage, parity);
    sm90::barrier_expect(barrier, S::kStageBytes);
    sm90::tensor_load_blocks(to, &linear.dy, barrier, token0, place.column0 / 64);
    for (uint32_t pair = 0; pair < kPairs; ++pair) {
      const uint32_t u = to + S::kDyBytes + pair * S::kPairBytes;
      sm90::tensor_load(u, &linear.u, barrier, pair * 16, token0);
    }
    if (++stage == S::kStages) stage = 0, parity ^= 1;
  }
}

/// Where this lane's row of a [rows][16] box of 32-byte swizzled rows lies, for load_x4_across of
/// rows row0 … row0 + 15.
__device__ __forceinline__ uint32_t narrow_place(uint32_t row0) {
  const uint32_t lane = threadIdx.x % 32, row = row0 + lane % 16, half = lane / 16;
  return row * 32 + ((half ^ (row / 4 & 1)) << 4);
}
/// The same of a row and a chunk of 8 columns of [columns / 64][tokens][64].
__device__ __forceinline__ uint32_t wide_place(uint32_t row, uint32_t chunk) {
  return chunk / 8 * (kTokens * 128) + row * 128 + (((chunk ^ row) & 7) << 4);
}

template <typename T, uint32_t kPairs>
__device__ __forceinline__ void consume(
    const Args& args,
    const Place& place,
    uint32_t strip,
    uint32_t split,
    char* memory,
    uint32_t full,
    uint32_t empty,
    uint32_t b_ready,
    uint32_t first,
    uint32_t count) {
  using S = Shape<kPairs>;
  constexpr uint32_t kSteps = kColumns / kQuarters / 16, kTiles = kWarpColumns / 16;
  const uint32_t shared = mma::shared_address(memory);
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t rows16 = warp % 2 * 16, quarter = warp / 2;  // of v
  uint32_t b[kSteps][kPairs][4];
  sm90::barrier_wait(b_ready, 0);
#pragma unroll
  for (uint32_t step = 0; step < kSteps; ++step) {
#pragma unroll
    for (uint32_t pair = 0; pair < kPairs; ++pair) {
      const uint32_t at = shared + pair * kColumns * 32;
      mma::load_x4_across(b[step][pair], at + narrow_place((quarter * kSteps + step) * 16));
    }
  }
  sm90::named_barrier(1, 32 * kWarps);  // B's place takes sums now
  float grad[kTiles][2 * kPairs][4] = {};
  uint32_t stage = 0, parity = 0;
  for (uint32_t s = 0; s < count; ++s) {
    const uint32_t dy = shared + S::kStagesAt + stage * S::kStageBytes, u = dy + S::kDyBytes;
    sm90::barrier_wait(full + 8 * stage, parity);
    float v[2 * kPairs][4] = {};
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      mma::load_x4(
          a, dy + wide_place(rows16 + lane % 16, (quarter * kSteps + step) * 2 + lane / 16));
#pragma unroll
      for (uint32_t pair = 0; pair < kPairs; ++pair) {
        mma::multiply<T>(v[2 * pair], a, b[step][pair][0], b[step][pair][1]);
        mma::multiply<T>(v[2 * pair + 1], a, b[step][pair][2], b[step][pair][3]);
      }
    }
    auto* sums = reinterpret_cast<float*>(memory + s % 2 * S::kSumBytes);
    float* mine = sums + (quarter * kTokens + rows16 + lane / 4) * S::kPitch + lane % 4 * 2;
#pragma unroll
    for (uint32_t j = 0; j < 2 * kPairs; ++j) {
      *reinterpret_cast<float2*>(mine + 8 * j) = make_float2(v[j][0], v[j][1]);
      *reinterpret_cast<float2*>(mine + 8 * S::kPitch + 8 * j) = make_float2(v[j][2], v[j][3]);
    }
#pragma unroll
    for (uint32_t step = 0; step < kTokens / 16; ++step) {
      uint32_t small[kPairs][4];
#pragma unroll
      for (uint32_t pair = 0; pair < kPairs; ++pair) {
        mma::load_x4_across(small[pair], u + pair * S::kPairBytes + narrow_place(step * 16));
      }
#pragma unroll
      for (uint32_t i = 0; i < kTiles; ++i) {
        uint32_t a[4];
        const uint32_t row = step * 16 + lane % 8 + lane / 16 * 8;
        mma::load_x4_across(a, dy + wide_place(row, (warp * kTiles + i) * 2 + lane / 8 % 2));
#pragma unroll
        for (uint32_t pair = 0; pair < kPairs; ++pair) {
          mma::multiply<T>(grad[i][2 * pair], a, small[pair][0], small[pair][1]);
          mma::multiply<T>(grad[i][2 * pair + 1], a, small[pair][2], small[pair][3]);
        }
      }
    }
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(empty + 8 * stage);
    if (++stage == S::kStages) stage = 0, parity ^= 1;
    sm90::named_barrier(1, 32 * kWarps);  // of the sums; those two stages ago are read
#pragma unroll
    for (uint32_t i = threadIdx.x; i < kTokens * S::kRanks / 4; i += 32 * kWarps) {
      const uint32_t row = i / (S::kRanks / 4), rank = i % (S::kRanks / 4) * 4;
      const float* from = sums + row * S::kPitch + rank;
      float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll
      for (uint32_t q = 1; q < kQuarters; ++q) {
        add_to(sum, *reinterpret_cast<const float4*>(from + q * kTokens * S::kPitch));
      }
      const size_t token = (first + s) * kTokens + row;
      if (token >= args.m) continue;
      *reinterpret_cast<float4*>(args.v + (strip * size_t{args.m} + token) * S::kRanks + rank) =
          sum;
    }
  }
  const size_t column = strip * kColumns + warp * kWarpColumns + lane / 4;
  float* to =
      args.grad + (split * size_t{args.strips} * kColumns + column) * S::kRanks + lane % 4 * 2;
#pragma unroll
  for (uint32_t i = 0; i < kTiles; ++i) {
#pragma unroll
    for (uint32_t j = 0; j < 2 * kPairs; ++j) {
      float* at = to + i * 16 * S::kRanks + 8 * j;
      *reinterpret_cast<float2*>(at) = make_float2(grad[i][j][0], grad[i][j][1]);
      *reinterpret_cast<float2*>(at + 8 * S::kRanks) = make_float2(grad[i][j][2], grad[i][j][3]);
    }
  }
}

template <typename T, uint32_t kPairs>
__global__ void __launch_bounds__(kThreads, 1)
    shrink_grad_kernel(const __grid_constant__ Args args) {
  using S = Shape<kPairs>;
  extern __shared__ char raw[];
  const uint32_t address = mma::shared_address(raw), shared = (address + 1023) & ~1023u;
  const uint32_t full = shared + S::kBarriersAt, empty = full + 8 * S::kStages;
  const uint32_t b_ready = empty + 8 * S::kStages;
  // Blocks side by side read the same tokens.
  const uint32_t strip = blockIdx.x % args.strips, split = blockIdx.x / args.strips;
  const Place place(args, strip, kColumns);
  const uint32_t steps = (args.m + kTokens - 1) / kTokens;
  const uint32_t first = split * steps / args.splits;
  const uint32_t count = (split + 1) * steps / args.splits - first;
  if (threadIdx.x == 0) {
    for (uint32_t s = 0; s < S::kStages; ++s) {
      sm90::barrier_init(full + 8 * s, 1);
      sm90::barrier_init(empty + 8 * s, kWarps);
    }
    sm90::barrier_init(b_ready, 1);
    sm90::barrier_init_fence();
  }
  __syncthreads();
  wait_for_previous();
  allow_dependents();  // after the wait: a product may begin on what was written before this kernel
  if (threadIdx.x / 32 == kWarps) {
    if (sm90::elect_lane()) {
      produce<kPairs>(args, place, shared, full, empty, b_ready, first, count);
    }
    return;
  }
  consume<T, kPairs>(
      args, place, strip, split, raw + (shared - address), full, empty, b_ready, first, count);
}

/// What the second kernel makes of the first one's sums, in fours along the ranks.
struct SumArgs {
  struct Linear {
    uint32_t rank = 0, padded_rank = 0;
    uint32_t first_strip = 0, strips = 0;
    uint32_t end_v = 0, end_grad = 0;  ///< fours of this linear and all before it
    float factor = 1.0f;
    void* v = nullptr;
    float* grad = nullptr;
  };
  Linear linear[kMaxLinears];
  uint32_t linears = 0, m = 0, splits = 1, ranks = 16;
  uint32_t columns = 0;  ///< of a strip
  size_t split_size = 0;
  const float* v = nullptr;
  const float* grad = nullptr;
};

/// The sum of `count` fours, `step` floats apart, in their order; loads in batches.
__device__ __forceinline__ float4 sum_fours(const float* from, size_t step, uint32_t count) {
  constexpr uint32_t kBatch = 8;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (uint32_t i = 0; i < count; i += kBatch) {
    float4 part[kBatch];
#pragma unroll
    for (uint32_t j = 0; j < kBatch; ++j) {
      part[j] = i + j < count ? __ldcg(reinterpret_cast<const float4*>(from + (i + j) * step))
                              : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (uint32_t j = 0; j < kBatch; ++j) add_to(sum, part[j]);
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ SumArgs args) {
  allow_dependents();  // its blocks are here after the first kernel's wait
  wait_for_previous();
  const uint32_t fours = args.ranks / 4, thread = blockIdx.x * kSumThreads + threadIdx.x;
  const uint32_t all_v = args.linear[args.linears - 1].end_v;
  const bool is_v = thread < all_v;
  const uint32_t at = is_v ? thread : thread - all_v;
  uint32_t l = 0, before = 0;
  while (l < args.linears) {
    const uint32_t end = is_v ? args.linear[l].end_v : args.linear[l].end_grad;
    if (at < end) break;
    before = end;
    ++l;
  }
  if (l == args.linears) return;
  const SumArgs::Linear& linear = args.linear[l];
  const uint32_t row = (at - before) / fours, rank = (at - before) % fours * 4;
  if (is_v) {
    if (rank >= linear.padded_rank) return;
    const size_t strip_size = size_t{args.m} * args.ranks;
    const float* from = args.v + linear.first_strip * strip_size + size_t{row} * args.ranks + rank;
    const float4 sum = sum_fours(from, strip_size, linear.strips);
    const float f = linear.factor;
    *reinterpret_cast<uint2*>(static_cast<T*>(linear.v) + size_t{row} * linear.padded_rank + rank) =
        make_uint2(mma::pack2<T>(f * sum.x, f * sum.y), mma::pack2<T>(f * sum.z, f * sum.w));
    return;
  }
  if (rank >= linear.rank) return;
  const size_t column = size_t{linear.first_strip} * args.columns + row;
  const float4 sum =
      sum_fours(args.grad + column * args.ranks + rank, args.split_size, args.splits);
  float* to = linear.grad + size_t{row} * linear.rank + rank;
  if (linear.rank % 4 == 0) {
    *reinterpret_cast<float4*>(to) = sum;
    return;
  }
  const float each[4] = {sum.x, sum.y, sum.z, sum.w};
  for (uint32_t i = 0; i < min(4u, linear.rank - rank); ++i) to[i] = each[i];
}

// ---- the host's side ----

constexpr uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}

uint32_t padded_ranks(std::span<const ShrinkGrad> linears) {
  uint32_t most = 0;
  for (const ShrinkGrad& l : linears) most = std::max(most, l.padded_rank);
  return most <= 16 ? 16 : 32;
}
/// One block on each multiprocessor, with two stages or more.
uint32_t splits_of(const Context& context, uint32_t m, uint32_t strips) {
  const auto room = static_cast<uint32_t>(context.multiprocessors);
  return std::clamp(room / strips, 1u, std::max(1u, ceil_div(m, kTokens) / 2));
}
size_t sum_bytes(const Context& context, uint32_t m, std::span<const ShrinkGrad> linears) {
  uint32_t strips = 0;
  for (const ShrinkGrad& l : linears) strips += ceil_div(l.n, kColumns);
  const size_t rows = m + size_t{splits_of(context, m, strips)} * kColumns;
  return strips * rows * padded_ranks(linears) * sizeof(float);
}

template <typename T, uint32_t kPairs>
void run(const Context& context, uint32_t m, DType dtype, std::span<const ShrinkGrad> linears) {
  using S = Shape<kPairs>;
  Args args;
  SumArgs sums;
  args.m = sums.m = m;
  sums.ranks = S::kRanks;
  sums.columns = kColumns;
  uint32_t end_v = 0, end_grad = 0;
  for (const ShrinkGrad& from : linears) {
    Linear& l = args.linear[sums.linears];
    SumArgs::Linear& sum = sums.linear[sums.linears++];
    TensorMapRequest dy{from.dy, dtype, m, from.n, from.dy_stride, kTokens};
    dy.box_blocks = kColumns / 64;
    l.dy = make_tensor_map(dy);
    l.b = make_tensor_map({from.b, dtype, from.n, from.padded_rank, from.padded_rank, 256, 16});
    l.u = make_tensor_map({from.u, dtype, m, from.padded_rank, from.u_stride, kTokens, 16});
    sum.first_strip = args.strips;
    sum.strips = ceil_div(from.n, kColumns);
    args.strips += sum.strips;
    l.end_strip = args.strips;
    sum.rank = from.rank;
    sum.padded_rank = from.padded_rank;
    sum.factor = from.factor;
    sum.v = from.v;
    sum.grad = from.grad_b;
    sum.end_v = end_v += m * (S::kRanks / 4);
    sum.end_grad = end_grad += from.n * (S::kRanks / 4);
  }
  args.splits = splits_of(context, m, args.strips);
  sums.splits = args.splits;
  sums.split_size = size_t{args.strips} * kColumns * S::kRanks;
  args.v = static_cast<float*>(
      context.scratch->take(size_t{args.strips} * m * S::kRanks * sizeof(float)));
  args.grad =
      static_cast<float*>(context.scratch->take(args.splits * sums.split_size * sizeof(float)));
  sums.v = args.v;
  sums.grad = args.grad;
  skinny::launch(
      context,
      shrink_grad_kernel<T, kPairs>,
      args.strips * args.splits,
      kThreads,
      S::kBytes,
      1,
      args,
      "lora_shrink_grad");
  skinny::launch(
      context,
      sum_kernel<T>,
      ceil_div(end_v + end_grad, kSumThreads),
      kSumThreads,
      0,
      1,
      sums,
      "lora_shrink_grad sums");
}

}  // namespace

bool can_shrink_grad(
    const Context& context, uint32_t m, DType dtype, std::span<const ShrinkGrad> linears) {
  if (context.capability != 90 || dtype == DType::f32 || m == 0) return false;
  if (linears.empty() || linears.size() > kMaxLinears) return false;
  const bool takes = std::all_of(linears.begin(), linears.end(), [](const ShrinkGrad& l) {
    return l.n > 0 && l.n % 64 == 0 && l.dy_stride % 8 == 0 && l.u_stride % 8 == 0 && l.rank > 0 &&
           l.padded_rank >= l.rank && l.padded_rank % 8 == 0 && l.padded_rank <= kMaxRank &&
           is_aligned(l.dy) && is_aligned(l.b) && is_aligned(l.u) && is_aligned(l.v) &&
           is_aligned(l.grad_b);
  });
  return takes && sum_bytes(context, m, linears) <= kMaxSumBytes;
}

void lora_shrink_grad(
    const Context& context, uint32_t m, DType dtype, std::span<const ShrinkGrad> linears) {
  if (!can_shrink_grad(context, m, dtype, linears)) {
    throw std::invalid_argument(
        "[lora_shrink_grad] linears must be 1 to 4 of 16 bits on compute capability 9.0, n a "
        "multiple of 64, rank 1 to 32, aligned to 16 bytes, and not too large for their sums");
  }
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    padded_ranks(linears) == 16 ? run<T, 1>(context, m, dtype, linears)
                                : run<T, 2>(context, m, dtype, linears);
  };
  dtype == DType::bf16 ? go(bf16{}) : go(f16{});
}

}  // namespace metal_lora::cuda
