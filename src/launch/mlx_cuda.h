// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// How CUDA kernels run inside MLX's evaluation. One binary serves MLX's CPU and CUDA wheels: what
// only the CUDA one has is looked up by name at run time. Includes no CUDA header.
#pragma once

#include <string>
#include <vector>

#include "src/launch/launch.h"

namespace metal_lora::mlx_cuda {

/// Whether CUDA kernels can run here: this build has them, MLX is its CUDA flavour of the exact
/// version, and there is a device that they are made for. Worked out once.
struct Availability {
  bool available = false;
  std::string why, hint;  ///< where not
};
const Availability& availability();

/// Whether MLX is its CUDA flavour, whatever this build has.
bool mlx_has_cuda();

struct Gpu {
  std::string name;
  int capability = 0;  ///< 10·major + minor
  int multiprocessors = 0;
  size_t memory_bytes = 0;
};
/// Devices that CUDA finds; none in a build without CUDA kernels.
std::vector<Gpu> gpus();
/// "sm_80 sm_90 sm_90a compute_90"; empty in a build without CUDA kernels.
std::string kernel_architectures();

/// Launch::cuda as a node of the graph that MLX builds for the stream: what it launches is captured
/// and becomes a child graph. Outputs and scratch come from the device memory pool.
void evaluate(
    mlx::core::Stream stream,
    std::shared_ptr<const Launch> launch,
    const Arrays& inputs,
    Arrays& outputs);

}  // namespace metal_lora::mlx_cuda
