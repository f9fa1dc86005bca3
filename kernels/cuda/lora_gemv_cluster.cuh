// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A cluster's barrier in its two halves, stores to other blocks' shared memory, and prefetches.
// Before compute capability 9.0 a cluster is one block.
#pragma once

#include <cstdint>

namespace metal_lora::cuda::gemv {

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#else
  __syncthreads();  // clusters of one block
#endif
}
/// The address of the same place in another block.
__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t block) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(block));
  return there;
#else
  return address;
#endif
}
__device__ __forceinline__ void push(uint32_t address, float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
#else
  asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(address), "f"(v) : "memory");
#endif
}
__device__ __forceinline__ void prefetch_l2(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(p), "r"(bytes) : "memory");
#endif
}

}  // namespace metal_lora::cuda::gemv
