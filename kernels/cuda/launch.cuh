// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Programmatic dependent launch: a kernel may be placed on the device while the one before it still
// runs, and waits itself before it reads. What it hides is the launch, 2 to 4 µs of each small one.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/context.h"

namespace metal_lora::cuda {

/// Lets the next kernel of the stream be placed. Harmless where nothing depends.
__device__ __forceinline__ void allow_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Until the kernels before this one are done and their writes are seen. Every thread that writes
/// global memory, or reads what a kernel that may still run writes, comes here first.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Whether the current device knows such launches (compute capability 9.0); one device a process.
inline bool has_programmatic_launch() {
  static const bool has = [] {
    int device = 0, major = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "cudaDeviceGetAttribute");
    return major >= 9;
  }();
  return has;
}

/// kernel<<<grid, block, shared_bytes, stream>>>(args…) that may overlap with its predecessor; the
/// kernel calls wait_for_previous().
template <typename... Parameters, typename... Args>
void launch_pdl(
    void (*kernel)(Parameters...),
    dim3 grid,
    dim3 block,
    size_t shared_bytes,
    cudaStream_t stream,
    const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = has_programmatic_launch() ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...), "launch");
}

}  // namespace metal_lora::cuda
