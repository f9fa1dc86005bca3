// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/transformer_kernels.h"
#include "tests/kernels/transformer_reference.h"

namespace metal_lora::cpu::transformer_test {
namespace {

constexpr double kU = 0x1p-24;

class Norm : public EachIsa {};
METAL_LORA_EACH_ISA(Norm);

// Bounds: a mean of d squares is off by (d + 2) u relatively, its inverse root by half of that and
// 3 u; the products add 3 u; storing costs the dtype's roundoff.
void check_forward(NormParams p, uint32_t seed, bool with_residual) {
  const size_t n = size_t{p.rows} * p.dims;
  const Buffer x(p.dtype, random_floats(n, seed)), add(p.dtype, random_floats(n, seed + 1));
  const Buffer w(p.weight_dtype, random_floats(p.dims, seed + 2));
  Buffer h(p.dtype, n), y(p.dtype, n);
  add_rms_norm_forward(
      p,
      x.data(),
      with_residual ? add.data() : nullptr,
      w.data(),
      with_residual ? h.data() : nullptr,
      y.data());
  const auto xs = x.values(), adds = add.values(), ws = w.values();
  const double u = unit_roundoff(p.dtype);
  const auto hs = with_residual ? h.values() : xs;
  std::vector<double> sum(n), sum_bound(n), want(n), bound(n);
  for (size_t r = 0; r < p.rows; ++r) {
    double squares = 0;
    for (size_t i = r * p.dims; i < (r + 1) * p.dims; ++i) {
      sum[i] = with_residual ? xs[i] + adds[i] : xs[i];
      sum_bound[i] = (u + kU) * std::fabs(sum[i]) + smallest_step(p.dtype);
      squares += hs[i] * hs[i];  // the norm is that of h as stored
    }
    const double inverse = 1 / std::sqrt(squares / p.dims + p.eps);
    for (size_t i = 0; i < p.dims; ++i) {
      want[r * p.dims + i] = hs[r * p.dims + i] * inverse * ws[i];
      bound[r * p.dims + i] =
          (u + (0.5 * (p.dims + 2) + 6) * kU) * std::fabs(want[r * p.dims + i]) +
          smallest_step(p.dtype);
    }
  }
  const std::string what =
      "dims " + std::to_string(p.dims) + " dtype " + std::to_string(static_cast<int>(p.dtype));
  if (with_residual) expect_within(hs, sum, sum_bound, what + " h");
  expect_within(y.values(), want, bound, what + " y");
}

TEST_P(Norm, ForwardMatchesF64) {
  uint32_t seed = 1;
  for (const uint32_t dims : {1u, 31u, 33u, 576u, 4097u}) {
    for (const uint32_t rows : {0u, 1u, 33u}) {
      for (const DType dtype : kDTypes) {
        for (const DType weight : kDTypes) {
          const NormParams p = {.rows = rows, .dims = dims, .dtype = dtype, .weight_dtype = weight};
          seed += 5;
          check_forward(p, seed, seed % 2 == 0);
        }
      }
    }
  }
}

struct NormGradient {
  std::vector<double> dx, dx_bound, dw, dw_bound;
};

NormGradient reference_backward(
    const NormParams& p,
    const std::vector<double>& h,
    const std::vector<double>& w,
    const std::vector<double>& dy,
    const std::vector<double>& dh) {
  NormGradient g;
  g.dx.resize(h.size()), g.dx_bound.resize(h.size()), g.dw.resize(p.dims),
      g.dw_bound.resize(p.dims);
  const double d = p.dims, rel = (d + 12) * kU, u = unit_roundoff(p.dtype);
  for (size_t r = 0; r < p.rows; ++r) {
    const size_t row = r * p.dims;
    double squares = 0, dot = 0, dot_abs = 0;
    for (size_t i = 0; i < p.dims; ++i) {
      const double term = h[row + i] * w[i] * dy[row + i];
      squares += h[row + i] * h[row + i], dot += term, dot_abs += std::fabs(term);
    }
    const double inverse = 1 / std::sqrt(squares / d + p.eps), square = inverse * inverse;
    for (size_t i = 0; i < p.dims; ++i) {
      const double a = w[i] * dy[row + i], b = h[row + i] * square * dot / d;
      const double b_abs = std::fabs(h[row + i]) * square * dot_abs / d,
                   extra = dh.empty() ? 0 : dh[row + i];
      const double x = inverse * (a - b) + extra;
      g.dx[row + i] = x;
      g.dx_bound[row + i] = 2 * rel * inverse * (std::fabs(a) + b_abs) +
                            (u + 2 * kU) * std::fabs(x) + kU * std::fabs(extra) +
                            smallest_step(p.dtype);
      g.dw[i] += dy[row + i] * h[row + i] * inverse;
      g.dw_bound[i] += (rel + p.rows * kU) * std::fabs(dy[row + i] * h[row + i]) * inverse;
    }
  }
  return g;
}

TEST_P(Norm, BackwardMatchesF64) {
  uint32_t seed = 1;
  for (const uint32_t dims : {1u, 31u, 33u, 576u, 4097u}) {
    for (const uint32_t rows : {0u, 1u, 67u}) {
      for (const DType dtype : kDTypes) {
        const NormParams p = {
            .rows = rows, .dims = dims, .dtype = dtype, .weight_dtype = DType::f32};
        const size_t n = size_t{rows} * dims;
        const bool with_dh = ++seed % 2 == 0;
        const Buffer h(dtype, random_floats(n, seed)), dy(dtype, random_floats(n, seed + 1));
        const Buffer dh(dtype, random_floats(n, seed + 2)),
            w(DType::f32, random_floats(dims, seed + 3));
        Buffer dx(dtype, n), one(dtype, n);
        std::vector<float> dw(dims, 7), dw_one(dims, 7);
        const void* maybe_dh = with_dh ? dh.data() : nullptr;
        set_thread_count(3);
        add_rms_norm_backward(p, h.data(), w.data(), dy.data(), maybe_dh, dx.data(), dw.data());
        set_thread_count(1);
        add_rms_norm_backward(
            p, h.data(), w.data(), dy.data(), maybe_dh, one.data(), dw_one.data());
        EXPECT_TRUE(dx == one);
        EXPECT_EQ(dw, dw_one) << "dweight must not depend on the threads";
        const auto want = reference_backward(
            p, h.values(), w.values(), dy.values(), with_dh ? dh.values() : std::vector<double>{});
        expect_within(dx.values(), want.dx, want.dx_bound, "dx " + std::to_string(dims));
        expect_within({dw.begin(), dw.end()}, want.dw, want.dw_bound, "dw " + std::to_string(dims));
      }
    }
  }
}

// Central differences of the formula in f64; step 1e-5: error ~ step² and 1e-16/step.
TEST(NormReference, GradientMatchesCentralDifferences) {
  const NormParams p = {.rows = 1, .dims = 9, .eps = 1e-5f};
  const auto values = [](uint32_t seed) {
    const auto f = random_floats(9, seed);
    return std::vector<double>(f.begin(), f.end());
  };
  const auto h = values(1), w = values(2), dy = values(3);
  const auto loss = [&](const std::vector<double>& x) {
    double squares = 0, sum = 0;
    for (const double v : x) squares += v * v;
    for (size_t i = 0; i < 9; ++i) sum += dy[i] * w[i] * x[i] / std::sqrt(squares / 9 + p.eps);
    return sum;
  };
  const auto g = reference_backward(p, h, w, dy, {});
  for (size_t i = 0; i < 9; ++i) {
    auto up = h, down = h;
    up[i] += 1e-5, down[i] -= 1e-5;
    EXPECT_NEAR((loss(up) - loss(down)) / 2e-5, g.dx[i], 1e-7);
  }
}

// The row form is the same code: same bits as the kernel on the same f32 row.
TEST_P(Norm, RowFormMatches) {
  const NormParams p = {.rows = 1, .dims = 577};
  const auto x = random_floats(577, 1), w = random_floats(577, 2);
  std::vector<float> a(577), b(577);
  add_rms_norm_forward(p, x.data(), nullptr, w.data(), nullptr, a.data());
  rms_norm_row(577, p.eps, x.data(), DType::f32, w.data(), DType::f32, b.data());
  EXPECT_EQ(a, b);
}

}  // namespace
}  // namespace metal_lora::cpu::transformer_test
