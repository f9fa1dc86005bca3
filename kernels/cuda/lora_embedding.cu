// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Rows of an embedding table plus their adapter's, and the adapter's gradients. The forward pass
// moves a row in and a row out; B passes through shared memory once for 16 tokens. Backward: the
// two products over dims and tokens are lora_shrink and lora_grad, and what remains is to add up
// the tokens of each id: the warp of an id's first token does, in the order of the tokens, so that
// there are no atomics and no sort; tokens²/64 steps of 32 comparisons, which stays small to
// ≈ 32,000 tokens. Not measured.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/lora_kernels.h"
#include "kernels/nf4.h"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kDims = 256;   ///< of a block
constexpr uint32_t kTokens = 16;  ///< of a block
constexpr uint32_t kAcross = 64;  ///< threads along dims
constexpr uint32_t kEach = 4;     ///< dims and tokens of a thread
constexpr uint32_t kRankStep = 16;
constexpr uint32_t kPitch = kRankStep + 1;
constexpr uint32_t kWholeWarp = 0xffffffffu;

__device__ __forceinline__ float load_any(const void* p, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(p)[i];
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(p)[i]);
  return to_float(static_cast<const bf16*>(p)[i]);
}
__device__ __forceinline__ void store_any(void* p, DType dtype, size_t i, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(p)[i] = v;
  } else if (dtype == DType::f16) {
    static_cast<f16*>(p)[i] = from_float<f16>(v);
  } else {
    static_cast<bf16*>(p)[i] = from_float<bf16>(v);
  }
}

__device__ __forceinline__ float nf4_absmax(const WeightView& w, size_t block) {
  if (!w.params.double_quant) return static_cast<const float*>(w.scales)[block];
  const auto* nested = static_cast<const float*>(w.biases);
  const float code = nested[1 + static_cast<const uint8_t*>(w.scales)[block]];
  const float absmax2 = nested[kNf4NestedHead + block / kNf4NestedBlock];
  return __fadd_rn(__fmul_rn(code, absmax2), nested[0]);
}

/// Weight i of the table, by the formula of its format. levels: NF4's.
__device__ __forceinline__ float load_weight(const WeightView& w, const float* levels, size_t i) {
  const WeightParams& p = w.params;
  if (p.format <= WeightFormat::bf16) return load_any(w.data, static_cast<DType>(p.format), i);
  if (p.format == WeightFormat::int8) {
    const float q = static_cast<const uint8_t*>(w.data)[i];
    const size_t group = i / p.group_size;
    return fmaf(
        q, load_any(w.scales, p.scales_dtype, group), load_any(w.biases, p.scales_dtype, group));
  }
  const uint32_t q = static_cast<const uint8_t*>(w.data)[i / 2] >> (i % 2 * 4) & 15u;
  if (p.format == WeightFormat::nf4) return levels[q] * nf4_absmax(w, i / kNf4Block);
  const size_t group = i / p.group_size;
  return fmaf(
      static_cast<float>(q),
      load_any(w.scales, p.scales_dtype, group),
      load_any(w.biases, p.scales_dtype, group));
}

struct Levels {
  float level[16];
};

struct ForwardArgs {
  uint32_t tokens = 0;
  DType dtype = DType::bf16;
  const int32_t* ids = nullptr;
  WeightView table;
  LoraView lora;
  void* out = nullptr;
  Levels levels;
};

struct ForwardShared {
  float u[kTokens][kRankStep];
  float b[kDims][kPitch];
  float levels[16];
};

/// u and B of ranks rank0 … rank0 + kRankStep - 1, zeros beyond.
__device__ __forceinline__ void load_adapter(
    const ForwardArgs& args,
    uint32_t token0,
    uint32_t dim0,
    uint32_t rank0,
    ForwardShared& shared) {
  const LoraParams& lora = args.lora.params;
  const uint32_t dims = args.table.params.k;
  for (uint32_t i = threadIdx.x; i < kTokens * kRankStep; i += kThreads) {
    const uint32_t t = i / kRankStep, j = i % kRankStep, rank = rank0 + j;
    const bool there = token0 + t < args.tokens && rank < lora.rank;
    shared.u[t][j] = there ? load_any(
                                 args.lora.a,
                                 lora.dtype,
                                 size_t{rank} * args.table.params.n + args.ids[token0 + t])
                           : 0.0f;
  }
  for (uint32_t i = threadIdx.x; i < kDims * kRankStep; i += kThreads) {
    const uint32_t d = i / kRankStep, j = i % kRankStep;
    const bool there = dim0 + d < dims && rank0 + j < lora.rank;
    shared.b[d][j] =
        there ? load_any(args.lora.b, lora.dtype, size_t{dim0 + d} * lora.rank + rank0 + j) : 0.0f;
  }
}

