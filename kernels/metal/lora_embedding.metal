// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// y[t] = table[ids[t]] + scale·B·A[:, ids[t]], A [rank, vocab], B [dims, rank], and the gradients
// of A and B. The table may be dense or packed: its rows come through the weight policies.
//
// Forward. Tile: 8 tokens x 512 dims, two simdgroups, 8 dims a lane: a token's row is read once, a
// row of B once for 8 tokens, A's columns into threadgroup memory (8 · rank floats).
// Bytes read: tokens·dims·w + ⌈tokens/8⌉·dims·rank·l + ⌈dims/512⌉·tokens·rank·l.
// Ladder (64 tokens, dims 1024, rank 16, int4 table, f16 adapter; emulator's counters; unique 33 kB
// of B): 4 tokens a threadgroup: B 524 kB; 8 tokens: B 262 kB. A row's words: 1.00x a token.
//
// Backward, one dispatch without atomics. dB is lora_grad's product with A's columns gathered on
// the way. dA is as sparse as the ids: a threadgroup owns 256 ids (one a thread), finds its tokens
// in order by one mask of 32 bits for each 32 tokens, and makes their products with B, 4 tokens at
// a time: each token is somebody's, so no product is made twice for one chunk of 16 ranks. A token
// that fills a batch (padding) is one threadgroup's work: its products are made one after another.
// Bytes read, c = ⌈rank/16⌉: c·(2·tokens·dims·b + tokens·dims·16·l / 1…4 + ⌈vocab/256⌉·tokens·4).
// Ladder (128 tokens, vocab 2048, dims 256, rank 16; dy f16, A and B f32; unique dy 66 kB, B 16
// kB):
//   version                         dy               B                 barriers
//   a rank a simdgroup, by token    1114 kB (17x)    2097 kB (128x)    304
//   dims over the simdgroups, 4     131 kB (2.00x)   557 kB (34x)      116

