// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The LoRA linear over 4-bit weights beside cuBLAS's product of a bf16 base alone, in one run: as
// lora_linear_forward chooses, through a 16-bit copy of W, and by each form of gemm_quantized.
// Weights rotate so that L2 does not hold them. One line a case: microseconds and ratios.
//
//   quant_bench [forms|linear] [int4|nf4|double] [k] [n] [rank] [m]...    Link with -lcublas.
#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "bench/gpu/bench.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_quant.h"
#include "kernels/cuda/lora_quantized.h"
#include "kernels/nf4.h"

using namespace metal_lora;
namespace mlc = metal_lora::cuda;

namespace {

constexpr double kRotationBytes = 200e6;
constexpr uint32_t kMostTokens = 4096;

class Case {
 public:
  Case(const std::string& format, uint32_t k, uint32_t n, uint32_t rank)
      : k_(k), n_(n), rank_(rank) {
    const auto copies = std::max<size_t>(2, static_cast<size_t>(kRotationBytes / (2.0 * n * k)));
    copies_ = copies;
    dense_ = device_.normal<mlc::bf16>(copies * n * k, 0.01f);
    for (size_t i = 0; i < 4 * copies; ++i) {
      weights_.push_back(
          device_.weight(n, k, format == "int4" ? WeightFormat::int4 : WeightFormat::nf4));
      if (format == "double") nest(weights_.back());
    }
    lora_ = device_.lora(rank, n, k);
    x_ = device_.normal<mlc::bf16>(size_t{kMostTokens} * k, 1.0f);
    y_ = device_.normal<mlc::bf16>(size_t{kMostTokens} * n, 1.0f);
    want_ = device_.normal<mlc::bf16>(size_t{kMostTokens} * n, 1.0f);
    cublasCreate(&cublas_);
    cublasSetStream(cublas_, device_.context.stream);
    cublasSetWorkspace(cublas_, device_.memory.allocate(size_t{64} << 20), size_t{64} << 20);
  }
  ~Case() { cublasDestroy(cublas_); }

