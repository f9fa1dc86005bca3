// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the GPU benchmarks share: random device data, scratch, timing of replayed graphs.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::bench {

__device__ inline uint32_t hash(uint64_t i) {
  i = (i ^ (i >> 30)) * 0xbf58476d1ce4e5b9ull;
  i = (i ^ (i >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(i >> 16);
}

/// Sum of four uniforms: close enough to a normal, deviation `sigma`.
__device__ inline float near_normal(uint64_t i, float sigma) {
  const uint32_t h = hash(i * 2 + 1), g = hash(i * 2 + 7777777);
  const float u = (h & 0xffff) + (h >> 16) + (g & 0xffff) + (g >> 16);
  return sigma * (u / 65536.0f - 2.0f) * 1.7320508f;
}

template <typename T>
__global__ void fill_normal(T* to, size_t count, uint64_t seed, float sigma, float mean) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    to[i] = cuda::from_float<T>(mean + near_normal(seed + i, sigma));
  }
}

static __global__ void fill_bits(uint32_t* to, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    to[i] = hash(seed + i);
  }
}

/// Everything that a benchmark allocates, counted; freed at the end of its life. As scratch it
/// bumps through one region that reset() empties, so that a captured graph reuses it.
class Memory final : public cuda::Scratch {
 public:
  explicit Memory(size_t scratch_bytes = size_t{512} << 20) : region_bytes_(scratch_bytes) {
    if (scratch_bytes > 0) region_ = static_cast<char*>(allocate(scratch_bytes));
    total_ = 0;
  }
  ~Memory() {
    for (void* p : blocks_) cudaFree(p);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* allocate(size_t bytes) {
    void* p = nullptr;
    cuda::check(cudaMalloc(&p, std::max<size_t>(bytes, 256)), "cudaMalloc");
    blocks_.push_back(p);
    total_ += bytes;
    return p;
  }
  void* take(size_t bytes) override {
    const size_t size = (bytes + 255) / 256 * 256;
    if (used_ + size > region_bytes_) throw cuda::CudaError("[bench] out of scratch");
    void* p = region_ + used_;
    used_ += size;
    most_ = std::max(most_, used_);
    return p;
  }
  void reset() { used_ = 0; }
  size_t total() const { return total_; }
  size_t scratch_used() const { return most_; }

 private:
  std::vector<void*> blocks_;
  char* region_ = nullptr;
  size_t region_bytes_ = 0, used_ = 0, most_ = 0, total_ = 0;
};

/// A stream on device 0, memory and a context.
class Device {
 public:
  Device() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      std::fprintf(stderr, "bench: no NVIDIA GPU here\n");
      std::exit(2);
    }
    cudaDeviceProp properties;
    cuda::check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    cuda::check(cudaStreamCreate(&context.stream), "cudaStreamCreate");
    context.scratch = &memory;
    context.multiprocessors = properties.multiProcessorCount;
    context.capability = 10 * properties.major + properties.minor;
    name = properties.name;
#ifdef METAL_LORA_CUDA_COUNTERS
    context.counters = static_cast<uint32_t*>(memory.allocate(METAL_LORA_CUDA_COUNTERS * 4));
    cuda::check(cudaMemset(context.counters, 0, METAL_LORA_CUDA_COUNTERS * 4), "cudaMemset");
#endif
  }

  template <typename T>
  T* normal(size_t count, float sigma, float mean = 0.0f) {
    auto* p = static_cast<T*>(memory.allocate(count * sizeof(T)));
    fill_normal<<<1024, 256, 0, context.stream>>>(p, count, seed_, sigma, mean);
    seed_ += count;
    return p;
  }

  /// [n, k] with unit-variance outputs for unit-variance inputs, nearly.
  cuda::WeightView weight(uint32_t n, uint32_t k, WeightFormat format) {
    cuda::WeightView w;
    w.params.n = n;
    w.params.k = k;
    w.params.format = format;
    const float sigma = 0.7f / std::sqrt(static_cast<float>(k));
    if (format < WeightFormat::int4) {
      w.data = format == WeightFormat::f32 ? static_cast<void*>(normal<float>(size_t{n} * k, sigma))
               : format == WeightFormat::f16
                   ? static_cast<void*>(normal<cuda::f16>(size_t{n} * k, sigma))
                   : static_cast<void*>(normal<cuda::bf16>(size_t{n} * k, sigma));
      return w;
    }
    w.params.group_size = 64;
    const size_t words = size_t{n} * k / (format == WeightFormat::int8 ? 4 : 8);
    auto* q = static_cast<uint32_t*>(memory.allocate(words * 4));
    fill_bits<<<1024, 256, 0, context.stream>>>(q, words, seed_);
    seed_ += words;
    w.data = q;
    const size_t groups = size_t{n} * k / 64;
    if (format == WeightFormat::nf4) {
      w.scales = normal<float>(groups, 0.1f * sigma, 1.5f * sigma);
      return w;
    }
    const float step = sigma / (format == WeightFormat::int8 ? 64.0f : 4.0f);
    w.params.scales_dtype = DType::f16;
    w.scales = normal<cuda::f16>(groups, 0.1f * step, step);
    w.biases = normal<cuda::f16>(groups, 0.1f * sigma, -1.5f * sigma);
    return w;
  }

  cuda::LoraView lora(uint32_t rank, uint32_t n, uint32_t k) {
    cuda::LoraView l;
    l.params.rank = rank;
    l.params.scale = 2.0f;
    l.params.dtype = DType::bf16;
    l.a = normal<cuda::bf16>(size_t{rank} * k, 1.0f / std::sqrt(static_cast<float>(k)));
    l.b = normal<cuda::bf16>(size_t{rank} * n, 0.1f);
    return l;
  }

  Memory memory;
  cuda::Context context;
  std::string name;

 private:
  uint64_t seed_ = 1;
};

