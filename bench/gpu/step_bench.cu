// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A whole training step and a whole decode step of a Llama-like model of 1.07 B random weights
// (16 layers, 2048, 8192, 32/8 heads of 64, vocabulary 49152), without a file or a framework: what
// the kernels and the step's sequence cost. One JSON line each.
//
//   step_bench [train|decode|all] [--base bf16|nf4] [--batch 4] [--length 1024] [--rank 16]
//              [--budget-gb X] [--steps 7] [--layers 16] [--context 512]
#include <cmath>

#include "bench/gpu/bench.cuh"
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/train_step.h"

using namespace metal_lora;
namespace mlc = metal_lora::cuda;

namespace {

struct Options {
  std::string what = "all", base = "bf16";
  uint32_t batch = 4, length = 1024, rank = 16, layers = 16, context = 512;
  int steps = 7;
  double budget_gb = 8.0;
};

using Bench = bench::Device;

constexpr uint32_t kDims = 2048, kFfn = 8192, kHeads = 32, kKvHeads = 8, kHeadDim = 64,
                   kVocab = 49152;

template <typename F>
std::vector<float> timed(cudaStream_t stream, int steps, F&& f) {
  std::vector<float> ms;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  for (int i = 0; i < steps; ++i) {
    cudaEventRecord(begin, stream);
    f();
    cudaEventRecord(end, stream);
    mlc::check(cudaEventSynchronize(end), "a timed step");
    float t = 0.0f;
    cudaEventElapsedTime(&t, begin, end);
    ms.push_back(t);
  }
  return ms;
}

template <typename T>
T* upload(Bench& b, const std::vector<T>& host) {
  auto* p = static_cast<T*>(b.memory.allocate(host.size() * sizeof(T)));
  mlc::check(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
  return p;
}

float* inverse_frequencies(Bench& b) {
  std::vector<float> inv_freq(kHeadDim / 2);
  for (uint32_t i = 0; i < inv_freq.size(); ++i) {
    inv_freq[i] = static_cast<float>(std::pow(500000.0, -2.0 * i / kHeadDim));
  }
  return upload(b, inv_freq);
}

/// Of one step: packed segments of `length` tokens.
mlc::TrainBatch make_batch(Bench& b, const Options& o) {
  const uint32_t tokens = o.batch * o.length;
  std::vector<int32_t> ids(tokens), positions(tokens), start(tokens), targets(tokens);
  std::vector<float> weights(tokens, 1.0f);
  for (uint32_t i = 0; i < tokens; ++i) {
    ids[i] = static_cast<int32_t>((i * 7919u + 13u) % kVocab);
    targets[i] = static_cast<int32_t>(((i + 1) * 7919u + 13u) % kVocab);
    positions[i] = static_cast<int32_t>(i % o.length);
    start[i] = static_cast<int32_t>(i / o.length * o.length);
  }
  mlc::TrainBatch batch;
  batch.tokens = tokens;
  batch.ids = upload(b, ids);
  batch.positions = upload(b, positions);
  batch.segment_start = upload(b, start);
  batch.targets = upload(b, targets);
  batch.weights = upload(b, weights);
  return batch;
}

void bench_train(Bench& b, const Options& o) {
  const auto format = o.base == "nf4" ? WeightFormat::nf4 : WeightFormat::bf16;
  mlc::TrainModel m;
  m.dims = kDims;
  m.ffn = kFfn;
  m.q_heads = kHeads;
  m.kv_heads = kKvHeads;
  m.head_dim = kHeadDim;
  m.attention_scale = 0.125f;
  m.embedding = m.head = b.weight(kVocab, kDims, WeightFormat::bf16);
  m.final_norm = b.normal<float>(kDims, 0.0f, 1.0f);
  m.inv_freq = inverse_frequencies(b);
  const auto linear = [&](uint32_t n, uint32_t k) {
    mlc::TrainLinear l;
    l.weight = b.weight(n, k, format);
    l.rank = o.rank;
    l.scale = 2.0f;
    l.a = m.parameters;
    m.parameters += size_t{o.rank} * k;
    l.b = m.parameters;
    m.parameters += size_t{o.rank} * n;
    return l;
  };
  for (uint32_t i = 0; i < o.layers; ++i) {
    mlc::TrainLayer layer;
    layer.input_norm = layer.post_norm = m.final_norm;
    layer.q = linear(kDims, kDims);
    layer.k = linear(kKvHeads * kHeadDim, kDims);
    layer.v = linear(kKvHeads * kHeadDim, kDims);
    layer.o = linear(kDims, kDims);
    layer.gate = linear(kFfn, kDims);
    layer.up = linear(kFfn, kDims);
    layer.down = linear(kDims, kFfn);
    m.layers.push_back(layer);
  }
  const auto batch = make_batch(b, o);
  float* parameters = b.normal<float>(m.parameters, 0.01f);
  float* grads = b.normal<float>(m.parameters, 0.0f);
  float* moment = b.normal<float>(m.parameters, 0.0f);
  float* variance = b.normal<float>(m.parameters, 0.0f);
  auto* results = static_cast<float*>(b.memory.allocate(1024));
  const auto budget = static_cast<size_t>(o.budget_gb * 1e9);
  const size_t left = budget > b.memory.total() ? budget - b.memory.total() : 0;
  const auto kept = mlc::TrainStep::fit(m, batch.tokens, left);
  const mlc::TrainStep step(m, batch.tokens, kept);
  void* workspace = b.memory.allocate(step.workspace_bytes());
  AdamWParams adam;
  adam.count = m.parameters;
  adam.learning_rate = 1e-4f;
  adam.grad_scale = 1.0f / static_cast<float>(batch.tokens);
  uint64_t update = 0;
  const auto run = [&] {
    b.memory.reset();
    step.run(b.context, workspace, batch, parameters, grads, results);
    adam.step = ++update;
    mlc::adamw(
        b.context,
        adam,
        parameters,
        grads,
        moment,
        variance,
        results + 1,
        reinterpret_cast<int32_t*>(results + 2));
  };
  std::vector<float> losses;
  const auto loss = [&] {
    float host[2];
    mlc::check(cudaMemcpy(host, results, sizeof host, cudaMemcpyDeviceToHost), "loss");
    losses.push_back(host[0] / static_cast<float>(batch.tokens));
  };
  for (int i = 0; i < 3; ++i) {
    run();
    loss();
  }
  const auto ms = timed(b.context.stream, o.steps, run);
  loss();
  const float t = bench::median(ms);
  std::printf(
      "{\"kind\": \"train_step\", \"base\": \"%s\", \"tokens\": %u, \"rank\": %u, \"layers\": %u, "
      "\"kept_layers\": [%u, %u, %u], \"ms\": %.3f, \"best_ms\": %.3f, \"tokens_per_s\": %.0f, "
      "\"memory_gb\": %.3f, \"scratch_beyond_gb\": %.3f, \"losses\": [%.4f, %.4f, %.4f]}\n",
      o.base.c_str(),
      batch.tokens,
      o.rank,
      o.layers,
      kept.gate_up,
      kept.norms,
      kept.act,
      t,
      *std::min_element(ms.begin(), ms.end()),
      batch.tokens / t * 1e3,
      b.memory.total() * 1e-9,
      b.memory.scratch_used() * 1e-9,
      losses.front(),
      losses[2],
      losses.back());
}

void bench_decode(Bench& b, const Options& o) {
  const auto format = o.base == "nf4" ? WeightFormat::nf4 : WeightFormat::bf16;
  mlc::DecodeModel m;
  m.dims = kDims;
  m.ffn = kFfn;
  m.q_heads = kHeads;
  m.kv_heads = kKvHeads;
  m.head_dim = kHeadDim;
  m.attention_scale = 0.125f;
  m.embedding = m.head = b.weight(kVocab, kDims, WeightFormat::bf16);
  m.final_norm = b.normal<float>(kDims, 0.0f, 1.0f);
  m.inv_freq = inverse_frequencies(b);
  size_t adapter_bytes = 0;
  const auto linear = [&](uint32_t n, uint32_t k) {
    mlc::DecodeLinear l;
    l.weight = b.weight(n, k, format);
    if (o.rank > 0) {
      l.lora.params.rank = o.rank;
      l.lora.params.scale = 2.0f;
      l.lora.params.dtype = DType::bf16;
      l.lora.a = b.normal<mlc::bf16>(size_t{o.rank} * k, 0.01f);
      l.lora.b = b.normal<mlc::bf16>(size_t{o.rank} * n, 0.01f);
      adapter_bytes += 2 * size_t{o.rank} * (n + k);
    }
    return l;
  };
  for (uint32_t i = 0; i < o.layers; ++i) {
    mlc::DecodeLayer layer;
    layer.input_norm = layer.post_norm = m.final_norm;
    layer.q = linear(kDims, kDims);
    layer.k = linear(kKvHeads * kHeadDim, kDims);
    layer.v = linear(kKvHeads * kHeadDim, kDims);
    layer.o = linear(kDims, kDims);
    layer.gate = linear(kFfn, kDims);
    layer.up = linear(kFfn, kDims);
    layer.down = linear(kDims, kFfn);
    m.layers.push_back(layer);
  }
  const uint32_t capacity = (o.context + 255) / 256 * 256;
  auto* cache = b.normal<mlc::bf16>(size_t{o.layers} * 2 * capacity * kKvHeads * kHeadDim, 0.5f);
  mlc::DecodeStep step(m);
  void* workspace = b.memory.allocate(step.workspace_bytes());
  auto* logits = static_cast<float*>(b.memory.allocate(kVocab * sizeof(float) * 16));
  for (uint32_t count : {1u, 4u, 8u}) {
    uint32_t position = o.context / 2;
    std::vector<int32_t> ids(count, 17);
    const auto run = [&] {
      step.run(b.context, workspace, ids.data(), count, position++, capacity, 1, cache, logits);
    };
    for (int i = 0; i < 3; ++i) run();
    // Ten steps between two events: a real loop's host time is in it.
    const auto ms = timed(b.context.stream, o.steps, [&] {
      for (int i = 0; i < 10; ++i) run();
    });
    const float t = bench::median(ms) / 10;
    double weights = double{kVocab} * kDims * 2 + adapter_bytes;
    const double per_layer = double{kDims} * (2.0 * kDims + 2.0 * kKvHeads * kHeadDim + 3.0 * kFfn);
    weights += o.layers * per_layer * (o.base == "nf4" ? 0.5625 : 2.0);
    std::printf(
        "{\"kind\": \"%s\", \"base\": \"%s\", \"tokens\": %u, \"rank\": %u, "
        "\"layers\": %u, \"context\": %u, \"ms\": %.4f, \"tokens_per_s\": %.0f, \"gb_per_s\": "
        "%.0f}\n",
        count == 1 ? "decode_step" : "verify_step",
        o.base.c_str(),
        count,
        o.rank,
        o.layers,
        o.context,
        t,
        1e3 / t,
        weights / t * 1e-6);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    const auto value = [&] { return std::string(i + 1 < argc ? argv[++i] : ""); };
    const auto number = [&] { return static_cast<uint32_t>(std::atoi(value().c_str())); };
    if (a == "--base")
      o.base = value();
    else if (a == "--batch")
      o.batch = number();
    else if (a == "--length")
      o.length = number();
    else if (a == "--rank")
      o.rank = number();
    else if (a == "--layers")
      o.layers = number();
    else if (a == "--context")
      o.context = number();
    else if (a == "--steps")
      o.steps = static_cast<int>(number());
    else if (a == "--budget-gb")
      o.budget_gb = std::atof(value().c_str());
    else
      o.what = a;
  }
  try {
    if (o.what == "train" || o.what == "all") {
      Bench b;
      bench_train(b, o);
    }
    if (o.what == "decode" || o.what == "all") {
      Bench b;
      bench_decode(b, o);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "step_bench: %s\n", e.what());
    return 1;
  }
  return 0;
}
