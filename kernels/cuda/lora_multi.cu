// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Many adapters on one base. Two forms:
//   stream (Hopper, W and the bank of x's 16-bit type, up to 128 tokens): one kernel that streams W
//   and works out the adapters' share beside it (lora_multi_stream_sm90.cu);
//   grouped (anything): shrink; the base's product in f32, by lora_gemv up to 16 tokens and by
//   gemm() beyond, W dequantised first where it is not dense; then the share of each adapter's
//   tokens is added to it, in f32, and rounded once.
// In both, an adapter's matrices are read once for its tokens (eight at a time), its rank is the
// true one, and a token's sums run in an order that its neighbours do not touch.
//
// Rounding: y once, from base + bias + share in f32; u is f32 throughout.
//
// Ladder (H100, K = N = 4096, bf16, rank 16; us; cuBLAS's base alone in brackets): stream: see
// lora_multi_stream_sm90.cu. Grouped, 256 tokens of 128 adapters: reads of the base one behind another
// 73, all at once 54 (18); 1024 tokens of 8 adapters: 129 (45), of which 88 without any adapter.
// The f32 copy of the base and its second pass are what the next step would save: an expand inside
// the tiled product.
#include <algorithm>
#include <string>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/lora_multi.cuh"
#include "kernels/cuda/lora_quantized.h"

