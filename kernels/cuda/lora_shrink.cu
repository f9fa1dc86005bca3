// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// out = x·right for a few dozen columns: bound by reading x, which is read once for all parts.
// A block takes 128, 64 or 32 rows of x and a share of k through a cp.async pipeline; each of its
// warps multiplies 32 rows by 64 columns over its own part of every stage, so that an element of x
// leaves shared memory once; warps that share rows are added up in shared memory, and the blocks
// of a cluster that share k through each other's: one launch, a fixed order, no scratch.
//   Hopper takes lora_shrink_sm90.cu where operands are aligned and k is a multiple of 64; this
//   form takes the rest and older devices.
//   ladder (H100, bf16, m = k = 4096, 48 columns; reading x alone: 12.2 us)
//     addresses worked out for each copy: 34.7 us; once: 21.0 us, 58 % of the read. A stage costs a
//     warp a chain of 200 instructions, whatever the width; the copy engine takes them over.
//     With dropout: 159 us, bound by 12 instructions of the mask per element and part, and by x
//     being read for each part.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/lora_shrink.cuh"

namespace metal_lora::cuda {
namespace {

using namespace shrink;

constexpr uint32_t kWarpRows = 32;

// ---- tensor cores ----

/// kGroups: warps side by side, 64 columns each.
template <uint32_t kGroups>
struct Shape {
  static constexpr uint32_t kWarps = kGroups == 4 ? 16 : 8;
  static constexpr uint32_t kThreads = 32 * kWarps;
  static constexpr uint32_t kWidth = kColumns * kGroups;          ///< columns of a block
  static constexpr uint32_t kRowWarps = kWarps / kGroups;         ///< over rows and k together
  static constexpr uint32_t kWarpInner = kGroups == 1 ? 32 : 64;  ///< of k, per warp and stage
  static constexpr uint32_t kPitch = kWidth + 8;                  ///< of the partial sums, floats
  static constexpr uint32_t kPartialBytes = kRowWarps * kWarpRows * kPitch * 4;
  static constexpr uint32_t kXBytes = kRowWarps * kWarpRows * kWarpInner * 2;  ///< of a stage
  static constexpr uint32_t kTableBytes = kWidth * 16;

  static constexpr uint32_t rows(uint32_t row_warps_log2) { return kWarpRows << row_warps_log2; }
  static constexpr uint32_t inner(uint32_t row_warps_log2) {
    return kWarpInner * (kRowWarps >> row_warps_log2);
  }
  static constexpr uint32_t stage_bytes(uint32_t row_warps_log2) {
    return kXBytes + kWidth * inner(row_warps_log2) * 2;
  }
};

/// Where a column (or, of right [k, rank], eight of them) of the right side starts, and how many
/// elements a step along k is; null: zeros.
struct ColumnSource {
  const void* from;
  uint32_t stride;
  uint32_t count;
};

template <typename T>
__device__ __forceinline__ void copy_elements(
    void* to, const void* from, DType dtype, size_t first, uint32_t count) {
  Vec16<T> v;
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    v.v[i] = from_float<T>(i < count ? load_as_float(from, dtype, first + i) : 0.0f);
  }
  store16(static_cast<T*>(to), v);
}

/// A stage element by element: odd alignments, and f32 adapters, which are rounded to x's type.
/// Layout as Loader's.
template <typename T, bool kKn, uint32_t kGroups>
__device__ __noinline__ void load_elements(
    const Args& args,
    uint32_t row0,
    uint32_t width,
    const ColumnSource* table,
    char* to,
    uint32_t inner0) {
  using S = Shape<kGroups>;
  const uint32_t rows = S::rows(args.row_warps_log2);
  const uint32_t inner_log2 = __ffs(S::inner(args.row_warps_log2)) - 1,
                 per_row_log2 = inner_log2 - 3;
  for (uint32_t id = threadIdx.x; id < rows << per_row_log2; id += S::kThreads) {
    const uint32_t r = id >> per_row_log2, c = id & ((1u << per_row_log2) - 1);
    const uint32_t row = row0 + r, inner = inner0 + c * 8;
    copy_elements<T>(
        to + (r << (inner_log2 + 1)) + ((c ^ (r & 7)) << 4),
        args.x,
        args.x_dtype,
        row * args.x_stride + inner,
        row < args.m && inner < args.k ? min(8u, args.k - inner) : 0);
  }
  to += S::kXBytes;
  const uint32_t chunks = kKn ? (width / 8) << inner_log2 : width << per_row_log2;
  for (uint32_t id = threadIdx.x; id < chunks; id += S::kThreads) {
    const uint32_t outer = kKn ? id / (width / 8) : id >> per_row_log2;
    const uint32_t c = kKn ? id % (width / 8) : id & ((1u << per_row_log2) - 1);
    const uint32_t inner = inner0 + (kKn ? outer : c * 8);
    const ColumnSource source = table[kKn ? c : outer];
    const uint32_t most = inner < args.k ? kKn ? 8u : min(8u, args.k - inner) : 0;
    copy_elements<T>(
        to + outer * (kKn ? S::kWidth * 2 : 2u << inner_log2) + ((c ^ (outer & 7)) << 4),
        source.from,
        args.right_dtype,
        size_t{inner} * source.stride,
        min(most, source.count));
  }
}

/// The copies of a block, 16 bytes a thread and turn. What a thread needs for its chunks of x is
/// worked out once, so that a stage costs a few instructions a copy.
/// Stages are x [rows, inner], right [columns, inner] or [inner, columns], 16-byte chunks exchanged
/// within 128 bytes so that fragments come without bank conflicts.
template <typename T, bool kKn, uint32_t kGroups>
class Loader {
  using S = Shape<kGroups>;

