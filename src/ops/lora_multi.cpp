// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "kernels/metal/plans_multi.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/entries.h"
#include "src/ops/metal_ops.h"

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

constexpr const char* kOp = "lora_linear_multi";

/// What the arrays do not say. inputs: x, A, B, ranks, scales, adapter_index.
struct Call {
  uint32_t tokens = 0;
  DType dtype = DType::f32;
  Weight weight;
  LoraMultiParams bank;
  std::optional<mx::array> bias;
};

enum Input : size_t { kX, kA, kB, kRanks, kScales, kIndex, kDy };

Call checked_call(
    const mx::array& x,
    const Weight& weight,
    const LoraBank& bank,
    const mx::array& adapter_index,
    const std::optional<mx::array>& bias) {
  check_shape(kOp, "x", x, {-1, weight.in_features()});
  check_shape(kOp, "A", bank.a, {-1, -1, weight.in_features()});
  const int adapters = bank.a.shape(0), max_rank = bank.a.shape(1);
  if (max_rank < 1 || max_rank > 1024) {
    refuse(kOp, "max_rank", "1 … 1024", std::to_string(max_rank));
  }
  check_shape(kOp, "B", bank.b, {adapters, weight.out_features(), max_rank});
  check_dtype(kOp, "B", bank.b, bank.a.dtype());
  check_shape(kOp, "ranks", bank.ranks, {adapters});
  check_dtype(kOp, "ranks", bank.ranks, mx::int32);
  check_shape(kOp, "scales", bank.scales, {adapters});
  check_dtype(kOp, "scales", bank.scales, mx::float32);
  check_shape(kOp, "adapter_index", adapter_index, {x.shape(0)});
  check_dtype(kOp, "adapter_index", adapter_index, mx::int32);
  Call call;
  call.tokens = static_cast<uint32_t>(x.shape(0));
  call.dtype = to_kernel(x.dtype());
  call.weight = weight;
  call.bank = {
      static_cast<uint32_t>(adapters), static_cast<uint32_t>(max_rank), to_kernel(bank.a.dtype())};
  if (bias) {
    check_shape(kOp, "bias", *bias, {weight.out_features()});
    check_dtype(kOp, "bias", *bias, mx::float32);
    call.bias = kernel_array(*bias);
  }
  return call;
}

template <class Views>
typename Views::LoraBankView bank_view(Views, const Call& call, const KernelArgs& args) {
  return {
      call.bank,
      args.in[kA],
      args.in[kB],
      static_cast<const int32_t*>(args.in[kRanks]),
      static_cast<const float*>(args.in[kScales])};
}

/// The kernels index the bank with these.
void check_values(
    const Call& call, std::span<const int32_t> ranks, std::span<const int32_t> index) {
  const auto check = [](const char* name, size_t i, int32_t got, int64_t least, int64_t most) {
    if (got >= least && got <= most) return;
    refuse(
        kOp,
        fmt::format("{}[{}]", name, i),
        fmt::format("in [{}, {}]", least, most),
        std::to_string(got));
  };
  for (size_t i = 0; i < ranks.size(); ++i) {
    check("ranks", i, ranks[i], 0, call.bank.max_rank);
  }
  for (size_t t = 0; t < index.size(); ++t) {
    check("adapter_index", t, index[t], -1, int64_t{call.bank.adapters} - 1);
  }
}

template <class Views, class Entry>
void run_forward(const Call& call, Views views, Entry entry, const KernelArgs& args) {
  const float* bias = call.bias ? views.floats(*call.bias) : nullptr;
  entry(
      call.tokens,
      call.dtype,
      args.in[kX],
      views.weight(call.weight),
      bank_view(views, call, args),
      static_cast<const int32_t*>(args.in[kIndex]),
      bias,
      args.out[0]);
}

void forward_cpu(const Call& call, const KernelArgs& args) {
  const auto ints = [&](Input i) { return static_cast<const int32_t*>(args.in[i]); };
  check_values(call, {ints(kRanks), call.bank.adapters}, {ints(kIndex), call.tokens});
  run_forward(call, CpuViews{}, cpu::lora_linear_multi_forward, args);
}

/// Which gradients are asked for; the outputs are those, in this order.
struct BankWanted {
  bool dx = false, da = false, db = false;
};

