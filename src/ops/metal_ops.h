// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// From an op's shapes to dispatches of Metal kernels: binds arrays to the names that kernels use.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <mlx/ops.h>

#include "kernels/metal/plans.h"
#include "metal_lora/ops.h"
#include "src/launch/backend.h"
#include "src/launch/device_memory.h"
#include "src/launch/launch.h"

namespace metal_lora::ops::metal_ops {

using NamedArrays = std::map<std::string, mlx::core::array, std::less<>>;
using NamedOutputs = std::map<std::string, OutputSpec, std::less<>>;

/// Adds a weight's arrays under the names w, scales and biases, as its format has them.
void bind_weight(NamedArrays& arrays, const Weight& weight);

/// Says in a plan's shape how a weight is stored.
template <class Shape>
void describe_weight(Shape& shape, const WeightParams& weight) {
  shape.format = weight.format;
  shape.group_size = weight.group_size;
  shape.scales_dtype = weight.scales_dtype;
  shape.double_quant = weight.double_quant;
}

/// Runs the plans in order. Each takes its inputs from `arrays` by name and leaves its outputs
/// there, shaped as `outputs` says. A name that is missing is an Error internal.
void run_plans(
    const std::vector<metal::Plan>& plans, NamedArrays& arrays, const NamedOutputs& outputs);

/// Values that a GPU's kernel cannot refuse, for checking before it runs: those of an int32 or f32
/// row-contiguous array that is at hand, and in memory that the host reads. Empty for one that is
/// still to be computed (there the kernel does what its op says of bad values) and on the CPU,
/// whose kernels check.
template <class T>
std::vector<T> values_at_hand(const mlx::core::array& a);

/// Calls a planner; what no kernel does (std::invalid_argument) becomes Error unsupported "[op] …".
template <class Planner, class Shape>
auto planned(const char* op, Planner planner, const Shape& shape) -> decltype(planner(shape));

template <class T>
std::vector<T> values_at_hand(const mlx::core::array& a) {
  if (active_backend() == Backend::cpu || !a.is_available()) return {};
  if (!a.flags().row_contiguous || !on_host(a)) return {};
  return {a.data<T>(), a.data<T>() + a.size()};
}

[[noreturn]] void refuse_plan(const char* op, const std::exception& why);

template <class Planner, class Shape>
auto planned(const char* op, Planner planner, const Shape& shape) -> decltype(planner(shape)) {
  try {
    return planner(shape);
  } catch (const std::invalid_argument& why) {
    refuse_plan(op, why);
  }
}

}  // namespace metal_lora::ops::metal_ops
