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

#include <algorithm>
#ifdef METAL_LORA_GEMV_TRIAL
#include <cstdlib>
#endif

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_gemv_formats.cuh"

namespace metal_lora::cuda::gemv {

inline constexpr uint32_t kWarps = 8, kThreads = 32 * kWarps;
inline constexpr uint32_t kStages = 3;

/// Where things lie in dynamic shared memory; kTokens = 8 or 16.
struct Layout {
  uint32_t x, sums, inbox, u_inbox, u, bytes;
};
template <class Format, uint32_t kTokens>
__host__ __device__ inline Layout make_layout(const Call& call) {
  Layout l;
  const uint32_t ranks = call.rank_tiles * kTileRows;
  l.x = kWarps * kStages * (kStageBytes + Format::kExtraBytes);
  l.sums = l.x + call.slice_chunks * kTokens * kChunk * 2;
  l.inbox = l.sums + (Format::kBiases ? call.slice_chunks * kTokens * 4 : 0);
  l.u_inbox = l.inbox + 2 * kWarps * kTileRows * kTokens * 4;
  l.u = l.u_inbox + call.rank_splits * ranks * kTokens * 4;
  l.bytes = l.u + ranks * kTokens * 4;
  return l;
}

// ---- the cluster ----

__device__ __forceinline__ uint32_t cluster_blocks() {
  uint32_t v = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctaid.x;\n" : "=r"(v));
#endif
  return v;
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t v = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(v));
#endif
  return v;
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#else
  __syncthreads();  // clusters of one block
#endif
}
/// The address of the same place in another block.
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t block) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(block));
  return there;
#else
  return address;
#endif
}
__device__ __forceinline__ void push(uint32_t address, float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
#else
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
#endif
}
__device__ __forceinline__ void prefetch_l2(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(p), "r"(bytes) : "memory");
#endif
}

/// Branches are few: the one that a tile (of rows or of ranks) belongs to.
__device__ __forceinline__ uint32_t branch_of_tile(const Call& call, uint32_t tile) {
  uint32_t i = 0;
  while (i + 1 < call.branches && tile >= call.branch[i + 1].tile0) ++i;
  return i;
}
__device__ __forceinline__ uint32_t branch_of_rank_tile(const Call& call, uint32_t tile) {
  uint32_t i = 0;
  while (i + 1 < call.branches && tile >= call.branch[i + 1].rank_tile0) ++i;
  return i;
}

