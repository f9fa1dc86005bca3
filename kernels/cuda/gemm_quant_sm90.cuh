// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernel of gemm_quant.cpp, which says what it does and how fast. yᵀ = W·xᵀ: W is the operand
// in registers, since only there can codes become weights on the way. A warp feeds two rings, of
// codes (128 rows x 256 of k) and of x (tokens x 64 of k); two warpgroups of 64 rows each decode
// the next step of 64 while the matrix unit works on the last.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/gemm_quant_args.h"
#include "kernels/cuda/gemm_quant_wgmma.cuh"
#include "kernels/cuda/lora_gemv_formats.cuh"

namespace metal_lora::cuda::quant {

constexpr uint32_t kConsumers = 256, kThreads = kConsumers + 128;
constexpr uint32_t kCodeBytes = kRows * 128;

/// kInside: columns of u that the block sums itself, or 0.
template <uint32_t kTokens, uint32_t kInside>
struct Layout {
  static constexpr bool kTwo = blocks_of(kTokens, kInside) == 2;
  static constexpr uint32_t kXBytes = kTokens * 128;
  static constexpr uint32_t kStageBytes = kXBytes + kInside * 128;  ///< with A's part
  static constexpr uint32_t kCodeStages = kTokens == 256 ? 2 : kTwo ? 3 : 4;
  static constexpr uint32_t kOutBytes = kTokens * 2 * kRows;
  static constexpr uint32_t kRoom =
      (kTwo ? 110 : 224) * 1024 - kCodeStages * kCodeBytes - kOutBytes;
  static constexpr uint32_t kXStages = kRoom / kStageBytes < 8 ? kRoom / kStageBytes : 8;
  static constexpr uint32_t kXOffset = kCodeStages * kCodeBytes;
  static constexpr uint32_t kOutOffset = kXOffset + kXStages * kStageBytes;
  static constexpr uint32_t kBarrierOffset = kOutOffset + kOutBytes;
  static constexpr uint32_t kTableOffset = kBarrierOffset + 16 * (kCodeStages + kXStages);
  static constexpr uint32_t kBytes = kTableOffset + 64 + 1024;                 ///< 1024: alignment
  static_assert((kBytes + 1024) * blocks_of(kTokens, kInside) <= 228 * 1024);  // 1024: the system's
  /// Parts of the sums on their way between blocks take the rings' place, then those of u.
  static constexpr uint32_t kLowOffset = kTokens * kRows * 4;
  static_assert(kLowOffset + kTokens * kInside * 4 <= kOutOffset);
};

// ---- formats: the scales of a thread's two rows, and the pairs of weights in a word whose byte i
// holds a pair's codes ----

struct Int4 {
  float scale[2], bias[2];
  /// Of one group of rows `row` and `row` + 8; beyond the matrix zero, so that weights are.
  __device__ __forceinline__ void load(const Args& args, uint32_t row, uint32_t group) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const bool inside = row + 8 * i < args.n && group < args.groups;
      const size_t at = size_t{row + 8 * i} * args.groups + group;
      scale[i] = inside ? gemv::load_as_float(args.scales, args.scales_dtype, at) : 0.0f;
      bias[i] = inside ? gemv::load_as_float(args.biases, args.scales_dtype, at) : 0.0f;
    }
  }
  /// Of the group that lane `lane` of each quad holds.
  __device__ __forceinline__ Int4 of(uint32_t lane) const {
    Int4 v;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v.scale[i] = __shfl_sync(0xffffffffu, scale[i], lane, 4);
      v.bias[i] = __shfl_sync(0xffffffffu, bias[i], lane, 4);
    }
    return v;
  }
  /// A code q below the bits of 1.0f is 1 + q/16, or 1 + q/256 four bits lower: a shift and two
  /// logic operations make a pair, and one fma each their weights.
  template <typename T>
  __device__ __forceinline__ void decode(
      uint32_t word, uint32_t row, uint32_t, uint32_t (&pair)[4]) const {
    const float s = scale[row], low = 256.0f * s, high = 16.0f * s;
    const float low_bias = bias[row] - low, high_bias = bias[row] - high;
    const uint32_t shifted[4] = {word << 15, word << 7, word >> 1, word >> 9};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float even = __uint_as_float(gemv::mask_or(shifted[i], 0x00078000u, 0x3f800000u));
      const float odd = __uint_as_float(gemv::mask_or(shifted[i], 0x00780000u, 0x3f800000u));
      pair[i] = mma::pack2<T>(__fmaf_rn(even, low, low_bias), __fmaf_rn(odd, high, high_bias));
    }
  }
};

