// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Gradients of adapters, largeᵀ·small over the tokens: bound by reading `large`, which is read once
// for all products that share it (dA of q, k and v: x). A block takes 128 columns of large and a
// share of the tokens through a cp.async pipeline and multiplies their transpose on the tensor
// cores; one grid runs over the tiles of all products. Where those are few, the blocks of a
// cluster share the tokens and add up through each other's shared memory: one launch, a fixed
// order, no scratch. A 32-bit `small` goes in as two 16-bit numbers, high and low, so that nothing
// of it is lost that the sum could show (2⁻¹⁸ of a value).
//   ladder (H100, bf16, m = 4096, rank 16; all 14 products of a layer of 4096 and 11008 columns,
//   479 MB: reading them alone 174 us; one product of 4096 columns: 12.2 us)
//     addresses worked out for each copy   layer 214.4 us, one 25.4; 32-bit small 297.0, 33.1
//     ... once                             layer 189.1 (92 %), one 17.6 (69 %); 204.7, 21.3
//     32-bit small split once a block      layer 200.2 (87 %), one 20.7
//   Up to kFewGradTokens tokens Hopper takes lora_grad_sm90.cu where small is of 16 bits.
//   One product alone is bound by the start and end of its few blocks (32 tiles, four to share the
//   tokens of each); the next 10 % would take the copy engine, as in lora_shrink_sm90.cu. Rank 64
//   from a 32-bit small: 38 us, twice the products and two stages instead of four.
#include <algorithm>

#include "kernels/cuda/lora_grad_sm90.h"
#include "kernels/cuda/lora_train.cuh"

namespace metal_lora::cuda {
namespace {

using namespace grads;

constexpr uint32_t kColumns = 128;  ///< of large, of a block
constexpr uint32_t kTokens = 64;    ///< of a stage
constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarpTokens = 32;       ///< of a stage: four warps over columns, two over tokens
constexpr uint32_t kPitch = kColumns + 4;  ///< partial sums [ranks][columns]
constexpr uint32_t kPartialBytes = 2 * kRanks * kPitch * 4;
constexpr uint32_t kLargeBytes = kTokens * kColumns * 2;

// ---- tensor cores ----

/// Shared memory for `pairs` sixteens of ranks: stages of large [tokens][128], small and dropout's
/// keys, then, of a 32-bit small, the high and low parts of one stage as the products read them.
/// Rows of small: 16-bit 128 bytes, chunks exchanged; 32-bit and its parts padded by 16 bytes.
template <typename Small>
struct Layout {
  static constexpr bool kWide = sizeof(Small) == 4;
  uint32_t pairs;
  __host__ __device__ uint32_t small_pitch() const { return kWide ? pairs * 64 + 16 : kRanks * 2; }
  __host__ __device__ uint32_t keys() const { return kLargeBytes + kTokens * small_pitch(); }
  __host__ __device__ uint32_t stage() const { return keys() + kTokens * 8; }
  __host__ __device__ uint32_t part_pitch() const { return pairs * 32 + 16; }
  __host__ __device__ uint32_t part() const { return kTokens * part_pitch(); }  ///< high or low
  __host__ __device__ uint32_t bytes(uint32_t stages) const {
    return stages * stage() + (kWide ? 2 * part() : 0);
  }
};

/// A thread's chunks of a stage element by element, where they are not aligned.
template <typename T>
__device__ __noinline__ void load_elements(
    char* to,
    uint32_t to_step,
    const T* from,
    size_t from_step,
    uint32_t tokens,
    uint32_t first,
    uint32_t turn,
    uint32_t count,
    bool wanted) {
  if (!wanted) return;
  constexpr uint32_t kEach = Vec16<T>::kCount;
  for (uint32_t t = first; t < kTokens; t += turn, to += to_step, from += from_step) {
    Vec16<T> v;
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      v.v[i] = i < count && t < tokens ? from[i] : from_float<T>(0.0f);
    }
    store16(reinterpret_cast<T*>(to), v);
  }
}

/// The copies of a block, 16 bytes a thread and turn: a thread keeps its column and goes down the
/// tokens, so that a stage costs a few instructions a copy. Stages are large [tokens][128], 16-byte
/// chunks exchanged within 128 bytes against bank conflicts; the rest as Layout says.
template <typename Large, typename Small, bool kDrop>
class Loader {
 public:
  static constexpr uint32_t kEach = 16 / sizeof(Small), kSmallPerToken = kRanks / kEach;
  static constexpr uint32_t kLargeRows = kThreads / 16, kSmallRows = kThreads / kSmallPerToken;

