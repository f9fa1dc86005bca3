// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Head and loss by blocks of tokens whose f32 logits fit the scratch: a product, one kernel that
// turns each row of logits into its loss and, in place, into its gradient, and the product back.
// Logits stay f32, as the CPU twin's: rounded to bf16 they would be off by up to 2^-9 of their
// size, 0.03 for a logit of 16, a few percent of that token's gradient.
//
// Ladder (1024 rows of 49,152, H100): a row read twice from memory 213 µs; a row held in shared
// memory and read once: see bench/results. Beside it stand the products: 322 + 305 µs.
#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_quantized.h"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr int kBlock = 1024;
constexpr size_t kLogitsBytes = size_t{256} << 20;
constexpr size_t kRowBytes = 200 * 1024;  ///< of shared memory that hold a row (Hopper: 227 KiB)
constexpr uint32_t kRowMultiple = 128;    ///< rows of a tile of the products

/// The maximum and Σ exp(v − maximum) so far.
struct Softmax {
  float largest, sum;
};
__device__ __forceinline__ Softmax merged(Softmax a, Softmax b) {
  const float largest = fmaxf(a.largest, b.largest);
  if (largest == -INFINITY) return {largest, 0.0f};
  return {largest, a.sum * __expf(a.largest - largest) + b.sum * __expf(b.largest - largest)};
}

