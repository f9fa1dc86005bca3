// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Weight policies of packed formats for the kernels of lora_kernels.metal and lora_tiled.metal:
//   affine   w = q·scale[group] + bias[group]     4 or 8 bits, groups of 32, 64, 128; MLX's packing
//   NF4      w = level[q]·absmax[block]           blocks of 64, absmax f32 or double-quantised
// Codes are unpacked in registers: 8 or 16 bytes a lane (RUN 16 or 32 weights), so that a simdgroup
// takes 256 or 512 bytes of a row at once. In the matrix-vector form weights stay f32; in the tiled
// form they are rounded to x's type in threadgroup memory: one rounding, 2^-11 or 2^-8 of a weight.
//
// Lanes that share a scale exchange it (simd_shuffle), so that scales and biases are read once too.
// Bytes of a weight of 4 bits, against 2 of a 16-bit one:
//   affine, 16-bit scales   0.5 + 4/group: 0.531 (group 128, 0.266x), 0.5625 (64, 0.281x)
//   NF4, f32 absmax         0.5 + 4/64 = 0.5625 (0.281x)
//   NF4, double-quantised   0.5 + 1/64 + 4/16384 = 0.516 (0.258x), and its table of 257 values and
//                           an absmax2 for 256 blocks again: the matrix-vector form copies the 257
//                           once a threadgroup (at most 3.5 %, see most_threadgroups) and reads an
//                           absmax2 once for the 8 or 16 blocks that a simdgroup takes at once
//                           (1.5 or 0.8 %); the tiled form reads 12 bytes a block from the cache
//
// Ladder (matrix-vector form, m = 1, n = k = 1024, rank 16 split, group 64; emulator's counters):
//   f16                     W 2.097 MB
//   int4, each lane its own scale and bias       W 0.524 MB, scales and biases 0.131 MB (2.0x)
//   int4, shared by shuffle                      W 0.524 MB, scales and biases 0.066 MB (1.0x)
//   NF4, double-quantised, 12 bytes a block      W 0.524 MB, codes 0.016 MB, table 0.197 MB (1.36x)
//   NF4, double-quantised, codes on chip         W 0.524 MB, codes 0.016 MB, table 0.021 MB (1.04x)

// @region weight_packed : common
// What the 4- and 8-bit policies share: a run's words, and values that lanes of one group exchange.
namespace metal_lora {

template <int WORDS>
struct PackedRun {
  Pack<uint, WORDS> words;
};

// WORDS words from word index `at`, or zeros.
template <int WORDS, typename P>
inline PackedRun<WORDS> load_packed(P from, uint at, bool valid) {
  PackedRun<WORDS> out;
  for (int i = 0; i < WORDS; ++i) {
    out.words.v[i] = 0;
  }
  if (valid) {
    out.words = load_pack<uint, WORDS>(from + at);
  }
  return out;
}

// Eight codes of BITS each from word 8·unit·BITS/32 on.
template <int BITS, int WORDS>
inline void unpack_codes(thread const PackedRun<WORDS>& run, int unit, thread uint (&codes)[8]) {
  for (int i = 0; i < 8; ++i) {
    const int bit = (unit * 8 + i) * BITS;
    codes[i] = (run.words.v[bit / 32] >> (bit % 32)) & ((1u << BITS) - 1u);
  }
}

}  // namespace metal_lora

// @region weight_affine : weight_packed
namespace metal_lora {

// w = q · scale + bias over groups of GROUP along a row, MLX's packing. SHARE adjacent lanes take
// runs of one group: the first reads its scale, the second its bias, so both are read once.
// C is the type that products are made in: x's.
template <typename C, int BITS, int GROUP, int RUN, int SHARE, typename PW, typename PS>
struct AffineWeight {
  typedef C Value;
  typedef PackedRun<RUN * BITS / 32> Run;
  struct Group {
    float scale, bias;
  };
  enum { kRun = RUN, kGroup = GROUP };
  PW w;
  PS scales, biases;
  uint columns;

  inline Group group(uint row, uint column, int valid, uint lane) const {
    const uint at = (row * columns + column) / GROUP;
    Group out;
    out.scale = 0.0f;
    out.bias = 0.0f;
    if (SHARE == 1) {
      if (valid > 0) {
        out.scale = float(scales[at]);
        out.bias = float(biases[at]);
      }
      return out;
    }
    const uint turn = lane % SHARE;
    float mine = 0.0f;
    if (valid > 0 && turn == 0) {
      mine = float(scales[at]);
    }
    if (valid > 0 && turn == 1) {
      mine = float(biases[at]);
    }
    out.scale = simd_shuffle(mine, ushort(lane - turn));
    out.bias = simd_shuffle(mine, ushort(lane - turn + 1));
    return out;
  }
  inline Run run(uint row, uint column, int valid) const {
    return load_packed<RUN * BITS / 32>(w, (row * columns + column) / (32 / BITS), valid > 0);
  }
  template <typename Out>
  inline void unpack(thread const Run& run, Group group, int unit, thread Pack<Out, 8>& out) const {
    uint codes[8];
    unpack_codes<BITS>(run, unit, codes);
    for (int i = 0; i < 8; ++i) {
      out.v[i] = Out(fma(float(codes[i]), group.scale, group.bias));
    }
  }
};

template <typename C, int BITS, int GROUP, int RUN, int SHARE, typename PW, typename PS>
inline AffineWeight<C, BITS, GROUP, RUN, SHARE, PW, PS> affine_weight(
    PW w, PS scales, PS biases, uint columns) {
  AffineWeight<C, BITS, GROUP, RUN, SHARE, PW, PS> out;
  out.w = w;
  out.scales = scales;
  out.biases = biases;
  out.columns = columns;
  return out;
}

}  // namespace metal_lora

