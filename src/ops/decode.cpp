// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/ops/decode.h"

#include <algorithm>
#include <numeric>

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "src/launch/backend.h"
#include "src/launch/launch.h"
#include "src/ops/checks.h"
#include "src/ops/weight_view.h"

#ifdef METAL_LORA_CUDA
#include "kernels/cuda/decode_step.h"
#include "src/launch/device_memory.h"
#endif

namespace mx = mlx::core;

namespace metal_lora::ops {
namespace {

cpu::LoraView lora_view(const Lora& lora) {
  LoraParams p;
  p.rank = static_cast<uint32_t>(lora.a.shape(0));
  p.scale = lora.scale;
  p.dtype = to_kernel(lora.a.dtype());
  return {p, lora.a.data<void>(), lora.b.data<void>()};
}

/// Evaluates what the kernel will read through raw pointers.
void settle(LoraLinear& linear) {
  if (linear.lora) {
    linear.lora->a = mx::contiguous(linear.lora->a);
    linear.lora->b = mx::contiguous(linear.lora->b);
    mx::eval(linear.lora->a, linear.lora->b);
  }
  if (linear.bias) {
    linear.bias = mx::contiguous(*linear.bias);
    linear.bias->eval();
  }
}

cpu::LinearView linear_view(const LoraLinear& linear) {
  cpu::LinearView view;
  view.weight = weight_view(linear.weight);
  if (linear.lora) view.lora = lora_view(*linear.lora);
  if (linear.bias) view.bias = linear.bias->data<float>();
  return view;
}

cpu::DecodeLayerView layer_view(DecodeLayer& layer) {
  for (auto* linear :
       {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
    settle(*linear);
  }
  mx::eval(layer.input_norm, layer.post_norm);
  cpu::DecodeLayerView view;
  view.input_norm = layer.input_norm.data<float>();
  view.post_norm = layer.post_norm.data<float>();
  if (layer.q_norm) {
    mx::eval(*layer.q_norm, *layer.k_norm);
    view.q_norm = layer.q_norm->data<float>();
    view.k_norm = layer.k_norm->data<float>();
  }
  view.q = linear_view(layer.q);
  view.k = linear_view(layer.k);
  view.v = linear_view(layer.v);
  view.o = linear_view(layer.o);
  view.gate = linear_view(layer.gate);
  view.up = linear_view(layer.up);
  view.down = linear_view(layer.down);
  return view;
}

size_t dtype_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

}  // namespace

#ifdef METAL_LORA_CUDA
struct DecodePlan::Cuda {
  explicit Cuda(const DecodePlan& plan) : step(model_of(plan)) {
    workspace = allocate_device(step.workspace_bytes());
  }

  cuda::DecodeModel model_of(const DecodePlan& plan) {
    const auto& g = plan.geometry_;
    cuda::DecodeModel m;
    m.dims = static_cast<uint32_t>(g.dims);
    m.q_heads = static_cast<uint32_t>(g.q_heads);
    m.kv_heads = static_cast<uint32_t>(g.kv_heads);
    m.head_dim = static_cast<uint32_t>(g.head_dim);
    m.ffn = static_cast<uint32_t>(g.ffn);
    m.eps = g.eps;
    m.attention_scale = g.attention_scale;
    m.rope_factor = g.rope_factor;
    m.dtype = g.dtype;
    for (const auto& layer : plan.layers_) m.layers.push_back(layer_of(layer));
    m.embedding = cuda_view(plan.embedding_.weight);
    if (plan.embedding_.lora) m.embedding_lora = lora_of(*plan.embedding_.lora);
    m.head = cuda_view(plan.head_);
    m.final_norm = vector_of(plan.final_norm_);
    m.inv_freq = vector_of(
        mx::array(plan.inv_freq_.data(), {static_cast<int>(plan.inv_freq_.size())}, mx::float32));
    return m;
  }

  cuda::DecodeLayer layer_of(const DecodeLayer& layer) {
    cuda::DecodeLayer out;
    out.input_norm = vector_of(layer.input_norm);
    out.post_norm = vector_of(layer.post_norm);
    if (layer.q_norm) out.q_norm = vector_of(*layer.q_norm);
    if (layer.k_norm) out.k_norm = vector_of(*layer.k_norm);
    out.q = linear_of(layer.q);
    out.k = linear_of(layer.k);
    out.v = linear_of(layer.v);
    out.o = linear_of(layer.o);
    out.gate = linear_of(layer.gate);
    out.up = linear_of(layer.up);
    out.down = linear_of(layer.down);
    out.window = static_cast<uint32_t>(layer.window);
    return out;
  }