  __device__ Loader(const Args& args, const Place& place)
      : group_(args.group[place.group]), m_(args.m), layout_{args.pairs} {
    const uint32_t c = threadIdx.x % 16, t = threadIdx.x / 16, column = place.column0 + c * 8;
    large_count_ = column < group_.columns ? min(8u, group_.columns - column) : 0;
    large_ = static_cast<const Large*>(group_.large) + t * group_.large_stride +
             (large_count_ ? column : 0);
    large_to_ = t * (kColumns * 2) + ((c ^ (t & 7)) << 4);

    const uint32_t sc = threadIdx.x % kSmallPerToken, st = threadIdx.x / kSmallPerToken;
    const uint32_t rank = place.rank0 + sc * kEach;
    small_ = static_cast<const Small*>(group_.large);
    // A sixteen of ranks that has any is wanted whole.
    small_wanted_ = sc * kEach < ((min(kRanks, group_.ranks - place.rank0) + 15) & ~15u);
    if (const Part* part = part_of(args, group_, rank)) {
      small_stride_ = part->small_stride;
      small_count_ = min(kEach, part->rank - (rank - part->first));
      small_ = static_cast<const Small*>(part->small) + size_t{st} * small_stride_ +
               (rank - part->first);
    }
    small_to_ = kLargeBytes + st * layout_.small_pitch() +
                ((Layout<Small>::kWide ? sc : sc ^ (st & 7)) << 4);
  }

  __device__ __forceinline__ void load(char* stage, uint32_t token0) {
    if constexpr (kDrop) {
      auto* keys = reinterpret_cast<DropKey*>(stage + layout_.keys());
      if (threadIdx.x < kTokens) keys[threadIdx.x] = drop_key(group_.mask, token0 + threadIdx.x);
    }
    const uint32_t turn = kSmallRows * layout_.small_pitch();
    if (!group_.large_vectors || !group_.small_vectors) {
      load_elements<Large>(
          stage + large_to_,
          kLargeRows * kColumns * 2,
          large_ + token0 * group_.large_stride,
          kLargeRows * group_.large_stride,
          m_ - token0,
          threadIdx.x / 16,
          kLargeRows,
          large_count_,
          true);
      load_elements<Small>(
          stage + small_to_,
          turn,
          small_ + size_t{token0} * small_stride_,
          size_t{kSmallRows} * small_stride_,
          m_ - token0,
          threadIdx.x / kSmallPerToken,
          kSmallRows,
          small_count_,
          small_wanted_);
      return;
    }
    const uint32_t to = shared_address(stage);
    const Large* large = large_ + token0 * group_.large_stride;
    const uint32_t left = m_ - token0;  // 1 or more
#pragma unroll
    for (uint32_t i = 0; i < kTokens / kLargeRows; ++i) {
      const bool here = threadIdx.x / 16 + i * kLargeRows < left;
      mma::copy_async<16>(
          to + large_to_ + i * kLargeRows * kColumns * 2, large, here ? large_count_ * 2 : 0);
      large += kLargeRows * group_.large_stride;
    }
    if (!small_wanted_) return;
    const Small* small = small_ + size_t{token0} * small_stride_;
#pragma unroll
    for (uint32_t i = 0; i < kTokens / kSmallRows; ++i) {
      const bool here = threadIdx.x / kSmallPerToken + i * kSmallRows < left;
      mma::copy_async<16>(
          to + small_to_ + i * turn, small, here ? small_count_ * sizeof(Small) : 0);
      small += size_t{kSmallRows} * small_stride_;
    }
  }

