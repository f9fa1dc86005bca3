// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the forms of lora_gemv's dispatch share. A block takes a tile of 16 rows, its warps a part
// of the columns each, and the warps' sums meet in shared memory, at the only barrier of a tile.
// u = x·Aᵀ: parts of the columns of A's tiles come first, one to a block; their sums go through L2,
// each with a word beside it that says that it is there. A block looks for them when it has its own
// first sums, and only for blocks that stand before it in the grid, so that it does not matter
// whether all are resident. The last block to leave clears the words.
#pragma once

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_gemv_formats.cuh"

namespace metal_lora::cuda::gemv {

inline constexpr uint32_t kWarps = 8, kThreads = 32 * kWarps;

__device__ __forceinline__ void prefetch_l2(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(p), "r"(bytes) : "memory");
#endif
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

/// The end of a tile, of u and of y, of up to 8 kParts tokens; T: x's type.
template <typename T, uint32_t kParts>
class TileEnd {
 public:
  /// Bytes of shared memory: the inbox, then u.
  static __host__ __device__ uint32_t bytes(const Call& call) {
    return (2 * kWarps + call.rank_tiles) * kTileRows * call.m * 4;
  }

 protected:
  __device__ TileEnd(const Call& call, uint32_t shared)
      : call_(call),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        inbox_(shared),
        u_(shared + 2 * kWarps * kTileRows * call.m * 4),
        has_u_(call.rank_tiles == 0) {}

  /// Into L2: B's rows of the block's first tile, or its part of A.
  __device__ void prefetch() const {
    const uint32_t tile = blockIdx.x;
    if (tile < call_.u_tiles) {
      const Branch& b = branch_of_rank_tile(call_, tile / call_.u_parts);
      const uint32_t row = (tile / call_.u_parts - b.rank_tile0) * kTileRows + threadIdx.x;
      if (threadIdx.x >= kTileRows || row >= b.rank) return;
      const uint32_t first = rank_chunk(tile, 0), count = rank_chunk(tile, kWarps) - first;
      if (count > 0) prefetch_l2(b.a + (size_t{row} * call_.chunks + first) * 64, count * 64);
      return;
    }
    if (threadIdx.x != 31 || !call_.wide_b) return;
    const Branch& b = branch_of_tile(call_, tile - call_.u_tiles);
    const uint32_t row0 = (tile - call_.u_tiles - b.tile0) * kTileRows;
    const uint32_t bytes = min(kTileRows, b.n - row0) * b.rank * 2;
    if (bytes > 0) prefetch_l2(b.b + size_t{row0} * b.rank * 2, bytes);
  }

  /// Where a warp begins in a part of a tile of A.
  __device__ uint32_t rank_chunk(uint32_t item, uint32_t warp) const {
    return call_.chunks * (item % call_.u_parts * kWarps + warp) / (call_.u_parts * kWarps);
  }

  /// sums += 16 rows times the tokens; lo and hi: 8 weights of rows g and g + 8.
  static __device__ void multiply(
      float (&sums)[kParts][4], uint4 lo, uint4 hi, const uint4 (&x)[kParts]) {
    const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
      mma::multiply<T>(sums[p], first, x[p].x, x[p].y);
      mma::multiply<T>(sums[p], second, x[p].z, x[p].w);
    }
  }

  /// The sums of a tile of W, that all warps have worked out, into y.
  template <class E>
  __device__ void end_tile(
      uint32_t tile, uint32_t buffer, const float (&sums)[kParts][4], const E& early) {
    put(sums, buffer);
    if (!has_u_) take_u(tile == call_.u_tiles);
    __syncthreads();
    has_u_ = true;
    finish(tile, buffer, early);
  }
  /// The same of a part of a tile of A.
  __device__ void end_part(uint32_t item, uint32_t buffer, const float (&sums)[kParts][4]) {
    put(sums, buffer);
    __syncthreads();
    finish_u(item, buffer);
  }
  /// After the last tile: one warp, since the block has had a barrier after it read u.
  __device__ void leave() const {
    if (call_.u_tiles == 0 || warp_ + 1 != kWarps) return;
    uint32_t before = 0;
    if (lane_ == 0) before = atomicAdd(call_.left, 1);
    if (__shfl_sync(0xffffffffu, before, 0) + 1 != gridDim.x) return;
    const uint32_t count = call_.u_parts * call_.m * ranks();
    for (uint32_t i = lane_; i < count; i += 32) call_.u[i] = 0;
    if (lane_ == 0) *call_.left = 0;
  }

