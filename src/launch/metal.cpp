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
      mx::Device(mx::Device::gpu));
}

metal::Dim3 dim3(const std::vector<mx::StateT>& state, size_t at) {
  const auto part = [&](size_t i) { return static_cast<uint32_t>(std::get<int>(state.at(at + i))); };
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

RecordedKernel record(
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

/// Everything that MLX's generated text depends on.
std::string text_key(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  std::string key = plan.entry->name;
  for (const auto& [name, value] : plan.template_args) {
    key += " " + name + "=";
    std::visit([&](auto v) { key += std::to_string(static_cast<int>(v)); }, value);
  }
  for (const auto& input : inputs) {
    key += " " + std::to_string(static_cast<int>(input.dtype().val()));
    key += input.ndim() == 0 ? "s" : input.size() < 8 ? "c" : "d";
  }
  for (const auto& output : outputs) {
    key += " >" + std::to_string(static_cast<int>(output.dtype.val()));
  }
  return key;
}

/// A kernel made ready for the emulator, kept for the life of the process: compiling takes seconds.
struct EmulatedKernel {
  RecordedKernel recorded;
  metal_emulator::Library library;
};

std::shared_ptr<const EmulatedKernel> emulated_kernel(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::shared_ptr<const EmulatedKernel>> kernels;
  const auto key = text_key(plan, inputs, outputs);
  std::lock_guard lock(mutex);
  auto& kernel = kernels[key];
  if (!kernel) {
    auto recorded = record(plan, inputs, outputs);
    metal_emulator::CompileOptions options;
    options.file_name = std::string(plan.entry->name) + ".metal";
    auto library =
        metal_emulator::compile(std::string(mlx_preamble()) + recorded.text, options);
    kernel = std::make_shared<const EmulatedKernel>(
        EmulatedKernel{std::move(recorded), std::move(library)});
  }
  return kernel;
}

struct LogState {
  std::mutex mutex;
  int readers = 0;
  std::vector<EmulatedDispatch> dispatches;
};

LogState& log_state() {
  static LogState state;
  return state;
}

/// What one dispatch needs when the stream reaches it: shapes are known, arrays no longer at hand.
struct PendingDispatch {
  std::shared_ptr<const EmulatedKernel> kernel;
  metal::Plan plan;
  std::vector<mx::Shape> input_shapes;
  std::vector<size_t> input_bytes, output_bytes;

  std::vector<std::string> buffer_names() const {
    using Kind = RecordedKernel::Buffer::Kind;
    std::vector<std::string> names;
    for (const auto& b : kernel->recorded.buffers) {
      if (b.kind == Kind::output) {
        names.push_back(plan.entry->outputs[b.of]);
        continue;
      }
      std::string name = plan.entry->inputs[b.of];
      if (b.kind == Kind::shape) name += "_shape";
      if (b.kind == Kind::strides) name += "_strides";
      if (b.kind == Kind::ndim) name += "_ndim";
      names.push_back(name);
    }
    return names;
  }

  void run(const KernelArgs& args) const;
};

/// Row-contiguous strides of every input, as MLX passes them.
struct ShapeBuffers {
  std::vector<std::vector<int>> shapes;
  std::vector<std::vector<int64_t>> strides;
  std::vector<int> ndims;

  explicit ShapeBuffers(const std::vector<mx::Shape>& inputs) {
    for (const auto& shape : inputs) {
      shapes.emplace_back(shape.begin(), shape.end());
      std::vector<int64_t> stride(shape.size(), 1);
      for (size_t d = shape.size(); d-- > 1;) stride[d - 1] = stride[d] * shape[d];
      strides.push_back(stride);
      ndims.push_back(static_cast<int>(shape.size()));
    }
  }
};

std::string describe(const std::string& kernel, const metal_emulator::Report& report) {
  std::string text = "[emulator] " + kernel + ": " + std::to_string(report.finding_count) +
      " findings";
  for (const auto& finding : report.findings) {
    text += "\n  " + finding.file + ":" + std::to_string(finding.line) + ": " +
        std::string(metal_emulator::finding_name(finding.kind)) + ": " + finding.text;
  }
  return text;
}

void PendingDispatch::run(const KernelArgs& args) const {
  using Kind = RecordedKernel::Buffer::Kind;
  ShapeBuffers shapes(input_shapes);
  metal_emulator::Dispatch dispatch;
  dispatch.kernel = kernel->recorded.name;
  int index = 0;
  for (const auto& b : kernel->recorded.buffers) {
    metal_emulator::Buffer buffer;
    buffer.index = index++;
    switch (b.kind) {
      case Kind::input:
        buffer.data = const_cast<void*>(args.in[b.of]);
        buffer.bytes = input_bytes[b.of];
        break;
      case Kind::shape:
        buffer.data = shapes.shapes[b.of].data();
        buffer.bytes = shapes.shapes[b.of].size() * sizeof(int);
        break;
      case Kind::strides:
        buffer.data = shapes.strides[b.of].data();
        buffer.bytes = shapes.strides[b.of].size() * sizeof(int64_t);
        break;
      case Kind::ndim:
        buffer.data = &shapes.ndims[b.of];
        buffer.bytes = sizeof(int);
        break;
      case Kind::output:
        buffer.data = args.out[b.of];
        buffer.bytes = output_bytes[b.of];
        buffer.initialized = false;
        break;
    }
    dispatch.buffers.push_back(buffer);
  }
  // MLX never makes a threadgroup larger than the grid.
  const auto& grid = plan.threads_per_grid;
  const auto& group = plan.threads_per_threadgroup;
  dispatch.threads_per_grid = {grid.x, grid.y, grid.z};
  dispatch.threads_per_threadgroup = {
      std::min(group.x, grid.x), std::min(group.y, grid.y), std::min(group.z, grid.z)};
  auto report = metal_emulator::run(kernel->library, dispatch);
  const bool clean = report.finding_count == 0;
  const auto text = clean ? std::string() : describe(plan.entry->name, report);
  {
    auto& log = log_state();
    std::lock_guard lock(log.mutex);
    if (log.readers > 0) {
      log.dispatches.push_back({plan.entry->name, plan.why, buffer_names(), std::move(report)});
    }
  }
  if (!clean) throw Error(ErrorCode::internal, text, "a defect of the kernel: please report it");
}

Arrays emulated_node(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  PendingDispatch pending{emulated_kernel(plan, inputs, outputs), plan, {}, {}, {}};
  for (const auto& input : inputs) {
    pending.input_shapes.push_back(input.shape());
    pending.input_bytes.push_back(input.nbytes());
  }
  for (const auto& output : outputs) {
    size_t items = 1;
    for (auto d : output.shape) items *= static_cast<size_t>(d);
    pending.output_bytes.push_back(items * size_of(output.dtype));
  }
  return launch_cpu(
      {.kernel = plan.entry->name,
       .inputs = inputs,
       .outputs = outputs,
       .cpu = [pending = std::move(pending)](const KernelArgs& args) { pending.run(args); },
       .may_throw = true});
}

}  // namespace

Arrays metal_dispatch(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  const auto all = with_params(plan, inputs);
  switch (active_backend()) {
    case Backend::metal:
      return mlx_node(plan, all, outputs);
    case Backend::emulator:
      return emulated_node(plan, all, outputs);
    default:
      throw Error(
          ErrorCode::internal,
          std::string("[") + plan.entry->name + "] dispatched as a Metal kernel on " +
              std::string(backend_name(active_backend())));
  }
}

RecordedKernel record_metal_kernel(
    const metal::Plan& plan, const Arrays& inputs, const std::vector<OutputSpec>& outputs) {
  return record(plan, with_params(plan, inputs), outputs);
}

std::string_view mlx_preamble() {
  return "#include <metal_stdlib>\n"
         "#include <metal_simdgroup_matrix>\n"
         "using namespace metal;\n"
         "typedef half float16_t;\n"
         "typedef bfloat bfloat16_t;\n";
}

EmulatorLog::EmulatorLog() {
  auto& log = log_state();
  std::lock_guard lock(log.mutex);
  if (log.readers++ == 0) log.dispatches.clear();
}

EmulatorLog::~EmulatorLog() {
  auto& log = log_state();
  std::lock_guard lock(log.mutex);
  if (--log.readers == 0) log.dispatches.clear();
}

std::vector<EmulatedDispatch> EmulatorLog::take() {
  auto& log = log_state();
  std::lock_guard lock(log.mutex);
  return std::exchange(log.dispatches, {});
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
