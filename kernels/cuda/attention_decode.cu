// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Attention of a few queries over a long cache: its keys are split over the blocks ("flash
// decoding") and, within a block, over warps that stream their own tiles; the queries of all heads
// that share a kv head are the rows of one product. How many keys a block takes follows from the
// position alone, so that a position's sums always have the same order. The last block to finish
// adds the partial sums up. In a decode step the kernel rotates q and k and appends k and v itself,
// and what the cache holds is on its way before q is there: 512 keys stay in one block then, which
// has no partial sums.
//
// Ladder, H100, bf16, 1 query, 32/8 heads, dim 64, 1024 / 8192 / 32768 keys:
//   two launches                     6.7 / 15.1 / 32.7 us
//   the last block combines          6.6 / 13.2 / 30.5 us
//   eight warps a block              6.3 / 12.1 / 29.0 us (2.3 TB/s; a copy moves 2.4)
// An empty launch is 1.15 us, partial sums and their ticket are 1.4, adding them up 1.7; a cluster
// that combines through shared memory could save about 1.5. A decode step of 16 layers (1.07 B, 512
// keys) takes 1.155 ms with it, and 1.256 with rotation and append in a kernel of their own.
#include <algorithm>

#include "kernels/cuda/attention_partials.cuh"
#include "kernels/cuda/decode_parts.h"
#include "kernels/cuda/decode_rope.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace attention {
namespace {

/// A decode step's own rows, before rope, which are not in the cache yet: the kernel rotates q and
/// k and appends k and v to the cache. It then reads what is in the cache ahead of the wait.
struct Fresh {
  const void* k = nullptr;  ///< [q_tokens, kv_heads, head_dim]; null: all keys are in the cache
  const void* v = nullptr;
  const float* cos_sin = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  float eps = 0.0f;
};

/// What a block keeps in shared memory.
template <int kDim, bool kFresh>
struct Ring : Tile<kDim> {
  /// Of a warp. Two leave room on a multiprocessor for a block of the linear before.
  static constexpr int kStages = kFresh ? 2 : 3;
  static constexpr int kWarpBytes = kStages * 2 * Tile<kDim>::kBytes;
  /// Tiles of a block, below which more blocks do not pay; kFresh: they are there before q is.
  static constexpr int kLeast = kFresh ? kStages * Tile<kDim>::kWarps : 4;
  // Behind the rings: the step's keys and values as one more tile, then its queries.
  static constexpr int kFreshAt = Tile<kDim>::kWarps * kWarpBytes;
  static constexpr int kQueriesAt = kFreshAt + 2 * Tile<kDim>::kBytes;
  static constexpr size_t kSharedBytes = kFresh ? kQueriesAt + kRows * kDim * 2 : kFreshAt;
};

/// The keys of one block of rows that are in the cache and how they are cut.
struct Split {
  int first, last, chunk;
};
__device__ __forceinline__ int splits_used(const Split& s) {
  return max((s.last - s.first + s.chunk) / s.chunk, 1);
}
template <int kDim, bool kFresh>
__device__ Split split_keys(const Arguments& a, int offset, int row_block, int splits) {
  constexpr int kKeys = Tile<kDim>::kKeys;
  const int group = a.p.q_heads / a.p.kv_heads, tokens = a.p.q_tokens;
  const int begin = row_block * kRows / group;
  const int end = min((row_block * kRows + kRows - 1) / group, tokens - 1);
  int first = INT_MAX;
  for (int i = begin; i <= end; ++i) first = min(first, first_key(a, offset, i));
  Split s;
  s.last = kFresh ? offset - 1 : last_key(a, offset, end);
  s.first = min(first, s.last + 1) / kKeys * kKeys;
  const int share = (s.last + 1 - s.first + splits - 1) / splits;
  s.chunk = max((share + kKeys - 1) / kKeys, Ring<kDim, kFresh>::kLeast) * kKeys;
  return s;
}

template <int kDim>
__device__ __forceinline__ void load_keys(
    uint32_t tile, const uint16_t* from, size_t stride, int begin, int end, int head_dim) {
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile<kDim>::kKeys * kChunks / 32; ++i) {
    const int at = i * 32 + lane, row = at / kChunks, chunk = at % kChunks;
    const bool there = begin + row < end && chunk * 8 < head_dim;
    const uint16_t* source = there ? from + (begin + row) * stride + chunk * 8 : from;
    mma::copy_async<16>(tile_at<kDim>(tile, row, chunk), source, there ? 16 : 0);
  }
}

