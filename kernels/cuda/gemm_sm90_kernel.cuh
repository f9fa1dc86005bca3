// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The kernel of gemm_sm90.cu: who produces and who consumes.
#pragma once

#include "kernels/cuda/gemm_sm90_turns.cuh"

namespace metal_lora::cuda::sm90 {

template <typename T, int kTileN, bool kRightIsKn, End kEnd>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kTurns = kEnd != End::plain;
  using L = Layout<kTileN, kTurns>;
  extern __shared__ uint8_t raw[];
  const uint32_t shared = (shared_address(raw) + 1023) & ~1023u;
  const uint32_t full = shared + L::kBarrierOffset;
  const uint32_t empty = full + 8 * L::kStages;
  const Cluster cluster(args);
  if (threadIdx.x == 0) {
    dependents_launch();
    // A stage is free when each warp of every block that shares a part of it has said so.
    const uint32_t readers = __popc(cluster.row_mask | cluster.column_mask) * (kTurns ? 4 : 8);
    for (int i = 0; i < L::kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, readers);
    }
    barrier_init_fence();
  } else if (threadIdx.x >= 32 && threadIdx.x < 32 + args.map_count) {
    tensor_map_prefetch(&args.maps[threadIdx.x - 32]);
  }
  __syncthreads();
  if (cluster.blocks > 1) cluster_sync_relaxed();
  // Broadcast: the compiler must know that whole warps take a branch, or it orders wgmma one by
  // one.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int role = warp / 4;
  if (role == 0) {
    registers_shrink<40>();
    if (threadIdx.x == 0) {
      produce<kTileN, kRightIsKn, kEnd>(args, cluster, shared, full, empty);
    }
    __syncwarp();
    if (cluster.parts_k > 1) {  // the consumers' add_parts
      cluster_sync_relaxed();
      cluster_sync();
    }
  } else {
    registers_grow<232>();
    if constexpr (kTurns) {
      consume_in_turns<T, kRightIsKn, kEnd>(args, cluster, shared, full, empty, warp - 4);
    } else {
      consume<T, kTileN, kRightIsKn>(args, cluster, shared, full, empty, warp - 4);
    }
  }
#endif
}

}  // namespace metal_lora::cuda::sm90
