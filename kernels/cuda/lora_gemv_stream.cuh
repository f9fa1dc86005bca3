// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_gemv for any format: a warp streams its columns through a private ring in shared memory
// (cp.async: no barrier between warps), which runs on into the block's next tile while one ends.
#pragma once

#include "kernels/cuda/lora_gemv_tile.cuh"

namespace metal_lora::cuda::gemv {

/// Where things lie in dynamic shared memory.
struct Layout {
  uint32_t x_pitch;  ///< bytes of a token's x: reads of eight tokens' 64 bytes meet no conflict
  uint32_t x, end, bytes;
};
template <class Format>
__host__ __device__ inline Layout make_layout(const Call& call) {
  Layout l;
  l.x_pitch = (call.k * 2 + 127) / 128 * 128 + 64;
  l.x = kWarps * Format::kStages * (kTileRows * Format::kRowBytes + Format::kExtraBytes);
  l.end = l.x + (call.x_stays ? call.m * l.x_pitch : 0);
  l.bytes = l.end + TileEnd<typename Format::Storage, 1>::bytes(call);
  return l;
}

/// The code is written to be small: each part stands once, since a launch that runs for 5 … 10 µs
/// pays for every line of instructions that it fetches (a form of 5200 instructions instead of
/// this one's took twice the time).
template <class Format, uint32_t kTokens>
class Stream : TileEnd<typename Format::Storage, kTokens / 8> {
  using T = typename Format::Storage;
  using End = TileEnd<T, kTokens / 8>;
  using End::call_, End::lane_, End::warp_;
  using End::multiply, End::rank_chunk;
  static constexpr bool kDense = Format::kGroupChunks == 0;
  static constexpr uint32_t kParts = kTokens / 8;
  static constexpr uint32_t kStages = Format::kStages;
  static constexpr uint32_t kRowBytes = Format::kRowBytes, kStageBytes = kTileRows * kRowBytes;
  static constexpr uint32_t kStageStride = kStageBytes + Format::kExtraBytes;
  static constexpr uint32_t kStageChunks = kRowBytes / Format::kChunkBytes;
  static constexpr uint32_t kRankChunkBytes = 64, kRankStageChunks = kRowBytes / kRankChunkBytes;
  static constexpr uint32_t kSlots = kRowBytes / 16;  ///< of 16 bytes in a row of a stage

 public:
  __device__ Stream(const Call& call, uint32_t shared, const float* codes, uint32_t table)
      : End(call, shared + make_layout<Format>(call).end), codes_(codes) {
    const Layout l = make_layout<Format>(call);
    table_ = table + 4 * (lane_ % kTableCopies);
    ring_ = shared + warp_ * kStages * kStageStride;
    x_ = shared + l.x;
    x_pitch_ = l.x_pitch;
    first_ = call.units * warp_ / kWarps * call.unit;
    slice_ = call.units * (warp_ + 1) / kWarps * call.unit - first_;
    next_ = blockIdx.x;
  }

  /// Everything that may go before the wait. Into L2 alone what the kernel before may still write.
  __device__ void begin() {
    prefetch();
    open_next();
    if (call_.weights_ready) fill_ring();
  }

  __device__ void run() {
    copy_x();
    mma::copies_commit();
    if (call_.weights_ready) {
      mma::copies_wait<0>();
    } else {
      fill_ring();
      mma::copies_wait<kStages - 1>();
    }
    __syncthreads();  // of tables
    uint32_t buffer = 0;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < call_.all_tiles; tile += gridDim.x, buffer ^= 1) {
      float sums[kParts][4] = {};
      if (tile < call_.u_tiles) {
        consume_a(tile, sums);
        End::end_part(tile, buffer, sums);
        continue;
      }
      typename End::Early early;
      if (kDense) early = End::load_early(tile);
      consume_w(tile, sums);
      if (!kDense) early = End::load_early(tile);  // registers are short before
      End::end_tile(tile, buffer, sums, early);
    }
    kDense ? End::leave() : End::leave_together();
  }

 private:
  // ---- the ring: the columns of this warp, of one tile after the other ----

