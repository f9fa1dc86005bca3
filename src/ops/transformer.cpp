// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include <mlx/ops.h>

#include "kernels/cpu/transformer_kernels.h"
#include "metal_lora/ops.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/mlx_ops.h"

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/transformer_kernels.h"
#endif

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

NormParams checked_norm(const char* op, const mx::array& x, const mx::array& weight, float eps) {
  if (x.ndim() < 1) refuse(op, "x", "at least one-dimensional", shape_text(x));
  check_shape(op, "weight", weight, {x.shape(-1)});
  NormParams p;
  p.dims = static_cast<uint32_t>(x.shape(-1));
  p.rows = p.dims == 0 ? 0 : static_cast<uint32_t>(x.size() / p.dims);
  p.eps = eps;
  p.dtype = to_kernel(x.dtype());
  p.weight_dtype = to_kernel(weight.dtype());
  return p;
}

/// {dx, dweight}; dh is the gradient that reaches h beside the norm, or null.
Arrays norm_backward(
    const NormParams& p,
    const mx::array& h,
    const mx::array& weight,
    const mx::array& dy,
    const mx::array* dh,
    bool needs_weight) {
  const auto call = [p, has_dh = dh != nullptr, needs_weight](
                        auto, auto entry, const KernelArgs& args) {
    const void* dh = has_dh ? args.in[3] : nullptr;
    auto* dweight = needs_weight ? static_cast<float*>(args.out[1]) : nullptr;
    entry(p, args.in[0], args.in[1], args.in[2], dh, args.out[0], dweight);
  };
  Launch back{
      .kernel = "add_rms_norm_backward",
      .inputs = {h, weight, dy},
      .outputs = {{h.shape(), h.dtype()}},
      .cpu = on_cpu(call, cpu::add_rms_norm_backward),
      .cuda = METAL_LORA_ON_CUDA(call, add_rms_norm_backward)};
  if (dh != nullptr) back.inputs.push_back(*dh);
  if (needs_weight) back.outputs.push_back({weight.shape(), mx::float32});
  return launch(std::move(back));
}

bool contains(const std::vector<int>& list, int value) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

mx::array rope_launch(const mx::array& x, const mx::array& table, bool inverse) {
  RopeParams p;
  p.tokens = static_cast<uint32_t>(x.shape(0));
  p.heads = static_cast<uint32_t>(x.shape(1));
  p.head_dim = static_cast<uint32_t>(x.shape(2));
  p.dtype = to_kernel(x.dtype());
  p.inverse = inverse;
  const auto call = [p](auto, auto entry, const KernelArgs& args) {
    entry(p, args.in[0], static_cast<const float*>(args.in[1]), args.out[0]);
  };
  return launch(
      {.kernel = "rope",
       .inputs = {x, table},
       .outputs = {{x.shape(), x.dtype()}},
       .cpu = on_cpu(call, cpu::rope),
       .cuda = METAL_LORA_ON_CUDA(call, rope),
       .mlx = [](const Arrays& in,
                 mx::StreamOrDevice s) { return Arrays{with_mlx::rope(in[0], in[1], s)}; },
       .vjp =
           [inverse](
               const Arrays& primals,
               const Arrays& cotangents,
               const std::vector<int>& argnums,
               const Arrays&) {
             if (contains(argnums, 1)) refuse("rope", "the differentiated input", "x", "table");
             return Arrays{rope_launch(cotangents[0], primals[1], !inverse)};
           },
       .reference =
           [inverse](const Arrays& in) {
             auto table = in[1];
             if (inverse) {
               auto halves = mx::split(table, 2, -1);
               table = mx::concatenate({halves[0], mx::negative(halves[1])}, -1);
             }
             return Arrays{reference::rope(in[0], table)};
           }})[0];
}

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  const NormParams p = checked_norm("rms_norm", x, weight, eps);
  const auto call = [p](auto, auto entry, const KernelArgs& args) {
    entry(p, args.in[0], nullptr, args.in[1], nullptr, args.out[0]);
  };
  return launch(
      {.kernel = "rms_norm",
       .inputs = {x, weight},
       .outputs = {{x.shape(), x.dtype()}},
       .cpu = on_cpu(call, cpu::add_rms_norm_forward),
       .cuda = METAL_LORA_ON_CUDA(call, add_rms_norm_forward),
       .mlx =
           [eps](const Arrays& in, mx::StreamOrDevice s) {
             return Arrays{with_mlx::rms_norm(in[0], in[1], eps, s)};
           },
       .vjp =
           [p](const Arrays& primals,
               const Arrays& cotangents,
               const std::vector<int>& argnums,
               const Arrays&) {
             auto grads = norm_backward(
                 p, primals[0], primals[1], cotangents[0], nullptr, contains(argnums, 1));
             Arrays result;
             for (int i : argnums) result.push_back(mx::astype(grads[i], primals[i].dtype()));
             return result;
           },
       .reference =
           [eps](const Arrays& in) { return Arrays{reference::rms_norm(in[0], in[1], eps)}; }})[0];
}

