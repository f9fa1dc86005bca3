// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <mlx/ops.h>

#include "kernels/metal/plans_train.h"
#include "src/ops/lora_linear_group.h"
#include "src/ops/metal_ops.h"

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

constexpr const char* kOp = "lora_linear";

metal::LoraShape shape_of(const Group& group, const Branch& branch) {
  const auto& w = branch.weight.params();
  metal::LoraShape shape;
  shape.m = group.tokens;
  shape.n = w.n;
  shape.k = w.k;
  metal_ops::describe_weight(shape, w);
  shape.rank = branch.lora.rank;
  shape.scale = branch.lora.scale;
  shape.dtype = group.dtype;
  shape.lora_dtype = branch.lora.dtype;
  shape.has_bias = branch.bias.has_value();
  shape.dropout = branch.lora.dropout;
  shape.dropout_seed = branch.lora.dropout_seed;
  shape.wants_u = branch.has_lora();
  return shape;
}

int as_int(uint32_t value) {
  return static_cast<int>(value);
}

}  // namespace

Arrays lora_linear_metal(const Group& group, const Arrays& inputs) {
  Arrays outputs;
  size_t in = 1;
  for (const auto& branch : group.branches) {
    const auto shape = shape_of(group, branch);
    metal_ops::NamedArrays arrays{{"x", inputs[0]}};
    metal_ops::bind_weight(arrays, branch.weight);
    if (branch.bias) arrays.insert_or_assign("bias", *branch.bias);
    if (branch.has_lora()) {
      arrays.insert_or_assign("a", inputs[in++]);
      arrays.insert_or_assign("b", inputs[in++]);
    }
    const int tokens = as_int(shape.m);
    metal_ops::run_plans(
        metal_ops::planned(kOp, metal::plan_lora_forward, shape),
        arrays,
        {{"y", {{tokens, as_int(shape.n)}, to_mlx(group.dtype)}},
         {"u", {{tokens, as_int(shape.rank)}, mx::float32}}});
    outputs.push_back(arrays.at("y"));
    if (branch.has_lora()) outputs.push_back(arrays.at("u"));
  }
  return outputs;
}

Arrays lora_linear_backward_metal(
    const Group& group, const Wanted& wanted, const Arrays& inputs, mx::StreamOrDevice s) {
  std::optional<mx::array> dx;
  Arrays adapter_gradients;
  size_t in = 1;
  for (size_t i = 0; i < group.branches.size(); ++i) {
    const auto& branch = group.branches[i];
    const auto shape = shape_of(group, branch);
    const int tokens = as_int(shape.m), rank = as_int(shape.rank);
    metal_ops::NamedArrays arrays{{"x", inputs[0]}, {"dy", inputs[in++]}};
    metal_ops::bind_weight(arrays, branch.weight);
    if (branch.has_lora()) {
      arrays.insert_or_assign("a", inputs[in++]);
      arrays.insert_or_assign("b", inputs[in++]);
      arrays.insert_or_assign("u", inputs[in++]);
    }
    const metal_ops::NamedOutputs outputs{
        {"dx", {{tokens, as_int(shape.k)}, to_mlx(group.dtype)}},
        {"v", {{tokens, rank}, mx::float32}},
        {"da", {{rank, as_int(shape.k)}, mx::float32}},
        {"db", {{as_int(shape.n), rank}, mx::float32}}};
    const auto run = [&](const std::vector<metal::Plan>& plans) {
      metal_ops::run_plans(plans, arrays, outputs);
    };
    if (wanted.dx) {
      run(metal_ops::planned(kOp, metal::plan_lora_dx, shape));
      const auto& part = arrays.at("dx");
      dx = dx ? mx::add(*dx, part, s) : part;
    }
    if (!wanted.adapter[i]) continue;
    if (!wanted.dx) run({metal_ops::planned(kOp, metal::plan_lora_shrink_dx, shape)});
    const metal::LoraGradShape grad{
        shape.m,
        shape.n,
        shape.k,
        shape.rank,
        shape.scale,
        shape.dtype,
        shape.dropout,
        shape.dropout_seed};
    run({metal_ops::planned(kOp, metal::plan_lora_grad, grad)});
    adapter_gradients.push_back(arrays.at("da"));
    adapter_gradients.push_back(arrays.at("db"));
  }
  Arrays result;
  if (dx) result.push_back(*dx);
  result.insert(result.end(), adapter_gradients.begin(), adapter_gradients.end());
  return result;
}

}  // namespace metal_lora::ops