/// grid (dims / kDims, tokens / kTokens). Thread: 4 tokens, and 4 dims 64 apart.
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ ForwardArgs args) {
  __shared__ ForwardShared shared;
  const uint32_t dims = args.table.params.k, rank = args.lora.params.rank;
  const uint32_t token0 = blockIdx.y * kTokens, dim0 = blockIdx.x * kDims;
  const uint32_t first_token = threadIdx.x / kAcross * kEach, first_dim = threadIdx.x % kAcross;
  if (threadIdx.x < 16) shared.levels[threadIdx.x] = args.levels.level[threadIdx.x];
  __syncthreads();
  float base[kEach][kEach] = {};
#pragma unroll
  for (uint32_t t = 0; t < kEach; ++t) {
    const uint32_t token = token0 + first_token + t;
    if (token >= args.tokens) break;
    const size_t row = static_cast<size_t>(args.ids[token]) * dims;
#pragma unroll
    for (uint32_t e = 0; e < kEach; ++e) {
      const uint32_t d = dim0 + first_dim + e * kAcross;
      if (d < dims) base[t][e] = load_weight(args.table, shared.levels, row + d);
    }
  }
  float sums[kEach][kEach] = {};
  for (uint32_t rank0 = 0; rank0 < rank; rank0 += kRankStep) {
    __syncthreads();
    load_adapter(args, token0, dim0, rank0, shared);
    __syncthreads();
#pragma unroll 4
    for (uint32_t j = 0; j < kRankStep; ++j) {
#pragma unroll
      for (uint32_t e = 0; e < kEach; ++e) {
        const float b = shared.b[first_dim + e * kAcross][j];
#pragma unroll
        for (uint32_t t = 0; t < kEach; ++t) {
          sums[t][e] = fmaf(shared.u[first_token + t][j], b, sums[t][e]);
        }
      }
    }
  }
#pragma unroll
  for (uint32_t t = 0; t < kEach; ++t) {
    const uint32_t token = token0 + first_token + t;
    if (token >= args.tokens) break;
#pragma unroll
    for (uint32_t e = 0; e < kEach; ++e) {
      const uint32_t d = dim0 + first_dim + e * kAcross;
      const float v = fmaf(args.lora.params.scale, sums[t][e], base[t][e]);
      if (d < dims) store_any(args.out, args.dtype, size_t{token} * dims + d, v);
    }
  }
}

/// out[t] = table[ids[t]], rows of `vectors` times 16 bytes.
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(
    uint32_t tokens, uint32_t vectors, const int32_t* ids, const uint4* table, uint4* out) {
  const size_t count = size_t{tokens} * vectors;
  for (size_t i = blockIdx.x * size_t{kThreads} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    const auto t = static_cast<uint32_t>(i / vectors), v = static_cast<uint32_t>(i % vectors);
    out[i] = table[size_t{static_cast<uint32_t>(ids[t])} * vectors + v];
  }
}

__global__ void zero_kernel(float* to, size_t count) {
  for (size_t i = blockIdx.x * size_t{kThreads} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    to[i] = 0.0f;
  }
}

unsigned blocks_for(size_t count) {
  return static_cast<unsigned>(std::min<size_t>((count + kThreads - 1) / kThreads, 4096));
}

/// u [tokens, rank] = A[:, ids]ᵀ
__global__ void gather_kernel(
    uint32_t tokens,
    uint32_t rank,
    uint32_t vocab,
    DType dtype,
    const int32_t* ids,
    const void* a,
    float* u) {
  const size_t count = size_t{tokens} * rank;
  for (size_t i = blockIdx.x * size_t{kThreads} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    const auto t = static_cast<uint32_t>(i / rank), j = static_cast<uint32_t>(i % rank);
    u[i] = load_any(a, dtype, size_t{j} * vocab + ids[t]);
  }
}

constexpr uint32_t kScan = 4;  ///< loads of 32 ids in flight

/// Whether id stands before token `end`. All lanes agree.
__device__ __forceinline__ bool stands_before(const int32_t* ids, uint32_t end, int32_t id) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t first = 0; first < end; first += 32 * kScan) {
    bool found = false;
#pragma unroll
    for (uint32_t i = 0; i < kScan; ++i) {
      const uint32_t t = first + i * 32 + lane;
      found = found || (t < end && ids[t] == id);
    }
    if (__any_sync(kWholeWarp, found)) return true;
  }
  return false;
}

/// A warp a token: the first of each id adds up its tokens' rows of v [tokens, rank] into a column
/// of da [rank, vocab], which was zeros.
__global__ void __launch_bounds__(kThreads) add_up_kernel(
    uint32_t tokens,
    uint32_t rank,
    uint32_t vocab,
    float scale,
    const int32_t* ids,
    const float* v,
    float* da) {
  const uint32_t token = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= tokens) return;
  const int32_t id = ids[token];
  if (stands_before(ids, token, id)) return;
  constexpr uint32_t kColumns = 4;  // of 32 ranks, in registers
  for (uint32_t rank0 = 0; rank0 < rank; rank0 += 32 * kColumns) {
    float sums[kColumns] = {};
    for (uint32_t first = token; first < tokens; first += 32 * kScan) {
      uint32_t matches[kScan];
#pragma unroll
      for (uint32_t i = 0; i < kScan; ++i) {
        const uint32_t t = first + i * 32 + lane;
        matches[i] = __ballot_sync(kWholeWarp, t < tokens && ids[t] == id);
      }
#pragma unroll
      for (uint32_t i = 0; i < kScan; ++i) {
        for (uint32_t rest = matches[i]; rest != 0; rest &= rest - 1) {
          const size_t row = first + i * 32 + __ffs(static_cast<int>(rest)) - 1;
#pragma unroll
          for (uint32_t c = 0; c < kColumns; ++c) {
            const uint32_t j = rank0 + c * 32 + lane;
            if (j < rank) sums[c] += v[row * rank + j];
          }
        }
      }
    }
#pragma unroll
    for (uint32_t c = 0; c < kColumns; ++c) {
      const uint32_t j = rank0 + c * 32 + lane;
      if (j < rank) da[size_t{j} * vocab + id] = scale * sums[c];
    }
  }
}

