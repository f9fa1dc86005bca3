// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the next kernels would do to a tile of gemm_sm90.cu, at its end and from its registers:
// residual, rotation, SwiGLU both ways. What they read is under way while the products run, to the
// second-level cache (a residual of a wide tile) or to the boxes in shared memory that the results
// leave by.
//
// Ladder (4096 tokens, dims 2048, ffn 8192, rank 16, bf16, H100; µs of a product with its end, and
// of the product and a kernel behind it; cards differ by 5 %):
//   residual, k 2048: read at the end 85, ahead into the second-level cache 72, through boxes 59;
//   without one 52 to 55
//   rotation of q and k: 85 to 92, 90 + 33
//   act of gate and up: 412 to 417, 369 + 65; and act·shrinkᵀ 422 + 5 (422 without it on that
//   card), where a kernel that reads act takes 28: 23 saved. Sums of a run through memory instead
//   of registers: 423, 17 MB more traffic; products behind the stores instead of between: 426;
//   a reciprocal for each sigmoid instead of for two: 3 µs more
//   gradients of gate and up: from device memory at the end 325; through boxes 284 of a card whose
//   products take 5 % longer; 193 + 109. Tiles of 256 columns, three stages, half of gate and up
//   from the second-level cache: 311 beside 282
//   softmax of the head's tiles (2048 rows, vocabulary 49152): 575; with one reference a row 565;
//   f32 logits instead 646
// The next 10 %: an end costs 3 to 6 µs a tile, all of it arithmetic that both warpgroups do at
// once while the matrix unit waits. One of them one to three steps behind the other: nothing won in
// a whole step (37.1 to 37.4 ms), whose clock the power limits; a ring of four stages lets them
// drift apart by no more.
#pragma once

#include "kernels/cuda/gemm_sm90_store.cuh"
#include "kernels/cuda/mma.cuh"
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

template <int kTileN>
__device__ __forceinline__ void scale_rows(
    float (&d)[kTileN / 2], const float* factors, uint32_t m, uint32_t row) {
  const float low = row < m ? __ldg(factors + row) : 0.0f;
  const float high = row + 8 < m ? __ldg(factors + row + 8) : 0.0f;
#pragma unroll
  for (int i = 0; i < kTileN / 2; ++i) d[i] *= i % 4 < 2 ? low : high;
}

/// Factors, bias and rotation of 16-bit results.
template <typename T, int kTileN>
__device__ __forceinline__ void finish_terms(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t in_ring) {
  if (warp_row >= args.m) return;
  const uint32_t row = warp_row + threadIdx.x % 32 / 4, column = n0 + threadIdx.x % 4 * 2;
  if (problem.row_factors != nullptr) scale_rows<kTileN>(d, problem.row_factors, args.m, row);
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    add_bias(&d[32 * b], problem.bias, problem.n, column + 64 * b);
  }
  rotate_tile<kTileN>(d, args, problem, row);
  store_tile<T, kTileN>(d, args, problem, warp_row, n0, boxes, in_ring);
}

/// Factors, bias, residual or rotation.
template <typename T, int kTileN>
__device__ __forceinline__ void add_terms(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0) {
  const uint32_t row = warp_row + threadIdx.x % 32 / 4, column = n0 + threadIdx.x % 4 * 2;
  const bool wide = !args.out_f32 && problem.n % 8 == 0;
  if (problem.row_factors != nullptr) scale_rows<kTileN>(d, problem.row_factors, args.m, row);
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

/// The residual lies in this warp's boxes, where the results take its place.
template <typename T, int kTileN>
__device__ __forceinline__ void finish_residual(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    add_bias(&d[32 * b], problem.bias, problem.n, n0 + 64 * b + lane % 4 * 2);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t residual[4];
      load_matrix_x4(boxes + b * kWarpBoxBytes + box_place(j), residual);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 r = unpack2<T>(residual[i]);
        d[32 * b + 4 * j + 2 * i] += r.x;
        d[32 * b + 4 * j + 2 * i + 1] += r.y;
      }
    }
    put_box<T>(&d[32 * b], boxes + b * kWarpBoxBytes);
  }
  async_proxy_fence();
  __syncwarp();
  if (lane != 0 || warp_row >= args.m) return;
#pragma unroll
  for (int b = 0; b < kTileN / 64; ++b) {
    if (n0 + 64 * b >= problem.n) break;
    tensor_store(&args.maps[problem.out_map], boxes + b * kWarpBoxBytes, n0 + 64 * b, warp_row);
  }
}