/// The scores of one warp's tile, softened, times its values.
template <typename T, int kDim>
__device__ __forceinline__ void add_tile(
    const uint32_t (&q)[kDim / 16][4],
    float (&o)[1][kDim / 8][4],
    RowState<1>& state,
    uint32_t keys,
    int key,
    float scale) {
  constexpr int kKeys = Tile<kDim>::kKeys;
  const uint32_t values = keys + Tile<kDim>::kBytes;
  float s[1][kKeys / 8][4] = {};
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t right[4];
      load_right_rows<kDim>(right, keys, 8 * n, d);
      mma::multiply<T>(s[0][n], q[d / 16], right[0], right[1]);
      mma::multiply<T>(s[0][n + 1], q[d / 16], right[2], right[3]);
    }
  }
  soften<true>(s, o, state, key, scale);
#pragma unroll
  for (int n = 0; n < kKeys; n += 16) {
    uint32_t left[4];
    pack_left<T>(left, s[0][n / 8], s[0][n / 8 + 1]);
#pragma unroll
    for (int d = 0; d < kDim / 8; d += 2) {
      uint32_t right[4];
      load_right_columns<kDim>(right, values, n, 8 * d);
      mma::multiply<T>(o[0][d], left, right[0], right[1]);
      mma::multiply<T>(o[0][d + 1], left, right[2], right[3]);
    }
  }
}

// ---- the step's own rows ----

/// The block's queries, rotated, into their tile; with_keys: the step's keys and values into
/// theirs.
template <typename T, int kDim>
__device__ __forceinline__ void take_fresh(
    const Arguments& a,
    const Fresh& fresh,
    uint32_t memory,
    int kv_head,
    int row_block,
    bool with_keys) {
  using Ring = Ring<kDim, true>;
  constexpr int kTogether = 2;
  const int warp = threadIdx.x / 32, tokens = a.p.q_tokens, head_dim = a.p.head_dim;
  const int group = a.p.q_heads / a.p.kv_heads, half = head_dim / 2;
  const int queries = min(tokens * group - row_block * kRows, kRows);
  const int rows = queries + (with_keys ? tokens : 0);
  const size_t kv_stride = static_cast<size_t>(a.p.kv_heads) * head_dim;
  const uint32_t keys = memory + Ring::kFreshAt;
  if (with_keys) {
    const auto* v = static_cast<const uint16_t*>(fresh.v) + kv_head * head_dim;
    const int chunks = head_dim / 8;
    // From the last thread down: the first warps have rows to rotate.
    for (int at = Ring::kThreads - 1 - threadIdx.x; at < tokens * chunks; at += Ring::kThreads) {
      const int row = at / chunks, chunk = at % chunks;
      mma::copy_async<16>(
          tile_at<kDim>(keys + Ring::kBytes, row, chunk), v + row * kv_stride + chunk * 8);
    }
    mma::copies_commit();
  }
#pragma unroll 1
  for (int base = warp; base < rows; base += kTogether * Ring::kWarps) {
    Rotation<kDim / 64> rotation[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int row = base + j * Ring::kWarps;
      if (row >= rows) continue;
      const bool is_q = row < queries;
      const int flat = row_block * kRows + row, token = is_q ? flat / group : row - queries;
      const T* from = is_q
                          ? static_cast<const T*>(a.q) + token * a.p.q_stride +
                                static_cast<size_t>(kv_head * group + flat % group) * head_dim
                          : static_cast<const T*>(fresh.k) + token * kv_stride + kv_head * head_dim;
      rotation[j].load(
          from,
          is_q ? fresh.q_norm : fresh.k_norm,
          fresh.cos_sin + static_cast<size_t>(token) * head_dim,
          half);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int row = base + j * Ring::kWarps;
      if (row >= rows) continue;
      const uint32_t tile = row < queries ? memory + Ring::kQueriesAt : keys;
      const int to = row < queries ? row : row - queries;
      rotation[j].store(fresh.eps, [&](int column, float value) {
        const T x = from_float<T>(value);
        asm volatile(
            "st.shared.u16 [%0], %1;\n" ::"r"(tile_at<kDim>(tile, to, column / 8) + column % 8 * 2),
            "h"(*reinterpret_cast<const uint16_t*>(&x))
            : "memory");
      });
    }
  }
}

