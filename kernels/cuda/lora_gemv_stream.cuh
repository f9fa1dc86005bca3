// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The one dispatch of lora_gemv. A cluster of blocks splits the columns, so that each block keeps
// only its slice of x; its eight warps take a tile of 16 rows each, stream the tile's slice through
// a private ring in shared memory (cp.async: no barrier between warps), and push their partial
// sums to the block of the cluster that finishes the tile. u = x·Aᵀ is worked out by each cluster
// on its own, ahead of W and in the same way: nobody waits for another cluster, so that no flags,
// counters or co-residence of the grid are needed, and A comes from L2 after its first reader.
// Cluster barriers are split in arrive and wait with a tile's streaming in between.
#pragma once

#include "kernels/cuda/lora_gemv_cluster.cuh"
#include "kernels/cuda/lora_gemv_formats.cuh"

namespace metal_lora::cuda::gemv {

inline constexpr uint32_t kWarps = 8, kThreads = 32 * kWarps;
/// What fits: with more tokens x takes the room of a stage, then that of a second inbox.
constexpr uint32_t inboxes(uint32_t tokens) {
  return tokens <= 16 ? 2 : 1;
}
template <class Format>
constexpr uint32_t stages(uint32_t tokens) {
  return tokens <= 8 ? Format::kStages : 2;
}

/// Where things lie in dynamic shared memory; kTokens = 8, 16, 32 or 64.
struct Layout {
  uint32_t x, sums, inbox, u_inbox, u, bytes;
};
template <class Format, uint32_t kTokens>
__host__ __device__ inline Layout make_layout(const Call& call) {
  Layout l;
  const uint32_t ranks = call.rank_tiles * kTileRows;
  l.x = kWarps * stages<Format>(kTokens) * (kTileRows * Format::kRowBytes + Format::kExtraBytes);
  l.sums = l.x + call.slice_chunks * kTokens * kChunk * 2;
  l.inbox = l.sums + (Format::kBiases ? call.slice_chunks * kTokens * 4 : 0);
  l.u_inbox = l.inbox + inboxes(kTokens) * kWarps * kTileRows * kTokens * 4;
  l.u = l.u_inbox + call.rank_splits * ranks * kTokens * 4;
  l.bytes = l.u + ranks * kTokens * 4;
  return l;
}

/// Branches are few: the one that a tile (of rows or of ranks) belongs to.
__device__ __forceinline__ const Branch& branch_of_tile(const Call& call, uint32_t tile) {
  uint32_t i = 0;
#pragma unroll 1
  while (i + 1 < call.branches && tile >= call.branch[i + 1].tile0) ++i;
  return call.branch[i];
}
__device__ __forceinline__ const Branch& branch_of_rank_tile(const Call& call, uint32_t tile) {
  uint32_t i = 0;
#pragma unroll 1
  while (i + 1 < call.branches && tile >= call.branch[i + 1].rank_tile0) ++i;
  return call.branch[i];
}

/// The code is written to be small: each part stands once, since a launch that runs for 5 … 10 µs
/// pays for every line of instructions that it fetches (a form of 5200 instructions instead of
/// this one's took twice the time).
template <class Format, uint32_t kTokens>
class Stream {
  using T = typename Format::Storage;
  static constexpr uint32_t kParts = kTokens / 8;
  static constexpr uint32_t kStages = stages<Format>(kTokens);
  static constexpr bool kTwoInboxes = inboxes(kTokens) == 2;
  static constexpr uint32_t kRowBytes = Format::kRowBytes, kStageBytes = kTileRows * kRowBytes;
  static constexpr uint32_t kStageStride = kStageBytes + Format::kExtraBytes;
  static constexpr uint32_t kStageChunks = kRowBytes / Format::kChunkBytes;
  static constexpr uint32_t kRankChunkBytes = 64, kRankStageChunks = kRowBytes / kRankChunkBytes;
  static constexpr uint32_t kSlots = kRowBytes / 16;  ///< of 16 bytes in a row of a stage