/// A warp's 16 rows of act times the tile's columns of the [rank, n] operand in shared memory,
/// added up over the tiles of a run. The first 16 ranks stay in registers for it, since sums in
/// memory are evicted before the next tile wants them.
class ActShrink {
 public:
  __device__ __forceinline__ explicit ActShrink(const Args& args) : args_(args) {}
  __device__ __forceinline__ void begin_tile(uint32_t column, uint32_t warp_row) {
    const uint32_t in_run = column & ((1u << args_.run_log2) - 1);
    part_ = column >> args_.run_log2;
    warp_row_ = warp_row;
    run_ends_ = in_run + 1 == 1u << args_.run_log2;
    run_begins_ = in_run == 0;
    if (!run_begins_) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) first_[i / 4][i % 4] = 0.0f;
  }
  /// Slice k of 16 columns of the first 16 ranks. act: its fragment (mma.cuh's a). right: two boxes
  /// of 64 columns, swizzled.
  template <typename T>
  __device__ __forceinline__ void multiply_first(int k, const uint32_t (&act)[4], uint32_t right) {
    multiply<T>(k, act, right, 0, first_);
  }
  /// The other ranks, which the same thread adds up in memory.
  template <typename T>
  __device__ __forceinline__ void end_tile(const uint32_t (&act)[8][4], uint32_t right) const {
    if (run_ends_) store(0, first_);
    for (uint32_t c = 16; c < args_.swiglu.shrink_rank; c += 16) {
      float sums[2][4] = {};
      if (!run_begins_) {
        for_each_pair(c, [&](int block, int i, const float2* from) {
          const float2 before = *from;
          sums[block][i] = before.x;
          sums[block][i + 1] = before.y;
        });
      }
#pragma unroll
      for (int k = 0; k < 8; ++k) multiply<T>(k, act[k], right, c, sums);
      store(c, sums);
    }
  }

 private:
  template <typename F>
  __device__ __forceinline__ void for_each_pair(uint32_t c, F&& f) const {
    const uint32_t rank = args_.swiglu.shrink_rank, row = warp_row_ + threadIdx.x % 32 / 4;
    float* to = args_.swiglu.parts + (size_t{part_} * args_.m + row) * rank + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i % 2 * 8 >= args_.m || c + i / 2 * 8 >= rank) continue;
      f(i / 2, i % 2 * 2, reinterpret_cast<float2*>(to + i % 2 * 8 * rank + c + i / 2 * 8));
    }
  }
  __device__ __forceinline__ void store(uint32_t c, const float (&sums)[2][4]) const {
    for_each_pair(c, [&](int block, int i, float2* to) {
      *to = make_float2(sums[block][i], sums[block][i + 1]);
    });
  }
  template <typename T>
  __device__ __forceinline__ static void multiply(
      int k, const uint32_t (&act)[4], uint32_t right, uint32_t c, float (&sums)[2][4]) {
    // ldmatrix: this lane's row of the operand and, in units of 16 bytes, its half of the slice.
    const uint32_t lane = threadIdx.x % 32, n = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
    const uint32_t chunk = (k % 4 * 2 + half) ^ (n % 8);
    uint32_t b[4];
    mma::load_x4(b, right + k / 4 * kBoxBytes + (c + n) * 128 + chunk * 16);
    mma::multiply<T>(sums[0], act, b[0], b[1]);
    mma::multiply<T>(sums[1], act, b[2], b[3]);
  }

  const Args& args_;
  uint32_t part_ = 0, warp_row_ = 0;
  bool run_begins_ = false, run_ends_ = false;
  float first_[2][4] = {};
};

/// act of the rounded sums to its boxes. The matrix unit takes a slice while the next is made.
template <typename T>
__device__ __forceinline__ void make_act(
    const float (&d)[128],
    uint32_t (&act)[8][4],
    uint32_t boxes,
    bool shrinks,
    ActShrink& shrink,
    uint32_t shrink_right) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* gate = &d[8 * k + 2 * i];
      const float* up = gate + 64;
      const float g0 = rounded<T>(gate[0]), g1 = rounded<T>(gate[1]);
      const float2 e = sigmoid2(g0, g1);
      act[k][i] = pack2<T>(g0 * e.x * rounded<T>(up[0]), g1 * e.y * rounded<T>(up[1]));
    }
    const uint32_t to = boxes + k / 4 * kWarpBoxBytes + box_place(k % 4 * 2);
    store_matrix_x4(to, act[k][0], act[k][1], act[k][2], act[k][3]);
    if (shrinks) shrink.multiply_first<T>(k, act[k], shrink_right);
  }
}

