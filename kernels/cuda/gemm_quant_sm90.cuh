// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernel of gemm_quant.cpp, which says what it does and how fast. yᵀ = W·xᵀ: W is the operand
// in registers, since only there can codes become weights on the way. A warp feeds two rings, of
// codes (128 rows x 256 of k) and of x (tokens x 64 of k), three more put each stage's scales
// beside it in f32; two warpgroups of 64 rows each decode the next half step of 32 while the matrix
// unit works on the last.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/gemm_quant_args.h"
#include "kernels/cuda/gemm_quant_wgmma.cuh"
#include "kernels/cuda/lora_gemv_formats.cuh"

namespace metal_lora::cuda::quant {

constexpr uint32_t kConsumers = 256, kThreads = kConsumers + 128;
constexpr uint32_t kCodeBytes = kRows * 128;
constexpr uint32_t kScaleBytes = 4 * kRows * 8;  ///< of a chunk: {scale, bias} of [step][row]
constexpr uint32_t kScaleWarps = 3;              ///< that fetch them, beside the copying one

template <uint32_t kTokens>
struct Layout {
  static constexpr bool kTwo = blocks_of(kTokens) == 2;
  static constexpr uint32_t kXBytes = kTokens * 128;
  static constexpr uint32_t kCodeStages = kTokens == 256 ? 2 : kTwo ? 3 : 4;
  static constexpr uint32_t kOutBytes = kTokens * 2 * kRows;
  static constexpr uint32_t kRoom =
      (kTwo ? 110 : 224) * 1024 - kCodeStages * (kCodeBytes + kScaleBytes) - kOutBytes;
  static constexpr uint32_t kXStages = kRoom / kXBytes < 8 ? kRoom / kXBytes : 8;
  static constexpr uint32_t kXOffset = kCodeStages * kCodeBytes;
  static constexpr uint32_t kOutOffset = kXOffset + kXStages * kXBytes;
  static constexpr uint32_t kScaleOffset = kOutOffset + kOutBytes;
  static constexpr uint32_t kBarrierOffset = kScaleOffset + kCodeStages * kScaleBytes;
  static constexpr uint32_t kTableOffset = kBarrierOffset + 16 * (kCodeStages + kXStages);
  static constexpr uint32_t kBytes = kTableOffset + 64 + 1024;        ///< 1024: alignment
  static_assert((kBytes + 1024) * blocks_of(kTokens) <= 228 * 1024);  // 1024: the system's
  /// Parts of the sums on their way between blocks take the rings' place.
  static_assert(kTokens * kRows * 4 <= kOutOffset);
};

// ---- formats: the scales of a thread's two rows, and the pairs of weights of words that hold two
// codes each, from bit kAt on ----

/// Where the scale of a row and group stands. Beyond the matrix the last one's: such codes or x are
/// zero, and such rows are not stored.
__device__ __forceinline__ size_t scale_at(const Args& args, uint32_t row, uint32_t group) {
  return size_t{min(row, args.n - 1)} * args.groups + min(group, args.groups - 1);
}
/// With the rest of the 128 bytes into L2: a row's scales are read in its order.
__device__ __forceinline__ uint32_t load_ahead(const uint32_t* from) {
  uint32_t v;
  asm volatile("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}
__device__ __forceinline__ uint32_t load_ahead(const uint16_t* from) {
  uint16_t v;
  asm volatile("ld.global.nc.L2::128B.u16 %0, [%1];" : "=h"(v) : "l"(from));
  return v;
}
__device__ __forceinline__ uint32_t load_ahead(const void* from, bool wide, size_t at) {
  return wide ? load_ahead(static_cast<const uint32_t*>(from) + at)
              : load_ahead(static_cast<const uint16_t*>(from) + at);
}

struct Int4 {
  float scale[2], bias[2];
  /// As stored, so that nothing waits for a load before all are under way.
  struct Stored {
    uint32_t scale, bias;
    static __device__ __forceinline__ void ask(const Args& args, uint32_t row, uint32_t group) {
      const size_t at = scale_at(args, row, group) * (args.scales_dtype == DType::f32 ? 4 : 2);
      prefetch_line(static_cast<const char*>(args.scales) + at);
      prefetch_line(static_cast<const char*>(args.biases) + at);
    }
    __device__ __forceinline__ void load(const Args& args, uint32_t row, uint32_t group) {
      const bool wide = args.scales_dtype == DType::f32;
      const size_t at = scale_at(args, row, group);
      scale = load_ahead(args.scales, wide, at);
      bias = load_ahead(args.biases, wide, at);
    }
    __device__ __forceinline__ float2 value(const Args& args) const {
      return make_float2(value(scale, args.scales_dtype), value(bias, args.scales_dtype));
    }
    static __device__ __forceinline__ float value(uint32_t v, DType dtype) {
      const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(v)));
      return dtype == DType::f16 ? half : __uint_as_float(dtype == DType::f32 ? v : v << 16);
    }
  };
  __device__ __forceinline__ void set(uint32_t i, uint2 v) {
    scale[i] = __uint_as_float(v.x), bias[i] = __uint_as_float(v.y);
  }
  /// A code q below the bits of 1.0f is 1 + q/16, or 1 + q/256 four bits lower: a shift and two
  /// logic operations make a pair, and one fma each their weights.
  static constexpr uint32_t kAt = 15;  ///< where decode() wants a byte of codes to begin
  template <typename T>
  __device__ __forceinline__ void decode(
      const uint32_t (&codes)[4], uint32_t row, uint32_t, uint32_t (&pair)[4]) const {
    const float s = scale[row], low = 256.0f * s, high = 16.0f * s;
    const float low_bias = bias[row] - low, high_bias = bias[row] - high;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float even = __uint_as_float(gemv::mask_or(codes[i], 0x00078000u, 0x3f800000u));
      const float odd = __uint_as_float(gemv::mask_or(codes[i], 0x00780000u, 0x3f800000u));
      pair[i] = mma::pack2<T>(__fmaf_rn(even, low, low_bias), __fmaf_rn(odd, high, high_bias));
    }
  }
};

