// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// gemm_sm90 beside the fastest of cuBLASLt's suggestions, and with low-rank pairs beside itself.
// Link with -lcublasLt. Arguments: all (every form of the table) and numbers of shapes.
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "tests/cuda/gemm_sm90_forms.h"

namespace metal_lora::cuda {
namespace {

struct Shape {
  uint32_t m, k;
  std::vector<uint32_t> n;  ///< of each problem
  bool right_is_kn;
};

__global__ void fill(bf16* to, size_t count, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u + seed * 40503u;
    float sum = 0.0f;  // about normal: four uniform numbers
    for (int j = 0; j < 4; ++j) {
      h ^= h >> 16;
      h *= 0x85ebca6bu;
      h ^= h >> 13;
      h *= 0xc2b2ae35u;
      sum += (h >> 8) * 0x1p-24f - 0.5f;
    }
    to[i] = __float2bfloat16(sum * 1.7f * scale);
  }
}

class Buffer {
 public:
  explicit Buffer(size_t elements) {
    static uint32_t seed = 1;
    check(cudaMalloc(&data_, elements * 2 + 256), "cudaMalloc");
    fill<<<1024, 256>>>(data_, elements, seed++, 1.0f);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  bf16* get() const { return data_; }

 private:
  bf16* data_ = nullptr;
};

/// Graphs of calls that rotate over `copies` of the weights, replayed in turns, so that heat and
/// clocks are the same for all of them.
class Race {
 public:
  Race(cudaStream_t stream, int copies)
      : stream_(stream), calls_(std::max(20, copies)), copies_(copies) {}
  ~Race() {
    for (cudaGraphExec_t graph : graphs_) cudaGraphExecDestroy(graph);
  }
  /// Returns the entry's number.
  int add(const std::function<void(int)>& call) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    call(0);
    check(cudaStreamSynchronize(stream_), "first call");
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < calls_; ++i) call(i % copies_);
    check(cudaStreamEndCapture(stream_, &graph), "capture");
    check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    cudaGraphDestroy(graph);
    graphs_.push_back(exec);
    return static_cast<int>(graphs_.size()) - 1;
  }
  /// Median time of one call of each entry, in µs.
  std::vector<double> run(int rounds) {
    std::vector<std::vector<float>> times(graphs_.size());
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int round = -1; round < rounds; ++round) {
      for (size_t i = 0; i < graphs_.size(); ++i) {
        cudaEventRecord(begin, stream_);
        check(cudaGraphLaunch(graphs_[i], stream_), "launch");
        cudaEventRecord(end, stream_);
        check(cudaStreamSynchronize(stream_), "replay");
        float ms = 0.0f;
        cudaEventElapsedTime(&ms, begin, end);
        if (round >= 0) times[i].push_back(ms * 1000 / calls_);
      }
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::vector<double> medians;
    for (std::vector<float>& t : times) {
      std::sort(t.begin(), t.end());
      medians.push_back(t[t.size() / 2]);
    }
    return medians;
  }

 private:
  cudaStream_t stream_;
  int calls_, copies_;
  std::vector<cudaGraphExec_t> graphs_;
};