  __device__ void prefetch() const {
    End::prefetch();
    const uint32_t tile = blockIdx.x;
    if (call_.weights_ready || tile < call_.u_tiles || slice_ == 0) return;
    const Branch& b = branch_of_tile(call_, tile - call_.u_tiles);
    const uint32_t row0 = (tile - call_.u_tiles - b.tile0) * kTileRows;
    if (lane_ < min(kTileRows, b.n - row0)) {
      prefetch_l2(
          b.w + (size_t{row0 + lane_} * call_.chunks + first_) * Format::kChunkBytes,
          slice_ * Format::kChunkBytes);
    }
  }
  __device__ void fill_ring() {
#pragma unroll 1
    for (uint32_t i = 0; i + 1 < kStages; ++i) issue();
  }

  /// Makes the next tile of which this warp has columns the one that issue() copies; none is left:
  /// at_ = end_.
  __device__ void open_next() {
    at_ = end_ = 0;
#pragma unroll 1
    for (; end_ == 0 && next_ < call_.all_tiles; next_ += gridDim.x) {
      const char* base;
      uint32_t first = first_;
      end_ = slice_;
      of_rank_ = next_ < call_.u_tiles;
      if (of_rank_) {
        const uint32_t tile = next_ / call_.u_parts;
        const Branch& b = branch_of_rank_tile(call_, tile);
        source_branch_ = &b;
        base = b.a;
        row0_ = (tile - b.rank_tile0) * kTileRows;
        rows_ = b.rank - row0_;
        chunk_bytes_ = kRankChunkBytes;
        first = rank_chunk(next_, warp_);
        end_ = rank_chunk(next_, warp_ + 1) - first;
      } else {
        const Branch& b = branch_of_tile(call_, next_ - call_.u_tiles);
        source_branch_ = &b;
        base = b.w;
        row0_ = (next_ - call_.u_tiles - b.tile0) * kTileRows;
        rows_ = b.n - row0_;
        chunk_bytes_ = Format::kChunkBytes;
      }
      stride_ = call_.chunks * chunk_bytes_;
      source_ = base + size_t{row0_} * stride_ + first * chunk_bytes_ + lane_ % kSlots * 16;
    }
  }

  /// Copies the next stage, if there is one; one group of copies in any case.
  __device__ void issue() {
    if (at_ < end_) {
      const uint32_t stage = ring_ + in_ * kStageStride;
      const uint32_t count = min(of_rank_ ? kRankStageChunks : kStageChunks, end_ - at_);
      copy_rows(stage, count);
      if constexpr (Format::kBiases) {
        if (!of_rank_) copy_scales(stage + kStageBytes, count);
      }
      if constexpr (Format::kNf4) {
        if (!of_rank_) copy_absmax(stage + kStageBytes, count);
      }
      at_ += count;
      if (at_ == end_) open_next();
    }
    mma::copies_commit();
    in_ = in_ + 1 == kStages ? 0 : in_ + 1;
  }

  /// 16 rows of up to kRowBytes; rows past the end are copies of the last one.
  __device__ void copy_rows(uint32_t stage, uint32_t count) {
    constexpr uint32_t kRowsAtOnce = 32 / kSlots;
    const uint32_t slot = lane_ % kSlots, first = lane_ / kSlots;
    if (16 * slot >= count * chunk_bytes_) return;
    const char* from = source_ + at_ * chunk_bytes_;
#pragma unroll
    for (uint32_t i = 0; i < kTileRows / kRowsAtOnce; ++i) {
      const uint32_t row = kRowsAtOnce * i + first;
      mma::copy_async<16>(
          stage + row * kRowBytes + ((slot ^ swizzle(row)) << 4),
          from + size_t{min(row, rows_ - 1)} * stride_);
    }
  }

