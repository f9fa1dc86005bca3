// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/launch/launch.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <future>
#include <memory>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>
#include <mlx/transforms.h>
#include <mlx/utils.h>

#include "metal_lora/error.h"
#include "src/launch/backend.h"
#include "src/launch/donation.h"
#include "src/launch/mlx_cuda.h"

namespace mx = mlx::core;

namespace metal_lora {
namespace {

/// Outputs at least this large make eval wait for the kernel. MLX allocates outputs as it walks the
/// graph, ahead of the kernels: waiting frees each input before the next output is allocated (a
/// training step's peak is then its live set), and costs a thread hop (~5 µs) that such kernels
/// hide.
constexpr size_t kWaitForOutputBytes = 256 * 1024;

void copy_strided(const mx::array& src, size_t dim, const char* from, char*& to) {
  const size_t item = src.itemsize();
  if (dim == src.ndim()) {
    std::memcpy(to, from, item);
    to += item;
    return;
  }
  const auto stride = src.strides()[dim] * static_cast<int64_t>(item);
  for (int i = 0; i < src.shape(static_cast<int>(dim)); ++i) {
    copy_strided(src, dim + 1, from + i * stride, to);
  }
}

/// A row-contiguous copy, made on the stream's thread just before the kernel reads it.
struct Staged {
  mx::array source;
  std::unique_ptr<char[]> bytes;

  const void* fill() {
    bytes = std::make_unique_for_overwrite<char[]>(source.nbytes());
    char* to = bytes.get();
    copy_strided(source, 0, source.data<char>(), to);
    return bytes.get();
  }
};

class KernelPrimitive : public mx::Primitive {
 public:
  KernelPrimitive(mx::Stream stream, std::shared_ptr<const Launch> launch)
      : mx::Primitive(stream), launch_(std::move(launch)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto task = std::make_shared<Task>();
    task->launch = launch_;
    size_t output_bytes = 0;
    for (size_t i = 0; i < outputs.size(); ++i) {
      output_bytes += outputs[i].nbytes();
      bind_output(inputs, outputs[i], outputs.size(), launch_->outputs[i], *task);
    }
    for (const auto& input : inputs) bind_input(input, *task);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    if (output_bytes < kWaitForOutputBytes && !launch_->may_throw) {
      encoder.dispatch([task] { task->run(); });
      return;
    }
    std::promise<void> done;
    auto finished = done.get_future();
    encoder.dispatch([&done, &task] {
      try {
        task->run();
        done.set_value();
      } catch (...) {
        done.set_exception(std::current_exception());
      }
    });
    finished.get();
  }

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    if (!launch_->cuda) {
      throw Error(
          ErrorCode::unsupported,
          std::string("[") + launch_->kernel + "] has no GPU kernel in this build",
          "run on the CPU stream");
    }
    mlx_cuda::evaluate(stream(), launch_, inputs, outputs);
  }

  Arrays vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& argnums,
      const Arrays& outputs) override {
    if (!launch_->vjp) refuse("gradient");
    return launch_->vjp(primals, cotangents, argnums, outputs);
  }

  Arrays jvp(
      const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    if (!launch_->reference) refuse("forward-mode derivative");
    Arrays all_tangents;
    for (size_t i = 0, next = 0; i < primals.size(); ++i) {
      const bool given = next < argnums.size() && argnums[next] == static_cast<int>(i);
      all_tangents.push_back(given ? tangents[next++] : mx::zeros_like(primals[i]));
    }
    return mx::jvp(launch_->reference, primals, all_tangents).second;
  }

  std::pair<Arrays, std::vector<int>> vmap(
      const Arrays& inputs, const std::vector<int>& axes) override {
    if (!launch_->reference) refuse("vmap");
    auto outputs = mx::vmap(launch_->reference, axes)(inputs);
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }

  const char* name() const override { return launch_->kernel; }

 private:
  struct Task {
    std::shared_ptr<const Launch> launch;
    std::vector<const void*> in;
    std::vector<void*> out;
    std::vector<std::pair<size_t, Staged>> staged;
    struct Copy {
      void* to;
      size_t input;
      size_t bytes;
    };
    std::vector<Copy> copies;

    void run() {
      for (auto& [i, stage] : staged) in[i] = stage.fill();
      for (const auto& copy : copies) {
        if (copy.bytes > 0) std::memcpy(copy.to, in[copy.input], copy.bytes);
      }
      launch->cpu({in, out});
    }
  };