// @region lora_embedding : common
namespace metal_lora {

constant constexpr uint kEmbedTokens = 8;
constant constexpr uint kEmbedThreads = 64;
constant constexpr uint kEmbedDims = 512;  // 64 threads of 8

// y[t] = table[ids[t]] + scale · Σ_r A[r, ids[t]]·B[:, r] for 8 tokens and 512 dims a threadgroup:
// a row of B is read once for its 8 tokens. us: [8][RANKS]. `rank` 0: no adapter.
template <
    typename T,
    typename LT,
    int RANKS,
    typename Weight,
    typename PI,
    typename PA,
    typename PB>
inline void lora_embedding(
    Weight weight,
    PI ids,
    PA a,
    PB b,
    const uint tokens,
    const uint vocab,
    const uint dims,
    const uint rank,
    const float scale,
    device T* y,
    threadgroup float* us,
    const uint3 group,
    const uint simd_id,
    const uint lane) {
  const uint thread_id = simd_id * 32 + lane, token0 = group.y * kEmbedTokens;
  const uint column = group.x * kEmbedDims + thread_id * 8;
  for (uint e = thread_id; e < kEmbedTokens * rank; e += kEmbedThreads) {
    const uint t = token0 + e / rank, r = e % rank;
    const uint id = t < tokens ? uint(ids[t]) : vocab;
    us[e / rank * RANKS + r] = id < vocab ? scale * float(a[r * vocab + id]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Pack<float, 8> rows[kEmbedTokens];
  for (uint t = 0; t < kEmbedTokens; ++t) {
    const uint id = token0 + t < tokens ? uint(ids[token0 + t]) : vocab;
    const int valid = id < vocab ? int(dims) - int(column) : 0;
    const typename Weight::Group shared = weight.group(id, column, valid, lane);
    const typename Weight::Run run = weight.run(id, column, valid);
    weight.unpack(run, shared, 0, rows[t]);
  }
  for (uint i = 0; i < 8 && column + i < dims; ++i) {
    for (uint r = 0; r < rank; r += 8) {
      const int valid = int(rank) - int(r);
      const Pack<LT, 8> values = load_pack_up_to<LT, 8>(b + (column + i) * rank + r, valid);
      for (int j = 0; j < 8 && j < valid; ++j) {
        for (uint t = 0; t < kEmbedTokens; ++t) {
          rows[t].v[i] += float(values.v[j]) * us[t * RANKS + r + j];
        }
      }
    }
    for (uint t = 0; t < kEmbedTokens; ++t) {
      if (token0 + t < tokens) y[(token0 + t) * dims + column + i] = T(rows[t].v[i]);
    }
  }
}

}  // namespace metal_lora

// @region lora_embedding_grad : lora_gradient_tile
namespace metal_lora {

constant constexpr uint kEmbedRanks = 16;
constant constexpr uint kEmbedBatch =
    4;  // tokens of one tile of ids whose products are made together

// products[s][i][r] = this simdgroup's part of Σ_d B[d, rank0 + r] · dy[t_i, d] for up to 4 tokens:
// it takes every eighth 32 of the dims, so that dy is read once and B once for the 4.
template <typename G, typename B>
inline void embedding_products(
    G dy,
    B b,
    thread const uint (&batch)[kEmbedBatch],
    const uint count,
    const uint dims,
    const uint rank,
    const uint rank0,
    threadgroup float* products,  // [8][4][16]
    const uint simd_id,
    const uint lane) {
  float sums[kEmbedBatch][kEmbedRanks];
  for (uint i = 0; i < kEmbedBatch; ++i) {
    for (uint r = 0; r < kEmbedRanks; ++r) sums[i][r] = 0.0f;
  }
  for (uint d = simd_id * 32 + lane; d < dims; d += kGradThreads) {
    float g[kEmbedBatch];
    for (uint i = 0; i < kEmbedBatch; ++i) {
      g[i] = i < count ? float(dy[batch[i] * dims + d]) : 0.0f;
    }
    for (uint r = 0; r < kEmbedRanks; ++r) {
      if (rank0 + r >= rank) break;
      const float value = float(b[d * rank + rank0 + r]);
      for (uint i = 0; i < kEmbedBatch; ++i) sums[i][r] += value * g[i];
    }
  }
  for (uint i = 0; i < kEmbedBatch; ++i) {
    for (uint r = 0; r < kEmbedRanks; ++r) {
      if (i >= count || rank0 + r >= rank) break;
      const float sum = simd_sum(sums[i][r]);
      if (lane == 0) products[(simd_id * kEmbedBatch + i) * kEmbedRanks + r] = sum;
    }
  }
}

// dA[r, id] = scale · Σ_{t: ids[t] = id} Σ_d B[d, r] · dy[t, d] for 256 ids, one a thread, and 16
// ranks. Each token belongs to one tile of ids, so that its product with B is made once for each
// chunk of ranks; tokens are taken in order.
template <typename Ids, typename G, typename B>
inline void embedding_grad_a(
    Ids ids,
    G dy,
    B b,
    const uint tokens,
    const uint vocab,
    const uint dims,
    const uint rank,
    const uint id0,
    const uint rank0,
    const float scale,
    device float* da,
    threadgroup float* products,  // [8][4][16]
    threadgroup uint* matches,    // [8]
    const uint simd_id,
    const uint lane) {
  const uint own = id0 + simd_id * 32 + lane, ranks = min(kEmbedRanks, rank - rank0);
  float sum[kEmbedRanks];
  for (uint r = 0; r < kEmbedRanks; ++r) sum[r] = 0.0f;
  for (uint t0 = 0; t0 < tokens; t0 += kGradThreads) {
    const uint mine = t0 + simd_id * 32 + lane;
    // One below id0 wraps around to far above it.
    const bool match = mine < tokens && uint(ids[mine]) - id0 < kGradThreads;
    const uint bits = simd_sum(match ? 1u << lane : 0u);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lane == 0) matches[simd_id] = bits;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint part = 0, left = matches[0];
    while (true) {
      uint batch[kEmbedBatch], count = 0;
      while (count < kEmbedBatch) {
        while (left == 0 && part + 1 < kGradThreads / 32) left = matches[++part];
        if (left == 0) break;
        batch[count++] = t0 + part * 32 + ctz(left);
        left &= left - 1;
      }
      if (count == 0) break;
      embedding_products(dy, b, batch, count, dims, rank, rank0, products, simd_id, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = 0; i < count; ++i) {
        if (uint(ids[batch[i]]) != own) continue;
        for (uint r = 0; r < ranks; ++r) {
          float dot = 0.0f;
          for (uint s = 0; s < kGradThreads / 32; ++s) {
            dot += products[(s * kEmbedBatch + i) * kEmbedRanks + r];
          }
          sum[r] += dot;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
  if (own >= vocab) return;
  for (uint r = 0; r < ranks; ++r) da[(rank0 + r) * vocab + own] = scale * sum[r];
}

// Threadgroups [0, ⌈vocab/256⌉) of x make dA, the others dB's tiles of 128 dims; y counts chunks of
// 16 ranks. p: scale.
template <typename Ids, typename G, typename A, typename B, typename P>
inline void lora_embedding_grad(
    Ids ids,
    G dy,
    A a,
    B b,
    P p,
    const uint tokens,
    const uint vocab,
    const uint dims,
    const uint rank,
    device float* da,
    device float* db,
    threadgroup float* left_tile,
    threadgroup float* right_tile,
    threadgroup uint* matches,
    const uint3 group,
    const uint simd_id,
    const uint lane) {
  const float scale = as_type<float>(p[0]);
  const uint tiles = (vocab + kGradThreads - 1) / kGradThreads, rank0 = group.y * kEmbedRanks;
  if (group.x < tiles) {
    embedding_grad_a(
        ids,
        dy,
        b,
        tokens,
        vocab,
        dims,
        rank,
        group.x * kGradThreads,
        rank0,
        scale,
        da,
        right_tile,
        matches,
        simd_id,
        lane);
    return;
  }
  GatheredLeft<A, Ids> left;
  left.a = a;
  left.ids = ids;
  left.vocab = vocab;
  GradientOutput out;
  out.values = db;
  out.row_stride = 1;
  out.column_stride = rank;
  DropoutMask none;
  none.seed = 0;
  none.threshold = 0;
  none.keep_scale = 1.0f;
  gradient_tile<int(kEmbedRanks), false>(
      left,
      dy,
      tokens,
      dims,
      rank,
      rank0,
      (group.x - tiles) * kGradColumns,
      scale,
      none,
      out,
      left_tile,
      right_tile,
      simd_id,
      lane);
}

}  // namespace metal_lora