/// 128 columns of gate and, in the upper half of the sums, of up: both to memory if wanted, and act
/// of what was rounded.
template <typename T>
__device__ __forceinline__ void finish_swiglu(
    float (&d)[128],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t in_ring,
    ActShrink& shrink,
    uint32_t shrink_right) {
  if (warp_row >= args.m) return;
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const float* bias = b < 2 ? problem.bias : problem.up_bias;
    add_bias(&d[32 * b], bias, problem.n, n0 + b % 2 * 64 + lane % 4 * 2);
  }
  const GemmSwiglu& s = args.swiglu;
  const bool writes_both = s.gate != nullptr;
  if (lane == 0) tensor_store_wait_read<0>();  // the tile before
  __syncwarp();
  if (writes_both) put_box<T>(d, in_ring);
  uint32_t act[8][4];
  make_act<T>(d, act, boxes, s.parts != nullptr, shrink, shrink_right);
  async_proxy_fence();
  __syncwarp();
  const bool second = n0 + 64 < problem.n;
  if (lane == 0) {
    if (writes_both) tensor_store(&args.maps[args.gate_map], in_ring, n0, warp_row);
    tensor_store(&args.maps[args.act_map], boxes, n0, warp_row);
    if (second) tensor_store(&args.maps[args.act_map], boxes + kWarpBoxBytes, n0 + 64, warp_row);
  }
  if (s.parts) shrink.end_tile<T>(act, shrink_right);
  if (!writes_both) return;
  store_sectors<T>(&d[32], s.gate, s.stride, args.m, problem.n, warp_row, n0 + 64);
  store_sectors<T>(&d[64], s.up, s.stride, args.m, problem.n, warp_row, n0);
  store_sectors<T>(&d[96], s.up, s.stride, args.m, problem.n, warp_row, n0 + 64);
  if (lane == 0) {  // before the stage is released
    if (second) {
      tensor_store_wait_read<2>();
    } else {
      tensor_store_wait_read<0>();
    }
  }
  __syncwarp();
}

/// The logit of the row's target, if it is one of this thread's.
template <int kTileN>
__device__ __forceinline__ void keep_target_logit(
    const float (&d)[kTileN / 2], int half, const Args& args, uint32_t row, uint32_t n0) {
  const GemmSoftmax& s = args.softmax;
  const uint32_t first = threadIdx.x % 4 * 2;
  const uint32_t wanted = row < args.m ? static_cast<uint32_t>(__ldg(s.targets + row)) : kBeyond;
  const uint32_t target = wanted < args.problem[0].n ? wanted - n0 : kTileN;
  if (target >= kTileN || target % 8 / 2 != threadIdx.x % 4) return;
#pragma unroll
  for (int j = 0; j < kTileN / 8; ++j) {
    if (8 * j + first == target) s.target_logits[row] = d[4 * j + 2 * half];
    if (8 * j + first + 1 == target) s.target_logits[row] = d[4 * j + 2 * half + 1];
  }
}
/// exp(z − zero) of one of a thread's two rows in place, all 0 where the row is dead. Their sum
/// over the tile.
template <int kTileN, bool kMayBeDead>
__device__ __forceinline__ float exponentials(
    float (&d)[kTileN / 2], int half, float zero, bool dead = false) {
  const float most = dead ? -INFINITY : INFINITY;  // no branch: wgmma would wait for it
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kTileN / 8; ++j) {
#pragma unroll
    for (int i = 2 * half; i < 2 * half + 2; ++i) {
      const float power = kLog2e * (d[4 * j + i] - zero);
      d[4 * j + i] = exp2_fast(kMayBeDead ? fminf(power, most) : power);
      sum += d[4 * j + i];
    }
  }
  return quad_sum(sum);
}
/// One of a thread's two rows of logits: what the loss wants of it, and exp(z − largest) in place.
template <int kTileN>
__device__ __forceinline__ void softmax_row(
    float (&d)[kTileN / 2], int half, const Args& args, uint32_t row, uint32_t n0) {
  float largest = -INFINITY;
#pragma unroll
  for (int j = 0; j < kTileN / 8; ++j) {
    largest = fmaxf(largest, fmaxf(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]));
  }
  largest = quad_max(largest);
  const float sum = exponentials<kTileN, false>(d, half, largest == -INFINITY ? 0.0f : largest);
  if (row >= args.m || threadIdx.x % 4 != 0) return;
  const size_t tile = size_t{row} * args.problem[0].tiles_n + n0 / kTileN;
  reinterpret_cast<float2*>(args.softmax.tiles)[tile] = make_float2(largest, sum);
}
/// The same with exp(z − reference). What is not a number makes an infinite sum.
template <int kTileN>
__device__ __forceinline__ void exponential_row(
    float (&d)[kTileN / 2], int half, const Args& args, uint32_t row, uint32_t n0) {
  const float reference = row < args.m ? __ldg(args.softmax.references + row) : INFINITY;
  const float sum = exponentials<kTileN, true>(d, half, reference, reference == INFINITY);
  if (row >= args.m || threadIdx.x % 4 != 0) return;
  args.softmax.tiles[size_t{row} * args.problem[0].tiles_n + n0 / kTileN] = sum;
}

