// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/ops/metal_ops.h"

#include "metal_lora/error.h"
#include "src/launch/backend.h"
#include "src/launch/metal.h"
#include "src/ops/entries.h"

namespace mx = mlx::core;

namespace metal_lora::ops {

mx::StreamOrDevice stream() {
  return backend_stream(active_backend());
}

mx::array kernel_array(const mx::array& a) {
  if (!runs_metal_kernels(active_backend()) && a.is_available() && a.flags().row_contiguous)
    return a;
  auto settled = mx::contiguous(a, false, stream());
  if (!runs_metal_kernels(active_backend())) settled.eval();
  return settled;
}

}  // namespace metal_lora::ops

namespace metal_lora::ops::metal_ops {

void bind_weight(NamedArrays& arrays, const Weight& weight) {
  constexpr const char* kNames[] = {"w", "scales", "biases"};
  const auto parts = weight.arrays();
  for (size_t i = 0; i < parts.size(); ++i) arrays.insert_or_assign(kNames[i], parts[i]);
}

void run_plans(
    const std::vector<metal::Plan>& plans, NamedArrays& arrays, const NamedOutputs& outputs) {
  for (const auto& plan : plans) {
    const auto find = [&](const auto& table, const std::string& name) -> const auto& {
      const auto found = table.find(name);
      if (found == table.end()) {
        throw Error(
            ErrorCode::internal,
            std::string("[") + plan.entry->name + "] has no array named " + name);
      }
      return found->second;
    };
    Arrays in;
    for (const auto& name : plan.entry->inputs) {
      if (name != "p") in.push_back(find(arrays, name));
    }
    std::vector<OutputSpec> specs;
    for (const auto& name : plan.entry->outputs) specs.push_back(find(outputs, name));
    auto out = metal_dispatch(plan, in, specs);
    for (size_t i = 0; i < out.size(); ++i) {
      arrays.insert_or_assign(plan.entry->outputs[i], out[i]);
    }
  }
}

void refuse_plan(const char* op, const std::exception& why) {
  throw Error(
      ErrorCode::unsupported,
      std::string("[") + op + "] the Metal kernels do not take this: " + why.what(),
      "METAL_LORA_BACKEND=cpu takes ranks up to 1024 and arrays of any size");
}

}  // namespace metal_lora::ops::metal_ops