template <class Views, class Entry>
void run_backward(
    const Call& call, const BankWanted& wanted, Views views, Entry entry, const KernelArgs& args) {
  size_t out = 0;
  void* dx = wanted.dx ? args.out[out++] : nullptr;
  auto* da = wanted.da ? static_cast<float*>(args.out[out++]) : nullptr;
  auto* db = wanted.db ? static_cast<float*>(args.out[out++]) : nullptr;
  entry(
      call.tokens,
      call.dtype,
      args.in[kX],
      views.weight(call.weight),
      bank_view(views, call, args),
      static_cast<const int32_t*>(args.in[kIndex]),
      args.in[kDy],
      dx,
      da,
      db);
}

Arrays backward_mlx(
    const Call& call, const BankWanted& wanted, const Arrays& in, mx::StreamOrDevice s);

Arrays vjp(
    const std::shared_ptr<const Call>& call,
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums) {
  BankWanted wanted;
  for (int i : argnums) {
    if (i > static_cast<int>(kB)) {
      constexpr const char* kNames[] = {"ranks", "scales", "adapter_index"};
      refuse(kOp, "the differentiated input", "x, A or B", kNames[i - kRanks]);
    }
    (i == kX ? wanted.dx : i == kA ? wanted.da : wanted.db) = true;
  }
  Launch back{.kernel = "lora_linear_multi_backward", .inputs = primals};
  back.inputs.push_back(cotangents[0]);
  std::vector<size_t> output_of(kRanks);
  const auto want = [&](bool asked, size_t input, mx::Dtype dtype) {
    if (!asked) return;
    output_of[input] = back.outputs.size();
    back.outputs.push_back({primals[input].shape(), dtype});
  };
  want(wanted.dx, kX, primals[kX].dtype());
  want(wanted.da, kA, mx::float32);
  want(wanted.db, kB, mx::float32);
  const auto run = [call, wanted](auto views, auto entry, const KernelArgs& args) {
    run_backward(*call, wanted, views, entry, args);
  };
  back.cpu = on_cpu(run, cpu::lora_linear_multi_backward);
  back.cuda = METAL_LORA_ON_CUDA(run, lora_linear_multi_backward);
  back.mlx = [call, wanted](const Arrays& in, mx::StreamOrDevice s) {
    return backward_mlx(*call, wanted, in, s);
  };
  auto grads = launch(std::move(back));
  Arrays result;
  for (int i : argnums) {
    result.push_back(
        mx::astype(grads[output_of[static_cast<size_t>(i)]], primals[i].dtype(), stream()));
  }
  return result;
}

/// One dispatch. An index outside the bank means the base alone: a GPU cannot refuse it.
Arrays forward_metal(const Call& call, const Arrays& in) {
  const auto& w = call.weight.params();
  metal::LoraMultiShape shape;
  shape.m = call.tokens;
  shape.n = w.n;
  shape.k = w.k;
  metal_ops::describe_weight(shape, w);
  shape.adapters = call.bank.adapters;
  shape.max_rank = call.bank.max_rank;
  shape.dtype = call.dtype;
  shape.lora_dtype = call.bank.dtype;
  shape.has_bias = call.bias.has_value();
  metal_ops::NamedArrays arrays{
      {"x", in[kX]},
      {"a", in[kA]},
      {"b", in[kB]},
      {"ranks", in[kRanks]},
      {"adapter_scales", in[kScales]},
      {"index", in[kIndex]}};
  metal_ops::bind_weight(arrays, call.weight);
  if (call.bias) arrays.insert_or_assign("bias", *call.bias);
  const mx::Shape y{static_cast<int>(call.tokens), call.weight.out_features()};
  metal_ops::run_plans(
      {metal_ops::planned(kOp, metal::plan_lora_multi, shape)},
      arrays,
      {{"y", {y, to_mlx(call.dtype)}}});
  return {arrays.at("y")};
}

