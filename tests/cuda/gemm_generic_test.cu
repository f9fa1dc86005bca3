// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// gemm_generic against f64: both tiles, both directions, every unit of copying, several problems
// and pairs. Tolerance of a value: products of 16-bit numbers are exact in f32; a matrix unit adds
// 16 of them to a running sum and may truncate each of the 17 terms at 2^-23 of the largest, FFMA
// rounds once a term at 2^-24. So Σ|terms|·(k + 8)·2^-23 bounds both; then comes one rounding to
// the output's type.
#include <gtest/gtest.h>

#include "kernels/cuda/gemm.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

struct GemmCase {
  uint32_t m;
  std::vector<uint32_t> n;  ///< of each problem
  std::vector<uint32_t> k;  ///< of each pair
  DType dtype = DType::bf16;
  bool right_is_kn = false;
  bool out_f32 = false;
  bool extras = false;   ///< bias and residual
  uint32_t padding = 0;  ///< elements between rows
  uint32_t offset = 0;   ///< elements before the first
  bool large_tile = false;
  bool dispatched = false;  ///< gemm(), not gemm_generic()
};

std::string describe(const GemmCase& c) {
  std::string s = name_of(c.dtype) + " m " + std::to_string(c.m) + " n";
  for (uint32_t n : c.n) s += ' ' + std::to_string(n);
  s += " k";
  for (uint32_t k : c.k) s += ' ' + std::to_string(k);
  return s + (c.right_is_kn ? " kn" : "") + (c.out_f32 ? " f32 out" : "") + " padding " +
         std::to_string(c.padding) + " offset " + std::to_string(c.offset) +
         (c.large_tile ? " large" : "");
}

/// Rows with a stride, somewhere inside a buffer.
struct Operand {
  Operand(std::mt19937& rng, const GemmCase& c, DType dtype, uint32_t rows, uint32_t columns)
      : stride(columns + c.padding),
        offset(c.offset),
        array(random_array(rng, dtype, offset + rows * stride + 1)),
        device(array.bytes) {}
  double at(size_t row, size_t column) const {
    return array.values[offset + row * stride + column];
  }
  const void* data() const {
    return device.get<char>() + offset * (array.dtype == DType::f32 ? 4 : 2);
  }
  size_t stride, offset;
  Array array;
  DeviceBuffer device;
};

void check(const GemmCase& c) {
  SCOPED_TRACE(describe(c));
  std::mt19937 rng(c.m * 31 + c.n[0] * 7 + c.padding);
  TestDevice device;
  cuda::Context context = device.context();
  if (c.large_tile) context.multiprocessors = 1;
  cuda::GemmGroup group;
  group.m = c.m;
  group.dtype = c.dtype;
  group.out_dtype = c.out_f32 ? DType::f32 : c.dtype;
  group.right_is_kn = c.right_is_kn;
  group.problems = static_cast<int>(c.n.size());
  std::vector<Operand> lefts, rights, residuals;
  std::vector<Array> biases;
  std::vector<DeviceBuffer> bias_buffers, outs;
  const size_t out_size = group.out_dtype == DType::f32 ? 4 : 2;
  for (uint32_t k : c.k) lefts.emplace_back(rng, c, c.dtype, c.m, k);
  for (int i = 0; i < group.problems; ++i) {
    cuda::GemmProblem& problem = group.problem[i];
    problem.n = c.n[i];
    for (size_t p = 0; p < c.k.size(); ++p) {
      const uint32_t k = c.k[p], n = c.n[i];
      rights.emplace_back(rng, c, c.dtype, c.right_is_kn ? k : n, c.right_is_kn ? n : k);
      problem.pair[problem.pairs++] = {
          lefts[p].data(), lefts[p].stride, rights.back().data(), rights.back().stride, k};
    }
    problem.out_stride = c.n[i] + c.padding;
    outs.emplace_back((c.offset + c.m * problem.out_stride) * out_size);
    problem.out = outs.back().get<char>() + c.offset * out_size;
    biases.push_back(random_array(rng, DType::f32, c.n[i]));
    residuals.emplace_back(rng, c, group.out_dtype, c.m, c.n[i]);
    bias_buffers.emplace_back(biases.back().bytes);
    if (!c.extras) continue;
    problem.bias = bias_buffers.back().get<float>();
    problem.residual = residuals.back().data();
    problem.residual_stride = residuals.back().stride;
  }
  const auto run = [&] {
    c.dispatched ? cuda::gemm(context, group) : cuda::gemm_generic(context, group);
    device.finish();
  };
  run();
  size_t k_sum = 0;
  for (uint32_t k : c.k) k_sum += k;
  for (int i = 0; i < group.problems; ++i) {
    const auto first = outs[i].download<unsigned char>();
    outs[i].poison();
    const size_t n = c.n[i], stride = n + c.padding;
    std::vector<double> want(c.m * n), size(c.m * n);
    for (size_t p = 0; p < c.k.size(); ++p) {
      const Operand& right = rights[i * c.k.size() + p];
      const Sums s = multiply(
          c.m,
          n,
          c.k[p],
          [&](size_t row, size_t q) { return lefts[p].at(row, q); },
          [&](size_t q, size_t column) {
            return c.right_is_kn ? right.at(q, column) : right.at(column, q);
          });
      for (size_t j = 0; j < want.size(); ++j) want[j] += s.value[j], size[j] += s.magnitude[j];
    }
    for (size_t row = 0; row < c.m; ++row) {
      for (size_t column = 0; column < stride; ++column) {
        const size_t place = c.offset + row * stride + column;
        if (column >= n) {
          ASSERT_TRUE(first[place * out_size] == 0xff && first[(place + 1) * out_size - 1] == 0xff)
              << "wrote beyond column " << column;
          continue;
        }
        const double got = stored_value(first.data(), group.out_dtype, place);
        const size_t at = row * n + column;
        const double extra =
            c.extras ? biases[i].values[column] + residuals[i].at(row, column) : 0.0;
        const double value = want[at] + extra;
        const double sum_error =
            (size[at] + std::fabs(extra)) * (static_cast<double>(k_sum) + 8) * 0x1p-23;
        const double bound =
            sum_error + (std::fabs(value) + sum_error) * roundoff(group.out_dtype) + 0x1p-25;
        ASSERT_NEAR(got, value, bound) << "problem " << i << " (" << row << ", " << column << ")";
      }
    }
    // Again, alone in its bits.
    run();
    ASSERT_EQ(outs[i].download<unsigned char>(), first);
  }
}

