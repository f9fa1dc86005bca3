// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Copies between strides, all of a product's in one launch: a warp a row, an element a lane, since
// odd rows begin anywhere. Bound by memory.
#include "kernels/cuda/gemm_stage.h"

#include <algorithm>

#include "kernels/cuda/gemm_tiles.cuh"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint32_t kUnroll = 8;

template <typename T>
__device__ __forceinline__ void copy_rows(const StageJob& job) {
  const uint32_t lane = threadIdx.x % 32;
  for (uint32_t row = blockIdx.x * kWarps + threadIdx.x / 32; row < job.rows;
       row += gridDim.x * kWarps) {
    const T* from = static_cast<const T*>(job.from) + row * job.from_stride;
    T* to = static_cast<T*>(job.to) + row * job.to_stride;
    for (uint32_t first = lane; first < job.columns; first += 32 * kUnroll) {
      T v[kUnroll];
#pragma unroll
      for (uint32_t i = 0; i < kUnroll; ++i) {
        if (first + i * 32 < job.columns) v[i] = from[first + i * 32];
      }
#pragma unroll
      for (uint32_t i = 0; i < kUnroll; ++i) {
        if (first + i * 32 < job.columns) to[first + i * 32] = v[i];
      }
    }
  }
}

/// grid (blocks, jobs)
__global__ void __launch_bounds__(kThreads) stage_kernel(const __grid_constant__ StageCall call) {
  const StageJob& job = call.job[blockIdx.y];
  job.element_bytes == 2 ? copy_rows<uint16_t>(job) : copy_rows<uint32_t>(job);
}

bool is_vector(const void* p, size_t stride) {
  return is_aligned(p, 16) && stride % 8 == 0;
}

/// The smallest side from which a copy of an operand pays: each of its elements is then used so
/// often at 59 instead of 370 TFLOP/s or more (H100) that 4 bytes at 1.5 TB/s are less.
constexpr uint32_t kLeastSide = 128;
/// The same of a result that the Hopper form would store.
constexpr uint32_t kLeastInner = 2048;

class Stager {
 public:
  Stager(const Context& context, const GemmGroup& group) : context_(context) {
    staging_.group = group;
  }
  void stage_pairs() {
    GemmGroup& g = staging_.group;
    for (int i = 0; i < g.problems; ++i) {
      GemmProblem& problem = g.problem[i];
      for (int p = 0; p < problem.pairs; ++p) {
        GemmPair& pair = problem.pair[p];
        const uint32_t rows = g.right_is_kn ? pair.k : problem.n;
        stage(pair.left, pair.left_stride, g.m, pair.k);
        stage(pair.right, pair.right_stride, rows, g.right_is_kn ? problem.n : pair.k);
      }
    }
  }
  void stage_results() {
    GemmGroup& g = staging_.group;
    const uint32_t bytes = g.out_dtype == DType::f32 ? 4 : 2;
    for (int i = 0; i < g.problems; ++i) {
      GemmProblem& problem = g.problem[i];
      if (problem.n == 0) continue;
      if (problem.residual) stage(problem.residual, problem.residual_stride, g.m, problem.n, bytes);
      if (problem.bias && !is_aligned(problem.bias, 16)) {
        const void* bias = problem.bias;
        size_t stride = 1;  // never a vector: copied
        stage(bias, stride, 1, problem.n, 4);
        problem.bias = static_cast<const float*>(bias);
      }
      if (is_vector(problem.out, problem.out_stride)) continue;
      const size_t stride = padded(problem.n);
      void* to = context_.scratch->take(g.m * stride * bytes);
      staging_.out.job[staging_.out.jobs++] = {
          to, problem.out, stride, problem.out_stride, g.m, problem.n, bytes};
      problem.out = to;
      problem.out_stride = stride;
    }
  }
  const Staging& staging() const { return staging_; }

 private:
  static size_t padded(uint32_t columns) { return (columns + 7) / 8 * 8; }

  /// Replaces an operand that is not aligned by a copy; one copy for all who share it.
  void stage(
      const void*& data, size_t& stride, uint32_t rows, uint32_t columns, uint32_t bytes = 2) {
    if (is_vector(data, stride) || rows == 0 || columns == 0) return;
    StageCall& in = staging_.in;
    int same = 0;
    while (same < in.jobs && (in.job[same].from != data || in.job[same].from_stride != stride ||
                              in.job[same].columns != columns || in.job[same].rows != rows)) {
      ++same;
    }
    if (same == in.jobs) {
      const size_t to_stride = padded(columns);
      void* to = context_.scratch->take(rows * to_stride * bytes);
      in.job[in.jobs++] = {data, to, stride, to_stride, rows, columns, bytes};
    }
    data = in.job[same].to;
    stride = in.job[same].to_stride;
  }

  const Context& context_;
  Staging staging_;
};

}  // namespace

StagePlan plan_staging(const Context& context, const GemmGroup& group) {
  StagePlan plan;
  if (group.dtype == DType::f32 || !context.scratch || group.m < kLeastSide) return plan;
  bool aligned = true, aligned_result = true, large = true;
  int operands = 0;
  for (int i = 0; i < group.problems; ++i) {
    const GemmProblem& problem = group.problem[i];
    uint32_t inner = 0;
    for (int p = 0; p < problem.pairs; ++p) {
      const GemmPair& pair = problem.pair[p];
      inner += pair.k;
      aligned = aligned && is_vector(pair.left, pair.left_stride) &&
                is_vector(pair.right, pair.right_stride);
    }
    aligned_result = aligned_result && is_vector(problem.out, problem.out_stride) &&
                     is_vector(problem.residual, problem.residual_stride) &&
                     is_aligned(problem.bias, 16);
    operands += 2 * problem.pairs + 2;
    large = large && problem.n >= kLeastSide && inner >= (aligned ? kLeastInner : kLeastSide);
  }
  if (!large || operands > StageCall::kMaxJobs) return plan;
  plan.pairs = !aligned;
  plan.result = !aligned_result && context.capability == 90;
  return plan;
}

Staging make_staging(const Context& context, const GemmGroup& group, const StagePlan& plan) {
  Stager stager(context, group);
  if (plan.pairs) stager.stage_pairs();
  if (plan.result) stager.stage_results();
  return stager.staging();
}

void copy_staged(const Context& context, const StageCall& call) {
  uint32_t rows = 0;
  for (int i = 0; i < call.jobs; ++i) rows = std::max(rows, call.job[i].rows);
  if (rows == 0) return;
  const uint32_t blocks = std::min((rows + kWarps - 1) / kWarps, 2048u);
  stage_kernel<<<dim3(blocks, static_cast<unsigned>(call.jobs)), kThreads, 0, context.stream>>>(
      call);
  check_launch("gemm");
}

}  // namespace metal_lora::cuda
