// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The tiled form on the 8x8 matrix units, for more than 8 tokens, and the backward through it:
//   forward  y  [m, n] = x·Wᵀ + bias + scale·(drop(x)·Aᵀ)·Bᵀ        depth = k, width = n
//   dx       dx [m, k] = dy·W + scale·drop((dy·B)·A)                 depth = n, width = k
// The first of two dispatches, u = drop(x)·Aᵀ or v = dy·B alone, is in lora_shrink.metal.
//
// Tile: 64 x 128 (8 simdgroups), 64 x 64 or 32 x 64 (4), 32 of depth at a time through threadgroup
// memory; each simdgroup holds 32 x 32 (or 32 x 16) of the result in f32 fragments. x's tile
// serves W and, in the same pass, A: h = x·Aᵀ is spread over the simdgroups by strips of 8 rows.
// When depth is done h (f32) and B's rows (as f32) take the tiles' place in threadgroup memory, and
// the result goes on over the rank's columns, in f32. 64 x 128 is the largest tile whose f32 form
// still fits 32 KiB with A of rank 32 beside it.
//
// 16-bit operands of equal type are multiplied as they are (exact products, f32 sums); mixed types
// as f32. Packed weights are rounded to x's type on their way (lora_quantized.metal).
//
// Per tile of BM x BN: depth·(BM·bytes(x) + BN·bytes(w) + rank·bytes(A)) + BN·rank·bytes(B) bytes,
// depth·(BM·BN + BM·rank) + BM·BN·rank products, all on the matrix units but two per element (scale
// and bias): > 99 % from a depth of 200; with packed weights one more for each weight and row of
// tiles: >= 1 - 1/BM.
//
// Ladder (m = 128, n = k = 512, rank 16, f16; emulator's counters; unique: 0.69 MB):
//   tile                 x read    W read    A read    all     8x8x8 products  barriers   on chip
//   32 x 32              2.10 MB   2.10 MB   1.05 MB   7.71x   100352          2176      19.3 MB
//   32 x 64              1.05 MB   2.10 MB   0.52 MB   5.43x   83968           1088      14.5 MB
//   64 x 64              1.05 MB   1.05 MB   0.26 MB   3.48x   83968           544       10.9 MB
//   64 x 128             0.52 MB   1.05 MB   0.13 MB   2.52x   75776           272       8.7 MB
//   shrink + 64 x 128    0.66 MB   1.05 MB   0.07 MB   2.67x   69632           128 + 272  7.6 MB
// (base product alone: 65536; on chip: bytes read and written in threadgroup memory.)

