// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The composed LoRA linear beside cuBLAS's product of the base alone, in one run: forward, and
// forward + backward; then what it is made of (the portable products, in bf16 and f32). Weights
// rotate so that L2 does not hold them. One line a case: microseconds, TFLOP/s, ratio.
//
//   lora_linear_bench [products|parts|forms|linears|branches|quantised|dropout]...    (default:
//   all). Link with -lcublas.
#include <cublas_v2.h>

#include <cmath>
#include <cstring>

#include "bench/gpu/bench.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/lora_skinny.h"
#include "tests/cuda/gemm_sm90_forms.h"

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

/// bench::turns_us of calls that count for themselves.
std::vector<float> compare_us(
    bench::Device& device, const std::vector<std::function<void()>>& calls) {
  std::vector<std::function<void(int)>> counted;
  for (const auto& call : calls) counted.push_back([&call](int) { call(); });
  return bench::turns_us(device, counted);
}

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
  const auto us = compare_us(
      device,
      {[&] { cublas.product(right_is_kn, type, m, n, k, left, next(), out); },
       [&] { ours(true); },
       [&] { ours(false); }});
  const float base = us[0], generic = us[1], best = us[2];
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
  for (uint32_t m : {1u, 8u, 32u, 64u, 128u, 256u, 512u, 4096u}) {
    if (dropout > 0.0f && m < 512) continue;
    const auto base = [&](bool backward) {
      const void* w = next().data;
      cublas.product(false, CUDA_R_16BF, m, n, k, x, w, y);
      if (backward) cublas.product(true, CUDA_R_16BF, m, k, n, dy, w, dx);
    };
    for (uint32_t rank : ranks) {
      auto lora = device.lora(std::max(rank, 1u), n, k);
      lora.params.rank = rank;
      lora.params.dropout = dropout;
      auto* u = device.normal<float>(size_t{m} * rank + 1, 1.0f);
      auto* da = device.normal<float>(size_t{rank} * k + 1, 1.0f);
      auto* db = device.normal<float>(size_t{rank} * n + 1, 1.0f);
      const auto run = [&](bool train) {
        mlc::LoraBranch b;
        b.weight = next();
        b.lora = lora;
        b.y = y;
        b.u = train ? u : nullptr;
        b.dy = dy;
        b.u_saved = u;
        b.da = da;
        b.db = db;
        mlc::lora_linear_forward(device.context, m, k, DType::bf16, x, &b, 1);
        if (train) mlc::lora_linear_backward(device.context, m, k, DType::bf16, x, &b, 1, dx);
      };
      const auto us = compare_us(
          device,
          {[&] { base(false); }, [&] { run(false); }, [&] { base(true); }, [&] { run(true); }});
      const float base_us = us[0], forward = us[1], base_both = us[2], both = us[3];
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

/// Forward with a quantised base, beside cuBLAS's product of a bf16 one.
void bench_quantised(uint32_t k, uint32_t n, uint32_t rank) {
  bench::Device device;
  Cublas cublas(device.context.stream);
  const auto copies = std::max<size_t>(2, static_cast<size_t>(kRotationBytes / (2.0 * n * k)));
  auto* dense = device.normal<mlc::bf16>(copies * n * k, 0.01f);
  std::vector<mlc::WeightView> int4, nf4;
  for (size_t i = 0; i < 4 * copies; ++i) {
    int4.push_back(device.weight(n, k, WeightFormat::int4));
    nf4.push_back(device.weight(n, k, WeightFormat::nf4));
  }
  const auto lora = device.lora(rank, n, k);
  constexpr uint32_t kMost = 4096;
  auto* x = device.normal<mlc::bf16>(size_t{kMost} * k, 1.0f);
  auto* y = device.normal<mlc::bf16>(size_t{kMost} * n, 1.0f);
  size_t at = 0;
  for (uint32_t m : {1u, 16u, 64u, 128u, 512u, 4096u}) {
    const auto run = [&](const std::vector<mlc::WeightView>& list) {
      mlc::LoraBranch b;
      b.weight = list[++at % list.size()];
      b.lora = lora;
      b.y = y;
      mlc::lora_linear_forward(device.context, m, k, DType::bf16, x, &b, 1);
    };
    const auto us = compare_us(
        device,
        {[&] { cublas.product(false, CUDA_R_16BF, m, n, k, x, dense + ++at % copies * n * k, y); },
         [&] { run(int4); },
         [&] { run(nf4); }});
    std::printf(
        "quantised k %u n %u m %4u rank %u: cublas bf16 %.2f us, int4 %.2f us ratio %.3f, nf4 %.2f "
        "us ratio %.3f\n",
        k,
        n,
        m,
        rank,
        us[0],
        us[1],
        us[1] / us[0],
        us[2],
        us[2] / us[0]);
    std::fflush(stdout);
  }
}

/// Linears that share x in one call, beside one cuBLAS product for each.
void bench_branches(uint32_t k, const std::vector<uint32_t>& n, uint32_t rank, uint32_t m) {
  bench::Device device;
  Cublas cublas(device.context.stream);
  auto* x = device.normal<mlc::bf16>(size_t{m} * k, 1.0f);
  auto* dx = device.normal<mlc::bf16>(size_t{m} * k, 1.0f);
  constexpr size_t kCopies = 3;
  std::vector<mlc::LoraBranch> branches[kCopies];
  for (auto& list : branches) {
    for (uint32_t columns : n) {
      mlc::LoraBranch b;
      b.weight = device.weight(columns, k, WeightFormat::bf16);
      b.lora = device.lora(rank, columns, k);
      b.y = device.normal<mlc::bf16>(size_t{m} * columns, 1.0f);
      b.dy = device.normal<mlc::bf16>(size_t{m} * columns, 1.0f);
      b.u = device.normal<float>(size_t{m} * rank, 1.0f);
      b.u_saved = b.u;
      b.da = device.normal<float>(size_t{rank} * k, 1.0f);
      b.db = device.normal<float>(size_t{rank} * columns, 1.0f);
      list.push_back(b);
    }
  }
  size_t at = 0;
  const auto base = [&](bool backward) {
    for (const auto& b : branches[++at % kCopies]) {
      const uint32_t columns = b.weight.params.n;
      cublas.product(false, CUDA_R_16BF, m, columns, k, x, b.weight.data, b.y);
      if (backward) cublas.product(true, CUDA_R_16BF, m, k, columns, b.dy, b.weight.data, dx);
    }
  };
  const auto ours = [&](bool backward) {
    const auto& list = branches[++at % kCopies];
    mlc::lora_linear_forward(device.context, m, k, DType::bf16, x, list.data(), list.size());
    if (!backward) return;
    mlc::lora_linear_backward(device.context, m, k, DType::bf16, x, list.data(), list.size(), dx);
  };
  const auto us = compare_us(
      device,
      {[&] { base(false); }, [&] { ours(false); }, [&] { base(true); }, [&] { ours(true); }});
  std::printf(
      "%zu linears k %u n %u … m %u rank %u: forward %.2f us, base %.2f us, ratio %.3f; forward + "
      "backward %.2f us, base %.2f us, ratio %.3f\n",
      n.size(),
      k,
      n[0],
      m,
      rank,
      us[1],
      us[0],
      us[1] / us[0],
      us[3],
      us[2],
      us[3] / us[2]);
  std::fflush(stdout);
}

/// What a linear is made of, each part on its own.
void bench_parts(uint32_t k, uint32_t n, uint32_t rank, uint32_t m) {
  bench::Device device;
  Cublas cublas(device.context.stream);
  const auto& context = device.context;
  const auto copies = std::max<size_t>(2, static_cast<size_t>(kRotationBytes / (2.0 * n * k)));
  auto* weights = device.normal<mlc::bf16>(copies * n * k, 0.01f);
  auto* x = device.normal<mlc::bf16>(size_t{m} * k, 1.0f);
  auto* dy = device.normal<mlc::bf16>(size_t{m} * n, 1.0f);
  auto* y = device.normal<mlc::bf16>(size_t{m} * n, 1.0f);
  auto* dx = device.normal<mlc::bf16>(size_t{m} * k, 1.0f);
  auto* low = device.normal<mlc::bf16>(size_t{m} * rank, 1.0f);
  auto* plain = device.normal<float>(size_t{m} * rank, 1.0f);
  auto* da = device.normal<float>(size_t{rank} * k, 1.0f);
  auto* db = device.normal<float>(size_t{rank} * n, 1.0f);
  const auto lora = device.lora(rank, n, k);
  size_t at = 0;
  const auto next = [&] { return weights + (++at % copies) * n * k; };
  const auto product = [&](bool backward, int pairs, bool ready) {
    mlc::GemmGroup group;
    group.m = m;
    group.right_is_kn = backward;
    group.pair0_ready = ready;
    group.problems = 1;
    auto& p = group.problem[0];
    p.n = backward ? k : n;
    p.pairs = pairs;
    p.pair[0] = backward ? mlc::GemmPair{dy, n, next(), k, n} : mlc::GemmPair{x, k, next(), k, k};
    p.pair[1] = backward ? mlc::GemmPair{low, rank, lora.a, k, rank}
                         : mlc::GemmPair{low, rank, lora.b, rank, rank};
    p.out = backward ? dx : y;
    p.out_stride = p.n;
    mlc::gemm(context, group);
  };
  const auto shrink = [&](bool backward) {
    mlc::ShrinkCall call;
    call.m = m;
    call.k = backward ? n : k;
    call.right_is_kn = backward;
    call.x = backward ? dy : x;
    call.x_stride = call.k;
    call.parts = 1;
    call.part[0].right = backward ? lora.b : lora.a;
    call.part[0].rank = rank;
    call.part[0].plain = plain;
    call.out = low;
    call.out_stride = rank;
    mlc::lora_shrink(context, call);
  };
  const auto grads = [&](bool wide) {
    mlc::AdapterGrad g[2];
    for (auto& one : g) {
      one.small = wide ? static_cast<void*>(plain) : low;
      one.small_dtype = wide ? DType::f32 : DType::bf16;
      one.small_stride = one.rank = rank;
    }
    g[0].large = x;
    g[0].large_stride = g[0].columns = k;
    g[0].grad = da;
    g[1].large = dy;
    g[1].large_stride = g[1].columns = n;
    g[1].grad = db;
    g[1].transposed = true;
    mlc::lora_grad(context, m, DType::bf16, g, 2);
  };
  const auto us = compare_us(
      device,
      {[&] { cublas.product(false, CUDA_R_16BF, m, n, k, x, next(), y); },
       [&] { product(false, 1, false); },
       [&] { product(false, 2, false); },
       [&] { shrink(false); },
       [&] { shrink(false), product(false, 2, false); },
       [&] { shrink(false), product(false, 2, true); },
       [&] { cublas.product(true, CUDA_R_16BF, m, k, n, dy, next(), dx); },
       [&] { product(true, 1, false); },
       [&] { product(true, 2, false); },
       [&] { shrink(true); },
       [&] { grads(true); },
       [&] { grads(false); },
       [&] { shrink(true), product(true, 2, false), grads(true); },
       [&] { shrink(true), grads(true), product(true, 2, false); },
       [&] { shrink(true), product(true, 2, true), grads(true); }});
  const char* names[] = {
      "cublas",
      "gemm, 1 pair",
      "gemm, 2 pairs",
      "shrink",
      "shrink, gemm",
      "shrink, gemm ready",
      "backward: cublas",
      "gemm, 1 pair",
      "gemm, 2 pairs",
      "shrink",
      "grads of f32",
      "grads of bf16",
      "shrink, gemm, grads",
      "shrink, grads, gemm",
      "shrink, gemm ready, grads"};
  std::printf("parts k %u n %u m %u rank %u, us:", k, n, m, rank);
  for (size_t i = 0; i < us.size(); ++i) std::printf(" | %s %.2f", names[i], us[i]);
  std::printf("\n");
  std::fflush(stdout);
}

/// One launch with u inside, in every form that takes it, beside a shrink and a product.
void bench_forms(uint32_t k, uint32_t n, uint32_t rank, uint32_t m) {
  bench::Device device;
  Cublas cublas(device.context.stream);
  const auto& context = device.context;
  const auto copies = std::max<size_t>(2, static_cast<size_t>(kRotationBytes / (2.0 * n * k)));
  auto* weights = device.normal<mlc::bf16>(copies * n * k, 0.01f);
  auto* x = device.normal<mlc::bf16>(size_t{m} * k, 1.0f);
  auto* y = device.normal<mlc::bf16>(size_t{m} * n, 1.0f);
  auto* low = device.normal<mlc::bf16>(size_t{m} * rank, 1.0f);
  const auto lora = device.lora(rank, n, k);
  size_t at = 0;
  const auto next = [&] { return weights + (++at % copies) * n * k; };
  const auto group_of = [&](bool inside) {
    mlc::GemmGroup group;
    group.m = m;
    group.problems = 1;
    auto& p = group.problem[0];
    p.n = n;
    p.pairs = 2;
    p.pair[0] = {x, k, next(), k, k};
    p.pair[1] = {low, rank, lora.b, rank, rank};
    p.out = y;
    p.out_stride = n;
    if (inside) {
      group.shrinks = 1;
      group.flags = context.counters;
      group.shrink[0] = {x, k, k, 1, {}};
      group.shrink[0].part[0] = {lora.a, k, rank, 1.0f, low, rank, nullptr};
    } else {
      group.pair0_ready = true;
    }
    return group;
  };
  std::vector<std::string> names = {"cublas", "shrink, gemm"};
  std::vector<std::function<void()>> calls = {
      [&] { cublas.product(false, CUDA_R_16BF, m, n, k, x, next(), y); },
      [&] {
        mlc::ShrinkCall call;
        call.m = m;
        call.k = call.x_stride = k;
        call.x = x;
        call.parts = 1;
        call.part[0].right = lora.a;
        call.part[0].rank = rank;
        call.out = low;
        call.out_stride = rank;
        mlc::lora_shrink(context, call);
        mlc::gemm(context, group_of(false));
      }};
  const mlc::GemmGroup group = group_of(true);
  for (int form = 0; form < mlc::sm90::form_count(); ++form) {
    if (!mlc::sm90::form_fits(context, group, form)) continue;
    names.push_back(mlc::sm90::form_name(form));
    if (form == mlc::sm90::chosen_form(context, group)) names.back() += " (taken)";
    calls.push_back([&, form] { mlc::sm90::gemm_with_form(context, group_of(true), form); });
  }
  if (mlc::can_lora_skinny(context, group)) {
    for (uint32_t parts : {1u, 2u, 3u, 4u, 8u}) {
      names.push_back("skinny, k in " + std::to_string(parts));
      if (parts == mlc::sm90::skinny_parts(context, group)) names.back() += " (taken)";
      calls.push_back([&, parts] { mlc::sm90::skinny_with_parts(context, group_of(true), parts); });
    }
  }
  const auto us = compare_us(device, calls);
  std::printf("forms k %u n %u m %u rank %u, us (of cublas):", k, n, m, rank);
  for (size_t i = 0; i < us.size(); ++i) {
    std::printf(" | %s %.2f (%.3f)", names[i].c_str(), us[i], us[i] / us[0]);
  }
  std::printf("\n");
  std::fflush(stdout);
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
    if (wants("forms")) {
      for (uint32_t n : {4096u, 11008u}) {
        for (uint32_t m : {32u, 64u, 128u, 256u, 512u}) {
          for (uint32_t rank : {16u, 64u}) bench_forms(4096, n, rank, m);
        }
      }
    }
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
    if (wants("parts")) {
      for (uint32_t m : {64u, 128u, 512u, 4096u}) bench_parts(4096, 4096, 16, m);
      bench_parts(4096, 11008, 16, 4096);
    }
    if (wants("linears")) {
      bench_linear(4096, 4096, {0, 8, 16, 64}, 0.0f);
      bench_linear(4096, 11008, {16}, 0.0f);
    }
    if (wants("branches")) {
      for (uint32_t m : {512u, 4096u}) {
        bench_branches(4096, {4096, 1024, 1024}, 16, m);
        bench_branches(4096, {11008, 11008}, 16, m);
      }
    }
    if (wants("quantised")) bench_quantised(4096, 4096, 16);
    if (wants("dropout")) bench_linear(4096, 4096, {16}, 0.1f);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