 public:
  __device__ Loader(const Args& args, const Place& place, ColumnSource* table, char* stages)
      : args_(args),
        place_(place),
        table_(table),
        stages_(stages),
        inner_log2_(__ffs(S::inner(args.row_warps_log2)) - 1),
        per_row_log2_(inner_log2_ - 3),
        chunk_(threadIdx.x & ((1u << per_row_log2_) - 1)),
        row_(threadIdx.x >> per_row_log2_),
        turn_rows_(S::kThreads >> per_row_log2_) {
    // Rows past the end read the last one: their sums go nowhere.
    x_ = static_cast<const T*>(args.x) + chunk_ * 8;
    to_ = (row_ << (inner_log2_ + 1)) + ((chunk_ ^ (row_ & 7)) << 4);
    flip_ = turn_rows_ == 4 ? 64 : 0;
    // No more columns than there are, in sixteens as the products want them.
    width_ = args.columns > place.column0
                 ? min(S::kWidth, (args.columns - place.column0 + 15) & ~15u)
                 : 0;
  }

  __device__ void fill_table() {
    constexpr uint32_t kEach = kKn ? 8 : 1;
    for (uint32_t i = threadIdx.x; i < S::kWidth / kEach; i += S::kThreads) {
      const uint32_t column = place_.column0 + i * kEach, p = part_of(args_, column);
      ColumnSource source = {args_.x, 0, 0};
      if (p < args_.parts) {
        const Part& part = args_.part[p];
        const uint32_t r = column - part.first;
        const size_t size = args_.right_dtype == DType::f32 ? 4 : 2;
        source.from = static_cast<const char*>(part.right) + (kKn ? r : size_t{r} * args_.k) * size;
        source.stride = kKn ? part.rank : 1;
        source.count = kKn ? min(8u, part.rank - r) : 8;
      }
      table_[i] = source;
    }
  }

  /// Starts the copies of one stage.
  __device__ __forceinline__ void load(uint32_t stage, uint32_t inner0) {
    char* to = stages_ + stage * S::stage_bytes(args_.row_warps_log2);
    if (!args_.x_vectors || !args_.right_vectors) {
      load_elements<T, kKn, kGroups>(args_, place_.row0, width_, table_, to, inner0);
      return;
    }
    load_x(shared_address(to), inner0);
    const uint32_t right = shared_address(to) + S::kXBytes;
    kKn ? load_right_kn(right, inner0) : load_right_nk(right, inner0);
  }

 private:
  __device__ __forceinline__ uint32_t bytes_at(uint32_t inner) const {
    return static_cast<uint32_t>(
        max(0, min(16, (static_cast<int>(args_.k) - static_cast<int>(inner)) * 2)));
  }