  cuda::DecodeLinear linear_of(const LoraLinear& linear) {
    cuda::DecodeLinear out;
    out.weight = cuda_view(linear.weight);
    if (linear.lora) out.lora = lora_of(*linear.lora);
    if (linear.bias) out.bias = vector_of(*linear.bias);
    return out;
  }

  cuda::LoraView lora_of(const Lora& lora) {
    cuda::LoraView view;
    view.params.rank = static_cast<uint32_t>(lora.a.shape(0));
    view.params.scale = lora.scale;
    view.params.dtype = to_kernel(lora.a.dtype());
    for (const auto* matrix : {&lora.a, &lora.b}) {
      arrays.push_back(mx::contiguous(*matrix, false, stream()));
      arrays.back().eval();
    }
    view.a = device_pointer(arrays[arrays.size() - 2]);
    view.b = device_pointer(arrays.back());
    return view;
  }

  const float* vector_of(const mx::array& v) {
    arrays.push_back(mx::contiguous(v, false, stream()));
    arrays.back().eval();
    return static_cast<const float*>(device_pointer(arrays.back()));
  }

  std::vector<mx::array> arrays;  // what the step points at
  cuda::DecodeStep step;
  std::shared_ptr<void> workspace;
};
#else
struct DecodePlan::Cuda {};
#endif

DecodePlan::DecodePlan(
    const Geometry& geometry,
    std::vector<DecodeLayer> layers,
    LoraLinear embedding,
    Weight head,
    mx::array final_norm,
    std::vector<float> inv_freq)
    : geometry_(geometry),
      layers_(std::move(layers)),
      embedding_(std::move(embedding)),
      head_(std::move(head)),
      final_norm_(std::move(final_norm)),
      inv_freq_(std::move(inv_freq)) {
#ifdef METAL_LORA_CUDA
  if (active_backend() == Backend::cuda) {
    cuda_ = std::make_shared<Cuda>(*this);
    return;
  }
#endif
  for (auto& layer : layers_) views_.push_back(layer_view(layer));
  settle(embedding_);
  final_norm_.eval();
}

void DecodePlan::run(
    std::span<const int32_t> tokens,
    int position,
    int capacity,
    int rows,
    float* logits,
    void* cache) const {
  const auto& g = geometry_;
  const auto m = static_cast<uint32_t>(tokens.size());
  const auto dims = static_cast<uint32_t>(g.dims);
  std::vector<float> x(static_cast<size_t>(m) * dims), cos_sin(static_cast<size_t>(m) * g.head_dim);
  std::vector<int32_t> positions(m);
  std::iota(positions.begin(), positions.end(), position);
  cpu::rope_table(
      m,
      static_cast<uint32_t>(g.head_dim),
      positions.data(),
      inv_freq_.data(),
      g.rope_factor,
      cos_sin.data());
  const auto embedding = linear_view(embedding_);
  cpu::lora_embedding_forward(
      m, DType::f32, tokens.data(), embedding.weight, embedding.lora, x.data());

  DecodeLayerParams p;
  p.tokens = m;
  p.dims = dims;
  p.q_heads = static_cast<uint32_t>(g.q_heads);
  p.kv_heads = static_cast<uint32_t>(g.kv_heads);
  p.head_dim = static_cast<uint32_t>(g.head_dim);
  p.ffn = static_cast<uint32_t>(g.ffn);
  p.position = static_cast<uint32_t>(position);
  p.kv_capacity = static_cast<uint32_t>(capacity);
  p.eps = g.eps;
  p.attention_scale = g.attention_scale;
  p.dtype = g.dtype;
  const size_t half_bytes =
      static_cast<size_t>(capacity) * g.kv_heads * g.head_dim * dtype_bytes(g.dtype);
  // One window for all layers in a call: runs of layers that share it go together.
  auto* keys = static_cast<std::byte*>(cache);
  std::vector<void*> k_caches, v_caches;
  for (size_t i = 0; i < views_.size(); ++i) {
    k_caches.push_back(keys + 2 * half_bytes * i);
    v_caches.push_back(keys + 2 * half_bytes * i + half_bytes);
  }
  for (size_t first = 0, last; first < views_.size(); first = last) {
    for (last = first + 1; last < views_.size() && layers_[last].window == layers_[first].window;)
      ++last;
    p.window = static_cast<uint32_t>(layers_[first].window);
    cpu::decode_layers(
        p,
        &views_[first],
        last - first,
        cos_sin.data(),
        x.data(),
        &k_caches[first],
        &v_caches[first]);
  }

  NormParams norm;
  norm.rows = static_cast<uint32_t>(rows);
  norm.dims = dims;
  norm.eps = g.eps;
  norm.dtype = DType::f32;
  float* last = x.data() + static_cast<size_t>(m - rows) * dims;
  cpu::add_rms_norm_forward(norm, last, nullptr, final_norm_.data<float>(), nullptr, last);
  // f32 hidden states: logits keep the digits that a 16-bit product would round away.
  cpu::LoraBranch head;
  head.weight = weight_view(head_);
  head.y = logits;
  cpu::lora_linear_forward(norm.rows, dims, DType::f32, last, &head, 1);
}

std::pair<mx::array, mx::array> decode_step(
    std::shared_ptr<const DecodePlan> plan,
    std::span<const int32_t> tokens,
    const mx::array& cache,
    int position,
    int rows) {
  constexpr const char* kOp = "decode_step";
  const int count = static_cast<int>(tokens.size());
  if (count < 1 || count > kDecodeMaxTokens) {
    refuse(kOp, "tokens", fmt::format("1 … {}", kDecodeMaxTokens), std::to_string(count));
  }
  if (rows < 1 || rows > count)
    refuse(kOp, "rows", fmt::format("1 … {}", count), std::to_string(rows));
  const auto& g = plan->geometry_;
  check_shape(
      kOp, "cache", cache, {static_cast<int>(plan->layers_.size()), 2, -1, g.kv_heads, g.head_dim});
  check_dtype(kOp, "cache", cache, to_mlx(g.dtype));
  const int capacity = cache.shape(2);
  if (position < 0 || position + count > capacity) {
    refuse(
        kOp,
        "position + tokens",
        fmt::format("at most {}", capacity),
        std::to_string(position + count));
  }
  const int vocab = plan->head_.out_features();
  const std::vector<int32_t> ids(tokens.begin(), tokens.end());
  Launch step{
      .kernel = kOp,
      .inputs = {cache},
      .outputs = {
          {{rows, vocab}, mx::float32},
          {.shape = cache.shape(),
           .dtype = cache.dtype(),
           .in_place_of = 0,
           .outlives_graph = true}}};
  step.cpu = [plan, ids, position, capacity, rows](const KernelArgs& args) {
    plan->run(ids, position, capacity, rows, static_cast<float*>(args.out[0]), args.out[1]);
  };
#ifdef METAL_LORA_CUDA
  step.cuda_uncaptured = true;
  step.cuda = [plan, ids, position, capacity, rows](
                  const cuda::Context& context, const KernelArgs& args) {
    plan->cuda_->step.run(
        context,
        plan->cuda_->workspace.get(),
        ids.data(),
        static_cast<uint32_t>(ids.size()),
        static_cast<uint32_t>(position),
        static_cast<uint32_t>(capacity),
        static_cast<uint32_t>(rows),
        args.out[1],
        static_cast<float*>(args.out[0]));
  };
#endif
  auto outputs = launch(std::move(step));
  return {outputs[0], outputs[1]};
}

bool has_decode_step() {
  return active_backend() == Backend::cpu || active_backend() == Backend::cuda;
}

#ifdef METAL_LORA_CUDA
namespace {

/// A 16-bit x by tensor cores, with the digits of the f32 sums that rounding y would drop.
mx::array logits_cuda(const mx::array& x, const Weight& head) {
  constexpr const char* kOp = "logits";
  check_shape(kOp, "x", x, {-1, head.in_features()});
  const auto rows = static_cast<uint32_t>(x.shape(0));
  Launch product{
      .kernel = kOp, .inputs = {x}, .outputs = {{{x.shape(0), head.out_features()}, mx::float32}}};
  product.cuda = [rows, head, dtype = to_kernel(x.dtype())](
                     const cuda::Context& context, const KernelArgs& args) {
    const auto& p = head.params();
    cuda::LoraBranch branch;
    branch.weight = cuda_view(head);
    for (uint32_t row = 0; row < rows; row += cuda::kVectorMaxTokens) {
      branch.y = static_cast<float*>(args.out[0]) + size_t{row} * p.n;
      const auto* from = static_cast<const std::byte*>(args.in[0]) + size_t{row} * p.k * 2;
      const auto count = std::min(rows - row, cuda::kVectorMaxTokens);
      cuda::lora_gemv(context, count, p.k, dtype, from, &branch, 1, DType::f32);
    }
  };
  return launch(std::move(product))[0];
}

}  // namespace
#endif

mx::array logits(const mx::array& x, const Weight& head) {
#ifdef METAL_LORA_CUDA
  if (active_backend() == Backend::cuda && x.dtype() != mx::float32) return logits_cuda(x, head);
#endif
  return lora_linear(
      mx::astype(x, mx::float32, stream()), LoraLinear{head, std::nullopt, std::nullopt});
}

}  // namespace metal_lora::ops