// @region nf4_table :
namespace metal_lora {

// The 16 levels of NF4 (Dettmers et al., QLoRA, 2023, appendix E): quantiles of a normal
// distribution scaled to [-1, 1], with an exact zero.
constant float kNf4Levels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f};

}  // namespace metal_lora

// @region weight_nf4 : weight_packed nf4_table
namespace metal_lora {

// The scale of block i of 64 weights. All lanes of a simdgroup call at() together, `share` adjacent
// lanes of one block; those that do not want it get 0. Stored as it is …
template <typename PS>
struct PlainAbsmax {
  PS absmax;
  inline float at(uint block, bool wanted, uint, uint) const {
    return wanted ? float(absmax[block]) : 0.0f;
  }
};
template <typename PS>
inline PlainAbsmax<PS> plain_absmax(PS absmax) {
  PlainAbsmax<PS> out;
  out.absmax = absmax;
  return out;
}

// … or double-quantised: code[q]·absmax2[block / 256] + offset. table: {offset, code[256],
// absmax2[…]}.
constant constexpr uint kNestedHead = 257;

// The product is rounded first, as on the CPU, unless the compiler contracts it: one ulp.
inline float nested_absmax(float code, float outer, float offset) {
  const float product = code * outer;
  return product + offset;
}

template <typename PS, typename PT>
struct DoubleQuantAbsmax {
  PS codes;
  PT table;
  inline float at(uint block, bool wanted, uint, uint) const {
    if (!wanted) return 0.0f;
    return nested_absmax(table[1 + uint(codes[block])], table[kNestedHead + block / 256], table[0]);
  }
};
template <typename PS, typename PT>
inline DoubleQuantAbsmax<PS, PT> double_quant_absmax(PS codes, PT table) {
  DoubleQuantAbsmax<PS, PT> out;
  out.codes = codes;
  out.table = table;
  return out;
}

// The same with offset and codes in threadgroup memory, for lanes whose blocks follow one another
// along a row: they have at most two absmax2, and the first lane of each reads it for all.
template <typename PS, typename PT>
struct StagedAbsmax {
  PS codes;
  PT table;
  const threadgroup float* head;
  inline float at(uint block, bool wanted, uint lane, uint share) const {
    const uint first = simd_shuffle(block, ushort(0));
    const uint next = min(31u, (256 - first % 256) * share);
    float outer = 0.0f;
    if (wanted && (lane == 0 || lane == next)) outer = table[kNestedHead + block / 256];
    const float left = simd_shuffle(outer, ushort(0)), right = simd_shuffle(outer, ushort(next));
    if (!wanted) return 0.0f;
    outer = block / 256 == first / 256 ? left : right;
    return nested_absmax(head[1 + uint(codes[block])], outer, head[0]);
  }
};
template <typename PS, typename PT>
inline StagedAbsmax<PS, PT> staged_absmax(PS codes, PT table, const threadgroup float* head) {
  StagedAbsmax<PS, PT> out;
  out.codes = codes;
  out.table = table;
  out.head = head;
  return out;
}

// A barrier must follow before head is read.
template <int THREADS, typename PT>
inline void stage_nested_head(threadgroup float* head, PT table, uint thread_index) {
  for (uint i = thread_index; i < kNestedHead; i += THREADS) head[i] = table[i];
}

// w = level[q] · absmax over blocks of 64 along a row; SHARE adjacent lanes take runs of one block,
// the first reads its absmax.
template <typename C, int RUN, int SHARE, typename PW, typename Absmax>
struct Nf4Weight {
  typedef C Value;
  typedef PackedRun<RUN / 8> Run;
  struct Group {
    float absmax;
  };
  enum { kRun = RUN, kGroup = 64 };
  PW w;
  Absmax absmax;
  uint columns;

  inline Group group(uint row, uint column, int valid, uint lane) const {
    const uint turn = lane % SHARE;
    const bool wanted = valid > 0 && turn == 0;
    const float mine = absmax.at((row * columns + column) / 64, wanted, lane, SHARE);
    Group out;
    out.absmax = simd_shuffle(mine, ushort(lane - turn));
    return out;
  }
  inline Run run(uint row, uint column, int valid) const {
    return load_packed<RUN / 8>(w, (row * columns + column) / 8, valid > 0);
  }
  template <typename Out>
  inline void unpack(thread const Run& run, Group group, int unit, thread Pack<Out, 8>& out) const {
    uint codes[8];
    unpack_codes<4>(run, unit, codes);
    for (int i = 0; i < 8; ++i) {
      out.v[i] = Out(kNf4Levels[codes[i]] * group.absmax);
    }
  }
};

template <typename C, int RUN, int SHARE, typename PW, typename Absmax>
inline Nf4Weight<C, RUN, SHARE, PW, Absmax> nf4_weight(PW w, Absmax absmax, uint columns) {
  Nf4Weight<C, RUN, SHARE, PW, Absmax> out;
  out.w = w;
  out.absmax = absmax;
  out.columns = columns;
  return out;
}

}  // namespace metal_lora