/// The step's keys and values, from their tile into the cache.
template <int kDim>
__device__ __forceinline__ void append_fresh(
    const Arguments& a, uint32_t keys, int kv_head, int offset) {
  const int chunks = a.p.head_dim / 8, count = a.p.q_tokens * chunks;
  for (int at = threadIdx.x; at < 2 * count; at += Tile<kDim>::kThreads) {
    const bool is_k = at < count;
    const int row = (is_k ? at : at - count) / chunks, chunk = at % chunks;
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(tile_at<kDim>(keys + (is_k ? 0 : Tile<kDim>::kBytes), row, chunk)));
    auto* to = static_cast<uint16_t*>(const_cast<void*>(is_k ? a.k : a.v));
    to += (offset + row) * (is_k ? a.p.k_stride : a.p.v_stride);
    *reinterpret_cast<uint4*>(to + kv_head * a.p.head_dim + chunk * 8) = x;
  }
}

template <typename T, int kDim, bool kFresh>
__global__ void __launch_bounds__(Tile<kDim>::kThreads) decode_kernel(
    const __grid_constant__ Arguments a,
    const __grid_constant__ Fresh fresh,
    Partials partials,
    uint32_t* counters) {
  using Ring = Ring<kDim, kFresh>;
  constexpr int kWarps = Ring::kWarps, kStages = Ring::kStages;
  extern __shared__ __align__(1024) uint8_t memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head_dim = a.p.head_dim, group = a.p.q_heads / a.p.kv_heads;
  const int kv_head = blockIdx.y, row_block = blockIdx.z;
  const int rows = a.p.q_tokens * group;
  allow_dependents();
  if constexpr (!kFresh) wait_for_previous();
  const int offset = offset_of(a);
  const Split split = split_keys<kDim, kFresh>(a, offset, row_block, gridDim.x);
  const int begin = split.first + blockIdx.x * split.chunk;
  const int end = min(begin + split.chunk, split.last + 1);
  const int used = splits_used(split);
  if (static_cast<int>(blockIdx.x) >= used) return;
  const bool newest = kFresh && static_cast<int>(blockIdx.x) == used - 1;

  const auto* k = static_cast<const uint16_t*>(a.k) + kv_head * head_dim;
  const auto* v = static_cast<const uint16_t*>(a.v) + kv_head * head_dim;
  const uint32_t shared = mma::shared_address(memory);
  const uint32_t tiles = shared + warp * Ring::kWarpBytes;
  const auto load = [&](int step) {
    const int key = begin + (step * kWarps + warp) * Ring::kKeys;
    if (key < end) {
      const uint32_t to = tiles + step % kStages * 2 * Ring::kBytes;
      load_keys<kDim>(to, k, a.p.k_stride, key, end, head_dim);
      load_keys<kDim>(to + Ring::kBytes, v, a.p.v_stride, key, end, head_dim);
    }
    mma::copies_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages; ++step) load(step);

  uint32_t q[kDim / 16][4];
  RowState<1> state;
  if constexpr (kFresh) {
    // Rows and columns that are not there are zeros.
    auto* own = reinterpret_cast<uint4*>(memory + Ring::kFreshAt);
    constexpr int kOwn = (Ring::kSharedBytes - Ring::kFreshAt) / 16;
    for (int i = threadIdx.x; i < kOwn; i += Ring::kThreads) own[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    wait_for_previous();
    take_fresh<T, kDim>(a, fresh, shared, kv_head, row_block, newest);
    mma::copies_wait<0>();
    __syncthreads();
    if (newest && row_block == 0) append_fresh<kDim>(a, shared + Ring::kFreshAt, kv_head, offset);
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      load_left<kDim>(q[d], shared + Ring::kQueriesAt, 0, 16 * d);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int flat = row_block * kRows + lane / 4 + 8 * half;
    const int i = min(flat, rows - 1) / group;
    if constexpr (!kFresh) {
      const int head = kv_head * group + min(flat, rows - 1) % group;
      const auto* from = static_cast<const uint16_t*>(a.q) + i * a.p.q_stride +
                         static_cast<size_t>(head) * head_dim;
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = 16 * d + 8 * c + 2 * (lane % 4);
          q[d][2 * c + half] =
              column < head_dim ? *reinterpret_cast<const uint32_t*>(from + column) : 0u;
        }
      }
    }
    state.top[0][half] = -INFINITY, state.sum[0][half] = 0.0f;
    state.first[0][half] = first_key(a, offset, i);
    state.last[0][half] = min(last_key(a, offset, i), end - 1);
  }
  if (a.p.scale < 0.0f) {
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) negate(q[d]);
  }
  const float scale = fmaxf(fabsf(a.p.scale), 1e-30f) * kLog2e;
  float o[1][kDim / 8][4] = {};
  const int cached = (max(end - begin, 0) + Ring::kKeys - 1) / Ring::kKeys;