TEST(GemmGeneric, MatchesF64) {
  METAL_LORA_NEEDS_GPU();
  for (DType d : {DType::bf16, DType::f16, DType::f32}) {
    for (bool kn : {false, true}) {
      for (bool large : {false, true}) {
        check({65, {33}, {96}, d, kn, false, false, 7, 0, large});
        check({128, {128}, {64}, d, kn, false, true, 0, 0, large});
        check({131, {136, 40}, {72, 8}, d, kn, false, true, 8, 0, large});
        check({200, {1, 264, 0, 31}, {33, 1, 16}, d, kn, true, true, 7, 0, large});
        check({129, {130}, {130, 2}, d, kn, true, false, 0, 0, large});
        if (HasFatalFailure()) return;
      }
      check({1, {1}, {1}, d, kn, false, true});
      check({31, {4097}, {33}, d, kn, false, true});
      check({17, {65}, {4097}, d, kn});
      check({64, {64}, {64, 0, 16}, d, kn, false, true, 0, 8});
      check({3, {5}, {0}, d, kn, false, true});
      check({3, {5}, {}, d, kn, false, false});
      if (HasFatalFailure()) return;
    }
  }
}

TEST(GemmGeneric, TakesEveryAlignment) {
  METAL_LORA_NEEDS_GPU();
  for (DType d : {DType::bf16, DType::f32}) {
    for (bool kn : {false, true}) {
      for (uint32_t padding : {0u, 1u, 2u, 4u, 8u}) {
        for (uint32_t offset : {0u, 1u, 2u, 4u, 6u}) {
          check({70, {72, 16}, {40, 16}, d, kn, false, true, padding, offset});
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

/// gemm() copies what is not aligned where the product is large; whatever it does, the result is
/// the product's.
TEST(Gemm, StagesWhatIsNotAligned) {
  METAL_LORA_NEEDS_GPU();
  for (DType d : {DType::bf16, DType::f16, DType::f32}) {
    for (bool kn : {false, true}) {
      for (bool out_f32 : {false, true}) {
        check({131, {129, 201}, {135, 16}, d, kn, out_f32, true, 0, 0, false, true});
        check({128, {136}, {131}, d, kn, out_f32, false, 5, 3, false, true});
        check({130, {133}, {2056}, d, kn, out_f32, true, 0, 0, false, true});
        check({130, {128, 130, 144}, {128, 8}, d, kn, out_f32, true, 0, 0, false, true});
        check({20, {133}, {64}, d, kn, out_f32, true, 0, 0, false, true});
        if (HasFatalFailure()) return;
      }
    }
  }
}

/// A row's bits do not depend on how many rows there are, nor on the tile that m chooses.
TEST(GemmGeneric, ARowDoesNotDependOnItsNeighbours) {
  METAL_LORA_NEEDS_GPU();
  const uint32_t m = 300, n = 264, k = 520;
  for (DType d : {DType::bf16, DType::f32}) {
    std::mt19937 rng(1);
    TestDevice device;
    const Array x = random_array(rng, d, m * k), w = random_array(rng, d, n * k);
    const DeviceBuffer dx(x.bytes), dw(w.bytes);
    std::vector<unsigned char> all;
    for (uint32_t rows : {m, 1u, 64u, 129u}) {
      DeviceBuffer y(size_t{rows} * n * (d == DType::f32 ? 4 : 2));
      cuda::GemmGroup group;
      group.m = rows;
      group.dtype = group.out_dtype = d;
      group.problems = 1;
      group.problem[0].n = n;
      group.problem[0].pairs = 1;
      group.problem[0].pair[0] = {dx.get(), k, dw.get(), k, k};
      group.problem[0].out = y.get();
      group.problem[0].out_stride = n;
      cuda::Context context = device.context();
      context.multiprocessors = 1;
      cuda::gemm_generic(context, group);
      device.finish();
      const auto got = y.download<unsigned char>();
      if (all.empty()) all = got;
      EXPECT_TRUE(std::equal(got.begin(), got.end(), all.begin())) << rows << " rows";
    }
  }
}

}  // namespace
}  // namespace metal_lora::test