  __device__ __forceinline__ void load_x(uint32_t to, uint32_t inner0) {
    const uint32_t bytes = bytes_at(inner0 + chunk_ * 8);
    const T* from = x_ + inner0;
#pragma unroll
    for (uint32_t i = 0; i < S::kXBytes / 16 / S::kThreads; ++i) {
      const uint32_t row = min(place_.row0 + row_ + i * turn_rows_, args_.m - 1);
      mma::copy_async<16>(
          to + (to_ ^ (i & 1 ? flip_ : 0)) + (i * turn_rows_ << (inner_log2_ + 1)),
          from + row * args_.x_stride,
          bytes);
    }
  }

  __device__ __forceinline__ void load_right_nk(uint32_t to, uint32_t inner0) {
    const uint32_t inner = inner0 + chunk_ * 8, bytes = bytes_at(inner);
    uint32_t at = to_;
#pragma unroll 4
    for (uint32_t n = row_; n < width_; n += turn_rows_) {
      const ColumnSource source = table_[n];
      mma::copy_async<16>(
          to + at, static_cast<const T*>(source.from) + inner, source.count ? bytes : 0);
      at = (at ^ flip_) + (turn_rows_ << (inner_log2_ + 1));
    }
  }

  __device__ __forceinline__ void load_right_kn(uint32_t to, uint32_t inner0) {
    constexpr uint32_t kPerRow = S::kWidth / 8, kRows = S::kThreads / kPerRow;
    const uint32_t c = threadIdx.x % kPerRow, first = threadIdx.x / kPerRow;
    if (c * 8 >= width_) return;
    const ColumnSource source = table_[c];
    const T* from = static_cast<const T*>(source.from) + size_t{inner0 + first} * source.stride;
    to += first * (S::kWidth * 2) + ((c ^ (first & 7)) << 4);
#pragma unroll 4
    for (uint32_t i = first; i < (1u << inner_log2_); i += kRows) {
      mma::copy_async<16>(to, from, inner0 + i < args_.k ? source.count * 2 : 0);
      from += size_t{kRows} * source.stride;
      to += kRows * S::kWidth * 2;
    }
  }

  const Args& args_;
  const Place place_;
  ColumnSource* const table_;
  char* const stages_;
  const uint32_t inner_log2_, per_row_log2_;
  const uint32_t chunk_, row_, turn_rows_;  ///< of a thread's first copy, and rows of a turn
  const T* x_;
  uint32_t to_, flip_, width_;
};

/// Clears the dropped elements of a 16 x 16 fragment of x: keys of rows g and g + 8.
__device__ __forceinline__ void drop_fragment(
    uint32_t (&a)[4], DropKey upper, DropKey lower, uint32_t column, const DropMask& mask) {
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const DropKey key = i & 1 ? lower : upper;
    const uint32_t c = column + (i & 2) * 4;
    uint32_t bits = drop_keeps(mask, key, c) ? 0x0000ffffu : 0;
    if (drop_keeps(mask, key, c + 1)) bits |= 0xffff0000u;
    a[i] &= bits;
  }
}

/// One stage's products of one warp: 32 rows, 64 columns, kWarpInner of k.
template <typename T, bool kKn, uint32_t kGroups, bool kDrop>
struct Products {
  using S = Shape<kGroups>;
  uint32_t x_at, right_at;  ///< this lane's first matrix row, bytes from the stage's start
  uint32_t inner_bytes;
  uint32_t column;  ///< of x, this lane's first of a stage (dropout)
  DropKey keys[4];
  DropMask mask;

  __device__ Products(uint32_t inner, uint32_t row_warp, uint32_t inner_warp, uint32_t group)
      : inner_bytes(inner * 2) {
    const uint32_t lane = threadIdx.x % 32, chunk = inner_warp * (S::kWarpInner / 8);
    x_at = (row_warp * kWarpRows + (lane & 15)) * inner_bytes +
           (((chunk + (lane >> 4)) ^ (lane & 7)) << 4);
    if constexpr (kKn) {
      const uint32_t i = chunk * 8 + (lane & 15), c = group * (kColumns / 8) + (lane >> 4);
      right_at = i * (S::kWidth * 2) + ((c ^ (i & 7)) << 4);
    } else {
      const uint32_t n = group * kColumns + (lane & 7) + ((lane >> 4) << 3);
      right_at = n * inner_bytes + (((chunk + ((lane >> 3) & 1)) ^ (n & 7)) << 4);
    }
    right_at += S::kXBytes;
    column = chunk * 8 + (lane & 3) * 2;
  }

