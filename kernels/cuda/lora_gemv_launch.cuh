// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernel around lora_gemv_stream.cuh's class, and its launch: which cluster, how many.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_gemv_stream.cuh"

namespace metal_lora::cuda::gemv {

template <class Format, uint32_t kTokens>
__global__ void __launch_bounds__(
    kThreads,
    kTokens <= 8    ? 3
    : kTokens <= 16 ? 2
                    : 1) stream_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(16) char shared[];
  uint32_t table = 0;
  const float* codes = nullptr;
  allow_dependents();
  if constexpr (Format::kNf4) {
    __shared__ __align__(16) uint32_t pairs[256 * kTableCopies];
    using T = typename Format::Storage;
    // Thread i makes entry i (low code first) and writes all copies, starting at its own banks.
    const T lo = from_float<T>(nf4_level(threadIdx.x % 16));
    const T hi = from_float<T>(nf4_level(threadIdx.x / 16));
    const uint32_t both = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&lo)) |
                          static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&hi)) << 16;
    auto* copies = reinterpret_cast<uint4*>(pairs + threadIdx.x * kTableCopies);
#pragma unroll
    for (uint32_t i = 0; i < kTableCopies / 4; ++i) {
      copies[(i + threadIdx.x / 2) % (kTableCopies / 4)] = make_uint4(both, both, both, both);
    }
    table = mma::shared_address(pairs);
  }
  if constexpr (Format::kDouble) {
    __shared__ float nested[kMaxBranches * kNf4NestedHead];
    codes = nested;
  }
  Stream<Format, kTokens> stream(call, mma::shared_address(shared), codes, table);
  stream.prefetch();
  stream.begin();
  wait_for_previous();
  if constexpr (Format::kDouble) {
    for (uint32_t i = threadIdx.x; i < call.branches * kNf4NestedHead; i += kThreads) {
      const uint32_t branch = i / kNf4NestedHead;
      const_cast<float*>(codes)[i] =
          reinterpret_cast<const float*>(call.branch[branch].biases)[i - branch * kNf4NestedHead];
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
  constexpr uint32_t kStatic = (Format::kNf4 ? kTableBytes : 0) +
                               (Format::kDouble ? kMaxBranches * kNf4NestedHead * 4 : 0) + 1024;
  constexpr uint32_t kMostResident = 4;
  const uint32_t available = shared_of_multiprocessor(context);
  // The cluster that gives a warp the least to do. Clusters lie within a group of 16 or 18
  // multiprocessors, so that 1/11 (of eights) or 1/16 (of fours) of the blocks find no place.
  uint32_t best = 0, clusters = 0, bytes = 0;
  double least = 0.0;
  for (uint32_t log2 = 0; log2 <= (context.capability >= 90 ? 3u : 0u); ++log2) {
    const uint32_t blocks = 1u << log2;
    if (blocks > call.units) break;
    call.slice_chunks = (call.units + blocks - 1) / blocks * call.unit;
    const uint32_t size = make_layout<Format, kTokens>(call).bytes;
    if (size + kStatic > available) continue;
    const uint32_t resident = std::min(kMostResident, available / (size + kStatic));
    const double share = blocks == 8 ? 10.0 / 11 : blocks == 4 ? 15.0 / 16 : 1.0;
    const auto most = static_cast<uint32_t>(share * context.multiprocessors * resident / blocks);
    const uint32_t rounds = (call.passes + most - 1) / std::max(most, 1u);
    const double work = static_cast<double>(rounds) / blocks;
    if (bytes != 0 && work >= least) continue;
    least = work;
    best = log2;
    bytes = size;
    clusters = (call.passes + rounds - 1) / rounds;
  }
  if (bytes == 0) return false;
  if (call.only_ask) return true;
  const uint32_t blocks = 1u << best;
  call.blocks_log2 = best;
  call.slice_chunks = (call.units + blocks - 1) / blocks * call.unit;
  call.weights_ready = context.weights_ready;
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