struct Nf4 {
  float scale[2];
  __device__ __forceinline__ void load(const Args& args, uint32_t row, uint32_t group) {
    const auto* nested = static_cast<const float*>(args.biases);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const size_t at = size_t{row + 8 * i} * args.groups + group;
      if (row + 8 * i >= args.n || group >= args.groups) {
        scale[i] = 0.0f;
      } else if (args.double_quant) {
        const float code = __ldg(nested + 1 + static_cast<const uint8_t*>(args.scales)[at]);
        const float scaled = __fmul_rn(code, __ldg(nested + kNf4NestedHead + at / kNf4NestedBlock));
        scale[i] = __fadd_rn(scaled, __ldg(nested));
      } else {
        scale[i] = static_cast<const float*>(args.scales)[at];
      }
    }
  }
  __device__ __forceinline__ Nf4 of(uint32_t lane) const {
    Nf4 v;
    for (int i = 0; i < 2; ++i) v.scale[i] = __shfl_sync(0xffffffffu, scale[i], lane, 4);
    return v;
  }
  /// table: 16 levels in 16 banks.
  template <typename T>
  __device__ __forceinline__ void decode(
      uint32_t word, uint32_t row, uint32_t table, uint32_t (&pair)[4]) const {
    const float s = scale[row];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t even = i == 0 ? word << 2 : word >> (8 * i - 2), odd = word >> (8 * i + 2);
      pair[i] = mma::pack2<T>(
          __fmul_rn(gemv::load_shared_float(table + (even & 0x3cu)), s),
          __fmul_rn(gemv::load_shared_float(table + (odd & 0x3cu)), s));
    }
  }
};

// ---- what producer and consumers agree on ----