  __device__ void copy_scales(uint32_t to, uint32_t count) const {
    const uint32_t size = call_.scales_dtype == DType::f32 ? 4 : 2;
    const uint32_t row = lane_ / 2, groups = call_.chunks / Format::kGroupChunks;
    const size_t at =
        (size_t{row0_ + min(row, rows_ - 1)} * groups + (first_ + at_) / Format::kGroupChunks) *
        size;
    const uint32_t words = count / Format::kGroupChunks * size / 4;
    to += row * scale_pitch<Format>() * 4;
    const char *scales = source_branch_->scales + at, *biases = source_branch_->biases + at;
#pragma unroll 1
    for (uint32_t i = 4 * (lane_ % 2); i < 4 * words; i += 8) {
      mma::copy_async<4>(to + i, scales + i);
      mma::copy_async<4>(to + scale_bytes<Format>() + i, biases + i);
    }
  }

  __device__ void copy_absmax(uint32_t to, uint32_t count) const {
    const uint32_t row = lane_ / 2;
    const size_t at = size_t{row0_ + min(row, rows_ - 1)} * (call_.chunks / 2) + (first_ + at_) / 2;
    const uint32_t blocks = count / 2;
    constexpr uint32_t kSize = Format::kDouble ? 1 : 4;
    const char* absmax = source_branch_->scales + at * kSize;
#pragma unroll 1
    for (uint32_t i = 4 * (lane_ % 2); i < blocks * kSize; i += 8) {
      mma::copy_async<4>(to + row * kAbsmaxPitch * 4 + i, absmax + i);
    }
    if constexpr (Format::kDouble) {
      // The second-level absmax of the first block, and of the last: at most one further.
      const size_t index = (lane_ % 2 ? at + blocks - 1 : at) / kNf4NestedBlock;
      mma::copy_async<4>(
          to + 16 * kAbsmaxPitch * 4 + lane_ * 4,
          source_branch_->biases + (kNf4NestedHead + index) * 4);
    }
  }

  // ---- x ----

  /// The warp's columns of all tokens.
  __device__ void copy_x() const {
    if (!call_.x_stays) return;
    const uint32_t pieces = slice_ * 4;  // of 16 bytes
#pragma unroll 1
    for (uint32_t token = 0; token < call_.m; ++token) {
      const char* from =
          static_cast<const char*>(call_.x) + (size_t{token} * call_.chunks + first_) * 64;
      const uint32_t to = x_ + token * x_pitch_ + first_ * 64;
#pragma unroll 2
      for (uint32_t i = lane_; i < pieces; i += 32) mma::copy_async<16>(to + 16 * i, from + 16 * i);
    }
  }

  /// Token lane / 4's columns 8t … of a chunk: 16 bytes, in the order of the weights' pairs.
  __device__ uint4 load_x(uint32_t chunk, uint32_t part, bool stays) const {
    const uint32_t token = 8 * part + lane_ / 4;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (token < call_.m) {
      const uint32_t at = chunk * 64 + lane_ % 4 * 16;
      v = stays ? load_shared16(x_ + token * x_pitch_ + at)
                : __ldcg(reinterpret_cast<const uint4*>(
                      static_cast<const char*>(call_.x) + size_t{token} * call_.k * 2 + at));
      if constexpr (Format::kInterleaved) v = interleave(v);
    }
    return v;
  }

  // ---- products ----

  /// sums of this warp's columns of a part of a tile of A; x comes from L2, once.
  __device__ void consume_a(uint32_t item, float (&sums)[kParts][4]) {
    const uint32_t first = rank_chunk(item, warp_);
    consume_dense(first, rank_chunk(item, warp_ + 1) - first, false, sums);
  }

  /// sums of this warp's columns of a tile of W.
  __device__ void consume_w(uint32_t tile, float (&sums)[kParts][4]) {
    if constexpr (kDense) {
      consume_dense(first_, slice_, call_.x_stays, sums);
    } else {
      uint32_t row0 = 0, codes = 0;
      if constexpr (Format::kDouble) {
        const Branch& b = branch_of_tile(call_, tile - call_.u_tiles);
        codes = static_cast<uint32_t>(&b - call_.branch) * kNf4NestedHead;
        row0 = (tile - call_.u_tiles - b.tile0) * kTileRows;
        nested_last_ = b.n - 1;
      }
#pragma unroll 1
      for (uint32_t at = 0; at < slice_; at += kStageChunks) {
        const uint32_t count = min(kStageChunks, slice_ - at);
        const uint32_t stage = next_stage();
        Scales scales;
        if constexpr (Format::kBiases) load_scales(stage, count, scales);
#pragma unroll 2
        for (uint32_t c = 0; c < count; c += Format::kGroupChunks) {
          group(stage, c, at, codes, row0, scales, sums);
        }
      }
    }
  }

