// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the next kernels would do to a tile of gemm_sm90.cu, at its end and from its registers:
// residual, rotation, SwiGLU both ways. What they read lies in the second-level cache by then (see
// the producer).
#pragma once

#include "kernels/cuda/gemm_sm90_store.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace metal_lora::cuda::sm90 {

/// One thread's part of a warp's box of 16 rows x 64 columns that store_sectors writes, as it lies
/// in memory.
struct SectorBox {
  uint2 part[8];
  template <typename T>
  __device__ __forceinline__ void load(
      const void* from, size_t stride, uint32_t m, uint32_t n, uint32_t warp_row, uint32_t column) {
    const Sectors<const T> at(static_cast<const T*>(from), stride, m, n, warp_row, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) part[i] = at.there(i) ? *at.address(i) : uint2{};
  }
};

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t v) {
  const Two<T> two = *reinterpret_cast<const Two<T>*>(&v);
  return {to_float(two.low), to_float(two.high)};
}

/// Adds the residual of a warp's rows: all loads are under way before the first sum.
template <typename T, int kTileN>
__device__ __forceinline__ void add_residual_tile(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0) {
  SectorBox box[kTileN / 64];
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    box[b].template load<T>(
        problem.residual, problem.residual_stride, args.m, problem.n, warp_row, n0 + 64 * b);
  }
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 traded = trade(box[b].part[i]);
      const float2 low = unpack2<T>(traded.x), high = unpack2<T>(traded.y);
      float* to = &d[32 * b + sector_sum(i)];
      to[0] += low.x;
      to[1] += low.y;
      to[4] += high.x;
      to[5] += high.y;
    }
  }
}

/// Rotates heads of 2·kHalf columns: a thread holds both values of each pair.
template <int kHalf, int kTileN>
__device__ __forceinline__ void rotate_heads(
    float (&d)[kTileN / 2], const float* rope, uint32_t m, uint32_t row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= m) continue;
    const float* cosines = rope + size_t{row + 8 * half} * 2 * kHalf + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < kHalf / 8; ++j) {
      const float2 c = __ldg(reinterpret_cast<const float2*>(cosines + 8 * j));
      const float2 s = __ldg(reinterpret_cast<const float2*>(cosines + kHalf + 8 * j));
#pragma unroll
      for (int head = 0; head < kTileN / (2 * kHalf); ++head) {
        float* low = &d[head * kHalf + 4 * j + 2 * half];
        float* high = low + kHalf / 2;
        const float x0 = low[0], x1 = low[1], y0 = high[0], y1 = high[1];
        low[0] = x0 * c.x - y0 * s.x;
        low[1] = x1 * c.y - y1 * s.y;
        high[0] = y0 * c.x + x0 * s.x;
        high[1] = y1 * c.y + x1 * s.y;
      }
    }
  }
}
template <int kTileN>
__device__ __forceinline__ void rotate_tile(
    float (&d)[kTileN / 2], const Args& args, const ProblemArgs& problem, uint32_t row) {
  if (problem.rope == nullptr) return;
  if (problem.head_dim == 64) {
    rotate_heads<32, kTileN>(d, problem.rope, args.m, row);
  } else if constexpr (kTileN % 128 == 0) {
    rotate_heads<64, kTileN>(d, problem.rope, args.m, row);
  }
}

/// Bias, residual or rotation.
template <typename T, int kTileN>
__device__ __forceinline__ void add_terms(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0) {
  const uint32_t row = warp_row + threadIdx.x % 32 / 4, column = n0 + threadIdx.x % 4 * 2;
  const bool wide = !args.out_f32 && problem.n % 8 == 0;
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    add_bias(&d[32 * b], problem.bias, problem.n, column + 64 * b);
    if (wide || problem.residual == nullptr) continue;
    if (args.out_f32) {
      add_residual<float>(&d[32 * b], problem, args.m, row, column + 64 * b);
    } else {
      add_residual<T>(&d[32 * b], problem, args.m, row, column + 64 * b);
    }
  }
  if (wide && problem.residual) add_residual_tile<T, kTileN>(d, args, problem, warp_row, n0);
  rotate_tile<kTileN>(d, args, problem, row);
}

/// A warp's 16 rows of a tile that the warpgroups share.
template <typename T, int kTileN>
__device__ __forceinline__ void finish_tile(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t in_ring) {
  if (warp_row >= args.m) return;
  add_terms<T, kTileN>(d, args, problem, warp_row, n0);
  const uint32_t row = warp_row + threadIdx.x % 32 / 4;
  if (args.out_f32) {
    store_tile_direct<float, kTileN>(d, args, problem, row, n0);
  } else if (problem.n % 8 != 0) {
    store_tile_direct<T, kTileN>(d, args, problem, row, n0);
  } else {
    store_tile<T, kTileN>(d, args, problem, warp_row, n0, boxes, in_ring);
  }
}

