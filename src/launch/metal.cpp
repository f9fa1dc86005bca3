// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/launch/metal.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include <mlx/export.h>
#include <mlx/fast.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "kernels/metal/regions.h"
#include "metal_lora/error.h"
#include "src/launch/backend.h"
#include "src/launch/emulated.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

using TemplateArgs = std::vector<std::pair<std::string, mx::fast::TemplateArg>>;

mx::Dtype to_mlx_dtype(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return mx::float32;
    case DType::f16:
      return mx::float16;
    case DType::bf16:
      return mx::bfloat16;
  }
  throw Error(ErrorCode::internal, "[metal] unknown dtype");
}

TemplateArgs to_mlx(const metal::Plan& plan) {
  TemplateArgs args;
  for (const auto& [name, value] : plan.template_args) {
    if (const auto* dtype = std::get_if<DType>(&value)) {
      args.emplace_back(name, to_mlx_dtype(*dtype));
    } else if (const auto* flag = std::get_if<bool>(&value)) {
      args.emplace_back(name, *flag);
    } else {
      args.emplace_back(name, std::get<int>(value));
    }
  }
  return args;
}

std::tuple<int, int, int> to_mlx(const metal::Dim3& d) {
  return {static_cast<int>(d.x), static_cast<int>(d.y), static_cast<int>(d.z)};
}

Arrays with_params(const metal::Plan& plan, const Arrays& inputs) {
  Arrays all = inputs;
  all.emplace_back(plan.p.begin(), mx::Shape{static_cast<int>(plan.p.size())}, mx::uint32);
  if (all.size() != plan.entry->inputs.size()) {
    throw Error(
        ErrorCode::internal,
        std::string("[") + plan.entry->name + "] takes " +
            std::to_string(plan.entry->inputs.size()) + " inputs, got " +
            std::to_string(all.size()));
  }
  return all;
}

/// One factory for each entry: it cuts the text and finds the built-in attributes once.
const mx::fast::CustomKernelFunction& kernel_function(const metal::Entry& entry) {
  static std::mutex mutex;
  static std::map<const metal::Entry*, mx::fast::CustomKernelFunction> functions;
  std::lock_guard lock(mutex);
  auto& function = functions[&entry];
  if (!function) {
    function = mx::fast::metal_kernel(
        entry.name, entry.inputs, entry.outputs, entry.body, metal::assemble(entry.regions));
  }
  return function;
}

/// All inputs, `p` included.
Arrays mlx_node(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const auto& output : outputs) {
    shapes.push_back(output.shape);
    dtypes.push_back(output.dtype);
  }
  return kernel_function(*plan.entry)(
      inputs,
      shapes,
      dtypes,
      to_mlx(plan.threads_per_grid),
      to_mlx(plan.threads_per_threadgroup),
      to_mlx(plan),
      std::nullopt,
      false,
      backend_stream(Backend::metal));
}

metal::Dim3 dim3(const std::vector<mx::StateT>& state, size_t at) {
  const auto part = [&](size_t i) {
    return static_cast<uint32_t>(std::get<int>(state.at(at + i)));
  };
  return {part(0), part(1), part(2)};
}

/// The state of MLX's CustomKernel as its exporter visits it: name, source, the grid's three ints,
/// the threadgroup's, then which of shape, strides and ndim each input passes.
RecordedKernel parse_state(const std::vector<mx::StateT>& state, size_t outputs) {
  RecordedKernel kernel;
  kernel.name = std::get<std::string>(state.at(0));
  kernel.text = std::get<std::string>(state.at(1));
  kernel.threads_per_grid = dim3(state, 2);
  kernel.threads_per_threadgroup = dim3(state, 5);
  using Kind = RecordedKernel::Buffer::Kind;
  const auto& infos = std::get<std::vector<std::tuple<bool, bool, bool>>>(state.at(8));
  for (size_t i = 0; i < infos.size(); ++i) {
    const auto& [shape, strides, ndim] = infos[i];
    kernel.buffers.push_back({Kind::input, i});
    if (shape) kernel.buffers.push_back({Kind::shape, i});
    if (strides) kernel.buffers.push_back({Kind::strides, i});
    if (ndim) kernel.buffers.push_back({Kind::ndim, i});
  }
  for (size_t i = 0; i < outputs; ++i) kernel.buffers.push_back({Kind::output, i});
  return kernel;
}

}  // namespace

RecordedKernel record_with_params(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  std::optional<RecordedKernel> kernel;
  const mx::ExportCallback callback = [&](const mx::ExportCallbackInput& event) {
    const auto name = event.find("name");
    if (name == event.end() || std::get<std::string>(name->second) != "CustomKernel") return;
    const auto arguments = event.find("arguments");
    if (arguments == event.end()) return;
    kernel = parse_state(std::get<std::vector<mx::StateT>>(arguments->second), outputs.size());
  };
  mx::export_function(
      callback,
      std::function<Arrays(const mx::Args&)>(
          [&](const mx::Args& args) { return mlx_node(plan, args, outputs); }),
      inputs);
  if (!kernel) {
    throw Error(
        ErrorCode::internal, std::string("[metal] MLX recorded no kernel for ") + plan.entry->name);
  }
  return *std::move(kernel);
}

Arrays metal_dispatch(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  const auto all = with_params(plan, inputs);
  switch (active_backend()) {
    case Backend::metal:
      return mlx_node(plan, all, outputs);
#ifdef METAL_LORA_EMULATOR
    case Backend::emulator:
      return emulated_node(plan, all, outputs);
#endif
    default:
      throw Error(
          ErrorCode::internal,
          std::string("[") + plan.entry->name + "] dispatched as a Metal kernel on " +
              std::string(backend_name(active_backend())));
  }
}

RecordedKernel record_metal_kernel(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  return record_with_params(plan, with_params(plan, inputs), outputs);
}

void strip_gradient_nodes(Arrays& outputs) {
  const auto is_gradient_node = [](const mx::array& a) {
    return a.has_primitive() && std::string_view(a.primitive().name()) == "CustomTransforms";
  };
  // CustomTransforms' inputs are the function's, then what the function returned.
  const auto behind = [](const mx::array& a) {
    const auto all = a.outputs();
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].id() == a.id()) return a.inputs()[a.inputs().size() - all.size() + i];
    }
    throw Error(ErrorCode::internal, "[metal] a node is not among its own outputs");
  };
  std::unordered_set<std::uintptr_t> seen;
  Arrays open;
  const auto visit = [&](mx::array& a) {
    while (is_gradient_node(a)) a = behind(a);
    if (seen.insert(a.id()).second) open.push_back(a);
  };
  for (auto& output : outputs) visit(output);
  while (!open.empty()) {
    auto node = open.back();
    open.pop_back();
    for (auto& input : node.inputs()) visit(input);
  }
}

}  // namespace metal_lora
