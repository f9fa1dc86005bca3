// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Head and loss by blocks of tokens whose rows fit the scratch: a product, one kernel that turns
// each row into its loss and, in place, into its gradient, and the product back. Logits are never
// rounded: to bf16 they would be off by up to 2^-9 of their size, 0.03 for a logit of 16, a few
// percent of that token's gradient. Elsewhere than on Hopper they are f32. There the product's
// tiles end with exponentials in 16 bits, at most 2^-9 off, and the f32 sums that the loss is made
// of.
//
// bf16: exp(z − reference) with one reference a row, its target's logit, so that the row's sum is
// at least the target's 1. What a row of probabilities has in common, weight / sum, the product
// back multiplies its sums by; between the products only −onehot is put in. bf16 has f32's
// exponents, so this holds until a target's logit is some 69 below the largest (a sum of 1e30):
// then, decided on the device, the block is made again in the other way. f16, and then: exp(z −
// largest of the row in the tile); the second kernel scales each tile's columns, a read and a write
// of all rows.
//
// Ladder (4096 rows of 49,152, dims 2048, H100, µs: product, rows, product back):
//   f32 logits, a row read twice                                    1270, 850, 1160
//   a row held in one block's shared memory, phases in turn               756
//   of a cluster of four blocks                                     1295, 625, 1170
//   tiles end with their softmax; blocks of 2048 rows, not of 1024  1140, 287, 1010
//   one reference a row                                             1129, 27, 1004; and 16 for them
// The products are at 730 and 821 TFLOP/s. The next 10 %: theirs.
#include <cooperative_groups.h>

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_quantized.h"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr int kBlock = 512;
constexpr size_t kRowsBytes = size_t{256} << 20;
constexpr uint32_t kRowMultiple = 128;  ///< rows of a tile of the products
/// Blocks that hold a row together (Hopper), by its length: 56 KiB a block leave room for four.
constexpr uint32_t kHeldPerBlock = 14336;
constexpr uint32_t kClusters[] = {1, 4, 8};

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

/// f(i) for the starts of a thread's groups of neighbours in [begin, end).
template <typename F>
__device__ __forceinline__ void for_each_group(uint32_t begin, uint32_t end, F&& f) {
#pragma unroll 4
  for (uint32_t i = begin + threadIdx.x * kWidth; i < end; i += kBlock * kWidth) f(i);
}