/// One product as cuBLASLt sees it (column-major): out^T [n, m] = right' · left'.
class Blas {
 public:
  Blas(cublasLtHandle_t handle, uint32_t m, uint32_t n, uint32_t k, bool right_is_kn)
      : handle_(handle) {
    cublasLtMatmulDescCreate(&op_, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    const cublasOperation_t op = right_is_kn ? CUBLAS_OP_N : CUBLAS_OP_T;
    cublasLtMatmulDescSetAttribute(op_, CUBLASLT_MATMUL_DESC_TRANSA, &op, sizeof(op));
    if (right_is_kn) {
      cublasLtMatrixLayoutCreate(&a_, CUDA_R_16BF, n, k, n);
    } else {
      cublasLtMatrixLayoutCreate(&a_, CUDA_R_16BF, k, n, k);
    }
    cublasLtMatrixLayoutCreate(&b_, CUDA_R_16BF, k, m, k);
    cublasLtMatrixLayoutCreate(&c_, CUDA_R_16BF, n, m, n);
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulPreferenceCreate(&preference);
    size_t bytes = kWorkspace;
    cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
    cublasLtMatmulAlgoGetHeuristic(handle_, op_, a_, b_, c_, c_, preference, kMax, found_, &count);
    cublasLtMatmulPreferenceDestroy(preference);
    if (count == 0) throw CudaError("cuBLASLt suggests nothing");
  }
  void run(
      int which, const bf16* left, const bf16* right, bf16* out, void* space, cudaStream_t stream) {
    const float one = 1.0f, zero = 0.0f;
    const cublasStatus_t status = cublasLtMatmul(
        handle_,
        op_,
        &one,
        right,
        a_,
        left,
        b_,
        &zero,
        out,
        c_,
        out,
        c_,
        &found_[which].algo,
        space,
        kWorkspace,
        stream);
    if (status != CUBLAS_STATUS_SUCCESS) throw CudaError("cublasLtMatmul");
  }

  static constexpr size_t kWorkspace = 64 << 20;
  static constexpr int kMax = 4;
  int count = 0;

 private:
  cublasLtHandle_t handle_;
  cublasLtMatmulDesc_t op_;
  cublasLtMatrixLayout_t a_, b_, c_;
  cublasLtMatmulHeuristicResult_t found_[kMax];
};

/// The operands of one shape, with enough copies of the weights that no cache holds them.
struct Data {
  Data(const Shape& shape, uint32_t max_rank) : shape(shape) {
    size_t weights = 0;
    for (uint32_t n : shape.n) weights += size_t{n} * shape.k;
    copies = static_cast<int>(std::clamp<size_t>((100 << 20) / (weights * 2) + 1, 2, 20));
    left = std::make_unique<Buffer>(size_t{shape.m} * shape.k);
    u = std::make_unique<Buffer>(size_t{shape.m} * max_rank);
    a = std::make_unique<Buffer>(size_t{shape.k} * max_rank);
    check(cudaMalloc(&flags, gemm_flag_count(shape.m) * 4), "cudaMalloc");
    check(cudaMemset(flags, 0, gemm_flag_count(shape.m) * 4), "cudaMemset");
    for (uint32_t n : shape.n) {
      right.push_back(std::make_unique<Buffer>(size_t{n} * shape.k * copies));
      b.push_back(std::make_unique<Buffer>(size_t{n} * max_rank));
      out.push_back(std::make_unique<Buffer>(size_t{shape.m} * n));
    }
  }
  /// With `fused` the launch makes u, too: of the first problem's adapter for all of them.
  GemmGroup group(int copy, uint32_t rank, bool fused = false) const {
    GemmGroup group;
    group.m = shape.m;
    group.right_is_kn = shape.right_is_kn;
    group.problems = static_cast<int>(shape.n.size());
    for (int i = 0; i < group.problems; ++i) {
      GemmProblem& problem = group.problem[i];
      const uint32_t n = shape.n[i];
      problem.n = n;
      problem.pairs = rank > 0 ? 2 : 1;
      const size_t stride = shape.right_is_kn ? n : shape.k;
      problem.pair[0] = {left->get(), shape.k, weight(i, copy), stride, shape.k};
      const size_t rank_stride = shape.right_is_kn ? n : rank;
      problem.pair[1] = {u->get(), rank, b[i]->get(), rank_stride, rank};
      problem.out = out[i]->get();
      problem.out_stride = n;
    }
    if (fused) {
      group.shrinks = 1;
      group.flags = flags;
      group.shrink[0] = {left->get(), shape.k, shape.k, 1, {}};
      group.shrink[0].part[0] = {
          a->get(), shape.right_is_kn ? rank : shape.k, rank, 1.0f, u->get(), rank, nullptr};
    }
    return group;
  }
  const bf16* weight(int i, int copy) const {
    return right[i]->get() + size_t{shape.n[i]} * shape.k * copy;
  }

