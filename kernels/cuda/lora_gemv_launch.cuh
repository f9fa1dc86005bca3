// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernels around the classes of lora_gemv_direct.cuh and lora_gemv_stream.cuh, and their launch.
#pragma once

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_gemv_direct.cuh"
#include "kernels/cuda/lora_gemv_single.cuh"
#include "kernels/cuda/lora_gemv_stream.cuh"

namespace metal_lora::cuda::gemv {

/// Blocks of a multiprocessor at most: what registers there are.
constexpr uint32_t most_resident(uint32_t tokens) {
  return tokens <= 8 ? 3 : 2;
}

/// All copies of the table of NF4's pairs.
template <typename T, uint32_t kCopies = kTableCopies>
__device__ __forceinline__ void fill_table(uint32_t* pairs) {
  // Thread i makes entry i (low code first) and writes all copies, starting at its own banks.
  const T lo = from_float<T>(nf4_level(threadIdx.x % 16));
  const T hi = from_float<T>(nf4_level(threadIdx.x / 16));
  const uint32_t both = static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&lo)) |
                        static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&hi)) << 16;
  auto* copies = reinterpret_cast<uint4*>(pairs + threadIdx.x * kCopies);
  const uint32_t from = kCopies == 32 ? threadIdx.x : threadIdx.x / 2;
#pragma unroll
  for (uint32_t i = 0; i < kCopies / 4; ++i) {
    copies[(i + from) % (kCopies / 4)] = make_uint4(both, both, both, both);
  }
}

inline constexpr uint32_t kDirectResident = 2;

template <class Format, uint32_t kParts, bool kStays>
__global__ void __launch_bounds__(kThreads, kDirectResident)
    direct_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(16) char shared[];
  uint32_t table = 0;
  allow_dependents();
  if constexpr (Format::kTable) {
    __shared__ __align__(16) uint32_t pairs[256 * kTableCopies];
    table = mma::shared_address(pairs);
    fill_table<typename Format::T>(pairs);
  }
  Direct<Format, kParts, kStays> direct(call, mma::shared_address(shared), table);
  direct.begin();
  wait_for_previous();
  direct.run();
}

inline constexpr uint32_t kSingleResident = 3;

template <class Format>
__global__ void __launch_bounds__(kThreads, kSingleResident)
    single_kernel(const __grid_constant__ Call call, uint32_t b_bytes) {
  extern __shared__ __align__(128) char shared[];
  uint32_t ring = mma::shared_address(shared), table = 0;
  allow_dependents();
  if constexpr (Format::kTable) {
    constexpr uint32_t kBytes = 256 * Format::kCopies * 4;
    table = ring;
    ring += kBytes;
  }
  Single<Format> single(call, ring, b_bytes, table);
  single.begin();
  if constexpr (Format::kTable) {
    fill_table<typename Format::T, Format::kCopies>(reinterpret_cast<uint32_t*>(shared));
    __syncthreads();
  }
  wait_for_previous();
  single.run();
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
    fill_table<typename Format::Storage>(pairs);
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

/// The grid of a kernel that has `resident` blocks on a multiprocessor, and its launch.
template <typename Kernel>
void launch_blocks(
    const Context& context, Kernel kernel, uint32_t resident, uint32_t bytes, Call call) {
  const uint32_t places = resident * static_cast<uint32_t>(context.multiprocessors);
  const uint32_t rounds = (call.all_tiles + places - 1) / places;
  const uint32_t blocks = (call.all_tiles + rounds - 1) / rounds;
  call.weights_ready = context.weights_ready;
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "lora_gemv's shared memory");
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "lora_gemv's shared memory");
  launch_pdl(kernel, dim3(blocks), dim3(kThreads), bytes, context.stream, call);
}

/// Whether the direct form takes the call; launched unless only asked.
template <class Format, uint32_t kParts>
bool launch_direct(const Context& context, Call call) {
  if (call.k % kGroup != 0) return false;
  const uint32_t available = shared_of_multiprocessor(context) / kDirectResident -
                             (Format::kTable ? kTableBytes : 0) - 1024;
  const auto bytes = [&] {
    return direct_x_bytes(call) + direct_sums_bytes<Format>(call, kParts) +
           TileEnd<typename Format::T, kParts>::bytes(call);
  };
  call.x_stays = true;
  if (bytes() > available) call.x_stays = false;
  if (bytes() > available) return false;
  if (call.only_ask) return true;
  launch_blocks(
      context,
      call.x_stays ? direct_kernel<Format, kParts, true> : direct_kernel<Format, kParts, false>,
      kDirectResident,
      bytes(),
      call);
  return true;
}
template <class Format>
bool launch_direct(const Context& context, const Call& call) {
  return call.m <= 8 ? launch_direct<Format, 1>(context, call)
                     : launch_direct<Format, 2>(context, call);
}

/// The same of the form for one token: a block a tile, beside which those of the next launch fit.
template <class Format>
bool launch_single(const Context& context, Call call) {
  if (call.m != 1 || call.k % kGroup != 0) return false;
  const uint32_t b_bytes = single_b_bytes(call);
  const uint32_t bytes = (Format::kTable ? 256 * Format::kCopies * 4 : 0) + kRingBytes + b_bytes +
                         TileEnd<typename Format::T, 1>::bytes(call);
  if (bytes > shared_of_multiprocessor(context) / 2 - 1024) return false;
  if (call.only_ask) return true;
  call.weights_ready = context.weights_ready;
  const auto kernel = single_kernel<Format>;
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "lora_gemv's shared memory");
  check(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
      "lora_gemv's shared memory");
  launch_pdl(
      kernel, dim3(call.all_tiles), dim3(kThreads), bytes, context.stream, call, b_bytes);
  return true;
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
  launch_blocks(
      context,
      stream_kernel<Format, kTokens>,
      resident(),
      make_layout<Format>(call).bytes,
      call);
  return true;
}

template <class Format>
bool launch_tokens(const Context& context, const Call& call) {
  return call.m <= 8 ? launch_stream<Format, 8>(context, call)
                     : launch_stream<Format, 16>(context, call);
}

}  // namespace metal_lora::cuda::gemv