namespace metal_lora::cuda {
namespace {

using namespace multi;

constexpr uint32_t kExpandColumns = 4;  ///< of a thread
/// What the base's f32 product may take of scratch at a time.
constexpr size_t kMaxBaseBytes = size_t{64} << 20;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}
size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

// ---- kernels ----

__device__ __forceinline__ float load_as_float(const void* p, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
  return to_float(static_cast<const bf16*>(p)[i]);
}

struct ExpandArgs {
  Grouping grouping;
  Bank bank;
  Partials small;  ///< u (or v), unscaled
  const float* base = nullptr;
  void* out = nullptr;
};

/// out[t, c] = base[t, c] + Σ_j right(c, j)·scale·small[t, j]. kAcross: right [max_rank, columns]
/// (A, of dx); else [columns, max_rank], by vectors of 16 bytes where kVector.
template <typename Out, typename R, bool kAcross, bool kVector>
__global__ void __launch_bounds__(kThreads) expand_kernel(const ExpandArgs args) {
  __shared__ TileSearch search;
  extern __shared__ float small[];  // [tokens of the tile][max_rank]
  if (!find_tile(args.grouping, blockIdx.x, search)) return;
  const Tile& tile = search.tile;
  const uint32_t max_rank = args.bank.max_rank, columns = args.bank.columns;
  const uint32_t rank = rank_of(args.bank, tile.key, args.grouping.adapters);
  if (rank > 0) {
    const float scale = args.bank.scales[tile.key];
    for (uint32_t i = threadIdx.x; i < tile.count * max_rank; i += kThreads) {
      const uint32_t row = i / max_rank, j = i % max_rank;
      if (j < rank) {
        small[i] = scale * sum_slices(args.small, args.grouping.m, max_rank, tile.token[row], j);
      }
    }
  }
  __syncthreads();
  const R* right = static_cast<const R*>(args.bank.right) +
                   (rank > 0 ? size_t{tile.key} * max_rank * columns : 0);
  // A thread's columns stand kThreads apart; what lies beyond the last is worked out as the last.
  constexpr uint32_t kCount = kVector ? Vec16<R>::kCount : 1;
  uint32_t column[kExpandColumns];
  float sum[kTileTokens][kExpandColumns] = {};
#pragma unroll
  for (uint32_t q = 0; q < kExpandColumns; ++q) {
    column[q] =
        min(blockIdx.y * (kThreads * kExpandColumns) + q * kThreads + threadIdx.x, columns - 1);
  }
  for (uint32_t j0 = 0; j0 < rank; j0 += kCount) {
    R v[kExpandColumns][kCount];
#pragma unroll
    for (uint32_t q = 0; q < kExpandColumns; ++q) {
      if constexpr (kVector) {
        const Vec16<R> loaded = load16(right + size_t{column[q]} * max_rank + j0);
#pragma unroll
        for (uint32_t e = 0; e < kCount; ++e) v[q][e] = loaded.v[e];
      } else {
        v[q][0] = kAcross ? right[size_t{j0} * columns + column[q]]
                          : right[size_t{column[q]} * max_rank + j0];
      }
    }
#pragma unroll
    for (uint32_t e = 0; e < kCount; ++e) {
      if (j0 + e >= rank) break;
#pragma unroll
      for (uint32_t i = 0; i < kTileTokens; ++i) {
        if (i >= tile.count) break;
        const float u = small[i * max_rank + j0 + e];
#pragma unroll
        for (uint32_t q = 0; q < kExpandColumns; ++q) {
          sum[i][q] = fmaf(to_float(v[q][e]), u, sum[i][q]);
        }
      }
    }
  }
  // base may be out: all is read before anything is written, else each read would wait in turn.
#pragma unroll
  for (uint32_t i = 0; i < kTileTokens; ++i) {
    if (i >= tile.count) break;
#pragma unroll
    for (uint32_t q = 0; q < kExpandColumns; ++q) {
      sum[i][q] += args.base[size_t{tile.token[i]} * columns + column[q]];
    }
  }
  __syncthreads();
#pragma unroll
  for (uint32_t i = 0; i < kTileTokens; ++i) {
    if (i >= tile.count) break;
#pragma unroll
    for (uint32_t q = 0; q < kExpandColumns; ++q) {
      const size_t at = size_t{tile.token[i]} * columns + column[q];
      static_cast<Out*>(args.out)[at] = from_float<Out>(sum[i][q]);
    }
  }
}

/// v[t] = B_iᵀ·dy[t] over slices of n: [slices, m, max_rank]. A thread takes every 256th row of B.
constexpr uint32_t kDownSlice = 1024, kDownRanks = 8;
template <typename X>
__global__ void __launch_bounds__(kThreads)
    down_kernel(const Grouping grouping, const Bank b, const X* dy, float* out) {
  __shared__ TileSearch search;
  __shared__ float sums[kThreads / 32][kTileTokens][kDownRanks];
  if (!find_tile(grouping, blockIdx.x, search)) return;
  const Tile& tile = search.tile;
  const uint32_t n = b.columns, max_rank = b.max_rank;
  const uint32_t rank = rank_of(b, tile.key, grouping.adapters);
  const uint32_t end = min(n, (blockIdx.y + 1) * kDownSlice);
  const size_t right = size_t{rank > 0 ? tile.key : 0} * n * max_rank;
  for (uint32_t j0 = 0; j0 < rank; j0 += kDownRanks) {
    float sum[kTileTokens][kDownRanks] = {};
    for (uint32_t row = blockIdx.y * kDownSlice + threadIdx.x; row < end; row += kThreads) {
      float v[kDownRanks];
#pragma unroll
      for (uint32_t e = 0; e < kDownRanks; ++e) {
        v[e] = j0 + e < rank
                   ? load_as_float(b.right, b.dtype, right + size_t{row} * max_rank + j0 + e)
                   : 0.0f;
      }
#pragma unroll
      for (uint32_t i = 0; i < kTileTokens; ++i) {
        if (i < tile.count) {
          const float d = to_float(dy[size_t{tile.token[i]} * n + row]);
#pragma unroll
          for (uint32_t e = 0; e < kDownRanks; ++e) sum[i][e] = fmaf(d, v[e], sum[i][e]);
        }
      }
    }
    const uint32_t warp = threadIdx.x / 32;
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kTileTokens; ++i) {
      if (i < tile.count) {
#pragma unroll
        for (uint32_t e = 0; e < kDownRanks; ++e) {
          const float total = warp_sum(sum[i][e]);
          if (threadIdx.x % 32 == 0) sums[warp][i][e] = total;
        }
      }
    }
    __syncthreads();
    const uint32_t i = threadIdx.x / kDownRanks, j = j0 + threadIdx.x % kDownRanks;
    if (i < tile.count && j < rank) {
      float total = 0.0f;
      for (auto& of_warp : sums) total += of_warp[i][j - j0];
      out[(size_t{blockIdx.y} * grouping.m + tile.token[i]) * max_rank + j] = total;
    }
  }
}

