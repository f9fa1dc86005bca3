// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include <mlx/ops.h>

#include "kernels/cpu/transformer_kernels.h"
#include "kernels/metal/plans_train.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/export.h"
#include "src/ops/metal_ops.h"
#include "src/ops/mlx_ops.h"
#ifdef METAL_LORA_CUDA
#include "kernels/cuda/transformer_kernels.h"
#endif

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

LinearCrossEntropyParams checked_params(
    const char* op, const mx::array& x, const Weight& head, const mx::array& targets) {
  check_shape(op, "x", x, {-1, head.in_features()});
  check_shape(op, "targets", targets, {x.shape(0)});
  check_dtype(op, "targets", targets, mx::int32);
  LinearCrossEntropyParams p;
  p.tokens = static_cast<uint32_t>(x.shape(0));
  p.dims = static_cast<uint32_t>(x.shape(1));
  p.vocab = head.params().n;
  p.dtype = to_kernel(x.dtype());
  return p;
}

/// Of tokens that count: the kernel indexes the logits with them.
void check_targets(
    const char* op,
    const LinearCrossEntropyParams& p,
    std::span<const int32_t> targets,
    std::span<const float> weights) {
  for (size_t i = 0; i < std::min(targets.size(), weights.size()); ++i) {
    if (weights[i] != 0.0f && static_cast<uint32_t>(targets[i]) >= p.vocab) {
      refuse(
          op,
          fmt::format("targets[{}]", i),
          fmt::format("in [0, {})", p.vocab),
          std::to_string(targets[i]));
    }
  }
}

}  // namespace

mx::array linear_cross_entropy(
    const mx::array& x,
    const Weight& head,
    const mx::array& targets,
    const mx::array& weights,
    bool needs_grad) {
  constexpr const char* kOp = "linear_cross_entropy";
  const auto p = checked_params(kOp, x, head, targets);
  check_shape(kOp, "weights", weights, {x.shape(0)});
  check_dtype(kOp, "weights", weights, mx::float32);
  check_targets(
      kOp,
      p,
      metal_ops::values_at_hand<int32_t>(targets),
      metal_ops::values_at_hand<float>(weights));
  const auto call = [=](auto views, auto entry, const KernelArgs& args) {
    entry(
        p,
        args.in[0],
        views.weight(head),
        static_cast<const int32_t*>(args.in[1]),
        static_cast<const float*>(args.in[2]),
        static_cast<float*>(args.out[0]),
        needs_grad ? args.out[1] : nullptr,
        nullptr);
  };
  Launch forward{
      .kernel = kOp,
      .inputs = {x, targets, weights},
      .outputs = {{{}, mx::float32}},
      .cpu =
          [=](const KernelArgs& args) {
            const auto* target = static_cast<const int32_t*>(args.in[1]);
            const auto* weight = static_cast<const float*>(args.in[2]);
            check_targets(kOp, p, {target, p.tokens}, {weight, p.tokens});
            call(CpuViews{}, cpu::linear_cross_entropy, args);
          },
      .cuda = METAL_LORA_ON_CUDA(call, linear_cross_entropy),
      .mlx =
          [head](const Arrays& in, mx::StreamOrDevice s) {
            // A token that does not count may hold anything: no NaN of its reaches the sum or dx.
            auto counts = mx::not_equal(in[2], mx::array(0.0f), s);
            auto x =
                mx::where(mx::expand_dims(counts, 1, s), in[0], mx::zeros({}, in[0].dtype(), s), s);
            auto losses = with_mlx::token_losses(x, head, in[1], s);
            auto weights = mx::stop_gradient(in[2], s);
            auto counted = mx::where(counts, mx::multiply(weights, losses, s), mx::array(0.0f), s);
            return Arrays{mx::sum(counted, s)};
          },
      .reference =
          [head, needs_grad](const Arrays& in) {
            Arrays out{reference::linear_cross_entropy(in[0], head, in[1], in[2])};
            if (needs_grad) out.push_back(mx::zeros_like(in[0]));
            return out;
          },
      .may_throw = true};
  if (needs_grad) {
    forward.outputs.push_back({x.shape(), x.dtype()});
    forward.vjp = [](const Arrays&,
                     const Arrays& cotangents,
                     const std::vector<int>& argnums,
                     const Arrays& outputs) {
      Arrays result;
      for (int i : argnums) {
        if (i != 0) refuse("linear_cross_entropy", "the differentiated input", "x", "another");
        result.push_back(mx::astype(mx::multiply(cotangents[0], outputs[1]), outputs[1].dtype()));
      }
      return result;
    };
  }
  return launch(std::move(forward))[0];
}