  /// kPairs: of the eight columns that an instruction takes, those that there are.
  template <uint32_t kPairs>
  __device__ __forceinline__ void add(
      uint32_t stage, uint32_t inner0, float (&sums)[2][8][4]) const {
#pragma unroll
    for (uint32_t step = 0; step < S::kWarpInner / 16; ++step) {
      uint32_t a[2][4], b[kPairs][4];
#pragma unroll
      for (uint32_t t = 0; t < 2; ++t) {
        // A step is two chunks on, which their exchange turns into an exclusive or.
        mma::load_x4(a[t], ((stage + x_at) ^ (step * 32)) + t * 16 * inner_bytes);
      }
#pragma unroll
      for (uint32_t pair = 0; pair < kPairs; ++pair) {
        if constexpr (kKn) {
          mma::load_x4_across(
              b[pair], ((stage + right_at) ^ (pair * 32)) + step * 16 * (S::kWidth * 2));
        } else {
          mma::load_x4(b[pair], ((stage + right_at) ^ (step * 32)) + pair * 16 * inner_bytes);
        }
      }
      if constexpr (kDrop) {
#pragma unroll
        for (uint32_t t = 0; t < 2; ++t) {
          drop_fragment(a[t], keys[2 * t], keys[2 * t + 1], inner0 + column + step * 16, mask);
        }
      }
#pragma unroll
      for (uint32_t pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (uint32_t t = 0; t < 2; ++t) {
          mma::multiply<T>(sums[t][2 * pair], a[t], b[pair][0], b[pair][1]);
          mma::multiply<T>(sums[t][2 * pair + 1], a[t], b[pair][2], b[pair][3]);
        }
      }
    }
  }

  __device__ __forceinline__ void add(
      uint32_t pairs, uint32_t stage, uint32_t inner0, float (&sums)[2][8][4]) const {
    switch (pairs) {
      case 0:
        break;
      case 1:
        return add<1>(stage, inner0, sums);
      case 2:
        return add<2>(stage, inner0, sums);
      case 3:
        return add<3>(stage, inner0, sums);
      default:
        return add<4>(stage, inner0, sums);
    }
  }
};

template <typename T, bool kKn, uint32_t kGroups, bool kDrop>
__global__ void __launch_bounds__(Shape<kGroups>::kThreads, kGroups == 1 ? 2 : 1)
    shrink_kernel(const __grid_constant__ Args args) {
  using S = Shape<kGroups>;
  extern __shared__ __align__(128) char memory[];
  const uint32_t rows = S::rows(args.row_warps_log2), inner = S::inner(args.row_warps_log2);
  const uint32_t stage_bytes = S::stage_bytes(args.row_warps_log2);
  const Place place = place_of(args, S::kWidth, rows);
  auto* table = reinterpret_cast<ColumnSource*>(memory);
  char* stages = memory + S::kTableBytes;
  Loader<T, kKn, kGroups> loader(args, place, table, stages);
  loader.fill_table();

  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t group = warp % kGroups,
                 row_warp = (warp / kGroups) & ((1u << args.row_warps_log2) - 1);
  const uint32_t inner_warp = (warp / kGroups) >> args.row_warps_log2;
  Products<T, kKn, kGroups, kDrop> products(inner, row_warp, inner_warp, group);
  const uint32_t columns_here = args.columns > place.column0 ? args.columns - place.column0 : 0;
  const uint32_t pairs =
      columns_here > group * kColumns ? min(4u, (columns_here - group * kColumns + 15) / 16) : 0;
  if constexpr (kDrop) {  // a block's columns are of one part here
    uint32_t p = 0;
    while (p + 1 < args.parts && args.part[p + 1].first <= place.column0) ++p;
    products.mask = args.part[p].mask;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = place.row0 + row_warp * kWarpRows + i * 8 + lane / 4;
      products.keys[i] = drop_key(products.mask, row);
    }
  }
  float sums[2][8][4] = {};

  const uint32_t steps = (args.k + inner - 1) / inner;
  const uint32_t first = place.split * steps / args.splits;
  const uint32_t count = (place.split + 1) * steps / args.splits - first;
  wait_for_previous();
  allow_dependents();  // after the wait, see lora_shrink_sm90.cu
  __syncthreads();
  for (uint32_t s = 0; s < args.stages - 1; ++s) {
    if (s < count) loader.load(s, (first + s) * inner);
    mma::copies_commit();
  }
  uint32_t stage = 0, next = args.stages - 1;
  const uint32_t x0 = shared_address(stages);
  for (uint32_t s = 0; s < count; ++s) {
    copies_wait(args.stages - 2);
    __syncthreads();
    if (s + args.stages - 1 < count) loader.load(next, (first + s + args.stages - 1) * inner);
    mma::copies_commit();
    products.add(pairs, x0 + stage * stage_bytes, (first + s) * inner, sums);
    next = stage;
    if (++stage == args.stages) stage = 0;
  }
  copies_wait(0);
  __syncthreads();

  auto* partial = reinterpret_cast<float*>(stages);
  float* mine = partial + (inner_warp * rows + row_warp * kWarpRows + lane / 4) * S::kPitch +
                group * kColumns + lane % 4 * 2;
