// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Metal kernels as graph nodes. On a Mac a node is MLX's own custom kernel, compiled on the device.
// For the emulator MLX records the very text, grid and threadgroup that it would hand to Apple's
// compiler, and the node runs that.
#pragma once

#include <string>
#include <vector>

#include "kernels/metal/plans.h"
#include "src/launch/launch.h"

namespace metal_lora {

/// One dispatch of `plan`; inputs as the entry names them (without `p`, which comes from the plan).
/// On the active backend, which must run Metal kernels.
Arrays metal_dispatch(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs);

/// What MLX would send to a Metal device for one dispatch.
struct RecordedKernel {
  struct Buffer {
    enum class Kind { input, shape, strides, ndim, output };
    Kind kind;
    size_t of;  ///< index of the input or output; the plan's `p` is the last input
  };
  std::string name;             ///< of the function
  std::string text;             ///< complete, but for MLX's preamble
  std::vector<Buffer> buffers;  ///< by [[buffer(index)]]
  metal::Dim3 threads_per_grid, threads_per_threadgroup;
};
/// Records through mx::export_function; needs no GPU. Only shapes and types of the inputs matter.
RecordedKernel record_metal_kernel(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs);
/// The same for inputs that end with the plan's `p`.
RecordedKernel record_with_params(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs);

/// Takes the nodes that only carry gradients out of a finished graph (they pass their inputs
/// through), so that mx::export_function can write it.
void strip_gradient_nodes(Arrays& outputs);

}  // namespace metal_lora