__device__ __forceinline__ float scale_at(uint32_t row_address, uint32_t group, DType dtype) {
  if (dtype == DType::f32) return load_shared_float(row_address + 4 * group);
  const uint32_t word = load_shared4(row_address + 4 * (group / 2)) >> (16 * (group % 2));
  if (dtype == DType::bf16) return __uint_as_float(word << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
}

template <class Format, uint32_t kTokens>
class Stream {
  using T = typename Format::Storage;
  static constexpr uint32_t kParts = kTokens / 8;
  static constexpr uint32_t kStageStride = kStageBytes + Format::kExtraBytes;
  static constexpr uint32_t kStageChunks = 256 / Format::kChunkBytes;
  static constexpr uint32_t kRankStageChunks = 256 / 64;

 public:
  __device__ Stream(const Call& call, uint32_t shared, const float* codes, uint32_t table)
      : call_(call), codes_(codes) {
    const Layout l = make_layout<Format, kTokens>(call);
    warp_ = threadIdx.x / 32;
    lane_ = threadIdx.x % 32;
    table_ = table + 4 * lane_;
    ring_ = shared + warp_ * kStages * kStageStride;
    x_ = shared + l.x;
    sums_ = shared + l.sums;
    inbox_ = shared + l.inbox;
    u_inbox_ = shared + l.u_inbox;
    u_ = shared + l.u;
    blocks_ = cluster_blocks();
    block_ = cluster_rank();
    clusters_ = gridDim.x / blocks_;
    cluster_ = blockIdx.x / blocks_;
    const uint32_t units = (call.chunks + call.unit - 1) / call.unit;
    first_ = min(call.chunks, units * block_ / blocks_ * call.unit);
    slice_ = min(call.chunks, units * (block_ + 1) / blocks_ * call.unit) - first_;
    items_ = call.shrink_by_fma ? 0 : call.rank_tiles * call.rank_splits;
  }

  /// What does not depend on the kernel before: into L2 only, so that it is harmless if it does.
  __device__ void prefetch() const {
    const uint32_t tile = cluster_ * kWarps + warp_, row = lane_ % 16;
    if (tile < call_.tiles && lane_ < 16 && slice_ > 0) {
      const Branch& b = call_.branch[branch_of_tile(call_, tile)];
      const size_t at = (tile - b.tile0) * kTileRows + row;
      if (at < b.n) {
        prefetch_l2(
            b.w + at * call_.chunks * Format::kChunkBytes + first_ * Format::kChunkBytes,
            slice_ * Format::kChunkBytes);
      }
    }
  }

  __device__ void run() {
    cluster_arrive();  // the others' shared memory may be written once they run
    begin_items();
    for (uint32_t i = 0; i + 1 < kStages; ++i) issue();
    stage_x();
    __syncthreads();
    cluster_wait();
    if (call_.rank_tiles > 0) {
      shrink();
      cluster_arrive();
    }
    uint32_t buffer = 0, before = 0;
    bool first = true;
    for (uint32_t pass = cluster_; pass < call_.passes; pass += clusters_) {
      float sums[kParts][4] = {};
      const uint32_t tile = pass * kWarps + warp_;
      if (tile < call_.tiles) consume_tile(tile, sums);
      if (first) {
        if (call_.rank_tiles > 0) {
          cluster_wait();
          gather_u();
        }
      } else {
        cluster_wait();
        finish(before, buffer ^ 1);
      }
      push_tile(sums, buffer);
      cluster_arrive();
      first = false;
      before = pass;
      buffer ^= 1;
    }
    cluster_wait();
    finish(before, buffer ^ 1);
  }

 private:
  // ---- the ring: first this warp's parts of A, then its tiles of W ----

  __device__ void item_chunks(uint32_t item, uint32_t* begin, uint32_t* end) const {
    const uint32_t part = item % call_.rank_splits;
    *begin = slice_ * part / call_.rank_splits;
    *end = slice_ * (part + 1) / call_.rank_splits;
  }

  __device__ void begin_items() {
    item_ = warp_;
    next_pass_ = cluster_;
    at_ = end_ = 0;
    open_next();
  }

  /// Makes the next non-empty job the one that issue() copies; done: at_ = end_.
  __device__ void open_next() {
    while (at_ == end_) {
      if (item_ < items_) {
        const uint32_t tile = item_ / call_.rank_splits;
        const Branch& b = call_.branch[branch_of_rank_tile(call_, tile)];
        item_chunks(item_, &at_, &end_);
        row0_ = (tile - b.rank_tile0) * kTileRows;
        rows_ = b.rank - row0_;
        open_rows(b.a, 64);
        item_ += kWarps;
        of_rank_ = true;
      } else if (next_pass_ < call_.passes) {
        const uint32_t tile = next_pass_ * kWarps + warp_;
        next_pass_ += clusters_;
        if (tile >= call_.tiles) continue;
        source_branch_ = branch_of_tile(call_, tile);
        const Branch& b = call_.branch[source_branch_];
        at_ = 0;
        end_ = slice_;
        row0_ = (tile - b.tile0) * kTileRows;
        rows_ = b.n - row0_;
        open_rows(b.w, Format::kChunkBytes);
        of_rank_ = false;
      } else {
        return;
      }
    }
  }
  __device__ void open_rows(const char* base, uint32_t chunk_bytes) {
    stride_ = call_.chunks * chunk_bytes;
    source_ = base + size_t{row0_} * stride_ + first_ * chunk_bytes + lane_ % 16 * 16;
  }

  /// Copies the next stage, if there is one; one group of copies in any case.
  __device__ void issue() {
    if (at_ < end_) {
      const uint32_t stage = ring_ + in_ * kStageStride;
      if (of_rank_) {
        const uint32_t count = min(kRankStageChunks, end_ - at_);
        copy_rows(stage, 64, count, [](uint32_t row) { return Dense<T>::swizzle(row); });
        at_ += count;
      } else {
        const uint32_t count = min(kStageChunks, end_ - at_);
        copy_rows(stage, Format::kChunkBytes, count, [](uint32_t row) {
          return Format::swizzle(row);
        });
        if constexpr (Format::kBiases) copy_scales(stage + kStageBytes, count);
        if constexpr (Format::kNf4) copy_absmax(stage + kStageBytes, count);
        at_ += count;
      }
      if (at_ == end_) open_next();
    }
    mma::copies_commit();
    in_ = in_ + 1 == kStages ? 0 : in_ + 1;
  }

  template <typename Swizzle>
  __device__ void copy_rows(uint32_t stage, uint32_t chunk_bytes, uint32_t count, Swizzle swizzle) {
    const uint32_t slot = lane_ % 16;
    if (16 * slot < count * chunk_bytes) {
      const char* from = source_ + size_t{at_} * chunk_bytes;
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t row = 2 * i + lane_ / 16;
        const uint32_t to = stage + row * 256 + ((slot ^ swizzle(row)) << 4);
        const bool inside = row < rows_;
        mma::copy_async<16>(to, from + size_t{inside ? row : 0} * stride_, inside ? 16 : 0);
      }
    }
  }

  __device__ void copy_scales(uint32_t to, uint32_t count) const {
    const Branch& b = call_.branch[source_branch_];
    const uint32_t size = call_.scales_dtype == DType::f32 ? 4 : 2;
    const uint32_t row = lane_ / 2, groups = call_.chunks / Format::kGroupChunks;
    const size_t at = size_t{row0_ + min(row, rows_ - 1)} * groups +
                      (first_ + at_) / Format::kGroupChunks;
    const uint32_t words = count / Format::kGroupChunks * size / 4;
    to += row * kScalePitch * 4;
    for (uint32_t i = lane_ % 2; i < words; i += 2) {
      mma::copy_async<4>(to + 4 * i, b.scales + at * size + 4 * i, 4);
      mma::copy_async<4>(to + 16 * kScalePitch * 4 + 4 * i, b.biases + at * size + 4 * i, 4);
    }
  }

  __device__ void copy_absmax(uint32_t to, uint32_t count) const {
    const Branch& b = call_.branch[source_branch_];
    const uint32_t row = lane_ / 2;
    const size_t at = size_t{row0_ + min(row, rows_ - 1)} * (call_.chunks / 2) + (first_ + at_) / 2;
    const uint32_t blocks = count / 2, size = Format::kDouble ? 1 : 4;
    for (uint32_t i = lane_ % 2; i < blocks * size / 4; i += 2) {
      mma::copy_async<4>(to + (row * kAbsmaxPitch + i) * 4, b.scales + at * size + 4 * i, 4);
    }
    if constexpr (Format::kDouble) {
      // The second-level absmax of the first block, and of the last: at most one further.
      const size_t last = at + blocks - 1;
      const size_t index = (lane_ % 2 ? last : at) / kNf4NestedBlock;
      mma::copy_async<4>(
          to + 16 * kAbsmaxPitch * 4 + lane_ * 4, b.biases + (kNf4NestedHead + index) * 4, 4);
    }
  }

  /// The next stage has landed and the ring's free place is on its way again: its address.
  __device__ uint32_t next_stage() {
    mma::copies_wait<kStages - 2>();
    __syncwarp();
    issue();
    const uint32_t stage = ring_ + out_ * kStageStride;
    out_ = out_ + 1 == kStages ? 0 : out_ + 1;
    return stage;
  }

  // ---- x ----

  /// The slice of x in the order in which the tensor cores take it: 16 bytes of a lane are token
  /// g's columns 8t … of a chunk. Sums of each chunk's values for the affine formats' biases.
  __device__ void stage_x() const {
    const uint32_t count = slice_ * kParts * 32;
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t lane = i % 32, part = i / 32 % kParts, chunk = i / 32 / kParts;
      const uint32_t token = part * 8 + lane / 4;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (token < call_.m) {
        const auto* from = static_cast<const T*>(call_.x) + size_t{token} * call_.k +
                           size_t{first_ + chunk} * kChunk + lane % 4 * 8;
        v = *reinterpret_cast<const uint4*>(from);
      }
      if constexpr (Format::kBiases) {
        const T* values = reinterpret_cast<const T*>(&v);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += to_float(values[j]);
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) {
          *static_cast<float*>(pointer(sums_ + (chunk * kTokens + token) * 4)) = sum;
        }
      }
      if constexpr (Format::kInterleaved) v = interleave(v);
      *static_cast<uint4*>(pointer(x_ + i * 16)) = v;
    }
  }
  static __device__ void* pointer(uint32_t address) { return __cvta_shared_to_generic(address); }
  __device__ uint4 x_at(uint32_t chunk, uint32_t part) const {
    return load_shared16(x_ + ((chunk * kParts + part) * 32 + lane_) * 16);
  }

  // ---- products ----

  /// sums += the chunk's 16 rows times the tokens; lo and hi: 8 weights of rows g and g + 8.
  __device__ void multiply(float (&sums)[kParts][4], uint4 lo, uint4 hi, uint32_t chunk) const {
    const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
      const uint4 x = x_at(chunk, p);
      mma::multiply<T>(sums[p], first, x.x, x.y);
      mma::multiply<T>(sums[p], second, x.z, x.w);
    }
  }

  __device__ void consume_tile(uint32_t tile, float (&sums)[kParts][4]) {
    const uint32_t branch = branch_of_tile(call_, tile);
    for (uint32_t at = 0; at < slice_; at += kStageChunks) {
      const uint32_t stage = next_stage(), count = min(kStageChunks, slice_ - at);
      if constexpr (Format::kGroupChunks == 0) {
        if (count == kStageChunks) {
#pragma unroll
          for (uint32_t c = 0; c < kStageChunks; ++c) dense_chunk(stage, c, at + c, sums);
        } else {
          for (uint32_t c = 0; c < count; ++c) dense_chunk(stage, c, at + c, sums);
        }
      } else {
        const uint32_t row0 = (tile - call_.branch[branch].tile0) * kTileRows;
#pragma unroll 2
        for (uint32_t c = 0; c < count; c += Format::kGroupChunks) {
          group(stage, c, at, branch, row0, sums);
        }
      }
    }
  }

  __device__ void
  dense_chunk(uint32_t stage, uint32_t c, uint32_t x_chunk, float (&sums)[kParts][4]) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    multiply(
        sums,
        Format::weights(stage, g, c, t, 0),
        Format::weights(stage, g + 8, c, t, 0),
        x_chunk);
  }

  /// A group of columns: its products unscaled, then scaled in f32 into sums.
  __device__ void group(
      uint32_t stage,
      uint32_t c,
      uint32_t at,
      uint32_t branch,
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
      const uint32_t row = extra + g * kScalePitch * 4;
      constexpr uint32_t kHalf = 8 * kScalePitch * 4;
      const float2 lo = Format::scale_and_bias(
          scale_at(row, index, call_.scales_dtype),
          scale_at(row + 2 * kHalf, index, call_.scales_dtype));
      const float2 hi = Format::scale_and_bias(
          scale_at(row + kHalf, index, call_.scales_dtype),
          scale_at(row + 3 * kHalf, index, call_.scales_dtype));
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
      const float lo = absmax(extra, g, index, at, branch, row0);
      const float hi = absmax(extra, g + 8, index, at, branch, row0);
#pragma unroll
      for (uint32_t p = 0; p < kParts; ++p) {
        sums[p][0] = fmaf(lo, products[p][0], sums[p][0]);
        sums[p][1] = fmaf(lo, products[p][1], sums[p][1]);
        sums[p][2] = fmaf(hi, products[p][2], sums[p][2]);
        sums[p][3] = fmaf(hi, products[p][3], sums[p][3]);
      }
    }
  }

  __device__ float absmax(
      uint32_t extra,
      uint32_t row,
      uint32_t index,
      uint32_t at,
      uint32_t branch,
      uint32_t row0) const {
    const uint32_t address = extra + row * kAbsmaxPitch * 4;
    if constexpr (!Format::kDouble) {
      return load_shared_float(address + 4 * index);
    } else {
      const uint32_t code = load_shared4(address + index / 4 * 4) >> (index % 4 * 8) & 0xff;
      // Rows past the end were copied as the last one: what is made of them is not stored.
      const uint32_t last = call_.branch[branch].n - 1;
      const uint32_t first =
          min(row0 + row, last) * (call_.chunks / 2) + (first_ + at) / 2;
      const uint32_t further =
          (first + index) / kNf4NestedBlock != first / kNf4NestedBlock ? 1 : 0;
      const float second =
          load_shared_float(extra + 16 * kAbsmaxPitch * 4 + (2 * row + further) * 4);
      const float* codes = codes_ + branch * kNf4NestedHead;
      return __fadd_rn(__fmul_rn(codes[1 + code], second), codes[0]);
    }
  }

  // ---- u ----

  __device__ void shrink() {
    if (call_.shrink_by_fma) {
      const uint32_t items = call_.rank_tiles * call_.rank_splits;
      for (uint32_t item = warp_; item < items; item += kWarps) shrink_item_by_fma(item);
      return;
    }
    for (uint32_t item = warp_; item < items_; item += kWarps) {
      float sums[kParts][4] = {};
      uint32_t begin, end;
      item_chunks(item, &begin, &end);
      for (uint32_t at = begin; at < end; at += kRankStageChunks) {
        const uint32_t stage = next_stage(), count = min(kRankStageChunks, end - at);
        for (uint32_t c = 0; c < count; ++c) {
          const uint32_t g = lane_ / 4, t = lane_ % 4;
          uint4 lo = Dense<T>::weights(stage, g, c, t, 0);
          uint4 hi = Dense<T>::weights(stage, g + 8, c, t, 0);
          if constexpr (Format::kInterleaved) lo = interleave(lo), hi = interleave(hi);
          multiply(sums, lo, hi, at + c);
        }
      }
      const uint32_t g = lane_ / 4, t = lane_ % 4;
#pragma unroll
      for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          push_u(item, g + j / 2 * 8, 8 * p + 2 * t + j % 2, sums[p][j]);
        }
      }
    }
  }

  /// Any storage type of A, and dropout: a lane a column of the chunk.
  __device__ void shrink_item_by_fma(uint32_t item) {
    const uint32_t tile = item / call_.rank_splits;
    const Branch& b = call_.branch[branch_of_rank_tile(call_, tile)];
    const uint32_t row0 = (tile - b.rank_tile0) * kTileRows;
    const uint32_t t = lane_ / 8, e = lane_ % 8;
    const uint32_t place = Format::kInterleaved ? (e % 4 * 2 + e / 4) : e;
    uint32_t begin, end;
    item_chunks(item, &begin, &end);
    for (uint32_t row = 0; row < kTileRows; ++row) {
      float sums[kTokens] = {};
      if (row0 + row < b.rank) {
        for (uint32_t c = begin; c < end; ++c) {
          const uint32_t column = (first_ + c) * kChunk + lane_;
          const float a = load_as_float(
              b.a, call_.adapter_dtype, size_t{row0 + row} * call_.k + column);
#pragma unroll
          for (uint32_t token = 0; token < kTokens; ++token) {
            if (token >= call_.m) break;
            const uint32_t slot = (c * kParts + token / 8) * 32 + token % 8 * 4 + t;
            const T* x = static_cast<const T*>(pointer(x_ + slot * 16)) + place;
            float v = to_float(*x);
            if (b.mask.threshold > 0 && !drop_keeps(b.mask, drop_key(b.mask, token), column)) {
              v = 0.0f;
            }
            sums[token] = fmaf(a, v, sums[token]);
          }
        }
      }
      float mine = 0.0f;
#pragma unroll
      for (uint32_t token = 0; token < kTokens; ++token) {
        const float sum = warp_sum(sums[token]);
        if (token == lane_) mine = sum;
      }
      push_u(item, row, lane_, mine);
    }
  }

  /// A partial sum of u to the block that adds them up.
  __device__ void push_u(uint32_t item, uint32_t row, uint32_t token, float v) const {
    if (token >= call_.m) return;
    const uint32_t tile = item / call_.rank_splits, part = item % call_.rank_splits;
    const uint32_t rank = tile * kTileRows + row, own = call_.rank_tiles * kTileRows / blocks_;
    const uint32_t slot = (block_ * call_.rank_splits + part) * own + rank / blocks_;
    push(address_in(u_inbox_ + (slot * kTokens + token) * 4, rank % blocks_), v);
  }

  /// This block's ranks of u, summed in the order of the columns, to all blocks.
  __device__ void gather_u() const {
    const uint32_t own = call_.rank_tiles * kTileRows / blocks_;
    for (uint32_t i = threadIdx.x; i < own * call_.m; i += kThreads) {
      const uint32_t token = i % call_.m, mine = i / call_.m, rank = mine * blocks_ + block_;
      float sum = 0.0f;
      for (uint32_t from = 0; from < blocks_ * call_.rank_splits; ++from) {
        sum += load_shared_float(u_inbox_ + ((from * own + mine) * kTokens + token) * 4);
      }
      const Branch& b = call_.branch[branch_of_rank_tile(call_, rank / kTileRows)];
      sum *= b.mask.keep_scale;
      const uint32_t row = rank - b.rank_tile0 * kTileRows;
      if (cluster_ == 0 && b.u != nullptr && row < b.rank) b.u[size_t{token} * b.rank + row] = sum;
      for (uint32_t to = 0; to < blocks_; ++to) {
        push(address_in(u_ + (rank * kTokens + token) * 4, to), sum);
      }
    }
  }

  // ---- y ----

  /// inbox [buffer][tile / blocks][from block][token][row]
  __device__ uint32_t inbox_at(uint32_t buffer, uint32_t slot, uint32_t from) const {
    return inbox_ +
           (buffer * kWarps + slot * blocks_ + from) * (kTileRows * kTokens * 4);
  }

  __device__ void push_tile(const float (&sums)[kParts][4], uint32_t buffer) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    const uint32_t to =
        address_in(inbox_at(buffer, warp_ / blocks_, block_), warp_ % blocks_);
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t token = 8 * p + 2 * t + j % 2, row = g + j / 2 * 8;
        if (token < call_.m) push(to + (token * kTileRows + row) * 4, sums[p][j]);
      }
    }
  }

  __device__ void finish(uint32_t pass, uint32_t buffer) const {
    const uint32_t count = kWarps / blocks_ * call_.m * kTileRows;
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t row = i % kTileRows, token = i / kTileRows % call_.m;
      const uint32_t slot = i / kTileRows / call_.m, tile = pass * kWarps + slot * blocks_ + block_;
      if (tile >= call_.tiles) continue;
      const Branch& b = call_.branch[branch_of_tile(call_, tile)];
      const uint32_t out = (tile - b.tile0) * kTileRows + row;
      if (out >= b.n) continue;
      float sum = 0.0f;
      for (uint32_t from = 0; from < blocks_; ++from) {
        sum += load_shared_float(inbox_at(buffer, slot, from) + (token * kTileRows + row) * 4);
      }
      if (b.rank > 0) sum = fmaf(b.scale, expand(b, out, token), sum);
      if (b.bias != nullptr) sum += b.bias[out];
      const size_t at = size_t{token} * b.n + out;
      if (b.residual != nullptr) sum += load_as_float(b.residual, call_.y_dtype, at);
      store_from_float(b.y, call_.y_dtype, at, sum);
    }
  }

  /// u[token]·B[row]
  __device__ float expand(const Branch& b, uint32_t row, uint32_t token) const {
    const uint32_t u = u_ + (b.rank_tile0 * kTileRows * kTokens + token) * 4;
    float sum = 0.0f;
    if (call_.adapter_dtype == DType::f32) {
      const float* from = reinterpret_cast<const float*>(b.b) + size_t{row} * b.rank;
#pragma unroll 4
      for (uint32_t r = 0; r < b.rank; ++r) {
        sum = fmaf(from[r], load_shared_float(u + r * kTokens * 4), sum);
      }
      return sum;
    }
    const auto* from = reinterpret_cast<const uint16_t*>(b.b) + size_t{row} * b.rank;
    const bool is_bf16 = call_.adapter_dtype == DType::bf16;
    const auto value = [&](uint32_t bits) {
      return is_bf16 ? __uint_as_float(bits << 16)
                     : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    };
    if (b.rank % 8 == 0 && reinterpret_cast<uintptr_t>(b.b) % 16 == 0) {
#pragma unroll 2
      for (uint32_t r = 0; r < b.rank; r += 8) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + r);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (uint32_t j = 0; j < 8; ++j) {
          const float w = value(words[j / 2] >> (16 * (j % 2)) & 0xffffu);
          sum = fmaf(w, load_shared_float(u + (r + j) * kTokens * 4), sum);
        }
      }
      return sum;
    }
    for (uint32_t r = 0; r < b.rank; ++r) {
      sum = fmaf(value(from[r]), load_shared_float(u + r * kTokens * 4), sum);
    }
    return sum;
  }

  const Call& call_;
  const float* codes_;  ///< of each branch's nested absmax: offset, code[256]
  uint32_t table_, warp_, lane_, ring_, x_, sums_, inbox_, u_inbox_, u_;
  uint32_t blocks_, block_, clusters_, cluster_, first_, slice_, items_;
  // the ring's ends
  uint32_t in_ = 0, out_ = 0;
  // what issue() copies
  const char* source_ = nullptr;
  size_t stride_ = 0;
  uint32_t item_ = 0, next_pass_ = 0, at_ = 0, end_ = 0, row0_ = 0, rows_ = 0, source_branch_ = 0;
  bool of_rank_ = false;
};