  __device__ void consume_dense(
      uint32_t first, uint32_t chunks, bool x_stays, float (&sums)[kParts][4]) {
#pragma unroll 1
    for (uint32_t at = 0; at < chunks; at += kRankStageChunks) {
      const uint32_t count = min(kRankStageChunks, chunks - at);
      uint4 x[kRankStageChunks][kParts];  // asked for before the wait
#pragma unroll
      for (uint32_t c = 0; c < kRankStageChunks; ++c) {
        load_x(first + at + min(c, count - 1), x_stays, x[c]);
      }
      const uint32_t stage = next_stage();
#pragma unroll
      for (uint32_t c = 0; c < kRankStageChunks; ++c) {
        if (c < count) dense_chunk(stage, c, x[c], sums);
      }
    }
  }
  /// The ring's next stage, once it is there; the one behind the last is asked for.
  __device__ uint32_t next_stage() {
    mma::copies_wait<kStages - 2>();
    __syncwarp();
    issue();
    const uint32_t stage = ring_ + out_ * kStageStride;
    out_ = out_ + 1 == kStages ? 0 : out_ + 1;
    return stage;
  }

  __device__ void load_x(uint32_t chunk, bool stays, uint4 (&x)[kParts]) const {
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) x[p] = load_x(chunk, p, stays);
  }

  __device__ void dense_chunk(
      uint32_t stage, uint32_t c, const uint4 (&x)[kParts], float (&sums)[kParts][4]) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    uint4 lo = Dense<T>::template weights<kRowBytes>(stage, g, c, t, 0);
    uint4 hi = Dense<T>::template weights<kRowBytes>(stage, g + 8, c, t, 0);
    if constexpr (Format::kInterleaved) lo = interleave(lo), hi = interleave(hi);
    multiply(sums, lo, hi, x);
  }

  /// Scales and biases of rows g and g + 8, of a stage's groups t, t + 4: each lane converts its own.
  static constexpr uint32_t kStageGroups =
      Format::kGroupChunks > 0 ? kStageChunks / Format::kGroupChunks : 1;
  static constexpr uint32_t kLaneGroups = (kStageGroups + 3) / 4;
  struct Scales {
    float4 v[kLaneGroups];
  };
  __device__ void load_scales(uint32_t stage, uint32_t chunks, Scales& scales) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4, groups = chunks / Format::kGroupChunks;
    const uint32_t row = stage + kStageBytes + g * scale_pitch<Format>() * 4;
    constexpr uint32_t kHalf = scale_bytes<Format>() / 2;
#pragma unroll
    for (uint32_t i = 0; i < kLaneGroups; ++i) {
      const uint32_t index = min(t + 4 * i, groups - 1);
      const float2 lo =
          Format::scale_and_bias(scale_at(row, index), scale_at(row + 2 * kHalf, index));
      const float2 hi =
          Format::scale_and_bias(scale_at(row + kHalf, index), scale_at(row + 3 * kHalf, index));
      scales.v[i] = make_float4(lo.x, lo.y, hi.x, hi.y);
    }
  }

  /// A group of columns: its products unscaled, then scaled in f32 into sums. With biases the
  /// tensor cores add up x, too: times rows of ones.
  __device__ void group(
      uint32_t stage,
      uint32_t c,
      uint32_t at,
      uint32_t codes,
      uint32_t row0,
      const Scales& scales,
      float (&sums)[kParts][4]) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    float products[kParts][4] = {}, x_sums[kParts][4] = {};
