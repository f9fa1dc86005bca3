// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_gemv beside cuBLAS's product of the base weight and the time that reading W takes at the
// measured bandwidth, in replayed graphs over rotating weights. One line a case.
//
//   gemv_bench [--quick]
#include <cublas_v2.h>

#include <cmath>
#include <cstring>
#include <map>

#include "bench/gpu/bench.cuh"

using namespace metal_lora;
namespace mlc = metal_lora::cuda;

namespace {

constexpr double kRotationBytes = 300e6;

/// Reads everything and keeps nothing: the limit of a product that must read W.
__global__ void __launch_bounds__(512) read_kernel(const uint4* p, size_t count, uint32_t* out) {
  uint32_t any = 0;
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (i + j * step < count) v[j] = __ldcs(p + i + j * step);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (i + j * step < count) any |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
  }
  if (any == 0x12345678u) *out = any;
}

double bytes_of(const mlc::WeightView& w) {
  const double count = double(w.params.n) * w.params.k;
  switch (w.params.format) {
    case WeightFormat::f32:
      return 4 * count;
    case WeightFormat::int4:
      return count / 2 + 4 * count / 64;
    case WeightFormat::int8:
      return count + 4 * count / 64;
    case WeightFormat::nf4:
      return count / 2 + 4 * count / 64;
    default:
      return 2 * count;
  }
}

const char* name_of(WeightFormat f) {
  constexpr const char* kNames[] = {"f32", "f16", "bf16", "int4", "int8", "nf4"};
  return kNames[static_cast<int>(f)];
}

double read_limit() {
  bench::Device device;
  constexpr size_t kBytes = size_t{1} << 30;
  void* p = device.normal<float>(kBytes / 4, 1.0f);
  auto* out = static_cast<uint32_t*>(device.memory.allocate(4));
  const float us = bench::graph_us(
      device,
      [&](int) {
        read_kernel<<<132 * 4, 512, 0, device.context.stream>>>(
            static_cast<const uint4*>(p), kBytes / 16, out);
      },
      5);
  return kBytes / us * 1e-3;
}

void bench_shape(uint32_t k, uint32_t n, bool quick, double limit) {
  bench::Device device;
  cublasHandle_t handle;
  cublasCreate(&handle);
  cublasSetStream(handle, device.context.stream);
  void* workspace = device.memory.allocate(size_t{64} << 20);
  cublasSetWorkspace(handle, workspace, size_t{64} << 20);
  device.context.weights_ready = true;  // as in a decode step's graph
  auto* x = device.normal<mlc::bf16>(size_t{16} * k, 1.0f);
  auto* y = device.normal<mlc::bf16>(size_t{16} * n, 1.0f);
  std::vector<mlc::LoraView> lora[3];
  const uint32_t ranks[3] = {8, 16, 64};
  std::map<uint32_t, float> base;
  for (WeightFormat format :
       {WeightFormat::bf16, WeightFormat::int4, WeightFormat::nf4, WeightFormat::int8}) {
    std::vector<mlc::WeightView> weights;
    double bytes = 0;
    while (bytes < kRotationBytes) {
      weights.push_back(device.weight(n, k, format));
      bytes += bytes_of(weights.back());
    }
    if (format == WeightFormat::bf16) {
      for (uint32_t m : {1u, 4u, 8u, 16u}) {
        size_t at = 0;
        base[m] = bench::graph_us(device, [&](int) {
          const float one = 1.0f, zero = 0.0f;
          const auto& w = weights[++at % weights.size()];
          cublasGemmEx(
              handle,
              CUBLAS_OP_T,
              CUBLAS_OP_N,
              n,
              m,
              k,
              &one,
              w.data,
              CUDA_R_16BF,
              k,
              x,
              CUDA_R_16BF,
              k,
              &zero,
              y,
              CUDA_R_16BF,
              n,
              CUBLAS_COMPUTE_32F,
              CUBLAS_GEMM_DEFAULT);
        });
      }
    }
    for (uint32_t m : {1u, 4u, 8u, 16u}) {
      if (quick && m == 4) continue;
      for (int r = -1; r < 3; ++r) {
        if (quick && (r == 0 || (r == 2 && m != 1))) continue;
        if (r >= 0 && lora[r].empty()) {
          for (int i = 0; i < 9; ++i) lora[r].push_back(device.lora(ranks[r], n, k));
        }
        size_t at = 0;
        const float us = bench::graph_us(device, [&](int) {
          ++at;
          mlc::LoraBranch b;
          b.weight = weights[at % weights.size()];
          if (r >= 0) b.lora = lora[r][at % lora[r].size()];
          b.y = y;
          mlc::lora_gemv(device.context, m, k, DType::bf16, x, &b, 1, DType::bf16);
        });
        const double gb = bytes_of(weights[0]) / us * 1e-3;
        std::printf(
            "%5u x %5u %-4s m %2u rank %2u: %7.2f us %5.0f GB/s %3.0f%% | cuBLAS bf16 %6.2f us "
            "ratio %.3f\n",
            n,
            k,
            name_of(format),
            m,
            r < 0 ? 0 : ranks[r],
            us,
            gb,
            100 * gb / limit,
            base[m],
            us / base[m]);
        std::fflush(stdout);
      }
    }
  }
  cublasDestroy(handle);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick =
      argc > 1 && (std::strcmp(argv[1], "--quick") == 0 || std::strcmp(argv[1], "--small") == 0);
  try {
    const double limit = read_limit();
    std::printf("read limit %.0f GB/s\n", limit);
    bench_shape(4096, 4096, quick, limit);
    if (argc > 1 && std::strcmp(argv[1], "--small") == 0) return 0;
    bench_shape(4096, 11008, quick, limit);
    if (!quick) bench_shape(11008, 4096, quick, limit);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "gemv_bench: %s\n", e.what());
    return 1;
  }
  return 0;
}
