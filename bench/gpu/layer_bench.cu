// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// LoRA linears against the base product alone (cuBLAS's, and ours without the adapter) in one run:
// forward, forward + backward, quantised bases, many adapters. One JSON line a case.
//
//   layer_bench [--quick]
#include <cublas_v2.h>

#include <cmath>
#include <memory>

#include "bench/gpu/bench.cuh"
#include "kernels/cuda/lora_skinny.h"

using namespace metal_lora;
namespace mlc = metal_lora::cuda;

namespace {

constexpr double kRotationBytes = 400e6;  // of weights, so that L2 does not hold them

void check_cublas(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw mlc::CudaError("[cublas] status " + std::to_string(static_cast<int>(status)));
  }
}

class Cublas {
 public:
  explicit Cublas(cudaStream_t stream) {
    check_cublas(cublasCreate(&handle_));
    check_cublas(cublasSetStream(handle_, stream));
    cuda::check(cudaMalloc(&workspace_, kWorkspace), "cudaMalloc");
    check_cublas(cublasSetWorkspace(handle_, workspace_, kWorkspace));
  }
  ~Cublas() {
    cublasDestroy(handle_);
    cudaFree(workspace_);
  }
  /// y [m, n] = x [m, k]·w [n, k]ᵀ
  void forward(uint32_t m, uint32_t n, uint32_t k, const void* x, const void* w, void* y) {
    gemm(CUBLAS_OP_T, n, m, k, w, k, x, k, y, n);
  }
  /// dx [m, k] = dy [m, n]·w [n, k]
  void backward(uint32_t m, uint32_t n, uint32_t k, const void* dy, const void* w, void* dx) {
    gemm(CUBLAS_OP_N, k, m, n, w, k, dy, n, dx, k);
  }

 private:
  static constexpr size_t kWorkspace = size_t{64} << 20;
  void gemm(
      cublasOperation_t op,
      uint32_t rows,
      uint32_t columns,
      uint32_t inner,
      const void* a,
      uint32_t lda,
      const void* b,
      uint32_t ldb,
      void* c,
      uint32_t ldc) {
    const float one = 1.0f, zero = 0.0f;
    check_cublas(cublasGemmEx(
        handle_,
        op,
        CUBLAS_OP_N,
        static_cast<int>(rows),
        static_cast<int>(columns),
        static_cast<int>(inner),
        &one,
        a,
        CUDA_R_16BF,
        static_cast<int>(lda),
        b,
        CUDA_R_16BF,
        static_cast<int>(ldb),
        &zero,
        c,
        CUDA_R_16BF,
        static_cast<int>(ldc),
        CUBLAS_COMPUTE_32F,
        CUBLAS_GEMM_DEFAULT));
  }

  cublasHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
};

struct Case {
  uint32_t k, n, rank, m;
};

mlc::LoraBranch branch_of(const mlc::WeightView& w, const mlc::LoraView& lora, void* y) {
  mlc::LoraBranch b;
  b.weight = w;
  b.lora = lora;
  b.y = y;
  return b;
}

void forward_of(
    const mlc::Context& c, const Case& shape, const void* x, const mlc::LoraBranch& branch) {
  mlc::lora_linear_forward(c, shape.m, shape.k, DType::bf16, x, &branch, 1);
}

