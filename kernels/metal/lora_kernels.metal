// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// y [m, n] = x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ for 1 … 8 tokens (the matrix-vector form), and what all
// linear kernels share: operands, weight policies. The tiled form and dx are in lora_tiled.metal,
// packed weights in lora_quantized.metal; plans_forward.cpp chooses.
//
// Tile: 16 simdgroups (8 for eight tokens: registers) x 4 rows of W each; x staged in threadgroup
// memory in chunks of up to 16 KiB and read from there by all rows; W goes past it once, 16 bytes a
// lane. u = x·Aᵀ is summed over the same chunks, stays in threadgroup memory, and B's columns are
// added to the rows' sums before their one simd_sum: A·x never leaves the chip, y is written once.
//
// Bytes read, n x k weights of w bytes, T = n / (64·passes) threadgroups, l = bytes of A's values:
//   one dispatch: n·k·w  +  T·rank·k·l  +  n·rank·l  +  T·m·k·bytes(x)
//   split:        n·k·w  +    rank·k·l  +  n·rank·l  +  (T + rank)·m·k·bytes(x)  +  T·m·rank·4
// so one dispatch repeats A by rank·l / (64·passes·w) of W's bytes: 1/4 for rank 16, all 16-bit.
//
// Ladder (m = 1, n = k = 1024, rank 16, f16; emulator's counters, bytes from device memory;
// unique: 2.16 MB, of which W 2.10):
//   rows per threadgroup   threadgroups   A read     x read    all      barriers  simd_sums
//   4                      256            8.39 MB    0.52 MB   5.10x    768       5120
//   16                     64             2.10 MB    0.13 MB   2.01x    192       2048
//   64                     16             0.52 MB    0.03 MB   1.24x    48        1280
//   split (16 + 64)        16 + 64        0.03 MB    0.16 MB   1.08x    16 + 128  1152
// In all of them W is read 1.00x and B 1.00x.

// @region common :
// Wide loads, compute types and the small structs that kernels take their operands in. Pointers are
// template parameters throughout: MLX hands arrays of fewer than 8 elements over in the constant
// space, all others in device.
namespace metal_lora {

// N consecutive values with the alignment of one: rows of any length may begin anywhere.
template <typename T, int N>
struct Pack {
  T v[N];
};

// Written element by element, for both address spaces; the compiler makes wide accesses of it, as
// it does of the same loop in MLX's own matrix-vector kernels.
template <typename T, int N, typename P>
inline Pack<T, N> load_pack(P from) {
  Pack<T, N> out;
  for (int i = 0; i < N; ++i) {
    out.v[i] = from[i];
  }
  return out;
}

// The first `valid` of N values, zeros for the rest.
template <typename T, int N, typename P>
inline Pack<T, N> load_pack_up_to(P from, int valid) {
  if (valid >= N) {
    return load_pack<T, N>(from);
  }
  Pack<T, N> out;
  for (int i = 0; i < N; ++i) {
    out.v[i] = T(0.0f);
    if (i < valid) {
      out.v[i] = from[i];
    }
  }
  return out;
}

// The type that products of T and U are made in: the matrix units take two equal types, so equal
// 16-bit types stay and all else is float.
template <typename T, typename U>
struct ProductType {
  typedef float type;
};
template <>
struct ProductType<half, half> {
  typedef half type;
};
template <>
struct ProductType<bfloat, bfloat> {
  typedef bfloat type;
};

struct NoBias {
  inline float at(uint) const { return 0.0f; }
};
template <typename P>
struct Bias {
  P values;
  inline float at(uint column) const { return values[column]; }
};
template <typename P>
inline Bias<P> make_bias(P values) {
  Bias<P> out;
  out.values = values;
  return out;
}

// The adapter of a linear: a [rank, k] and b [n, rank] of type LT (fused), or the product with the
// first of them already made, u [m, rank], and the second (given).
template <bool COMPUTES_U, bool GIVEN_U, typename LT, typename PA, typename PB, typename PU>
struct Adapter {
  typedef LT Value;
  enum { kComputesU = COMPUTES_U, kGivenU = GIVEN_U, kExists = COMPUTES_U || GIVEN_U };
  PA a;
  PB b;
  PU u;
  uint rank;
  float scale;
};

typedef Adapter<false, false, float, const device float*, const device float*, const device float*>
    NoAdapter;

inline NoAdapter no_adapter() {
  NoAdapter out;
  out.a = nullptr;
  out.b = nullptr;
  out.u = nullptr;
  out.rank = 0;
  out.scale = 0.0f;
  return out;
}
template <typename LT, typename PA, typename PB>
inline Adapter<true, false, LT, PA, PB, const device float*> fused_adapter(
    PA a, PB b, uint rank, float scale) {
  Adapter<true, false, LT, PA, PB, const device float*> out;
  out.a = a;
  out.b = b;
  out.u = nullptr;
  out.rank = rank;
  out.scale = scale;
  return out;
}
// `second` is b in the forward and a in dx; the other one is not read.
template <typename LT, typename PU, typename P>
inline Adapter<false, true, LT, P, P, PU> given_adapter(PU u, P second, uint rank, float scale) {
  Adapter<false, true, LT, P, P, PU> out;
  out.a = second;
  out.b = second;
  out.u = u;
  out.rank = rank;
  out.scale = scale;
  return out;
}

// No dropout; AdapterMask (region adapter_mask) has the same members.
struct NoMask {
  struct Key {};
  enum { kExists = 0 };
  inline Key key(uint) const { return Key(); }
  inline bool keep(Key, uint) const { return true; }
  inline float keep_scale() const { return 1.0f; }
};

}  // namespace metal_lora