#pragma unroll
  for (uint32_t t = 0; t < 2; ++t) {
#pragma unroll
    for (uint32_t n = 0; n < 8; ++n) {
      float* at = mine + t * 16 * S::kPitch + n * 8;
      const float(&v)[4] = sums[t][n];
      *reinterpret_cast<float2*>(at) = make_float2(v[0], v[1]);
      *reinterpret_cast<float2*>(at + 8 * S::kPitch) = make_float2(v[2], v[3]);
    }
  }
  const Quads quads = {
      kGroups == 1   ? 4
      : kGroups == 2 ? 5
                     : 6,
      S::kPitch,
      min(args.m - place.row0, rows),
      min(S::kWidth, columns_here)};
  reduce_tile(
      partial,
      S::kRowWarps >> args.row_warps_log2,
      rows * S::kPitch,
      quads.count(),
      args.splits,
      place.split,
      [&](uint32_t i) { return quads.place(i); },
      [&](uint32_t i, float4 sum) {
        put(args, place.row0 + quads.row(i), place.column0 + quads.column(i), sum);
      });
  if (place.split == 0 && place.column0 == 0) put_zeros(args, place.row0, rows);
}

// ---- the host's side ----

/// Rows of a block and splits of k that should take the least time: what one multiprocessor reads
/// at 60 GB/s … of all together at 5 TB/s from L2 and x at 3 TB/s from memory, in nanoseconds.
struct Division {
  uint32_t row_warps_log2 = 0, splits = 1;
};
Division divide(
    const Context& context,
    const Args& args,
    uint32_t width,
    uint32_t row_warps,
    uint32_t max_splits,
    bool (*fits)(const Context&, uint32_t row_warps_log2)) {
  Division best;
  double least = 1e30;
  for (uint32_t log2 = 0; (1u << log2) <= std::min(4u, row_warps); ++log2) {
    if (!fits(context, log2)) continue;
    const uint32_t rows = kWarpRows << log2;
    const double tiles = double(ceil_div(args.m, rows)) * args.chunks;
    for (uint32_t splits = 1; splits <= max_splits; splits *= 2) {
      const double bytes = 2.0 * args.k * (std::min(rows, args.m) + std::min(width, args.columns));
      const double waves = std::ceil(tiles * splits / context.multiprocessors);
      const double time = std::max(
          {2.0 * args.k * args.m / 3000, tiles * bytes / 5000, waves * bytes / splits / 60});
      const double overhead = 100.0 * log2 + 100.0 * splits;
      if (time + overhead >= least) continue;
      least = time + overhead;
      best = {log2, splits};
    }
  }
  return best;
}

template <uint32_t kGroups>
uint32_t stages_that_fit(const Context& context, uint32_t row_warps_log2) {
  using S = Shape<kGroups>;
  const uint32_t limit = shared_limit(context) - 2048 - S::kTableBytes;
  const uint32_t stage = S::stage_bytes(row_warps_log2);
  // Two blocks on a multiprocessor where four stages of each find room.
  const uint32_t stages = std::min(4u, limit / stage);
  return S::kPartialBytes <= limit ? stages : 0;
}

