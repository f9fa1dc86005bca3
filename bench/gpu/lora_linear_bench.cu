// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The composed LoRA linear beside cuBLAS's product of the base alone, in one run: forward, and
// forward + backward; then what it is made of (the portable products, in bf16 and f32). Weights
// rotate so that L2 does not hold them. One line a case: microseconds, TFLOP/s, ratio.
//
//   lora_linear_bench [products|linears|dropout]...    (default: all). Link with -lcublas.
#include <cublas_v2.h>

#include <cmath>
#include <cstring>

#include "bench/gpu/bench.cuh"
#include "kernels/cuda/gemm.h"

using namespace metal_lora;
namespace mlc = metal_lora::cuda;

namespace {

constexpr double kRotationBytes = 200e6;

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
    mlc::check(cudaMalloc(&workspace_, kWorkspace), "cudaMalloc");
    check_cublas(cublasSetWorkspace(handle_, workspace_, kWorkspace));
  }
  ~Cublas() {
    cublasDestroy(handle_);
    cudaFree(workspace_);
  }
  /// out [m, n] = left [m, k]·right, right [n, k]ᵀ or [k, n].
  void product(
      bool right_is_kn,
      cudaDataType_t type,
      uint32_t m,
      uint32_t n,
      uint32_t k,
      const void* left,
      const void* right,
      void* out) {
    const float one = 1.0f, zero = 0.0f;
    const auto i = [](uint32_t v) { return static_cast<int>(v); };
    check_cublas(cublasGemmEx(
        handle_,
        right_is_kn ? CUBLAS_OP_N : CUBLAS_OP_T,
        CUBLAS_OP_N,
        i(n),
        i(m),
        i(k),
        &one,
        right,
        type,
        i(right_is_kn ? n : k),
        left,
        type,
        i(k),
        &zero,
        out,
        type,
        i(n),
        CUBLAS_COMPUTE_32F,
        CUBLAS_GEMM_DEFAULT));
  }

 private:
  static constexpr size_t kWorkspace = size_t{64} << 20;
  cublasHandle_t handle_ = nullptr;
  void* workspace_ = nullptr;
};

double tflops(double m, double n, double k, double us) {
  return 2.0 * m * n * k / us * 1e-6;
}

/// One product alone, gemm_generic and gemm against cuBLAS's.
template <typename T>
void bench_product(DType dtype, bool right_is_kn, uint32_t m, uint32_t n, uint32_t k) {
  bench::Device device;
  Cublas cublas(device.context.stream);
  const auto copies = std::max<size_t>(
      2, static_cast<size_t>(kRotationBytes / (static_cast<double>(sizeof(T)) * n * k)));
  auto* left = device.normal<T>(size_t{m} * k, 1.0f);
  auto* right = device.normal<T>(copies * n * k, 0.02f);
  auto* out = device.normal<T>(size_t{m} * n, 1.0f);
  size_t at = 0;
  const auto next = [&] { return right + (++at % copies) * n * k; };
  mlc::GemmGroup group;
  group.m = m;
  group.dtype = group.out_dtype = dtype;
  group.right_is_kn = right_is_kn;
  group.problems = 1;
  auto& problem = group.problem[0];
  problem.n = n;
  problem.pairs = 1;
  problem.out = out;
  problem.out_stride = n;
  const auto ours = [&](bool generic) {
    problem.pair[0] = {left, k, next(), right_is_kn ? n : k, k};
    generic ? mlc::gemm_generic(device.context, group) : mlc::gemm(device.context, group);
  };
  const auto type = dtype == DType::f32 ? CUDA_R_32F : CUDA_R_16BF;
  const int launches = 20;
  const float base = bench::graph_us(
      device,
      [&](int) { cublas.product(right_is_kn, type, m, n, k, left, next(), out); },
      launches,
      7);
  const float generic = bench::graph_us(
      device, [&](int) { ours(true); }, launches, 7);
  const float best = bench::graph_us(
      device, [&](int) { ours(false); }, launches, 7);
  std::printf(
      "product %s %s m %5u n %5u k %5u: cublas %8.2f us %6.1f TF/s; generic %8.2f us %6.1f TF/s "
      "%.3f of cublas; gemm %8.2f us %6.1f TF/s %.3f\n",
      dtype == DType::f32 ? "f32 " : "bf16",
      right_is_kn ? "kn" : "nk",
      m,
      n,
      k,
      base,
      tflops(m, n, k, base),
      generic,
      tflops(m, n, k, generic),
      base / generic,
      best,
      tflops(m, n, k, best),
      base / best);
  std::fflush(stdout);
}

