// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A plan's dispatch straight on the emulator, without the launch layer: for changed text, another
// order of threads, and findings as a result instead of an exception.
#pragma once

#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/metal/harness.h"

namespace metal_lora::test {

class DirectDispatch {
 public:
  DirectDispatch(
      metal::Plan plan,
      const ops::metal_ops::NamedArrays& arrays,
      const ops::metal_ops::NamedOutputs& outputs)
      : plan_(std::move(plan)) {
    for (const auto& name : plan_.entry->inputs) {
      if (name != "p") inputs_.push_back(arrays.at(name));
    }
    for (const auto& name : plan_.entry->outputs) specs_.push_back(outputs.find(name)->second);
    kernel_ = record_metal_kernel(plan_, inputs_, specs_);
  }

  /// As MLX generated it, behind its preamble.
  std::string text() const { return std::string(mlx_preamble()) + kernel_.text; }

  struct Result {
    metal_emulator::Report report;
    ops::metal_ops::NamedArrays outputs;
  };

  /// Outputs are undefined until the kernel writes them (0 in the result where it does not).
  /// `change` may set the dispatch's other fields.
  Result run(
      const metal_emulator::Library& library,
      const std::function<void(metal_emulator::Dispatch&)>& change = {}) {
    using Kind = RecordedKernel::Buffer::Kind;
    std::vector<std::vector<uint8_t>> data;
    for (const auto& spec : specs_) data.emplace_back(elements(spec) * mx_size(spec));
    std::vector<std::vector<int>> shapes;
    for (const auto& in : inputs_) shapes.emplace_back(in.shape().begin(), in.shape().end());
    metal_emulator::Dispatch dispatch;
    dispatch.kernel = kernel_.name;
    const auto& grid = kernel_.threads_per_grid;
    const auto& group = kernel_.threads_per_threadgroup;
    dispatch.threads_per_grid = {grid.x, grid.y, grid.z};
    dispatch.threads_per_threadgroup = {group.x, group.y, group.z};
    for (const auto& b : kernel_.buffers) {
      const int index = static_cast<int>(dispatch.buffers.size());
      if (b.kind == Kind::output) {
        dispatch.buffers.push_back({index, data[b.of].data(), data[b.of].size(), false});
      } else if (b.kind == Kind::shape) {
        dispatch.buffers.push_back({index, shapes[b.of].data(), shapes[b.of].size() * 4, true});
      } else if (b.kind != Kind::input) {
        throw std::logic_error("kernels take shapes only");
      } else if (b.of == inputs_.size()) {
        dispatch.buffers.push_back({index, plan_.p.data(), plan_.p.size() * 4, true});
      } else {
        auto& input = inputs_[b.of];
        dispatch.buffers.push_back({index, input.data<uint8_t>(), input.nbytes(), true});
      }
    }
    if (change) change(dispatch);
    Result result{metal_emulator::run(library, dispatch), {}};
    for (size_t i = 0; i < specs_.size(); ++i) {
      auto buffer = mlx::core::allocator::malloc(data[i].size());
      std::memcpy(buffer.buffer().raw_ptr(), data[i].data(), data[i].size());
      result.outputs.emplace(
          plan_.entry->outputs[i],
          mlx::core::array(std::move(buffer), specs_[i].shape, specs_[i].dtype));
    }
    return result;
  }

 private:
  static size_t elements(const OutputSpec& spec) {
    size_t count = 1;
    for (const auto d : spec.shape) count *= static_cast<size_t>(d);
    return count;
  }
  static size_t mx_size(const OutputSpec& spec) { return mlx::core::size_of(spec.dtype); }

  metal::Plan plan_;
  Arrays inputs_;
  std::vector<OutputSpec> specs_;
  RecordedKernel kernel_;
};

}  // namespace metal_lora::test
