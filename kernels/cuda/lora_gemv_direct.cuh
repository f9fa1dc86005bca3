// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_gemv for 4-bit codes in groups of 64. A tile of W is so little (36 KB
// at k = 4096) that what a warp executes takes longer than its bytes: so no ring, no copies through
// shared memory and few instructions. Lane (g, t) loads 8 bytes of rows g and g + 8 of every group
// straight into registers, all ahead of the wait: columns 16t … 16t + 15, which the tensor cores take
// as four steps of 16 in an order that x shares: staged once by each warp where it fits, else read
// from L2. The bits do not depend on how many tokens there are.
#pragma once

#include "kernels/cuda/lora_gemv_tile.cuh"

namespace metal_lora::cuda::gemv {

inline constexpr uint32_t kGroup = 64;      ///< columns of a scale
inline constexpr uint32_t kHeldGroups = 8;  ///< of a warp, in registers at once

/// S: type of scales and biases.
template <typename T_, typename S>
struct DirectInt4 {
  using T = T_;
  static constexpr bool kInterleaved = true, kBiases = true;
  static constexpr uint32_t kCopies = 1;  ///< of a table that there is not
  static constexpr bool kTable = false;
  static __device__ __forceinline__ uint4 weights(uint32_t w, uint32_t) {
    return int4_pairs<T>(w);
  }
  static __device__ __forceinline__ float2 scale(const Branch& b, size_t at) {
    return int4_scale_and_bias(
        to_float(reinterpret_cast<const S*>(b.scales)[at]),
        to_float(reinterpret_cast<const S*>(b.biases)[at]));
  }
};

/// NF4: a byte of codes is looked up in a table of pairs (lora_gemv_formats.cuh).
template <typename T_, bool kDouble_, uint32_t kCopies_ = kTableCopies>
struct DirectNf4 {
  using T = T_;
  static constexpr bool kInterleaved = false, kBiases = false, kTable = true;
  static constexpr uint32_t kCopies = kCopies_;
  static constexpr bool kDouble = kDouble_;
  static __device__ __forceinline__ uint4 weights(uint32_t w, uint32_t table) {
    return nf4_pairs<kCopies>(w, table);
  }
  static __device__ __forceinline__ float2 scale(const Branch& b, size_t at) {
    if constexpr (!kDouble) {
      return make_float2(reinterpret_cast<const float*>(b.scales)[at], 0.0f);
    } else {
      const auto* nested = reinterpret_cast<const float*>(b.biases);
      const uint32_t code = reinterpret_cast<const uint8_t*>(b.scales)[at];
      const float second = nested[kNf4NestedHead + at / kNf4NestedBlock];
      return make_float2(__fadd_rn(__fmul_rn(nested[1 + code], second), nested[0]), 0.0f);
    }
  }
};

/// Bytes of x in shared memory, and of its sums over groups.
inline __host__ __device__ uint32_t direct_x_bytes(const Call& call) {
  return call.x_stays ? call.m * call.k * 2 : 0;
}
template <class Format>
__host__ __device__ uint32_t direct_sums_bytes(const Call& call, uint32_t parts) {
  return Format::kBiases ? call.k / kGroup * 8 * parts * 4 : 0;
}

/// Up to 8 kParts tokens; kStays: Call::x_stays.
template <class Format, uint32_t kParts, bool kStays>
class Direct : TileEnd<typename Format::T, kParts> {
  using T = typename Format::T;
  using End = TileEnd<T, kParts>;
  using End::call_, End::lane_, End::warp_;
  using End::multiply, End::rank_chunk, End::store_shared;

 public:
  __device__ Direct(const Call& call, uint32_t shared, uint32_t table)
      : End(call, shared + direct_x_bytes(call) + direct_sums_bytes<Format>(call, kParts)),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4),
        table_(table + 4 * (threadIdx.x % 32 % kTableCopies)),
        all_groups_(call.k / kGroup) {
    first_ = all_groups_ * warp_ / kWarps;
    groups_ = all_groups_ * (warp_ + 1) / kWarps - first_;
    x_ = shared + first_ * call.m * kGroup * 2;
    x_sums_ = shared + direct_x_bytes(call) + first_ * 8 * kParts * 4;
  }

  /// What may go before the wait.
  __device__ void begin() {
    End::prefetch();
    if (call_.weights_ready) open(blockIdx.x);
  }