/// da from dy·B.
void table_gradient(
    const Context& context,
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightParams& table,
    const LoraView& lora,
    const void* dy,
    float* da) {
  const uint32_t rank = lora.params.rank;
  const size_t count = size_t{rank} * table.n;
  if (count == 0) return;
  // A kernel, since a graph with a memory node in it cannot be updated.
  zero_kernel<<<blocks_for(count), kThreads, 0, context.stream>>>(da, count);
  check_launch("lora_embedding_backward");
  if (tokens == 0) return;
  ShrinkCall call;
  call.m = tokens;
  call.k = table.k;
  call.dtype = dtype;
  call.right_dtype = lora.params.dtype;
  call.right_is_kn = true;
  call.x = dy;
  call.x_stride = table.k;
  call.parts = 1;
  call.part[0].right = lora.b;
  call.part[0].rank = rank;
  auto* v = static_cast<float*>(context.scratch->take(size_t{tokens} * rank * sizeof(float)));
  call.part[0].plain = v;
  lora_shrink(context, call);
  constexpr uint32_t kWarps = kThreads / 32;
  add_up_kernel<<<(tokens + kWarps - 1) / kWarps, kThreads, 0, context.stream>>>(
      tokens, rank, table.n, lora.params.scale, ids, v, da);
  check_launch("lora_embedding_backward");
}

}  // namespace

void lora_embedding_forward(
    const Context& context,
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightView& table,
    const LoraView& lora,
    void* out) {
  if (table.params.layout != WeightLayout::row_major) {
    throw std::invalid_argument("[lora_embedding] W must be row_major but is packed for the CPU");
  }
  const uint32_t dims = table.params.k;
  if (tokens == 0 || dims == 0) return;
  const size_t row_bytes = size_t{dims} * (dtype == DType::f32 ? 4 : 2);
  if (lora.params.rank == 0 && table.params.format <= WeightFormat::bf16 &&
      static_cast<DType>(table.params.format) == dtype && is_aligned(table.data) &&
      is_aligned(out) && row_bytes % 16 == 0) {
    const auto vectors = static_cast<uint32_t>(row_bytes / 16);
    copy_rows_kernel<<<blocks_for(size_t{tokens} * vectors), kThreads, 0, context.stream>>>(
        tokens, vectors, ids, static_cast<const uint4*>(table.data), static_cast<uint4*>(out));
    check_launch("lora_embedding_forward");
    return;
  }
  ForwardArgs args;
  args.tokens = tokens;
  args.dtype = dtype;
  args.ids = ids;
  args.table = table;
  args.lora = lora;
  args.out = out;
  std::copy_n(kNf4Levels, 16, args.levels.level);
  // grid.y holds 65,535 blocks: a million tokens a launch.
  constexpr uint32_t kMost = 65535 * kTokens;
  for (uint32_t first = 0; first < tokens; first += kMost) {
    args.ids = ids + first;
    args.tokens = std::min(tokens - first, kMost);
    args.out = static_cast<char*>(out) + first * row_bytes;
    const dim3 grid((dims + kDims - 1) / kDims, (args.tokens + kTokens - 1) / kTokens);
    forward_kernel<<<grid, kThreads, 0, context.stream>>>(args);
    check_launch("lora_embedding_forward");
  }
}

void lora_embedding_backward(
    const Context& context,
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightParams& table,
    const LoraView& lora,
    const void* dy,
    float* da,
    float* db) {
  const uint32_t rank = lora.params.rank;
  if (rank == 0) return;
  if (da) table_gradient(context, tokens, dtype, ids, table, lora, dy, da);
  if (!db) return;
  auto* u = static_cast<float*>(context.scratch->take(size_t{tokens} * rank * sizeof(float)));
  if (tokens > 0) {
    gather_kernel<<<blocks_for(size_t{tokens} * rank), kThreads, 0, context.stream>>>(
        tokens, rank, table.n, lora.params.dtype, ids, lora.a, u);
    check_launch("lora_embedding_backward");
  }
  AdapterGrad grad;
  grad.small = u;
  grad.small_stride = rank;
  grad.rank = rank;
  grad.large = dy;
  grad.large_stride = grad.columns = table.k;
  grad.factor = lora.params.scale;
  grad.grad = db;
  grad.transposed = true;
  lora_grad(context, tokens, dtype, &grad, 1);
}

}  // namespace metal_lora::cuda