template <uint32_t kStages>
struct Ring {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <uint32_t kTokens, uint32_t kInside>
struct Block {
  using L = Layout<kTokens, kInside>;
  uint32_t shared, cluster, rank, blocks;
  uint32_t first_chunk, end_chunk;
  bool adds_low;  ///< u·Bᵀ is this block's
  __device__ __forceinline__ Block(const Args& args, uint32_t shared) : shared(shared) {
    blocks = args.splits * args.sharers;
    // %cluster_ctarank, but known to the compiler as the same for all threads.
    cluster = blockIdx.x / blocks;
    rank = blockIdx.x % blocks;
    const uint32_t part = args.splits == 1 ? 0 : rank;
    first_chunk = args.chunks * part / args.splits;
    end_chunk = args.chunks * (part + 1) / args.splits;
    adds_low = args.rank > 0 && (kInside > 0 || part + 1 == args.splits);
  }
  __device__ __forceinline__ uint32_t codes(uint32_t stage) const {
    return shared + stage * kCodeBytes;
  }
  __device__ __forceinline__ uint32_t x(uint32_t stage) const {
    return shared + L::kXOffset + stage * L::kStageBytes;
  }
  __device__ __forceinline__ uint32_t codes_full(uint32_t stage) const {
    return shared + L::kBarrierOffset + 8 * stage;
  }
  __device__ __forceinline__ uint32_t codes_empty(uint32_t stage) const {
    return codes_full(L::kCodeStages + stage);
  }
  __device__ __forceinline__ uint32_t x_full(uint32_t stage) const {
    return codes_full(2 * L::kCodeStages + stage);
  }
  __device__ __forceinline__ uint32_t x_empty(uint32_t stage) const {
    return codes_full(2 * L::kCodeStages + L::kXStages + stage);
  }
  /// Calls f(first token, first row of W) for each of the block's tiles.
  template <typename F>
  __device__ __forceinline__ void for_each_tile(const Args& args, F&& f) const {
    const uint32_t tiles = args.tiles_m * args.tiles_n;
    for (uint32_t index = cluster; index < tiles; index += gridDim.x / blocks) {
      const uint32_t band = index / (args.band * args.tiles_n);
      const uint32_t rest = index - band * args.band * args.tiles_n;
      const uint32_t height = min(args.band, args.tiles_m - band * args.band);
      const uint32_t tile_n = rest / height;
      const uint32_t tile_m = band * args.band + rest - tile_n * height;
      const uint32_t share = args.sharers == 1 ? 0 : rank;
      f(tile_m * kTokens, (tile_n * args.sharers + share) * kRows);
    }
  }
};

/// One thread: all copies of the block.
template <uint32_t kTokens, uint32_t kInside>
__device__ __forceinline__ void produce(const Args& args, const Block<kTokens, kInside>& block) {
  using L = Layout<kTokens, kInside>;
  Ring<L::kCodeStages> codes;
  Ring<L::kXStages> x;
  const uint32_t part = kTokens / args.sharers, part_at = args.sharers == 1 ? 0 : block.rank * part;
  const auto load_x = [&](const CUtensorMap* map, uint32_t column, uint32_t token) {
    barrier_wait(block.x_empty(x.stage), x.parity ^ 1);
    barrier_expect(block.x_full(x.stage), L::kStageBytes);
    if constexpr (kInside > 0) {
      tensor_load(block.x(x.stage) + L::kXBytes, &args.a, block.x_full(x.stage), column, 0);
    }
    const uint32_t to = block.x(x.stage) + part_at * 128;
    if (args.sharers == 1) {
      tensor_load(to, map, block.x_full(x.stage), column, token);
    } else {
      tensor_load_multicast(to, map, block.x_full(x.stage), column, token + part_at, 3);
    }
    x.advance();
  };
  const auto load_codes = [&](const CUtensorMap* map, uint32_t column, uint32_t row) {
    barrier_wait(block.codes_empty(codes.stage), codes.parity ^ 1);
    barrier_expect(block.codes_full(codes.stage), kCodeBytes);
    tensor_load(block.codes(codes.stage), map, block.codes_full(codes.stage), column, row);
    codes.advance();
  };
  bool waited = false;
  const auto wait = [&] {
    if (!waited) dependency_wait();
    waited = true;
  };
  block.for_each_tile(args, [&](uint32_t token, uint32_t row) {
    if (!waited) {
      const uint32_t end = min(block.end_chunk, block.first_chunk + 8);
      for (uint32_t c = block.first_chunk; c < end; ++c) tensor_prefetch(&args.codes, 64 * c, row);
      if (!args.weights_ready) wait();
    }
    for (uint32_t chunk = block.first_chunk; chunk < block.end_chunk; ++chunk) {
      load_codes(&args.codes, 64 * chunk, row);
      wait();
      for (uint32_t j = 0; j < 4; ++j) load_x(&args.x, kChunk * chunk + kStep * j, token);
    }
    if (!block.adds_low) return;
    for (uint32_t c = 0; c < args.rank; c += kStep) {
      load_codes(&args.b, c, row);
      if constexpr (kInside == 0) load_x(&args.u, c, token);
    }
  });
  // The block stays until its neighbour has arrived at its barriers for the last time.
  if (args.sharers == 1) return;
  for (uint32_t i = 0; i < L::kXStages; ++i, x.advance()) {
    barrier_wait(block.x_empty(x.stage), x.parity ^ 1);
  }
}

/// The operand of half a step, 32 of k, from its codes: two slices of 16.
template <class Format, typename T>
__device__ __forceinline__ void decode_half(
    uint32_t (&a)[8], uint32_t row_at, uint32_t half, const Format& scales, uint32_t table) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (uint32_t row = 0; row < 2; ++row) {
    const uint4 v = gemv::load_shared16(row_at + row * 8 * 128 + (half ^ g) * 16);
    // A thread's pairs are byte t of each word: columns 8i + 2t and + 1.
    const uint32_t select = t | (t + 4) << 4;
    const uint32_t word =
        __byte_perm(__byte_perm(v.x, v.y, select), __byte_perm(v.z, v.w, select), 0x5410);
    uint32_t pair[4];
    scales.template decode<T>(word, row, table, pair);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) a[2 * i + row] = pair[i];
  }
}