// @region tiles : common
// Tiles in threadgroup memory and 8x8 fragments of them.
namespace metal_lora {

// The two elements of an 8x8 fragment that a lane holds: (row, column) and (row, column + 1).
inline uint fragment_row(uint lane) {
  return (lane & 16) / 4 + (lane & 6) / 2;
}
inline uint fragment_column(uint lane) {
  return (lane & 8) / 2 + (lane & 1) * 2;
}

// ROWS x COLUMNS of a row-major matrix [rows, columns] of E, from (row0, column0), into `to` with
// row stride STRIDE; zeros outside the matrix. COLUMNS is a multiple of 8.
template <int ROWS, int COLUMNS, int STRIDE, int THREADS, typename E, typename C, typename P>
inline void load_tile(
    threadgroup C* to,
    P from,
    uint row0,
    uint rows,
    uint column0,
    uint columns,
    uint thread_index) {
  for (uint i = thread_index; i < uint(ROWS * (COLUMNS / 8)); i += THREADS) {
    const uint row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
    const int valid = row0 + row < rows ? int(columns) - int(column0 + column) : 0;
    const Pack<E, 8> in =
        load_pack_up_to<E, 8>(from + (row0 + row) * columns + column0 + column, valid);
    Pack<C, 8> out;
    for (int j = 0; j < 8; ++j) {
      out.v[j] = C(in.v[j]);
    }
    *reinterpret_cast<threadgroup Pack<C, 8>*>(to + row * STRIDE + column) = out;
  }
}

// The same of a weight's [rows, columns], through its policy. `groups` holds each thread's groups
// from one call to the next along a row of tiles; new_groups says that this tile begins one.
template <int ROWS, int COLUMNS, int STRIDE, int THREADS, typename Weight, typename C>
inline void load_weight_tile(
    threadgroup C* to,
    thread const Weight& weight,
    thread typename Weight::Group* groups,
    bool new_groups,
    uint row0,
    uint rows,
    uint column0,
    uint columns,
    uint thread_index) {
  enum { RUNS = COLUMNS / Weight::kRun, COUNT = ROWS * RUNS / THREADS };
  static_assert(int(COUNT) * THREADS == ROWS * int(RUNS), "all threads take equally many runs");
  for (int i = 0; i < COUNT; ++i) {
    const uint index = i * THREADS + thread_index;
    const uint row = index / RUNS, column = index % RUNS * Weight::kRun;
    const int valid = row0 + row < rows ? int(columns) - int(column0 + column) : 0;
    if (new_groups) {
      groups[i] = weight.group(row0 + row, column0 + column, valid, thread_index % 32);
    }
    const typename Weight::Run run = weight.run(row0 + row, column0 + column, valid);
    for (int unit = 0; unit < Weight::kRun / 8; ++unit) {
      Pack<C, 8> out;
      weight.unpack(run, groups[i], unit, out);
      *reinterpret_cast<threadgroup Pack<C, 8>*>(to + row * STRIDE + column + unit * 8) = out;
    }
  }
}

// A fragment in another type; lanes hold the same places in every type.
template <typename To, typename From>
inline simdgroup_matrix<To, 8, 8> convert_fragment(simdgroup_matrix<From, 8, 8> from) {
  simdgroup_matrix<To, 8, 8> to;
  to.thread_elements()[0] = To(from.thread_elements()[0]);
  to.thread_elements()[1] = To(from.thread_elements()[1]);
  return to;
}

// Writes what lies inside [rows, columns] of a fragment whose corner is (row0, column0).
template <typename T>
inline void store_fragment(
    simdgroup_matrix<float, 8, 8> from,
    device T* to,
    uint row0,
    uint rows,
    uint column0,
    uint columns,
    uint lane) {
  const uint row = row0 + fragment_row(lane), column = column0 + fragment_column(lane);
  for (uint e = 0; e < 2; ++e) {
    if (row < rows && column + e < columns) {
      to[row * columns + column + e] = T(from.thread_elements()[e]);
    }
  }
}

// h[strip][·] += (masked x)·(A-like) for the strips of 8 rows that this simdgroup owns: strip
// simdgroup_index + SIMDGROUPS·s. xs [.., DEPTH] of C; as [RANKS, DEPTH], or [DEPTH, RANKS] where
// DEPTH_FIRST, of S. keys are of the strips' rows; column0 is the tile's first column of x.
template <
    int STRIPS,
    int RANKS,
    int SIMDGROUPS,
    int DEPTH,
    int X_STRIDE,
    int A_STRIDE,
    bool DEPTH_FIRST,
    typename S,
    typename C,
    typename Mask>
inline void shrink_tile(
    thread simdgroup_matrix<float, 8, 8> (&h)[STRIPS][RANKS / 8],
    const threadgroup C* xs,
    const threadgroup S* as,
    thread const Mask& mask,
    thread const typename Mask::Key* keys,
    uint column0,
    uint simdgroup_index,
    uint lane) {
  for (int d = 0; d < DEPTH; d += 8) {
    for (int s = 0; s < STRIPS; ++s) {
      simdgroup_matrix<C, 8, 8> x;
      simdgroup_load(x, xs + (simdgroup_index + SIMDGROUPS * s) * 8 * X_STRIDE + d, X_STRIDE);
      if (Mask::kExists) {
        for (uint e = 0; e < 2; ++e) {
          if (!mask.keep(keys[s], column0 + d + fragment_column(lane) + e)) {
            x.thread_elements()[e] = C(0.0f);
          }
        }
      }
      const simdgroup_matrix<S, 8, 8> left = convert_fragment<S>(x);
      for (int r = 0; r < RANKS / 8; ++r) {
        simdgroup_matrix<S, 8, 8> right;
        simdgroup_load(
            right,
            as + (DEPTH_FIRST ? d * A_STRIDE + r * 8 : r * 8 * A_STRIDE + d),
            A_STRIDE,
            ulong2(0, 0),
            !DEPTH_FIRST);
        simdgroup_multiply_accumulate(h[s][r], left, right, h[s][r]);
      }
    }
  }
}

}  // namespace metal_lora