std::pair<mx::array, mx::array> add_rms_norm(
    const mx::array& x, const mx::array& residual, const mx::array& weight, float eps) {
  constexpr const char* kOp = "add_rms_norm";
  const NormParams p = checked_norm(kOp, x, weight, eps);
  if (residual.shape() != x.shape()) refuse(kOp, "residual", shape_text(x), shape_text(residual));
  check_dtype(kOp, "residual", residual, x.dtype());
  const auto call = [p](auto, auto entry, const KernelArgs& args) {
    entry(p, args.in[0], args.in[1], args.in[2], args.out[0], args.out[1]);
  };
  auto outputs = launch(
      {.kernel = kOp,
       .inputs = {x, residual, weight},
       .outputs = {{x.shape(), x.dtype()}, {x.shape(), x.dtype()}},
       .cpu = on_cpu(call, cpu::add_rms_norm_forward),
       .cuda = METAL_LORA_ON_CUDA(call, add_rms_norm_forward),
       .mlx =
           [eps](const Arrays& in, mx::StreamOrDevice s) {
             auto h = mx::add(in[0], in[1], s);
             return Arrays{h, with_mlx::rms_norm(h, in[2], eps, s)};
           },
       .vjp =
           [p](const Arrays& primals,
               const Arrays& cotangents,
               const std::vector<int>& argnums,
               const Arrays& outputs) {
             auto grads = norm_backward(
                 p, outputs[0], primals[2], cotangents[1], &cotangents[0], contains(argnums, 2));
             Arrays result;
             for (int i : argnums) {
               result.push_back(i < 2 ? grads[0] : mx::astype(grads[1], primals[2].dtype()));
             }
             return result;
           },
       .reference =
           [eps](const Arrays& in) {
             auto h = mx::add(in[0], in[1]);
             return Arrays{h, reference::rms_norm(h, in[2], eps)};
           }});
  return {outputs[0], outputs[1]};
}

mx::array rope_table(const mx::array& positions, const mx::array& inv_freq, float factor) {
  constexpr const char* kOp = "rope_table";
  check_shape(kOp, "positions", positions, {-1});
  check_dtype(kOp, "positions", positions, mx::int32);
  check_shape(kOp, "inv_freq", inv_freq, {-1});
  check_dtype(kOp, "inv_freq", inv_freq, mx::float32);
  const int tokens = positions.shape(0), head_dim = 2 * inv_freq.shape(0);
  const auto call = [=](auto, auto entry, const KernelArgs& args) {
    entry(
        static_cast<uint32_t>(tokens),
        static_cast<uint32_t>(head_dim),
        static_cast<const int32_t*>(args.in[0]),
        static_cast<const float*>(args.in[1]),
        factor,
        static_cast<float*>(args.out[0]));
  };
  return launch(
      {.kernel = kOp,
       .inputs = {positions, inv_freq},
       .outputs = {{{tokens, head_dim}, mx::float32}},
       .cpu = on_cpu(call, cpu::rope_table),
       .cuda = METAL_LORA_ON_CUDA(call, rope_table),
       .mlx = [factor](const Arrays& in, mx::StreamOrDevice s) {
         return Arrays{with_mlx::rope_table(in[0], in[1], factor, s)};
       }})[0];
}

mx::array rope(const mx::array& x, const mx::array& table) {
  constexpr const char* kOp = "rope";
  check_shape(kOp, "x", x, {-1, -1, -1});
  if (x.shape(2) % 2 != 0) refuse(kOp, "head_dim", "even", std::to_string(x.shape(2)));
  check_shape(kOp, "table", table, {x.shape(0), x.shape(2)});
  check_dtype(kOp, "table", table, mx::float32);
  return rope_launch(x, table, false);
}

mx::array swiglu(const mx::array& gate, const mx::array& up) {
  constexpr const char* kOp = "swiglu";
  if (gate.shape() != up.shape()) refuse(kOp, "up", shape_text(gate), shape_text(up));
  check_dtype(kOp, "up", up, gate.dtype());
  const size_t count = gate.size();
  const DType dtype = to_kernel(gate.dtype());
  const auto call = [=](auto, auto entry, const KernelArgs& args) {
    entry(count, dtype, args.in[0], args.in[1], args.out[0]);
  };
  return launch(
      {.kernel = kOp,
       .inputs = {gate, up},
       .outputs = {{gate.shape(), gate.dtype()}},
       .cpu = on_cpu(call, cpu::swiglu_forward),
       .cuda = METAL_LORA_ON_CUDA(call, swiglu_forward),
       .mlx = [](const Arrays& in,
                 mx::StreamOrDevice s) { return Arrays{with_mlx::swiglu(in[0], in[1], s)}; },
       .vjp =
           [=](const Arrays& primals,
               const Arrays& cotangents,
               const std::vector<int>& argnums,
               const Arrays&) {
             const auto call = [=](auto, auto entry, const KernelArgs& args) {
               entry(count, dtype, args.in[0], args.in[1], args.in[2], args.out[0], args.out[1]);
             };
             auto grads = launch(
                 {.kernel = "swiglu_backward",
                  .inputs = {primals[0], primals[1], cotangents[0]},
                  .outputs =
                      {{primals[0].shape(), primals[0].dtype()},
                       {primals[1].shape(), primals[1].dtype()}},
                  .cpu = on_cpu(call, cpu::swiglu_backward),
                  .cuda = METAL_LORA_ON_CUDA(call, swiglu_backward)});
             Arrays result;
             for (int i : argnums) result.push_back(grads[i]);
             return result;
           },
       .reference = [](const Arrays& in) { return Arrays{reference::swiglu(in[0], in[1])}; }})[0];
}

}  // namespace metal_lora::ops
