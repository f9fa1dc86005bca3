// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The product from 4-bit codes against the definition in f64, in every form. Errors of a value,
// with e the roundoff of x's type: a weight is rounded to it: e·|w|, and of int4 f32 arithmetic
// beforehand: 2^-16·|scale|; a sum of k terms: (k + 8)·2^-23 of Σ|products|; the result is rounded
// once.
#include <gtest/gtest.h>

#include "kernels/cuda/gemm_quant.h"
#include "kernels/cuda/gemm_quant_args.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

struct QuantCase {
  uint32_t m, n, k, rank;
  DType dtype;
  WeightFormat format;
  uint32_t group_size = 64;
  DType scales = DType::f16;
  bool double_quant = false;
  bool bias = false, residual = false;
};

std::string trace(const QuantCase& c) {
  return "m=" + std::to_string(c.m) + " n=" + std::to_string(c.n) + " k=" + std::to_string(c.k) +
         " rank=" + std::to_string(c.rank) + " " + name_of(c.dtype) + " format " +
         std::to_string(static_cast<int>(c.format)) + " group " + std::to_string(c.group_size) +
         " scales " + name_of(c.scales) + (c.double_quant ? " double" : "");
}

class Product {
 public:
  explicit Product(const QuantCase& c) : c_(c) {
    std::mt19937 rng(c.m * 7919 + c.k);
    w_ = random_weight(
        rng, c.format, c.n, c.k, c.group_size, c.scales, WeightLayout::row_major, c.double_quant);
    x_ = random_array(rng, c.dtype, size_t{c.m} * c.k);
    u_ = random_array(rng, c.dtype, size_t{c.m} * columns());
    b_ = random_array(rng, c.dtype, size_t{c.n} * columns(), 0.5);
    bias_ = random_array(rng, DType::f32, c.n);
    residual_ = random_array(rng, c.dtype, size_t{c.m} * c.n);
    for (const Array* a : {&w_.data, &w_.scales, &w_.biases, &x_, &u_, &b_, &bias_, &residual_}) {
      buffers_.push_back(std::make_unique<DeviceBuffer>(a->bytes));
    }
    y_ = std::make_unique<DeviceBuffer>(size_t{c.m} * c.n * 2);
    make_base();
    add_adapter();
  }

  cuda::QuantizedProduct product() const {
    cuda::QuantizedProduct p;
    p.m = c_.m;
    p.dtype = c_.dtype;
    p.w = {w_.params, buffers_[0]->get(), buffers_[1]->get(), buffers_[2]->get()};
    p.x = buffers_[3]->get();
    p.rank = c_.rank;
    p.u = buffers_[4]->get();
    p.b = buffers_[5]->get();
    p.u_stride = p.b_stride = columns();
    p.bias = c_.bias ? buffers_[6]->get<float>() : nullptr;
    p.residual = c_.residual ? buffers_[7]->get() : nullptr;
    p.y = y_->get();
    return p;
  }
  const cuda::Context& context() const { return device_.context(); }

  std::vector<uint16_t> run(const cuda::quant::Form& form) {
    y_->poison();
    cuda::quant::gemm_with_form(device_.context(), product(), form);
    device_.finish();
    return y_->download<uint16_t>();
  }
  void check(const std::vector<uint16_t>& y) const {
    for (size_t i = 0; i < want_.size(); ++i) {
      const double want = want_[i], error = error_[i];
      const double bound = error + (std::fabs(want) + error) * roundoff(c_.dtype);
      ASSERT_NEAR(stored_value(y.data(), c_.dtype, i), want, bound + 0x1p-24) << "y " << i;
    }
  }

