// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What lies between the linears, alone: microseconds and bytes a second beside a copy's of the same
// run. Copies of the data rotate, so that reads come from memory.
//
//   elementwise_bench [row counts…]      (4096 and 1 where none are given)
#include "bench/gpu/bench.cuh"
#include "kernels/cuda/transformer_kernels.h"

using namespace metal_lora;
namespace mlc = metal_lora::cuda;
using mlc::bf16;

namespace {

using Bench = bench::Device;

double copy_rate = 0.0;  ///< bytes a microsecond, read and written

void print(const char* what, uint32_t rows, uint32_t dims, float us, double bytes) {
  std::printf(
      "%-24s [%u, %u] %8.2f us %7.0f GB/s, %3.0f %% of a copy\n",
      what,
      rows,
      dims,
      us,
      bytes / us * 1e-3,
      100.0 * bytes / us / copy_rate);
}

/// Copies enough that they cannot lie in the cache together, at most 64.
int rotations(size_t bytes) {
  return static_cast<int>(std::clamp<size_t>((size_t{192} << 20) / bytes, 2, 64));
}

std::vector<bf16*> arrays(Bench& b, size_t count) {
  std::vector<bf16*> out(static_cast<size_t>(rotations(count * sizeof(bf16))));
  for (auto& p : out) p = b.normal<bf16>(count, 1.0f);
  return out;
}

struct Rotating {
  std::vector<bf16*> a;
  bf16* at(int i) const { return a[static_cast<size_t>(i) % a.size()]; }
};

void norms(Bench& b, uint32_t rows, uint32_t dims) {
  const size_t count = size_t{rows} * dims;
  const double bytes = 2.0 * static_cast<double>(count);
  const Rotating x{arrays(b, count)}, r{arrays(b, count)}, dy{arrays(b, count)},
      y{arrays(b, count)};
  const bf16* w = b.normal<bf16>(dims, 0.1f, 1.0f);
  NormParams p;
  p.rows = rows;
  p.dims = dims;
  p.dtype = p.weight_dtype = DType::bf16;
  const auto& c = b.context;
  const auto time = [&](const char* what, double moved, const std::function<void(int)>& f) {
    print(what, rows, dims, bench::graph_us(b, f), moved * bytes);
  };
  time("norm", 2, [&](int i) {
    mlc::add_rms_norm_forward(c, p, x.at(i), nullptr, w, nullptr, y.at(i));
  });
  time("add + norm", 4, [&](int i) {
    mlc::add_rms_norm_forward(c, p, x.at(i), r.at(i), w, x.at(i), y.at(i));
  });
  time("norm backward", 3, [&](int i) {
    mlc::add_rms_norm_backward(c, p, x.at(i), w, dy.at(i), nullptr, y.at(i), nullptr);
  });
  time("norm backward + dh", 4, [&](int i) {
    mlc::add_rms_norm_backward(c, p, x.at(i), w, dy.at(i), r.at(i), y.at(i), nullptr);
  });
  float* dw = b.normal<float>(dims, 1.0f);
  time("norm backward, dweight", 5, [&](int i) {
    mlc::add_rms_norm_backward(c, p, x.at(i), w, dy.at(i), nullptr, y.at(i), dw);
  });
}

void activations(Bench& b, uint32_t rows, uint32_t ffn) {
  const size_t count = size_t{rows} * ffn;
  const double bytes = 2.0 * static_cast<double>(count);
  const Rotating both{arrays(b, 2 * count)}, act{arrays(b, count)}, dy{arrays(b, count)};
  const auto& c = b.context;
  print(
      "swiglu",
      rows,
      ffn,
      bench::graph_us(
          b,
          [&](int i) {
            mlc::swiglu_pair_forward(c, rows, ffn, DType::bf16, both.at(i), act.at(i));
          }),
      3 * bytes);
  print(
      "swiglu backward",
      rows,
      ffn,
      bench::graph_us(
          b,
          [&](int i) {
            mlc::swiglu_pair_backward(c, rows, ffn, DType::bf16, both.at(i), dy.at(i), nullptr);
          }),
      5 * bytes);
  print(
      "swiglu backward + act",
      rows,
      ffn,
      bench::graph_us(
          b,
          [&](int i) {
            mlc::swiglu_pair_backward(c, rows, ffn, DType::bf16, both.at(i), dy.at(i), act.at(i));
          }),
      6 * bytes);
}

void ropes(Bench& b, uint32_t rows) {
  constexpr uint32_t kQ = 32, kK = 8, kD = 64, kWidth = (kQ + 2 * kK) * kD;
  const Rotating qkv{arrays(b, size_t{rows} * kWidth)};
  const float* table = b.normal<float>(size_t{rows} * kD, 0.7f);
  mlc::RopePairParams p;
  p.tokens = rows;
  p.q_heads = kQ;
  p.kv_heads = kK;
  p.head_dim = kD;
  p.q_stride = p.k_stride = kWidth;
  print(
      "rope of q and k",
      rows,
      (kQ + kK) * kD,
      bench::graph_us(
          b, [&](int i) { mlc::rope_pair(b.context, p, qkv.at(i), qkv.at(i) + kQ * kD, table); }),
      rows * (4.0 * (kQ + kK) * kD + 4.0 * kD));
}

void optimizer(Bench& b, size_t count) {
  float* param = b.normal<float>(count, 1.0f);
  float* grad = b.normal<float>(count, 1e-3f);
  float* m = b.normal<float>(count, 1e-3f);
  float* v = b.normal<float>(count, 1e-6f, 1e-3f);
  float* norm = b.normal<float>(1, 1.0f);
  auto* skipped = reinterpret_cast<int32_t*>(b.normal<float>(1, 1.0f));
  AdamWParams p;
  p.count = count;
  p.learning_rate = 1e-5f;
  p.clip_norm = 1.0f;
  print(
      "adamw",
      1,
      static_cast<uint32_t>(count),
      bench::graph_us(b, [&](int) { mlc::adamw(b.context, p, param, grad, m, v, norm, skipped); }),
      32.0 * static_cast<double>(count));
}

void casts(Bench& b) {
  constexpr size_t kCount = size_t{32} << 20;
  const bf16* from = b.normal<bf16>(kCount, 1.0f);
  float* to = b.normal<float>(kCount, 1.0f);
  print(
      "cast bf16 to f32",
      1,
      kCount,
      bench::graph_us(
          b, [&](int) { mlc::cast(b.context, kCount, from, DType::bf16, to, DType::f32); }),
      6.0 * kCount);
}

void verification(Bench& b) {
  constexpr uint32_t kVocab = 49152, kDrafts = 5;
  const bf16* logits = b.normal<bf16>(size_t{kVocab} * (kDrafts + 1), 2.0f);
  auto* drafts = static_cast<int32_t*>(b.memory.allocate(kDrafts * 4));
  mlc::check(cudaMemset(drafts, 0, kDrafts * 4), "cudaMemset");
  auto* out = static_cast<int32_t*>(b.memory.allocate(2 * 4));
  VerifyParams p;
  p.batch = 1;
  p.drafts = kDrafts;
  p.vocab = kVocab;
  p.dtype = DType::bf16;
  for (const float temperature : {0.0f, 1.0f}) {
    p.temperature = temperature;
    const float us = bench::graph_us(
        b, [&](int) { mlc::verify_tokens(b.context, p, logits, drafts, nullptr, out, out + 1); });
    std::printf("verify, first draft refused, temperature %.0f: %.2f us\n", temperature, us);
  }
}

/// The fused loss of 4096 tokens, 2048 dims, vocabulary 49,152: two products' 1.65 TFLOP.
void loss(Bench& b) {
  constexpr uint32_t kTokens = 4096, kDims = 2048, kVocab = 49152;
  const bf16* x = b.normal<bf16>(size_t{kTokens} * kDims, 1.0f);
  auto* dx = b.normal<bf16>(size_t{kTokens} * kDims, 1.0f);
  const auto head = b.weight(kVocab, kDims, WeightFormat::bf16);
  const float* weights = b.normal<float>(kTokens, 0.1f, 1.0f);
  auto* targets = static_cast<int32_t*>(b.memory.allocate(kTokens * 4));
  mlc::check(cudaMemset(targets, 0, kTokens * 4), "cudaMemset");
  float* sum = b.normal<float>(1, 1.0f);
  LinearCrossEntropyParams p{kTokens, kDims, kVocab, DType::bf16};
  for (bf16* gradient : {dx, static_cast<bf16*>(nullptr)}) {
    const float us = bench::graph_us(
        b,
        [&](int) {
          mlc::linear_cross_entropy(
              b.context, p, x, head, targets, weights, sum, gradient, nullptr);
        },
        2);
    const double flop = (gradient != nullptr ? 4.0 : 2.0) * kTokens * kDims * double{kVocab};
    std::printf(
        "loss%s: %.0f us, %.0f TFLOP/s of its products\n",
        gradient != nullptr ? " and gradient" : "",
        us,
        flop / us * 1e-6);
  }
}

void copy_base(Bench& b) {
  constexpr size_t kBytes = size_t{64} << 20;
  char* p = static_cast<char*>(b.memory.allocate(4 * kBytes));
  const float us = bench::graph_us(b, [&](int i) {
    char* from = p + (i % 2) * 2 * kBytes;
    mlc::check(
        cudaMemcpyAsync(from + kBytes, from, kBytes, cudaMemcpyDeviceToDevice, b.context.stream),
        "copy");
  });
  copy_rate = 2.0 * kBytes / us;
  std::printf("copy of 64 MiB: %.1f us, %.0f GB/s\n", us, copy_rate * 1e-3);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<uint32_t> rows;
  for (int i = 1; i < argc; ++i) rows.push_back(static_cast<uint32_t>(std::atoi(argv[i])));
  if (rows.empty()) rows = {4096, 1};
  {
    Bench b;
    std::printf("%s\n", b.name.c_str());
    copy_base(b);
    optimizer(b, 12'000'000);
    optimizer(b, 45'000'000);
    casts(b);
    verification(b);
  }
  for (const uint32_t r : rows) {
    for (const uint32_t dims : {2048u, 8192u}) {
      Bench b;
      norms(b, r, dims);
      activations(b, r, dims);
      if (dims == 2048) ropes(b, r);
    }
  }
  Bench b;
  loss(b);
  return 0;
}