inline float median(std::vector<float> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

/// Median microseconds of one call of each of several f(i), from replays of a graph of `launches`
/// calls each. The graphs are replayed in turns: clocks that fall under load fall for all of them.
inline std::vector<float> turns_us(
    Device& device,
    const std::vector<std::function<void(int)>>& calls,
    int launches = 20,
    int replays = 9) {
  const auto stream = device.context.stream;
  std::vector<cudaGraphExec_t> graphs(calls.size());
  for (size_t c = 0; c < calls.size(); ++c) {
    device.memory.reset();
    calls[c](0);
    cuda::check(cudaStreamSynchronize(stream), "first call");
    cudaGraph_t graph;
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < launches; ++i) {
      device.memory.reset();
      calls[c](i);
    }
    cuda::check(cudaStreamEndCapture(stream, &graph), "capture");
    cuda::check(cudaGraphInstantiate(&graphs[c], graph, 0), "cudaGraphInstantiate");
    cudaGraphDestroy(graph);
  }
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<std::vector<float>> us(calls.size());
  for (int r = 0; r < replays + 2; ++r) {
    for (size_t c = 0; c < calls.size(); ++c) {
      cudaEventRecord(begin, stream);
      cuda::check(cudaGraphLaunch(graphs[c], stream), "cudaGraphLaunch");
      cudaEventRecord(end, stream);
      cuda::check(cudaEventSynchronize(end), "replay");
      float ms = 0.0f;
      cudaEventElapsedTime(&ms, begin, end);
      if (r >= 2) us[c].push_back(ms * 1e3f / launches);
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  for (auto graph : graphs) cudaGraphExecDestroy(graph);
  std::vector<float> medians;
  for (auto& list : us) medians.push_back(median(list));
  return medians;
}

/// The same of one call.
inline float graph_us(
    Device& device, const std::function<void(int)>& f, int launches = 20, int replays = 9) {
  return turns_us(device, {f}, launches, replays)[0];
}

}  // namespace metal_lora::bench