mx::array token_losses(const mx::array& x, const Weight& head, const mx::array& targets) {
  constexpr const char* kOp = "token_losses";
  const auto p = checked_params(kOp, x, head, targets);
  const auto known = metal_ops::values_at_hand<int32_t>(targets);
  check_targets(kOp, p, known, std::vector<float>(known.size(), 1.0f));
  const auto call = [=](auto views, auto entry, const KernelArgs& args) {
    entry(
        p,
        args.in[0],
        views.weight(head),
        static_cast<const int32_t*>(args.in[1]),
        static_cast<const float*>(args.in[2]),
        static_cast<float*>(args.out[1]),
        nullptr,
        static_cast<float*>(args.out[0]));
  };
  return launch(
      {.kernel = kOp,
       .inputs = {x, targets, mx::ones({x.shape(0)}, mx::float32, stream())},
       .outputs = {{{x.shape(0)}, mx::float32}, {{}, mx::float32}},
       .cpu =
           [=](const KernelArgs& args) {
             const auto* target = static_cast<const int32_t*>(args.in[1]);
             const auto* ones = static_cast<const float*>(args.in[2]);
             check_targets(kOp, p, {target, p.tokens}, {ones, p.tokens});
             call(CpuViews{}, cpu::linear_cross_entropy, args);
           },
       .cuda = METAL_LORA_ON_CUDA(call, linear_cross_entropy),
       .mlx =
           [head](const Arrays& in, mx::StreamOrDevice s) {
             return Arrays{with_mlx::token_losses(in[0], head, in[1], s)};
           },
       .may_throw = true})[0];
}

Arrays adamw_metal(const Arrays& in, const mx::array& factors) {
  metal_ops::NamedArrays arrays{
      {"param", in[0]}, {"grad", in[1]}, {"m", in[2]}, {"v", in[3]}, {"h", factors}};
  const uint64_t count = in[0].size();
  const mx::Shape shape = in[0].shape();
  metal_ops::run_plans(
      metal_ops::planned("adamw", metal::plan_adamw, count),
      arrays,
      {{"partial", {{static_cast<int>(metal::adamw_partials(count)), 3}, mx::float32}},
       {"new_param", {shape, mx::float32}},
       {"new_m", {shape, mx::float32}},
       {"new_v", {shape, mx::float32}},
       {"grad_norm", {{1}, mx::float32}},
       {"skipped", {{1}, mx::int32}}});
  return {
      arrays.at("new_param"),
      arrays.at("new_m"),
      arrays.at("new_v"),
      mx::squeeze(arrays.at("grad_norm"), 0, stream()),
      mx::squeeze(arrays.at("skipped"), 0, stream())};
}

AdamWOutput adamw(
    const mx::array& param,
    const mx::array& grad,
    const mx::array& m,
    const mx::array& v,
    AdamWParams params) {
  constexpr const char* kOp = "adamw";
  check_shape(kOp, "param", param, {-1});
  const auto check_buffer = [&](const char* name, const mx::array& a) {
    check_shape(kOp, name, a, {param.shape(0)});
    check_dtype(kOp, name, a, mx::float32);
  };
  check_buffer("param", param);
  check_buffer("grad", grad);
  check_buffer("m", m);
  check_buffer("v", v);
  params.count = param.size();
  const auto call = [params](auto, auto entry, const KernelArgs& args) {
    entry(
        params,
        static_cast<float*>(args.out[0]),
        static_cast<const float*>(args.in[1]),
        static_cast<float*>(args.out[1]),
        static_cast<float*>(args.out[2]),
        static_cast<float*>(args.out[3]),
        static_cast<int32_t*>(args.out[4]));
  };
  auto out = launch(
      {.kernel = kOp,
       .inputs = {param, grad, m, v},
       .outputs =
           {{param.shape(), mx::float32, 0},
            {m.shape(), mx::float32, 2},
            {v.shape(), mx::float32, 3},
            {{}, mx::float32},
            {{}, mx::int32}},
       .cpu =
           [call](const KernelArgs& args) {
             const auto entry = [](const AdamWParams& params,
                                   float* param,
                                   const float* grad,
                                   float* m,
                                   float* v,
                                   float* grad_norm,
                                   int32_t* skipped) {
               const auto result = cpu::adamw(params, param, grad, m, v);
               *grad_norm = result.grad_norm;
               *skipped = result.skipped ? 1 : 0;
             };
             call(CpuViews{}, entry, args);
           },
       .cuda = METAL_LORA_ON_CUDA(call, adamw),
       .metal =
           [params](const Arrays& in, mx::StreamOrDevice) {
             const auto factors = metal::adamw_factors(params);
             return adamw_metal(
                 in, mx::array(factors.begin(), {static_cast<int>(factors.size())}, mx::float32));
           }});
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace metal_lora::ops