 public:
  __device__ Stream(const Call& call, uint32_t shared, const float* codes, uint32_t table)
      : call_(call), codes_(codes) {
    const Layout l = make_layout<Format, kTokens>(call);
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    table_ = table + 4 * (lane_ % kTableCopies);
    ring_ = shared + warp_ * kStages * kStageStride;
    x_ = shared + l.x;
    sums_ = shared + l.sums;
    inbox_ = shared + l.inbox;
    u_inbox_ = shared + l.u_inbox;
    u_ = shared + l.u;
    block_ = blockIdx.x & ((1u << call.blocks_log2) - 1);
    cluster_ = blockIdx.x >> call.blocks_log2;
    clusters_ = gridDim.x >> call.blocks_log2;
    first_ = min(call.chunks, (call.units * block_ >> call.blocks_log2) * call.unit);
    slice_ = min(call.chunks, (call.units * (block_ + 1) >> call.blocks_log2) * call.unit) - first_;
    // Jobs of a warp: its parts of A (in rounds that all warps count alike), then its tiles of W.
    rank_jobs_ = (call.rank_items + kWarps - 1) / kWarps;
  }

  /// What does not depend on the kernel before: into L2 only, so that it is harmless if it does.
  __device__ void prefetch() const {
    const uint32_t tile = cluster_ * kWarps + warp_;
    if (tile < call_.tiles && lane_ < 16) {
      const Branch& b = branch_of_tile(call_, tile);
      const uint32_t at = (tile - b.tile0) * kTileRows + lane_;
      if (at < b.n) {
        prefetch_l2(
            b.w + (size_t{at} * call_.chunks + first_) * Format::kChunkBytes,
            slice_ * Format::kChunkBytes);
      }
    }
    // B's rows of the first tile that this block finishes, one block of bytes.
    const uint32_t own = cluster_ * kWarps + (warp_ << call_.blocks_log2) + block_;
    if (call_.wide_b && lane_ == 16 && warp_ < kWarps >> call_.blocks_log2 && own < call_.tiles) {
      const Branch& b = branch_of_tile(call_, own);
      const uint32_t row0 = (own - b.tile0) * kTileRows;
      const uint32_t bytes = min(kTileRows, b.n - row0) * b.rank * 2;
      if (bytes > 0) prefetch_l2(b.b + size_t{row0} * b.rank * 2, bytes);
    }
  }

  /// Everything that may go before the wait: with the promise, the ring's first stages too.
  __device__ void begin() {
    cluster_arrive();  // the others' shared memory may be written once they run
    open_next();
    if (call_.weights_ready) fill_ring();
  }
  __device__ void fill_ring() {
#pragma unroll 1
    for (uint32_t i = 0; i + 1 < kStages; ++i) issue();
  }

  __device__ void run() {
    copy_x();
    if (!call_.weights_ready) fill_ring();
    if (call_.weights_ready) {
      mma::copies_wait<0>();
    } else {
      mma::copies_wait<kStages - 1>();
    }
    prepare_x();
    __syncthreads();
    cluster_wait();
    uint32_t buffer = 0, pass = cluster_;
    if (rank_jobs_ == 0 && call_.rank_tiles > 0) cluster_arrive();
#pragma unroll 1
    for (uint32_t job = 0;; ++job) {
      const bool of_rank = job < rank_jobs_, last = !of_rank && pass >= call_.passes;
      float sums[kParts][4] = {};
      if (!last) consume(job, pass, of_rank, sums);
      if (of_rank) {
        push_u(job * kWarps + warp_, sums);
        if (job + 1 == rank_jobs_) cluster_arrive();
        continue;
      }
      if (job > rank_jobs_) {
        cluster_wait();
        finish(pass - clusters_, kTwoInboxes ? buffer ^ 1 : 0);
        if (last) break;
        if constexpr (!kTwoInboxes) {
          cluster_arrive();
          cluster_wait();
        }
      } else if (call_.rank_tiles > 0) {
        cluster_wait();
        gather_u();
      }
      push_tile(sums, kTwoInboxes ? buffer : 0);
      cluster_arrive();
      pass += clusters_;
      buffer ^= 1;
    }
  }