/// Over the block, in a fixed order, known to all threads.
__device__ Softmax block_softmax(Softmax own) {
  __shared__ Softmax parts[kBlock / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Softmax other = {
        __shfl_xor_sync(0xffffffffu, own.largest, offset),
        __shfl_xor_sync(0xffffffffu, own.sum, offset)};
    // The lower lane's first, so that both get the same bits.
    own = threadIdx.x & offset ? merged(other, own) : merged(own, other);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
  __syncthreads();
  Softmax all = parts[0];
  for (int i = 1; i < kBlock / 32; ++i) all = merged(all, parts[i]);
  return all;
}

struct Rows {
  float* logits;
  uint32_t vocab;
  const int32_t* targets;
  const float* weights;
  float* losses;  ///< unweighted; 0 where the weight is
  bool gradient;
};

constexpr uint32_t kWidth = 4;  ///< neighbours that a thread takes

/// Copies a row into shared memory; returns the largest of the thread's part.
__device__ __forceinline__ float hold_row(const float* row, uint32_t vocab, float* held) {
  float largest = -INFINITY;
  if (vocab % kWidth == 0) {
#pragma unroll 4
    for (uint32_t i = threadIdx.x * kWidth; i < vocab; i += kBlock * kWidth) {
      const float4 v = *reinterpret_cast<const float4*>(row + i);
      *reinterpret_cast<float4*>(held + i) = v;
      largest = fmaxf(fmaxf(largest, fmaxf(v.x, v.y)), fmaxf(v.z, v.w));
    }
    return largest;
  }
  for (uint32_t i = threadIdx.x * kWidth; i < vocab; i += kBlock * kWidth) {
    for (uint32_t j = i; j < min(i + kWidth, vocab); ++j) {
      held[j] = row[j];
      largest = fmaxf(largest, held[j]);
    }
  }
  return largest;
}

/// One row a block. kHeld: the row lies in shared memory meanwhile, else it is read twice. The
/// gradient weight·(softmax − onehot) takes the row's place as T, from its first byte on (kHeld),
/// or goes to `apart` [rows, vocab].
template <typename T, bool kHeld>
__global__ void __launch_bounds__(kBlock) rows_kernel(const Rows a, T* apart) {
  extern __shared__ float held[];
  wait_for_previous();
  float* row = a.logits + size_t{blockIdx.x} * a.vocab;
  T* out = kHeld ? reinterpret_cast<T*>(row) : apart + size_t{blockIdx.x} * a.vocab;
  const float weight = a.weights[blockIdx.x];
  if (weight == 0.0f) {  // whatever the row holds
    if (threadIdx.x == 0) a.losses[blockIdx.x] = 0.0f;
    if (!a.gradient) return;
    for (uint32_t i = threadIdx.x; i < a.vocab; i += kBlock) out[i] = from_float<T>(0.0f);
    return;
  }
  Softmax own = {-INFINITY, 0.0f};
  if constexpr (kHeld) {
    own.largest = hold_row(row, a.vocab, held);
    for (uint32_t i = threadIdx.x * kWidth; i < a.vocab; i += kBlock * kWidth) {
#pragma unroll
      for (uint32_t j = 0; j < kWidth; ++j) {
        if (i + j < a.vocab && own.largest != -INFINITY)
          own.sum += __expf(held[i + j] - own.largest);
      }
    }
  } else {
    for (uint32_t i = threadIdx.x; i < a.vocab; i += kBlock) own = merged(own, {row[i], 1.0f});
  }
  const auto target = static_cast<uint32_t>(a.targets[blockIdx.x]);
  const float target_logit = row[target];  // before anybody overwrites it: see the barrier below
  const Softmax all = block_softmax(own);
  const float logsumexp = all.largest + logf(all.sum);
  if (threadIdx.x == 0) a.losses[blockIdx.x] = logsumexp - target_logit;
  if (!a.gradient) return;
  const bool whole = a.vocab % kWidth == 0;
  for (uint32_t i = threadIdx.x * kWidth; i < a.vocab; i += kBlock * kWidth) {
    struct alignas(kWidth * sizeof(T)) Part {
      T v[kWidth];
    } part;
#pragma unroll
    for (uint32_t j = 0; j < kWidth; ++j) {
      if (i + j >= a.vocab) continue;
      const float p = __expf((kHeld ? held[i + j] : row[i + j]) - logsumexp);
      part.v[j] = from_float<T>(weight * (p - (i + j == target ? 1.0f : 0.0f)));
      if (!whole) out[i + j] = part.v[j];
    }
    if (whole) *reinterpret_cast<Part*>(out + i) = part;
  }
}

/// Σ weights·losses in f64, in a fixed order; one block.
__global__ void __launch_bounds__(kBlock)
    sum_kernel(uint32_t tokens, const float* losses, const float* weights, float* sum) {
  wait_for_previous();
  __shared__ double parts[kBlock];
  double own = 0.0;
  for (uint32_t t = threadIdx.x; t < tokens; t += kBlock) {
    if (weights[t] != 0.0f) own += static_cast<double>(weights[t]) * losses[t];
  }
  parts[threadIdx.x] = own;
  for (int half = kBlock / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *sum = static_cast<float>(parts[0]);
}

size_t bytes_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

/// The head in x's type.
const void* dense_head(const Context& context, const WeightView& head, DType dtype) {
  const WeightFormat wanted = dtype == DType::f32    ? WeightFormat::f32
                              : dtype == DType::bf16 ? WeightFormat::bf16
                                                     : WeightFormat::f16;
  if (head.params.format == wanted) return head.data;
  void* dense = context.scratch->take(size_t{head.params.n} * head.params.k * bytes_of(dtype));
  dequantize(context, head, dtype, dense);
  return dense;
}

GemmGroup product(uint32_t m, uint32_t n, DType dtype, DType out_dtype, bool right_is_kn) {
  GemmGroup g;
  g.m = m;
  g.dtype = dtype;
  g.out_dtype = out_dtype;
  g.right_is_kn = right_is_kn;
  g.problems = 1;
  g.problem[0].n = n;
  g.problem[0].pairs = 1;
  return g;
}

template <typename T>
void run_rows(const Context& context, const Rows& rows, uint32_t count, bool held, T* apart) {
  const size_t row_bytes = rows.vocab * sizeof(float);
  if (!held) {
    launch_pdl(rows_kernel<T, false>, dim3(count), dim3(kBlock), 0, context.stream, rows, apart);
    return;
  }
  check(
      cudaFuncSetAttribute(
          rows_kernel<T, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRowBytes),
      "cross_entropy");
  launch_pdl(
      rows_kernel<T, true>, dim3(count), dim3(kBlock), row_bytes, context.stream, rows, apart);
}

}  // namespace

void linear_cross_entropy(
    const Context& context,
    const LinearCrossEntropyParams& p,
    const void* x,
    const WeightView& head,
    const int32_t* targets,
    const float* weights,
    float* loss_sum,
    void* dx,
    float* token_losses) {
  auto* losses = token_losses != nullptr ? token_losses
                                         : static_cast<float*>(context.scratch->take(
                                               std::max<size_t>(p.tokens, 1) * sizeof(float)));
  if (p.tokens > 0 && p.vocab > 0) {
    const void* dense = dense_head(context, head, p.dtype);
    const size_t most = std::max<size_t>(1, kLogitsBytes / (size_t{p.vocab} * sizeof(float)));
    const auto blocks = static_cast<uint32_t>((p.tokens + most - 1) / most);
    uint32_t rows = (p.tokens + blocks - 1) / blocks;
    if (rows > kRowMultiple) rows = (rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
    auto* logits = static_cast<float*>(
        context.scratch->take(size_t{std::min(rows, p.tokens)} * p.vocab * sizeof(float)));
    const bool held = p.vocab * sizeof(float) <= kRowBytes && context.capability >= 90;
    const size_t element = bytes_of(p.dtype);
    void* apart = held || dx == nullptr
                      ? nullptr
                      : context.scratch->take(size_t{std::min(rows, p.tokens)} * p.vocab * element);
    for (uint32_t first = 0; first < p.tokens; first += rows) {
      const uint32_t count = std::min(rows, p.tokens - first);
      GemmGroup forward = product(count, p.vocab, p.dtype, DType::f32, false);
      const void* block_x = static_cast<const char*>(x) + size_t{first} * p.dims * element;
      forward.problem[0].pair[0] = {block_x, p.dims, dense, p.dims, p.dims};
      forward.problem[0].out = logits;
      forward.problem[0].out_stride = p.vocab;
      gemm(context, forward);
      const Rows block{
          logits, p.vocab, targets + first, weights + first, losses + first, dx != nullptr};
      with_dtype(p.dtype, [&](auto t) {
        run_rows(context, block, count, held, static_cast<decltype(t)*>(apart));
      });
      if (dx == nullptr) continue;
      GemmGroup backward = product(count, p.dims, p.dtype, p.dtype, true);
      const size_t stride = held ? p.vocab * (sizeof(float) / element) : p.vocab;
      backward.problem[0].pair[0] = {held ? logits : apart, stride, dense, p.dims, p.vocab};
      backward.problem[0].out = static_cast<char*>(dx) + size_t{first} * p.dims * element;
      backward.problem[0].out_stride = p.dims;
      gemm(context, backward);
    }
  } else if (p.tokens > 0) {
    check(cudaMemsetAsync(losses, 0, p.tokens * sizeof(float), context.stream), "cross_entropy");
  }
  launch_pdl(
      sum_kernel, dim3(1), dim3(kBlock), 0, context.stream, p.tokens, losses, weights, loss_sum);
}

}  // namespace metal_lora::cuda
