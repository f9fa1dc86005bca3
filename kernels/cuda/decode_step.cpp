// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Eight kernels a layer, in one graph. What limits a step is the bytes of the weights; between the
// linears stand kernels that only cost their launch.
#include "kernels/cuda/decode_step.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels/cuda/decode_parts.h"
#include "kernels/cuda/stage_scratch.h"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kTokens = DecodeInputs::kMaxTokens;
constexpr size_t kStageScratchBytes = size_t{16} << 20;
constexpr size_t kMaxGraphs = 64;

size_t aligned(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

size_t bytes_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

}  // namespace

struct DecodeStep::Layout {
  size_t inputs = 0, cos_sin = 0, x = 0, x2 = 0, normed = 0, q = 0, k = 0, v = 0, attended = 0,
         gate = 0, up = 0, act = 0, logits = 0, stage = 0, bytes = 0;
};

DecodeStep::Layout DecodeStep::layout() const {
  const auto& m = model_;
  const size_t e = bytes_of(m.dtype);
  Layout l;
  size_t at = 0;
  const auto take = [&](size_t bytes) { return std::exchange(at, at + aligned(bytes)); };
  l.inputs = take(sizeof(DecodeInputs));
  l.cos_sin = take(size_t{kTokens} * m.head_dim * sizeof(float));
  l.x = take(size_t{kTokens} * m.dims * sizeof(float));
  l.x2 = take(size_t{kTokens} * m.dims * sizeof(float));
  l.normed = take(size_t{kTokens} * m.dims * e);
  l.q = take(size_t{kTokens} * m.q_heads * m.head_dim * e);
  l.k = take(size_t{kTokens} * m.kv_heads * m.head_dim * e);
  l.v = take(size_t{kTokens} * m.kv_heads * m.head_dim * e);
  l.attended = take(size_t{kTokens} * m.q_heads * m.head_dim * e);
  l.gate = take(size_t{kTokens} * m.ffn * e);
  l.up = take(size_t{kTokens} * m.ffn * e);
  l.act = take(size_t{kTokens} * m.ffn * e);
  l.logits = take(size_t{kTokens} * m.head.params.n * sizeof(float));
  l.stage = take(kStageScratchBytes);
  l.bytes = at;
  return l;
}

DecodeStep::DecodeStep(DecodeModel model) : model_(std::move(model)) {
  workspace_bytes_ = layout().bytes;
}

DecodeStep::~DecodeStep() {
  for (auto& [key, graph] : graphs_) cudaGraphExecDestroy(graph);
}

/// The kernels of one step, onto a stream that is being captured.
class DecodeStep::Run {
 public:
  Run(const DecodeStep& step, const Context& context, const Key& key)
      : m_(step.model_),
        l_(step.layout()),
        key_(key),
        base_(static_cast<char*>(key.workspace)),
        stage_(base_ + l_.stage, kStageScratchBytes, nullptr),
        context_(context) {
    context_.scratch = &stage_;
    context_.weights_ready = true;  // nothing in the graph writes them
  }

  void all() {
    call([&](const Context& c) {
      rope_table(c, key_.count, m_.head_dim, positions(), m_.inv_freq, m_.rope_factor, cos_sin());
    });
    // No programmatic launch: all behind it may read the inputs and the table before they wait.
    call([&](const Context& c) {
      lora_embedding_forward(
          c, key_.count, DType::f32, inputs()->ids, m_.embedding, m_.embedding_lora, x());
    });
    for (size_t i = 0; i < m_.layers.size(); ++i) layer(i);
    head();
  }

 private:
  void* at(size_t offset) const { return base_ + offset; }
  DecodeInputs* inputs() const { return static_cast<DecodeInputs*>(at(l_.inputs)); }
  const int32_t* positions() const { return inputs()->positions; }
  float* cos_sin() const { return static_cast<float*>(at(l_.cos_sin)); }
  float* x() const { return static_cast<float*>(at(l_.x)); }
  float* x2() const { return static_cast<float*>(at(l_.x2)); }

  template <typename F>
  void call(F&& f) {
    stage_.reset();
    f(context_);
  }

  static LoraBranch branch(const DecodeLinear& linear, void* y) {
    LoraBranch b;
    b.weight = linear.weight;
    b.lora = linear.lora;
    b.bias = linear.bias;
    b.y = y;
    return b;
  }

  template <size_t N>
  void linears(const void* from, const LoraBranch (&branches)[N], DType y_dtype) {
    call([&](const Context& c) {
      lora_gemv(c, key_.count, branches[0].weight.params.k, m_.dtype, from, branches, N, y_dtype);
    });
  }