/// A pair of results of rows n, n + 8 and tokens 2t, 2t + 1: bias and residual.
template <typename T>
__device__ __forceinline__ void add_terms(
    const Args& args, float* d, const float (&bias)[2], uint32_t row, uint32_t token) {
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t r = row + i / 2 * 8, m = token + i % 2;
    d[i] += bias[i / 2];
    if (args.residual != nullptr && r < args.n && m < args.m) {
      d[i] += to_float(static_cast<const T*>(args.residual)[size_t{m} * args.n + r]);
    }
  }
}

/// One warpgroup: 64 rows of W of each tile.
template <class Format, typename T, uint32_t kTokens, uint32_t kInside>
__device__ __forceinline__ void consume(
    const Args& args, const Block<kTokens, kInside>& block, uint32_t warp, uint32_t table) {
  using L = Layout<kTokens, kInside>;
  constexpr uint32_t kBlocks = kTokens / 8;  // of 8 tokens: four sums of a thread each
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = warp / 4;
  const uint32_t out = block.shared + L::kOutOffset + group * kTokens * 128;
  Ring<L::kCodeStages> codes;
  Ring<L::kXStages> x;
  const bool releases = lane < args.sharers;
  const uint32_t release_to = args.sharers == 1 ? block.rank : lane;
  // 8 tokens of this warp's 16 columns of y, swizzled as the copy engine wants them.
  const auto put = [&](const float* d, uint32_t i) {
    const uint32_t token = 8 * i + lane % 8, slot = (warp % 4 * 2 + lane / 8 % 2) ^ (lane % 8);
    store_across_x2(
        out + token * 128 + slot * 16, mma::pack2<T>(d[0], d[1]), mma::pack2<T>(d[2], d[3]));
  };
  if (!args.weights_ready) dependency_wait();
  bool waited = !args.weights_ready;
  block.for_each_tile(args, [&](uint32_t token0, uint32_t row0) {
    const uint32_t row = row0 + warp * 16 + g;
    float d[kTokens / 2];
    uint32_t a[2][8];
    float low[kInside > 0 ? kInside / 2 : 1];
    const bool sums_low = kInside > 0 && group * 64 < kTokens;
    int accumulate = 0;
    uint32_t reading = 0;
    const auto release_previous = [&] {
      if (accumulate != 0 && releases) barrier_arrive_remote(block.x_empty(reading), release_to);
      reading = x.stage;
      accumulate = 1;
    };
    const auto row_at = [&] { return block.codes(codes.stage) + (warp * 16 + g) * 128; };
    const auto release_codes = [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive_remote(block.codes_empty(codes.stage), block.rank);
      codes.advance();
    };
    Format chunk_scales, next, scales;  // of the chunk's groups, one a lane of the quad; of a step
    const auto load_scales = [&](Format& to, uint32_t chunk) {
      to.load(args, row, (4 * chunk + t) >> args.group_log2);
    };
    const auto first_half = [&] {
      scales = chunk_scales.of(0);
      barrier_wait(block.codes_full(codes.stage), codes.parity);
      decode_half<Format, T>(a[0], row_at(), 0, scales, table);
    };
    // u = x·Aᵀ of this half step: 64 tokens a warpgroup (of 32, the rest is not looked at).
    const auto multiply_low = [&](uint32_t half, int add) {
      const uint32_t at = block.x(x.stage);
      const uint64_t left = wgmma_descriptor(at + group * 64 * 128, 16) + 4 * half;
      const uint64_t right = wgmma_descriptor(at + L::kXBytes, 16) + 4 * half;
#pragma unroll
      for (uint32_t s = 0; s < 2; ++s) {
        if constexpr (kInside == 16) {
          wgmma_narrow<T>(low, left + 2 * s, right + 2 * s, s == 0 ? add : 1);
        } else if constexpr (kInside == 64) {
          wgmma<T, 0>(low, left + 2 * s, right + 2 * s, s == 0 ? add : 1);
        }
      }
    };
    const auto multiply_chunk = [&](auto last) {
#pragma unroll
      for (uint32_t h = 0; h < 8; ++h) {
        if (h % 2 == 0) barrier_wait(block.x_full(x.stage), x.parity);
        const uint64_t right = wgmma_descriptor(block.x(x.stage), 16) + h % 2 * 4;
        wgmma_fence();
        wgmma_registers<T>(d, &a[h % 2][0], right, h == 0 ? accumulate : 1);
        wgmma_registers<T>(d, &a[h % 2][4], right + 2, 1);
        if constexpr (kInside > 0) {
          if (sums_low) multiply_low(h % 2, h == 0 ? accumulate : 1);
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (h % 2 == 0) {
          release_previous();
        } else {
          x.advance();
        }
        if (h < 7) {
          if (h % 2 == 1) scales = chunk_scales.of(h / 2 + 1);
          decode_half<Format, T>(a[(h + 1) % 2], row_at(), h + 1, scales, table);
          if (h == 6) release_codes();
        } else if constexpr (!decltype(last)::value) {
          chunk_scales = next;
          first_half();
        }
      }
    };
    load_scales(chunk_scales, block.first_chunk);
    first_half();
    for (uint32_t chunk = block.first_chunk; chunk + 1 < block.end_chunk; ++chunk) {
      load_scales(next, chunk + 1);
      multiply_chunk(std::false_type());
    }
    multiply_chunk(std::true_type());
    wgmma_wait<0>();
    if (kInside == 0 && block.adds_low) {
      for (uint32_t c = 0; c < args.rank; c += kStep) {
        barrier_wait(block.codes_full(codes.stage), codes.parity);
        // Rows of B as a fragment: lane i points at row i % 16, columns 8·(i / 16).
        const uint32_t at = block.codes(codes.stage) + (warp * 16 + lane % 16) * 128;
        barrier_wait(block.x_full(x.stage), x.parity);
        const uint64_t right = wgmma_descriptor(block.x(x.stage), 16);
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
          for (uint32_t s = 0; s < 2; ++s) {
            uint32_t(&to)[4] = *reinterpret_cast<uint32_t(*)[4]>(&a[half][4 * s]);
            mma::load_x4(to, at + (((4 * half + 2 * s + lane / 16) ^ (lane % 8)) << 4));
          }
          wgmma_fence();
#pragma unroll
          for (uint32_t s = 0; s < 2; ++s) {
            wgmma_registers<T>(d, &a[half][4 * s], right + 4 * half + 2 * s, 1);
          }
          wgmma_commit();
        }
        wgmma_wait<0>();
        release_codes();
        release_previous();
        x.advance();
      }
    }
    wgmma_sums_fence(d);
    if (releases) barrier_arrive_remote(block.x_empty(reading), release_to);
    if (!waited) dependency_wait();  // the kernels before this one may still read or write y
    waited = true;
    float bias[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      bias[i] = args.bias != nullptr && row + 8 * i < args.n ? args.bias[row + 8 * i] : 0.0f;
    }
    const bool first = threadIdx.x % 128 == 0;
    if (kInside == 0 && args.splits == 1) {
      if (first) tensor_store_wait_read<0>();  // the tile before
      named_barrier(1 + group, 128);
#pragma unroll
      for (uint32_t i = 0; i < kBlocks; ++i) {
        add_terms<T>(args, &d[4 * i], bias, row, token0 + 8 * i + 2 * t);
        put(&d[4 * i], i);
      }
      async_proxy_fence();
      named_barrier(1 + group, 128);
      if (first && row0 + 64 * group < args.n) {
        tensor_store(&args.out, out, row0 + 64 * group, token0);
      }
      return;
    }
    // Each block adds up every splits-th 8 tokens of all parts. One tile a cluster: the rings are
    // over, and their place takes the parts.
    [[maybe_unused]] uint32_t b[kInside > 0 ? kInside / 16 : 1][4];
    if constexpr (kInside > 0) {
      barrier_wait(block.codes_full(codes.stage), codes.parity);
      // Rows of B as fragments: lane i points at row i % 16, columns 8·(i / 16) of each slice.
      const uint32_t at = block.codes(codes.stage) + (warp * 16 + lane % 16) * 128;
#pragma unroll
      for (uint32_t s = 0; s < kInside / 16; ++s) {
        mma::load_x4(b[s], at + (((2 * s + lane / 16) ^ (lane % 8)) << 4));
      }
      wgmma_sums_fence(low);
    }
    named_barrier(3, kConsumers);
    const uint32_t parts = block.shared + threadIdx.x * 16;
#pragma unroll
    for (uint32_t i = 0; i < kBlocks; ++i) store_shared16(parts + i * kConsumers * 16, &d[4 * i]);
    const uint32_t lows = block.shared + L::kLowOffset;
    if constexpr (kInside > 0) {
      const uint32_t token = group * 64 + warp % 4 * 16 + g;
      if (sums_low && token < kTokens) {
#pragma unroll
        for (uint32_t j = 0; j < kInside / 8; ++j) {
          const uint32_t at = lows + (token * kInside + 8 * j + 2 * t) * 4;
          store_shared8(at, low[4 * j], low[4 * j + 1]);
          store_shared8(at + 8 * kInside * 4, low[4 * j + 2], low[4 * j + 3]);
        }
      }
    }
    if (args.splits > 1) {
      cluster_sync();
    } else {
      named_barrier(3, kConsumers);
    }
    for (uint32_t i = block.rank; i < kBlocks; i += args.splits) {
      float4 part[8];
#pragma unroll
      for (uint32_t p = 0; p < 8; ++p) {
        if (p < args.splits) part[p] = load_cluster16(parts + i * kConsumers * 16, p);
      }
      float sum[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
      for (uint32_t p = 1; p < 8; ++p) {
        if (p >= args.splits) continue;
        sum[0] += part[p].x, sum[1] += part[p].y, sum[2] += part[p].z, sum[3] += part[p].w;
      }
      if constexpr (kInside > 0) {
        const uint32_t at = lows + ((8 * i + g) * kInside + 2 * t) * 4;
#pragma unroll
        for (uint32_t s = 0; s < kInside / 16; ++s) {
          uint32_t u[2];
#pragma unroll
          for (uint32_t half = 0; half < 2; ++half) {
            float2 two = load_cluster8(at + (16 * s + 8 * half) * 4, 0);
            for (uint32_t p = 1; p < args.splits; ++p) {
              const float2 more = load_cluster8(at + (16 * s + 8 * half) * 4, p);
              two.x += more.x, two.y += more.y;
            }
            u[half] = mma::pack2<T>(two.x * args.factor, two.y * args.factor);
          }
          mma::multiply<T>(sum, b[s], u[0], u[1]);
        }
      }
      add_terms<T>(args, sum, bias, row, token0 + 8 * i + 2 * t);
      put(sum, i);
    }
    async_proxy_fence();
    named_barrier(1 + group, 128);
    if (first && row0 + 64 * group < args.n) {
      for (uint32_t i = block.rank; i < kBlocks && token0 + 8 * i < args.m; i += args.splits) {
        tensor_store(&args.out, out + i * 1024, row0 + 64 * group, token0 + 8 * i);
      }
    }
  });
  if (args.splits > 1) cluster_sync_relaxed();  // the others have read this block's parts
  if (threadIdx.x % 128 == 0) tensor_store_wait_read<0>();
}

template <class Format, typename T, uint32_t kTokens, uint32_t kInside>
__global__ void __launch_bounds__(kThreads, blocks_of(kTokens, kInside))
    gemm_quant_kernel(const __grid_constant__ Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kTokens, kInside>;
  extern __shared__ uint8_t raw[];
  const uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  const Block<kTokens, kInside> block(args, shared);
  const uint32_t table = shared + L::kTableOffset;
  if (threadIdx.x == 0) {
    dependents_launch();
    for (uint32_t i = 0; i < L::kCodeStages; ++i) {
      barrier_init(block.codes_full(i), 1);
      barrier_init(block.codes_empty(i), 8);
    }
    for (uint32_t i = 0; i < L::kXStages; ++i) {
      barrier_init(block.x_full(i), 1);
      barrier_init(block.x_empty(i), 8 * args.sharers);
    }
    barrier_init_fence();
  }
  if (std::is_same_v<Format, Nf4> && threadIdx.x >= 32 && threadIdx.x < 48) {
    const uint32_t i = threadIdx.x - 32;
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(table + 4 * i), "f"(gemv::nf4_level(i))
                 : "memory");
  }
  __syncthreads();
  if (block.blocks > 1) cluster_sync_relaxed();
  // Broadcast: the compiler must know that whole warps take a branch, or it orders wgmma one by
  // one.
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= kConsumers / 32) {
    registers_shrink<L::kTwo ? 32 : 40>();
    if (threadIdx.x == kConsumers) produce<kTokens, kInside>(args, block);
    __syncwarp();
    if (args.splits > 1) {  // the consumers' exchange of parts
      cluster_sync_relaxed();
      cluster_sync_relaxed();
    }
  } else {
    registers_grow<L::kTwo ? 104 : 232>();
    consume<Format, T, kTokens, kInside>(args, block, warp, table);
  }