/// One geometry and rank, every number of tokens.
void bench_layers(uint32_t k, uint32_t n, uint32_t rank, const std::vector<uint32_t>& tokens) {
  bench::Device device;
  Cublas cublas(device.context.stream);
  const int copies = std::max(2, static_cast<int>(kRotationBytes / (2.0 * k * n)));
  std::vector<mlc::WeightView> dense, int4, nf4;
  std::vector<mlc::LoraView> lora;
  for (int i = 0; i < copies; ++i) {
    dense.push_back(device.weight(n, k, WeightFormat::bf16));
    lora.push_back(device.lora(rank, n, k));
  }
  for (int i = 0; i < 4 * copies; ++i) {
    int4.push_back(device.weight(n, k, WeightFormat::int4));
    nf4.push_back(device.weight(n, k, WeightFormat::nf4));
  }
  const uint32_t most = *std::max_element(tokens.begin(), tokens.end());
  auto* x = device.normal<mlc::bf16>(size_t{most} * k, 1.0f);
  auto* dy = device.normal<mlc::bf16>(size_t{most} * n, 1.0f);
  auto* y = device.normal<mlc::bf16>(size_t{most} * n, 1.0f);
  auto* dx = device.normal<mlc::bf16>(size_t{most} * k, 1.0f);
  auto* low = device.normal<mlc::bf16>(size_t{most} * mlc::low_stride(rank), 1.0f);
  auto* da = device.normal<float>(size_t{rank} * k, 1.0f);
  auto* db = device.normal<float>(size_t{rank} * n, 1.0f);
  int at = 0;
  for (uint32_t m : tokens) {
    const Case shape{k, n, rank, m};
    device.context.weights_ready = m <= mlc::kSkinnyMaxTokens;  // as in a decode step's graph
    const auto next = [&](const auto& list) -> const auto& {
      return list[++at % list.size()];
    };
    const auto with_lora = [&](const std::vector<mlc::WeightView>& weights) {
      return [&](int) {
        const auto& w = next(weights);
        forward_of(device.context, shape, x, branch_of(w, lora[at % copies], y));
      };
    };
    const auto us = bench::turns_us(
        device,
        {[&](int) { cublas.forward(m, n, k, x, next(dense).data, y); },
         [&](int) { forward_of(device.context, shape, x, branch_of(next(dense), {}, y)); },
         with_lora(dense),
         with_lora(int4),
         with_lora(nf4)});
    const float cublas_us = us[0], base_us = us[1], lora_us = us[2], int4_us = us[3],
                nf4_us = us[4];
    std::printf(
        "{\"kind\": \"layer\", \"k\": %u, \"n\": %u, \"rank\": %u, \"tokens\": %u, "
        "\"cublas_us\": %.2f, \"base_us\": %.2f, \"lora_us\": %.2f, \"lora_over_cublas\": %.3f, "
        "\"int4_lora_us\": %.2f, \"int4_over_cublas\": %.3f, \"nf4_lora_us\": %.2f, "
        "\"nf4_over_cublas\": %.3f",
        k,
        n,
        rank,
        m,
        cublas_us,
        base_us,
        lora_us,
        lora_us / cublas_us,
        int4_us,
        int4_us / cublas_us,
        nf4_us,
        nf4_us / cublas_us);
    if (m >= 512) {
      const auto both = bench::turns_us(
          device,
          {[&](int) {
             const void* w = next(dense).data;
             cublas.forward(m, n, k, x, w, y);
             cublas.backward(m, n, k, dy, w, dx);
           },
           [&](int) {
             auto b = branch_of(next(dense), lora[at % copies], y);
             b.low = low;
             forward_of(device.context, shape, x, b);
             b.dy = dy;
             b.da = da;
             b.db = db;
             mlc::lora_linear_backward(device.context, m, k, DType::bf16, x, &b, 1, dx);
           }});
      const float base_both = both[0], lora_both = both[1];
      std::printf(
          ", \"cublas_both_us\": %.2f, \"lora_both_us\": %.2f, \"both_over_cublas\": %.3f",
          base_both,
          lora_both,
          lora_both / base_both);
    }
    std::printf("}\n");
    std::fflush(stdout);
  }
}

