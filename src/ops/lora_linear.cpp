// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <mlx/ops.h>

#include "src/launch/backend.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/lora_linear_group.h"

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

constexpr const char* kOp = "lora_linear";

LoraParams checked_lora(const Lora& lora, const Weight& weight) {
  check_shape(kOp, "A", lora.a, {-1, weight.in_features()});
  const int rank = lora.a.shape(0);
  if (rank < 1 || rank > 1024) refuse(kOp, "rank", "1 … 1024", std::to_string(rank));
  check_shape(kOp, "B", lora.b, {weight.out_features(), rank});
  check_dtype(kOp, "B", lora.b, lora.a.dtype());
  if (!(lora.dropout >= 0.0f && lora.dropout < 1.0f)) {
    refuse(kOp, "dropout", "in [0, 1)", fmt::format("{}", lora.dropout));
  }
  LoraParams p;
  p.rank = static_cast<uint32_t>(rank);
  p.scale = lora.scale;
  p.dtype = to_kernel(lora.a.dtype());
  p.dropout = lora.dropout;
  p.dropout_seed = lora.dropout_seed;
  return p;
}

/// How the op keeps u [tokens, u_columns]: f32, or on CUDA as its products read it.
struct KeptU {
  bool low = false;
  int columns = 0;
};
KeptU kept_u([[maybe_unused]] uint32_t tokens, [[maybe_unused]] DType dtype, uint32_t rank) {
#ifdef METAL_LORA_CUDA
  if (active_backend() == Backend::cuda && cuda::keeps_low(tokens, dtype, rank)) {
    return {true, static_cast<int>(cuda::low_stride(rank))};
  }
#endif
  return {false, static_cast<int>(rank)};
}

Group checked_group(const mx::array& x, std::span<const LoraLinear> linears) {
  Group group;
  check_shape(kOp, "x", x, {-1, -1});
  group.tokens = static_cast<uint32_t>(x.shape(0));
  group.in_features = static_cast<uint32_t>(x.shape(1));
  group.dtype = to_kernel(x.dtype());
  for (const auto& linear : linears) {
    if (linear.weight.params().k != group.in_features) {
      refuse(kOp, "x", fmt::format("(tokens, {})", linear.weight.in_features()), shape_text(x));
    }
    Branch branch{linear.weight, {}, linear.bias};
    if (linear.lora) branch.lora = checked_lora(*linear.lora, linear.weight);
    const KeptU kept = kept_u(group.tokens, group.dtype, branch.lora.rank);
    branch.keeps_low = kept.low;
    branch.u_columns = kept.columns;
    if (branch.bias) {
      check_shape(kOp, "bias", *branch.bias, {linear.weight.out_features()});
      check_dtype(kOp, "bias", *branch.bias, mx::float32);
      branch.bias = kernel_array(*branch.bias);
    }
    group.branches.push_back(std::move(branch));
  }
  return group;
}

template <class Views>
typename Views::LoraBranch kernel_branch(Views views, const Branch& branch) {
  typename Views::LoraBranch out;
  out.weight = views.weight(branch.weight);
  out.lora.params = branch.lora;
  if (branch.bias) out.bias = views.floats(*branch.bias);
  return out;
}

/// Forward and backward must run on one backend: u lies as its kernels read it.
void check_u_is_plain(const Branch& branch) {
  if (!branch.keeps_low) return;
  throw Error(
      ErrorCode::internal,
      "[lora_linear] u was kept as CUDA's kernels read it, but the gradient runs on another "
      "backend");
}
template <class KernelBranch>
void keep_u(KernelBranch& to, const Branch& branch, void* u) {
  if constexpr (requires { to.low; }) {
    if (branch.keeps_low) {
      to.low = u;
      return;
    }
  }
  check_u_is_plain(branch);
  to.u = static_cast<float*>(u);
}
template <class KernelBranch>
void use_u(KernelBranch& to, const Branch& branch, const void* u) {
  if constexpr (requires { to.low; }) {
    if (branch.keeps_low) {
      to.low = const_cast<void*>(u);
      return;
    }
  }
  check_u_is_plain(branch);
  to.u_saved = static_cast<const float*>(u);
}

/// in: x, then A and B of each branch that has an adapter; out: y, then u where there is one.
template <class Views, class Entry>
void run_forward(const Group& group, Views views, Entry entry, const KernelArgs& args) {
  std::vector<typename Views::LoraBranch> branches;
  size_t in = 1, out = 0;
  for (const auto& branch : group.branches) {
    auto b = kernel_branch(views, branch);
    b.y = args.out[out++];
    if (branch.has_lora()) {
      b.lora.a = args.in[in++];
      b.lora.b = args.in[in++];
      keep_u(b, branch, args.out[out++]);
    }
    branches.push_back(b);
  }
  entry(group.tokens, group.in_features, group.dtype, args.in[0], branches.data(), branches.size());
}