#endif
}

template <class Format, typename T, uint32_t kTokens, uint32_t kInside>
void launch_form(const Context& context, const Args& args) {
  const auto kernel = gemm_quant_kernel<Format, T, kTokens, kInside>;
  constexpr int kBytes = Layout<kTokens, kInside>::kBytes;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "gemm_quantized");
  const uint32_t blocks = args.splits * args.sharers, tiles = args.tiles_m * args.tiles_n;
  const uint32_t slots = context.multiprocessors * blocks_of(kTokens, kInside) / blocks;
  cudaLaunchConfig_t config = {};
  // Blocks that exchange parts have one tile each.
  config.gridDim = (args.splits > 1 || kInside > 0 ? tiles : std::min(slots, tiles)) * blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = blocks;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, args), "gemm_quantized");
}

template <class Format, typename T, uint32_t kInside>
void launch_tokens(const Context& context, const Args& args, uint32_t tokens) {
  switch (tokens) {
    case 32:
      return launch_form<Format, T, 32, kInside>(context, args);
    case 64:
      return launch_form<Format, T, 64, kInside>(context, args);
    case 128:
      return launch_form<Format, T, 128, kInside>(context, args);
    default:
      if constexpr (kInside == 0) return launch_form<Format, T, 256, 0>(context, args);
  }
}

template <class Format, typename T>
void launch_inside(const Context& context, const Args& args, const Form& form) {
  if (!form.inside) return launch_tokens<Format, T, 0>(context, args, form.tokens);
  args.rank <= 16 ? launch_tokens<Format, T, 16>(context, args, form.tokens)
                  : launch_tokens<Format, T, 64>(context, args, form.tokens);
}

template <class Format>
void launch_format(const Context& context, const Args& args, DType dtype, const Form& form) {
  dtype == DType::bf16 ? launch_inside<Format, bf16>(context, args, form)
                       : launch_inside<Format, f16>(context, args, form);
}

}  // namespace metal_lora::cuda::quant
