// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_gemv for 4-bit codes in groups of 64 and one token, where a launch is over after 4 … 5 µs
// and most of that is what precedes and follows the stream of W. So the blocks are small enough
// that those of the next launch are resident while this one runs, one tile each: their codes are
// asked for (into shared memory, which costs no registers) before the wait, and the way from the
// wait to the end is short. The eight columns that the tensor cores have for tokens take eight
// groups of one token instead: a warp's sums of eight groups stay apart in one accumulator, each
// with the lane that holds its scale, and are scaled once. The bits are those of
// lora_gemv_direct.cuh.
#pragma once

#include "kernels/cuda/lora_gemv_direct.cuh"

namespace metal_lora::cuda::gemv {

inline constexpr uint32_t kHalfGroups = 4;  ///< of a warp's copies
inline constexpr uint32_t kHalfBytes = kHalfGroups * 32 * kTileRows;
inline constexpr uint32_t kRingBytes = kWarps * 2 * kHalfBytes;
inline constexpr uint32_t kSharedRank = 128;  ///< of a B in shared memory, at most

/// Bytes between rows of B in shared memory: eight rows' 16 bytes meet no conflict.
inline __host__ __device__ uint32_t b_pitch(uint32_t rank) {
  return rank % 64 == 0 ? rank * 2 + 16 : rank * 2;
}
inline __host__ __device__ bool keeps_b(const Call& call, const Branch& b) {
  return call.wide_b && b.rank <= kSharedRank;
}
inline __host__ __device__ uint32_t single_b_bytes(const Call& call) {
  uint32_t most = 0;
  for (uint32_t i = 0; i < call.branches; ++i) {
    const uint32_t bytes = kTileRows * b_pitch(call.branch[i].rank);
    if (keeps_b(call, call.branch[i]) && bytes > most) most = bytes;
  }
  return most;
}

template <class Format>
class Single : TileEnd<typename Format::T, 1> {
  using T = typename Format::T;
  using End = TileEnd<T, 1>;
  using End::call_, End::lane_, End::warp_, End::u_;
  using End::multiply, End::rank_chunk, End::gather;
  static constexpr uint32_t kGroups = 2 * kHalfGroups;

 public:
  __device__ Single(const Call& call, uint32_t shared, uint32_t b_bytes, uint32_t table)
      : End(call, shared + kRingBytes + b_bytes),
        g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4),
        table_(table + 4 * (threadIdx.x % 32 % Format::kCopies)),
        all_groups_(call.k / kGroup),
        ring_(shared + threadIdx.x / 32 * 2 * kHalfBytes),
        b_(shared + kRingBytes) {
    first_ = all_groups_ * warp_ / kWarps;
    groups_ = all_groups_ * (warp_ + 1) / kWarps - first_;
  }

  /// What may go before the wait.
  __device__ void begin() {
    if (call_.weights_ready) {
      open();
    } else {
      prefetch();
    }
  }
  __device__ void run() {
    if (!call_.weights_ready) open();
    const uint32_t tile = blockIdx.x;
    float sums[1][4] = {};
    if (tile < call_.u_tiles) {
      consume_a(sums);
      End::end_part(tile, 0, sums);
    } else {
      consume_w(tile, sums);
    }
    End::leave();
  }

 private:
  // ---- what is asked for first ----

  __device__ void prefetch() const {
    End::prefetch();
    const uint32_t tile = blockIdx.x;
    if (tile < call_.u_tiles) return;
    const Branch& b = branch_of_tile(call_, tile - call_.u_tiles);
    const uint32_t row = (tile - call_.u_tiles - b.tile0) * kTileRows + lane_;
    if (lane_ < kTileRows && row < b.n && groups_ > 0) {
      prefetch_l2(b.w + (size_t{row} * all_groups_ + first_) * 32, groups_ * 32);
    }
  }
  __device__ void open() {
    const uint32_t tile = blockIdx.x;
    if (tile < call_.u_tiles) {
      const Branch& b = branch_of_rank_tile(call_, tile / call_.u_parts);
      branch_ = &b;
      row0_ = (tile / call_.u_parts - b.rank_tile0) * kTileRows;
      load_a(rank_chunk(tile, warp_));
      return;
    }
    branch_ = &branch_of_tile(call_, tile - call_.u_tiles);
    row0_ = (tile - call_.u_tiles - branch_->tile0) * kTileRows;
    copy_half(0);
    copy_b();
    mma::copies_commit();
    copy_half(1);
    mma::copies_commit();
    load_scales(0);
  }

