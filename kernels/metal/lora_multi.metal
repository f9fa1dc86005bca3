// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// y[t] = W·x[t] + bias + s_i·B_i·(A_i·x[t]), i = index[t]: many adapters in one dispatch, in the
// forms of lora_kernels.metal (1 … 8 tokens) and lora_tiled.metal. A token's sums are its own: the
// order of additions depends neither on the other tokens nor on their number, and what other
// adapters yield in its strip of the matrix units is dropped, not multiplied by zero.
// Only true ranks are read and multiplied (rounded up to 8 on the matrix units); a token without
// adapter costs nothing beyond the base.
//
// Matrix-vector form. As lora_gemv; u is summed for each distinct adapter of the batch, whose rows
// of A and B are read once for all its tokens. Bytes, d distinct adapters named, T threadgroups:
//   n·k·w + T·d·rank·k·l + d·n·rank·l + T·m·k·b
// T is chosen so that A's part stays below half of W's where the batch could name every adapter and
// at least 16 threadgroups remain.
// Ladder (m = 8, n = 2048, k = 512, rank 16, f16; emulator's counters; W 2.10 MB, 1.00x in all):
//   version                        A, 1 adapter   A, 8 adapters   x         B
//   32 rows a threadgroup          1.05 MB (64x)  8.39 MB (64x)   0.52 MB   1.00x
//   128 rows                       0.26 MB (16x)  2.10 MB (16x)   0.13 MB   1.00x
// Over int4 W is 0.52 MB + 0.07 MB of scales, once; A and B do not change.
//
// Tiled form. The base product as lora_gemm, then for each distinct adapter of the tile and each 32
// of its ranks: x·A_iᵀ for the strips of 8 tokens that have it (only their rows of x are read) and
// the expansion, both on the matrix units, through the same threadgroup memory. Bytes:
//   n·k·w·⌈m/BM⌉ + 2·m·k·b·⌈n/BN⌉ (x again for 32 ranks) + Σ over tiles and their adapters of A_i
//   and B_i's BN rows
// Counters (m = 64, n = k = 512, rank 16, f16, tiles of 64 x 128): W 1.00x, x 8.00x (4 columns of
// tiles, twice), A 4.00x, B 1.00x for 1 and for 8 adapters in runs; 37,888 matrix operations, of
// which 5120 for the adapters; multiply-adds elsewhere: one for each output and 32 ranks, 0.2 %.

// @region lora_bank : common
namespace metal_lora {

// Adapters packed side by side: a [adapters, max_rank, k], b [adapters, n, max_rank] of type LT,
// and their true ranks and scales. What lies beyond a true rank is never read.
template <typename LT, typename PA, typename PB, typename PR, typename PS>
struct LoraBank {
  typedef LT Value;
  PA a;
  PB b;
  PR ranks;
  PS scales;
  uint adapters, max_rank;
  inline uint rank(int adapter) const {
    const int stored = ranks[adapter];
    return stored < 0 ? 0u : min(uint(stored), max_rank);
  }
};

template <typename LT, typename PA, typename PB, typename PR, typename PS>
inline LoraBank<LT, PA, PB, PR, PS> lora_bank(
    PA a, PB b, PR ranks, PS scales, uint adapters, uint max_rank) {
  LoraBank<LT, PA, PB, PR, PS> out;
  out.a = a;
  out.b = b;
  out.ranks = ranks;
  out.scales = scales;
  out.adapters = adapters;
  out.max_rank = max_rank;
  return out;
}

// A token's adapter, or -1.
template <typename PI>
inline int adapter_of(PI index, uint token, uint m, uint adapters) {
  const int adapter = token < m ? int(index[token]) : -1;
  return adapter >= 0 && uint(adapter) < adapters ? adapter : -1;
}

}  // namespace metal_lora

