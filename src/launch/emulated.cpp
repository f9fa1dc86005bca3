// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/launch/emulated.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "metal_lora/error.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

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
    auto recorded = record_with_params(plan, inputs, outputs);
    metal_emulator::CompileOptions options;
    options.file_name = std::string(plan.entry->name) + ".metal";
    auto library = metal_emulator::compile(std::string(mlx_preamble()) + recorded.text, options);
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
  std::string text =
      "[emulator] " + kernel + ": " + std::to_string(report.finding_count) + " findings";
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

}  // namespace

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

}  // namespace metal_lora