  /// The same by all threads: a barrier more, but none of the registers that forms for quantised
  /// weights are short of (INT4, 8 tokens: 14.5 us in a build with it, 15.5 with leave()).
  __device__ void leave_together() const {
    if (call_.u_tiles == 0) return;
    const bool last = threadIdx.x == 0 && atomicAdd(call_.left, 1) + 1 == gridDim.x;
    if (!__syncthreads_or(last)) return;
    const uint32_t count = call_.u_parts * call_.m * ranks();
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) call_.u[i] = 0;
    if (threadIdx.x == 0) *call_.left = 0;
  }

  /// inbox [buffer][warp][token][row]
  __device__ uint32_t inbox_at(uint32_t buffer, uint32_t warp) const {
    return inbox_ + (buffer * kWarps + warp) * (kTileRows * call_.m * 4);
  }
  __device__ void put(const float (&sums)[kParts][4], uint32_t buffer) const {
    const uint32_t g = lane_ / 4, t = lane_ % 4;
    const uint32_t to = inbox_at(buffer, warp_) + (2 * t * kTileRows + g) * 4;
#pragma unroll
    for (uint32_t p = 0; p < kParts; ++p) {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t further = (8 * p + j % 2) * kTileRows + j / 2 * 8;
        if (8 * p + 2 * t + j % 2 < call_.m) store_shared(to + further * 4, sums[p][j]);
      }
    }
  }
  /// A value of the tile, in the order of the columns.
  __device__ float gather(uint32_t buffer, uint32_t token, uint32_t row) const {
    float sum = 0.0f;
#pragma unroll
    for (uint32_t warp = 0; warp < kWarps; ++warp) {
      sum += load_shared_float(inbox_at(buffer, warp) + (token * kTileRows + row) * 4);
    }
    return sum;
  }
  static __device__ void store_shared(uint32_t address, float v) {
    asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
  }

  // ---- u ----

  __device__ uint32_t ranks() const { return call_.rank_tiles * kTileRows; }

  /// A part's sums of a tile of u, to all blocks: [part][token][rank]. Only what somebody awaits: a
  /// word that nobody does could land after the last block has cleared them.
  __device__ void finish_u(uint32_t item, uint32_t buffer) const {
    const uint32_t tile = item / call_.u_parts, part = item % call_.u_parts;
    const uint32_t row = threadIdx.x % kTileRows, token = threadIdx.x / kTileRows;
    const Branch& b = branch_of_rank_tile(call_, tile);
    if (token >= call_.m || (tile - b.rank_tile0) * kTileRows + row >= b.rank) return;
    uint64_t* to = call_.u + (part * call_.m + token) * ranks() + tile * kTileRows + row;
    const uint64_t word = uint64_t{1} << 32 | __float_as_uint(gather(buffer, token, row));
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
  }
  static __device__ uint64_t load_word(const uint64_t* from) {
    uint64_t word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
  }
  /// A value's parts, once all are there, added in their order; all are asked for at once.
  __device__ float await_parts(const uint64_t* from, uint32_t stride) const {
    uint64_t words[kMaxParts];
#pragma unroll
    for (uint32_t i = 0; i < kMaxParts; ++i) {
      if (i < call_.u_parts) words[i] = load_word(from + i * stride);
    }
    float sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < kMaxParts; ++i) {
      if (i >= call_.u_parts) break;
      while (words[i] == 0) words[i] = load_word(from + i * stride);
      sum += __uint_as_float(static_cast<uint32_t>(words[i]));
    }
    return sum;
  }
  /// u into shared memory, its parts added in their order; keep: and to who wants it.
  __device__ void take_u(bool keep) const {
    const uint32_t size = call_.m * ranks();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint32_t token = i / ranks(), at = i - token * ranks();
      const Branch& b = branch_of_rank_tile(call_, at / kTileRows);
      const uint32_t rank = at - b.rank_tile0 * kTileRows;
      float u = 0.0f;
      if (rank < b.rank) {
        if (call_.u_given) {
          u = __ldcg(b.u + token * b.rank + rank);
        } else {
          u = await_parts(call_.u + i, size);
          if (keep && b.u != nullptr) b.u[token * b.rank + rank] = u;
        }
      }
      store_shared(u_ + i * 4, u);
    }
  }

  // ---- y ----

  /// What a thread needs for its value of y besides sums and u: asked for before the barrier.
  struct Early {
    Vec16<T> b[2];  ///< of rank 0 … 15
    float add = 0.0f;
  };
  __device__ Early load_early(uint32_t tile) const {
    Early early;
    const Branch& b = branch_of_tile(call_, tile - call_.u_tiles);
    const uint32_t out =
        (tile - call_.u_tiles - b.tile0) * kTileRows + threadIdx.x % kTileRows;
    const uint32_t token = threadIdx.x / kTileRows;
    if (token >= call_.m || out >= b.n) return early;
    if (call_.wide_b) {
      const T* from = reinterpret_cast<const T*>(b.b) + size_t{out} * b.rank;
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        if (8 * i < b.rank) early.b[i] = load16(from + 8 * i);
      }
    }
    early.add = load_add(b, out, token);
    return early;
  }
  /// Bias and residual of a value of y, zero where there is none.
  __device__ float load_add(const Branch& b, uint32_t out, uint32_t token) const {
    if (token >= call_.m || out >= b.n) return 0.0f;
    float add = b.bias != nullptr ? b.bias[out] : 0.0f;
    if (b.residual != nullptr) {
      add += load_as_float(b.residual, call_.y_dtype, size_t{token} * b.n + out);
    }
    return add;
  }

  __device__ void finish(uint32_t tile, uint32_t buffer, const Early& early) const {
    const Branch& b = branch_of_tile(call_, tile - call_.u_tiles);
    const uint32_t row = threadIdx.x % kTileRows, token = threadIdx.x / kTileRows;
    const uint32_t out = (tile - call_.u_tiles - b.tile0) * kTileRows + row;
    if (token >= call_.m || out >= b.n) return;
    float sum = gather(buffer, token, row);
    if (b.rank > 0) sum = fmaf(b.scale, expand(b, out, token, early), sum);
    store_from_float(b.y, call_.y_dtype, size_t{token} * b.n + out, sum + early.add);
  }

  /// u[token]·B[row]
  __device__ float expand(const Branch& b, uint32_t row, uint32_t token, const Early& early) const {
    uint32_t u = u_ + (token * ranks() + b.rank_tile0 * kTileRows) * 4;
    float sum = 0.0f;
    if (!call_.wide_b) {
#pragma unroll 1
      for (uint32_t r = 0; r < b.rank; ++r, u += 4) {
        const float v = load_as_float(b.b, call_.adapter_dtype, size_t{row} * b.rank + r);
        sum = fmaf(v, load_shared_float(u), sum);
      }
      return sum;
    }
    add_eight(early.b[0], u, sum);
    if (b.rank > 8) add_eight(early.b[1], u + 32, sum);
    const T* from = reinterpret_cast<const T*>(b.b) + size_t{row} * b.rank;
#pragma unroll 2
    for (uint32_t r = 16; r < b.rank; r += 8) add_eight(load16(from + r), u + 4 * r, sum);
    return sum;
  }
  static __device__ void add_eight(const Vec16<T>& b, uint32_t u, float& sum) {
    const uint4 lo = load_shared16(u), hi = load_shared16(u + 16);
    const uint32_t us[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(to_float(b.v[j]), __uint_as_float(us[j]), sum);
  }

  const Call& call_;
  const uint32_t warp_, lane_;
  const uint32_t inbox_, u_;

 private:
  bool has_u_;  ///< u is in shared memory
};

}  // namespace metal_lora::cuda::gemv