template <typename T, bool kKn, uint32_t kGroups, bool kDrop>
void launch_shrink(const Context& context, Args args) {
  using S = Shape<kGroups>;
  args.chunks = std::max(1u, ceil_div(args.columns, S::kWidth));
  const Division division = divide(
      context,
      args,
      S::kWidth,
      S::kRowWarps,
      context.capability >= 90 ? 8 : 1,
      [](const Context& c, uint32_t log2) { return stages_that_fit<kGroups>(c, log2) >= 2; });
  args.row_warps_log2 = division.row_warps_log2;
  args.splits = division.splits;
  args.stages = stages_that_fit<kGroups>(context, args.row_warps_log2);
  const uint32_t shared =
      S::kTableBytes +
      std::max(args.stages * S::stage_bytes(args.row_warps_log2), S::kPartialBytes);
  const uint32_t tiles = ceil_div(args.m, S::rows(args.row_warps_log2)) * args.chunks;
  launch(
      context,
      shrink_kernel<T, kKn, kGroups, kDrop>,
      tiles * args.splits,
      S::kThreads,
      shared,
      args.splits,
      args,
      "lora_shrink");
}

template <typename T, bool kKn>
void launch_shrink(const Context& context, const Args& args, bool drop) {
  const bool wide = shared_limit(context) >= 160 * 1024;
  if (drop) return launch_shrink<T, kKn, 1, true>(context, args);
  if (args.columns <= 64 || !wide) return launch_shrink<T, kKn, 1, false>(context, args);
  if (args.columns <= 128) return launch_shrink<T, kKn, 2, false>(context, args);
  launch_shrink<T, kKn, 4, false>(context, args);
}

Args make_args(const ShrinkCall& call, bool drop) {
  Args args;
  args.drop = drop;
  args.m = call.m;
  args.k = call.k;
  args.x = call.x;
  args.x_stride = call.x_stride;
  args.x_dtype = call.dtype;
  args.right_dtype = call.right_dtype;
  args.out_dtype = call.out_dtype;
  args.right_is_kn = call.right_is_kn;
  args.out = call.out;
  args.out_stride = call.out_stride;
  args.x_vectors = is_aligned(call.x) && call.x_stride % 8 == 0;
  args.right_vectors = call.right_dtype == call.dtype;
  for (int i = 0; i < call.parts; ++i) {
    const ShrinkPart& from = call.part[i];
    if (from.rank == 0) continue;
    Part& part = args.part[args.parts++];
    part.mask = DropMask(from.dropout, from.dropout_seed);
    const float keep = part.mask.keep_scale;
    part.right = from.right;
    part.plain = from.plain;
    part.plain_factor = keep;
    part.factor = from.factor * keep;
    part.rank = from.rank;
    part.first = args.columns;
    part.out_column = args.out_columns;
    part.drop = from.dropout > 0.0f;
    // Masks differ from part to part, so that with dropout each has tiles of its own.
    args.columns += ceil_div(from.rank, drop ? kColumns : 8) * (drop ? kColumns : 8);
    args.out_columns += from.rank;
    const uint32_t row = call.right_is_kn ? from.rank : call.k;
    args.right_vectors = args.right_vectors && is_aligned(from.right) && row % 8 == 0;
  }
  return args;
}

}  // namespace

void lora_shrink(const Context& context, const ShrinkCall& call) {
  if (call.m == 0) return;
  const ShrinkPart* end = call.part + call.parts;
  const bool drop = std::any_of(
      call.part, end, [](const ShrinkPart& p) { return p.rank > 0 && p.dropout > 0.0f; });
  const Args args = make_args(call, drop);
  if (call.out && call.out_stride < args.out_columns) {
    throw std::invalid_argument(
        "[lora_shrink] out_stride must be at least " + std::to_string(args.out_columns) +
        " but is " + std::to_string(call.out_stride));
  }
  const bool tensor_cores = call.dtype != DType::f32 &&
                            (call.right_dtype == call.dtype || call.right_dtype == DType::f32);
  if (!tensor_cores) return shrink_exact(context, args);
  if (can_shrink_sm90(context, args)) return shrink_sm90(context, args);
  if (call.dtype == DType::bf16) {
    call.right_is_kn ? launch_shrink<bf16, true>(context, args, drop)
                     : launch_shrink<bf16, false>(context, args, drop);
  } else {
    call.right_is_kn ? launch_shrink<f16, true>(context, args, drop)
                     : launch_shrink<f16, false>(context, args, drop);
  }
}

}  // namespace metal_lora::cuda