  Shape shape;
  int copies;
  std::unique_ptr<Buffer> left, u, a;
  uint32_t* flags = nullptr;
  std::vector<std::unique_ptr<Buffer>> right, b, out;
};

int run(int argc, char** argv) {
  bool all = false;
  std::vector<bool> wanted(64, false);
  bool any = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "all") == 0) {
      all = true;
    } else {
      wanted[std::atoi(argv[i])] = any = true;
    }
  }
  Context context;
  cudaStreamCreate(&context.stream);
  cublasLtHandle_t handle;
  cublasLtCreate(&handle);
  void* space;
  cudaMalloc(&space, Blas::kWorkspace);
  std::vector<Shape> shapes;
  for (uint32_t m : {4096u, 512u}) {
    for (bool kn : {false, true}) {
      shapes.push_back({m, 4096, {4096}, kn});
      shapes.push_back({m, 4096, {11008}, kn});
      shapes.push_back({m, 2048, {2048}, kn});
      shapes.push_back({m, 2048, {8192}, kn});
      shapes.push_back({m, 8192, {2048}, kn});
      shapes.push_back({m, 2048, {2048, 512, 512}, kn});
    }
  }
  std::printf(
      "%2s %5s %5s %-13s %2s | %8s %6s | %8s %6s %5s | %6s %6s | %6s %6s | form\n",
      "#",
      "m",
      "k",
      "n",
      "",
      "blas us",
      "TFLOPs",
      "ours us",
      "TFLOPs",
      "ratio",
      "r16",
      "r64",
      "f16",
      "f64");
  for (size_t s = 0; s < shapes.size(); ++s) {
    if (any && !wanted[s]) continue;
    const Shape& shape = shapes[s];
    const Data data(shape, 64);
    double flops = 0;
    std::string n_text;
    for (uint32_t n : shape.n) {
      flops += 2.0 * shape.m * n * shape.k;
      if (!n_text.empty()) n_text += ',';
      n_text += std::to_string(n);
    }
    Race race(context.stream, data.copies);
    const auto ours = [&](int form, uint32_t rank, bool fused = false) {
      return race.add([&, form, rank, fused](int copy) {
        sm90::gemm_with_form(context, data.group(copy, rank, fused), form);
      });
    };
    std::vector<std::unique_ptr<Blas>> blas;
    std::vector<std::vector<int>> blas_entries;
    for (size_t i = 0; i < shape.n.size(); ++i) {
      blas.push_back(
          std::make_unique<Blas>(handle, shape.m, shape.n[i], shape.k, shape.right_is_kn));
      blas_entries.emplace_back();
      for (int which = 0; which < blas[i]->count; ++which) {
        blas_entries[i].push_back(race.add([&, i, which](int copy) {
          blas[i]->run(
              which,
              data.left->get(),
              data.weight(i, copy),
              data.out[i]->get(),
              space,
              context.stream);
        }));
      }
    }
    const int base = ours(-1, 0), rank16 = ours(-1, 16), rank64 = ours(-1, 64);
    const int fused16 = ours(-1, 16, true), fused64 = ours(-1, 64, true);
    std::vector<int> forms(sm90::form_count(), -1);
    for (int form = 0; all && form < sm90::form_count(); ++form) {
      if (sm90::form_fits(context, data.group(0, 0), form)) forms[form] = ours(form, 0);
    }
    const std::vector<double> us = race.run(9);
    double blas_us = 0;
    for (const std::vector<int>& entries : blas_entries) {
      double best = 1e30;
      for (int entry : entries) best = std::min(best, us[entry]);
      blas_us += best;
    }
    std::printf(
        "%2zu %5u %5u %-13s %2s | %8.1f %6.0f | %8.1f %6.0f %5.3f | %6.3f %6.3f | %6.3f %6.3f | "
        "%s\n",
        s,
        shape.m,
        shape.k,
        n_text.c_str(),
        shape.right_is_kn ? "kn" : "nk",
        blas_us,
        flops / blas_us * 1e-6,
        us[base],
        flops / us[base] * 1e-6,
        blas_us / us[base],
        us[rank16] / us[base],
        us[rank64] / us[base],
        us[fused16] / us[base],
        us[fused64] / us[base],
        sm90::form_name(sm90::chosen_form(context, data.group(0, 0))));
    for (int form = 0; form < sm90::form_count(); ++form) {
      if (forms[form] < 0) continue;
      const double t = us[forms[form]];
      std::printf("%40s %8.1f %6.0f\n", sm90::form_name(form), t, flops / t * 1e-6);
    }
    std::fflush(stdout);
  }
  // What a launch costs the host.
  const Data data({512, 512, {512, 512, 512}, false}, 64);
  const GemmGroup group = data.group(0, 16);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 500; ++i) sm90::gemm_with_form(context, group, -1);
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
  cudaStreamSynchronize(context.stream);
  std::printf("host: %.2f us a launch of 3 problems of 2 pairs\n", time.count() / 500);
  return 0;
}

}  // namespace
}  // namespace metal_lora::cuda

int main(int argc, char** argv) {
  try {
    return metal_lora::cuda::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