// @region gemm : tiles
namespace metal_lora {

// Tile of the product [m, width] = [m, depth]·[depth, width]: forward (depth = k, width = n) or
// BACKWARD, dx (depth = n, width = k, W and the adapter read untransposed). BM x BN a threadgroup,
// BK of depth at a time; RT: rank rounded up to 8, 16, 32 or 64 when u is computed here, else 0.
// Each simdgroup makes 32 x (BN·BM / 32 / SIMDGROUPS) of the tile in 8x8 fragments.
template <
    typename XT,
    typename WT,
    typename LT,
    int BM_,
    int BN_,
    int RT,
    int SIMDGROUPS_,
    bool BACKWARD_>
struct GemmTile {
  typedef typename ProductType<XT, WT>::type C;  // of x·W
  typedef typename ProductType<C, LT>::type S;   // of x·Aᵀ
  enum {
    BM = BM_,
    BN = BN_,
    BK = 32,
    BACKWARD = BACKWARD_,
    SIMDGROUPS = SIMDGROUPS_,
    THREADS = SIMDGROUPS_ * 32,
    WM = BM_ / 32,          // simdgroups along m
    WN = SIMDGROUPS_ / WM,  // and along width
    TM = 4,
    TN = BN_ / 8 / WN,
    RANKS = RT == 0 ? 8 : RT,
    STRIPS = BM_ / 8 / SIMDGROUPS_,
    ER = 32,  // columns of the second adapter matrix at a time
    // Rows are padded by 16 bytes: 8 rows of a fragment then lie in different banks.
    PAD_C = 16 / int(sizeof(C)),
    PAD_S = 16 / int(sizeof(S)),
    XS = BK + PAD_C,
    WS = (BACKWARD_ ? BN_ : BK) + PAD_C,
    AS = (BACKWARD_ ? RANKS : BK) + PAD_S,
    HS = (RT == 0 ? ER : RANKS) + 4,
    ES = (BACKWARD_ ? BN_ : ER) + 4,
    X_WORDS = BM_ * XS * int(sizeof(C)) / 4,
    W_WORDS = (BACKWARD_ ? BK : BN_) * WS * int(sizeof(C)) / 4,
    A_WORDS = RT == 0 ? 0 : (BACKWARD_ ? BK : RANKS) * AS * int(sizeof(S)) / 4,
    H_WORDS = BM_ * HS,
    E_WORDS = (BACKWARD_ ? ER : BN_) * ES,
    MAIN_WORDS = X_WORDS + W_WORDS + A_WORDS,
    TAIL_WORDS = H_WORDS + E_WORDS,
    WORDS = MAIN_WORDS > TAIL_WORDS ? MAIN_WORDS : TAIL_WORDS
  };
};

template <typename Tile>
struct GemmPlace {
  uint row0, column0;      // of the threadgroup's tile
  uint sg_row, sg_column;  // of the simdgroup's part, within the tile
  uint thread_index, simdgroup_index, lane;
};

// acc += x·W over all of depth; h += (masked x)·A-like in the same pass.
template <
    typename Tile,
    typename XT,
    typename Weight,
    typename AdapterT,
    typename Mask,
    typename PX>
inline void gemm_main_loop(
    thread simdgroup_matrix<float, 8, 8> (&acc)[Tile::TM][Tile::TN],
    thread simdgroup_matrix<float, 8, 8> (&h)[Tile::STRIPS][Tile::RANKS / 8],
    thread const Weight& weight,
    thread const AdapterT& adapter,
    thread const Mask& mask,
    PX x,
    uint m,
    uint n,
    uint k,
    threadgroup float* memory,
    thread const GemmPlace<Tile>& at) {
  typedef typename Tile::C C;
  typedef typename Tile::S S;
  threadgroup C* xs = reinterpret_cast<threadgroup C*>(memory);
  threadgroup C* ws = reinterpret_cast<threadgroup C*>(memory + Tile::X_WORDS);
  threadgroup S* as = reinterpret_cast<threadgroup S*>(memory + Tile::X_WORDS + Tile::W_WORDS);
  typename Mask::Key keys[Tile::STRIPS];
  for (int s = 0; s < Tile::STRIPS; ++s) {
    keys[s] =
        mask.key(at.row0 + (at.simdgroup_index + Tile::SIMDGROUPS * s) * 8 + fragment_row(at.lane));
  }
  typename Weight::Group groups[Tile::BN * Tile::BK / Weight::kRun / Tile::THREADS];
  const uint depth = Tile::BACKWARD ? n : k;
  for (uint d0 = 0; d0 < depth; d0 += Tile::BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    load_tile<Tile::BM, Tile::BK, Tile::XS, Tile::THREADS, XT>(
        xs, x, at.row0, m, d0, depth, at.thread_index);
    load_weight_tile<
        (Tile::BACKWARD ? Tile::BK : Tile::BN),
        (Tile::BACKWARD ? Tile::BN : Tile::BK),
        Tile::WS,
        Tile::THREADS>(
        ws,
        weight,
        groups,
        Tile::BACKWARD || d0 % Weight::kGroup == 0,
        Tile::BACKWARD ? d0 : at.column0,
        n,
        Tile::BACKWARD ? at.column0 : d0,
        k,
        at.thread_index);
    if (AdapterT::kComputesU && Tile::BACKWARD) {
      load_tile<Tile::BK, Tile::RANKS, Tile::AS, Tile::THREADS, typename AdapterT::Value>(
          as, adapter.b, d0, n, 0, adapter.rank, at.thread_index);
    }
    if (AdapterT::kComputesU && !Tile::BACKWARD) {
      load_tile<Tile::RANKS, Tile::BK, Tile::AS, Tile::THREADS, typename AdapterT::Value>(
          as, adapter.a, 0, adapter.rank, d0, k, at.thread_index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = 0; d < Tile::BK; d += 8) {
      simdgroup_matrix<C, 8, 8> left[Tile::TM], right[Tile::TN];
      for (int i = 0; i < Tile::TM; ++i) {
        simdgroup_load(left[i], xs + (at.sg_row + i * 8) * Tile::XS + d, Tile::XS);
      }
      for (int j = 0; j < Tile::TN; ++j) {
        const uint column = at.sg_column + j * 8;
        simdgroup_load(
            right[j],
            ws + (Tile::BACKWARD ? d * Tile::WS + column : column * Tile::WS + d),
            Tile::WS,
            ulong2(0, 0),
            !Tile::BACKWARD);
      }
      for (int i = 0; i < Tile::TM; ++i) {
        for (int j = 0; j < Tile::TN; ++j) {
          simdgroup_multiply_accumulate(acc[i][j], left[i], right[j], acc[i][j]);
        }
      }
    }
    if (AdapterT::kComputesU) {
      shrink_tile<
          Tile::STRIPS,
          Tile::RANKS,
          Tile::SIMDGROUPS,
          Tile::BK,
          Tile::XS,
          Tile::AS,
          Tile::BACKWARD>(h, xs, as, mask, keys, d0, at.simdgroup_index, at.lane);
    }
  }
}

// Puts h, times the mask's factor, into threadgroup memory (and u, where wanted).
template <typename Tile, bool WANTS_U, typename Mask>
inline void gemm_keep_h(
    thread simdgroup_matrix<float, 8, 8> (&h)[Tile::STRIPS][Tile::RANKS / 8],
    thread const Mask& mask,
    device float* u,
    uint m,
    uint rank,
    threadgroup float* hs,
    thread const GemmPlace<Tile>& at) {
  for (int s = 0; s < Tile::STRIPS; ++s) {
    const uint row = (at.simdgroup_index + Tile::SIMDGROUPS * s) * 8;
    for (int r = 0; r < Tile::RANKS / 8; ++r) {
      if (Mask::kExists) {
        h[s][r].thread_elements()[0] *= mask.keep_scale();
        h[s][r].thread_elements()[1] *= mask.keep_scale();
      }
      simdgroup_store(h[s][r], hs + row * Tile::HS + r * 8, Tile::HS);
      if (WANTS_U && at.column0 == 0) {
        store_fragment(h[s][r], u, at.row0 + row, m, r * 8, rank, at.lane);
      }
    }
  }
}

// acc += scale · h·B-like, as if depth were `rank` longer, in f32; OUT_MASK drops single elements
// of the adapter's part (dx).
template <typename Tile, typename AdapterT, typename OutMask>
inline void gemm_expand(
    thread simdgroup_matrix<float, 8, 8> (&acc)[Tile::TM][Tile::TN],
    thread const AdapterT& adapter,
    thread const OutMask& out_mask,
    uint m,
    uint n,
    uint k,
    threadgroup float* memory,
    thread const GemmPlace<Tile>& at) {
  typedef typename AdapterT::Value LT;
  threadgroup float* hs = memory;
  threadgroup float* es = memory + Tile::H_WORDS;
  for (uint r0 = 0; r0 < adapter.rank; r0 += Tile::ER) {
    if (r0 > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (AdapterT::kGivenU) {
      load_tile<Tile::BM, Tile::ER, Tile::HS, Tile::THREADS, float>(
          hs, adapter.u, at.row0, m, r0, adapter.rank, at.thread_index);
    }
    if (Tile::BACKWARD) {
      load_tile<Tile::ER, Tile::BN, Tile::ES, Tile::THREADS, LT>(
          es, adapter.a, r0, adapter.rank, at.column0, k, at.thread_index);
    } else {
      load_tile<Tile::BN, Tile::ER, Tile::ES, Tile::THREADS, LT>(
          es, adapter.b, at.column0, n, r0, adapter.rank, at.thread_index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint h0 = AdapterT::kGivenU ? 0 : r0;
    const uint count = min(uint(Tile::ER), adapter.rank - r0);
    for (int i = 0; i < Tile::TM; ++i) {
      const uint row = at.sg_row + i * 8;
      typename OutMask::Key key = out_mask.key(at.row0 + row + fragment_row(at.lane));
      for (int j = 0; j < Tile::TN; ++j) {
        const uint column = at.sg_column + j * 8;
        simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (uint r = 0; r < count; r += 8) {
          simdgroup_matrix<float, 8, 8> left, right;
          simdgroup_load(left, hs + row * Tile::HS + h0 + r, Tile::HS);
          simdgroup_load(
              right,
              es + (Tile::BACKWARD ? r * Tile::ES + column : column * Tile::ES + r),
              Tile::ES,
              ulong2(0, 0),
              !Tile::BACKWARD);
          simdgroup_multiply_accumulate(sum, left, right, sum);
        }
        for (uint e = 0; e < 2; ++e) {
          const bool keep = out_mask.keep(key, at.column0 + column + fragment_column(at.lane) + e);
          acc[i][j].thread_elements()[e] +=
              keep ? adapter.scale * out_mask.keep_scale() * sum.thread_elements()[e] : 0.0f;
        }
      }
    }
  }
}

// y [m, n] (forward) or dx [m, k] from dy (BACKWARD); x_mask is the forward's dropout, out_mask
// dx's. u: x·Aᵀ or dy·B, from the first column of tiles, where WANTS_U. threadgroup_position: (tile
// of columns, tile of rows).
template <
    typename Tile,
    bool WANTS_U,
    typename T,
    typename Weight,
    typename AdapterT,
    typename XMask,
    typename OutMask,
    typename BiasT,
    typename PX>
inline void lora_gemm(
    Weight weight,
    AdapterT adapter,
    XMask x_mask,
    OutMask out_mask,
    BiasT bias,
    PX x,
    device T* y,
    device float* u,
    uint m,
    uint n,
    uint k,
    threadgroup float* memory,
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

  simdgroup_matrix<float, 8, 8> acc[Tile::TM][Tile::TN];
  for (int i = 0; i < Tile::TM; ++i) {
    for (int j = 0; j < Tile::TN; ++j) {
      acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  simdgroup_matrix<float, 8, 8> h[Tile::STRIPS][Tile::RANKS / 8];
  for (int s = 0; s < Tile::STRIPS; ++s) {
    for (int r = 0; r < Tile::RANKS / 8; ++r) {
      h[s][r] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
  }
  gemm_main_loop<Tile, T>(acc, h, weight, adapter, x_mask, x, m, n, k, memory, at);
  if (AdapterT::kExists) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (AdapterT::kComputesU) {
      gemm_keep_h<Tile, WANTS_U>(h, x_mask, u, m, adapter.rank, memory, at);
    }
    gemm_expand<Tile>(acc, adapter, out_mask, m, n, k, memory, at);
  }

  const uint width = Tile::BACKWARD ? k : n;
  for (int j = 0; j < Tile::TN; ++j) {
    const uint column = at.column0 + at.sg_column + j * 8;
    const uint mine = column + fragment_column(lane);
    const float bias0 = mine < width ? bias.at(mine) : 0.0f;
    const float bias1 = mine + 1 < width ? bias.at(mine + 1) : 0.0f;
    for (int i = 0; i < Tile::TM; ++i) {
      acc[i][j].thread_elements()[0] += bias0;
      acc[i][j].thread_elements()[1] += bias1;
      store_fragment(acc[i][j], y, at.row0 + at.sg_row + i * 8, m, column, width, lane);
    }
  }
}

}  // namespace metal_lora
