// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_grad against f64. Tolerances as in lora_shrink_test.cu, with the tokens as the inner
// dimension. A f32 `small` goes through the tensor cores as two bf16, which leaves 2⁻¹⁷ of each
// term; those errors are random, so that the sum has about 2⁻¹⁷·T of them, T = √Σ terms².
#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>

#include "kernels/cuda/lora_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::cuda {
namespace {

using test::Array;
using test::DeviceBuffer;
using test::random_array;

/// One product of a call. `shares`: takes the large of an earlier product.
struct Product {
  uint32_t rank, columns;
  DType small_dtype = DType::f32;
  bool transposed = false;
  float dropout = 0.0f;
  int shares = -1;
  uint32_t small_padding = 0, large_padding = 0;
  double small_size = 1.0;
  uint32_t grad_offset = 0;  ///< of the result, in floats
};

bool keeps(uint64_t seed, uint32_t token, uint32_t column, float dropout) {
  const auto mix = [](uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  };
  const uint64_t key = mix(mix(seed + 0x9e3779b97f4a7c15ull) + token);
  uint32_t h = column * 0x9e3779b9u + static_cast<uint32_t>(key);
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ static_cast<uint32_t>(key >> 32)) ^ (h >> 13)) * 0xc2b2ae35u;
  h ^= h >> 16;
  return h >= static_cast<uint32_t>(std::min(4294967295.0, double{dropout} * 4294967296.0));
}

class LoraGrad : public testing::Test {
 protected:
  struct Held {
    Array small, large;
    DeviceBuffer small_buffer, large_buffer, grad;
  };
  void check(uint32_t m, DType large_dtype, const std::vector<Product>& products);
  void compare(
      uint32_t m,
      DType large_dtype,
      const Product& p,
      const AdapterGrad& grad,
      const Array& small,
      const Array& large,
      const std::vector<float>& got);
  std::mt19937 rng_{6};
};

void LoraGrad::compare(
    uint32_t m,
    DType large_dtype,
    const Product& p,
    const AdapterGrad& grad,
    const Array& small,
    const Array& large,
    const std::vector<float>& got) {
  const bool exact =
      large_dtype == DType::f32 || (p.small_dtype != DType::f32 && p.small_dtype != large_dtype);
  const double sum_error =
      exact ? (8 * std::sqrt(double(m)) + 64) * 0x1p-24 : 4 * (m / 16 * 3 + 32) * 0x1p-22;
  const double operand = !exact && p.small_dtype == DType::f32 ? 4 * 0x1p-17 : 0.0;
  const double factor = grad.factor * (p.dropout > 0 ? 1 / (1 - double{p.dropout}) : 1);
  int wrong = 0;
  for (uint32_t c = 0; c<p.columns; c += p.columns> 300 && c + 7 < p.columns ? 7 : 1) {
    for (uint32_t r = 0; r < p.rank; ++r) {
      double sum = 0, squares = 0;
      for (uint32_t t = 0; t < m; ++t) {
        if (p.dropout > 0 && !keeps(grad.dropout_seed, t, c, p.dropout)) continue;
        const double term =
            small.values[t * grad.small_stride + r] * large.values[t * grad.large_stride + c];
        sum += term;
        squares += term * term;
      }
      const double tolerance = std::fabs(factor) * (std::sqrt(squares) * (sum_error + operand) +
                                                    std::fabs(sum) * 0x1p-22);
      const double value = got[p.transposed ? size_t{c} * p.rank + r : size_t{r} * p.columns + c];
      if (!(std::fabs(value - factor * sum) <= tolerance) && ++wrong < 5) {
        ADD_FAILURE() << "rank " << r << " column " << c << ": " << value << " but " << factor * sum
                      << " ± " << tolerance;
      }
    }
  }
  EXPECT_EQ(wrong, 0);
}

void LoraGrad::check(uint32_t m, DType large_dtype, const std::vector<Product>& products) {
  test::TestDevice device;
  constexpr size_t kGuard = 16;
  std::vector<Held> held;
  std::vector<AdapterGrad> grads;
  for (size_t i = 0; i < products.size(); ++i) {
    const Product& p = products[i];
    const size_t small_stride = p.rank + p.small_padding;
    const size_t large_stride = p.columns + p.large_padding;
    Array small = random_array(rng_, p.small_dtype, m * small_stride, p.small_size);
    Array large = random_array(rng_, large_dtype, p.shares >= 0 ? 0 : m * large_stride);
    DeviceBuffer small_buffer(small.bytes), large_buffer(large.bytes);
    held.push_back(
        {std::move(small),
         std::move(large),
         std::move(small_buffer),
         std::move(large_buffer),
         DeviceBuffer((p.grad_offset + size_t{p.rank} * p.columns + kGuard) * 4)});
    AdapterGrad grad;
    grad.small = held[i].small_buffer.get();
    grad.small_stride = small_stride;
    grad.small_dtype = p.small_dtype;
    grad.rank = p.rank;
    grad.large = held[p.shares >= 0 ? p.shares : i].large_buffer.get();
    grad.large_stride = large_stride;
    grad.columns = p.columns;
    grad.factor = 0.5f + static_cast<float>(i);
    grad.dropout = p.dropout;
    grad.dropout_seed = 31 + i;
    grad.grad = held[i].grad.get<float>() + p.grad_offset;
    grad.transposed = p.transposed;
    grads.push_back(grad);
  }
  std::vector<std::vector<float>> first;
  for (int run = 0; run < 2; ++run) {
    for (Held& h : held) h.grad.poison();
    lora_grad(device.context(), m, large_dtype, grads.data(), grads.size());
    device.finish();
    for (size_t i = 0; i < held.size(); ++i) {
      auto got = held[i].grad.download<float>();
      got.erase(got.begin(), got.begin() + products[i].grad_offset);
      if (run == 0) {
        first.push_back(got);
        continue;
      }
      EXPECT_EQ(0, std::memcmp(got.data(), first[i].data(), got.size() * 4)) << "not repeatable";
    }
  }
  for (size_t i = 0; i < products.size(); ++i) {
    const Product& p = products[i];
    SCOPED_TRACE(
        "m " + std::to_string(m) + " large " + test::name_of(large_dtype) + " product " +
        std::to_string(i) + ": rank " + std::to_string(p.rank) + " columns " +
        std::to_string(p.columns) + " small " + test::name_of(p.small_dtype));
    const size_t count = size_t{p.rank} * p.columns;
    for (size_t j = count; j < count + kGuard; ++j) ASSERT_TRUE(std::isnan(first[i][j]));
    compare(
        m,
        large_dtype,
        p,
        grads[i],
        held[i].small,
        held[p.shares >= 0 ? p.shares : i].large,
        first[i]);
  }
}