/// out [m, max_rank] = scale·Σ slices, of the true ranks.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const Grouping grouping, const Bank bank, const Partials small, float* out) {
  const size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x;
  const uint32_t t = static_cast<uint32_t>(i / bank.max_rank);
  const uint32_t j = static_cast<uint32_t>(i % bank.max_rank);
  if (t >= grouping.m) return;
  const uint32_t key = key_of(grouping.index[t], grouping.adapters);
  if (j >= rank_of(bank, key, grouping.adapters)) return;
  out[i] = bank.scales[key] * sum_slices(small, grouping.m, bank.max_rank, t, j);
}

/// Where the tokens of adapters below `key` end in the sorted order.
__device__ __forceinline__ uint32_t first_of(const Grouping& g, uint32_t key) {
  uint32_t low = 0, high = g.m;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (g.key[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// grad(i)[j, c] = Σ_t small[t, j]·large[t, c] over the adapter's tokens in their order; rows of
/// `columns` (dA), or [columns, max_rank] where kTransposed (dB). Ranks beyond the true one: 0.
constexpr uint32_t kGradRanks = 8;
template <typename X, bool kTransposed>
__global__ void __launch_bounds__(kThreads) grad_kernel(
    const Grouping grouping, const Bank bank, const float* small, const X* large, float* grad) {
  const uint32_t columns = bank.columns, max_rank = bank.max_rank;
  const uint32_t slices = (columns + kThreads - 1) / kThreads;
  const uint32_t adapter = blockIdx.x / slices;
  const uint32_t c = blockIdx.x % slices * kThreads + threadIdx.x, j0 = blockIdx.y * kGradRanks;
  const uint32_t rank = rank_of(bank, adapter, grouping.adapters);
  float sum[kGradRanks] = {};
  if (j0 < rank) {
    const uint32_t end = first_of(grouping, adapter + 1);
    for (uint32_t p = first_of(grouping, adapter); p < end; ++p) {
      const uint32_t t = grouping.order[p];
      const float v = c < columns ? to_float(large[size_t{t} * columns + c]) : 0.0f;
#pragma unroll
      for (uint32_t e = 0; e < kGradRanks; ++e) {
        if (j0 + e < rank) sum[e] = fmaf(small[size_t{t} * max_rank + j0 + e], v, sum[e]);
      }
    }
  }
  if (c >= columns) return;
  float* to = grad + size_t{adapter} * max_rank * columns;
#pragma unroll
  for (uint32_t e = 0; e < kGradRanks; ++e) {
    const uint32_t j = j0 + e;
    if (j < max_rank) to[kTransposed ? size_t{c} * max_rank + j : size_t{j} * columns + c] = sum[e];
  }
}

// ---- host ----

template <bool kAcross>
void launch_expand(const Context& context, const ExpandArgs& args, DType out_dtype) {
  const Bank& bank = args.bank;
  const bool vector =
      !kAcross && is_aligned(bank.right) && bank.max_rank * size_of(bank.dtype) % 16 == 0;
  const dim3 grid(args.grouping.m, ceil_div(bank.columns, kThreads * kExpandColumns));
  const size_t shared = size_t{kTileTokens} * bank.max_rank * sizeof(float);
  with_dtype(out_dtype, [&](auto out) {
    with_dtype(bank.dtype, [&](auto right) {
      using Out = decltype(out);
      using R = decltype(right);
      if constexpr (kAcross) {
        expand_kernel<Out, R, true, false><<<grid, kThreads, shared, context.stream>>>(args);
      } else if (vector) {
        expand_kernel<Out, R, false, true><<<grid, kThreads, shared, context.stream>>>(args);
      } else {
        expand_kernel<Out, R, false, false><<<grid, kThreads, shared, context.stream>>>(args);
      }
    });
  });
  check_launch("lora_multi_expand");
}

Bank side_a(const LoraBankView& bank, uint32_t k) {
  return {bank.a, bank.params.dtype, k, bank.params.max_rank, bank.ranks, bank.scales};
}
Bank side_b(const LoraBankView& bank, uint32_t n) {
  return {bank.b, bank.params.dtype, n, bank.params.max_rank, bank.ranks, bank.scales};
}

void check_call(const char* op, const WeightView& weight, const LoraBankView& bank) {
  if (weight.params.layout != WeightLayout::row_major) {
    throw std::invalid_argument(
        "[" + std::string(op) + "] weight must be row_major but is packed for the CPU");
  }
  if (bank.params.max_rank > 1024) {
    throw std::invalid_argument(
        "[" + std::string(op) + "] max_rank must be at most 1024 but is " +
        std::to_string(bank.params.max_rank));
  }
}

/// W dense in `dtype`: its own data, or a copy in scratch.
const void* dense(const Context& context, const WeightView& weight, DType dtype) {
  if (static_cast<uint32_t>(weight.params.format) == static_cast<uint32_t>(dtype)) {
    return weight.data;
  }
  void* copy = context.scratch->take(size_t{weight.params.n} * weight.params.k * size_of(dtype));
  dequantize(context, weight, dtype, copy);
  return copy;
}

/// out [m, columns] of out_dtype = left [m, inner]·W (transposed or not) + bias.
void base_product(
    const Context& context,
    uint32_t m,
    uint32_t inner,
    uint32_t columns,
    DType dtype,
    const void* left,
    const void* w,
    bool right_is_kn,
    const float* bias,
    void* out,
    DType out_dtype) {
  GemmGroup group;
  group.m = m;
  group.dtype = dtype;
  group.out_dtype = out_dtype;
  group.right_is_kn = right_is_kn;
  group.problems = 1;
  GemmProblem& problem = group.problem[0];
  problem.n = columns;
  problem.pairs = 1;
  problem.pair[0] = {left, inner, w, right_is_kn ? columns : inner, inner};
  problem.out = out;
  problem.out_stride = columns;
  problem.bias = bias;
  gemm(context, group);
}

/// The base alone, straight to y.
void base_forward(
    const Context& context,
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const void* w,
    const float* bias,
    void* y,
    DType y_dtype) {
  const uint32_t n = weight.params.n, k = weight.params.k;
  if (w) return base_product(context, m, k, n, dtype, x, w, false, bias, y, y_dtype);
  LoraBranch branch;
  branch.weight = weight;
  branch.bias = bias;
  branch.y = y;
  lora_gemv(context, m, k, dtype, x, &branch, 1, y_dtype);
}

const void* row(const void* data, DType dtype, size_t row, size_t width) {
  return static_cast<const char*>(data) + row * width * size_of(dtype);
}
void* row(void* data, DType dtype, size_t row, size_t width) {
  return static_cast<char*>(data) + row * width * size_of(dtype);
}

/// Tokens whose f32 base is held at a time: a function of m and n alone.
uint32_t tokens_at_a_time(uint32_t m, uint32_t n) {
  const size_t fit = kMaxBaseBytes / (size_t{std::max(1u, n)} * sizeof(float)) / 128 * 128;
  return static_cast<uint32_t>(std::min<size_t>(m, std::max<size_t>(128, fit)));
}

Grouping group_tokens(const Context& context, const int32_t* index, uint32_t m, uint32_t adapters) {
  if (m > kScanTokens) return sort_tokens(context, index, m, adapters);
  return {index, m, adapters};
}

}  // namespace

void lora_linear_multi_forward(
    const Context& context,
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& view,
    const int32_t* adapter_index,
    const float* bias,
    void* y) {
  const uint32_t n = weight.params.n, k = weight.params.k, adapters = view.params.adapters;
  check_call("lora_linear_multi", weight, view);
  if (m == 0 || n == 0) return;
  const bool has_adapters = adapters > 0 && view.params.max_rank > 0 && k > 0;
  const bool is_dense = static_cast<uint32_t>(weight.params.format) == static_cast<uint32_t>(dtype);
  const Bank a = side_a(view, k), b = side_b(view, n);
  const Stream call{m, n, k, dtype, x, weight.data, adapter_index, a, b, adapters, bias, y};
  if (has_adapters && is_dense && can_stream(context, call)) return stream(context, call);
  const void* w = m <= kVectorMaxTokens ? nullptr : dense(context, weight, dtype);
  if (!has_adapters) return base_forward(context, m, dtype, x, weight, w, bias, y, dtype);
  const uint32_t piece = tokens_at_a_time(m, n);
  auto* base = dtype == DType::f32
                   ? nullptr
                   : static_cast<float*>(context.scratch->take(size_t{piece} * n * 4));
  for (uint32_t first = 0; first < m; first += piece) {
    const uint32_t rows = std::min(piece, m - first);
    const void* piece_x = row(x, dtype, first, k);
    void* piece_y = row(y, dtype, first, n);
    const Grouping grouping = group_tokens(context, adapter_index + first, rows, adapters);
    const Partials u = shrink(context, grouping, a, dtype, piece_x);
    float* piece_base = base ? base : static_cast<float*>(piece_y);
    base_forward(context, rows, dtype, piece_x, weight, w, bias, piece_base, DType::f32);
    launch_expand<false>(context, {grouping, b, u, piece_base, piece_y}, dtype);
  }
}

void lora_linear_multi_backward(
    const Context& context,
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& view,
    const int32_t* adapter_index,
    const void* dy,
    void* dx,
    float* da,
    float* db) {
  const uint32_t n = weight.params.n, k = weight.params.k, adapters = view.params.adapters;
  const uint32_t max_rank = view.params.max_rank;
  check_call("lora_linear_multi", weight, view);
  const bool has_adapters = adapters > 0 && max_rank > 0;
  if (m == 0) {
    const size_t bytes = size_t{adapters} * max_rank * sizeof(float);
    if (da && bytes * k > 0) check(cudaMemsetAsync(da, 0, bytes * k, context.stream), "memset");
    if (db && bytes * n > 0) check(cudaMemsetAsync(db, 0, bytes * n, context.stream), "memset");
    return;
  }
  const Bank a = side_a(view, k), b = side_b(view, n);
  const auto base = [&](void* out, DType out_dtype) {
    const void* w = dense(context, weight, dtype);
    base_product(context, m, n, k, dtype, dy, w, true, nullptr, out, out_dtype);
  };
  if (!has_adapters) {
    if (dx && k > 0) base(dx, dtype);
    return;
  }
  const Grouping grouping = sort_tokens(context, adapter_index, m, adapters);
  const auto finished = [&](const Partials& partials) {
    auto* out = static_cast<float*>(context.scratch->take(size_t{m} * max_rank * sizeof(float)));
    sum_kernel<<<ceil_div(m * max_rank, kThreads), kThreads, 0, context.stream>>>(
        grouping, a, partials, out);
    check_launch("lora_multi_sum");
    return out;
  };
  const dim3 grad_a(adapters * ceil_div(k, kThreads), ceil_div(max_rank, kGradRanks));
  const dim3 grad_b(adapters * ceil_div(n, kThreads), ceil_div(max_rank, kGradRanks));
  Partials v;
  v.slices = ceil_div(n, kDownSlice);
  if ((dx || da) && v.slices > 0) {
    v.data =
        static_cast<float*>(context.scratch->take(size_t{v.slices} * m * max_rank * sizeof(float)));
  }
  with_dtype(dtype, [&](auto type) {
    using X = decltype(type);
    const auto stream = context.stream;
    const X *typed_x = static_cast<const X*>(x), *typed_dy = static_cast<const X*>(dy);
    if (db && n > 0) {
      const float* u = finished(shrink(context, grouping, a, dtype, x));
      grad_kernel<X, true><<<grad_b, kThreads, 0, stream>>>(grouping, b, u, typed_dy, db);
      check_launch("lora_multi_grad_b");
    }
    if (v.data) {
      down_kernel<X><<<dim3(m, v.slices), kThreads, 0, stream>>>(grouping, b, typed_dy, v.data);
      check_launch("lora_multi_down");
    }
    if (da && k > 0) {
      grad_kernel<X, false><<<grad_a, kThreads, 0, stream>>>(grouping, a, finished(v), typed_x, da);
      check_launch("lora_multi_grad_a");
    }
  });
  if (!dx || k == 0) return;
  auto* share = dtype == DType::f32
                    ? static_cast<float*>(dx)
                    : static_cast<float*>(context.scratch->take(size_t{m} * k * sizeof(float)));
  base(share, DType::f32);
  launch_expand<true>(context, {grouping, a, v, share, dx}, dtype);
}

}  // namespace metal_lora::cuda