/// weight·(softmax − onehot) of [begin, end), from the logits that `at` gives.
template <typename T, typename At>
__device__ void write_gradient(
    T* out,
    uint32_t begin,
    uint32_t end,
    bool whole,
    float weight,
    float logsumexp,
    uint32_t target,
    At&& at) {
  for_each_group(begin, end, [&](uint32_t i) {
    struct alignas(kWidth * sizeof(T)) Part {
      T v[kWidth];
    } part;
#pragma unroll
    for (uint32_t j = 0; j < kWidth; ++j) {
      if (i + j >= end) continue;
      // A weight of 0 makes 0 of whatever the row holds.
      const float p = weight == 0.0f ? 0.0f : __expf(at(i + j) - logsumexp);
      part.v[j] = from_float<T>(weight * (p - (i + j == target ? 1.0f : 0.0f)));
      if (!whole) out[i + j] = part.v[j];
    }
    if (whole) *reinterpret_cast<Part*>(out + i) = part;
  });
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define METAL_LORA_HAS_CLUSTERS 1
#endif

/// A row for each cluster of kBlocks blocks, which hold it in shared memory meanwhile: read once.
/// The gradient takes the row's place as T, from its first byte on.
template <typename T, int kBlocks>
__global__ void __launch_bounds__(kBlock) held_kernel(const Rows a) {
#ifdef METAL_LORA_HAS_CLUSTERS
  namespace cg = cooperative_groups;
  extern __shared__ __align__(16) float held[];
  __shared__ Softmax own_part;
  allow_dependents();
  wait_for_previous();
  const auto cluster = cg::this_cluster();
  const uint32_t token = blockIdx.x / kBlocks, rank = blockIdx.x % kBlocks;
  const uint32_t per_block = (a.vocab + kBlocks * kWidth - 1) / (kBlocks * kWidth) * kWidth;
  const uint32_t begin = min(a.vocab, rank * per_block), end = min(a.vocab, begin + per_block);
  const bool whole = a.vocab % kWidth == 0;
  const float* row = a.logits + size_t{token} * a.vocab;
  const float weight = a.weights[token];
  const auto target = static_cast<uint32_t>(a.targets[token]);
  Softmax own = {-INFINITY, 0.0f};
  for_each_group(begin, end, [&](uint32_t i) {
    if (whole) {
      const float4 v = *reinterpret_cast<const float4*>(row + i);
      *reinterpret_cast<float4*>(held + (i - begin)) = v;
      own.largest = fmaxf(fmaxf(own.largest, fmaxf(v.x, v.y)), fmaxf(v.z, v.w));
      return;
    }
    for (uint32_t j = i; j < min(i + kWidth, end); ++j) {
      held[j - begin] = row[j];
      own.largest = fmaxf(own.largest, row[j]);
    }
  });
  for_each_group(begin, end, [&](uint32_t i) {
    for (uint32_t j = i; j < min(i + kWidth, end); ++j) {
      if (own.largest != -INFINITY) own.sum += __expf(held[j - begin] - own.largest);
    }
  });
  own = block_softmax(own);
  if (threadIdx.x == 0) own_part = own;
  cluster.sync();  // everybody has read the row, too
  Softmax all = *cluster.map_shared_rank(&own_part, 0);
  for (int i = 1; i < kBlocks; ++i) all = merged(all, *cluster.map_shared_rank(&own_part, i));
  const float logsumexp = all.largest + logf(all.sum);
  if (threadIdx.x == 0 && weight == 0.0f && rank == 0) a.losses[token] = 0.0f;
  if (threadIdx.x == 0 && weight != 0.0f && target >= begin && target < end) {
    a.losses[token] = logsumexp - held[target - begin];
  }
  if (a.gradient) {
    write_gradient(
        reinterpret_cast<T*>(a.logits + size_t{token} * a.vocab),
        begin,
        end,
        whole,
        weight,
        logsumexp,
        target,
        [&](uint32_t i) { return held[i - begin]; });
  }
  cluster.sync();  // no block leaves while another reads its part
#endif
}

/// A row a block, read twice; the gradient goes to `apart` [rows, vocab].
template <typename T>
__global__ void __launch_bounds__(kBlock) twice_kernel(const Rows a, T* apart) {
  wait_for_previous();
  const float* row = a.logits + size_t{blockIdx.x} * a.vocab;
  const float weight = a.weights[blockIdx.x];
  const auto target = static_cast<uint32_t>(a.targets[blockIdx.x]);
  Softmax own = {-INFINITY, 0.0f};
  for (uint32_t i = threadIdx.x; i < a.vocab; i += kBlock) own = merged(own, {row[i], 1.0f});
  const Softmax all = block_softmax(own);
  const float logsumexp = all.largest + logf(all.sum);
  if (threadIdx.x == 0) {
    a.losses[blockIdx.x] = weight == 0.0f ? 0.0f : logsumexp - row[target];
  }
  if (!a.gradient) return;
  write_gradient(
      apart + size_t{blockIdx.x} * a.vocab,
      0,
      a.vocab,
      a.vocab % kWidth == 0,
      weight,
      logsumexp,
      target,
      [&](uint32_t i) { return row[i]; });
}

/// Rows of a product that ended with GemmEnd::softmax or exponential.
struct TiledRows {
  void* rows;  ///< [count, vocab] exponentials; null: no gradient
  uint32_t count, vocab;
  float* tiles;
  float* target_logits;
  const int32_t* targets;
  const float* weights;
  float* losses;            ///< unweighted; 0 where the weight is
  const float* references;  ///< exponential: [count]
  float* factors;           ///< exponential: [count], of the rows in the product back
  uint32_t* overflows;      ///< exponential: whether some row's sum is no number to go on with
};

/// A warp a token: x·W_target, so that exp(z − reference) of the target is about 1 and a row's sum
/// no less; +∞ where the weight is 0.
__global__ void __launch_bounds__(kBlock) reference_kernel(
    LinearCrossEntropyParams p,
    const bf16* x,
    const bf16* head,
    const int32_t* targets,
    const float* weights,
    float* references,
    uint32_t* overflows,
    uint32_t blocks) {
  constexpr uint32_t kEach = Vec16<bf16>::kCount;
  allow_dependents();
  wait_for_previous();
  const uint32_t token = blockIdx.x * (kBlock / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (blockIdx.x == 0) {
    for (uint32_t i = threadIdx.x; i < blocks; i += kBlock) overflows[i] = 0;
  }
  if (token >= p.tokens) return;
  const bool counts = weights[token] != 0.0f;
  const auto target = static_cast<uint32_t>(targets[token]);
  float sum = 0.0f;
  if (counts && target < p.vocab) {
    const bf16* left = x + size_t{token} * p.dims;
    const bf16* right = head + size_t{target} * p.dims;
#pragma unroll 4
    for (uint32_t i = lane * kEach; i < p.dims; i += 32 * kEach) {
      const Vec16<bf16> a = load16(left + i), b = load16(right + i);
#pragma unroll
      for (uint32_t j = 0; j < kEach; ++j) sum = fmaf(to_float(a.v[j]), to_float(b.v[j]), sum);
    }
    sum = warp_sum(sum);
  }
  if (lane == 0) references[token] = counts ? sum : INFINITY;
}

/// A larger sum, or none, is made again by tiles: the product back adds up to it times W.
constexpr float kMostSum = 1e30f;

/// A warp a row: its loss, what the product back multiplies it by, and −onehot, in the units of the
/// row's exponentials.
__global__ void __launch_bounds__(kBlock) exponential_kernel(const TiledRows a) {
  allow_dependents();
  wait_for_previous();
  const uint32_t row = blockIdx.x * (kBlock / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= a.count) return;
  const uint32_t tiles = (a.vocab + kGemmSoftmaxColumns - 1) / kGemmSoftmaxColumns;
  float sum = 0.0f;
  for (uint32_t t = lane; t < tiles; t += 32) sum += a.tiles[size_t{row} * tiles + t];
  sum = warp_sum(sum);
  if (lane != 0) return;
  if (a.weights[row] == 0.0f) {
    a.losses[row] = a.factors[row] = 0.0f;
    return;
  }
  if (!(sum <= kMostSum)) {
    *a.overflows = 1;
    return;
  }
  const float above = a.target_logits[row] - a.references[row];
  a.losses[row] = logf(sum) - above;
  a.factors[row] = a.weights[row] / sum;
  const auto target = static_cast<uint32_t>(a.targets[row]);
  if (a.rows != nullptr && target < a.vocab) {
    // The exponential as the product's end made it: what is left where it is nearly all of the sum
    // is the others' part.
    static_cast<bf16*>(a.rows)[size_t{row} * a.vocab + target] =
        from_float<bf16>(exp2_fast(kLog2e * above) - sum);
  }
}

/// A row a block, of exp(z − largest in the tile): its loss, and weight·(softmax − onehot) in
/// place.
template <typename T>
__global__ void __launch_bounds__(kBlock, 3) tiled_kernel(const TiledRows a) {
  constexpr uint32_t kColumns = kGemmSoftmaxColumns, kEach = Vec16<T>::kCount;
  extern __shared__ float factors[];  // [tiles]
  allow_dependents();
  wait_for_previous();
  if (a.overflows != nullptr && *a.overflows == 0) return;
  const uint32_t tiles = (a.vocab + kColumns - 1) / kColumns, token = blockIdx.x;
  const float2* of_row = reinterpret_cast<const float2*>(a.tiles) + size_t{token} * tiles;
  const float weight = a.weights[token];
  Softmax own = {-INFINITY, 0.0f};
  for (uint32_t t = threadIdx.x; t < tiles; t += kBlock) {
    const float2 tile = of_row[t];
    own = merged(own, {tile.x, tile.y});
  }
  const Softmax all = block_softmax(own);
  const float logsumexp = all.largest + logf(all.sum);
  if (threadIdx.x == 0) {
    a.losses[token] = weight == 0.0f ? 0.0f : logsumexp - a.target_logits[token];
    if (a.factors != nullptr) a.factors[token] = 1.0f;
  }
  if (a.rows == nullptr) return;
  for (uint32_t t = threadIdx.x; t < tiles; t += kBlock) {
    factors[t] = weight * __expf(of_row[t].x - logsumexp);
  }
  __syncthreads();
  T* row = static_cast<T*>(a.rows) + size_t{token} * a.vocab;
  const auto target = static_cast<uint32_t>(a.targets[token]);
#pragma unroll 4
  for (uint32_t i = threadIdx.x * kEach; i < a.vocab; i += kBlock * kEach) {
    Vec16<T> v = load16(row + i);
    const float factor = factors[i / kColumns];
#pragma unroll
    for (uint32_t j = 0; j < kEach; ++j) {
      const float one = i + j == target ? weight : 0.0f;
      // A weight of 0 makes 0 of whatever the row holds.
      v.v[j] = from_float<T>(weight == 0.0f ? 0.0f : to_float(v.v[j]) * factor - one);
    }
    store16(row + i, v);
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

/// Blocks that hold a row of the vocabulary together; 0: none do.
uint32_t cluster_of(const Context& context, uint32_t vocab) {
  if (context.capability < 90) return 0;
  for (uint32_t blocks : kClusters) {
    if (vocab <= blocks * kHeldPerBlock) return blocks;
  }
  return 0;
}

template <typename T, int kBlocks>
void run_held(const Context& context, const Rows& rows, uint32_t count) {
  const size_t bytes =
      ((rows.vocab + kBlocks * kWidth - 1) / (kBlocks * kWidth)) * kWidth * sizeof(float);
  const auto kernel = held_kernel<T, kBlocks>;
  check(
      cudaFuncSetAttribute(
          kernel,
          cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(kHeldPerBlock * sizeof(float))),
      "cross_entropy");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(count * kBlocks);
  config.blockDim = dim3(kBlock);
  config.dynamicSmemBytes = bytes;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = kBlocks;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, rows), "cross_entropy");
}

template <typename T>
void run_rows(
    const Context& context, const Rows& rows, uint32_t count, uint32_t cluster, T* apart) {
  switch (cluster) {
    case 1:
      return run_held<T, 1>(context, rows, count);
    case 4:
      return run_held<T, 4>(context, rows, count);
    case 8:
      return run_held<T, 8>(context, rows, count);
    default:
      launch_pdl(twice_kernel<T>, dim3(count), dim3(kBlock), 0, context.stream, rows, apart);
  }
}

/// The blocks of tokens of one call.
class Loss {
 public:
  Loss(
      const Context& context,
      const LinearCrossEntropyParams& p,
      const void* x,
      const void* head,
      const int32_t* targets,
      const float* weights,
      float* losses,
      void* dx)
      : context_(context),
        p_(p),
        x_(x),
        head_(head),
        targets_(targets),
        weights_(weights),
        losses_(losses),
        dx_(dx),
        element_(bytes_of(p.dtype)) {}

  void run() {
    if (ends_with_softmax()) {
      by_tiles();
    } else {
      by_logits();
    }
  }

 private:
  struct Block {
    uint32_t first, count;
  };
  template <typename F>
  void for_each_block(uint32_t rows, F&& f) const {
    for (uint32_t first = 0; first < p_.tokens; first += rows) {
      f(Block{first, std::min(rows, p_.tokens - first)});
    }
  }
  /// Of blocks of about equal size whose rows of `row_bytes` each fit.
  uint32_t rows_of_block(size_t row_bytes) const {
    const size_t most = std::max<size_t>(1, kRowsBytes / row_bytes);
    const auto blocks = static_cast<uint32_t>((p_.tokens + most - 1) / most);
    uint32_t rows = (p_.tokens + blocks - 1) / blocks;
    if (rows > kRowMultiple) rows = (rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
    return std::min(rows, p_.tokens);
  }
  template <typename T = void>
  T* take(size_t bytes) const {
    return static_cast<T*>(context_.scratch->take(bytes));
  }

  GemmGroup forward(Block block, DType out_dtype, void* out) const {
    GemmGroup g = product(block.count, p_.vocab, p_.dtype, out_dtype, false);
    const void* x = static_cast<const char*>(x_) + size_t{block.first} * p_.dims * element_;
    g.problem[0].pair[0] = {x, p_.dims, head_, p_.dims, p_.dims};
    g.problem[0].out = out;
    g.problem[0].out_stride = p_.vocab;
    return g;
  }
  void backward(
      Block block, const void* gradient, size_t stride, const float* row_factors = nullptr) const {
    GemmGroup g = product(block.count, p_.dims, p_.dtype, p_.dtype, true);
    g.problem[0].pair[0] = {gradient, stride, head_, p_.dims, p_.vocab};
    g.problem[0].out = static_cast<char*>(dx_) + size_t{block.first} * p_.dims * element_;
    g.problem[0].out_stride = p_.dims;
    g.problem[0].row_factors = row_factors;
    gemm(context_, g);
  }

  /// Whether the product takes GemmEnd::softmax; what it points to is only looked at for alignment.
  bool ends_with_softmax() const {
    GemmGroup g = forward({0, p_.tokens}, p_.dtype, nullptr);
    g.end = GemmEnd::softmax;
    g.softmax = {losses_, targets_, losses_};
    return can_gemm_sm90(context_, g) && (dx_ == nullptr || p_.dims % 8 == 0);
  }

  /// One reference a row where the exponentials' type holds what f32 does: they stay as the
  /// product's end made them. Otherwise the tile's largest, and one more read and write of them.
  void by_tiles() const {
    const bool by_reference = p_.dtype == DType::bf16;
    const uint32_t tiles = (p_.vocab + kGemmSoftmaxColumns - 1) / kGemmSoftmaxColumns;
    const uint32_t rows = rows_of_block(p_.vocab * element_);
    TiledRows all = {};
    all.vocab = p_.vocab;
    all.rows = dx_ == nullptr ? nullptr : take(size_t{rows} * p_.vocab * element_);
    all.tiles = take<float>(size_t{rows} * tiles * 2 * sizeof(float));
    all.target_logits = take<float>(rows * sizeof(float));
    if (by_reference) make_references(rows, all);
    for_each_block(rows, [&](Block block) {
      TiledRows a = all;
      a.count = block.count;
      a.targets = targets_ + block.first;
      a.weights = weights_ + block.first;
      a.losses = losses_ + block.first;
      if (by_reference) {
        a.references += block.first;
        a.overflows += block.first / rows;
        forward_with(GemmEnd::exponential, block, a);
        const uint32_t blocks = (a.count + kBlock / 32 - 1) / (kBlock / 32);
        launch_pdl(exponential_kernel, dim3(blocks), dim3(kBlock), 0, context_.stream, a);
      }
      forward_with(GemmEnd::softmax, block, a);
      const auto kernel = by_reference ? tiled_kernel<bf16> : tiled_kernel<f16>;
      const size_t shared = tiles * sizeof(float);
      launch_pdl(kernel, dim3(a.count), dim3(kBlock), shared, context_.stream, a);
      if (dx_ != nullptr) backward(block, a.rows, p_.vocab, a.factors);
    });
  }
  void make_references(uint32_t rows, TiledRows& a) const {
    const uint32_t blocks = (p_.tokens + rows - 1) / rows;
    auto* references = take<float>(p_.tokens * sizeof(float));
    a.references = references;
    a.factors = take<float>(rows * sizeof(float));
    a.overflows = take<uint32_t>(blocks * sizeof(uint32_t));
    launch_pdl(
        reference_kernel,
        dim3((p_.tokens + kBlock / 32 - 1) / (kBlock / 32)),
        dim3(kBlock),
        0,
        context_.stream,
        p_,
        static_cast<const bf16*>(x_),
        static_cast<const bf16*>(head_),
        targets_,
        weights_,
        references,
        a.overflows,
        blocks);
  }
  void forward_with(GemmEnd end, Block block, const TiledRows& a) const {
    GemmGroup g = forward(block, p_.dtype, a.rows);
    g.end = end;
    g.softmax = {a.tiles, a.targets, a.target_logits, a.references};
    if (end == GemmEnd::softmax) g.softmax.only_if = a.overflows;
    gemm(context_, g);
  }

  void by_logits() const {
    const uint32_t rows = rows_of_block(size_t{p_.vocab} * sizeof(float));
    auto* logits = take<float>(size_t{rows} * p_.vocab * sizeof(float));
    const uint32_t cluster = cluster_of(context_, p_.vocab);
    const bool held = cluster != 0;
    void* apart = held || dx_ == nullptr ? nullptr : take(size_t{rows} * p_.vocab * element_);
    for_each_block(rows, [&](Block block) {
      gemm(context_, forward(block, DType::f32, logits));
      const Rows a{
          logits,
          p_.vocab,
          targets_ + block.first,
          weights_ + block.first,
          losses_ + block.first,
          dx_ != nullptr};
      with_dtype(p_.dtype, [&](auto t) {
        run_rows(context_, a, block.count, cluster, static_cast<decltype(t)*>(apart));
      });
      if (dx_ == nullptr) return;
      const size_t stride = held ? p_.vocab * (sizeof(float) / element_) : p_.vocab;
      backward(block, held ? logits : apart, stride);
    });
  }

  const Context& context_;
  const LinearCrossEntropyParams& p_;
  const void* x_;
  const void* head_;
  const int32_t* targets_;
  const float* weights_;
  float* losses_;
  void* dx_;
  size_t element_;
};

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
    Loss loss{context, p, x, dense_head(context, head, p.dtype), targets, weights, losses, dx};
    loss.run();
  } else if (p.tokens > 0) {
    check(cudaMemsetAsync(losses, 0, p.tokens * sizeof(float), context.stream), "cross_entropy");
  }
  launch_pdl(
      sum_kernel, dim3(1), dim3(kBlock), 0, context.stream, p.tokens, losses, weights, loss_sum);
}

}  // namespace metal_lora::cuda
