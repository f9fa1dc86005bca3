// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Times of lora_shrink, lora_grad and the quantised formats on a GPU beside plain copies and reads
// of the same run: CUDA graphs of launches over rotating inputs, medians.
//   shrink_bench [shrink|grad|quantize]…
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/lora_kernels.h"
#include "kernels/cuda/lora_quantized.h"

namespace metal_lora::cuda {
namespace {

constexpr int kLaunches = 24, kReplays = 11;

/// Random 16-bit values near ±1, or any bits.
__global__ void fill(uint32_t* to, size_t words, uint32_t seed, uint32_t mask, uint32_t base) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 0x9e3779b9u + seed;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    to[i] = ((h ^ (h >> 16)) & mask) | base;
  }
}

__global__ void __launch_bounds__(512) copy_kernel(const uint4* from, uint4* to, size_t count) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += 4 * stride) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * stride < count) v[j] = from[i + j * stride];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * stride < count) to[i + j * stride] = v[j];
    }
  }
}
/// Reads, and writes only what cannot be.
__global__ void __launch_bounds__(512) read_kernel(const uint4* from, uint4* to, size_t count) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  uint32_t all = 0;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += 8 * stride) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (i + j * stride < count) {
        const uint4 v = from[i + j * stride];
        all |= v.x | v.y | v.z | v.w;
      }
    }
  }
  if (all == 0) to[threadIdx.x] = make_uint4(1, 2, 3, 4);
}
__global__ void empty_kernel() {}