 private:
  const Group& group_;
  const uint32_t m_;
  const Layout<Small> layout_;
  const Large* large_;
  const Small* small_;
  uint32_t large_count_ = 0, small_count_ = 0, small_stride_ = 0;
  uint32_t large_to_, small_to_;
  bool small_wanted_;
};

__device__ __forceinline__ uint32_t pack(bf16 low, bf16 high) {
  return uint32_t{__bfloat16_as_ushort(low)} | uint32_t{__bfloat16_as_ushort(high)} << 16;
}

/// Two f32 as a pair of bf16 and the pair of what that leaves.
__device__ __forceinline__ void split_pair(
    float first, float second, uint32_t* high, uint32_t* low) {
  const bf16 a = from_float<bf16>(first), b = from_float<bf16>(second);
  *high = pack(a, b);
  *low = pack(from_float<bf16>(first - to_float(a)), from_float<bf16>(second - to_float(b)));
}

/// A stage's small, 32-bit, to its high and low parts: a thread a quarter of a token's ranks.
template <typename Small>
__device__ __forceinline__ void split_stage(
    const Layout<Small>& layout, const char* stage, char* high, uint32_t pairs) {
  const uint32_t t = threadIdx.x / 4, part = threadIdx.x % 4;
  const char* from = stage + kLargeBytes + t * layout.small_pitch() + part * 16;
  char* to = high + t * layout.part_pitch() + part * 8;
#pragma unroll
  for (uint32_t i = 0; i < kRanks / 16; ++i) {
    if (i >= pairs) break;
    const float4 v = *reinterpret_cast<const float4*>(from + i * 64);
    uint2 upper, lower;
    split_pair(v.x, v.y, &upper.x, &lower.x);
    split_pair(v.z, v.w, &upper.y, &lower.y);
    *reinterpret_cast<uint2*>(to + i * 32) = upper;
    *reinterpret_cast<uint2*>(to + layout.part() + i * 32) = lower;
  }
}

/// Clears the dropped elements of a fragment of largeᵀ: rows are columns c and c + 8.
__device__ __forceinline__ void drop_fragment(
    uint32_t (&a)[4], const DropKey* keys, uint32_t column, const DropMask& mask) {
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t c = column + (i & 1) * 8;
    const DropKey* key = keys + (i & 2) * 4;
    uint32_t bits = drop_keeps(mask, key[0], c) ? 0x0000ffffu : 0;
    if (drop_keeps(mask, key[1], c)) bits |= 0xffff0000u;
    a[i] &= bits;
  }
}

/// One stage of one warp: 32 columns, kPairs sixteens of ranks, 32 tokens. small: the stage's, or
/// its high and low parts.
template <typename Large, typename Small, bool kDrop, uint32_t kPairs>
__device__ __forceinline__ void add_stage(
    const Layout<Small>& layout,
    const char* stage,
    const char* small,
    uint32_t column_in_group,
    const DropMask& mask,
    float (&sums)[2][8][4]) {
  constexpr bool kSplit = sizeof(Small) == 4, kSplitLarge = kSplit && std::is_same_v<Large, f16>;
  using Operand = std::conditional_t<kSplit, bf16, Large>;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t column0 = warp % 4 * 32, token_warp = warp / 4 * kWarpTokens;
  const uint32_t large = shared_address(stage);
#pragma unroll
  for (uint32_t step = 0; step < kWarpTokens / 16; ++step) {
    const uint32_t t0 = token_warp + step * 16;
    uint32_t a[2][4], a_low[kSplitLarge ? 2 : 1][4];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t t = t0 + (lane & 7) + ((lane >> 4) << 3);
      const uint32_t c = (column0 + i * 16) / 8 + ((lane >> 3) & 1);
      mma::load_x4_across(a[i], large + t * (kColumns * 2) + ((c ^ (t & 7)) << 4));
      if constexpr (kDrop) {
        const auto* keys =
            reinterpret_cast<const DropKey*>(stage + layout.keys()) + t0 + (lane & 3) * 2;
        drop_fragment(a[i], keys, column_in_group + i * 16 + lane / 4, mask);
      }
      if constexpr (kSplitLarge) {
        // f16 has 11 bits where bf16 has 8: two bf16 hold it exactly, at any exponent.
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          const float2 v = __half22float2(reinterpret_cast<const __half2&>(a[i][j]));
          split_pair(v.x, v.y, &a[i][j], &a_low[i][j]);
        }
      }
    }
#pragma unroll
    for (uint32_t pair = 0; pair < kPairs; ++pair) {
      uint32_t b[4];
      if constexpr (!kSplit) {
        const uint32_t t = t0 + (lane & 15), c = pair * 2 + (lane >> 4);
        mma::load_x4_across(b, shared_address(small) + t * (kRanks * 2) + ((c ^ (t & 7)) << 4));
      } else {
        uint32_t b_low[4];
        const uint32_t at = shared_address(small) + (t0 + (lane & 15)) * layout.part_pitch() +
                            (pair * 2 + (lane >> 4)) * 16;
        mma::load_x4_across(b, at);
        mma::load_x4_across(b_low, at + layout.part());
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          mma::multiply<Operand>(sums[i][2 * pair], a[i], b_low[0], b_low[1]);
          mma::multiply<Operand>(sums[i][2 * pair + 1], a[i], b_low[2], b_low[3]);
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        if constexpr (kSplitLarge) {
          mma::multiply<Operand>(sums[i][2 * pair], a_low[i], b[0], b[1]);
          mma::multiply<Operand>(sums[i][2 * pair + 1], a_low[i], b[2], b[3]);
        }
        mma::multiply<Operand>(sums[i][2 * pair], a[i], b[0], b[1]);
        mma::multiply<Operand>(sums[i][2 * pair + 1], a[i], b[2], b[3]);
      }
    }
  }
}

