// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The one place that turns an operation into a dispatched kernel. An op says what (inputs, outputs,
// gradient); launch() picks the backend and makes one MLX primitive of it.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace metal_lora {

namespace cuda {
struct Context;
}

/// What a kernel's entry gets: row-contiguous inputs and freshly allocated (or donated) outputs.
/// Device pointers where the entry is CUDA's.
struct KernelArgs {
  std::span<const void* const> in;
  std::span<void* const> out;
};

struct OutputSpec {
  mlx::core::Shape shape;
  mlx::core::Dtype dtype;
  int in_place_of = -1;  ///< input whose contents this output starts from; its buffer, if free
  /// The caller has let go of that input (a cache): on CUDA its buffer is taken though MLX's
  /// unfinished graphs still hold it for nodes that came before this one. Views of it change.
  bool outlives_graph = false;
};

using Arrays = std::vector<mlx::core::array>;

/// Builds an op's outputs as graph nodes from its inputs, on the stream it is given.
using GraphFunction = std::function<Arrays(const Arrays& inputs, mlx::core::StreamOrDevice stream)>;

/// Enqueues kernels on the context's stream with device pointers; may take scratch, which stays
/// until the device is done, as does all that the function captures (weights by value).
using CudaFunction = std::function<void(const cuda::Context&, const KernelArgs&)>;

struct Launch {
  const char* kernel;  ///< the name that all backends share
  Arrays inputs = {};
  std::vector<OutputSpec> outputs = {};
  /// Runs on the stream's thread; parameters and base weights are captured by value (handles).
  std::function<void(const KernelArgs&)> cpu = {};
  /// Runs on the evaluating thread while MLX captures the stream into a graph: it must neither
  /// wait nor copy between host and device. Empty in a build without CUDA kernels.
  CudaFunction cuda = {};
  /// `cuda` launches graphs of its own: it runs between MLX's graphs instead, and may launch
  /// whatever does not wait for the device.
  bool cuda_uncaptured = false;
  /// The op as Metal kernels: nodes made by metal_dispatch(). Gradients come from `vjp`. Not called
  /// when inputs[0] is empty and nothing is in place: the outputs are zeros then.
  GraphFunction metal = {};
  /// The op in MLX's own operations, which the GPU backends run where the project has no kernel
  /// and MLX's is good. Gradients are MLX's.
  GraphFunction mlx = {};
  /// Gradients of inputs[argnums…]; empty: the op is not differentiable and says so.
  std::function<Arrays(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs)>
      vjp = {};
  std::vector<int> not_differentiable = {};  ///< inputs that `vjp` refuses: ids, tables
  /// The same outputs in plain MLX, for jvp and vmap on the CPU; empty: these say by name that
  /// there is none, as MLX does of every custom Metal kernel.
  std::function<Arrays(const Arrays&)> reference = {};
  /// The CPU's kernel checks what its inputs hold and may throw: eval then waits for it and
  /// rethrows. A GPU's cannot.
  bool may_throw = false;
};

/// Lazy outputs of one kernel dispatch. Inputs need not be contiguous or evaluated.
Arrays launch(Launch launch);
/// The same by Launch::cpu, whatever the backend: what the emulator's dispatches are made of.
Arrays launch_cpu(Launch launch);

}  // namespace metal_lora
