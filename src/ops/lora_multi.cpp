// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <mlx/ops.h>

#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/weight_view.h"

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

enum Input : size_t { kX, kA, kB, kRanks, kScales, kIndex, kDy, kU };

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
    call.bias = mx::contiguous(*bias);
    call.bias->eval();
  }
  return call;
}

cpu::LoraBankView bank_view(const Call& call, const KernelArgs& args) {
  return {
      call.bank,
      args.in[kA],
      args.in[kB],
      static_cast<const int32_t*>(args.in[kRanks]),
      static_cast<const float*>(args.in[kScales])};
}

/// The kernels index the bank with these.
void check_values(const Call& call, const cpu::LoraBankView& bank, const int32_t* index) {
  const auto check = [](const char* name, size_t i, int32_t got, int64_t least, int64_t most) {
    if (got >= least && got <= most) return;
    refuse(
        kOp,
        fmt::format("{}[{}]", name, i),
        fmt::format("in [{}, {}]", least, most),
        std::to_string(got));
  };
  for (uint32_t i = 0; i < call.bank.adapters; ++i) {
    check("ranks", i, bank.ranks[i], 0, call.bank.max_rank);
  }
  for (uint32_t t = 0; t < call.tokens; ++t) {
    check("adapter_index", t, index[t], -1, int64_t{call.bank.adapters} - 1);
  }
}

void forward_cpu(const Call& call, const KernelArgs& args) {
  const auto bank = bank_view(call, args);
  const auto* index = static_cast<const int32_t*>(args.in[kIndex]);
  check_values(call, bank, index);
  cpu::lora_linear_multi_forward(
      call.tokens,
      call.dtype,
      args.in[kX],
      weight_view(call.weight),
      bank,
      index,
      call.bias ? call.bias->data<float>() : nullptr,
      args.out[0],
      static_cast<float*>(args.out[1]));
}

/// Which gradients are asked for; the outputs are those, in this order.
struct Wanted {
  bool dx = false, da = false, db = false;
};

void backward_cpu(const Call& call, const Wanted& wanted, const KernelArgs& args) {
  size_t out = 0;
  void* dx = wanted.dx ? args.out[out++] : nullptr;
  auto* da = wanted.da ? static_cast<float*>(args.out[out++]) : nullptr;
  auto* db = wanted.db ? static_cast<float*>(args.out[out++]) : nullptr;
  cpu::lora_linear_multi_backward(
      call.tokens,
      call.dtype,
      args.in[kX],
      weight_view(call.weight),
      bank_view(call, args),
      static_cast<const int32_t*>(args.in[kIndex]),
      args.in[kDy],
      static_cast<const float*>(args.in[kU]),
      dx,
      da,
      db);
}

Arrays vjp(
    const std::shared_ptr<const Call>& call,
    const Arrays& primals,
    const Arrays& cotangents,
    const std::vector<int>& argnums,
    const Arrays& outputs) {
  Wanted wanted;
  for (int i : argnums) {
    if (i > static_cast<int>(kB)) {
      constexpr const char* kNames[] = {"ranks", "scales", "adapter_index"};
      refuse(kOp, "the differentiated input", "x, A or B", kNames[i - kRanks]);
    }
    (i == kX ? wanted.dx : i == kA ? wanted.da : wanted.db) = true;
  }
  Launch back{.kernel = "lora_linear_multi_backward", .inputs = primals};
  back.inputs.push_back(cotangents[0]);
  back.inputs.push_back(outputs[1]);
  std::vector<size_t> output_of(kRanks);
  const auto want = [&](bool asked, size_t input, mx::Dtype dtype) {
    if (!asked) return;
    output_of[input] = back.outputs.size();
    back.outputs.push_back({primals[input].shape(), dtype});
  };
  want(wanted.dx, kX, primals[kX].dtype());
  want(wanted.da, kA, mx::float32);
  want(wanted.db, kB, mx::float32);
  back.cpu = [call, wanted](const KernelArgs& args) { backward_cpu(*call, wanted, args); };
  auto grads = launch(std::move(back));
  Arrays result;
  for (int i : argnums) {
    result.push_back(mx::astype(grads[output_of[static_cast<size_t>(i)]], primals[i].dtype()));
  }
  return result;
}

/// y and u in plain MLX.
Arrays reference_call(const Call& call, const Arrays& in) {
  const auto f32 = [](const mx::array& a) { return mx::astype(a, mx::float32); };
  const int rank = static_cast<int>(call.bank.max_rank);
  const auto index = mx::stop_gradient(mx::maximum(in[kIndex], mx::array(0)));
  const auto true_rank =
      mx::where(mx::less(in[kIndex], mx::array(0)), mx::array(0), mx::take(in[kRanks], index, 0));
  const auto counts = mx::less(
      mx::arange(rank, mx::int32), mx::reshape(true_rank, {in[kIndex].shape(0), 1}));  // [t, rank]
  // Selected, not multiplied: what lies beyond the true rank may be anything.
  const auto a =
      mx::where(mx::expand_dims(counts, 2), f32(mx::take(in[kA], index, 0)), mx::array(0.0f));
  const auto b =
      mx::where(mx::expand_dims(counts, 1), f32(mx::take(in[kB], index, 0)), mx::array(0.0f));
  const auto x = f32(in[kX]);
  const auto u = mx::squeeze(mx::matmul(a, mx::expand_dims(x, 2)), 2);
  const auto share = mx::squeeze(mx::matmul(b, mx::expand_dims(u, 2)), 2);
  const auto scale = mx::expand_dims(mx::take(in[kScales], index, 0), 1);
  auto y = mx::matmul(x, mx::transpose(call.weight.dequantized()));
  if (call.bias) y = mx::add(y, *call.bias);
  return {mx::astype(mx::add(y, mx::multiply(scale, share)), in[kX].dtype()), u};
}

}  // namespace

mx::array lora_linear_multi(
    const mx::array& x,
    const Weight& weight,
    const LoraBank& bank,
    const mx::array& adapter_index,
    const std::optional<mx::array>& bias) {
  auto call = std::make_shared<const Call>(checked_call(x, weight, bank, adapter_index, bias));
  Launch forward{
      .kernel = kOp,
      .inputs = {x, bank.a, bank.b, bank.ranks, bank.scales, adapter_index},
      .outputs = {
          {{x.shape(0), weight.out_features()}, x.dtype()},
          {{x.shape(0), bank.a.shape(1)}, mx::float32}}};
  forward.cpu = [call](const KernelArgs& args) { forward_cpu(*call, args); };
  forward.vjp =
      [call](
          const auto& primals, const auto& cotangents, const auto& argnums, const auto& outputs) {
        return vjp(call, primals, cotangents, argnums, outputs);
      };
  forward.reference = [call](const Arrays& inputs) { return reference_call(*call, inputs); };
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
  return reference_call(call, {x, bank.a, bank.b, bank.ranks, bank.scales, adapter_index})[0];
}

}  // namespace reference

}  // namespace metal_lora::ops