template <class Format, uint32_t kTokens>
__global__ void __launch_bounds__(kThreads, 2) stream_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(16) char shared[];
  uint32_t table = 0;
  const float* codes = nullptr;
  allow_dependents();
  if constexpr (Format::kNf4) {
    __shared__ uint32_t pairs[256 * 32];
    using T = typename Format::Storage;
    // Thread i makes entry i (low code first) and writes all 32 copies, starting at its own bank.
    const T lo = from_float<T>(nf4_level(threadIdx.x % 16));
    const T hi = from_float<T>(nf4_level(threadIdx.x / 16));
    const uint32_t both = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&lo)) |
                          static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&hi)) << 16;
#pragma unroll 8
    for (uint32_t i = 0; i < 32; ++i) pairs[threadIdx.x * 32 + (i + threadIdx.x) % 32] = both;
    table = mma::shared_address(pairs);
  }
  if constexpr (Format::kDouble) {
    __shared__ float nested[kMaxBranches * kNf4NestedHead];
    codes = nested;
  }
  Stream<Format, kTokens> stream(call, mma::shared_address(shared), codes, table);
  stream.prefetch();
  wait_for_previous();
  if constexpr (Format::kDouble) {
    for (uint32_t i = threadIdx.x; i < call.branches * kNf4NestedHead; i += kThreads) {
      const uint32_t branch = i / kNf4NestedHead;
      const_cast<float*>(codes)[i] = reinterpret_cast<const float*>(
          call.branch[branch].biases)[i - branch * kNf4NestedHead];
    }
  }
  stream.run();
}