struct Nf4 {
  float scale[2];
  struct Stored {
    float scale, second;
    static __device__ __forceinline__ void ask(const Args& args, uint32_t row, uint32_t group) {
      const size_t at = scale_at(args, row, group) * (args.double_quant ? 1 : 4);
      prefetch_line(static_cast<const char*>(args.scales) + at);
    }
    __device__ __forceinline__ void load(const Args& args, uint32_t row, uint32_t group) {
      const size_t at = scale_at(args, row, group);
      if (!args.double_quant) {
        scale = __uint_as_float(load_ahead(static_cast<const uint32_t*>(args.scales) + at));
        return;
      }
      const auto* nested = static_cast<const float*>(args.biases);
      scale = __ldg(nested + 1 + __ldg(static_cast<const uint8_t*>(args.scales) + at));
      second = __ldg(nested + kNf4NestedHead + at / kNf4NestedBlock);
    }
    __device__ __forceinline__ float2 value(const Args& args) const {
      if (!args.double_quant) return make_float2(scale, 0.0f);
      const auto* nested = static_cast<const float*>(args.biases);
      return make_float2(__fadd_rn(__fmul_rn(scale, second), __ldg(nested)), 0.0f);
    }
  };
  __device__ __forceinline__ void set(uint32_t i, uint2 v) { scale[i] = __uint_as_float(v.x); }
  /// table: 16 levels in 16 banks.
  static constexpr uint32_t kAt = 2;
  template <typename T>
  __device__ __forceinline__ void decode(
      const uint32_t (&codes)[4], uint32_t row, uint32_t table, uint32_t (&pair)[4]) const {
    const float s = scale[row];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t even = codes[i], odd = codes[i] >> 4;
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

template <uint32_t kTokens>
struct Block {
  using L = Layout<kTokens>;
  uint32_t shared, cluster, part;
  uint32_t first_chunk, end_chunk;
  bool adds_low;  ///< u·Bᵀ is this block's
  __device__ __forceinline__ Block(const Args& args, uint32_t shared) : shared(shared) {
    // %cluster_ctarank, but known to the compiler as the same for all threads.
    cluster = blockIdx.x / args.splits;
    part = blockIdx.x % args.splits;
    first_chunk = args.chunks * part / args.splits;
    end_chunk = args.chunks * (part + 1) / args.splits;
    adds_low = args.rank > 0 && part + 1 == args.splits;
  }
  __device__ __forceinline__ uint32_t codes(uint32_t stage) const {
    return shared + stage * kCodeBytes;
  }
  __device__ __forceinline__ uint32_t scales(uint32_t stage) const {
    return shared + L::kScaleOffset + stage * kScaleBytes;
  }
  __device__ __forceinline__ uint32_t x(uint32_t stage) const {
    return shared + L::kXOffset + stage * L::kXBytes;
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
    for (uint32_t index = cluster; index < tiles; index += gridDim.x / args.splits) {
      const uint32_t band = index / (args.band * args.tiles_n);
      const uint32_t rest = index - band * args.band * args.tiles_n;
      const uint32_t height = min(args.band, args.tiles_m - band * args.band);
      const uint32_t tile_n = rest / height;
      const uint32_t tile_m = band * args.band + rest - tile_n * height;
      f(tile_m * kTokens, tile_n * kRows);
    }
  }
};

/// One thread: all copies of the block.
template <uint32_t kTokens>
__device__ __forceinline__ void produce(const Args& args, const Block<kTokens>& block) {
  using L = Layout<kTokens>;
  Ring<L::kCodeStages> codes;
  Ring<L::kXStages> x;
  const auto load_x = [&](const CUtensorMap* map, uint32_t column, uint32_t token) {
    barrier_wait(block.x_empty(x.stage), x.parity ^ 1);
    barrier_expect(block.x_full(x.stage), L::kXBytes);
    tensor_load(block.x(x.stage), map, block.x_full(x.stage), column, token);
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
      load_x(&args.u, c, token);
    }
  });
}

