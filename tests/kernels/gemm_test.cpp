// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm.h"

#include <gtest/gtest.h>

#include <limits>

#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

struct Shape {
  uint32_t m, n, k;
};

// Every remainder of the tiles (14 or 6 or 2 rows, 16 and 32 columns, 2 of k), more than one block
// of k (1536 or 768), more than one task (64 columns, 128 rows).
constexpr Shape kShapes[] = {
    {1, 1, 1},
    {2, 33, 31},
    {9, 31, 33},
    {31, 64, 160},
    {33, 160, 64},
    {130, 33, 1},
    {15, 17, 4097},
    {130, 65, 1600}};

/// |error| ≤ Σ|a||b|·(2·roundoff of the operands + (k + 8)·2⁻²⁴), twice that many additions where
/// a pair of products is added at once: the standard forward bound, k chained roundings at worst.
double sum_bound(double magnitude, double operand_roundoff, size_t k) {
  return magnitude * (2 * operand_roundoff + (static_cast<double>(k) + 8) * 0x1p-24) + 1e-30;
}

std::string trace(cpu::Isa isa, const Shape& s, DType a, DType b) {
  return std::string(cpu::isa_name(isa)) + " m=" + std::to_string(s.m) +
         " n=" + std::to_string(s.n) + " k=" + std::to_string(s.k) + " " + name_of(a) + "·" +
         name_of(b);
}

void check_gemm(const Shape& s, DType a_type, DType b_type, bool ta, bool tb, size_t pad) {
  std::mt19937 rng(s.m * 131 + s.n * 17 + s.k);
  const size_t lda = (ta ? s.m : s.k) + pad, ldb = (tb ? s.k : s.n) + pad, ldc = s.n + pad;
  const Array a = random_array(rng, a_type, lda * (ta ? s.k : s.m));
  const Array b = random_array(rng, b_type, ldb * (tb ? s.n : s.k));
  const Array c0 = random_array(rng, DType::f32, ldc * s.m);
  const Sums sums = multiply(
      s.m,
      s.n,
      s.k,
      [&](size_t i, size_t p) { return a.values[ta ? p * lda + i : i * lda + p]; },
      [&](size_t p, size_t j) { return b.values[tb ? j * ldb + p : p * ldb + j]; });
  // Both operands stored as bf16: nothing is rounded on the way to the multiplication.
  const float alpha = 0.75f, beta = -0.5f;
  std::vector<float> c(c0.values.begin(), c0.values.end());
  cpu::gemm(
      s.m,
      s.n,
      s.k,
      alpha,
      {a.data(), a_type, lda},
      ta,
      {b.data(), b_type, ldb},
      tb,
      beta,
      c.data(),
      ldc);
  for (size_t i = 0; i < s.m; ++i) {
    for (size_t j = 0; j < ldc; ++j) {
      const double before = c0.values[i * ldc + j], got = c[i * ldc + j];
      if (j >= s.n) {
        ASSERT_EQ(got, before) << "wrote beyond the columns";
        continue;
      }
      const double want = alpha * sums.value[i * s.n + j] + beta * before;
      const double bound = sum_bound(sums.magnitude[i * s.n + j], 0, s.k) +
                           0x1p-22 * (std::fabs(before) + std::fabs(want));
      ASSERT_NEAR(got, want, bound) << "at " << i << ", " << j;
    }
  }
}