 private:
  // ---- the ring: first this warp's parts of A, then its tiles of W ----

  __device__ uint32_t item_chunk(uint32_t part) const {
    return slice_ * part >> call_.rank_splits_log2;
  }

  /// Makes the next non-empty job the one that issue() copies; done: at_ = end_.
  __device__ void open_next() {
#pragma unroll 1
    while (at_ == end_) {
      const char* base;
      if (job_ < rank_jobs_) {
        const uint32_t item = job_++ * kWarps + warp_;
        if (item >= call_.rank_items) continue;
        const uint32_t tile = item >> call_.rank_splits_log2;
        const uint32_t part = item & ((1u << call_.rank_splits_log2) - 1);
        const Branch& b = branch_of_rank_tile(call_, tile);
        source_branch_ = &b;
        base = b.a;
        at_ = item_chunk(part);
        end_ = item_chunk(part + 1);
        row0_ = (tile - b.rank_tile0) * kTileRows;
        rows_ = b.rank - row0_;
        chunk_bytes_ = kRankChunkBytes;
        of_rank_ = true;
      } else {
        const uint32_t pass = cluster_ + (job_ - rank_jobs_) * clusters_;
        if (pass >= call_.passes) return;
        ++job_;
        const uint32_t tile = pass * kWarps + warp_;
        if (tile >= call_.tiles) continue;
        const Branch& b = branch_of_tile(call_, tile);
        source_branch_ = &b;
        base = b.w;
        at_ = 0;
        end_ = slice_;
        row0_ = (tile - b.tile0) * kTileRows;
        rows_ = b.n - row0_;
        chunk_bytes_ = Format::kChunkBytes;
        of_rank_ = false;
      }
      stride_ = call_.chunks * chunk_bytes_;
      source_ = base + size_t{row0_} * stride_ + first_ * chunk_bytes_ + lane_ % kSlots * 16;
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
      open_next();
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

  /// The slice of x in the order in which the tensor cores take it: 16 bytes of a lane are token
  /// g's columns 8t … of a chunk.
  __device__ void copy_x() const {
    const uint32_t count = slice_ * kParts * 32;
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t chunk = i / 32 / kParts, token = i / 32 % kParts * 8 + lane_ / 4;
      const bool inside = token < call_.m;
      const T* from = static_cast<const T*>(call_.x) + size_t{inside ? token : 0} * call_.k +
                      (first_ + chunk) * kChunk + lane_ % 4 * 8;
      mma::copy_async<16>(x_ + i * 16, from, inside ? 16 : 0);
    }
    mma::copies_commit();
  }
  /// The order of pairs for 4-bit codes, and sums of each chunk's values for the biases. A thread
  /// touches what it copied itself.
  __device__ void prepare_x() const {
    if constexpr (Format::kBiases) {
      const uint32_t count = slice_ * kParts * 32;
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
        uint4 v = load_shared16(x_ + i * 16);
        const T* values = reinterpret_cast<const T*>(&v);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += to_float(values[j]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane_ % 4 == 0) push_local(sums_ + (i / 32 * 8 + lane_ / 4) * 4, sum);
        if constexpr (Format::kInterleaved) {
          v = interleave(v);
          asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"r"(x_ + i * 16),
                       "r"(v.x),
                       "r"(v.y),
                       "r"(v.z),
                       "r"(v.w)
                       : "memory");
        }
      }
    }
  }
  static __device__ void push_local(uint32_t address, float v) {
    asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
  }

  // ---- products ----