struct Memory {
  char* data = nullptr;
  size_t bytes = 0;
  explicit Memory(size_t size, uint32_t mask = 0x80ff80ffu, uint32_t base = 0x3f003f00u)
      : bytes((size + 255) / 256 * 256) {
    check(cudaMalloc(&data, bytes), "cudaMalloc");
    fill<<<1024, 256>>>(reinterpret_cast<uint32_t*>(data), bytes / 4, 7, mask, base);
  }
  ~Memory() { cudaFree(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

cudaStream_t stream;
Context context;

/// Median microseconds of one launch; launch(i) enqueues the i-th.
double time_us(const std::function<void(int)>& launch) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  launch(0);
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kLaunches; ++i) launch(i);
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<double> times;
  for (int r = 0; r < kReplays + 3; ++r) {
    cudaEventRecord(begin, stream);
    cudaGraphLaunch(exec, stream);
    cudaEventRecord(end, stream);
    check(cudaEventSynchronize(end), "replay");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (r >= 3) times.push_back(1e3 * ms / kLaunches);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void print(const char* name, double us, double base_us, double bytes) {
  std::printf(
      "%-64s %8.2f us  base %8.2f us  ratio %5.2f  %6.0f GB/s\n",
      name,
      us,
      base_us,
      us / base_us,
      bytes / us / 1e3);
}

unsigned blocks_for(size_t count, int each) {
  return static_cast<unsigned>(
      std::max<size_t>(1, std::min<size_t>(132 * 8, (count + 512 * each - 1) / (512 * each))));
}
double read_us(const Memory& from, size_t bytes, int copies, const Memory& sink) {
  return time_us([&](int i) {
    read_kernel<<<blocks_for(bytes / 16, 8), 512, 0, stream>>>(
        reinterpret_cast<const uint4*>(from.data + (i % copies) * bytes),
        reinterpret_cast<uint4*>(sink.data),
        bytes / 16);
  });
}
double copy_us(const Memory& from, Memory& to, size_t bytes, int copies) {
  return time_us([&](int i) {
    copy_kernel<<<blocks_for(bytes / 16, 4), 512, 0, stream>>>(
        reinterpret_cast<const uint4*>(from.data + (i % copies) * bytes),
        reinterpret_cast<uint4*>(to.data + (i % copies) * bytes),
        bytes / 16);
  });
}

int copies_for(size_t bytes) {
  return static_cast<int>(std::min<size_t>(kLaunches, (size_t{200} << 20) / bytes + 2));
}

void bench_shrink(
    uint32_t m, uint32_t k, std::vector<uint32_t> ranks, bool kn, float drop, bool cold) {
  const size_t x_bytes = size_t{m} * k * 2;
  const int copies = cold ? copies_for(x_bytes) : 1;
  uint32_t columns = 0;
  for (uint32_t rank : ranks) columns += rank;
  Memory x(x_bytes * copies), right(size_t{columns} * k * 2), out(size_t{m} * columns * 2);
  ShrinkCall call;
  call.m = m;
  call.k = call.x_stride = k;
  call.right_is_kn = kn;
  call.out = out.data;
  call.out_stride = columns;
  size_t at = 0;
  for (uint32_t rank : ranks) {
    ShrinkPart& part = call.part[call.parts++];
    part.rank = rank;
    part.right = right.data + at;
    part.dropout = drop;
    at += size_t{rank} * k * 2;
  }
  const auto launch = [&](int i) {
    call.x = x.data + (i % copies) * x_bytes;
    lora_shrink(context, call);
  };
  const double base = read_us(x, x_bytes, copies, out);
  char name[128];
  std::snprintf(
      name,
      sizeof(name),
      "shrink m %u k %u columns %u%s%s%s",
      m,
      k,
      columns,
      kn ? " kn" : "",
      drop > 0 ? " dropout" : "",
      cold ? "" : " (x in L2)");
  print(name, time_us(launch), base, double(x_bytes));
}

struct GradShape {
  uint32_t rank, columns;
  bool transposed;
  int shares;
};
void bench_grad(
    const char* label,
    uint32_t m,
    std::vector<GradShape> shapes,
    DType small_dtype,
    float drop = 0) {
  std::vector<AdapterGrad> grads;
  std::vector<std::unique_ptr<Memory>> held;
  size_t bytes = 0;
  for (const GradShape& s : shapes) {
    if (s.shares < 0) bytes += size_t{m} * s.columns * 2;
  }
  const int copies = copies_for(bytes);
  Memory large(bytes * copies);
  size_t at = 0;
  for (const GradShape& s : shapes) {
    const size_t small_size = small_dtype == DType::f32 ? 4 : 2;
    held.push_back(std::make_unique<Memory>(size_t{m} * s.rank * small_size));
    AdapterGrad g;
    g.small = held.back()->data;
    g.small_stride = g.rank = s.rank;
    g.small_dtype = small_dtype;
    g.large_stride = g.columns = s.columns;
    g.large = s.shares < 0 ? large.data + at : grads[s.shares].large;
    g.transposed = s.transposed;
    g.dropout = drop;
    held.push_back(std::make_unique<Memory>(size_t{s.rank} * s.columns * 4));
    g.grad = reinterpret_cast<float*>(held.back()->data);
    grads.push_back(g);
    if (s.shares < 0) at += size_t{m} * s.columns * 2;
  }
  Memory sink(8192);
  const auto launch = [&](int i) {
    std::vector<AdapterGrad> here = grads;
    for (auto& g : here) g.large = static_cast<const char*>(g.large) + (i % copies) * bytes;
    lora_grad(context, m, DType::bf16, here.data(), here.size());
  };
  const double base = read_us(large, bytes, copies, sink);
  char name[128];
  std::snprintf(
      name,
      sizeof(name),
      "grad m %u %s%s%s",
      m,
      label,
      small_dtype == DType::f32 ? " f32" : " bf16",
      drop > 0 ? " dropout" : "");
  print(name, time_us(launch), base, double(bytes));
}

void bench_formats(uint32_t n, uint32_t k) {
  const size_t values = size_t{n} * k, dense = values * 2;
  const int copies = copies_for(dense);
  Memory w(dense * copies), out(dense * copies), codes(values * copies, ~0u, 0);
  Memory scales(values / 32 * 4, 0x007fffffu, 0x3f000000u),
      biases(values / 32 * 4 + 4096, 0x007fffffu, 0x3f000000u);
  char name[128];
  const double copy = copy_us(w, out, dense, copies), per_byte = copy / (2.0 * dense);
  print("copy of bf16 [n, k]", copy, copy, 2.0 * dense);
  const auto run = [&](const char* what, WeightParams p, bool quantize) {
    p.n = n;
    p.k = k;
    const size_t packed = p.format == WeightFormat::int8 ? values : values / 2;
    const double moved =
        dense + packed + (p.double_quant ? values / 64.0 : values * 4.0 / p.group_size) +
        (p.format == WeightFormat::nf4 ? 0
                                       : values * 2.0 / p.group_size - values * 2.0 / p.group_size);
    const double us = time_us([&](int i) {
      char* q = codes.data + (i % copies) * packed;
      char* d = (quantize ? w : out).data + (i % copies) * dense;
      if (!quantize) {
        dequantize(context, {p, q, scales.data, biases.data}, DType::bf16, d);
      } else if (p.format == WeightFormat::nf4) {
        quantize_nf4(context, p, DType::bf16, d, q, reinterpret_cast<float*>(scales.data));
      } else {
        quantize_affine(context, p, DType::bf16, d, q, scales.data, biases.data);
      }
    });
    std::snprintf(
        name, sizeof(name), "%s %s n %u k %u", quantize ? "quantize" : "dequantize", what, n, k);
    print(name, us, moved * per_byte, moved);
  };
  WeightParams p;
  p.layout = WeightLayout::row_major;
  p.format = WeightFormat::nf4;
  p.group_size = 64;
  run("nf4", p, false);
  p.double_quant = true;
  run("nf4 double", p, false);
  p.double_quant = false;
  run("nf4", p, true);
  p.scales_dtype = DType::bf16;
  p.format = WeightFormat::int4;
  run("int4", p, false);
  run("int4", p, true);
  p.format = WeightFormat::int8;
  run("int8", p, false);
  run("int8", p, true);
}

}  // namespace
}  // namespace metal_lora::cuda

int main(int argc, char** argv) {
  using namespace metal_lora::cuda;
  using metal_lora::DType;
  const auto wanted = [&](const char* what) {
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], what) == 0) return true;
    }
    return argc == 1;
  };
  check(cudaStreamCreate(&stream), "stream");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "properties");
  context.stream = stream;
  context.multiprocessors = properties.multiProcessorCount;
  context.capability = 10 * properties.major + properties.minor;
  std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  std::printf("empty kernel %.2f us\n", time_us([](int) { empty_kernel<<<1, 32, 0, stream>>>(); }));
  if (wanted("shrink")) {
    bench_shrink(4096, 4096, {16, 16, 16}, false, 0, true);
    bench_shrink(4096, 4096, {16, 16, 16}, false, 0, false);
    bench_shrink(4096, 4096, {16}, false, 0, true);
    bench_shrink(4096, 4096, {16}, true, 0, true);
    bench_shrink(4096, 4096, {16}, true, 0, false);
    bench_shrink(4096, 4096, {64}, true, 0, true);
    bench_shrink(4096, 4096, {64, 64}, false, 0, true);
    bench_shrink(4096, 4096, {64, 64, 64}, false, 0, true);
    bench_shrink(4096, 14336, {16}, false, 0, true);
    bench_shrink(2048, 2048, {16, 16, 16}, false, 0, true);
    bench_shrink(1024, 4096, {16, 16, 16}, false, 0, false);
    bench_shrink(512, 4096, {16, 16, 16}, false, 0, true);
    bench_shrink(512, 4096, {16, 16, 16}, false, 0, false);
    bench_shrink(64, 4096, {16, 16, 16}, false, 0, false);
    bench_shrink(64, 4096, {16}, true, 0, false);
    bench_shrink(8192, 4096, {16, 16, 16}, false, 0, true);
    bench_shrink(4096, 4096, {16}, false, 0.1f, true);
    bench_shrink(4096, 4096, {16, 16, 16}, false, 0.1f, true);
  }
  if (wanted("grad")) {
    for (DType small : {DType::bf16, DType::f32}) {
      bench_grad("dA rank 16, 4096 columns", 4096, {{16, 4096, false, -1}}, small);
      bench_grad("dB rank 16, 4096 columns", 4096, {{16, 4096, true, -1}}, small);
      bench_grad("dA rank 64, 4096 columns", 4096, {{64, 4096, false, -1}}, small);
      bench_grad("dA rank 16, 4096 columns", 512, {{16, 4096, false, -1}}, small);
      bench_grad(
          "layer (q k v o gate up down), 4096 and 11008, rank 16",
          4096,
          {{16, 4096, false, -1},
           {16, 4096, false, 0},
           {16, 4096, false, 0},
           {16, 4096, true, -1},
           {16, 4096, true, -1},
           {16, 4096, true, -1},
           {16, 4096, false, -1},
           {16, 4096, true, -1},
           {16, 4096, false, -1},
           {16, 4096, false, 8},
           {16, 11008, true, -1},
           {16, 11008, true, -1},
           {16, 11008, false, -1},
           {16, 4096, true, -1}},
          small);
    }
    bench_grad("dA rank 16, 4096 columns", 4096, {{16, 4096, false, -1}}, DType::f32, 0.1f);
  }
  if (wanted("quantize")) bench_formats(4096, 4096);
  return 0;
}