template <typename Large, typename Small, bool kDrop>
__global__ void __launch_bounds__(kThreads, 2) grad_kernel(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) char memory[];
  allow_dependents();
  const Place place = place_of(args, kColumns);
  const Group& group = args.group[place.group];
  char* stages = memory;
  const Layout<Small> layout{args.pairs};
  Loader<Large, Small, kDrop> loader(args, place);
  float sums[2][8][4] = {};
  const uint32_t steps = (args.m + kTokens - 1) / kTokens;
  const uint32_t first = place.split * steps / args.splits;
  const uint32_t count = (place.split + 1) * steps / args.splits - first;
  const auto load = [&](uint32_t stage, uint32_t step) {
    loader.load(stages + stage * layout.stage(), (first + step) * kTokens);
  };
  wait_for_previous();
  __syncthreads();
  for (uint32_t s = 0; s < args.stages - 1; ++s) {
    if (s < count) load(s, s);
    mma::copies_commit();
  }
  uint32_t stage = 0, next = args.stages - 1;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t pairs = (min(kRanks, group.ranks - place.rank0) + 15) / 16;
  for (uint32_t s = 0; s < count; ++s) {
    copies_wait(args.stages - 2);
    __syncthreads();
    if (s + args.stages - 1 < count) load(next, s + args.stages - 1);
    mma::copies_commit();
    const char* here = stages + stage * layout.stage();
    const char* small = here + kLargeBytes;
    if constexpr (Layout<Small>::kWide) {
      char* high = stages + args.stages * layout.stage();
      split_stage(layout, here, high, pairs);
      small = high;
      __syncthreads();
    }
    const uint32_t column = place.column0 + warp % 4 * 32;
    switch (pairs) {
      case 1:
        add_stage<Large, Small, kDrop, 1>(layout, here, small, column, group.mask, sums);
        break;
      case 2:
        add_stage<Large, Small, kDrop, 2>(layout, here, small, column, group.mask, sums);
        break;
      case 3:
        add_stage<Large, Small, kDrop, 3>(layout, here, small, column, group.mask, sums);
        break;
      default:
        add_stage<Large, Small, kDrop, 4>(layout, here, small, column, group.mask, sums);
    }
    next = stage;
    if (++stage == args.stages) stage = 0;
  }
  copies_wait(0);
  __syncthreads();

  auto* partial = reinterpret_cast<float*>(stages);
  float* mine = partial + (warp / 4 * kRanks + lane % 4 * 2) * kPitch + warp % 4 * 32 + lane / 4;
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
    for (uint32_t n = 0; n < 8; ++n) {
      float* at = mine + n * 8 * kPitch + i * 16;
      at[0] = sums[i][n][0];
      at[kPitch] = sums[i][n][1];
      at[8] = sums[i][n][2];
      at[kPitch + 8] = sums[i][n][3];
    }
  }
  finish<kColumns, kPitch>(args, place, partial, 2);
}

// ---- the host's side ----

static_assert(sizeof(Args) <= 4096, "kernel parameters");
static_assert(kRanks == kExactTile);

constexpr uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}
uint32_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}
uint32_t padded(uint32_t rank) {
  return ceil_div(rank, 8) * 8;
}

/// Which kernel a product takes; a launch is of one of them.
struct Form {
  bool exact = false, wide_small = false, drop = false;
  bool operator==(const Form&) const = default;
};
Form form_of(DType large_dtype, const AdapterGrad& grad) {
  Form form;
  form.wide_small = grad.small_dtype == DType::f32;
  form.exact = large_dtype == DType::f32 || (!form.wide_small && grad.small_dtype != large_dtype);
  form.drop = grad.dropout > 0.0f;
  return form;
}

/// Whether `grad` may join a group: the same large, nothing dropped, room for its ranks. Results
/// that are contiguous along the same side stay together.
bool joins(const Args& args, const Group& group, const AdapterGrad& grad) {
  return group.large == grad.large && group.large_stride == grad.large_stride &&
         group.columns == grad.columns && !group.drop && grad.dropout <= 0.0f &&
         group.small_dtype == grad.small_dtype && group.parts < kMaxParts &&
         args.part[group.first_part].transposed == grad.transposed &&
         group.ranks + padded(grad.rank) <= kRanks;
}