  /// sums of this warp's part of a job.
  __device__ void consume(uint32_t job, uint32_t pass, bool of_rank, float (&sums)[kParts][4]) {
    uint32_t at = 0, end = slice_, step = kStageChunks, row0 = 0, codes = 0;
    if (of_rank) {
      const uint32_t item = job * kWarps + warp_;
      const uint32_t part = item & ((1u << call_.rank_splits_log2) - 1);
      if (item >= call_.rank_items) return;
      at = item_chunk(part);
      end = item_chunk(part + 1);
      step = kRankStageChunks;
    } else {
      const uint32_t tile = pass * kWarps + warp_;
      if (tile >= call_.tiles) return;
      if constexpr (Format::kDouble) {
        const Branch& b = branch_of_tile(call_, tile);
        codes = static_cast<uint32_t>(&b - call_.branch) * kNf4NestedHead;
        row0 = (tile - b.tile0) * kTileRows;
        nested_last_ = b.n - 1;
      }
    }
#pragma unroll 1
    for (; at < end; at += step) {
      mma::copies_wait<kStages - 2>();
      __syncwarp();
      issue();
      const uint32_t stage = ring_ + out_ * kStageStride, count = min(step, end - at);
      out_ = out_ + 1 == kStages ? 0 : out_ + 1;
      if (Format::kGroupChunks == 0 || of_rank) {
#pragma unroll
        for (uint32_t c = 0; c < kRankStageChunks; ++c) {
          if (c < count) dense_chunk(stage, c, at + c, sums);
        }
      } else if constexpr (Format::kGroupChunks > 0) {
#pragma unroll 2
        for (uint32_t c = 0; c < count; c += Format::kGroupChunks) {
          group(stage, c, at, codes, row0, sums);
        }
      }
    }
  }

  /// sums += the chunk's 16 rows times the tokens; lo and hi: 8 weights of rows g and g + 8.
  __device__ void multiply(float (&sums)[kParts][4], uint4 lo, uint4 hi, uint32_t chunk) const {
    const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
      const uint4 x = load_shared16(x_ + ((chunk * kParts + p) * 32 + lane_) * 16);
      mma::multiply<T>(sums[p], first, x.x, x.y);
      mma::multiply<T>(sums[p], second, x.z, x.w);
    }
  }

  __device__ void dense_chunk(
      uint32_t stage, uint32_t c, uint32_t x_chunk, float (&sums)[kParts][4]) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    uint4 lo = Dense<T>::template weights<kRowBytes>(stage, g, c, t, 0);
    uint4 hi = Dense<T>::template weights<kRowBytes>(stage, g + 8, c, t, 0);
    if constexpr (Format::kInterleaved) lo = interleave(lo), hi = interleave(hi);
    multiply(sums, lo, hi, x_chunk);
  }

  /// A group of columns: its products unscaled, then scaled in f32 into sums.
  __device__ void group(
      uint32_t stage,
      uint32_t c,
      uint32_t at,
      uint32_t codes,
      uint32_t row0,
      float (&sums)[kParts][4]) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    float products[kParts][4] = {};
