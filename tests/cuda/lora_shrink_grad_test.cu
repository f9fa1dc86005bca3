// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// v = s·dy·B and dB = dyᵀ·u in one read of dy, against f64. Tolerances as in lora_shrink_test.cu: a
// tensor core's bias of 2⁻²² of the running sum, at most 4·√Σ terms², for each sixteen of the inner
// dimension and for each part that joins; v is rounded once to its type.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cuda/lora_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::cuda {
namespace {

using test::Array;
using test::DeviceBuffer;
using test::random_array;

/// dy's columns of all linears lie side by side in one matrix, as q's, k's and v's do; so do u's.
struct Case {
  uint32_t m;
  DType dtype;
  struct Linear {
    uint32_t n, rank;
  };
  std::vector<Linear> linears;
  uint32_t dy_padding = 0;
};

uint32_t padded(uint32_t rank) {
  return (rank + 7) / 8 * 8;
}

/// Columns rank … padded - 1 of each linear's are zeros, as they are of a packed adapter.
void clear_padding(Array& a, size_t stride, size_t first, uint32_t rank) {
  for (size_t row = 0; row * stride < a.values.size(); ++row) {
    for (size_t c = first + rank; c < first + padded(rank); ++c) {
      a.values[row * stride + c] = 0.0;
      std::memset(a.bytes.data() + (row * stride + c) * 2, 0, 2);
    }
  }
}

class CudaLoraShrinkGrad : public testing::Test {
 protected:
  void check(const Case& c);
  std::mt19937 rng_{11};
};

void CudaLoraShrinkGrad::check(const Case& c) {
  SCOPED_TRACE(testing::Message() << "m " << c.m << " " << test::name_of(c.dtype) << ", "
                                  << c.linears.size() << " linears, n " << c.linears[0].n
                                  << " rank " << c.linears[0].rank);
  test::TestDevice device;
  size_t dy_stride = c.dy_padding, u_stride = 0;
  for (const auto& l : c.linears) dy_stride += l.n, u_stride += padded(l.rank);
  const Array dy = random_array(rng_, c.dtype, c.m * dy_stride);
  Array u = random_array(rng_, c.dtype, c.m * u_stride);
  std::vector<Array> b;
  size_t dy_column = 0, u_column = 0;
  for (const auto& l : c.linears) {
    clear_padding(u, u_stride, u_column, l.rank);
    b.push_back(random_array(rng_, c.dtype, size_t{l.n} * padded(l.rank)));
    clear_padding(b.back(), padded(l.rank), 0, l.rank);
    u_column += padded(l.rank);
  }
  const DeviceBuffer dy_buffer(dy.bytes), u_buffer(u.bytes);
  std::vector<DeviceBuffer> b_buffers, v_buffers, grad_buffers;
  std::vector<ShrinkGrad> calls;
  constexpr size_t kGuard = 64;
  u_column = 0;
  for (size_t i = 0; i < c.linears.size(); ++i) {
    const auto& l = c.linears[i];
    b_buffers.emplace_back(b[i].bytes);
    v_buffers.emplace_back(size_t{c.m} * padded(l.rank) * 2 + kGuard);
    grad_buffers.emplace_back(size_t{l.n} * l.rank * 4 + kGuard);
    ShrinkGrad call;
    call.dy = dy_buffer.get<char>() + dy_column * 2;
    call.dy_stride = dy_stride;
    call.n = l.n;
    call.rank = l.rank;
    call.padded_rank = padded(l.rank);
    call.factor = 0.5f + static_cast<float>(i);
    call.b = b_buffers.back().get();
    call.u = u_buffer.get<char>() + u_column * 2;
    call.u_stride = u_stride;
    call.v = v_buffers.back().get();
    call.grad_b = grad_buffers.back().get<float>();
    calls.push_back(call);
    dy_column += l.n;
    u_column += padded(l.rank);
  }
  if (!can_shrink_grad(device.context(), c.m, c.dtype, calls)) {
    ASSERT_NE(device.context().capability, 90) << "a case that it should take";
    GTEST_SKIP() << "the form is Hopper's";
  }
  std::vector<std::vector<unsigned char>> bytes[2];
  for (int run = 0; run < 2; ++run) {
    for (auto* buffers : {&v_buffers, &grad_buffers}) {
      for (auto& buffer : *buffers) buffer.poison();
    }
    lora_shrink_grad(device.context(), c.m, c.dtype, calls);
    device.finish();
    for (auto* buffers : {&v_buffers, &grad_buffers}) {
      for (auto& buffer : *buffers) bytes[run].push_back(buffer.download<unsigned char>());
    }
  }
  EXPECT_EQ(bytes[0], bytes[1]) << "not repeatable";
  for (const auto& each : bytes[0]) {
    for (size_t i = each.size() - kGuard; i < each.size(); ++i) {
      ASSERT_EQ(each[i], 0xff) << "written past the end";
    }
  }
  const double v_factor = 0x1p-22 * 4;
  dy_column = u_column = 0;
  for (size_t i = 0; i < c.linears.size(); ++i) {
    const auto& l = c.linears[i];
    const uint32_t width = padded(l.rank);
    int wrong = 0;
    const auto* v = bytes[0][i].data();
    const uint32_t row_step = c.m <= 40 ? 1 : c.m / 37;
    for (uint32_t t = 0; t < c.m; t = t + row_step < c.m || t + 1 == c.m ? t + row_step : c.m - 1) {
      for (uint32_t r = 0; r < width; ++r) {
        double sum = 0, squares = 0;
        for (uint32_t n = 0; n < l.n; ++n) {
          const double term =
              dy.values[t * dy_stride + dy_column + n] * b[i].values[size_t{n} * width + r];
          sum += term, squares += term * term;
        }
        sum *= calls[i].factor;
        const double tolerance =
            calls[i].factor * std::sqrt(squares) * v_factor * (l.n / 16 + 32) +
            std::fabs(sum) * test::roundoff(c.dtype);
        const double got = test::stored_value(v, c.dtype, t * size_t{width} + r);
        if (!(std::fabs(got - sum) <= tolerance) && ++wrong < 5) {
          ADD_FAILURE() << "v of linear " << i << " token " << t << " rank " << r << ": " << got
                        << " but " << sum << " ± " << tolerance;
        }
      }
    }
    const auto* grad =
        reinterpret_cast<const float*>(bytes[0][c.linears.size() + i].data());
    for (uint32_t n = 0; n < l.n; n += n + 13 < l.n && l.n > 300 ? 13 : 1) {
      for (uint32_t r = 0; r < l.rank; ++r) {
        double sum = 0, squares = 0;
        for (uint32_t t = 0; t < c.m; ++t) {
          const double term =
              dy.values[t * dy_stride + dy_column + n] * u.values[t * u_stride + u_column + r];
          sum += term, squares += term * term;
        }
        const double tolerance =
            std::sqrt(squares) * v_factor * (c.m / 16 + 32) + std::fabs(sum) * 0x1p-23;
        const double got = grad[size_t{n} * l.rank + r];
        if (!(std::fabs(got - sum) <= tolerance) && ++wrong < 10) {
          ADD_FAILURE() << "dB of linear " << i << " column " << n << " rank " << r << ": " << got
                        << " but " << sum << " ± " << tolerance;
        }
      }
    }
    EXPECT_EQ(wrong, 0);
    dy_column += l.n;
    u_column += width;
  }
}

TEST_F(CudaLoraShrinkGrad, MatchesF64AndRepeats) {
  METAL_LORA_NEEDS_GPU();
  check({1, DType::bf16, {{64, 1}}});
  check({31, DType::bf16, {{128, 3}}, 8});
  check({200, DType::f16, {{576, 16}}});
  check({333, DType::bf16, {{1024, 8}, {1088, 8}}});
  check({512, DType::bf16, {{2048, 16}, {512, 16}, {512, 16}}});
  check({160, DType::f16, {{640, 20}, {64, 7}, {256, 32}}, 64});
  check({97, DType::bf16, {{704, 64}, {320, 33}}});
  check({260, DType::f16, {{64, 4}, {64, 5}, {64, 6}, {64, 64}}});
  check({2048, DType::bf16, {{1024, 16}, {1024, 16}}});
}

TEST_F(CudaLoraShrinkGrad, RefusesWhatItCannotTake) {
  METAL_LORA_NEEDS_GPU();
  test::TestDevice device;
  const DeviceBuffer buffer(1 << 16);
  ShrinkGrad call{buffer.get(), 64, 64, 8, 8, 1.0f, buffer.get(), buffer.get(), 8, buffer.get(),
                  buffer.get<float>()};
  const auto takes = [&](DType dtype, const ShrinkGrad& each) {
    return can_shrink_grad(device.context(), 16, dtype, std::span(&each, 1));
  };
  EXPECT_EQ(takes(DType::bf16, call), device.context().capability == 90);
  EXPECT_FALSE(takes(DType::f32, call));
  ShrinkGrad odd = call;
  odd.n = 72;
  EXPECT_FALSE(takes(DType::bf16, odd));
  odd = call;
  odd.padded_rank = odd.rank = 72;
  EXPECT_FALSE(takes(DType::bf16, odd));
  odd = call;
  odd.dy_stride = 68;
  EXPECT_FALSE(takes(DType::bf16, odd));
  EXPECT_THROW(
      lora_shrink_grad(device.context(), 16, DType::bf16, std::span(&odd, 1)),
      std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora::cuda
