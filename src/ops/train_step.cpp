// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/ops/train_step.h"

#include <mlx/ops.h>

#include "src/launch/backend.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/train_step.h"
#include "src/launch/device_memory.h"
#include "src/ops/weight_view.h"
#endif

namespace mx = mlx::core;

namespace metal_lora::ops {

#ifdef METAL_LORA_CUDA

struct TrainPlan::Impl {
  cuda::TrainModel model;
  std::vector<Weight> weights;     // alive as long as their device copies are used
  std::vector<mx::array> vectors;  // norms, biases, frequencies
  size_t budget_bytes = 0;
  std::unique_ptr<cuda::TrainStep> step;
  uint32_t step_tokens = 0;
  std::shared_ptr<void> workspace;

  const float* vector_on_device(const mx::array& v) {
    auto host = mx::contiguous(v, false, mx::Device::cpu);
    host.eval();
    vectors.push_back(upload(host.data<float>(), host.shape(), mx::float32));
    return static_cast<const float*>(device_pointer(vectors.back()));
  }

  cuda::WeightView weight_on_device(const Weight& w) {
    weights.push_back(w);
    return cuda_view(w);
  }

  cuda::TrainLinear linear_on_device(const Linear& linear) {
    cuda::TrainLinear out;
    out.weight = weight_on_device(linear.weight);
    if (linear.bias) out.bias = vector_on_device(*linear.bias);
    out.rank = static_cast<uint32_t>(linear.rank);
    out.scale = linear.scale;
    out.a = linear.a;
    out.b = linear.b;
    return out;
  }

  /// Room for streams of `tokens`; a longer one than seen so far makes a new plan.
  void reserve(uint32_t tokens) {
    if (tokens <= step_tokens) return;
    workspace.reset();
    const auto kept = cuda::TrainStep::fit(model, tokens, budget_bytes);
    step = std::make_unique<cuda::TrainStep>(model, tokens, kept);
    step_tokens = tokens;
    workspace = allocate_device(step->workspace_bytes());
  }
};

TrainPlan::TrainPlan(
    const Geometry& g,
    const std::vector<Layer>& layers,
    const Weight& embedding,
    const Weight& head,
    const mx::array& final_norm,
    const std::vector<float>& inv_freq,
    size_t parameters,
    size_t memory_budget_bytes)
    : impl_(std::make_unique<Impl>()) {
  auto& m = impl_->model;
  m.dims = static_cast<uint32_t>(g.dims);
  m.q_heads = static_cast<uint32_t>(g.q_heads);
  m.kv_heads = static_cast<uint32_t>(g.kv_heads);
  m.head_dim = static_cast<uint32_t>(g.head_dim);
  m.ffn = static_cast<uint32_t>(g.ffn);
  m.eps = g.eps;
  m.attention_scale = g.attention_scale;
  m.rope_factor = g.rope_factor;
  m.dtype = g.dtype;
  m.parameters = parameters;
  m.embedding = impl_->weight_on_device(embedding);
  m.head = impl_->weight_on_device(head);
  m.final_norm = impl_->vector_on_device(final_norm);
  m.inv_freq = impl_->vector_on_device(
      mx::array(inv_freq.data(), {static_cast<int>(inv_freq.size())}, mx::float32));
  for (const auto& layer : layers) {
    cuda::TrainLayer out;
    out.input_norm = impl_->vector_on_device(layer.input_norm);
    out.post_norm = impl_->vector_on_device(layer.post_norm);
    out.window = static_cast<uint32_t>(layer.window);
    cuda::TrainLinear* slots[] = {&out.q, &out.k, &out.v, &out.o, &out.gate, &out.up, &out.down};
    for (size_t i = 0; i < std::size(slots); ++i) {
      *slots[i] = impl_->linear_on_device(layer.linears.at(i));
    }
    m.layers.push_back(out);
  }
  impl_->budget_bytes = memory_budget_bytes;
}

size_t TrainPlan::least_bytes(int64_t tokens) const {
  return cuda::TrainStep(impl_->model, static_cast<uint32_t>(tokens), {}).workspace_bytes();
}

bool has_train_step() {
  return active_backend() == Backend::cuda;
}

#else

struct TrainPlan::Impl {};

TrainPlan::TrainPlan(
    const Geometry&,
    const std::vector<Layer>&,
    const Weight&,
    const Weight&,
    const mx::array&,
    const std::vector<float>&,
    size_t,
    size_t) {
  throw Error(ErrorCode::unsupported, "[train_step] this build has no fused training step");
}

size_t TrainPlan::least_bytes(int64_t) const {
  return 0;
}

bool has_train_step() {
  return false;
}

#endif

TrainPlan::~TrainPlan() = default;

std::pair<mx::array, mx::array> train_step(
    [[maybe_unused]] const std::shared_ptr<TrainPlan>& plan,
    const mx::array& parameters,
    const mx::array& tokens,
    const Segments& segments,
    const mx::array& targets,
    const mx::array& weights) {
  constexpr const char* kOp = "train_step";
  check_shape(kOp, "parameters", parameters, {-1});
  check_dtype(kOp, "parameters", parameters, mx::float32);
  check_shape(kOp, "tokens", tokens, {-1});
  const int count = tokens.shape(0);
  if (count < 1) refuse(kOp, "tokens", "at least one", std::to_string(count));
  check_shape(kOp, "positions", segments.positions, {count});
  check_shape(kOp, "segment_start", segments.segment_start, {count});
  check_shape(kOp, "targets", targets, {count});
  check_shape(kOp, "weights", weights, {count});
  check_dtype(kOp, "tokens", tokens, mx::int32);
  check_dtype(kOp, "positions", segments.positions, mx::int32);
  check_dtype(kOp, "segment_start", segments.segment_start, mx::int32);
  check_dtype(kOp, "targets", targets, mx::int32);
  check_dtype(kOp, "weights", weights, mx::float32);
  Launch step{
      .kernel = kOp,
      .inputs = {parameters, tokens, segments.positions, segments.segment_start, targets, weights},
      .outputs = {{{}, mx::float32}, {parameters.shape(), mx::float32}}};
#ifdef METAL_LORA_CUDA
  check_shape(kOp, "parameters", parameters, {static_cast<int>(plan->impl_->model.parameters)});
  step.cuda_uncaptured = true;
  step.cuda = [plan, count](const cuda::Context& context, const KernelArgs& args) {
    auto& impl = *plan->impl_;
    impl.reserve(static_cast<uint32_t>(count));
    const auto ints = [&](size_t i) { return static_cast<const int32_t*>(args.in[i]); };
    cuda::TrainBatch batch;
    batch.tokens = static_cast<uint32_t>(count);
    batch.ids = ints(1);
    batch.positions = ints(2);
    batch.segment_start = ints(3);
    batch.targets = ints(4);
    batch.weights = static_cast<const float*>(args.in[5]);
    impl.step->run(
        context,
        impl.workspace.get(),
        batch,
        static_cast<const float*>(args.in[0]),
        static_cast<float*>(args.out[1]),
        static_cast<float*>(args.out[0]));
  };
#endif
  auto outputs = launch(std::move(step));
  return {outputs[0], outputs[1]};
}

}  // namespace metal_lora::ops
