// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The multi-adapter linear beside cuBLAS's base of the same run, with its parts apart. Two ways: W
// and the bank stay the same over the launches (what L2 holds of them is not read again), or rotate
// over more than L2. Bytes: W, and A_i and B_i of the adapters in use, each once; the limit is
// their time at the bandwidth of a plain read, measured here. Link with -lcublas. Arguments: token
// counts.
#include <cublas_v2.h>

#include <set>

#include "bench/gpu/bench.cuh"
#include "kernels/cuda/lora_multi.cuh"

namespace metal_lora::bench {
namespace {

constexpr uint32_t kN = 4096, kK = 4096, kRank = 16;

struct Call {
  uint32_t m, adapters;
  uint32_t segment;  ///< neighbouring tokens of one adapter: a prompt's; 0: no two tokens share one
};

/// Sums what it reads, so that nothing is optimised away.
__global__ void read_kernel(const uint4* from, size_t count, uint32_t* out) {
  uint32_t sum = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
#pragma unroll 8
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += stride) {
    const uint4 v = __ldcs(from + i);
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 12345) *out = sum;
}

double read_bandwidth() {
  Device device;
  constexpr size_t kBytes = size_t{1} << 30;
  auto* from = device.normal<float>(kBytes / 4, 1.0f);
  auto* out = static_cast<uint32_t*>(device.memory.allocate(4));
  const float us = graph_us(
      device,
      [&](int) {
        read_kernel<<<132 * 4, 512, 0, device.context.stream>>>(
            reinterpret_cast<uint4*>(from), kBytes / 16, out);
      },
      5);
  return kBytes / us * 1e-6;
}

struct Bench {
  Device device;
  cublasHandle_t blas;
  Call call;
  std::vector<cuda::WeightView> weights;
  std::vector<cuda::LoraBankView> banks;
  std::vector<int32_t> ids;
  int32_t *device_ids, *no_ids;
  cuda::bf16 *x, *y;

  template <typename T>
  T* upload(const std::vector<T>& host) {
    void* p = device.memory.allocate(host.size() * sizeof(T));
    cuda::check(
        cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
    return static_cast<T*>(p);
  }
  explicit Bench(Call c, bool rotate) : call(c), ids(c.m) {
    for (int i = 0; i < (rotate ? 8 : 1); ++i) {
      weights.push_back(device.weight(kN, kK, WeightFormat::bf16));
    }
    uint64_t state = 12345;
    for (uint32_t t = 0; t < c.m; ++t) {
      if (c.segment == 0) {
        ids[t] = static_cast<int32_t>(t % c.adapters);
        continue;
      }
      if (c.segment > 1 && t % c.segment != 0) {
        ids[t] = ids[t - 1];
        continue;
      }
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      ids[t] = static_cast<int32_t>((state >> 33) % c.adapters);
    }
    device_ids = upload(ids);
    no_ids = upload(std::vector<int32_t>(c.m, -1));
    const auto* ranks = upload(std::vector<int32_t>(c.adapters, kRank));
    const auto* scales = upload(std::vector<float>(c.adapters, 2.0f));
    for (int i = 0; i < (rotate ? 8 : 1); ++i) {
      cuda::LoraBankView bank;
      bank.params = {c.adapters, kRank, DType::bf16};
      bank.a = device.normal<cuda::bf16>(size_t{c.adapters} * kRank * kK, 1.0f / 64.0f);
      bank.b = device.normal<cuda::bf16>(size_t{c.adapters} * kRank * kN, 0.1f);
      bank.ranks = ranks;
      bank.scales = scales;
      banks.push_back(bank);
    }
    x = device.normal<cuda::bf16>(size_t{c.m} * kK, 1.0f);
    y = device.normal<cuda::bf16>(size_t{c.m} * kN, 1.0f);
    cublasCreate(&blas);
    cublasSetStream(blas, device.context.stream);
    void* space = device.memory.allocate(size_t{32} << 20);
    cublasSetWorkspace(blas, space, size_t{32} << 20);
  }
  ~Bench() { cublasDestroy(blas); }

  void base(int i) {
    const float one = 1.0f, zero = 0.0f;
    cublasGemmEx(
        blas,
        CUBLAS_OP_T,
        CUBLAS_OP_N,
        kN,
        call.m,
        kK,
        &one,
        weights[i % weights.size()].data,
        CUDA_R_16BF,
        kK,
        x,
        CUDA_R_16BF,
        kK,
        &zero,
        y,
        CUDA_R_16BF,
        kN,
        CUBLAS_COMPUTE_32F,
        CUBLAS_GEMM_DEFAULT);
  }
  void ours(int i, const int32_t* index) {
    cuda::lora_linear_multi_forward(
        device.context,
        call.m,
        DType::bf16,
        x,
        weights[i % weights.size()],
        banks[i % banks.size()],
        index,
        nullptr,
        y);
  }
  void shrink(int i) {
    const cuda::LoraBankView& bank = banks[i % banks.size()];
    const cuda::multi::Bank a = {bank.a, DType::bf16, kK, kRank, bank.ranks, bank.scales};
    cuda::multi::shrink(device.context, {device_ids, call.m, call.adapters}, a, DType::bf16, x);
  }
  double bytes() const {
    const std::set<int32_t> used(ids.begin(), ids.end());
    return 2.0 * kN * kK + used.size() * 2.0 * kRank * (kN + kK) + 2.0 * call.m * (kN + kK);
  }
};

void run(Call call, double bandwidth) {
  for (bool rotate : {false, true}) {
    Bench bench(call, rotate);
    Device& device = bench.device;
    const float base = graph_us(
        device, [&](int i) { bench.base(i); }, 24);
    const float ours = graph_us(
        device, [&](int i) { bench.ours(i, bench.device_ids); }, 24);
    const float none = graph_us(
        device, [&](int i) { bench.ours(i, bench.no_ids); }, 24);
    const float again = graph_us(
        device, [&](int i) { bench.base(i); }, 24);
    const float shrink = call.m <= cuda::multi::kScanTokens
                             ? graph_us(
                                   device, [&](int i) { bench.shrink(i); }, 24)
                             : 0.0f;
    const double limit = bench.bytes() / bandwidth * 1e-6;
    std::printf(
        "m %4u adapters %3u by %2u %-8s | cublas %7.2f (%7.2f) us | ours %7.2f us %5.3fx | no "
        "adapter "
        "%7.2f us | shrink %6.2f us | %5.1f MB, limit %6.2f us: %5.3fx of cublas\n",
        call.m,
        call.adapters,
        call.segment,
        rotate ? "rotating" : "fixed",
        base,
        again,
        ours,
        ours / base,
        none,
        shrink,
        bench.bytes() * 1e-6,
        limit,
        limit / base);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace metal_lora::bench

int main(int argc, char** argv) {
  using namespace metal_lora::bench;
  try {
    const double bandwidth = read_bandwidth();
    std::printf("read %.3f TB/s\n", bandwidth);
    for (int i = 1; i < argc; ++i) {
      const auto m = static_cast<uint32_t>(std::atoi(argv[i]));
      if (m <= 512) run({m, 128, 1}, bandwidth);
      if (m <= 128) run({m, 128, 0}, bandwidth);
      run({m, 8, 1}, bandwidth);
      run({m, 128, 16}, bandwidth);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
