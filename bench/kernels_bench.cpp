// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Speed of the CPU's linear kernels, with the machine's own limit in the same run: `tile_limit` is
// the inner loop on panels in the first-level cache. Compare ratios, not figures of different
// runs. --benchmark_format=json adds machine and build.
#include <benchmark/benchmark.h>

#include <bit>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace {

using namespace metal_lora;  // NOLINT: a program, not a header

std::vector<char> random_values(size_t count, DType dtype) {
  std::mt19937 rng(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<char> bytes(count * (dtype == DType::f32 ? 4 : 2));
  for (size_t i = 0; i < count; ++i) {
    const float value = uniform(rng);
    const uint16_t high = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
    if (dtype == DType::f32) {
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    } else {
      std::memcpy(bytes.data() + 2 * i, &high, 2);
    }
  }
  return bytes;
}

void report(benchmark::State& state, double flop) {
  state.counters["GFLOP/s"] =
      benchmark::Counter(flop * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void tile_limit(benchmark::State& state, cpu::Compute compute) {
  if (compute == cpu::Compute::bf16 && !cpu::has_bf16_multiply()) {
    state.SkipWithError("this machine does not multiply bf16");
    return;
  }
  const cpu::GemmKernels& kernels = cpu::gemm_kernels(compute);
  constexpr uint32_t kSteps = 128;
  std::vector<float> a(16 * kSteps), b(32 * kSteps), c(16 * 32);
  const cpu::PanelRun run = {a.data(), b.data(), kSteps, kSteps};
  for (auto _ : state) {
    kernels.tile(kernels.max_rows, kernels.max_panels, &run, 1, c.data(), 32, false);
    benchmark::DoNotOptimize(c.data());
    benchmark::ClobberMemory();
  }
  const double lanes = kernels.max_rows * kernels.max_panels * cpu::kPanelColumns;
  report(state, 2.0 * lanes * kSteps * (compute == cpu::Compute::bf16 ? 2 : 1));
}

/// One linear layer and what it reads and writes.
struct Layer {
  Layer(uint32_t m, uint32_t n, uint32_t k, uint32_t rank, DType dtype, WeightFormat format)
      : m(m),
        k(k),
        dtype(dtype),
        x(random_values(size_t{m} * k, dtype)),
        w(random_values(size_t{n} * k, DType::f32)),
        scales(random_values(size_t{n} * k / 32, DType::bf16)),
        a(random_values(size_t{rank} * k, dtype)),
        b(random_values(size_t{n} * rank, dtype)),
        y(size_t{m} * n * 4),
        dx(size_t{m} * k * 4),
        u(size_t{m} * rank),
        da(size_t{rank} * k),
        db(size_t{n} * rank) {
    const bool affine = format == WeightFormat::int4 || format == WeightFormat::int8;
    branch.weight = {
        {n, k, format, WeightLayout::row_major, affine ? 64u : 0u, DType::bf16},
        w.data(),
        scales.data(),
        scales.data()};
    branch.lora = {{rank, 1.0f, dtype}, a.data(), b.data()};
    branch.y = y.data();
    branch.u = u.data();
    branch.dy = y.data();
    branch.u_saved = u.data();
    branch.da = da.data();
    branch.db = db.data();
  }
  double flop() const { return 2.0 * m * k * branch.weight.params.n; }
  uint32_t m, k;
  DType dtype;
  std::vector<char> x, w, scales, a, b, y, dx;
  std::vector<float> u, da, db;
  cpu::LoraBranch branch;
};

Layer layer_of(const benchmark::State& state) {
  const auto arg = [&](int i) { return static_cast<uint32_t>(state.range(i)); };
  return {
      arg(0),
      arg(1),
      arg(2),
      arg(3),
      static_cast<DType>(arg(4)),
      static_cast<WeightFormat>(arg(5))};
}

void lora_forward(benchmark::State& state) {
  Layer layer = layer_of(state);
  for (auto _ : state) {
    cpu::lora_linear_forward(layer.m, layer.k, layer.dtype, layer.x.data(), &layer.branch, 1);
    benchmark::ClobberMemory();
  }
  report(state, layer.flop());
}

void lora_backward(benchmark::State& state) {
  Layer layer = layer_of(state);
  for (auto _ : state) {
    cpu::lora_linear_backward(
        layer.m, layer.k, layer.dtype, layer.x.data(), &layer.branch, 1, layer.dx.data());
    benchmark::ClobberMemory();
  }
  report(state, layer.flop());
}

void empty_parallel_for(benchmark::State& state) {
  for (auto _ : state) cpu::parallel_for(2, [](size_t) {});
}

/// m, n, k, rank, dtype, weight format. Rank 0 is the base alone.
void shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"m", "n", "k", "r", "dtype", "format"})->UseRealTime();
  for (int64_t dtype : {0, 2}) {
    for (int64_t rank : {0, 16}) bench->Args({512, 2048, 2048, rank, dtype, dtype});
    for (int64_t format : {dtype, int64_t{3}, int64_t{4}}) {
      for (int64_t rank : {0, 8}) {
        bench->Args({1024, 576, 576, rank, dtype, format});
        bench->Args({1024, 1536, 576, rank, dtype, format});
        bench->Args({1024, 576, 1536, rank, dtype, format});
      }
    }
  }
}

BENCHMARK_CAPTURE(tile_limit, f32, cpu::Compute::f32);
BENCHMARK_CAPTURE(tile_limit, bf16, cpu::Compute::bf16);
BENCHMARK(empty_parallel_for)->UseRealTime();
BENCHMARK(lora_forward)->Apply(shapes);
BENCHMARK(lora_backward)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