  __device__ void run() {
    if (!call_.weights_ready) open(blockIdx.x);
    stage_x();
    if constexpr (Format::kTable) __syncthreads();
    __syncwarp();
    uint32_t buffer = 0;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < call_.all_tiles; tile += gridDim.x, buffer ^= 1) {
      float sums[kParts][4] = {};
      if (tile < call_.u_tiles) {
        consume_a(tile, sums);
        open(tile + gridDim.x);
        End::end_part(tile, buffer, sums);
        continue;
      }
      consume_w(sums);
      const auto early = End::load_early(tile);
      open(tile + gridDim.x);
      End::end_tile(tile, buffer, sums, early);
    }
    End::leave_together();
  }

 private:
  /// [groups t, t + 4][rows g, g + 8]
  struct Scales {
    float2 v[kHeldGroups / 4][2];
  };

  /// Asks for the first groups of a tile of W.
  __device__ void open(uint32_t tile) {
    if (tile < call_.u_tiles || tile >= call_.all_tiles) return;
    branch_ = &branch_of_tile(call_, tile - call_.u_tiles);
    const uint32_t row0 = (tile - call_.u_tiles - branch_->tile0) * kTileRows;
    lo_ = size_t{min(row0 + g_, branch_->n - 1)} * all_groups_ + first_;
    hi_ = size_t{min(row0 + g_ + 8, branch_->n - 1)} * all_groups_ + first_;
    load_first();
  }
  /// The first groups of the warp.
  __device__ void load_first() {
#pragma unroll
    for (uint32_t i = 0; i < kHeldGroups; ++i) load_codes(i, i);
    load_scales(0, scales_);
  }
  __device__ __forceinline__ void load_codes(uint32_t group, uint32_t i) {
    if (group >= groups_) return;
    const auto* w = reinterpret_cast<const uint2*>(branch_->w) + t_;
    codes_[i][0] = __ldcs(w + (lo_ + group) * 4);
    codes_[i][1] = __ldcs(w + (hi_ + group) * 4);
  }
  /// Of groups from + t and from + t + 4, both rows.
  __device__ __forceinline__ void load_scales(uint32_t from, Scales& scales) const {
#pragma unroll
    for (uint32_t i = 0; i < kHeldGroups / 4; ++i) {
      const uint32_t group = from + t_ + 4 * i;
      if (group >= groups_) continue;
      scales.v[i][0] = Format::scale(*branch_, lo_ + group);
      scales.v[i][1] = Format::scale(*branch_, hi_ + group);
    }
  }

  /// The warp's columns of x as its lanes take them, [group][half][token][t] of 16 bytes each, and
  /// with biases their sums over each group, [group][8 kParts tokens].
  __device__ void stage_x() const {
    if (!kStays && !Format::kBiases) return;
    const uint32_t pieces = groups_ * call_.m * 8;
    const auto* x = static_cast<const T*>(call_.x) + size_t{first_} * kGroup;
#pragma unroll 2
    for (uint32_t i = lane_; i < (pieces + 31) / 32 * 32; i += 32) {
      const uint32_t part = i % 8, at = min(i, pieces - 1) / 8;
      const uint32_t group = at / call_.m, token = at - group * call_.m;
      uint4 v = __ldcg(
          reinterpret_cast<const uint4*>(x + size_t{token} * call_.k + group * kGroup) + part);
      if constexpr (Format::kBiases) {
        const T* values = reinterpret_cast<const T*>(&v);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += to_float(values[j]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        sum += __shfl_xor_sync(0xffffffffu, sum, 4);
        if (part == 0 && i < pieces) store_shared(x_sums_ + (group * 8 * kParts + token) * 4, sum);
      }
      if constexpr (Format::kInterleaved) v = interleave(v);
      // part: lane t's half h is piece 2t + h of the group
      const uint32_t to = ((group * 2 + part % 2) * call_.m + token) * 4 + part / 2;
      if (kStays && i < pieces) {
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"r"(x_ + to * 16),
                     "r"(v.x),
                     "r"(v.y),
                     "r"(v.z),
                     "r"(v.w)
                     : "memory");
      }
    }
  }

  __device__ void consume_w(float (&sums)[kParts][4]) {
#pragma unroll 1
    for (uint32_t from = 0; from < groups_; from += kHeldGroups) {
      const uint32_t next = from + kHeldGroups;
      Scales next_scales = {};
      load_scales(next, next_scales);
#pragma unroll
      for (uint32_t i = 0; i < kHeldGroups; ++i) {
        if (from + i < groups_) group(from, i, sums);
        load_codes(next + i, i);
      }
      scales_ = next_scales;
    }
  }
  __device__ __forceinline__ void group(
      uint32_t from, uint32_t i, float (&sums)[kParts][4]) const {
    float products[kParts][4] = {};
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      uint4 x[kParts];
#pragma unroll
      for (uint32_t p = 0; p < kParts; ++p) x[p] = load_x(from + i, half, 8 * p + g_);
      const uint2 lo = codes_[i][0], hi = codes_[i][1];
      multiply(
          products,
          Format::weights(half ? lo.y : lo.x, table_),
          Format::weights(half ? hi.y : hi.x, table_),
          x);
    }
    const float lo = share(scales_.v[i / 4][0].x, i), hi = share(scales_.v[i / 4][1].x, i);
    [[maybe_unused]] float lo_bias = 0.0f, hi_bias = 0.0f;
    if constexpr (Format::kBiases) {
      lo_bias = share(scales_.v[i / 4][0].y, i);
      hi_bias = share(scales_.v[i / 4][1].y, i);
    }
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
      float* to = sums[p];
      if constexpr (Format::kBiases) {
        const uint2 v = load_shared8(x_sums_ + ((from + i) * 8 * kParts + 8 * p + 2 * t_) * 4);
        const float x0 = __uint_as_float(v.x), x1 = __uint_as_float(v.y);
        to[0] = fmaf(lo_bias, x0, to[0]);
        to[1] = fmaf(lo_bias, x1, to[1]);
        to[2] = fmaf(hi_bias, x0, to[2]);
        to[3] = fmaf(hi_bias, x1, to[3]);
      }
      to[0] = fmaf(lo, products[p][0], to[0]);
      to[1] = fmaf(lo, products[p][1], to[1]);
      to[2] = fmaf(hi, products[p][2], to[2]);
      to[3] = fmaf(hi, products[p][3], to[3]);
    }
  }
  __device__ __forceinline__ uint4 load_x(uint32_t group, uint32_t half, uint32_t token) const {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (token >= call_.m) return v;
    if constexpr (kStays) {
      return load_shared16(x_ + (((group * 2 + half) * call_.m + token) * 4 + t_) * 16);
    }
    v = __ldcg(
        reinterpret_cast<const uint4*>(
            static_cast<const T*>(call_.x) + size_t{token} * call_.k + (first_ + group) * kGroup) +
        2 * t_ + half);
    return Format::kInterleaved ? interleave(v) : v;
  }
  /// Group i's value from the lane that has it.
  __device__ float share(float v, uint32_t i) const {
    return __shfl_sync(0xffffffffu, v, (lane_ & ~3u) | i % 4);
  }

  /// A part of a tile of A, in x's type; x from L2.
  __device__ void consume_a(uint32_t item, float (&sums)[kParts][4]) const {
    constexpr uint32_t kAtOnce = 2;
    const uint32_t tile = item / call_.u_parts, end = rank_chunk(item, warp_ + 1);
    const Branch& b = branch_of_rank_tile(call_, tile);
    const uint32_t row0 = (tile - b.rank_tile0) * kTileRows;
    const auto* a = reinterpret_cast<const uint4*>(b.a) + t_;
    const auto* lo = a + size_t{min(row0 + g_, b.rank - 1)} * call_.chunks * 4;
    const auto* hi = a + size_t{min(row0 + g_ + 8, b.rank - 1)} * call_.chunks * 4;
    const auto* from = static_cast<const uint4*>(call_.x) + t_;
#pragma unroll 1
    for (uint32_t chunk = rank_chunk(item, warp_); chunk < end; chunk += kAtOnce) {
      uint4 l[kAtOnce] = {}, h[kAtOnce] = {}, x[kAtOnce][kParts] = {};
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (chunk + i >= end) continue;
        l[i] = __ldg(lo + (chunk + i) * 4);
        h[i] = __ldg(hi + (chunk + i) * 4);
#pragma unroll
        for (uint32_t p = 0; p < kParts; ++p) {
          const uint32_t token = 8 * p + g_;
          if (token < call_.m) {
            x[i][p] = __ldcg(from + (size_t{token} * call_.chunks + chunk + i) * 4);
          }
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) multiply(sums, l[i], h[i], x[i]);
    }
  }

  const uint32_t g_, t_, table_, all_groups_;
  uint32_t first_, groups_;  ///< this warp's
  uint32_t x_, x_sums_;
  const Branch* branch_ = nullptr;
  size_t lo_ = 0, hi_ = 0;  ///< the rows' first groups
  uint2 codes_[kHeldGroups][2] = {};
  Scales scales_ = {};
};

}  // namespace metal_lora::cuda::gemv
