// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Attention of a training step (packed segments, forward and backward) and of a decode step over
// long caches. Argument: train or decode (none: both). attention_torch.py times PyTorch's on the
// same shapes.
#include <cstring>

#include "bench/gpu/bench.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::bench {
namespace {

using cuda::bf16;

struct Training {
  uint32_t segments, length, q_heads, kv_heads, head_dim;
};

void train(Device& device, const Training& t) {
  constexpr int kCopies = 4;
  const uint32_t tokens = t.segments * t.length;
  const size_t q_width = size_t{t.q_heads} * t.head_dim, kv_width = size_t{t.kv_heads} * t.head_dim;
  const size_t width = q_width + 2 * kv_width;
  AttentionParams p;
  p.q_tokens = p.kv_tokens = tokens;
  p.q_heads = t.q_heads, p.kv_heads = t.kv_heads, p.head_dim = t.head_dim;
  p.scale = 1.0f / std::sqrt(static_cast<float>(t.head_dim));
  p.dtype = DType::bf16;
  p.q_stride = p.k_stride = p.v_stride = width;
  p.o_stride = q_width;
  std::vector<int32_t> starts(tokens);
  for (uint32_t i = 0; i < tokens; ++i) starts[i] = static_cast<int32_t>(i / t.length * t.length);
  auto* segment_start = static_cast<int32_t*>(device.memory.allocate(tokens * 4));
  cudaMemcpy(segment_start, starts.data(), tokens * 4, cudaMemcpyHostToDevice);
  bf16 *qkv[kCopies], *out[kCopies], *dout[kCopies], *dqkv[kCopies];
  float* lse[kCopies];
  for (int c = 0; c < kCopies; ++c) {
    qkv[c] = device.normal<bf16>(tokens * width, 1.0f);
    dout[c] = device.normal<bf16>(tokens * q_width, 1.0f);
    out[c] = static_cast<bf16*>(device.memory.allocate(tokens * q_width * 2));
    dqkv[c] = static_cast<bf16*>(device.memory.allocate(tokens * width * 2));
    lse[c] = static_cast<float*>(device.memory.allocate(size_t{tokens} * t.q_heads * 4));
  }
  const auto forward = [&](int i) {
    const int c = i % kCopies;
    cuda::attention_forward(
        device.context,
        p,
        qkv[c],
        qkv[c] + q_width,
        qkv[c] + q_width + kv_width,
        segment_start,
        out[c],
        lse[c]);
  };
  const auto backward = [&](int i) {
    const int c = i % kCopies;
    cuda::attention_backward(
        device.context,
        p,
        qkv[c],
        qkv[c] + q_width,
        qkv[c] + q_width + kv_width,
        segment_start,
        out[c],
        lse[c],
        dout[c],
        dqkv[c],
        dqkv[c] + q_width,
        dqkv[c] + q_width + kv_width);
  };
  const double flops = 4.0 * t.segments * t.q_heads * t.head_dim * 0.5 * t.length * t.length;
  const float forward_us = graph_us(device, forward), backward_us = graph_us(device, backward);
  std::printf(
      "train %u x %u, heads %u/%u, dim %u: forward %.1f us %.0f TFLOP/s, backward %.1f us %.0f "
      "TFLOP/s\n",
      t.segments,
      t.length,
      t.q_heads,
      t.kv_heads,
      t.head_dim,
      forward_us,
      flops / forward_us * 1e-6,
      backward_us,
      2.5 * flops / backward_us * 1e-6);
}

void decode(Device& device, uint32_t queries, uint32_t keys, uint32_t capacity, uint32_t head_dim) {
  AttentionParams p;
  p.q_tokens = queries, p.kv_tokens = capacity;
  p.q_heads = 32, p.kv_heads = 8, p.head_dim = head_dim;
  p.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  p.dtype = DType::bf16;
  p.q_stride = p.o_stride = size_t{32} * head_dim;
  p.k_stride = p.v_stride = size_t{8} * head_dim;
  const size_t cache = capacity * p.k_stride;
  const int copies = static_cast<int>(
      std::clamp<size_t>((size_t{200} << 20) / (size_t{keys} * p.k_stride * 4), 2, 20));
  std::vector<bf16*> k, v;
  for (int c = 0; c < copies; ++c) {
    k.push_back(device.normal<bf16>(cache, 1.0f));
    v.push_back(device.normal<bf16>(cache, 1.0f));
  }
  auto* q = device.normal<bf16>(queries * p.q_stride, 1.0f);
  auto* out = static_cast<bf16*>(device.memory.allocate(queries * p.o_stride * 2));
  auto* offset = static_cast<int32_t*>(device.memory.allocate(4));
  const int32_t position = static_cast<int32_t>(keys - queries);
  cudaMemcpy(offset, &position, 4, cudaMemcpyHostToDevice);
  const float us = graph_us(device, [&](int i) {
    cuda::attention_forward(
        device.context, p, q, k[i % copies], v[i % copies], nullptr, out, nullptr, offset);
  });
  std::printf(
      "decode %u of %u keys (capacity %u), heads 32/8, dim %u: %.2f us %.0f GB/s\n",
      queries,
      keys,
      capacity,
      head_dim,
      us,
      4.0 * keys * p.k_stride / us * 1e-3);
}

void copy_base(Device& device) {
  const size_t bytes = size_t{512} << 20;
  void *from = device.memory.allocate(bytes), *to = device.memory.allocate(bytes);
  const float us = graph_us(
      device,
      [&](int) {
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, device.context.stream);
      },
      4);
  std::printf("copy: %.0f GB/s read and written\n", 2.0 * bytes / us * 1e-3);
}

int run(int argc, char** argv) {
  const auto wants = [&](const char* part) { return argc < 2 || std::strcmp(argv[1], part) == 0; };
  if (wants("train")) {
    Device device;
    std::printf("%s\n", device.name.c_str());
    train(device, {4, 1024, 32, 8, 64});
    train(device, {1, 4096, 32, 8, 64});
    train(device, {4, 1024, 32, 8, 128});
  }
  if (!wants("decode")) return 0;
  for (const uint32_t head_dim : {64u, 128u}) {
    for (const uint32_t keys : {1024u, 8192u, 32768u}) {
      Device device;
      decode(device, 1, keys, 32768, head_dim);
    }
  }
  Device device;
  decode(device, 1, 1000, 2048, 64);
  decode(device, 5, 8000, 8192, 64);
  copy_base(device);
  return 0;
}

}  // namespace
}  // namespace metal_lora::bench

int main(int argc, char** argv) {
  try {
    return metal_lora::bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