/// Warps that fetch the scales of each stage of codes as f32; `thread` of 32·kScaleWarps.
template <class Format, uint32_t kTokens>
__device__ __forceinline__ void fetch_scales(
    const Args& args, const Block<kTokens>& block, uint32_t thread) {
  using L = Layout<kTokens>;
  constexpr uint32_t kThreads = 32 * kScaleWarps, kEach = (4 * kRows + kThreads - 1) / kThreads;
  Ring<L::kCodeStages> codes;
  const auto arrive = [&] {
    __syncwarp();
    barrier_arrive(block.codes_full(codes.stage));
    codes.advance();
  };
  bool waited = args.weights_ready;
  block.for_each_tile(args, [&](uint32_t, uint32_t row0) {
    if (!waited) {
      for (uint32_t i = thread; i < kRows; i += kThreads) {
        Format::Stored::ask(args, row0 + i, (4 * block.first_chunk) >> args.group_log2);
      }
      dependency_wait();
      waited = true;
    }
    for (uint32_t chunk = block.first_chunk; chunk < block.end_chunk; ++chunk) {
      typename Format::Stored stored[kEach];
#pragma unroll
      for (uint32_t i = 0; i < kEach; ++i) {  // four groups of a row side by side
        const uint32_t at = min(i * kThreads + thread, 4 * kRows - 1);
        stored[i].load(args, row0 + at / 4, (4 * chunk + at % 4) >> args.group_log2);
      }
      barrier_wait(block.codes_empty(codes.stage), codes.parity ^ 1);
#pragma unroll
      for (uint32_t i = 0; i < kEach; ++i) {
        const uint32_t at = i * kThreads + thread;
        if (at >= 4 * kRows) break;
        const float2 v = stored[i].value(args);
        store_shared8(block.scales(codes.stage) + (at % 4 * kRows + at / 4) * 8, v.x, v.y);
      }
      arrive();
    }
    if (!block.adds_low) return;
    for (uint32_t c = 0; c < args.rank; c += kStep) {
      barrier_wait(block.codes_empty(codes.stage), codes.parity ^ 1);
      arrive();
    }
  });
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
    const uint32_t turn = Format::kAt - 8 * t;
    const uint32_t codes[4] = {
        __funnelshift_l(v.x, v.x, turn),
        __funnelshift_l(v.y, v.y, turn),
        __funnelshift_l(v.z, v.z, turn),
        __funnelshift_l(v.w, v.w, turn)};
    uint32_t pair[4];
    scales.template decode<T>(codes, row, table, pair);
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
template <class Format, typename T, uint32_t kTokens>
__device__ __forceinline__ void consume(
    const Args& args, const Block<kTokens>& block, uint32_t warp, uint32_t table) {
  using L = Layout<kTokens>;
  constexpr uint32_t kBlocks = kTokens / 8;  // of 8 tokens: four sums of a thread each
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = warp / 4;
  const uint32_t out = block.shared + L::kOutOffset + group * kTokens * 128;
  Ring<L::kCodeStages> codes;
  Ring<L::kXStages> x;
  const bool releases = lane == 0;
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
    int accumulate = 0;
    uint32_t reading = 0;
    const auto release_previous = [&] {
      if (accumulate != 0 && releases) barrier_arrive(block.x_empty(reading));
      reading = x.stage;
      accumulate = 1;
    };
    const auto row_at = [&] { return block.codes(codes.stage) + (warp * 16 + g) * 128; };
    const auto release_codes = [&] {
      __syncwarp();
      barrier_arrive(block.codes_empty(codes.stage));
      codes.advance();
    };
    Format scales;  // of a step
    const auto load_scales = [&](uint32_t step) {
      const uint32_t at = block.scales(codes.stage) + (step * kRows + warp * 16 + g) * 8;
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) scales.set(i, gemv::load_shared8(at + 64 * i));
    };
    const auto first_half = [&] {
      barrier_wait(block.codes_full(codes.stage), codes.parity);
      load_scales(0);
      decode_half<Format, T>(a[0], row_at(), 0, scales, table);
    };
    const auto multiply_chunk = [&](auto last) {
#pragma unroll
      for (uint32_t h = 0; h < 8; ++h) {
        if (h % 2 == 0) barrier_wait(block.x_full(x.stage), x.parity);
        const uint64_t right = wgmma_descriptor(block.x(x.stage), 16) + h % 2 * 4;
        wgmma_fence();
        wgmma_registers<T>(d, &a[h % 2][0], right, h == 0 ? accumulate : 1);
        wgmma_registers<T>(d, &a[h % 2][4], right + 2, 1);
        wgmma_commit();
        wgmma_wait<1>();
        if (h % 2 == 0) {
          release_previous();
        } else {
          x.advance();
        }
        if (h < 7) {
          if (h % 2 == 1) load_scales(h / 2 + 1);
          decode_half<Format, T>(a[(h + 1) % 2], row_at(), h + 1, scales, table);
          if (h == 6) release_codes();
        } else if constexpr (!decltype(last)::value) {
          first_half();
        }
      }
    };
    first_half();
    for (uint32_t chunk = block.first_chunk + 1; chunk < block.end_chunk; ++chunk) {
      multiply_chunk(std::false_type());
    }
    multiply_chunk(std::true_type());
    wgmma_wait<0>();
    if (block.adds_low) {
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
    if (releases) barrier_arrive(block.x_empty(reading));
    if (!waited) dependency_wait();  // the kernels before this one may still read or write y
    waited = true;
    float bias[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      bias[i] = args.bias != nullptr && row + 8 * i < args.n ? args.bias[row + 8 * i] : 0.0f;
    }
    const bool first = threadIdx.x % 128 == 0;
    if (args.splits == 1) {
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
    named_barrier(3, kConsumers);
    const uint32_t parts = block.shared + threadIdx.x * 16;
#pragma unroll
    for (uint32_t i = 0; i < kBlocks; ++i) store_shared16(parts + i * kConsumers * 16, &d[4 * i]);
    cluster_sync();
    for (uint32_t i = block.part; i < kBlocks; i += args.splits) {
      float4 part[8];
#pragma unroll
      for (uint32_t p = 0; p < 8; ++p) {
        if (p < args.splits) part[p] = load_remote(parts + i * kConsumers * 16, p);
      }
      float sum[4] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
      for (uint32_t p = 1; p < 8; ++p) {
        if (p >= args.splits) continue;
        sum[0] += part[p].x, sum[1] += part[p].y, sum[2] += part[p].z, sum[3] += part[p].w;
      }
      add_terms<T>(args, sum, bias, row, token0 + 8 * i + 2 * t);
      put(sum, i);
    }
    async_proxy_fence();
    named_barrier(1 + group, 128);
    if (first && row0 + 64 * group < args.n) {
      for (uint32_t i = block.part; i < kBlocks && token0 + 8 * i < args.m; i += args.splits) {
        tensor_store(&args.out, out + i * 1024, row0 + 64 * group, token0 + 8 * i);
      }
    }
  });
  if (args.splits > 1) cluster_sync_relaxed();  // the others have read this block's parts
  if (threadIdx.x % 128 == 0) tensor_store_wait_read<0>();
}