TEST(Gemm, MatchesF64OnEveryIsaTypeAndTransposition) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (const Shape& s : kShapes) {
      for (DType a : {DType::f32, DType::f16, DType::bf16}) {
        for (DType b : {DType::f32, DType::f16, DType::bf16}) {
          const bool long_k = s.k > 1000;
          if (long_k && a != b) continue;  // the mixed types differ in packing only
          SCOPED_TRACE(trace(isa, s, a, b));
          const size_t pad = (s.m + s.n) % 3;
          check_gemm(s, a, b, false, true, pad);
          check_gemm(s, a, b, true, false, pad);
          if (!long_k) check_gemm(s, a, b, false, false, 5);
          if (!long_k) check_gemm(s, a, b, true, true, 5);
          if (testing::Test::HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST(Gemm, EmptyDimensions) {
  float c[4] = {1, 2, 3, 4};
  const float one = 1.0f;
  const cpu::MatrixView none = {&one, DType::f32, 1};
  cpu::gemm(0, 2, 1, 1.0f, none, false, none, false, 0.0f, c, 2);
  cpu::gemm(2, 0, 1, 1.0f, none, false, none, false, 0.0f, c, 2);
  EXPECT_EQ(c[0], 1.0f);
  cpu::gemm(2, 2, 0, 1.0f, none, false, none, false, 0.5f, c, 2);
  EXPECT_EQ(c[0], 0.5f);
  EXPECT_EQ(c[3], 2.0f);
  cpu::gemm(2, 2, 0, 1.0f, none, false, none, false, 0.0f, c, 2);
  EXPECT_EQ(c[3], 0.0f);
}

TEST(Gemm, BetaZeroDoesNotReadC) {
  const std::vector<float> a(6, 1.0f), b(6, 2.0f);
  std::vector<float> c(4, std::numeric_limits<float>::quiet_NaN());
  cpu::gemm(
      2,
      2,
      3,
      1.0f,
      {a.data(), DType::f32, 3},
      false,
      {b.data(), DType::f32, 2},
      false,
      0.0f,
      c.data(),
      2);
  for (float v : c) EXPECT_EQ(v, 6.0f);
}

TEST(Gemm, NonFiniteValuesStayInTheirRowAndColumn) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      const uint32_t m = 17, n = 21, k = 35;
      std::mt19937 rng(5);
      Array a = random_array(rng, dtype, m * k), b = random_array(rng, dtype, n * k);
      const size_t size = dtype == DType::f32 ? 4 : 2;
      const uint32_t infinity = dtype == DType::f32   ? 0x7f800000u
                                : dtype == DType::f16 ? 0x7c00u
                                                      : 0x7f80u;
      std::memcpy(a.bytes.data() + (3 * k + 34) * size, &infinity, size);
      std::vector<float> c(m * n);
      cpu::gemm(
          m,
          n,
          k,
          1.0f,
          {a.data(), dtype, k},
          false,
          {b.data(), dtype, k},
          true,
          0.0f,
          c.data(),
          n);
      for (size_t i = 0; i < m * n; ++i) EXPECT_EQ(std::isfinite(c[i]), i / n != 3) << i;
    }
  }
}

struct WeightCase {
  WeightFormat format;
  WeightLayout layout;
  DType scales;
  uint32_t group_size;
  bool double_quant = false;
};

const WeightCase kWeightCases[] = {
    {WeightFormat::f32, WeightLayout::row_major, DType::f32, 0},
    {WeightFormat::f16, WeightLayout::row_major, DType::f32, 0},
    {WeightFormat::bf16, WeightLayout::row_major, DType::f32, 0},
    {WeightFormat::int4, WeightLayout::row_major, DType::f32, 32},
    {WeightFormat::int4, WeightLayout::row_major, DType::bf16, 64},
    {WeightFormat::int8, WeightLayout::row_major, DType::f16, 32},
    {WeightFormat::int4, WeightLayout::cpu_packed, DType::f16, 32},
    {WeightFormat::int8, WeightLayout::cpu_packed, DType::f32, 64},
    {WeightFormat::nf4, WeightLayout::row_major, DType::f32, 64},
    {WeightFormat::nf4, WeightLayout::row_major, DType::f32, 64, true},
    {WeightFormat::nf4, WeightLayout::cpu_packed, DType::f32, 64, true}};

void check_weight(const WeightCase& wc, DType a_type, bool backward, uint32_t row0, uint32_t rows) {
  std::mt19937 rng(77);
  const uint32_t m = 11, n = 144, k = 192;
  const Weight w =
      random_weight(rng, wc.format, n, k, wc.group_size, wc.scales, wc.layout, wc.double_quant);
  const uint32_t inner = backward ? rows : k, outer = backward ? k : rows;
  const Array a = random_array(rng, a_type, m * (inner + 3));
  const Sums sums = multiply(
      m,
      outer,
      inner,
      [&](size_t i, size_t p) { return a.values[i * (inner + 3) + p]; },
      [&](size_t p, size_t j) {
        return backward ? w.values[(row0 + p) * k + j] : w.values[(row0 + j) * k + p];
      });
  std::vector<float> c(m * outer, 1.0f);
  const auto run = backward ? &cpu::gemm_weight_backward : &cpu::gemm_weight;
  run(m, {a.data(), a_type, inner + 3}, w.view(), row0, rows, 1.0f, c.data(), outer);
  for (size_t i = 0; i < c.size(); ++i) {
    const double bound = sum_bound(sums.magnitude[i], compute_roundoff(a_type), inner) +
                         0x1p-22 * (1 + std::fabs(c[i]));
    ASSERT_NEAR(c[i], sums.value[i] + 1.0, bound) << i;
  }
}

TEST(GemmWeight, EveryFormatForwardAndBackward) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (const WeightCase& wc : kWeightCases) {
      for (DType a : {DType::f32, DType::f16, DType::bf16}) {
        SCOPED_TRACE(
            std::string(cpu::isa_name(isa)) + " format " +
            std::to_string(static_cast<int>(wc.format)) + " layout " +
            std::to_string(static_cast<int>(wc.layout)) + " " + name_of(a));
        for (bool backward : {false, true}) {
          check_weight(wc, a, backward, 0, 144);
          check_weight(wc, a, backward, 48, 37);
          check_weight(wc, a, backward, 33, 70);  // in the middle of a packed block
        }
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(Gemm, BitwiseIndependentOfThreadsAndOfOtherRows) {
  const KernelSettings restore;
  std::mt19937 rng(9);
  const uint32_t m = 300, n = 150, k = 1700;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (DType dtype : {DType::f32, DType::bf16}) {
      const Array a = random_array(rng, dtype, m * k), b = random_array(rng, dtype, n * k);
      const auto run = [&](uint32_t rows) {
        std::vector<float> c(rows * n);
        cpu::gemm(
            rows,
            n,
            k,
            1.0f,
            {a.data(), dtype, k},
            false,
            {b.data(), dtype, k},
            true,
            0.0f,
            c.data(),
            n);
        return c;
      };
      cpu::set_thread_count(1);
      const std::vector<float> alone = run(m);
      for (int threads : {2, 3}) {
        cpu::set_thread_count(threads);
        EXPECT_EQ(run(m), alone);
      }
      for (uint32_t rows : {1u, 13u, 33u, 130u}) {
        const std::vector<float> some = run(rows);
        EXPECT_TRUE(std::equal(some.begin(), some.end(), alone.begin())) << rows;
      }
    }
  }
}

}  // namespace
}  // namespace metal_lora::test