/// Logits never go to memory.
template <typename T, int kTileN, GemmEnd kEnd>
__device__ __forceinline__ void finish_softmax(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes,
    uint32_t in_ring) {
  static_assert(kTileN == kGemmSoftmaxColumns);
  if (warp_row >= args.m) return;
  const uint32_t row = warp_row + threadIdx.x % 32 / 4;
  if (n0 + kTileN > problem.n) {  // columns beyond n are zeros so far
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) {
      const uint32_t column = n0 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      if (column >= problem.n) d[i] = -INFINITY;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    keep_target_logit<kTileN>(d, half, args, row + 8 * half, n0);
    if constexpr (kEnd == GemmEnd::softmax) {
      softmax_row<kTileN>(d, half, args, row + 8 * half, n0);
    } else {
      exponential_row<kTileN>(d, half, args, row + 8 * half, n0);
    }
  }
  if (problem.out == nullptr) return;
  store_tile<T, kTileN>(d, args, problem, warp_row, n0, boxes, in_ring);
}

/// d_act never goes to memory: this warp's boxes of gate and, behind them, of up become their
/// gradients, and d_act in the sums becomes act.
template <typename T, int kTileN>
__device__ __forceinline__ void finish_swiglu_backward(
    float (&d)[kTileN / 2],
    const Args& args,
    const ProblemArgs& problem,
    uint32_t warp_row,
    uint32_t n0,
    uint32_t boxes) {
  constexpr int kBoxes = kTileN / 64;
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int b = 0; b < kBoxes; ++b) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t at = boxes + b * kWarpBoxBytes + box_place(j);
      uint32_t gate[4], up[4];
      load_matrix_x4(at, gate);
      load_matrix_x4(at + kBoxes * kWarpBoxBytes, up);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* of = &d[32 * b + 4 * j + 2 * i];
        const float2 g = unpack2<T>(gate[i]), u = unpack2<T>(up[i]);
        const SwigluGradient low(g.x, u.x, rounded<T>(of[0])), high(g.y, u.y, rounded<T>(of[1]));
        gate[i] = pack2<T>(low.gate, high.gate);
        up[i] = pack2<T>(low.up, high.up);
        of[0] = low.act;
        of[1] = high.act;
      }
      store_matrix_x4(at, gate[0], gate[1], gate[2], gate[3]);
      store_matrix_x4(at + kBoxes * kWarpBoxBytes, up[0], up[1], up[2], up[3]);
    }
  }
  async_proxy_fence();
  __syncwarp();
  if (lane == 0 && warp_row < args.m) {
#pragma unroll
    for (int b = 0; b < kBoxes; ++b) {
      const uint32_t column = n0 + 64 * b, at = boxes + b * kWarpBoxBytes;
      if (column >= problem.n) break;
      tensor_store(&args.maps[args.gate_map], at, column, warp_row);
      tensor_store(&args.maps[args.up_map], at + kBoxes * kWarpBoxBytes, column, warp_row);
    }
  }
  const GemmSwiglu& s = args.swiglu;
  if (s.act == nullptr) return;
#pragma unroll
  for (int b = 0; b < kBoxes; ++b) {
    store_sectors<T>(&d[32 * b], s.act, s.act_stride, args.m, problem.n, warp_row, n0 + 64 * b);
  }
}

}  // namespace metal_lora::cuda::sm90
