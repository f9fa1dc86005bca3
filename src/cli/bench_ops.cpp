// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/bench_ops.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/random.h>
#include <mlx/transforms.h>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/lora_quantized.h"
#include "metal_lora/ops.h"

namespace mx = mlx::core;

namespace metal_lora::cli {
namespace {

constexpr int kDims = 2048, kRank = 16;
constexpr size_t kBeyondCaches = 256u << 20;  ///< bytes of weight copies used in rotation

mx::array random_array(mx::Shape shape, mx::Dtype dtype, float scale, uint64_t seed) {
  mx::array a = mx::astype(
      mx::multiply(
          mx::random::normal(shape, mx::float32, 0.0f, 1.0f, mx::random::key(seed)),
          mx::array(scale)),
      dtype);
  a.eval();
  return a;
}

std::string dtype_text(mx::Dtype dtype) {
  return dtype == mx::float32 ? "f32" : dtype == mx::float16 ? "f16" : "bf16";
}

struct LinearCase {
  mx::Dtype dtype;     ///< of x
  std::string format;  ///< of the weight: "dense" (x's dtype), "int4", "nf4"
};

/// A weight with memory of its own.
Weight make_weight(const LinearCase& c, const mx::array& dense) {
  const Weight weight = Weight::dense(mx::add(dense, mx::array(0, c.dtype)));
  if (c.format == "dense") return weight;
  if (c.format == "nf4") return weight.quantized_nf4(/*double_quant=*/true).prepared();
  return weight.quantized(4, 64).prepared();
}

/// Enough copies that none is still in a cache when its turn comes again; few when many tokens
/// share one read of it.
std::vector<LoraLinear> make_linears(const LinearCase& c, int tokens, bool with_lora) {
  const auto dense = random_array({kDims, kDims}, c.dtype, 1.0f / std::sqrt(float(kDims)), 1);
  const auto a = random_array({kRank, kDims}, c.dtype, 0.02f, 2);
  const auto b = random_array({kDims, kRank}, c.dtype, 0.02f, 3);
  std::vector<LoraLinear> linears;
  size_t bytes = 0;
  do {
    LoraLinear linear{make_weight(c, dense), std::nullopt, std::nullopt};
    if (with_lora) linear.lora = Lora{a, b, 2.0f};
    bytes += linear.weight.nbytes();
    linears.push_back(std::move(linear));
  } while (tokens <= static_cast<int>(cpu::kGemvMaxTokens) && bytes < kBeyondCaches);
  return linears;
}

OpResult bench_linear(const LinearCase& c, int tokens, bool with_lora) {
  const auto linears = make_linears(c, tokens, with_lora);
  const auto x = random_array({tokens, kDims}, c.dtype, 1.0f, 7);
  OpResult result;
  result.name = with_lora ? "lora_linear" : "linear";
  result.dtype = dtype_text(c.dtype) + (c.format == "dense" ? "" : "/" + c.format);
  result.shape =
      fmt::format("M={} K=N={}{}", tokens, kDims, with_lora ? fmt::format(" r={}", kRank) : "");
  const std::string format = c.format == "dense" ? dtype_text(c.dtype) : c.format;
  result.form = kernel_form(static_cast<uint32_t>(tokens), format, kDims, kDims);
  result.timing = measure(
      [&](int i) { ops::lora_linear(x, linears[static_cast<size_t>(i) % linears.size()]).eval(); });
  const double m = tokens, d = kDims;
  result.flops = 2 * m * d * d + (with_lora ? 4 * m * d * kRank : 0);
  const double element = static_cast<double>(mx::size_of(c.dtype));
  result.bytes = static_cast<double>(linears.front().weight.nbytes()) + 2 * m * d * element +
                 (with_lora ? 2 * d * kRank * element : 0);
  result.computes_in_f32 = c.dtype == mx::float32;
  return result;
}

OpResult bench_attention(mx::Dtype dtype) {
  constexpr int kTokens = 1024, kHeads = 9, kKvHeads = 3, kHeadDim = 64;
  const auto q = random_array({kTokens, kHeads, kHeadDim}, dtype, 1.0f, 1);
  const auto k = random_array({kTokens, kKvHeads, kHeadDim}, dtype, 1.0f, 2);
  const auto v = random_array({kTokens, kKvHeads, kHeadDim}, dtype, 1.0f, 3);
  const auto start = mx::zeros({kTokens}, mx::int32);
  OpResult result;
  result.name = "attention";
  result.dtype = dtype_text(dtype);
  result.shape = fmt::format("tokens={} heads={}/{} d={}", kTokens, kHeads, kKvHeads, kHeadDim);
  result.timing = measure([&](int) { ops::attention(q, k, v, start, 0.125f).eval(); });
  // Half the pairs are masked: q·kᵀ and p·v over the rest.
  result.flops = 4.0 * kTokens * (kTokens + 1) / 2 * kHeads * kHeadDim;
  result.bytes = static_cast<double>(2 * q.nbytes() + k.nbytes() + v.nbytes());
  result.computes_in_f32 = dtype == mx::float32;
  return result;
}

OpResult bench_cross_entropy(mx::Dtype dtype) {
  constexpr int kTokens = 256, kHidden = 576, kVocab = 49152;
  const auto x = random_array({kTokens, kHidden}, dtype, 1.0f, 1);
  const Weight head = Weight::dense(random_array({kVocab, kHidden}, dtype, 0.04f, 2));
  const auto targets = mx::arange(0, kTokens, 1, mx::int32);
  const auto weights = mx::ones({kTokens}, mx::float32);
  mx::eval(targets, weights);
  OpResult result;
  result.name = "linear_cross_entropy";
  result.dtype = dtype_text(dtype);
  result.shape = fmt::format("tokens={} dims={} vocab={}", kTokens, kHidden, kVocab);
  result.timing = measure([&](int) {
    ops::linear_cross_entropy(x, head, targets, weights, /*needs_grad=*/true).eval();
  });
  result.flops =
      4.0 * kTokens * kHidden * kVocab;  // logits, and their gradient back through the head
  result.bytes = static_cast<double>(head.nbytes() + 2 * x.nbytes());
  result.computes_in_f32 = dtype == mx::float32;
  return result;
}

OpResult bench_adamw() {
  constexpr int kCount = 5'000'000;
  auto param = random_array({kCount}, mx::float32, 0.02f, 1);
  const auto grad = random_array({kCount}, mx::float32, 1e-3f, 2);
  auto m = mx::zeros({kCount}), v = mx::zeros({kCount});
  mx::eval(m, v);
  OpResult result;
  result.name = "adamw";
  result.dtype = "f32";
  result.shape = fmt::format("count={}", kCount);
  result.timing = measure([&](int i) {
    AdamWParams p;
    p.count = kCount;
    p.learning_rate = 1e-3f;
    p.step = static_cast<uint64_t>(i) + 1;
    p.clip_norm = 1.0f;
    auto out = ops::adamw(param, grad, m, v, p);
    mx::eval(out.param, out.m, out.v);
    param = out.param;
    m = out.m;
    v = out.v;
  });
  // Reads the gradient twice (norm, step), the rest once; writes three.
  result.bytes = 8.0 * kCount * sizeof(float);
  result.flops = 15.0 * kCount;
  return result;
}

}  // namespace

double OpResult::share_of_limit(const MachineLimits& limits) const {
  const double peak_gflops = computes_in_f32 ? limits.f32_gflops : limits.bf16_gflops;
  const double compute_ms = flops / peak_gflops / 1e6, read_ms = bytes / limits.read_gbps / 1e6;
  return std::max(compute_ms, read_ms) / timing.median_ms;
}

std::string kernel_form(uint32_t tokens, const std::string& weight_format, uint32_t n, uint32_t k) {
  std::string layout = "row-major";
  const bool nf4 = weight_format == "nf4";
  if (nf4 || weight_format == "int4" || weight_format == "int8") {
    WeightParams params;
    params.n = n;
    params.k = k;
    params.format = nf4                       ? WeightFormat::nf4
                    : weight_format == "int4" ? WeightFormat::int4
                                              : WeightFormat::int8;
    params.group_size = 64;
    params.scales_dtype = nf4 ? DType::f32 : DType::f16;
    if (cpu::can_pack(params)) layout = "packed";
  }
  return fmt::format(
      "{} {} {} ({})",
      tokens <= cpu::kGemvMaxTokens ? "gemv" : "gemm",
      weight_format,
      layout,
      cpu::isa_name(cpu::active_isa()));
}

void bench_ops(const std::function<void(const OpResult&)>& on_result) {
  const LinearCase cases[] = {
      {mx::float32, "dense"},
      {mx::bfloat16, "dense"},
      {mx::bfloat16, "int4"},
      {mx::float32, "int4"},
      {mx::bfloat16, "nf4"},
      {mx::float32, "nf4"}};
  for (const LinearCase& c : cases) {
    for (const int tokens : {1, 8, 64, 512}) {
      for (const bool with_lora : {false, true}) on_result(bench_linear(c, tokens, with_lora));
    }
  }
  for (const mx::Dtype dtype : {mx::float32, mx::bfloat16}) {
    on_result(bench_attention(dtype));
    on_result(bench_cross_entropy(dtype));
  }
  on_result(bench_adamw());
}

}  // namespace metal_lora::cli
