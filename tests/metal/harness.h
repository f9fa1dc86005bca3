// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Runs plans of kernels/metal on the emulator from MLX arrays. The text is what MLX itself
// generated; any finding (race, bounds, uninitialised read, …) throws out of run().
#pragma once

#include <span>
#include <utility>
#include <vector>

#include <mlx/mlx.h>

#include "src/launch/backend.h"
#include "src/launch/emulated.h"
#include "src/ops/metal_ops.h"

namespace metal_lora::test {

/// `arrays` by input name; `outputs` says shape and dtype of each output name. Returns all arrays
/// by name, evaluated, the outputs among them.
inline ops::metal_ops::NamedArrays run(
    const std::vector<metal::Plan>& plans,
    ops::metal_ops::NamedArrays arrays,
    const ops::metal_ops::NamedOutputs& outputs) {
  BackendScope scope(Backend::emulator);
  ops::metal_ops::run_plans(plans, arrays, outputs);
  for (const auto& [name, spec] : outputs) {
    const auto found = arrays.find(name);
    if (found != arrays.end()) found->second.eval();
  }
  return arrays;
}

/// The values of an f32, f16, bf16, or integer array.
inline std::vector<double> values(const mlx::core::array& a) {
  auto f = mlx::core::contiguous(mlx::core::astype(a, mlx::core::float32));
  f.eval();
  return {f.data<float>(), f.data<float>() + f.size()};
}

/// The values that `v` has once stored as `dtype`: references start from what the kernel reads.
inline mlx::core::array stored(
    const std::vector<float>& v, mlx::core::Shape shape, mlx::core::Dtype dtype) {
  auto a = mlx::core::astype(mlx::core::array(v.data(), std::move(shape)), dtype);
  a.eval();
  return a;
}

}  // namespace metal_lora::test
