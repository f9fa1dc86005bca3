// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <mlx/ops.h>

#include "kernels/metal/plans_train.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/metal_ops.h"

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

void check_ids(std::span<const int32_t> ids, uint32_t vocab) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (static_cast<uint32_t>(ids[i]) >= vocab) {
      refuse(
          kOp, fmt::format("ids[{}]", i), fmt::format("in [0, {})", vocab), std::to_string(ids[i]));
    }
  }
}

metal::LoraEmbeddingShape metal_shape(
    uint32_t tokens, DType dtype, const WeightParams& table, const LoraParams& lora) {
  metal::LoraEmbeddingShape shape;
  shape.tokens = tokens;
  shape.vocab = table.n;
  shape.dims = table.k;
  metal_ops::describe_weight(shape, table);
  shape.rank = lora.rank;
  shape.scale = lora.scale;
  shape.dtype = dtype;
  shape.lora_dtype = lora.dtype;
  return shape;
}

/// in: ids, then A and B if there is an adapter; out: y. Rows of ids outside the table are zero.
Arrays forward_metal(
    const metal::LoraEmbeddingShape& shape, const Weight& weight, const Arrays& in) {
  metal_ops::NamedArrays arrays{{"ids", in[0]}};
  metal_ops::bind_weight(arrays, weight);
  if (shape.rank > 0) {
    arrays.insert_or_assign("a", in[1]);
    arrays.insert_or_assign("b", in[2]);
  }
  const mx::Shape y{static_cast<int>(shape.tokens), static_cast<int>(shape.dims)};
  metal_ops::run_plans(
      {metal_ops::planned(kOp, metal::plan_lora_embedding, shape)},
      arrays,
      {{"y", {y, to_mlx(shape.dtype)}}});
  return {arrays.at("y")};
}

/// in: ids, A, B, dy; out: dA, dB.
Arrays backward_metal(const metal::LoraEmbeddingShape& shape, const Arrays& in) {
  metal_ops::NamedArrays arrays{{"ids", in[0]}, {"a", in[1]}, {"b", in[2]}, {"dy", in[3]}};
  metal_ops::run_plans(
      {metal_ops::planned(kOp, metal::plan_lora_embedding_grad, shape)},
      arrays,
      {{"da", {in[1].shape(), mx::float32}}, {"db", {in[2].shape(), mx::float32}}});
  return {arrays.at("da"), arrays.at("db")};
}

}  // namespace

mx::array lora_embedding(const mx::array& ids, const LoraLinear& table, mx::Dtype dtype) {
  check_shape(kOp, "ids", ids, {-1});
  check_dtype(kOp, "ids", ids, mx::int32);
  const auto tokens = static_cast<uint32_t>(ids.shape(0));
  const Weight weight = table.weight;
  const LoraParams lora = table.lora ? checked_lora(*table.lora, weight) : LoraParams{};
  const DType kernel_dtype = to_kernel(dtype);
  check_ids(metal_ops::values_at_hand<int32_t>(ids), weight.params().n);

  const auto call = [=](auto views, auto entry, const KernelArgs& args) {
    typename decltype(views)::LoraView view{lora, nullptr, nullptr};
    if (lora.rank > 0) view = {lora, args.in[1], args.in[2]};
    const auto* id = static_cast<const int32_t*>(args.in[0]);
    entry(tokens, kernel_dtype, id, views.weight(weight), view, args.out[0]);
  };
  Launch forward{
      .kernel = kOp,
      .inputs = {ids},
      .outputs = {{{ids.shape(0), weight.in_features()}, dtype}},
      .cpu =
          [=](const KernelArgs& args) {
            check_ids({static_cast<const int32_t*>(args.in[0]), tokens}, weight.params().n);
            call(CpuViews{}, cpu::lora_embedding_forward, args);
          },
      .cuda = METAL_LORA_ON_CUDA(call, lora_embedding_forward),
      .metal =
          [=](const Arrays& in, mx::StreamOrDevice) {
            return forward_metal(
                metal_shape(tokens, kernel_dtype, weight.params(), lora), weight, in);
          },
      .not_differentiable = {0},
      .may_throw = true};
  if (table.lora) {
    forward.inputs.push_back(table.lora->a);
    forward.inputs.push_back(table.lora->b);
    forward.vjp = [=](const Arrays& primals,
                      const Arrays& cotangents,
                      const std::vector<int>& argnums,
                      const Arrays&) {
      const auto call = [=](auto views, auto entry, const KernelArgs& args) {
        const typename decltype(views)::LoraView view{lora, args.in[1], args.in[2]};
        entry(
            tokens,
            kernel_dtype,
            static_cast<const int32_t*>(args.in[0]),
            weight.params(),
            view,
            args.in[3],
            static_cast<float*>(args.out[0]),
            static_cast<float*>(args.out[1]));
      };
      auto grads = launch(
          {.kernel = "lora_embedding_backward",
           .inputs = {primals[0], primals[1], primals[2], cotangents[0]},
           .outputs = {{primals[1].shape(), mx::float32}, {primals[2].shape(), mx::float32}},
           .cpu = on_cpu(call, cpu::lora_embedding_backward),
           .cuda = METAL_LORA_ON_CUDA(call, lora_embedding_backward),
           .metal = [=](const Arrays& in, mx::StreamOrDevice) {
             return backward_metal(metal_shape(tokens, kernel_dtype, weight.params(), lora), in);
           }});
      Arrays result;
      for (int i : argnums) {
        if (i == 0) refuse(kOp, "the differentiated input", "A or B", "ids");
        result.push_back(mx::astype(grads[i - 1], primals[i].dtype(), stream()));
      }
      return result;
    };
  }
  return launch(std::move(forward))[0];
}

}  // namespace metal_lora::ops