  /// Four groups of the warp: 16 rows of 128 bytes, groups swizzled so that reads of four rows' 32
  /// bytes meet no conflict. Rows past the end are copies of the last one.
  __device__ __forceinline__ void copy_half(uint32_t half) const {
    const uint32_t piece = lane_ % 8, group = half * kHalfGroups + piece / 2;
    if (group >= groups_) return;
    const uint32_t row = lane_ / 8;
    const uint32_t to = ring_ + half % 2 * kHalfBytes + row * 128 + ((piece ^ row * 2) << 4);
    const char* from = branch_->w + (first_ + group) * 32 + piece % 2 * 16;
#pragma unroll
    for (uint32_t i = 0; i < kTileRows; i += 4) {
      const uint32_t at = min(row0_ + i + row, branch_->n - 1);
      mma::copy_async<16>(to + i * 128, from + size_t{at} * all_groups_ * 32);
    }
  }
  __device__ void copy_b() const {
    if (!keeps_b(call_, *branch_)) return;
    const uint32_t pieces = branch_->rank / 8, rows = min(kTileRows, branch_->n - row0_);
    const char* from = branch_->b + size_t{row0_} * branch_->rank * 2;
    for (uint32_t i = threadIdx.x; i < rows * pieces; i += kThreads) {
      const uint32_t row = i / pieces;
      const uint32_t to = row * b_pitch(branch_->rank) + (i - row * pieces) * 16;
      mma::copy_async<16>(b_ + to, from + 16 * i);
    }
  }
  /// Of groups from + 2t and from + 2t + 1, rows g and g + 8.
  __device__ __forceinline__ void load_scales(uint32_t from) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t group = from + 2 * t_ + i;
      if (group >= groups_) continue;
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) {
        const uint32_t row = min(row0_ + g_ + 8 * j, branch_->n - 1);
        scales_[i][j] = Format::scale(*branch_, size_t{row} * all_groups_ + first_ + group);
      }
    }
  }

  // ---- W ----

  /// Columns 16t … 16t + 15 of group from + g.
  struct X {
    uint4 half[2];
  };
  __device__ __forceinline__ X load_x(uint32_t from) const {
    X x = {};
    if (from + g_ >= groups_) return x;
    const auto* at = reinterpret_cast<const uint4*>(
        static_cast<const T*>(call_.x) + (first_ + from + g_) * kGroup + 16 * t_);
    x.half[0] = __ldcg(at);
    x.half[1] = __ldcg(at + 1);
    return x;
  }
  /// Of the lane's group.
  __device__ __forceinline__ float sum_x(const X& x) const {
    float sums[2] = {};
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const T* values = reinterpret_cast<const T*>(&x.half[half]);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[half] += to_float(values[i]);
    }
    float sum = sums[0] + sums[1];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  }

  __device__ void consume_w(uint32_t tile, float (&sums)[1][4]) {
    const bool early_b = !keeps_b(call_, *branch_);
    X x = load_x(0);
    const float add = End::load_add(*branch_, row0_ + threadIdx.x, threadIdx.x < kTileRows ? 0 : 1);
#pragma unroll 1
    for (uint32_t from = 0; from < groups_; from += kGroups) {
      float x_sum = 0.0f;
      if constexpr (Format::kBiases) x_sum = sum_x(x);
      if constexpr (Format::kInterleaved) {
        x.half[0] = interleave(x.half[0]);
        x.half[1] = interleave(x.half[1]);
      }
      // Column j: group from + j. Two accumulators: a chain of products half as long.
      float even[1][4] = {}, odd[1][4] = {};
#pragma unroll 1
      for (uint32_t half = 0; half < 2; ++half) {
        mma::copies_wait<1>();
        __syncwarp();
        const uint32_t own = g_ - half * kHalfGroups;
#pragma unroll
        for (uint32_t i = 0; i < kHalfGroups; i += 2) {
          group(half, i, own, x, even);
          group(half, i + 1, own, x, odd);
        }
        __syncwarp();
        copy_half(from / kHalfGroups + half + 2);
        mma::copies_commit();
      }
      x = load_x(from + kGroups);
      scale(from, x_sum, even[0], odd[0], sums[0]);
      load_scales(from + kGroups);
    }
    End::put(sums, 0);
    typename End::Early early;
    if (early_b) early = End::load_early(tile);
    if (call_.rank_tiles > 0) End::take_u(tile == call_.u_tiles);
    mma::copies_wait<0>();  // of B, where the warp has no columns
    __syncthreads();
    if (threadIdx.x < min(kTileRows, branch_->n - row0_)) finish(add, early);
  }
  __device__ __forceinline__ void group(
      uint32_t half, uint32_t i, uint32_t own, const X& x, float (&products)[1][4]) const {
    const uint32_t at = ring_ + half * kHalfBytes + g_ * 128 + ((i ^ (g_ & 3)) << 5) + 8 * t_;
    const uint2 lo = load_shared8(at), hi = load_shared8(at + 8 * 128);
#pragma unroll
    for (uint32_t h = 0; h < 2; ++h) {
      const uint4 v = x.half[h];
      const uint4 mine[1] = {own == i ? v : make_uint4(0, 0, 0, 0)};
      multiply(
          products,
          Format::weights(h ? lo.y : lo.x, table_),
          Format::weights(h ? hi.y : hi.x, table_),
          mine);
    }
  }
  /// The sums of rows g and g + 8, in the order of the groups: from lane to lane of the quad.
  __device__ __forceinline__ void scale(
      uint32_t from,
      float x_sum,
      const float (&even)[4],
      const float (&odd)[4],
      float (&to)[4]) const {
    const float products[2][2] = {{even[0], even[2]}, {odd[1], odd[3]}};
    [[maybe_unused]] float x_sums[2];
    if constexpr (Format::kBiases) {
      x_sums[0] = __shfl_sync(0xffffffffu, x_sum, 8 * t_);
      x_sums[1] = __shfl_sync(0xffffffffu, x_sum, 8 * t_ + 4);
    }
#pragma unroll
    for (uint32_t lane = 0; lane < 4; ++lane) {
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) {
        float sum = to[2 * j];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          float with = sum;
          if constexpr (Format::kBiases) with = fmaf(scales_[i][j].y, x_sums[i], with);
          with = fmaf(scales_[i][j].x, products[i][j], with);
          if (from + 2 * t_ + i < groups_) sum = with;
        }
        to[2 * j] = __shfl_sync(0xffffffffu, sum, lane, 4);
      }
    }
  }

  /// A thread a row.
  __device__ void finish(float add, const typename End::Early& early) const {
    const Branch& b = *branch_;
    const uint32_t row = threadIdx.x, out = row0_ + row;
    float sum = gather(0, 0, row);
    if (b.rank > 0) {
      float low = 0.0f;
      if (keeps_b(call_, b)) {
        const uint32_t u = u_ + b.rank_tile0 * kTileRows * 4, from = b_ + row * b_pitch(b.rank);
#pragma unroll 2
        for (uint32_t r = 0; r < b.rank; r += 8) {
          const uint4 v = load_shared16(from + 2 * r);
          End::add_eight(*reinterpret_cast<const Vec16<T>*>(&v), u + 4 * r, low);
        }
      } else {
        low = End::expand(b, out, 0, early);
      }
      sum = fmaf(b.scale, low, sum);
    }
    store_from_float(b.y, call_.y_dtype, out, sum + add);
  }

  // ---- A ----

  static constexpr uint32_t kAtOnce = 2;
  __device__ __forceinline__ void load_a(uint32_t chunk) {
    const auto* a = reinterpret_cast<const uint4*>(branch_->a) + t_;
    const auto* lo = a + size_t{min(row0_ + g_, branch_->rank - 1)} * call_.chunks * 4;
    const auto* hi = a + size_t{min(row0_ + g_ + 8, branch_->rank - 1)} * call_.chunks * 4;
    const uint32_t end = rank_chunk(blockIdx.x, warp_ + 1);
#pragma unroll
    for (uint32_t i = 0; i < kAtOnce; ++i) {
      if (chunk + i >= end) continue;
      a_[i][0] = __ldg(lo + (chunk + i) * 4);
      a_[i][1] = __ldg(hi + (chunk + i) * 4);
    }
  }
  /// A part of a tile of A, in x's type.
  __device__ void consume_a(float (&sums)[1][4]) {
    const uint32_t end = rank_chunk(blockIdx.x, warp_ + 1);
    const auto* from = static_cast<const uint4*>(call_.x) + t_;
#pragma unroll 1
    for (uint32_t chunk = rank_chunk(blockIdx.x, warp_); chunk < end; chunk += kAtOnce) {
      uint4 x[kAtOnce][1] = {};
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (chunk + i < end && g_ == 0) x[i][0] = __ldcg(from + (chunk + i) * 4);
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i) {
        if (chunk + i < end) multiply(sums, a_[i][0], a_[i][1], x[i]);
      }
      load_a(chunk + kAtOnce);
    }
  }

  const uint32_t g_, t_, table_, all_groups_, ring_, b_;
  uint32_t first_, groups_;  ///< this warp's
  const Branch* branch_ = nullptr;
  uint32_t row0_ = 0;
  float2 scales_[2][2] = {};  ///< [group][row]
  uint4 a_[kAtOnce][2] = {};
};

}  // namespace metal_lora::cuda::gemv