/// in: x, then per branch dy, and A, B, u where there is an adapter;
/// out: dx if wanted, then dA and dB of each branch whose adapter's gradient is.
template <class Views, class Entry>
void run_backward(
    const Group& group, const Wanted& wanted, Views views, Entry entry, const KernelArgs& args) {
  std::vector<typename Views::LoraBranch> branches;
  size_t in = 1, out = wanted.dx ? 1 : 0;
  for (size_t i = 0; i < group.branches.size(); ++i) {
    auto b = kernel_branch(views, group.branches[i]);
    b.dy = args.in[in++];
    if (group.branches[i].has_lora()) {
      b.lora.a = args.in[in++];
      b.lora.b = args.in[in++];
      use_u(b, group.branches[i], args.in[in++]);
    }
    if (wanted.adapter[i]) {
      b.da = static_cast<float*>(args.out[out++]);
      b.db = static_cast<float*>(args.out[out++]);
    }
    branches.push_back(b);
  }
  entry(
      group.tokens,
      group.in_features,
      group.dtype,
      args.in[0],
      branches.data(),
      branches.size(),
      wanted.dx ? args.out[0] : nullptr);
}

Arrays vjp(
    const std::shared_ptr<const Group>& group,
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays& outputs) {
  Wanted wanted;
  wanted.adapter.resize(group->branches.size());
  std::vector<bool> needed(primals.size());
  for (int i : argnums) needed[i] = true;
  wanted.dx = needed[0];

  Launch back{.kernel = "lora_linear_backward", .inputs = {primals[0]}};
  if (wanted.dx) back.outputs.push_back({primals[0].shape(), primals[0].dtype()});
  std::vector<int> gradient_of(primals.size(), -1);  // input -> output of the launch
  if (wanted.dx) gradient_of[0] = 0;
  size_t in = 1, out = 0;
  for (size_t i = 0; i < group->branches.size(); ++i) {
    back.inputs.push_back(cotangents[out++]);
    if (!group->branches[i].has_lora()) continue;
    back.inputs.insert(back.inputs.end(), {primals[in], primals[in + 1], outputs[out++]});
    wanted.adapter[i] = needed[in] || needed[in + 1];
    if (wanted.adapter[i]) {
      for (size_t j : {in, in + 1}) {
        gradient_of[j] = static_cast<int>(back.outputs.size());
        back.outputs.push_back({primals[j].shape(), mx::float32});
      }
    }
    in += 2;
  }
  const auto call = [group, wanted](auto views, auto entry, const KernelArgs& args) {
    run_backward(*group, wanted, views, entry, args);
  };
  back.cpu = on_cpu(call, cpu::lora_linear_backward);
  back.cuda = METAL_LORA_ON_CUDA(call, lora_linear_backward);
  back.metal = [group, wanted](const Arrays& in, mx::StreamOrDevice s) {
    return lora_linear_backward_metal(*group, wanted, in, s);
  };
  auto grads = launch(std::move(back));
  Arrays result;
  for (int i : argnums)
    result.push_back(mx::astype(grads[gradient_of[i]], primals[i].dtype(), stream()));
  return result;
}

Arrays reference_group(const Group& group, const Arrays& inputs) {
  Arrays result;
  size_t in = 1;
  for (const auto& branch : group.branches) {
    LoraLinear linear{branch.weight, std::nullopt, branch.bias};
    if (!branch.has_lora()) {
      result.push_back(reference::lora_linear(inputs[0], linear));
      continue;
    }
    linear.lora = Lora{
        inputs[in],
        inputs[in + 1],
        branch.lora.scale,
        branch.lora.dropout,
        branch.lora.dropout_seed};
    in += 2;
    result.push_back(reference::lora_linear(inputs[0], linear));
    auto u = mx::matmul(
        mx::astype(inputs[0], mx::float32), mx::transpose(mx::astype(linear.lora->a, mx::float32)));
    if (branch.keeps_low) {
      u = mx::astype(u * branch.lora.scale, inputs[0].dtype());
      u = mx::pad(u, {{0, 0}, {0, branch.u_columns - u.shape(1)}});
    }
    result.push_back(u);
  }
  return result;
}

}  // namespace

Arrays lora_linear(const mx::array& x, std::span<const LoraLinear> linears) {
  auto group = std::make_shared<const Group>(checked_group(x, linears));
  Launch forward{.kernel = kOp, .inputs = {x}};
  std::vector<size_t> y_index;
  for (size_t i = 0; i < linears.size(); ++i) {
    y_index.push_back(forward.outputs.size());
    forward.outputs.push_back({{x.shape(0), linears[i].weight.out_features()}, x.dtype()});
    if (!linears[i].lora) continue;
    forward.inputs.push_back(linears[i].lora->a);
    forward.inputs.push_back(linears[i].lora->b);
    const Branch& branch = group->branches[i];
    forward.outputs.push_back(
        {{x.shape(0), branch.u_columns}, branch.keeps_low ? x.dtype() : mx::float32});
  }
  const auto call = [group](auto views, auto entry, const KernelArgs& args) {
    run_forward(*group, views, entry, args);
  };
  forward.cpu = on_cpu(call, cpu::lora_linear_forward);
  forward.cuda = METAL_LORA_ON_CUDA(call, lora_linear_forward);
  forward.metal = [group](const Arrays& in, mx::StreamOrDevice) {
    return lora_linear_metal(*group, in);
  };
  forward.vjp =
      [group](
          const auto& primals, const auto& cotangents, const auto& argnums, const auto& outputs) {
        return vjp(group, primals, cotangents, argnums, outputs);
      };
  forward.reference = [group](const Arrays& inputs) { return reference_group(*group, inputs); };
  auto outputs = launch(std::move(forward));
  Arrays ys;
  for (size_t i : y_index) ys.push_back(outputs[i]);
  return ys;
}

mx::array lora_linear(const mx::array& x, const LoraLinear& linear) {
  return lora_linear(x, std::span(&linear, 1))[0];
}

}  // namespace metal_lora::ops