#pragma unroll 1
  for (int tile = warp, step = 0; tile < cached + newest; tile += kWarps, ++step) {
    const bool own = kFresh && tile == cached;
    const uint32_t at = own ? shared + Ring::kFreshAt : tiles + step % kStages * 2 * Ring::kBytes;
    mma::copies_wait<kStages - 1>();
    __syncwarp();
    if (own) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int flat = row_block * kRows + lane / 4 + 8 * half;
        state.last[0][half] = last_key(a, offset, min(flat, rows - 1) / group);
      }
    }
    add_tile<T, kDim>(q, o, state, at, own ? offset : begin + tile * Ring::kKeys, scale);
    __syncwarp();
    load(step + kStages);
  }
  mma::copies_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) state.top[0][half] *= scale;
  const int block_rows = min(rows - row_block * kRows, kRows);
  if (used == 1) {
    const auto put = [&](int at, int column, float total, float top, float sum) {
      const OutRow row(a, row_block, kv_head, at);
      if (column < head_dim) {
        static_cast<T*>(a.out)[row.at(a) + column] =
            from_float<T>(sum == 0.0f ? 0.0f : total / sum);
      }
      if (a.logsumexp != nullptr && column == 0) row.store_logsumexp(a, top, sum);
    };
    merge_warps<kDim>(reinterpret_cast<float*>(memory), o, state, block_rows, put);
    return;
  }
  const Partials parts = partials_of(a, partials, row_block, kv_head, gridDim.x, kDim);
  const Partials mine = {
      parts.state + blockIdx.x * kRows,
      parts.sums + static_cast<size_t>(blockIdx.x) * kRows * kDim};
  const auto put = [&](int row, int column, float total, float top, float sum) {
    mine.sums[row * kDim + column] = total;
    if (column == 0) mine.state[row] = make_float2(top, sum);
  };
  merge_warps<kDim>(reinterpret_cast<float*>(memory), o, state, block_rows, put);
  if (counters == nullptr) return;
  // Whoever comes last adds up.
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for all of the block: the barriers carry it
    uint32_t* counter = counters + row_block * a.p.kv_heads + kv_head;
    last = atomicAdd(counter, 1u) == static_cast<uint32_t>(used) - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  combine<T, kDim>(a, parts, row_block, kv_head, used, reinterpret_cast<float*>(memory));
}

/// Where there are no counters: a second launch.
template <typename T, int kDim, bool kFresh>
__global__ void __launch_bounds__(Tile<kDim>::kThreads)
    combine_kernel(const Arguments a, Partials partials, int splits) {
  __shared__ __align__(16) float memory[Tile<kDim>::kThreads * 6];
  begin_dependent();
  const int kv_head = blockIdx.x, row_block = blockIdx.y;
  const Split split = split_keys<kDim, kFresh>(a, offset_of(a), row_block, splits);
  const int used = splits_used(split);
  if (used == 1) return;  // stored already
  combine<T, kDim>(
      a,
      partials_of(a, partials, row_block, kv_head, splits, kDim),
      row_block,
      kv_head,
      used,
      memory);
}