/// scale_i·B_i·(A_i·x) of each token in MLX's operations. Gathers every token's A and B:
/// tokens·max_rank·(in + out) values.
mx::array adapter_share(const Call& call, const Arrays& in, mx::StreamOrDevice s) {
  const auto f32 = [&](const mx::array& a) { return mx::astype(a, mx::float32, s); };
  const int rank = static_cast<int>(call.bank.max_rank);
  const auto index = mx::stop_gradient(mx::maximum(in[kIndex], mx::array(0), s), s);
  const auto true_rank = mx::where(
      mx::less(in[kIndex], mx::array(0), s), mx::array(0), mx::take(in[kRanks], index, 0, s), s);
  const auto counts = mx::less(
      mx::arange(0, rank, 1, mx::int32, s),
      mx::reshape(true_rank, {in[kIndex].shape(0), 1}, s),
      s);  // [t, rank]
  // Selected, not multiplied: what lies beyond the true rank may be anything.
  const auto selected = [&](const mx::array& bank, int axis) {
    return mx::where(
        mx::expand_dims(counts, axis, s), f32(mx::take(bank, index, 0, s)), mx::array(0.0f), s);
  };
  const auto x = mx::expand_dims(f32(in[kX]), 2, s);
  const auto u = mx::matmul(selected(in[kA], 2), x, s);
  const auto share = mx::squeeze(mx::matmul(selected(in[kB], 1), u, s), 2, s);
  const auto scale = mx::expand_dims(mx::take(in[kScales], index, 0, s), 1, s);
  return mx::multiply(scale, share, s);
}

/// y in plain MLX.
mx::array reference_call(const Call& call, const Arrays& in) {
  const auto share = adapter_share(call, in, {});
  auto y = mx::matmul(mx::astype(in[kX], mx::float32), mx::transpose(call.weight.dequantized()));
  if (call.bias) y = mx::add(y, *call.bias);
  return mx::astype(mx::add(y, share), in[kX].dtype());
}

/// The base's gradient by its Metal kernel, the adapters' by MLX: no serving path trains a bank.
Arrays backward_mlx(
    const Call& call, const BankWanted& wanted, const Arrays& in, mx::StreamOrDevice s) {
  const auto forward = [&](const Arrays& trained) {
    Arrays all(in.begin(), in.begin() + kDy);
    std::copy(trained.begin(), trained.end(), all.begin());
    auto base = lora_linear(all[kX], LoraLinear{call.weight, std::nullopt, std::nullopt});
    auto share = adapter_share(call, all, s);
    return Arrays{mx::add(mx::astype(base, mx::float32, s), share, s)};
  };
  const auto grads =
      mx::vjp(forward, {in[kX], in[kA], in[kB]}, {mx::astype(in[kDy], mx::float32, s)}).second;
  Arrays result;
  if (wanted.dx) result.push_back(grads[kX]);
  if (wanted.da) result.push_back(mx::astype(grads[kA], mx::float32, s));
  if (wanted.db) result.push_back(mx::astype(grads[kB], mx::float32, s));
  return result;
}

}  // namespace

mx::array lora_linear_multi(
    const mx::array& x,
    const Weight& weight,
    const LoraBank& bank,
    const mx::array& adapter_index,
    const std::optional<mx::array>& bias) {
  auto call = std::make_shared<const Call>(checked_call(x, weight, bank, adapter_index, bias));
  check_values(
      *call,
      metal_ops::values_at_hand<int32_t>(bank.ranks),
      metal_ops::values_at_hand<int32_t>(adapter_index));
  Launch forward{
      .kernel = kOp,
      .inputs = {x, bank.a, bank.b, bank.ranks, bank.scales, adapter_index},
      .outputs = {{{x.shape(0), weight.out_features()}, x.dtype()}}};
  const auto run = [call](auto views, auto entry, const KernelArgs& args) {
    run_forward(*call, views, entry, args);
  };
  forward.cpu = [call](const KernelArgs& args) { forward_cpu(*call, args); };
  forward.cuda = METAL_LORA_ON_CUDA(run, lora_linear_multi_forward);
  forward.metal = [call](const Arrays& in, mx::StreamOrDevice) { return forward_metal(*call, in); };
  forward.not_differentiable = {kRanks, kScales, kIndex};
  forward.vjp = [call](
                    const auto& primals, const auto& cotangents, const auto& argnums, const auto&) {
    return vjp(call, primals, cotangents, argnums);
  };
  forward.reference = [call](const Arrays& inputs) {
    return Arrays{reference_call(*call, inputs)};
  };
  forward.may_throw = true;
  return launch(std::move(forward))[0];
}

namespace reference {

mx::array lora_linear_multi(
    const mx::array& x,
    const Weight& weight,
    const LoraBank& bank,
    const mx::array& adapter_index,
    const std::optional<mx::array>& bias) {
  const Call call = checked_call(x, weight, bank, adapter_index, bias);
  return reference_call(call, {x, bank.a, bank.b, bank.ranks, bank.scales, adapter_index});
}

}  // namespace reference

}  // namespace metal_lora::ops