template <class Format, typename T, uint32_t kTokens>
__global__ void __launch_bounds__(kThreads, blocks_of(kTokens))
    gemm_quant_kernel(const __grid_constant__ Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kTokens>;
  extern __shared__ uint8_t raw[];
  const uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  const Block<kTokens> block(args, shared);
  const uint32_t table = shared + L::kTableOffset;
  if (threadIdx.x == kConsumers) {
    tensor_map_prefetch(&args.codes);
    tensor_map_prefetch(&args.x);
  }
  if (threadIdx.x == 0) {
    dependents_launch();
    for (uint32_t i = 0; i < L::kCodeStages; ++i) {
      barrier_init(block.codes_full(i), 1 + 32 * kScaleWarps);
      barrier_init(block.codes_empty(i), 256);
    }
    for (uint32_t i = 0; i < L::kXStages; ++i) {
      barrier_init(block.x_full(i), 1);
      barrier_init(block.x_empty(i), 8);
    }
    barrier_init_fence();
  }
  if (std::is_same_v<Format, Nf4> && threadIdx.x >= 32 && threadIdx.x < 48) {
    const uint32_t i = threadIdx.x - 32;
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(table + 4 * i), "f"(gemv::nf4_level(i))
                 : "memory");
  }
  __syncthreads();
  // Broadcast: the compiler must know that whole warps take a branch, or it orders wgmma one by
  // one.
  const uint32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= kConsumers / 32) {
    registers_shrink<L::kTwo ? 32 : 40>();
    if (threadIdx.x == kConsumers) produce<kTokens>(args, block);
    if (warp > kConsumers / 32) {
      fetch_scales<Format>(args, block, threadIdx.x - kConsumers - 32);
    }
    __syncwarp();
    if (args.splits > 1) {  // the consumers' exchange of parts
      cluster_sync_relaxed();
      cluster_sync_relaxed();
    }
  } else {
    registers_grow<L::kTwo ? 104 : 232>();
    consume<Format, T, kTokens>(args, block, warp, table);
  }