  static void bind_output(
      const Arrays& inputs, mx::array& output, size_t outputs, const OutputSpec& spec, Task& task) {
    if (spec.in_place_of >= 0) {
      const auto& input = inputs[spec.in_place_of];
      const auto& data = input.data_shared_ptr();
      if (is_held_by_node_alone(input, output, outputs) && data.use_count() == 1 &&
          data->is_owned()) {
        output.copy_shared_buffer(input);
        task.out.push_back(output.data<void>());
        return;
      }
    }
    output.set_data(mx::allocator::malloc(output.nbytes()));
    task.out.push_back(output.data<void>());
    if (spec.in_place_of >= 0) {
      task.copies.push_back(
          {task.out.back(), static_cast<size_t>(spec.in_place_of), output.nbytes()});
    }
  }

  static void bind_input(const mx::array& input, Task& task) {
    if (!input.flags().row_contiguous) {
      task.staged.emplace_back(task.in.size(), Staged{mx::array::unsafe_weak_copy(input), nullptr});
    }
    task.in.push_back(input.data<void>());
  }

  [[noreturn]] void refuse(const char* what) const {
    throw Error(ErrorCode::unsupported, std::string("[") + launch_->kernel + "] has no " + what);
  }

  std::shared_ptr<const Launch> launch_;
};

Arrays kernel_node(Launch launch, mx::Stream stream) {
  Arrays inputs = std::move(launch.inputs);
  launch.inputs.clear();
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const auto& output : launch.outputs) {
    shapes.push_back(output.shape);
    dtypes.push_back(output.dtype);
  }
  auto primitive =
      std::make_shared<KernelPrimitive>(stream, std::make_shared<const Launch>(std::move(launch)));
  return mx::array::make_arrays(std::move(shapes), dtypes, primitive, inputs);
}

/// By nodes that the op or MLX makes.
Arrays launch_graph(Launch launch, mx::StreamOrDevice stream) {
  const bool in_place =
      std::any_of(launch.outputs.begin(), launch.outputs.end(), [](const auto& o) {
        return o.in_place_of >= 0;
      });
  if (!launch.inputs.empty() && launch.inputs[0].size() == 0 && !in_place) {
    // No tokens: a dispatch has at least one thread, and every sum over nothing is 0.
    Arrays zeros;
    for (const auto& output : launch.outputs) {
      zeros.push_back(mx::zeros(output.shape, output.dtype, stream));
    }
    return zeros;
  }
  if (launch.mlx && !launch.metal) return launch.mlx(launch.inputs, stream);
  if (!launch.metal) {
    throw Error(
        ErrorCode::unsupported,
        std::string("[") + launch.kernel + "] has no " +
            std::string(backend_name(active_backend())) + " kernel",
        "METAL_LORA_BACKEND=cpu has one");
  }
  auto build = [metal = launch.metal, stream](const Arrays& in) { return metal(in, stream); };
  if (!launch.vjp) return build(launch.inputs);
  // MLX asks a custom function for all gradients; those that nobody uses are never evaluated.
  auto gradients = [stream, vjp = launch.vjp, fixed = launch.not_differentiable](
                       const Arrays& primals, const Arrays& cotangents, const Arrays& outputs) {
    std::vector<int> wanted;
    for (int i = 0; i < static_cast<int>(primals.size()); ++i) {
      if (std::find(fixed.begin(), fixed.end(), i) == fixed.end()) wanted.push_back(i);
    }
    auto computed = vjp(primals, cotangents, wanted, outputs);
    Arrays all;
    for (const auto& primal : primals) all.push_back(mx::zeros_like(primal, stream));
    for (size_t i = 0; i < wanted.size(); ++i) all[wanted[i]] = computed[i];
    return all;
  };
  return mx::custom_vjp(build, gradients)(launch.inputs);
}

}  // namespace

Arrays launch_cpu(Launch launch) {
  return kernel_node(std::move(launch), mx::default_stream(mx::Device::cpu));
}

Arrays launch(Launch launch) {
  switch (active_backend()) {
    case Backend::cpu:
      return launch_cpu(std::move(launch));
    case Backend::emulator:
    case Backend::metal:
      return launch_graph(std::move(launch), backend_stream(active_backend()));
    case Backend::cuda:
      if (launch.cuda) return kernel_node(std::move(launch), backend_stream(Backend::cuda));
      launch.metal = {};
      return launch_graph(std::move(launch), backend_stream(Backend::cuda));
  }
  throw Error(ErrorCode::internal, "[launch] unknown backend");
}

}  // namespace metal_lora