constexpr DType kDTypes[] = {DType::bf16, DType::f16, DType::f32};

TEST_F(LoraGrad, TakesAnyShape) {
  METAL_LORA_NEEDS_GPU();
  for (DType large : kDTypes) {
    for (DType small : {DType::f32, large}) {
      for (uint32_t m : {1u, 31u, 33u, 200u}) {
        for (bool transposed : {false, true}) {
          check(m, large, {{16, 136, small, transposed}});
          check(m, large, {{3, 31, small, transposed}});
        }
      }
      for (uint32_t rank : {1u, 8u, 48u, 64u, 100u}) check(70, large, {{rank, 129, small}});
      check(1000, large, {{8, 576, small, true}, {8, 8, small}});
      check(1000, large, {{16, 4097, small}});
      check(1100, large, {{16, 264, small}, {16, 136, small, true}});
    }
  }
}

TEST_F(LoraGrad, ReadsASharedInputOnce) {
  METAL_LORA_NEEDS_GPU();
  for (DType small : {DType::f32, DType::bf16}) {
    check(
        300,
        DType::bf16,
        {{16, 264, small},
         {16, 264, small, false, 0.0f, 0},
         {3, 264, small, false, 0.0f, 0},
         {16, 520, small, true},
         {16, 136, small, true},
         {40, 264, small, false, 0.0f, 0},
         {5, 264, small, true, 0.0f, 0}});
  }
}

/// More tiles than multiprocessors, boxes of all widths, results at odd addresses.
TEST_F(LoraGrad, FewTokensOfManyColumns) {
  METAL_LORA_NEEDS_GPU();
  for (DType d : {DType::bf16, DType::f16}) {
    for (uint32_t rank : {16u, 24u, 64u}) {
      check(130, d, {{rank, 8528, d, true}, {8, 200, d}, {rank, 136, d, true}});
    }
    check(1000, d, {{64, 8528, d}, {16, 8, d}});
    Product odd{16, 136, d, true};
    odd.grad_offset = 1;
    check(70, d, {odd});
  }
}

TEST_F(LoraGrad, TakesSixteenProductsOfSeveralKinds) {
  METAL_LORA_NEEDS_GPU();
  std::vector<Product> products;
  for (uint32_t i = 0; i < 16; ++i) {
    products.push_back(
        {1 + i * 5,
         40 + i * 24,
         i % 3 == 0   ? DType::bf16
         : i % 3 == 1 ? DType::f32
                      : DType::f16,
         i % 2 == 0,
         i % 5 == 4 ? 0.25f : 0.0f});
  }
  check(100, DType::bf16, products);
}

TEST_F(LoraGrad, DropsTheSameElementsAsTheCpu) {
  METAL_LORA_NEEDS_GPU();
  for (DType large : kDTypes) {
    check(130, large, {{16, 200, DType::f32, false, 0.3f}, {8, 200, large, true, 0.6f}});
    check(65, large, {{100, 65, DType::f32, false, 0.1f}});
  }
}

TEST_F(LoraGrad, KeepsSmallNumbersBesideF16) {
  METAL_LORA_NEEDS_GPU();
  // v of a late step may be far below f16's range: it never becomes f16.
  Product tiny{16, 72};
  tiny.small_size = 1e-9;
  check(100, DType::f16, {tiny});
  tiny.small_size = 1e9;
  check(100, DType::f16, {tiny});
}

TEST_F(LoraGrad, TakesStrides) {
  METAL_LORA_NEEDS_GPU();
  for (DType small : {DType::f32, DType::bf16}) {
    Product p{16, 200, small};
    p.small_padding = 32;
    p.large_padding = 56;
    check(90, DType::bf16, {p});
    p.small_padding = 3;
    p.large_padding = 1;
    p.transposed = true;
    check(90, DType::bf16, {p});
    p.rank = 5;  // padded storage, as the training step keeps it
    check(90, DType::bf16, {p});
  }
}

TEST_F(LoraGrad, SumsNoTokensToZero) {
  METAL_LORA_NEEDS_GPU();
  for (DType large : kDTypes) check(0, large, {{8, 40}, {3, 7, DType::f32, true}});
  check(10, DType::bf16, {{0, 40}, {8, 0}, {8, 24}});
}

}  // namespace
}  // namespace metal_lora::cuda
