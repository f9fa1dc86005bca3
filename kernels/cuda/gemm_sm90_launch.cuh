// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernels of one type. A launch that finds its instructions in no cache waits for them, 3 to
// 7 µs where kernels of 105 KB take turns (512 and 4096 tokens, H100): so each end that is common
// has a kernel of its own.
#pragma once

#include <stdexcept>

#include "kernels/cuda/gemm_sm90.cuh"
#include "kernels/cuda/gemm_sm90_launch.h"

namespace metal_lora::cuda::sm90 {

template <typename T, int kTileN, bool kRightIsKn, GemmEnd kEnd, bool kSplits = false>
void launch(const Context& context, const Args& args) {
  const auto kernel = gemm_kernel<T, kTileN, kRightIsKn, kEnd, kSplits>;
  constexpr int kBytes = Layout<kTileN, kEnd>::kBytes;
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "gemm_sm90");
  const uint32_t blocks = args.cluster_m * args.cluster_n * args.cluster_k;
  cudaLaunchConfig_t config = {};
  config.gridDim = args.clusters * blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = context.stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = blocks;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes;
  config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, args), "gemm_sm90");
  check_launch("gemm_sm90");
}

template <typename T, bool kRightIsKn, GemmEnd kEnd>
void launch_width(const Context& context, int tile_n, const Args& args) {
  switch (tile_n) {
    case 256:
      return launch<T, 256, kRightIsKn, kEnd>(context, args);
    case 192:
      return launch<T, 192, kRightIsKn, kEnd>(context, args);
    case 176:
      if constexpr (kEnd == GemmEnd::store) return launch<T, 176, kRightIsKn, kEnd>(context, args);
      throw std::logic_error("[gemm_sm90] tiles of 176 columns have no terms");
    case 128:
      return launch<T, 128, kRightIsKn, kEnd>(context, args);
    default:
      return launch<T, 64, kRightIsKn, kEnd>(context, args);
  }
}

template <typename T, bool kRightIsKn, GemmEnd kEnd>
void launch_split(const Context& context, int tile_n, const Args& args) {
  tile_n == 256 ? launch<T, 256, kRightIsKn, kEnd, true>(context, args)
                : launch<T, 128, kRightIsKn, kEnd, true>(context, args);
}

template <typename T, bool kRightIsKn>
void launch_end(const Context& context, const Kernel& kernel, const Args& args) {
  if (args.cluster_k > 1) {
    return kernel.end == GemmEnd::store
               ? launch_split<T, kRightIsKn, GemmEnd::store>(context, kernel.tile_n, args)
               : launch_split<T, kRightIsKn, GemmEnd::plain>(context, kernel.tile_n, args);
  }
  constexpr GemmEnd kSwiglu = kRightIsKn ? GemmEnd::swiglu_backward : GemmEnd::swiglu;
  switch (kernel.end) {
    case kSwiglu:
      return launch<T, end_width(kSwiglu), kRightIsKn, kSwiglu>(context, args);
    case GemmEnd::residual:
      return launch<T, 128, kRightIsKn, GemmEnd::residual>(context, args);
    case GemmEnd::store:
      return launch_width<T, kRightIsKn, GemmEnd::store>(context, kernel.tile_n, args);
    case GemmEnd::terms:
      return launch_width<T, kRightIsKn, GemmEnd::terms>(context, kernel.tile_n, args);
    default:
      break;
  }
  if constexpr (!kRightIsKn) {
    constexpr GemmEnd kSoftmax = GemmEnd::softmax, kExponential = GemmEnd::exponential;
    if (kernel.end == kSoftmax) {
      return launch<T, end_width(kSoftmax), false, kSoftmax>(context, args);
    }
    if constexpr (std::is_same_v<T, bf16>) {
      if (kernel.end == kExponential) {
        return launch<T, end_width(kExponential), false, kExponential>(context, args);
      }
    }
  }
  launch_width<T, kRightIsKn, GemmEnd::plain>(context, kernel.tile_n, args);
}

template <typename T>
void launch_kernel(const Context& context, const Kernel& kernel, const Args& args) {
  kernel.right_is_kn ? launch_end<T, true>(context, kernel, args)
                     : launch_end<T, false>(context, kernel, args);
}

}  // namespace metal_lora::cuda::sm90