#pragma unroll
    for (uint32_t j = 0; j < Format::kGroupChunks; ++j) {
      multiply(
          products,
          Format::weights(stage, g, c + j, t, table_),
          Format::weights(stage, g + 8, c + j, t, table_),
          at + c + j);
    }
    const uint32_t index = c / Format::kGroupChunks, extra = stage + kStageBytes;
    if constexpr (Format::kBiases) {
      const uint32_t row = extra + g * scale_pitch<Format>() * 4;
      constexpr uint32_t kHalf = scale_bytes<Format>() / 2;
      const float2 lo =
          Format::scale_and_bias(scale_at(row, index), scale_at(row + 2 * kHalf, index));
      const float2 hi =
          Format::scale_and_bias(scale_at(row + kHalf, index), scale_at(row + 3 * kHalf, index));
#pragma unroll
      for (uint32_t p = 0; p < kParts; ++p) {
        float x0 = 0.0f, x1 = 0.0f;
#pragma unroll
        for (uint32_t j = 0; j < Format::kGroupChunks; ++j) {
          const uint2 v = load_shared8(sums_ + ((at + c + j) * kTokens + 8 * p + 2 * t) * 4);
          x0 += __uint_as_float(v.x);
          x1 += __uint_as_float(v.y);
        }
        sums[p][0] = fmaf(lo.x, products[p][0], fmaf(lo.y, x0, sums[p][0]));
        sums[p][1] = fmaf(lo.x, products[p][1], fmaf(lo.y, x1, sums[p][1]));
        sums[p][2] = fmaf(hi.x, products[p][2], fmaf(hi.y, x0, sums[p][2]));
        sums[p][3] = fmaf(hi.x, products[p][3], fmaf(hi.y, x1, sums[p][3]));
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

  // ---- u ----

  /// A warp's partial sums of u to the blocks that add them up: rank r to block r % blocks.
  __device__ void push_u(uint32_t item, const float (&sums)[kParts][4]) const {
    if (item >= call_.rank_items) return;
    const uint32_t g = lane_ / 4, t = lane_ % 4, log2 = call_.blocks_log2;
    const uint32_t tile = item >> call_.rank_splits_log2;
    const uint32_t part = item & ((1u << call_.rank_splits_log2) - 1);
    const uint32_t own = call_.rank_tiles * kTileRows >> log2;
    const uint32_t from = (block_ << call_.rank_splits_log2) + part;
    const uint32_t mine = (tile * kTileRows + g) >> log2;  // rank g + 8 is 8 >> log2 further
    const uint32_t to =
        address_in(u_inbox_ + ((from * own + mine) * kTokens + 2 * t) * 4, g & ((1u << log2) - 1));
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t token = 8 * p + 2 * t + j % 2;
        const uint32_t further = (j / 2 * 8 >> log2) * kTokens + 8 * p + j % 2;
        if (token < call_.m) push(to + further * 4, sums[p][j]);
      }
    }
  }

  /// This block's ranks of u, summed in the order of the columns, to all blocks.
  __device__ void gather_u() const {
    const uint32_t log2 = call_.blocks_log2, own = call_.rank_tiles * kTileRows >> log2;
    const uint32_t token = threadIdx.x % kTokens;
    if (token >= call_.m) return;
#pragma unroll 1
    for (uint32_t mine = threadIdx.x / kTokens; mine < own; mine += kThreads / kTokens) {
      const uint32_t rank = (mine << log2) + block_;
      const Branch& b = branch_of_rank_tile(call_, rank / kTileRows);
      const uint32_t row = rank - b.rank_tile0 * kTileRows;
      float sum = 0.0f;
      if (call_.u_given) {
        if (row < b.rank) sum = b.u[token * b.rank + row];
      } else {
#pragma unroll 8
        for (uint32_t from = 0; from < 1u << (log2 + call_.rank_splits_log2); ++from) {
          sum += load_shared_float(u_inbox_ + ((from * own + mine) * kTokens + token) * 4);
        }
        if (cluster_ == 0 && b.u != nullptr && row < b.rank) b.u[token * b.rank + row] = sum;
      }
      const uint32_t to = u_ + (token * call_.rank_tiles * kTileRows + rank) * 4;
#pragma unroll 1
      for (uint32_t i = 0; i < 1u << log2; ++i) push(address_in(to, i), sum);
    }
  }

  // ---- y ----

  /// inbox [buffer][tile / blocks][from block][token][row]
  __device__ uint32_t inbox_at(uint32_t buffer, uint32_t slot, uint32_t from) const {
    return inbox_ +
           (buffer * kWarps + (slot << call_.blocks_log2) + from) * (kTileRows * kTokens * 4);
  }

  __device__ void push_tile(const float (&sums)[kParts][4], uint32_t buffer) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    const uint32_t to = address_in(
        inbox_at(buffer, warp_ >> call_.blocks_log2, block_) + (2 * t * kTileRows + g) * 4,
        warp_ & ((1u << call_.blocks_log2) - 1));
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t further = (8 * p + j % 2) * kTileRows + j / 2 * 8;
        if (8 * p + 2 * t + j % 2 < call_.m) push(to + further * 4, sums[p][j]);
      }
    }
  }

  __device__ void finish(uint32_t pass, uint32_t buffer) const {
    const uint32_t row = threadIdx.x % kTileRows;
#pragma unroll 1
    for (uint32_t token = threadIdx.x / kTileRows; token < call_.m; token += kThreads / kTileRows) {
      finish_token(pass, buffer, row, token);
    }
  }

  __device__ void finish_token(uint32_t pass, uint32_t buffer, uint32_t row, uint32_t token) const {
#pragma unroll 1
    for (uint32_t slot = 0; slot < kWarps >> call_.blocks_log2; ++slot) {
      const uint32_t tile = pass * kWarps + (slot << call_.blocks_log2) + block_;
      if (tile >= call_.tiles) continue;
      const Branch& b = branch_of_tile(call_, tile);
      const uint32_t out = (tile - b.tile0) * kTileRows + row;
      if (out >= b.n) continue;
      const size_t at = size_t{token} * b.n + out;
      float sum = 0.0f;
#pragma unroll 8
      for (uint32_t from = 0; from < 1u << call_.blocks_log2; ++from) {
        sum += load_shared_float(inbox_at(buffer, slot, from) + (token * kTileRows + row) * 4);
      }
      if (b.rank > 0) sum = fmaf(b.scale, expand(b, out, token), sum);
      if (b.bias != nullptr) sum += b.bias[out];
      if (b.residual != nullptr) sum += load_as_float(b.residual, call_.y_dtype, at);
      store_from_float(b.y, call_.y_dtype, at, sum);
    }
  }

  /// u[token]·B[row]
  __device__ float expand(const Branch& b, uint32_t row, uint32_t token) const {
    uint32_t u = u_ + (token * call_.rank_tiles + b.rank_tile0) * kTileRows * 4;
    float sum = 0.0f;
    if (call_.wide_b) {
      const T* from = reinterpret_cast<const T*>(b.b) + size_t{row} * b.rank;
#pragma unroll 2
      for (uint32_t r = 0; r < b.rank; r += 8, u += 32) {
        const Vec16<T> v = load16(from + r);
        const uint4 lo = load_shared16(u), hi = load_shared16(u + 16);
        const uint32_t us[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
        for (uint32_t j = 0; j < 8; ++j) {
          sum = fmaf(to_float(v.v[j]), __uint_as_float(us[j]), sum);
        }
      }
      return sum;
    }
#pragma unroll 1
    for (uint32_t r = 0; r < b.rank; ++r, u += 4) {
      const float v = load_as_float(b.b, call_.adapter_dtype, size_t{row} * b.rank + r);
      sum = fmaf(v, load_shared_float(u), sum);
    }
    return sum;
  }

  const Call& call_;
  const float* codes_;  ///< of each branch's nested absmax: offset, code[256]
  uint32_t table_, warp_, lane_, ring_, x_, sums_, inbox_, u_inbox_, u_;
  uint32_t block_, clusters_, cluster_, first_, slice_, rank_jobs_;
  uint32_t nested_last_ = 0;
  // the ring's ends
  uint32_t in_ = 0, out_ = 0;
  // what issue() copies
  const char* source_ = nullptr;
  const Branch* source_branch_ = nullptr;
  uint32_t stride_ = 0, chunk_bytes_ = 0;
  uint32_t job_ = 0, at_ = 0, end_ = 0, row0_ = 0, rows_ = 0;
  bool of_rank_ = false;
};

}  // namespace metal_lora::cuda::gemv