// @region adapter_mask : common dropout
// Dropout of the adapter's input x [tokens, columns]: zeros in place, the kept values' factor
// 1 / (1 - p) is left to the f32 sum.
namespace metal_lora {

struct AdapterMask {
  typedef DropoutKey Key;
  enum { kExists = 1 };
  ulong seed;
  uint threshold;
  inline Key key(uint token) const { return dropout_key(seed, token); }
  inline bool keep(Key key, uint column) const { return dropout_keep(key, column, threshold); }
  inline float keep_scale() const {
    return 1.0f / (1.0f - float(threshold) * 2.3283064365386963e-10f);
  }
};

inline AdapterMask adapter_mask(uint seed_low, uint seed_high, uint threshold) {
  AdapterMask out;
  out.seed = (ulong(seed_high) << 32) | ulong(seed_low);
  out.threshold = threshold;
  return out;
}

}  // namespace metal_lora

// @region weight_dense : common
// A weight policy says how rows of W come from memory:
//   kRun     consecutive weights that one lane takes at once, a multiple of 8;
//   kGroup   weights along a row that share a Group (scale and the like);
//   group(row, column, valid, lane), run(row, column, valid): what is stored; column a multiple of
//            kRun, valid = how many weights from column on exist (may be <= 0). group() exchanges
//            values within the simdgroup: all its lanes call it together;
//   unpack(run, group, unit, out): weights 8·unit … 8·unit + 7 of the run, as values of any type.
// Value is the type that the tiled kernel multiplies in (with x's).
namespace metal_lora {

template <typename WT, typename P>
struct DenseWeight {
  typedef WT Value;
  typedef Pack<WT, 8> Run;
  struct Group {};
  enum { kRun = 8, kGroup = 8 };
  P w;
  uint columns;

  inline Group group(uint, uint, int, uint) const { return Group(); }
  inline Run run(uint row, uint column, int valid) const {
    return load_pack_up_to<WT, 8>(w + row * columns + column, valid);
  }
  template <typename C>
  inline void unpack(thread const Run& run, Group, int, thread Pack<C, 8>& out) const {
    for (int i = 0; i < 8; ++i) {
      out.v[i] = C(run.v[i]);
    }
  }
};

template <typename WT, typename P>
inline DenseWeight<WT, P> dense_weight(P w, uint columns) {
  DenseWeight<WT, P> out;
  out.w = w;
  out.columns = columns;
  return out;
}

}  // namespace metal_lora