/// 64 columns of gate and, in the upper half of the sums, of up: both to memory if wanted, and act
/// of what was rounded.
template <typename T>
__device__ __forceinline__ void end_swiglu(
    float (&d)[64], const Args& args, const ProblemArgs& problem, uint32_t warp_row, uint32_t n0) {
  const uint32_t column = n0 + threadIdx.x % 4 * 2;
  add_bias(d, problem.bias, problem.n, column);
  add_bias(d + 32, problem.up_bias, problem.n, column);
  const GemmSwiglu& s = args.swiglu;
  if (s.gate != nullptr) {
    store_sectors<T>(d, s.gate, s.stride, args.m, problem.n, warp_row, n0);
    store_sectors<T>(d + 32, s.up, s.stride, args.m, problem.n, warp_row, n0);
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = swiglu(rounded<T>(d[i]), rounded<T>(d[i + 32]));
  store_sectors<T>(d, s.act, s.act_stride, args.m, problem.n, warp_row, n0);
}

/// gate and up of one box.
template <typename T>
struct GateUp {
  SectorBox gate, up;
  __device__ __forceinline__ void load(
      const Args& args, const ProblemArgs& problem, uint32_t warp_row, uint32_t column) {
    const GemmSwiglu& s = args.swiglu;
    gate.template load<T>(s.gate, s.stride, args.m, problem.n, warp_row, column);
    up.template load<T>(s.up, s.stride, args.m, problem.n, warp_row, column);
  }
};

/// Two neighbours' gradients from d_act, gate and up, packed.
template <typename T>
__device__ __forceinline__ void turn_swiglu(
    const float* d, uint32_t& gate, uint32_t& up, uint32_t& act) {
  const float2 g = unpack2<T>(gate), u = unpack2<T>(up);
  const SwigluGradient low(g.x, u.x, rounded<T>(d[0])), high(g.y, u.y, rounded<T>(d[1]));
  gate = pack2<T>(low.gate, high.gate);
  up = pack2<T>(low.up, high.up);
  act = pack2<T>(low.act, high.act);
}

/// d_act never goes to memory: gate and up become their gradients.
template <typename T>
__device__ __forceinline__ void end_swiglu_backward(
    float (&d)[64], const Args& args, const ProblemArgs& problem, uint32_t warp_row, uint32_t n0) {
  const GemmSwiglu& s = args.swiglu;
  GateUp<T> box[2];
#pragma unroll
  for (int b = 0; b < 2; ++b) box[b].load(args, problem, warp_row, n0 + 64 * b);
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const uint32_t column = n0 + 64 * b;
    const Sectors<T> gate(static_cast<T*>(s.gate), s.stride, args.m, problem.n, warp_row, column);
    const Sectors<T> up(static_cast<T*>(s.up), s.stride, args.m, problem.n, warp_row, column);
    const Sectors<T> act(static_cast<T*>(s.act), s.act_stride, args.m, problem.n, warp_row, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint2 g = trade(box[b].gate.part[i]), u = trade(box[b].up.part[i]), a;
      const float* from = &d[32 * b + sector_sum(i)];
      turn_swiglu<T>(from, g.x, u.x, a.x);
      turn_swiglu<T>(from + 4, g.y, u.y, a.y);
      g = trade(g);
      u = trade(u);
      if (gate.there(i)) {
        *gate.address(i) = g;
        *up.address(i) = u;
      }
      if (s.act == nullptr) continue;
      a = trade(a);
      if (act.there(i)) *act.address(i) = a;
    }
  }
}

/// A warp's 16 rows of a tile, where warpgroups take turns.
template <typename T, End kEnd>
__device__ __forceinline__ void end_rows(
    float (&d)[64], const Args& args, const ProblemArgs& problem, uint32_t warp_row, uint32_t n0) {
  if (warp_row >= args.m) return;
  if constexpr (kEnd == End::swiglu) {
    end_swiglu<T>(d, args, problem, warp_row, n0);
  } else if constexpr (kEnd == End::swiglu_backward) {
    end_swiglu_backward<T>(d, args, problem, warp_row, n0);
  } else {
    add_terms<T, kTurnTileN>(d, args, problem, warp_row, n0);
    const uint32_t row = warp_row + threadIdx.x % 32 / 4;
    if (args.out_f32) {
      store_tile_direct<float, kTurnTileN>(d, args, problem, row, n0);
    } else if (problem.n % 8 != 0) {
      store_tile_direct<T, kTurnTileN>(d, args, problem, row, n0);
    } else {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        store_sectors<T>(
            &d[32 * b],
            problem.out,
            problem.out_stride,
            args.m,
            problem.n,
            warp_row,
            n0 + 64 * b);
      }
    }
  }
}

}  // namespace metal_lora::cuda::sm90