#pragma unroll
    for (uint32_t j = 0; j < Format::kGroupChunks; ++j) {
      uint4 x[kParts];
      load_x(first_ + at + c + j, call_.x_stays, x);
      multiply(
          products,
          Format::weights(stage, g, c + j, t, table_),
          Format::weights(stage, g + 8, c + j, t, table_),
          x);
      if constexpr (Format::kBiases) {
        constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;
        const uint4 ones = make_uint4(kOnes, kOnes, kOnes, kOnes);
        multiply(x_sums, ones, ones, x);
      }
    }
    const uint32_t index = c / Format::kGroupChunks, extra = stage + kStageBytes;
    if constexpr (Format::kBiases) {
      const uint32_t from = (lane_ & ~3u) | (index & 3);
      const float4 own = index < 4 ? scales.v[0] : scales.v[kLaneGroups - 1];
      const float2 lo = {
          __shfl_sync(0xffffffffu, own.x, from), __shfl_sync(0xffffffffu, own.y, from)};
      const float2 hi = {
          __shfl_sync(0xffffffffu, own.z, from), __shfl_sync(0xffffffffu, own.w, from)};
#pragma unroll
      for (uint32_t p = 0; p < kParts; ++p) {
        sums[p][0] = fmaf(lo.x, products[p][0], fmaf(lo.y, x_sums[p][0], sums[p][0]));
        sums[p][1] = fmaf(lo.x, products[p][1], fmaf(lo.y, x_sums[p][1], sums[p][1]));
        sums[p][2] = fmaf(hi.x, products[p][2], fmaf(hi.y, x_sums[p][2], sums[p][2]));
        sums[p][3] = fmaf(hi.x, products[p][3], fmaf(hi.y, x_sums[p][3], sums[p][3]));
      }
    } else {
      const float lo = absmax(extra, g, index, at, codes, row0);
      const float hi = absmax(extra, g + 8, index, at, codes, row0);
#pragma unroll
      for (uint32_t p = 0; p < kParts; ++p) {
        sums[p][0] = fmaf(lo, products[p][0], sums[p][0]);
        sums[p][1] = fmaf(lo, products[p][1], sums[p][1]);
        sums[p][2] = fmaf(hi, products[p][2], sums[p][2]);
        sums[p][3] = fmaf(hi, products[p][3], sums[p][3]);
      }
    }
  }

  /// Any of the storage types without a branch.
  __device__ float scale_at(uint32_t row_address, uint32_t group) const {
    const uint32_t at = group * (call_.scales_dtype == DType::f32 ? 4 : 2);
    const uint32_t word = load_shared4(row_address + (at & ~3u));
    const uint32_t half = word >> (8 * (at & 2));
    const float as_f16 = __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
    const float wide = __uint_as_float(call_.scales_dtype == DType::f32 ? word : half << 16);
    return call_.scales_dtype == DType::f16 ? as_f16 : wide;
  }

  __device__ float absmax(
      uint32_t extra, uint32_t row, uint32_t index, uint32_t at, uint32_t codes, uint32_t row0)
      const {
    const uint32_t address = extra + row * kAbsmaxPitch * 4;
    if constexpr (!Format::kDouble) {
      return load_shared_float(address + 4 * index);
    } else {
      const uint32_t code = load_shared4(address + index / 4 * 4) >> (index % 4 * 8) & 0xff;
      // Rows past the end were copied as the last one: what is made of them is not stored.
      const uint32_t first = min(row0 + row, nested_last_) * (call_.chunks / 2) + (first_ + at) / 2;
      const uint32_t further = (first + index) / kNf4NestedBlock != first / kNf4NestedBlock ? 1 : 0;
      const float second =
          load_shared_float(extra + 16 * kAbsmaxPitch * 4 + (2 * row + further) * 4);
      return __fadd_rn(__fmul_rn(codes_[codes + 1 + code], second), codes_[codes]);
    }
  }

  const float* codes_;  ///< of each branch's nested absmax: offset, code[256]
  uint32_t table_, ring_, x_, x_pitch_;
  uint32_t first_, slice_;  ///< this warp's chunks
  uint32_t nested_last_ = 0;
  // the ring's ends
  uint32_t in_ = 0, out_ = 0;
  // what issue() copies
  const char* source_ = nullptr;
  const Branch* source_branch_ = nullptr;
  uint32_t stride_ = 0, chunk_bytes_ = 0;
  uint32_t next_, at_ = 0, end_ = 0, row0_ = 0, rows_ = 0;
  bool of_rank_ = false;
};

}  // namespace metal_lora::cuda::gemv
