// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The roof of the machine: loops that do nothing but multiply-add on registers, and nothing but
// read. Each is compiled for its instruction set by attribute, so that the program itself runs
// anywhere.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "src/cli/bench_timing.h"

namespace metal_lora::cli {
namespace {

constexpr int kRounds = 4'000'000;  ///< of a register loop: some milliseconds
constexpr int kChains =
    10;  ///< independent sums: hide the latency of a multiply-add (4) at 2 a cycle
constexpr size_t kReadBytes = 256u << 20;
constexpr size_t kReadChunk = 1u << 20;

/// Keeps a result alive that nobody reads.
volatile float sink;
volatile uint64_t integer_sink;

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void fma_avx2() {
  __m256 sums[kChains];
  for (auto& s : sums) s = _mm256_set1_ps(1.0f);
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-6f);
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 10
    for (int c = 0; c < kChains; ++c) sums[c] = _mm256_fmadd_ps(sums[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm256_add_ps(sums[0], sums[c]);
  sink = _mm256_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f"))) void fma_avx512() {
  __m512 sums[kChains];
  for (auto& s : sums) s = _mm512_set1_ps(1.0f);
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-6f);
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 10
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_fmadd_ps(sums[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  sink = _mm512_cvtss_f32(sums[0]);
}

__attribute__((target("avx512f,avx512bf16"))) void dot_bf16() {
  __m512 sums[kChains];
  for (auto& s : sums) s = _mm512_set1_ps(1.0f);
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3c003c00),
                 b = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 10
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], a, b);
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  sink = _mm512_cvtss_f32(sums[0]);
}

__attribute__((target("avx2"))) uint64_t read_avx2(const uint64_t* data, size_t words) {
  __m256i sums[4] = {};
  for (size_t i = 0; i + 16 <= words; i += 16) {
#pragma GCC unroll 4
    for (size_t c = 0; c < 4; ++c) {
      sums[c] = _mm256_add_epi64(
          sums[c], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + 4 * c)));
    }
  }
  const __m256i total =
      _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(total, 0));
}
#endif

/// Four lanes are what the compiler's baseline (SSE2, NEON) multiplies at once.
void fma_baseline() {
  constexpr int kLanes = 4 * kChains;
  float sums[kLanes];
  std::fill(sums, sums + kLanes, 1.0f);
  for (int i = 0; i < kRounds; ++i) {
    for (float& s : sums) s = s * 0.999f + 1e-6f;
  }
  float total = 0.0f;
  for (const float s : sums) total += s;
  sink = total;
}

uint64_t read_baseline(const uint64_t* data, size_t words) {
  uint64_t sum = 0;
  for (size_t i = 0; i < words; ++i) sum += data[i];
  return sum;
}

double seconds_of(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Best of several rounds: a limit is what the machine does when nobody disturbs it.
double best_gflops(void (*loop)(), double flops_per_loop) {
  constexpr int kRepeats = 7;
  const auto threads = static_cast<size_t>(cpu::thread_count());
  double best = 0.0;
  for (int i = 0; i < kRepeats; ++i) {
    const double seconds = seconds_of([&] { cpu::parallel_for(threads, [&](size_t) { loop(); }); });
    best = std::max(best, flops_per_loop * static_cast<double>(threads) / seconds / 1e9);
  }
  return best;
}

double best_read_gbps() {
  constexpr int kRepeats = 9;
  std::vector<uint64_t> buffer(kReadBytes / sizeof(uint64_t), 1);
  auto* read = read_baseline;
#if defined(__x86_64__)
  if (cpu::isa_supported(cpu::Isa::avx2)) read = read_avx2;
#endif
  double best = 0.0;
  for (int i = 0; i < kRepeats; ++i) {
    const double seconds = seconds_of([&] {
      cpu::parallel_for(kReadBytes / kReadChunk, [&](size_t chunk) {
        constexpr size_t kWords = kReadChunk / sizeof(uint64_t);
        integer_sink = read(buffer.data() + chunk * kWords, kWords);
      });
    });
    best = std::max(best, static_cast<double>(kReadBytes) / seconds / 1e9);
  }
  return best;
}

}  // namespace

MachineLimits measure_limits() {
  MachineLimits limits;
  limits.read_gbps = best_read_gbps();
  constexpr double kLoop = 2.0 * kRounds * kChains;
  const cpu::Isa isa = cpu::active_isa();
#if defined(__x86_64__)
  if (isa == cpu::Isa::avx512 || isa == cpu::Isa::avx512_bf16) {
    limits.f32_gflops = best_gflops(fma_avx512, kLoop * 16);
  } else if (isa == cpu::Isa::avx2) {
    limits.f32_gflops = best_gflops(fma_avx2, kLoop * 8);
  }
  if (isa == cpu::Isa::avx512_bf16) limits.bf16_gflops = best_gflops(dot_bf16, kLoop * 32);
#endif
  if (limits.f32_gflops == 0.0) limits.f32_gflops = best_gflops(fma_baseline, kLoop * 4);
  if (limits.bf16_gflops == 0.0) limits.bf16_gflops = limits.f32_gflops;
  return limits;
}

nlohmann::ordered_json to_json(const MachineLimits& limits) {
  return {
      {"f32_gflops", limits.f32_gflops},
      {"bf16_gflops", limits.bf16_gflops},
      {"read_gbps", limits.read_gbps}};
}

Timing summarize(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values.empty()
               ? 0.0
               : values[static_cast<size_t>(share * static_cast<double>(values.size() - 1) + 0.5)];
  };
  return {at(0.5), at(0.1), at(0.9), static_cast<int>(values.size())};
}

Timing measure(const std::function<void(int)>& run, double budget_seconds) {
  constexpr int kWarmUp = 2, kRuns = 30, kFewest = 5;
  for (int i = 0; i < kWarmUp; ++i) run(i);
  std::vector<double> times_ms;
  double spent = 0.0;
  for (int i = 0; i < kRuns && (i < kFewest || spent < budget_seconds); ++i) {
    const double seconds = seconds_of([&] { run(kWarmUp + i); });
    times_ms.push_back(1e3 * seconds);
    spent += seconds;
  }
  return summarize(std::move(times_ms));
}

}  // namespace metal_lora::cli