/// The shared memory of a multiprocessor; one block may have 1 KiB less.
inline uint32_t shared_of_multiprocessor(const Context& context) {
  if (context.capability >= 90 && context.capability < 120) return 228 * 1024;
  return (context.capability == 80 || context.capability == 87 ? 164 : 100) * 1024;
}

/// Launches the kernel unless it needs more shared memory than there is.
template <class Format, uint32_t kTokens>
bool launch_stream(const Context& context, Call call) {
  const uint32_t units = (call.chunks + call.unit - 1) / call.unit;
  uint32_t blocks = 1;
  if (context.capability >= 90) {
    uint32_t most = 8;
#ifdef METAL_LORA_GEMV_TRIAL
    if (getenv("GEMV_BLOCKS")) most = atoi(getenv("GEMV_BLOCKS"));
#endif
    while (blocks < most && blocks * 2 <= units) blocks *= 2;
  }
  call.slice_chunks = (units + blocks - 1) / blocks * call.unit;
  constexpr uint32_t kStatic = (Format::kNf4 ? kTableBytes : 0) +
                               (Format::kDouble ? kMaxBranches * kNf4NestedHead * 4 : 0) + 1024;
#ifdef METAL_LORA_GEMV_TRIAL
  const uint32_t kBlocksPerMultiprocessor = getenv("GEMV_RESIDENT") ? atoi(getenv("GEMV_RESIDENT")) : 2;
#else
  constexpr uint32_t kBlocksPerMultiprocessor = 2;
#endif
  const uint32_t bytes = make_layout<Format, kTokens>(call).bytes;
  const uint32_t available = shared_of_multiprocessor(context);
  if (bytes + kStatic > available) return false;
  const uint32_t resident = std::min(kBlocksPerMultiprocessor, available / (bytes + kStatic));
  const uint32_t clusters = std::clamp<uint32_t>(
      static_cast<uint32_t>(context.multiprocessors) * resident / blocks, 1, call.passes);
  const auto kernel = stream_kernel<Format, kTokens>;
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "lora_gemv's shared memory");
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "lora_gemv's shared memory");
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = context.stream;
  config.attrs = attributes;
  if (context.capability >= 90) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {blocks, 1, 1};
    config.numAttrs = 2;
#ifdef METAL_LORA_GEMV_TRIAL
    if (getenv("GEMV_NOPDL")) attributes[0].val.programmaticStreamSerializationAllowed = 0;
#endif
  }
  check(cudaLaunchKernelEx(&config, kernel, call), "lora_gemv");
  return true;
}

template <class Format>
bool launch_tokens(const Context& context, const Call& call) {
  return call.m <= 8 ? launch_stream<Format, 8>(context, call)
                     : launch_stream<Format, 16>(context, call);
}

}  // namespace metal_lora::cuda::gemv