/// Forward, and forward + backward with both gradients, of one linear.
void bench_linear(uint32_t k, uint32_t n, std::vector<uint32_t> ranks, float dropout) {
  bench::Device device;
  Cublas cublas(device.context.stream);
  const auto copies = std::max<size_t>(2, static_cast<size_t>(kRotationBytes / (2.0 * n * k)));
  constexpr uint32_t kMost = 4096;
  std::vector<mlc::WeightView> weights;
  for (size_t i = 0; i < copies; ++i) weights.push_back(device.weight(n, k, WeightFormat::bf16));
  auto* x = device.normal<mlc::bf16>(size_t{kMost} * k, 1.0f);
  auto* dy = device.normal<mlc::bf16>(size_t{kMost} * n, 1.0f);
  auto* y = device.normal<mlc::bf16>(size_t{kMost} * n, 1.0f);
  auto* dx = device.normal<mlc::bf16>(size_t{kMost} * k, 1.0f);
  size_t at = 0;
  const auto next = [&]() -> const mlc::WeightView& { return weights[++at % copies]; };
  for (uint32_t m : {1u, 8u, 64u, 512u, 4096u}) {
    if (dropout > 0.0f && m < 512) continue;
    const auto base = [&](bool backward) {
      const void* w = next().data;
      cublas.product(false, CUDA_R_16BF, m, n, k, x, w, y);
      if (backward) cublas.product(true, CUDA_R_16BF, m, k, n, dy, w, dx);
    };
    const int launches = m > 1000 ? 20 : 40;
    const float base_us = bench::graph_us(
        device, [&](int) { base(false); }, launches, 7);
    const float base_both = bench::graph_us(
        device, [&](int) { base(true); }, launches, 7);
    for (uint32_t rank : ranks) {
      auto lora = device.lora(std::max(rank, 1u), n, k);
      lora.params.rank = rank;
      lora.params.dropout = dropout;
      auto* u = device.normal<float>(size_t{m} * rank + 1, 1.0f);
      auto* da = device.normal<float>(size_t{rank} * k + 1, 1.0f);
      auto* db = device.normal<float>(size_t{rank} * n + 1, 1.0f);
      const auto branch = [&](bool train) {
        mlc::LoraBranch b;
        b.weight = next();
        b.lora = lora;
        b.y = y;
        b.u = train ? u : nullptr;
        b.dy = dy;
        b.u_saved = u;
        b.da = da;
        b.db = db;
        return b;
      };
      const float forward = bench::graph_us(
          device,
          [&](int) {
            const auto b = branch(false);
            mlc::lora_linear_forward(device.context, m, k, DType::bf16, x, &b, 1);
          },
          launches,
          7);
      const float both = bench::graph_us(
          device,
          [&](int) {
            const auto b = branch(true);
            mlc::lora_linear_forward(device.context, m, k, DType::bf16, x, &b, 1);
            mlc::lora_linear_backward(device.context, m, k, DType::bf16, x, &b, 1, dx);
          },
          launches,
          7);
      std::printf(
          "linear k %5u n %5u m %4u rank %2u%s: forward %8.2f us, base %8.2f us, ratio %.3f; "
          "forward + backward %8.2f us, base %8.2f us, ratio %.3f\n",
          k,
          n,
          m,
          rank,
          dropout > 0.0f ? " dropout" : "",
          forward,
          base_us,
          forward / base_us,
          both,
          base_both,
          both / base_both);
      std::fflush(stdout);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto wants = [&](const char* what) {
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], what) == 0) return true;
    }
    return argc == 1;
  };
  try {
    if (wants("products")) {
      bench_product<mlc::bf16>(DType::bf16, false, 4096, 4096, 4096);
      bench_product<mlc::bf16>(DType::bf16, true, 4096, 4096, 4096);
      bench_product<mlc::bf16>(DType::bf16, false, 4096, 11008, 4096);
      bench_product<mlc::bf16>(DType::bf16, false, 512, 4096, 4096);
      bench_product<mlc::bf16>(DType::bf16, false, 64, 4096, 4096);
      bench_product<mlc::bf16>(DType::bf16, false, 4095, 4095, 4095);
      bench_product<float>(DType::f32, false, 4096, 4096, 4096);
      bench_product<float>(DType::f32, true, 4096, 4096, 4096);
      bench_product<float>(DType::f32, false, 512, 4096, 4096);
    }
    if (wants("linears")) {
      bench_linear(4096, 4096, {0, 8, 16, 64}, 0.0f);
      bench_linear(4096, 11008, {16}, 0.0f);
    }
    if (wants("dropout")) bench_linear(4096, 4096, {16}, 0.1f);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