/// Adapters of rank 16, one for each token, ids at random; the bank, as in serving, stays.
void bench_many(uint32_t m, bool rotate) {
  constexpr uint32_t kK = 4096, kN = 4096, kRank = 16, kAdapters = 128;
  bench::Device device;
  Cublas cublas(device.context.stream);
  const int copies = rotate ? 12 : 1;
  std::vector<mlc::WeightView> weights;
  for (int i = 0; i < copies; ++i) weights.push_back(device.weight(kN, kK, WeightFormat::bf16));
  std::vector<mlc::LoraBankView> banks;
  std::vector<int32_t> ranks(kAdapters, kRank);
  std::vector<float> scales(kAdapters, 2.0f);
  std::vector<int32_t> ids(m);
  uint64_t state = 12345;
  for (auto& id : ids) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    id = static_cast<int32_t>((state >> 33) % kAdapters);
  }
  const auto upload = [&](const auto& host) {
    void* p = device.memory.allocate(host.size() * 4);
    mlc::check(cudaMemcpy(p, host.data(), host.size() * 4, cudaMemcpyHostToDevice), "upload");
    return p;
  };
  const auto* device_ranks = static_cast<const int32_t*>(upload(ranks));
  const auto* device_scales = static_cast<const float*>(upload(scales));
  const auto* device_ids = static_cast<const int32_t*>(upload(ids));
  for (int i = 0; i < (rotate ? 4 : 1); ++i) {
    mlc::LoraBankView bank;
    bank.params = {kAdapters, kRank, DType::bf16};
    bank.a = device.normal<mlc::bf16>(size_t{kAdapters} * kRank * kK, 1.0f / 64.0f);
    bank.b = device.normal<mlc::bf16>(size_t{kAdapters} * kRank * kN, 0.1f);
    bank.ranks = device_ranks;
    bank.scales = device_scales;
    banks.push_back(bank);
  }
  auto* x = device.normal<mlc::bf16>(size_t{m} * kK, 1.0f);
  auto* y = device.normal<mlc::bf16>(size_t{m} * kN, 1.0f);
  int at = 0;
  const auto next = [&]() -> const mlc::WeightView& { return weights[++at % copies]; };
  const auto us = bench::turns_us(
      device,
      {[&](int) { cublas.forward(m, kN, kK, x, next().data, y); },
       [&](int i) {
         mlc::lora_linear_multi_forward(
             device.context, m, DType::bf16, x, next(), banks[i % banks.size()], device_ids, nullptr, y);
       }});
  const float cublas_us = us[0], ours = us[1];
  std::printf(
      "{\"kind\": \"multi\", \"tokens\": %u, \"adapters\": %u, \"rank\": %u, \"rotating\": %s, "
      "\"cublas_us\": %.2f, \"lora_us\": %.2f, \"over_cublas\": %.3f}\n",
      m,
      kAdapters,
      kRank,
      rotate ? "true" : "false",
      cublas_us,
      ours,
      ours / cublas_us);
  std::fflush(stdout);
}

void bench_limits() {
  bench::Device device;
  constexpr size_t kBytes = size_t{1} << 30;
  void* from = device.memory.allocate(kBytes);
  void* to = device.memory.allocate(kBytes);
  const float copy_us = bench::graph_us(
      device,
      [&](int) {
        cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, device.context.stream);
      },
      5);
  Cublas cublas(device.context.stream);
  constexpr uint32_t kSize = 8192;
  auto* a = device.normal<mlc::bf16>(size_t{kSize} * kSize, 1.0f);
  auto* b = device.normal<mlc::bf16>(size_t{kSize} * kSize, 1.0f);
  auto* c = device.normal<mlc::bf16>(size_t{kSize} * kSize, 1.0f);
  const float gemm_us = bench::graph_us(
      device, [&](int) { cublas.forward(kSize, kSize, kSize, a, b, c); }, 5);
  std::printf(
      "{\"kind\": \"limits\", \"device\": \"%s\", \"copy_gb_per_s\": %.0f, "
      "\"bf16_gemm_tflops\": %.0f}\n",
      device.name.c_str(),
      2.0 * kBytes / copy_us * 1e-3,
      2.0 * std::pow(kSize, 3) / gemm_us * 1e-6);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "--quick";
  try {
    bench_limits();
    const std::vector<uint32_t> tokens = {1, 8, 64, 512, 4096};
    for (uint32_t n : {4096u, 11008u}) {
      if (quick && n != 4096) continue;
      for (uint32_t rank : {8u, 16u, 64u}) {
        if (quick && rank != 16) continue;
        bench_layers(4096, n, rank, tokens);
      }
    }
    for (uint32_t m : {64u, 128u}) {
      bench_many(m, false);
      bench_many(m, true);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "layer_bench: %s\n", e.what());
    return 1;
  }
  return 0;
}