void add(Args& args, const AdapterGrad& grad) {
  Group* group = args.groups > 0 ? &args.group[args.groups - 1] : nullptr;
  if (!group || !joins(args, *group, grad)) {
    const auto next = static_cast<uint16_t>(args.used_parts());
    group = &args.group[args.groups++];
    group->first_part = next;
    group->large = grad.large;
    group->large_stride = grad.large_stride;
    group->columns = grad.columns;
    group->large_vectors = is_aligned(grad.large) && grad.large_stride % 8 == 0;
    group->small_vectors = true;
    group->small_dtype = grad.small_dtype;
    group->drop = grad.dropout > 0.0f;
    group->mask = DropMask(grad.dropout, grad.dropout_seed);
  }
  Part& part = args.part[group->first_part + group->parts++];
  part.small = grad.small;
  part.small_stride = static_cast<uint32_t>(grad.small_stride);
  part.rank = grad.rank;
  part.first = group->ranks;
  part.factor = grad.factor * group->mask.keep_scale;
  part.grad = grad.grad;
  part.transposed = grad.transposed;
  group->ranks += padded(grad.rank);
  group->small_vectors = group->small_vectors && is_aligned(grad.small) &&
                         grad.small_stride * size_of(grad.small_dtype) % 16 == 0;
}

template <typename Large, typename Small, bool kDrop>
void launch_grads(const Context& context, Args& args) {
  const uint32_t tiles = count_tiles(args, kColumns);
  args.splits = splits_for(context, tiles, ceil_div(args.m, kTokens));
  args.pairs = 1;
  for (uint32_t g = 0; g < args.groups; ++g) {
    args.pairs = std::max(args.pairs, ceil_div(std::min(kRanks, args.group[g].ranks), 16));
  }
  // Two blocks on a multiprocessor.
  const Layout<Small> layout{args.pairs};
  const uint32_t limit = shared_limit(context);
  const uint32_t per_block = std::max(limit / 2, 99u * 1024) - 1024;
  args.stages = 4;
  while (args.stages > 2 && layout.bytes(args.stages) > per_block) --args.stages;
  const uint32_t shared = std::max(layout.bytes(args.stages), kPartialBytes);
  launch(
      context,
      grad_kernel<Large, Small, kDrop>,
      tiles * args.splits,
      kThreads,
      shared,
      args.splits,
      args,
      "lora_grad");
}

template <typename Large>
void launch_form(const Context& context, const Form& form, Args& args) {
  if (form.drop) {
    return form.wide_small ? launch_grads<Large, float, true>(context, args)
                           : launch_grads<Large, Large, true>(context, args);
  }
  form.wide_small ? launch_grads<Large, float, false>(context, args)
                  : launch_grads<Large, Large, false>(context, args);
}

void launch_form(const Context& context, const Form& form, Args& args) {
  if (!form.exact) {
    return args.large_dtype == DType::bf16 ? launch_form<bf16>(context, form, args)
                                           : launch_form<f16>(context, form, args);
  }
  grad_exact(context, args);
}

}  // namespace

void lora_grad(
    const Context& context,
    uint32_t m,
    DType large_dtype,
    const AdapterGrad* grads,
    size_t count,
    bool read_early) {
  if (count > kMaxGrads) {
    throw std::invalid_argument(
        "[lora_grad] count must be at most 16 but is " + std::to_string(count));
  }
  if (count > 0 && can_grad_sm90(context, m, large_dtype, grads, count)) {
    return lora_grad_sm90(context, m, large_dtype, grads, count, read_early);
  }
  const auto empty = [](const AdapterGrad& g) { return g.rank == 0 || g.columns == 0 || !g.grad; };
  bool done[kMaxGrads] = {};
  for (size_t first = 0; first < count; ++first) {
    if (done[first] || empty(grads[first])) continue;
    // All of the same form in one launch; of those, what shares `large` one after the other.
    const Form form = form_of(large_dtype, grads[first]);
    Args args;
    args.m = m;
    args.large_dtype = large_dtype;
    for (size_t i = first; i < count; ++i) {
      if (done[i] || empty(grads[i]) || !(form_of(large_dtype, grads[i]) == form)) continue;
      for (size_t j = i; j < count; ++j) {
        if (done[j] || empty(grads[j]) || grads[j].large != grads[i].large ||
            grads[j].transposed != grads[i].transposed ||
            !(form_of(large_dtype, grads[j]) == form)) {
          continue;
        }
        add(args, grads[j]);
        done[j] = true;
      }
    }
    launch_form(context, form, args);
  }
}

}  // namespace metal_lora::cuda
