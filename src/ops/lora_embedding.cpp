// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <mlx/ops.h>

#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/weight_view.h"

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

constexpr const char* kOp = "lora_embedding";

LoraParams checked_lora(const Lora& lora, const Weight& table) {
  check_shape(kOp, "A", lora.a, {-1, table.out_features()});
  check_shape(kOp, "B", lora.b, {table.in_features(), lora.a.shape(0)});
  check_dtype(kOp, "B", lora.b, lora.a.dtype());
  LoraParams p;
  p.rank = static_cast<uint32_t>(lora.a.shape(0));
  p.scale = lora.scale;
  p.dtype = to_kernel(lora.a.dtype());
  return p;
}

void check_ids(const int32_t* ids, uint32_t tokens, uint32_t vocab) {
  for (uint32_t i = 0; i < tokens; ++i) {
    if (static_cast<uint32_t>(ids[i]) >= vocab) {
      refuse(
          kOp, fmt::format("ids[{}]", i), fmt::format("in [0, {})", vocab), std::to_string(ids[i]));
    }
  }
}

}  // namespace

mx::array lora_embedding(const mx::array& ids, const LoraLinear& table, mx::Dtype dtype) {
  check_shape(kOp, "ids", ids, {-1});
  check_dtype(kOp, "ids", ids, mx::int32);
  const auto tokens = static_cast<uint32_t>(ids.shape(0));
  const Weight weight = table.weight;
  const LoraParams lora = table.lora ? checked_lora(*table.lora, weight) : LoraParams{};
  const DType kernel_dtype = to_kernel(dtype);

  Launch forward{
      .kernel = kOp,
      .inputs = {ids},
      .outputs = {{{ids.shape(0), weight.in_features()}, dtype}},
      .cpu =
          [=](const KernelArgs& args) {
            const auto* id = static_cast<const int32_t*>(args.in[0]);
            check_ids(id, tokens, weight.params().n);
            cpu::LoraView view{lora, nullptr, nullptr};
            if (lora.rank > 0) view = {lora, args.in[1], args.in[2]};
            cpu::lora_embedding_forward(
                tokens, kernel_dtype, id, weight_view(weight), view, args.out[0]);
          },
      .may_throw = true};
  if (table.lora) {
    forward.inputs.push_back(table.lora->a);
    forward.inputs.push_back(table.lora->b);
    forward.vjp = [=](const Arrays& primals,
                      const Arrays& cotangents,
                      const std::vector<int>& argnums,
                      const Arrays&) {
      auto grads = launch(
          {.kernel = "lora_embedding_backward",
           .inputs = {primals[0], primals[1], primals[2], cotangents[0]},
           .outputs = {{primals[1].shape(), mx::float32}, {primals[2].shape(), mx::float32}},
           .cpu = [=](const KernelArgs& args) {
             cpu::lora_embedding_backward(
                 tokens,
                 kernel_dtype,
                 static_cast<const int32_t*>(args.in[0]),
                 weight.params(),
                 {lora, args.in[1], args.in[2]},
                 args.in[3],
                 static_cast<float*>(args.out[0]),
                 static_cast<float*>(args.out[1]));
           }});
      Arrays result;
      for (int i : argnums) {
        if (i == 0) refuse(kOp, "the differentiated input", "A or B", "ids");
        result.push_back(mx::astype(grads[i - 1], primals[i].dtype()));
      }
      return result;
    };
  }
  return launch(std::move(forward))[0];
}

}  // namespace metal_lora::ops