// @region lora_multi_gemv : lora_bank gemv
namespace metal_lora {

// As GemvTile, but the chunk of K does not depend on the number of tokens, so that neither does the
// order of a token's sums.
template <typename T, int TOKENS_, int SIMDGROUPS_, int RANKS_, int RUN>
struct MultiGemvTile {
  enum {
    TOKENS = TOKENS_,
    SIMDGROUPS = SIMDGROUPS_,
    RANKS = RANKS_,
    ROWS = 4,
    BLOCK = 32 * RUN,
    CHUNK = 16384 / (8 * int(sizeof(T))) / BLOCK * BLOCK,
    X_SIZE = TOKENS_ * CHUNK,
    U_SIZE = TOKENS_ * RANKS_
  };
};

// Whether no token before t has t's adapter: it then stands for all of them.
template <int TOKENS>
inline bool leads(thread const int (&adapter)[TOKENS], int t) {
  bool first = adapter[t] >= 0;
  for (int s = 0; s < t; ++s) first = first && adapter[s] != adapter[t];
  return first;
}

// us[t][r] += Σ over the staged chunk of x[t]·A_i, each adapter's rows read once for all its
// tokens.
template <typename Tile, int RUN, typename T, typename Bank>
inline void multi_shrink_chunk(
    threadgroup float* us,
    const threadgroup T* xs,
    thread const Bank& bank,
    thread const int (&adapter)[Tile::TOKENS],
    uint k,
    uint k0,
    uint simdgroup_index,
    uint lane) {
  typedef typename Bank::Value LT;
  const uint end = min(k, k0 + uint(Tile::CHUNK));
  for (int lead = 0; lead < Tile::TOKENS; ++lead) {
    if (!leads(adapter, lead)) continue;
    const int i = adapter[lead];
    const uint rank = bank.rank(i);
    for (uint r = simdgroup_index; r < rank; r += Tile::SIMDGROUPS) {
      float sums[Tile::TOKENS];
      for (int t = 0; t < Tile::TOKENS; ++t) sums[t] = 0.0f;
      for (uint column = k0 + lane * 8; column < end; column += 256) {
        const Pack<LT, 8> values = load_pack_up_to<LT, 8>(
            bank.a + (uint(i) * bank.max_rank + r) * k + column, int(k) - int(column));
        const uint place = gemv_place<RUN>(column - k0);
        for (int t = lead; t < Tile::TOKENS; ++t) {
          if (adapter[t] != i) continue;
          const threadgroup T* xt = xs + t * Tile::CHUNK + place;
          for (int j = 0; j < 8; ++j) sums[t] += float(values.v[j]) * float(xt[j]);
        }
      }
      for (int t = lead; t < Tile::TOKENS; ++t) {
        if (adapter[t] != i) continue;
        const float sum = simd_sum(sums[t]);
        if (lane == 0) {
          us[t * Tile::RANKS + r] = k0 == 0 ? sum : us[t * Tile::RANKS + r] + sum;
        }
      }
    }
  }
}

// sums[row][t] += scale · (B_i's row)·us[t]: lane r holds column r.
template <typename Tile, typename Bank>
inline void multi_expand(
    thread float (&sums)[Tile::ROWS][Tile::TOKENS],
    const threadgroup float* us,
    thread const Bank& bank,
    thread const int (&adapter)[Tile::TOKENS],
    uint row0,
    uint n,
    uint lane) {
  for (int lead = 0; lead < Tile::TOKENS; ++lead) {
    if (!leads(adapter, lead)) continue;
    const int i = adapter[lead];
    const uint rank = bank.rank(i);
    const float scale = float(bank.scales[i]);
    for (int row = 0; row < Tile::ROWS; ++row) {
      if (row0 + row >= n) continue;
      for (uint r = lane; r < rank; r += 32) {
        const float b = scale * float(bank.b[(uint(i) * n + row0 + row) * bank.max_rank + r]);
        for (int t = lead; t < Tile::TOKENS; ++t) {
          if (adapter[t] == i) sums[row][t] += b * us[t * Tile::RANKS + r];
        }
      }
    }
  }
}

// y [m, n] for m <= TOKENS; threadgroups count strips of SIMDGROUPS·ROWS·passes rows of W.
template <
    typename Tile,
    typename T,
    typename Weight,
    typename Bank,
    typename BiasT,
    typename PX,
    typename PI>
inline void lora_multi_gemv(
    Weight weight,
    Bank bank,
    BiasT bias,
    PX x,
    PI index,
    device T* y,
    uint m,
    uint n,
    uint k,
    uint passes,
    threadgroup T* xs,
    threadgroup float* us,
    uint threadgroup_index,
    uint simdgroup_index,
    uint lane) {
  const uint thread_index = simdgroup_index * 32 + lane;
  int adapter[Tile::TOKENS];
  for (int t = 0; t < Tile::TOKENS; ++t) {
    adapter[t] = adapter_of(index, uint(t), m, bank.adapters);
  }
  for (uint pass = 0; pass < passes; ++pass) {
    const uint row0 =
        ((threadgroup_index * passes + pass) * Tile::SIMDGROUPS + simdgroup_index) * Tile::ROWS;
    float sums[Tile::ROWS][Tile::TOKENS];
    for (int row = 0; row < Tile::ROWS; ++row) {
      for (int t = 0; t < Tile::TOKENS; ++t) sums[row][t] = 0.0f;
    }
    for (uint k0 = 0; k0 < k; k0 += Tile::CHUNK) {
      if (pass == 0 || k > uint(Tile::CHUNK)) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        gemv_stage_x<Tile, Weight::kRun>(xs, x, m, k, k0, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      if (pass == 0) {
        multi_shrink_chunk<Tile, Weight::kRun>(us, xs, bank, adapter, k, k0, simdgroup_index, lane);
      }
      gemv_multiply_chunk<Tile>(sums, weight, xs, row0, n, k, k0, lane);
    }
    if (pass == 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    multi_expand<Tile>(sums, us, bank, adapter, row0, n, lane);
    for (int row = 0; row < Tile::ROWS; ++row) {
      for (int t = 0; t < Tile::TOKENS; ++t) {
        const float sum = simd_sum(sums[row][t]);
        if (lane == 0 && row0 + row < n && uint(t) < m) {
          y[t * n + row0 + row] = T(sum + bias.at(row0 + row));
        }
      }
    }
  }
}

}  // namespace metal_lora

// @region lora_multi_gemm : lora_bank gemm
namespace metal_lora {

// Which of a tile's strips of 8 tokens have adapter i, one bit a strip.
template <typename Tile>
inline uint strips_with(const threadgroup int* adapter, int i) {
  uint strips = 0;
  for (uint row = 0; row < Tile::BM; ++row) {
    if (adapter[row] == i) strips |= 1u << (row / 8);
  }
  return strips;
}

// Whether no row before this one has its adapter: it then stands for all of them.
inline bool leads_tile(const threadgroup int* adapter, uint row) {
  const int i = adapter[row];
  bool first = i >= 0;
  for (uint other = 0; other < row && first; ++other) first = adapter[other] != i;
  return first;
}

// hs [BM, HS] = x·A_iᵀ for ranks r0 … r0 + 31 (as far as `blocks` of 8 go) of the strips named in
// `strips`; zeros in the rows of other adapters, whose x is not read.
template <typename Tile, typename XT, typename Bank, typename PX>
inline void multi_shrink_tile(
    thread const Bank& bank,
    int i,
    uint rank,
    uint r0,
    uint blocks,
    uint strips,
    PX x,
    uint k,
    const threadgroup int* adapter,
    threadgroup float* memory,
    thread const GemmPlace<Tile>& at) {
  typedef typename Bank::Value LT;
  typedef typename ProductType<XT, LT>::type S;
  enum {
    BK = 32,
    STRIDE = BK + 16 / int(sizeof(S)),
    RANKS = 32,
    X_WORDS = Tile::BM * STRIDE * int(sizeof(S)) / 4
  };
  threadgroup S* xs = reinterpret_cast<threadgroup S*>(memory);
  threadgroup S* as = reinterpret_cast<threadgroup S*>(memory + X_WORDS);
  simdgroup_matrix<float, 8, 8> h[Tile::STRIPS][RANKS / 8];
  for (int s = 0; s < Tile::STRIPS; ++s) {
    for (int r = 0; r < RANKS / 8; ++r) h[s][r] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (uint d0 = 0; d0 < k; d0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = at.thread_index; e < uint(Tile::BM * BK / 8); e += Tile::THREADS) {
      const uint row = e / (BK / 8), column = e % (BK / 8) * 8;
      if ((strips >> (row / 8) & 1u) == 0) continue;
      const int valid = adapter[row] == i ? int(k) - int(d0 + column) : 0;
      const Pack<XT, 8> in = load_pack_up_to<XT, 8>(x + (at.row0 + row) * k + d0 + column, valid);
      for (int j = 0; j < 8; ++j) xs[row * STRIDE + column + j] = S(in.v[j]);
    }
    for (uint e = at.thread_index; e < blocks * BK; e += Tile::THREADS) {
      const uint row = e / (BK / 8), column = e % (BK / 8) * 8;
      const int valid = r0 + row < rank ? int(k) - int(d0 + column) : 0;
      const Pack<LT, 8> in = load_pack_up_to<LT, 8>(
          bank.a + (uint(i) * bank.max_rank + r0 + row) * k + d0 + column, valid);
      for (int j = 0; j < 8; ++j) as[row * STRIDE + column + j] = S(in.v[j]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = 0; s < Tile::STRIPS; ++s) {
      const uint strip = at.simdgroup_index + Tile::SIMDGROUPS * s;
      if ((strips >> strip & 1u) == 0) continue;
      for (int d = 0; d < BK; d += 8) {
        simdgroup_matrix<S, 8, 8> left, right;
        simdgroup_load(left, xs + strip * 8 * STRIDE + d, STRIDE);
        for (uint r = 0; r < RANKS / 8; ++r) {
          if (r >= blocks) break;
          simdgroup_load(right, as + r * 8 * STRIDE + d, STRIDE, ulong2(0, 0), true);
          simdgroup_multiply_accumulate(h[s][r], left, right, h[s][r]);
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int s = 0; s < Tile::STRIPS; ++s) {
    const uint strip = at.simdgroup_index + Tile::SIMDGROUPS * s;
    if ((strips >> strip & 1u) == 0) continue;
    for (uint r = 0; r < RANKS / 8; ++r) {
      if (r < blocks) simdgroup_store(h[s][r], memory + strip * 8 * Tile::HS + r * 8, Tile::HS);
    }
  }
}

// acc += scale · hs·B_iᵀ in the rows whose adapter is i: the matrix units make whole strips, and
// only those rows are kept, so that no other adapter's numbers, not even a NaN, reach a token.
template <typename Tile, typename Bank>
inline void multi_expand_tile(
    thread simdgroup_matrix<float, 8, 8> (&acc)[Tile::TM][Tile::TN],
    thread const Bank& bank,
    int i,
    uint rank,
    uint r0,
    uint blocks,
    uint strips,
    uint n,
    const threadgroup int* adapter,
    threadgroup float* memory,
    thread const GemmPlace<Tile>& at) {
  typedef typename Bank::Value LT;
  const threadgroup float* hs = memory;
  threadgroup float* es = memory + Tile::H_WORDS;
  for (uint e = at.thread_index; e < Tile::BN * blocks; e += Tile::THREADS) {
    const uint column = e / blocks, r = e % blocks * 8;
    const int valid = at.column0 + column < n ? int(rank) - int(r0 + r) : 0;
    const Pack<LT, 8> in = load_pack_up_to<LT, 8>(
        bank.b + (uint(i) * n + at.column0 + column) * bank.max_rank + r0 + r, valid);
    for (int j = 0; j < 8; ++j) es[column * Tile::ES + r + j] = float(in.v[j]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const float scale = float(bank.scales[i]);
  for (int f = 0; f < Tile::TM; ++f) {
    const uint row = at.sg_row + f * 8;
    if ((strips >> (row / 8) & 1u) == 0) continue;
    const bool mine = adapter[row + fragment_row(at.lane)] == i;
    for (int j = 0; j < Tile::TN; ++j) {
      const uint column = at.sg_column + j * 8;
      simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (uint r = 0; r < blocks; ++r) {
        simdgroup_matrix<float, 8, 8> left, right;
        simdgroup_load(left, hs + row * Tile::HS + r * 8, Tile::HS);
        simdgroup_load(right, es + column * Tile::ES + r * 8, Tile::ES, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sum, left, right, sum);
      }
      for (uint e = 0; e < 2; ++e) {
        if (mine) acc[f][j].thread_elements()[e] += scale * sum.thread_elements()[e];
      }
    }
  }
}

// y [m, n]; Tile is a GemmTile with RT = 0. adapter: BM ints of threadgroup memory.
// threadgroup_position: (tile of columns, tile of rows).
template <
    typename Tile,
    typename T,
    typename Weight,
    typename Bank,
    typename BiasT,
    typename PX,
    typename PI>
inline void lora_multi_gemm(
    Weight weight,
    Bank bank,
    BiasT bias,
    PX x,
    PI index,
    device T* y,
    uint m,
    uint n,
    uint k,
    threadgroup float* memory,
    threadgroup int* adapter,
    uint3 threadgroup_position,
    uint simdgroup_index,
    uint lane) {
  GemmPlace<Tile> at;
  at.row0 = threadgroup_position.y * Tile::BM;
  at.column0 = threadgroup_position.x * Tile::BN;
  at.sg_row = simdgroup_index / Tile::WN * 32;
  at.sg_column = simdgroup_index % Tile::WN * (Tile::TN * 8);
  at.thread_index = simdgroup_index * 32 + lane;
  at.simdgroup_index = simdgroup_index;
  at.lane = lane;
  for (uint row = at.thread_index; row < Tile::BM; row += Tile::THREADS) {
    adapter[row] = adapter_of(index, at.row0 + row, m, bank.adapters);
  }
  simdgroup_matrix<float, 8, 8> acc[Tile::TM][Tile::TN];
  for (int i = 0; i < Tile::TM; ++i) {
    for (int j = 0; j < Tile::TN; ++j) {
      acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  simdgroup_matrix<float, 8, 8> unused[Tile::STRIPS][Tile::RANKS / 8];
  const NoAdapter none = no_adapter();
  const NoMask mask = NoMask();
  gemm_main_loop<Tile, T>(acc, unused, weight, none, mask, x, m, n, k, memory, at);
  // Every step of multi_shrink_tile begins with a barrier: the tiles before it have been read.
  for (uint row = 0; row < Tile::BM; ++row) {
    if (!leads_tile(adapter, row)) continue;
    const int i = adapter[row];
    const uint rank = bank.rank(i), strips = strips_with<Tile>(adapter, i);
    for (uint r0 = 0; r0 < rank; r0 += 32) {
      const uint blocks = min(4u, (rank - r0 + 7) / 8);
      multi_shrink_tile<Tile, T>(bank, i, rank, r0, blocks, strips, x, k, adapter, memory, at);
      multi_expand_tile<Tile>(acc, bank, i, rank, r0, blocks, strips, n, adapter, memory, at);
    }
  }
  for (int j = 0; j < Tile::TN; ++j) {
    const uint column = at.column0 + at.sg_column + j * 8;
    const uint mine = column + fragment_column(lane);
    const float bias0 = mine < n ? bias.at(mine) : 0.0f;
    const float bias1 = mine + 1 < n ? bias.at(mine + 1) : 0.0f;
    for (int i = 0; i < Tile::TM; ++i) {
      acc[i][j].thread_elements()[0] += bias0;
      acc[i][j].thread_elements()[1] += bias1;
      store_fragment(acc[i][j], y, at.row0 + at.sg_row + i * 8, m, column, n, lane);
    }
  }
}

}  // namespace metal_lora
