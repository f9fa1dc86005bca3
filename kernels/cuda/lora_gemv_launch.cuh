// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernel around lora_gemv_stream.cuh's class, and its launch.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_gemv_stream.cuh"

namespace metal_lora::cuda::gemv {

/// Blocks of a multiprocessor at most: what registers there are.
constexpr uint32_t most_resident(uint32_t tokens) {
  return tokens <= 8 ? 3 : 2;
}

template <class Format, uint32_t kTokens>
__global__ void __launch_bounds__(kThreads, most_resident(kTokens))
    stream_kernel(const __grid_constant__ Call call) {
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
  constexpr uint32_t kMostResident = most_resident(kTokens);
  const uint32_t available = shared_of_multiprocessor(context);
  const auto resident = [&] {
    return std::min(kMostResident, available / (make_layout<Format>(call).bytes + kStatic));
  };
  // x stays where that costs no block its place.
  const uint32_t most = resident();
  call.x_stays = true;
  if (resident() < most) call.x_stays = false;
  if (resident() == 0) return false;
  if (call.only_ask) return true;
  const uint32_t places = resident() * static_cast<uint32_t>(context.multiprocessors);
  const uint32_t rounds = (call.all_tiles + places - 1) / places;
  const uint32_t blocks = (call.all_tiles + rounds - 1) / rounds;
  const uint32_t bytes = make_layout<Format>(call).bytes;
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
  launch_pdl(kernel, dim3(blocks), dim3(kThreads), bytes, context.stream, call);
  return true;
}

template <class Format>
bool launch_tokens(const Context& context, const Call& call) {
  return call.m <= 8 ? launch_stream<Format, 8>(context, call)
                     : launch_stream<Format, 16>(context, call);
}

}  // namespace metal_lora::cuda::gemv
