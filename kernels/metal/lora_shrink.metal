// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The first of two dispatches of a linear with an adapter: u [m, rank] = drop(x)·Aᵀ before the
// forward's base product, v [m, rank] = dy·B before dx's; f32. plans_forward.cpp says when.
//
// For 1 … 8 tokens: a threadgroup of 8 simdgroups for each r, each lane 16 or 32 bytes of A at a
// time. Bytes: rank·k·l once, x again for each r.
// Tiled: 32 tokens x 16 or 64 ranks, 32 of depth at a time through threadgroup memory, strips of 8
// tokens to the 4 simdgroups. Bytes: A (or B) ⌈m/32⌉ times, x ⌈rank/64⌉ times; every product on the
// matrix units.
// What splitting saves is in the ladders of lora_kernels.metal and lora_tiled.metal.

// @region shrink : tiles
namespace metal_lora {

// u [m, rank] = x·Aᵀ for m <= TOKENS: one threadgroup for each r, its simdgroups in turns along k.
// partial: SIMDGROUPS·TOKENS floats.
template <int TOKENS, int SIMDGROUPS, typename XT, typename LT, typename PX, typename PA>
inline void lora_shrink_vector(
    PX x,
    PA a,
    device float* u,
    uint m,
    uint k,
    uint rank,
    threadgroup float* partial,
    uint r,
    uint simdgroup_index,
    uint lane) {
  float sums[TOKENS];
  for (int t = 0; t < TOKENS; ++t) {
    sums[t] = 0.0f;
  }
  for (uint column = (simdgroup_index * 32 + lane) * 8; column < k; column += SIMDGROUPS * 256) {
    const int valid = int(k) - int(column);
    const Pack<LT, 8> values = load_pack_up_to<LT, 8>(a + r * k + column, valid);
    for (int t = 0; t < TOKENS; ++t) {
      const Pack<XT, 8> xt = load_pack_up_to<XT, 8>(x + t * k + column, uint(t) < m ? valid : 0);
      for (int i = 0; i < 8; ++i) {
        sums[t] += float(values.v[i]) * float(xt.v[i]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    const float sum = simd_sum(sums[t]);
    if (lane == 0) {
      partial[t * SIMDGROUPS + simdgroup_index] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint token = simdgroup_index * 32 + lane;
  if (token < m) {
    float sum = 0.0f;
    for (int s = 0; s < SIMDGROUPS; ++s) {
      sum += partial[token * SIMDGROUPS + s];
    }
    u[token * rank + r] = sum;
  }
}

// The tiled form: BM tokens and RANKS columns of u for each threadgroup of 4 simdgroups.
template <typename XT, typename LT, int BM_, int RANKS_, bool BACKWARD_>
struct ShrinkTile {
  typedef typename ProductType<XT, LT>::type S;
  enum {
    BM = BM_,
    RANKS = RANKS_,
    BK = 32,
    BACKWARD = BACKWARD_,
    SIMDGROUPS = 4,
    STRIPS = BM_ / 8 / SIMDGROUPS,
    XS = BK + 16 / int(sizeof(XT)),
    AS = (BACKWARD_ ? RANKS_ : BK) + 16 / int(sizeof(S)),
    X_WORDS = BM_ * XS * int(sizeof(XT)) / 4,
    A_WORDS = (BACKWARD_ ? BK : RANKS_) * AS * int(sizeof(S)) / 4,
    WORDS = X_WORDS + A_WORDS
  };
};

// u [m, rank] = (masked x [m, depth])·Aᵀ, a [rank, depth]; BACKWARD: v = dy·B, a = b [depth, rank].
// threadgroup_position: (tile of columns of u, tile of tokens).
template <typename Tile, typename XT, typename LT, typename Mask, typename PX, typename PA>
inline void lora_shrink_tiled(
    PX x,
    PA a,
    Mask mask,
    device float* u,
    uint m,
    uint depth,
    uint rank,
    threadgroup float* memory,
    uint3 threadgroup_position,
    uint simdgroup_index,
    uint lane) {
  typedef typename Tile::S S;
  threadgroup XT* xs = reinterpret_cast<threadgroup XT*>(memory);
  threadgroup S* as = reinterpret_cast<threadgroup S*>(memory + Tile::X_WORDS);
  const uint row0 = threadgroup_position.y * Tile::BM, r0 = threadgroup_position.x * Tile::RANKS;
  const uint thread_index = simdgroup_index * 32 + lane;
  simdgroup_matrix<float, 8, 8> h[Tile::STRIPS][Tile::RANKS / 8];
  typename Mask::Key keys[Tile::STRIPS];
  for (int s = 0; s < Tile::STRIPS; ++s) {
    keys[s] = mask.key(row0 + (simdgroup_index + Tile::SIMDGROUPS * s) * 8 + fragment_row(lane));
    for (int r = 0; r < Tile::RANKS / 8; ++r) {
      h[s][r] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  for (uint d0 = 0; d0 < depth; d0 += Tile::BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_tile<Tile::BM, Tile::BK, Tile::XS, Tile::SIMDGROUPS * 32, XT>(
        xs, x, row0, m, d0, depth, thread_index);
    if (Tile::BACKWARD) {
      load_tile<Tile::BK, Tile::RANKS, Tile::AS, Tile::SIMDGROUPS * 32, LT>(
          as, a, d0, depth, r0, rank, thread_index);
    } else {
      load_tile<Tile::RANKS, Tile::BK, Tile::AS, Tile::SIMDGROUPS * 32, LT>(
          as, a, r0, rank, d0, depth, thread_index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    shrink_tile<
        Tile::STRIPS,
        Tile::RANKS,
        Tile::SIMDGROUPS,
        Tile::BK,
        Tile::XS,
        Tile::AS,
        Tile::BACKWARD>(h, xs, as, mask, keys, d0, simdgroup_index, lane);
  }
  for (int s = 0; s < Tile::STRIPS; ++s) {
    const uint row = row0 + (simdgroup_index + Tile::SIMDGROUPS * s) * 8;
    for (int r = 0; r < Tile::RANKS / 8; ++r) {
      if (Mask::kExists) {
        h[s][r].thread_elements()[0] *= mask.keep_scale();
        h[s][r].thread_elements()[1] *= mask.keep_scale();
      }
      store_fragment(h[s][r], u, row, m, r0 + r * 8, rank, lane);
    }
  }
}

}  // namespace metal_lora