template <typename T, int kDim, bool kFresh>
void run(const Context& context, const Arguments& a, const Fresh& fresh) {
  using Ring = Ring<kDim, kFresh>;
  const uint32_t rows = a.p.q_tokens * (a.p.q_heads / a.p.kv_heads);
  const uint32_t row_blocks = (rows + kRows - 1) / kRows;
  constexpr uint32_t kLeastKeys = Ring::kKeys * Ring::kLeast;
  const uint32_t most = (a.p.kv_tokens + kLeastKeys - 1) / kLeastKeys;
  const uint32_t splits = std::max(
      1u, std::min(most, context.multiprocessors / std::max(1u, a.p.kv_heads * row_blocks)));
  const size_t slots = size_t{row_blocks} * a.p.kv_heads * splits * kRows;
  Partials partials;
  partials.state = static_cast<float2*>(context.scratch->take(slots * sizeof(float2)));
  partials.sums = static_cast<float*>(context.scratch->take(slots * kDim * sizeof(float)));
  const bool counted =
      context.counters != nullptr && row_blocks * a.p.kv_heads <= METAL_LORA_CUDA_COUNTERS;
  launch(
      context,
      "attention_forward decode",
      decode_kernel<T, kDim, kFresh>,
      dim3(splits, a.p.kv_heads, row_blocks),
      Ring::kThreads,
      Ring::kSharedBytes,
      a,
      fresh,
      partials,
      counted ? context.counters : nullptr);
  if (counted || splits == 1) return;
  launch(
      context,
      "attention_forward combine",
      combine_kernel<T, kDim, kFresh>,
      dim3(a.p.kv_heads, row_blocks),
      Ring::kThreads,
      0,
      a,
      partials,
      static_cast<int>(splits));
}
template <typename T, bool kFresh>
void run_dim(const Context& context, const Arguments& a, const Fresh& fresh) {
  if (a.p.head_dim <= 64) return run<T, 64, kFresh>(context, a, fresh);
  if (a.p.head_dim <= 128) return run<T, 128, kFresh>(context, a, fresh);
  return run<T, 256, kFresh>(context, a, fresh);
}
template <bool kFresh>
void run_type(const Context& context, const Arguments& a, const Fresh& fresh) {
  a.p.dtype == DType::bf16 ? run_dim<bf16, kFresh>(context, a, fresh)
                           : run_dim<f16, kFresh>(context, a, fresh);
}

}  // namespace

void forward_decode(const Context& context, const Arguments& a) {
  run_type<false>(context, a, {});
}

}  // namespace attention

void decode_attention(
    const Context& context,
    const DecodeAttentionParams& p,
    const int32_t* positions,
    const float* cos_sin,
    const float* q_norm,
    const float* k_norm,
    void* q,
    const void* k,
    const void* v,
    void* k_cache,
    void* v_cache,
    void* out) {
  if (p.tokens == 0) return;
  AttentionParams whole;
  whole.q_tokens = p.tokens;
  whole.kv_tokens = p.capacity;
  whole.q_heads = p.q_heads;
  whole.kv_heads = p.kv_heads;
  whole.head_dim = p.head_dim;
  whole.window = p.window;
  whole.scale = p.scale;
  whole.dtype = p.dtype;
  whole.q_stride = whole.o_stride = size_t{p.q_heads} * p.head_dim;
  whole.k_stride = whole.v_stride = size_t{p.kv_heads} * p.head_dim;
  bool tiled = p.dtype != DType::f32 && p.head_dim % 8 == 0 && p.head_dim <= 256 &&
               p.tokens <= attention::kRows && p.kv_heads > 0 && p.q_heads % p.kv_heads == 0;
  for (const void* each :
       {static_cast<const void*>(q),
        k,
        v,
        static_cast<const void*>(k_cache),
        static_cast<const void*>(v_cache),
        static_cast<const void*>(out)}) {
    tiled = tiled && is_aligned(each);
  }
  if (!tiled) {
    decode_rope_cache(context, p, positions, cos_sin, q_norm, k_norm, q, k, v, k_cache, v_cache);
    attention_forward(context, whole, q, k_cache, v_cache, nullptr, out, nullptr, positions);
    return;
  }
  attention::Arguments a;
  a.p = whole;
  a.p.window = std::min<uint32_t>(p.window, INT32_MAX);
  a.q = q;
  a.k = k_cache;
  a.v = v_cache;
  a.out = out;
  a.kv_offset = positions;
  attention::Fresh fresh{k, v, cos_sin, q_norm, k_norm, p.eps};
  attention::run_type<true>(context, a, fresh);
}

}  // namespace metal_lora::cuda