#endif
}

template <class Format, typename T, uint32_t kTokens>
void launch_form(const Context& context, const Args& args) {
  const auto kernel = gemm_quant_kernel<Format, T, kTokens>;
  constexpr int kBytes = Layout<kTokens>::kBytes;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "gemm_quantized");
  const uint32_t tiles = args.tiles_m * args.tiles_n;
  const uint32_t slots = context.multiprocessors * blocks_of(kTokens);
  cudaLaunchConfig_t config = {};
  // Blocks that exchange parts have one tile each.
  config.gridDim = args.splits > 1 ? tiles * args.splits : std::min(slots, tiles);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = args.splits;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, args), "gemm_quantized");
}

template <class Format, typename T>
void launch_tokens(const Context& context, const Args& args, uint32_t tokens) {
  switch (tokens) {
    case 32:
      return launch_form<Format, T, 32>(context, args);
    case 64:
      return launch_form<Format, T, 64>(context, args);
    case 128:
      return launch_form<Format, T, 128>(context, args);
    default:
      return launch_form<Format, T, 256>(context, args);
  }
}

template <class Format>
void launch_format(const Context& context, const Args& args, DType dtype, const Form& form) {
  dtype == DType::bf16 ? launch_tokens<Format, bf16>(context, args, form.tokens)
                       : launch_tokens<Format, f16>(context, args, form.tokens);
}

}  // namespace metal_lora::cuda::quant