 private:
  uint32_t columns() const { return (c_.rank + 7) / 8 * 8; }
  double sum_e() const { return (c_.k + c_.rank + 8) * 0x1p-23; }
  void make_base() {
    const double e = roundoff(c_.dtype), sum = sum_e();
    const double tiny = c_.dtype == DType::f16 ? 0x1p-25 : 0.0;  // weights may be subnormal
    const bool int4 = c_.format == WeightFormat::int4;
    for (size_t i = 0; i < c_.m; ++i) {
      for (size_t j = 0; j < c_.n; ++j) {
        double value = 0.0, error = 0.0;
        for (size_t p = 0; p < c_.k; ++p) {
          const double w = w_.values[j * c_.k + p], x = x_.values[i * c_.k + p];
          const double scale = int4 ? w_.scales.values[(j * c_.k + p) / c_.group_size] : 0.0;
          value += w * x;
          error += std::fabs(x) * (std::fabs(w) * (e + sum) + std::fabs(scale) * 0x1p-16 + tiny);
        }
        const double extra = (c_.bias ? bias_.values[j] : 0.0) +
                             (c_.residual ? residual_.values[i * c_.n + j] : 0.0);
        want_.push_back(value + extra);
        error_.push_back(error + std::fabs(extra) * 0x1p-22);
      }
    }
  }
  void add_adapter() {
    for (size_t i = 0; i < c_.m; ++i) {
      for (size_t j = 0; j < c_.n; ++j) {
        for (size_t p = 0; p < c_.rank; ++p) {
          const double term = u_.values[i * columns() + p] * b_.values[j * columns() + p];
          want_[i * c_.n + j] += term;
          error_[i * c_.n + j] += std::fabs(term) * sum_e();
        }
      }
    }
  }

  const QuantCase c_;
  TestDevice device_;
  Weight w_;
  Array x_, u_, b_, bias_, residual_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
  std::unique_ptr<DeviceBuffer> y_;
  std::vector<double> want_, error_;
};

TEST(CudaGemmQuant, EveryFormMatchesF64AndRepeats) {
  METAL_LORA_NEEDS_GPU();
  using enum WeightFormat;
  using D = DType;
  for (const QuantCase& c :
       {QuantCase{17, 128, 64, 16, D::bf16, int4},
        QuantCase{70, 200, 576, 8, D::bf16, int4, 64, D::bf16, false, true, true},
        QuantCase{33, 264, 1088, 72, D::f16, int4, 64, D::f32, false, true},
        QuantCase{150, 136, 1152, 5, D::bf16, int4, 128, D::f16, false, false, true},
        QuantCase{40, 72, 2048, 0, D::bf16, nf4},
        QuantCase{270, 136, 320, 64, D::bf16, nf4, 64, D::f32, false, true, true},
        QuantCase{64, 392, 1024, 16, D::f16, nf4, 64, D::f32, true}}) {
    SCOPED_TRACE(trace(c));
    Product product(c);
    if (product.context().capability != 90) GTEST_SKIP() << "the form is Hopper's";
    ASSERT_TRUE(cuda::can_gemm_quantized(product.context(), product.product()));
    for (uint32_t tokens : {32u, 64u, 128u, 256u}) {
      for (uint32_t splits : {1u, 2u, 3u, 8u}) {
        const cuda::quant::Form form{tokens, splits};
        if (!cuda::quant::form_fits(product.product(), form)) continue;
        SCOPED_TRACE("tokens " + std::to_string(tokens) + " splits " + std::to_string(splits));
        const auto y = product.run(form);
        product.check(y);
        if (testing::Test::HasFatalFailure()) return;
        ASSERT_EQ(product.run(form), y) << "not the same bits again";
      }
    }
  }
}

TEST(CudaGemmQuant, RefusesWhatItCannotTake) {
  METAL_LORA_NEEDS_GPU();
  Product product({17, 128, 128, 8, DType::bf16, WeightFormat::int4, 32});
  EXPECT_FALSE(cuda::can_gemm_quantized(product.context(), product.product()));
  EXPECT_THROW(cuda::gemm_quantized(product.context(), product.product()), std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora::test
