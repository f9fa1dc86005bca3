// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// gemm_sm90 against f64 on the host, for every form of its table, both directions, several
// problems and pairs, and shapes that fit no tile.
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/lora_skinny.h"

#include <cmath>
#include <random>

#include "kernels/cuda/device.cuh"
#include "tests/cuda/gemm_sm90_forms.h"
#include "tests/cuda/support.h"

namespace metal_lora::test {
namespace {

using cuda::bf16;
using cuda::f16;
using cuda::GemmGroup;

/// A matrix of T with a stride, its values as f64, and its copy on the device.
template <typename T>
struct Matrix {
  Matrix(std::mt19937& random, uint32_t rows, uint32_t columns, size_t stride)
      : rows(rows), columns(columns), stride(stride), host(rows * stride + 8) {
    std::normal_distribution<float> normal;
    for (T& v : host) v = T(normal(random));
    device = std::make_unique<DeviceBuffer>(host);
  }
  double at(uint32_t r, uint32_t c) const { return double(float(host[r * stride + c])); }

  uint32_t rows, columns;
  size_t stride;
  std::vector<T> host;
  std::unique_ptr<DeviceBuffer> device;
};

struct Case {
  uint32_t m;
  std::vector<uint32_t> n;  ///< of each problem
  std::vector<uint32_t> k;  ///< of each pair
  bool right_is_kn = false;
  bool out_f32 = false;
  bool terms = false;  ///< bias and residual
  bool pair0_ready = false;
};

size_t padded(uint32_t columns) {
  return (columns + 7) / 8 * 8 + 8;
}

template <typename T, typename Out>
void check_case(TestDevice& device, const Case& c, int form) {
  std::mt19937 random(c.m * 31 + c.n[0] * 7 + c.k.size());
  GemmGroup group;
  group.m = c.m;
  group.dtype = std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
  group.out_dtype = c.out_f32 ? DType::f32 : group.dtype;
  group.right_is_kn = c.right_is_kn;
  group.pair0_ready = c.pair0_ready;
  group.problems = static_cast<int>(c.n.size());
  std::vector<Matrix<T>> lefts, rights;
  std::vector<Matrix<Out>> residuals;
  std::vector<DeviceBuffer> outs, biases;
  std::vector<std::vector<float>> bias_values;
  for (uint32_t k : c.k) lefts.emplace_back(random, c.m, k, padded(k));
  for (int i = 0; i < group.problems; ++i) {
    const uint32_t n = c.n[i];
    cuda::GemmProblem& problem = group.problem[i];
    problem.n = n;
    problem.pairs = static_cast<int>(c.k.size());
    for (size_t p = 0; p < c.k.size(); ++p) {
      const uint32_t rows = c.right_is_kn ? c.k[p] : n, columns = c.right_is_kn ? n : c.k[p];
      rights.emplace_back(random, rows, columns, padded(columns));
      problem.pair[p] = {
          lefts[p].device->get(),
          lefts[p].stride,
          rights.back().device->get(),
          rights.back().stride,
          c.k[p]};
    }
    problem.out_stride = padded(n);
    outs.emplace_back(c.m * problem.out_stride * sizeof(Out));
    problem.out = outs.back().get();
    if (c.terms) {
      std::vector<float> bias(n);
      for (float& v : bias) v = std::normal_distribution<float>()(random);
      biases.emplace_back(bias);
      bias_values.push_back(bias);
      problem.bias = biases.back().template get<float>();
      residuals.emplace_back(random, c.m, n, padded(n));
      problem.residual = residuals.back().device->get();
      problem.residual_stride = residuals.back().stride;
    }
  }
  ASSERT_TRUE(cuda::can_gemm_sm90(device.context(), group));
  if (!cuda::sm90::form_fits(device.context(), group, form)) return;
  cuda::sm90::gemm_with_form(device.context(), group, form);
  device.finish();
  std::vector<std::vector<Out>> first;
  for (const DeviceBuffer& out : outs) first.push_back(out.download<Out>());
  for (DeviceBuffer& out : outs) out.poison();
  cuda::sm90::gemm_with_form(device.context(), group, form);
  device.finish();

  uint32_t k_sum = 0;
  for (uint32_t k : c.k) k_sum += k;
  // Products of standard normals: |sum| of k terms stays under 6·sqrt(k) (6 deviations) + bias and
  // residual (6 each). f32 sums err by at most k · 2^-24 of Σ|terms| <= k; the tensor core drops
  // bits below 2^-23 or so of the largest term of each slice, which k · 2^-22 covers. One rounding
  // to the output adds 2^-8 (bf16), 2^-11 (f16) or 2^-24 of the result.
  const double rounding = std::is_same_v<Out, float>  ? 0x1p-24
                          : std::is_same_v<Out, bf16> ? 0x1p-8
                                                      : 0x1p-11;
  for (int i = 0; i < group.problems; ++i) {
    const std::vector<Out> again = outs[i].download<Out>();
    ASSERT_EQ(std::memcmp(again.data(), first[i].data(), again.size() * sizeof(Out)), 0);
    const size_t stride = group.problem[i].out_stride;
    // Every column of a few rows, and every row of a few columns: tiles' edges among them.
    for (uint32_t row = 0; row < c.m; ++row) {
      const bool whole_row = row % 61 == 0 || row + 1 == c.m || row == 127 || row == 128;
      for (uint32_t column = 0; column < stride; ++column) {
        const float got = float(first[i][row * stride + column]);
        if (column >= c.n[i]) {  // the padding stays untouched: still poison
          ASSERT_TRUE(std::isnan(got)) << "row " << row << " column " << column;
          continue;
        }
        if (!whole_row && column % 59 != 0 && column + 1 != c.n[i]) {
          ASSERT_FALSE(std::isnan(got)) << "row " << row << " column " << column;
          continue;
        }
        double want = 0;
        for (size_t p = 0; p < c.k.size(); ++p) {
          const Matrix<T>& right = rights[i * c.k.size() + p];
          for (uint32_t k = 0; k < c.k[p]; ++k) {
            want +=
                lefts[p].at(row, k) * (c.right_is_kn ? right.at(k, column) : right.at(column, k));
          }
        }
        if (c.terms) want += bias_values[i][column] + residuals[i].at(row, column);
        const double bound = k_sum * 0x1p-22 * 2 + 1e-6 + std::abs(want) * rounding;
        ASSERT_NEAR(got, want, bound)
            << "form " << form << " problem " << i << " row " << row << " column " << column
            << " of " << c.m << " x " << c.n[i] << " k " << c.k[0];
      }
    }
  }
}

void check_case(TestDevice& device, const Case& c, int form, bool is_f16 = false) {
  if (is_f16) {
    c.out_f32 ? check_case<f16, float>(device, c, form) : check_case<f16, f16>(device, c, form);
  } else {
    c.out_f32 ? check_case<bf16, float>(device, c, form) : check_case<bf16, bf16>(device, c, form);
  }
}

class GemmSm90Test : public testing::Test {
 protected:
  void SetUp() override {
    METAL_LORA_NEEDS_GPU();
    device_ = std::make_unique<TestDevice>();
    if (device_->context().capability != 90) GTEST_SKIP() << "needs compute capability 9.0";
  }
  void check_all_forms(const Case& c, bool is_f16 = false) {
    for (int form = 0; form < cuda::sm90::form_count(); ++form) {
      SCOPED_TRACE(cuda::sm90::form_name(form));
      check_case(*device_, c, form, is_f16);
      if (HasFatalFailure()) return;
    }
  }
  std::unique_ptr<TestDevice> device_;
};

TEST_F(GemmSm90Test, MultipliesWholeTiles) {
  check_all_forms({.m = 256, .n = {512}, .k = {256}});
  check_all_forms({.m = 256, .n = {512}, .k = {256}, .right_is_kn = true});
}

TEST_F(GemmSm90Test, MultipliesShapesThatFitNoTile) {
  for (bool right_is_kn : {false, true}) {
    for (uint32_t m : {1u, 31u, 129u}) {
      check_all_forms({.m = m, .n = {33}, .k = {8}, .right_is_kn = right_is_kn});
      check_all_forms({.m = m, .n = {321}, .k = {97}, .right_is_kn = right_is_kn});
    }
    check_all_forms({.m = 700, .n = {1}, .k = {1000}, .right_is_kn = right_is_kn});
  }
}

TEST_F(GemmSm90Test, SumsSeveralPairsInProblemsOfDifferentWidths) {
  for (bool right_is_kn : {false, true}) {
    for (uint32_t rank : {4u, 16u, 40u, 64u}) {
      check_all_forms(
          {.m = 300, .n = {384, 72, 65}, .k = {200, rank, 1}, .right_is_kn = right_is_kn});
    }
  }
}

TEST_F(GemmSm90Test, AddsBiasAndResidualAndRoundsOnce) {
  for (bool out_f32 : {false, true}) {
    for (bool is_f16 : {false, true}) {
      check_all_forms(
          {.m = 200, .n = {335, 64}, .k = {128, 16}, .out_f32 = out_f32, .terms = true}, is_f16);
      check_all_forms(
          {.m = 130,
           .n = {264},
           .k = {72},
           .right_is_kn = true,
           .out_f32 = out_f32,
           .terms = true,
           .pair0_ready = true},
          is_f16);
    }
  }
}

TEST_F(GemmSm90Test, WritesTermsAloneWhereAllPairsAreEmpty) {
  check_all_forms({.m = 140, .n = {100}, .k = {0}, .terms = true});
}

TEST_F(GemmSm90Test, KeepsItsRingOverManyTiles) {
  check_all_forms({.m = 1100, .n = {2600, 1300}, .k = {192, 16}});
  check_all_forms({.m = 1100, .n = {2600, 1300}, .k = {192, 16}, .right_is_kn = true});
}

/// u of two adapters side by side (nk) or one (kn), then y = x·W + u·B, for one form of gemm_sm90
/// or, where skinny_parts is not 0, of lora_skinny, which keeps u to itself.
void check_shrinks(
    TestDevice& device,
    bool right_is_kn,
    bool own_flags,
    uint32_t m,
    int form,
    uint32_t skinny_parts = 0) {
  std::mt19937 random(m + right_is_kn);
  const uint32_t k = 328, n[2] = {520, 72}, rank[2] = {20, 33};
  const int problems = right_is_kn ? 1 : 2;
  Matrix<bf16> x(random, m, k, padded(k));
  std::vector<Matrix<bf16>> w, a, b;
  std::vector<DeviceBuffer> u, plain, y;
  const std::vector<uint32_t> zeros(cuda::gemm_flag_count(m));
  const DeviceBuffer flags(zeros);
  GemmGroup group;
  group.m = m;
  group.right_is_kn = right_is_kn;
  group.problems = problems;
  group.shrinks = 1;
  group.flags = own_flags ? flags.get<uint32_t>() : nullptr;
  cuda::GemmShrink& shrink = group.shrink[0];
  shrink = {x.device->get(), x.stride, k, problems, {}};
  const auto matrix = [&](std::vector<Matrix<bf16>>& to, uint32_t outputs, uint32_t inputs) {
    const uint32_t rows = right_is_kn ? inputs : outputs, columns = right_is_kn ? outputs : inputs;
    to.emplace_back(random, rows, columns, padded(columns));
  };
  for (int i = 0; i < problems; ++i) {
    matrix(w, n[i], k);
    matrix(a, rank[i], k);
    matrix(b, n[i], rank[i]);
    u.emplace_back(m * padded(rank[i]) * sizeof(bf16));
    plain.emplace_back(m * rank[i] * sizeof(float));
    y.emplace_back(m * padded(n[i]) * sizeof(bf16));
    shrink.part[i] = {
        a[i].device->get(),
        a[i].stride,
        rank[i],
        0.25f,
        u[i].get(),
        padded(rank[i]),
        plain[i].get<float>()};
    cuda::GemmProblem& problem = group.problem[i];
    problem.n = n[i];
    problem.pairs = 2;
    problem.pair[0] = {x.device->get(), x.stride, w[i].device->get(), w[i].stride, k};
    problem.pair[1] = {u[i].get(), padded(rank[i]), b[i].device->get(), b[i].stride, rank[i]};
    problem.out = y[i].get();
    problem.out_stride = padded(n[i]);
  }
  ASSERT_TRUE(cuda::can_gemm_sm90(device.context(), group));
  if (skinny_parts > 0) {
    ASSERT_TRUE(cuda::can_lora_skinny(device.context(), group));
  } else if (!cuda::sm90::form_fits(device.context(), group, form)) {
    return;
  }
  for (int round = 0; round < 2; ++round) {
    for (auto* buffers : {&u, &plain, &y}) {
      for (DeviceBuffer& buffer : *buffers) buffer.poison();
    }
    if (skinny_parts > 0) {
      cuda::sm90::skinny_with_parts(device.context(), group, skinny_parts);
    } else {
      cuda::sm90::gemm_with_form(device.context(), group, form);
    }
    device.finish();
  }
  EXPECT_EQ(flags.download<uint32_t>(), zeros);
  const auto at = [&](const Matrix<bf16>& right, uint32_t output, uint32_t input) {
    return right_is_kn ? right.at(input, output) : right.at(output, input);
  };
  for (int i = 0; i < problems; ++i) {
    std::vector<bf16> got_u = u[i].download<bf16>();
    const std::vector<bf16> got_y = y[i].download<bf16>();
    const std::vector<float> got_plain = plain[i].download<float>();
    for (uint32_t j = 0; skinny_parts > 0 && j < m * rank[i]; ++j) {
      got_u[j / rank[i] * padded(rank[i]) + j % rank[i]] = bf16(got_plain[j] / 4);
    }
    for (uint32_t row = 0; row < m; ++row) {
      for (uint32_t r = 0; r < rank[i]; ++r) {
        double want = 0;
        for (uint32_t j = 0; j < k; ++j) want += x.at(row, j) * at(a[i], r, j);
        const double bound = k * 0x1p-21;
        ASSERT_NEAR(got_plain[row * rank[i] + r], want, bound) << row << " " << r;
        const double scaled = want / 4;
        ASSERT_NEAR(
            float(got_u[row * padded(rank[i]) + r]), scaled, bound + std::abs(scaled) * 0x1p-8);
      }
      for (uint32_t column = row % 7; column < n[i]; column += 7) {
        double want = 0;
        for (uint32_t j = 0; j < k; ++j) want += x.at(row, j) * at(w[i], column, j);
        for (uint32_t r = 0; r < rank[i]; ++r) {
          want += double(float(got_u[row * padded(rank[i]) + r])) * at(b[i], column, r);
        }
        ASSERT_NEAR(
            float(got_y[row * padded(n[i]) + column]),
            want,
            2 * k * 0x1p-21 + std::abs(want) * 0x1p-8)
            << "row " << row << " column " << column;
      }
    }
  }
}

TEST_F(GemmSm90Test, MakesTheLowRankOperandInTheSameLaunch) {
  for (int form = 0; form < cuda::sm90::form_count(); ++form) {
    SCOPED_TRACE(cuda::sm90::form_name(form));
    for (bool right_is_kn : {false, true}) {
      for (uint32_t m : {70u, 400u}) {
        check_shrinks(*device_, right_is_kn, form % 2 == 0, m, form);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(GemmSm90Test, SkinnyPartsMakeBothProducts) {
  for (uint32_t parts : {1u, 2u, 3u, 4u, 8u}) {
    SCOPED_TRACE("k in " + std::to_string(parts));
    for (uint32_t m : {1u, 17u, 32u, 33u, 50u, 64u, 100u, 128u}) {
      check_shrinks(*device_, false, false, m, 0, parts);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(GemmSm90Test, IsCapturedBehindMemoryNodesAndKernels) {
  std::mt19937 random(3);
  const uint32_t m = 256, n = 512, k = 128, rank = 16;
  const Matrix<bf16> x(random, m, k, k), w(random, n, k, k), a(random, rank, k, k);
  const Matrix<bf16> b(random, n, rank, rank);
  const DeviceBuffer u(m * rank * sizeof(bf16)), out(m * n * sizeof(bf16));
  GemmGroup group;
  group.m = m;
  group.problems = 1;
  group.shrinks = 1;
  group.shrink[0] = {x.device->get(), k, k, 1, {}};
  group.shrink[0].part[0] = {a.device->get(), k, rank, 1.0f, u.get(), rank, nullptr};
  group.problem[0].n = n;
  group.problem[0].pairs = 2;
  group.problem[0].pair[0] = {x.device->get(), k, w.device->get(), k, k};
  group.problem[0].pair[1] = {u.get(), rank, b.device->get(), rank, rank};
  group.problem[0].out = out.get();
  group.problem[0].out_stride = n;
  const auto run = [&] {  // a memory node before the first, kernels before the others
    for (int i = 0; i < 3; ++i) cuda::sm90::gemm_with_form(device_->context(), group, 0);
  };
  run();
  cuda::check(cudaStreamSynchronize(device_->context().stream), "run");
  const std::vector<bf16> want = out.download<bf16>();
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  const cudaStream_t stream = device_->context().stream;
  const DeviceBuffer flags(std::vector<uint32_t>(cuda::gemm_flag_count(m)));
  group.flags = flags.get<uint32_t>();  // no scratch of this test's kind inside a capture
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  cuda::check(cudaMemsetAsync(out.get(), 0xff, out.bytes(), stream), "memset");
  run();
  cuda::check(cudaStreamEndCapture(stream, &graph), "capture");
  cuda::check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  for (int i = 0; i < 2; ++i) cuda::check(cudaGraphLaunch(exec, stream), "replay");
  device_->finish();
  const std::vector<bf16> got = out.download<bf16>();
  EXPECT_EQ(std::memcmp(got.data(), want.data(), want.size() * sizeof(bf16)), 0);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
}

TEST_F(GemmSm90Test, AddsToTheOutputInPlace) {
  std::mt19937 random(1);
  const uint32_t m = 130, n = 200, k = 64;
  Matrix<bf16> left(random, m, k, k), right(random, n, k, k), out(random, m, n, n);
  GemmGroup group;
  group.m = m;
  group.problems = 1;
  group.problem[0].n = n;
  group.problem[0].pairs = 1;
  group.problem[0].pair[0] = {left.device->get(), k, right.device->get(), k, k};
  group.problem[0].out = out.device->get();
  group.problem[0].out_stride = n;
  group.problem[0].residual = out.device->get();
  group.problem[0].residual_stride = n;
  cuda::gemm_sm90(device_->context(), group);
  device_->finish();
  const std::vector<bf16> got = out.device->download<bf16>();
  for (uint32_t row = 0; row < m; ++row) {
    for (uint32_t column = 0; column < n; ++column) {
      double want = out.at(row, column);
      for (uint32_t i = 0; i < k; ++i) want += left.at(row, i) * right.at(column, i);
      ASSERT_NEAR(float(got[row * n + column]), want, std::abs(want) * 0x1p-8 + k * 0x1p-21);
    }
  }
}

TEST_F(GemmSm90Test, RefusesWhatTheCopyEngineCannotRead) {
  GemmGroup group;
  group.m = 8;
  group.problems = 1;
  group.problem[0].n = 8;
  group.problem[0].out_stride = 9;
  EXPECT_FALSE(cuda::can_gemm_sm90(device_->context(), group));
  EXPECT_THROW(cuda::gemm_sm90(device_->context(), group), std::invalid_argument);
  group.problem[0].out_stride = 8;
  EXPECT_TRUE(cuda::can_gemm_sm90(device_->context(), group));
  group.dtype = DType::f32;
  EXPECT_FALSE(cuda::can_gemm_sm90(device_->context(), group));
}

TEST_F(GemmSm90Test, LaunchesNothingWithoutRowsOrColumns) {
  GemmGroup group;
  group.problems = 1;
  group.problem[0].n = 8;
  EXPECT_NO_THROW(cuda::gemm_sm90(device_->context(), group));
  group.m = 8;
  group.problem[0].n = 0;
  EXPECT_NO_THROW(cuda::gemm_sm90(device_->context(), group));
  device_->finish();
}

}  // namespace
}  // namespace metal_lora::test