// @region gemv : common
namespace metal_lora {

// TOKENS: 1, 2, 4 or 8, at least m. Threadgroup of SIMDGROUPS·32 threads.
template <typename T, int TOKENS_, int SIMDGROUPS_, int RANKS, int RUN>
struct GemvTile {
  enum {
    TOKENS = TOKENS_,
    SIMDGROUPS = SIMDGROUPS_,
    ROWS = 4,          // of W, per simdgroup
    BLOCK = 32 * RUN,  // weights of a row that a simdgroup takes at once
    FIT = 16384 / (TOKENS_ * int(sizeof(T))),
    CHUNK = (FIT < 2048 ? FIT : 2048) / BLOCK * BLOCK,  // of K, staged in threadgroup memory
    X_SIZE = TOKENS_ * CHUNK,
    U_SIZE = TOKENS_ * RANKS
  };
};

// Where element e of a chunk lies: 8 values stay together, and the 32 lanes' values for one step of
// unpacking lie side by side, so that lanes that take runs of 16 or 32 hit all banks.
template <int RUN>
inline uint gemv_place(uint e) {
  const uint in_block = e % (32 * RUN);
  const uint lane = in_block / RUN, j = in_block % RUN;
  return e - in_block + (j / 8) * 256 + lane * 8 + j % 8;
}

template <typename Tile, int RUN, typename T, typename PX>
inline void gemv_stage_x(threadgroup T* xs, PX x, uint m, uint k, uint k0, uint thread_index) {
  const uint size = min(uint(Tile::CHUNK), (k - k0 + Tile::BLOCK - 1) / Tile::BLOCK * Tile::BLOCK);
  for (uint i = thread_index; i < Tile::TOKENS * (size / 8); i += Tile::SIMDGROUPS * 32) {
    const uint token = i / (size / 8), e = i % (size / 8) * 8;
    const int valid = token < m ? int(k) - int(k0 + e) : 0;
    *reinterpret_cast<threadgroup Pack<T, 8>*>(xs + token * Tile::CHUNK + gemv_place<RUN>(e)) =
        load_pack_up_to<T, 8>(x + token * k + k0 + e, valid);
  }
}

// us[token][r] += Σ over the staged chunk of x·A; each simdgroup owns every SIMDGROUPS-th r.
template <typename Tile, int RUN, typename LT, typename T, typename PA>
inline void gemv_shrink_chunk(
    threadgroup float* us,
    const threadgroup T* xs,
    PA a,
    uint rank,
    uint k,
    uint k0,
    uint simdgroup_index,
    uint lane) {
  const uint end = min(k, k0 + Tile::CHUNK);
  for (uint r = simdgroup_index; r < rank; r += Tile::SIMDGROUPS) {
    float sums[Tile::TOKENS];
    for (int t = 0; t < Tile::TOKENS; ++t) {
      sums[t] = 0.0f;
    }
    for (uint column = k0 + lane * 8; column < end; column += 256) {
      const Pack<LT, 8> values = load_pack_up_to<LT, 8>(a + r * k + column, int(k) - int(column));
      const uint place = gemv_place<RUN>(column - k0);
      for (int t = 0; t < Tile::TOKENS; ++t) {
        const threadgroup T* xt = xs + t * Tile::CHUNK + place;
        for (int i = 0; i < 8; ++i) {
          sums[t] += float(values.v[i]) * float(xt[i]);
        }
      }
    }
    for (int t = 0; t < Tile::TOKENS; ++t) {
      const float sum = simd_sum(sums[t]);
      if (lane == 0) {
        us[t * rank + r] = k0 == 0 ? sum : us[t * rank + r] + sum;
      }
    }
  }
}

// sums[row][token] += W rows row0 … row0 + ROWS - 1 times the staged chunk.
template <typename Tile, typename Weight, typename T>
inline void gemv_multiply_chunk(
    thread float (&sums)[Tile::ROWS][Tile::TOKENS],
    thread const Weight& weight,
    const threadgroup T* xs,
    uint row0,
    uint n,
    uint k,
    uint k0,
    uint lane) {
  const uint end = min(k, k0 + Tile::CHUNK);
  for (uint block = k0; block < end; block += Tile::BLOCK) {
    const uint column = block + lane * Weight::kRun;
    typename Weight::Run runs[Tile::ROWS];
    typename Weight::Group groups[Tile::ROWS];
    for (int row = 0; row < Tile::ROWS; ++row) {
      const int valid = row0 + row < n ? int(k) - int(column) : 0;
      groups[row] = weight.group(row0 + row, column, valid, lane);
      runs[row] = weight.run(row0 + row, column, valid);
    }
    for (int unit = 0; unit < Weight::kRun / 8; ++unit) {
      Pack<float, 8> w[Tile::ROWS];
      for (int row = 0; row < Tile::ROWS; ++row) {
        weight.unpack(runs[row], groups[row], unit, w[row]);
      }
      const threadgroup T* at = xs + (block - k0) + unit * 256 + lane * 8;
      for (int t = 0; t < Tile::TOKENS; ++t) {
        const Pack<T, 8> xt =
            *reinterpret_cast<const threadgroup Pack<T, 8>*>(at + t * Tile::CHUNK);
        for (int row = 0; row < Tile::ROWS; ++row) {
          for (int i = 0; i < 8; ++i) {
            sums[row][t] += w[row].v[i] * float(xt.v[i]);
          }
        }
      }
    }
  }
}

// y [m, n] for m <= TOKENS; threadgroup_index counts strips of SIMDGROUPS·ROWS·passes rows of W.
// Also u [m, rank] from the first threadgroup where WANTS_U.
template <
    typename Tile,
    bool WANTS_U,
    typename T,
    typename Weight,
    typename AdapterT,
    typename BiasT,
    typename PX>
inline void lora_gemv(
    Weight weight,
    AdapterT adapter,
    BiasT bias,
    PX x,
    device T* y,
    device float* u,
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
  const uint rank = adapter.rank;
  if (AdapterT::kGivenU) {
    for (uint i = thread_index; i < Tile::TOKENS * rank; i += Tile::SIMDGROUPS * 32) {
      us[i] = i < m * rank ? float(adapter.u[i]) : 0.0f;
    }
  }
  for (uint pass = 0; pass < passes; ++pass) {
    const uint row0 =
        ((threadgroup_index * passes + pass) * Tile::SIMDGROUPS + simdgroup_index) * Tile::ROWS;
    float sums[Tile::ROWS][Tile::TOKENS];
    for (int row = 0; row < Tile::ROWS; ++row) {
      for (int t = 0; t < Tile::TOKENS; ++t) {
        sums[row][t] = 0.0f;
      }
    }
    for (uint k0 = 0; k0 < k; k0 += Tile::CHUNK) {
      // A chunk that holds all of K stays for all passes.
      if (pass == 0 || k > uint(Tile::CHUNK)) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        gemv_stage_x<Tile, Weight::kRun>(xs, x, m, k, k0, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      if (AdapterT::kComputesU && pass == 0) {
        gemv_shrink_chunk<Tile, Weight::kRun, typename AdapterT::Value>(
            us, xs, adapter.a, rank, k, k0, simdgroup_index, lane);
      }
      gemv_multiply_chunk<Tile>(sums, weight, xs, row0, n, k, k0, lane);
    }
    if (AdapterT::kComputesU && pass == 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    if (WANTS_U && pass == 0 && threadgroup_index == 0) {
      for (uint i = thread_index; i < m * rank; i += Tile::SIMDGROUPS * 32) {
        u[i] = us[i];
      }
    }
    // B's columns go on where K ended: lane r holds column r.
    for (int row = 0; row < Tile::ROWS && AdapterT::kExists; ++row) {
      for (uint r = lane; r < rank && row0 + row < n; r += 32) {
        const float b = adapter.scale * float(adapter.b[(row0 + row) * rank + r]);
        for (int t = 0; t < Tile::TOKENS; ++t) {
          sums[row][t] += b * us[t * rank + r];
        }
      }
    }
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