  void forms(uint32_t m) {
    std::vector<std::function<void(int)>> calls = {
        [&](int) { base(m); }, [&](int) { copy(m, next(), y_); }};
    std::vector<mlc::quant::Form> list;
    for (uint32_t tokens : {32u, 64u, 128u, 256u}) {
      if (tokens > 32 && m <= tokens / 2) continue;
      if (m > 8 * tokens && tokens < 128) continue;
      for (uint32_t splits = 1; splits <= (tokens == 256 ? 2 : m > 512 ? 1 : 8); ++splits) {
        if ((m + tokens - 1) / tokens * ((n_ + 127) / 128) * splits > 600 && splits > 1) continue;
        if (splits == 7) continue;
        list.push_back({tokens, splits});
        if (!mlc::quant::form_fits(product(m, weights_[0], y_), list.back())) list.pop_back();
      }
    }
    for (const auto& form : list) calls.push_back([&, form](int) { direct(m, next(), y_, &form); });
    for (const auto& form : list) check(m, form);
    const auto us = bench::turns_us(device_, calls);
    const auto chosen = mlc::quant::chosen_form(device_.context, product(m, weights_[0], y_));
    std::printf(
        "k %u n %u rank %u m %u: cublas bf16 %.2f us, copy route %.2f (%.3f); chosen %s;",
        k_,
        n_,
        rank_,
        m,
        us[0],
        us[1],
        us[1] / us[0],
        name(chosen).c_str());
    std::vector<size_t> order(list.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(
        order.begin(), order.end(), [&](size_t i, size_t j) { return us[i + 2] < us[j + 2]; });
    for (size_t i : order) {  // the best few, and the chosen one
      const auto& f = list[i];
      const bool is_chosen = f.tokens == chosen.tokens && f.splits == chosen.splits;
      if (i != order[0] && us[i + 2] > 1.12f * us[order[0] + 2] && !is_chosen) continue;
      std::printf(" %s %.2f (%.3f)", name(f).c_str(), us[i + 2], us[i + 2] / us[0]);
    }
    std::printf("\n");
    std::fflush(stdout);
  }

  void linear(uint32_t m) {
    const auto us = bench::turns_us(
        device_,
        {[&](int) { base(m); },
         [&](int) { copy(m, next(), y_); },
         [&](int) { linear(m, next()); }});
    std::printf(
        "k %u n %u rank %u m %u: cublas bf16 %.2f us, copy route %.2f (%.3f), linear %.2f (%.3f)\n",
        k_,
        n_,
        rank_,
        m,
        us[0],
        us[1],
        us[1] / us[0],
        us[2],
        us[2] / us[0]);
    std::fflush(stdout);
  }

 private:
  /// tokens/splits
  static std::string name(const mlc::quant::Form& f) {
    return std::to_string(f.tokens) + "/" + std::to_string(f.splits);
  }
  /// Scales in 8 bits, themselves in blocks of 256.
  void nest(mlc::WeightView& w) {
    const size_t groups = size_t{n_} * k_ / 64;
    auto* codes = static_cast<uint32_t*>(device_.memory.allocate(groups));
    bench::fill_bits<<<1024, 256, 0, device_.context.stream>>>(codes, groups / 4, groups);
    const size_t blocks = (groups + 255) / 256;
    auto* nested = device_.normal<float>(kNf4NestedHead + blocks, 1e-4f, 1e-2f);
    w.params.double_quant = true;
    w.scales = codes;
    w.biases = nested;
  }
  const mlc::WeightView& next() { return weights_[++at_ % weights_.size()]; }

  void base(uint32_t m) {
    const float one = 1.0f, zero = 0.0f;
    const void* w = dense_ + ++at_ % copies_ * n_ * k_;
    const auto status = cublasGemmEx(
        cublas_,
        CUBLAS_OP_T,
        CUBLAS_OP_N,
        static_cast<int>(n_),
        static_cast<int>(m),
        static_cast<int>(k_),
        &one,
        w,
        CUDA_R_16BF,
        static_cast<int>(k_),
        x_,
        CUDA_R_16BF,
        static_cast<int>(k_),
        &zero,
        y_,
        CUDA_R_16BF,
        static_cast<int>(n_),
        CUBLAS_COMPUTE_32F,
        CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) throw mlc::CudaError("[cublas] gemm");
  }
  void linear(uint32_t m, const mlc::WeightView& w) {
    mlc::LoraBranch b;
    b.weight = w;
    b.lora = lora_;
    b.y = y_;
    mlc::lora_linear_forward(device_.context, m, k_, DType::bf16, x_, &b, 1);
  }
  /// Through a 16-bit copy of W.
  void copy(uint32_t m, const mlc::WeightView& w, mlc::bf16* y) {
    void* dense = device_.memory.take(size_t{n_} * k_ * 2);
    mlc::dequantize(device_.context, w, DType::bf16, dense);
    mlc::LoraBranch b;
    b.weight.params.n = n_;
    b.weight.params.k = k_;
    b.weight.params.format = WeightFormat::bf16;
    b.weight.data = dense;
    b.lora = lora_;
    b.y = y;
    mlc::lora_linear_forward(device_.context, m, k_, DType::bf16, x_, &b, 1);
  }
  mlc::QuantizedProduct product(uint32_t m, const mlc::WeightView& w, mlc::bf16* y) {
    mlc::QuantizedProduct p;
    p.m = m;
    p.x = x_;
    p.w = w;
    p.rank = rank_;
    p.u_stride = p.b_stride = rank_;
    p.b = lora_.b;
    p.y = y;
    return p;
  }
  void direct(uint32_t m, const mlc::WeightView& w, mlc::bf16* y, const mlc::quant::Form* form) {
    auto p = product(m, w, y);
    if (rank_ > 0) {
      mlc::ShrinkCall call;
      call.m = m;
      call.k = k_;
      call.x = x_;
      call.x_stride = k_;
      call.parts = 1;
      call.part[0].right = lora_.a;
      call.part[0].rank = rank_;
      call.part[0].factor = lora_.params.scale;
      call.out = device_.memory.take(size_t{m} * rank_ * 2);
      call.out_stride = rank_;
      mlc::lora_shrink(device_.context, call);
      p.u = call.out;
    }
    mlc::quant::gemm_with_form(device_.context, p, *form);
  }

  /// Throws where the form is far from the copy route, or does not repeat its bits.
  void check(uint32_t m, const mlc::quant::Form& form) {
    device_.memory.reset();
    const auto& w = weights_[0];
    copy(m, w, want_);
    std::vector<mlc::bf16> want(size_t{m} * n_), got(want.size()), again(want.size());
    const auto stream = device_.context.stream;
    const size_t bytes = want.size() * 2;
    cudaMemcpyAsync(want.data(), want_, bytes, cudaMemcpyDeviceToHost, stream);
    for (auto* to : {&got, &again}) {
      device_.memory.reset();
      mlc::check(cudaMemsetAsync(y_, 0xff, bytes, stream), "memset");
      direct(m, w, y_, &form);
      cudaMemcpyAsync(to->data(), y_, bytes, cudaMemcpyDeviceToHost, stream);
    }
    mlc::check(cudaStreamSynchronize(stream), "check");
    double most = 0.0, size = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double a = __bfloat162float(want[i]), b = __bfloat162float(got[i]);
      const double difference = std::fabs(a - b);
      if (!(difference <= most)) most = std::isnan(difference) ? INFINITY : difference;
      size = std::max(size, std::fabs(a));
    }
    const bool same = std::memcmp(got.data(), again.data(), bytes) == 0;
    const bool close = most <= size / 128;  // one rounding of the greatest value and some
    if (same && close) return;
    throw std::runtime_error(
        "m " + std::to_string(m) + " form " + name(form) + " is wrong: off by " +
        std::to_string(most) + " of " + std::to_string(size) +
        (same ? "" : ", differs from run to run"));
  }

  bench::Device device_;
  cublasHandle_t cublas_ = nullptr;
  const uint32_t k_, n_, rank_;
  size_t copies_ = 0, at_ = 0;
  mlc::bf16 *dense_ = nullptr, *x_ = nullptr, *y_ = nullptr, *want_ = nullptr;
  std::vector<mlc::WeightView> weights_;
  mlc::LoraView lora_;
};

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i, uint32_t otherwise) {
    return i < argc ? static_cast<uint32_t>(std::atoi(argv[i])) : otherwise;
  };
  const bool forms = argc > 1 && std::strcmp(argv[1], "forms") == 0;
  try {
    Case c(argc > 2 ? argv[2] : "int4", number(3, 4096), number(4, 4096), number(5, 16));
    std::vector<uint32_t> tokens = {17, 32, 64, 128, 256, 512, 1024, 4096};
    if (argc > 6) tokens.clear();
    for (int i = 6; i < argc; ++i) tokens.push_back(number(i, 0));
    for (uint32_t m : tokens) {
      forms ? c.forms(m) : c.linear(m);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "quant_bench: %s\n", e.what());
    return 1;
  }
  return 0;
}