  void norm(const float* from, const float* weight, uint32_t rows) {
    call([&](const Context& c) {
      decode_norm(c, rows, m_.dims, m_.eps, from, weight, m_.dtype, at(l_.normed));
    });
  }

  void layer(size_t index) {
    const auto& w = m_.layers[index];
    const size_t half = size_t{key_.capacity} * m_.kv_heads * m_.head_dim * bytes_of(m_.dtype);
    char* keys = static_cast<char*>(key_.cache) + 2 * half * index;
    norm(x(), w.input_norm, key_.count);
    const LoraBranch qkv[] = {branch(w.q, at(l_.q)), branch(w.k, at(l_.k)), branch(w.v, at(l_.v))};
    linears(at(l_.normed), qkv, m_.dtype);
    attend(w, keys, keys + half);
    LoraBranch o[] = {branch(w.o, x2())};
    o[0].residual = x();
    linears(at(l_.attended), o, DType::f32);

    norm(x2(), w.post_norm, key_.count);
    const LoraBranch gate_up[] = {branch(w.gate, at(l_.gate)), branch(w.up, at(l_.up))};
    linears(at(l_.normed), gate_up, m_.dtype);
    call([&](const Context& c) {
      swiglu_forward(c, size_t{key_.count} * m_.ffn, m_.dtype, at(l_.gate), at(l_.up), at(l_.act));
    });
    LoraBranch down[] = {branch(w.down, x())};
    down[0].residual = x2();
    linears(at(l_.act), down, DType::f32);
  }

  void attend(const DecodeLayer& w, void* keys, void* values) {
    DecodeAttentionParams p;
    p.tokens = key_.count;
    p.q_heads = m_.q_heads;
    p.kv_heads = m_.kv_heads;
    p.head_dim = m_.head_dim;
    p.capacity = key_.capacity;
    p.window = w.window;
    p.eps = m_.eps;
    p.scale = m_.attention_scale;
    p.dtype = m_.dtype;
    call([&](const Context& c) {
      decode_attention(
          c,
          p,
          positions(),
          cos_sin(),
          w.q_norm,
          w.k_norm,
          at(l_.q),
          at(l_.k),
          at(l_.v),
          keys,
          values,
          at(l_.attended));
    });
  }

  void head() {
    const float* last = x() + size_t{key_.count - key_.rows} * m_.dims;
    norm(last, m_.final_norm, key_.rows);
    LoraBranch b;
    b.weight = m_.head;
    b.y = at(l_.logits);
    call([&](const Context& c) {
      lora_gemv(c, key_.rows, m_.dims, m_.dtype, at(l_.normed), &b, 1, DType::f32);
    });
  }

  const DecodeModel& m_;
  const Layout l_;
  const Key key_;
  char* base_;
  StageScratch stage_;
  Context context_;
};

void DecodeStep::run(
    const Context& context,
    void* workspace,
    const int32_t* ids,
    uint32_t count,
    uint32_t position,
    uint32_t capacity,
    uint32_t rows,
    void* cache,
    float* logits) {
  if (count == 0 || count > kTokens || rows == 0 || rows > count || position + count > capacity) {
    throw std::invalid_argument("[decode_step] tokens, rows or position are out of range");
  }
  const Key key{count, rows, capacity, cache, workspace};
  auto found = graphs_.find(key);
  if (found == graphs_.end()) {
    if (graphs_.size() >= kMaxGraphs) {
      for (auto& [k, graph] : graphs_) cudaGraphExecDestroy(graph);
      graphs_.clear();
    }
    check(
        cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal), "capture begins");
    cudaGraph_t graph = nullptr;
    try {
      Run(*this, context, key).all();
    } catch (...) {
      cudaStreamEndCapture(context.stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(context.stream, &graph), "capture ends");
    cudaGraphExec_t executable = nullptr;
    const auto status = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "cudaGraphInstantiate");
    found = graphs_.emplace(key, executable).first;
  }
  DecodeInputs inputs{};
  for (uint32_t i = 0; i < kTokens; ++i) {
    inputs.ids[i] = i < count ? ids[i] : 0;
    inputs.positions[i] = static_cast<int32_t>(position + i);
  }
  const Layout l = layout();
  char* base = static_cast<char*>(workspace);
  check(
      cudaMemcpyAsync(
          base + l.inputs, &inputs, sizeof inputs, cudaMemcpyHostToDevice, context.stream),
      "decode inputs");
  check(cudaGraphLaunch(found->second, context.stream), "cudaGraphLaunch");
  check(
      cudaMemcpyAsync(
          logits,
          base + l.logits,
          size_t{rows} * model_.head.params.n * sizeof(float),
          cudaMemcpyDeviceToDevice,
          context.stream),
      "decode logits");
}

}  // namespace metal_lora::cuda
