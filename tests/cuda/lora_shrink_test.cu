// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_shrink against f64. Tolerance of a value: let T = √Σ terms² be the size that a sum of random
// terms has. Running sums stay below 4·T. Products of 16-bit numbers are exact in f32; a tensor
// core adds 16 at a time and truncates, which is a bias: one unit of 2⁻²² of the running sum for
// each of k/16 steps and the few that join warps and blocks. FFMA rounds to nearest, so that its k
// roundings of 2⁻²⁴ grow as √k. On top comes the rounding of the result's storage type.
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

struct Case {
  uint32_t m, k;
  std::vector<uint32_t> ranks;
  DType dtype = DType::bf16;
  bool right_is_kn = false;
  float dropout = 0.0f;
  DType right_dtype = dtype;
  DType out_dtype = dtype;
  uint32_t x_padding = 0, out_padding = 0;
  uint32_t misaligned = 0;  ///< elements that x starts after an aligned address
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << "m " << c.m << " k " << c.k << " ranks";
  for (uint32_t rank : c.ranks) out << ' ' << rank;
  return out << ' ' << test::name_of(c.dtype) << (c.right_is_kn ? " kn" : "") << " dropout "
             << c.dropout << " right " << test::name_of(c.right_dtype) << " out "
             << test::name_of(c.out_dtype) << " misaligned " << c.misaligned;
}

/// The mask's definition, written again: splitmix64 keys a token, MurmurHash3's finaliser mixes the
/// column.
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

class LoraShrink : public testing::Test {
 protected:
  void check(const Case& c);
  std::mt19937 rng_{5};
};

void LoraShrink::check(const Case& c) {
  SCOPED_TRACE(testing::PrintToString(c));
  test::TestDevice device;
  const size_t x_stride = c.k + c.x_padding;
  const Array x = random_array(rng_, c.dtype, c.m * x_stride + c.misaligned);
  const DeviceBuffer x_device(x.bytes);
  const size_t size = c.dtype == DType::f32 ? 4 : 2;

  ShrinkCall call;
  call.m = c.m;
  call.k = c.k;
  call.dtype = c.dtype;
  call.right_dtype = c.right_dtype;
  call.out_dtype = c.out_dtype;
  call.right_is_kn = c.right_is_kn;
  call.x = x_device.get<char>() + c.misaligned * size;
  call.x_stride = x_stride;
  std::vector<Array> rights;
  std::vector<DeviceBuffer> right_buffers, plain_buffers;
  uint32_t columns = 0;
  for (size_t p = 0; p < c.ranks.size(); ++p) {
    const uint32_t rank = c.ranks[p];
    rights.push_back(random_array(rng_, c.right_dtype, size_t{rank} * c.k));
    right_buffers.emplace_back(rights.back().bytes);
    plain_buffers.emplace_back(size_t{c.m} * rank * 4);
    ShrinkPart& part = call.part[call.parts++];
    part.right = right_buffers.back().get();
    part.rank = rank;
    part.factor = 0.5f + 0.75f * static_cast<float>(p);
    part.dropout = p == 1 ? 0.0f : c.dropout;
    part.dropout_seed = 77 + p;
    part.plain = p == 2 ? nullptr : plain_buffers.back().get<float>();
    columns += rank;
  }
  const size_t out_stride = columns + c.out_padding, out_size = c.out_dtype == DType::f32 ? 4 : 2;
  constexpr size_t kGuard = 64;
  DeviceBuffer out(c.m * out_stride * out_size + kGuard);
  call.out = out.get();
  call.out_stride = out_stride;

  std::vector<unsigned char> bytes[2];
  std::vector<std::vector<float>> plains[2];
  for (int run = 0; run < 2; ++run) {
    out.poison();
    for (auto& plain : plain_buffers) plain.poison();
    lora_shrink(device.context(), call);
    device.finish();
    bytes[run] = out.download<unsigned char>();
    for (auto& plain : plain_buffers) plains[run].push_back(plain.download<float>());
  }
  EXPECT_EQ(bytes[0], bytes[1]) << "not repeatable";
  for (size_t i = bytes[0].size() - kGuard; i < bytes[0].size(); ++i) {
    ASSERT_EQ(bytes[0][i], 0xff) << "written past the end";
  }

  const bool exact =
      c.dtype == DType::f32 || (c.right_dtype != c.dtype && c.right_dtype != DType::f32);
  // A f32 adapter beside a 16-bit x is rounded to x's type first.
  const double operand = !exact && c.right_dtype == DType::f32 ? test::roundoff(c.dtype) : 0.0;
  const double sum_error =
      exact ? (8 * std::sqrt(double(c.k)) + 64) * 0x1p-24 : 4 * (c.k / 16 + 32) * 0x1p-22;
  const uint32_t step = c.m <= 40 ? 1 : c.m / 23;  // rows of a large case: some, and the last
  int wrong = 0;
  for (uint32_t row = 0; row < c.m;
       row = row + step < c.m || row + 1 == c.m ? row + step : c.m - 1) {
    uint32_t column = 0;
    for (size_t p = 0; p < c.ranks.size(); ++p) {
      const ShrinkPart& part = call.part[p];
      const double keep = part.dropout > 0 ? 1 / (1 - double{part.dropout}) : 1;
      for (uint32_t r = 0; r < part.rank; ++r, ++column) {
        double sum = 0, squares = 0;
        for (uint32_t i = 0; i < c.k; ++i) {
          if (part.dropout > 0 && !keeps(part.dropout_seed, row, i, part.dropout)) continue;
          const double term =
              x.values[c.misaligned + row * x_stride + i] *
              rights[p].values[c.right_is_kn ? size_t{i} * part.rank + r : size_t{r} * c.k + i];
          sum += term;
          squares += term * term;
        }
        const double size_of_sum = std::sqrt(squares) * keep;
        const double plain = sum * keep;
        const double tolerance =
            size_of_sum * (sum_error + 4 * operand) + std::fabs(plain) * 0x1p-22;
        const double got =
            test::stored_value(bytes[0].data(), c.out_dtype, row * out_stride + column);
        const double allowed = std::fabs(part.factor) * tolerance +
                               std::fabs(part.factor * plain) * test::roundoff(c.out_dtype);
        if (!(std::fabs(got - part.factor * plain) <= allowed) && ++wrong < 5) {
          ADD_FAILURE() << "out row " << row << " part " << p << " column " << r << ": " << got
                        << " but " << part.factor * plain << " ± " << allowed;
        }
        if (part.plain) {
          const double u = plains[0][p][size_t{row} * part.rank + r];
          if (!(std::fabs(u - plain) <= tolerance) && ++wrong < 5) {
            ADD_FAILURE() << "plain row " << row << " part " << p << " column " << r << ": " << u
                          << " but " << plain << " ± " << tolerance;
          }
        }
      }
    }
    for (; column < out_stride; ++column) {
      ASSERT_EQ(test::stored_value(bytes[0].data(), c.out_dtype, row * out_stride + column), 0.0);
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST_F(LoraShrink, TakesAnyShape) {
  METAL_LORA_NEEDS_GPU();
  for (bool kn : {false, true}) {
    for (uint32_t m : {1u, 31u, 33u, 130u}) {
      for (uint32_t k : {8u, 31u, 576u}) check({m, k, {16}, DType::bf16, kn});
    }
    for (uint32_t rank : {1u, 3u, 8u, 48u, 64u, 100u}) {
      check({33, 576, {rank}, DType::bf16, kn});
      check({70, 135, {rank, 8, rank}, DType::f16, kn});
    }
    check({1000, 4097, {16, 3, 16}, DType::bf16, kn});
    check({1000, 4096, {16, 16, 16}, DType::bf16, kn});
    check({45, 4096, {8}, DType::f16, kn});
    // Blocks that share `right`, or k, or both.
    check({4200, 576, {16, 16, 16}, DType::bf16, kn});
    check({2100, 1024, {24}, DType::bf16, kn});
    check({8500, 264, {64}, DType::f16, kn});
    check({520, 4104, {16, 8}, DType::bf16, kn});
  }
}

TEST_F(LoraShrink, TakesManyColumns) {
  METAL_LORA_NEEDS_GPU();
  for (bool kn : {false, true}) {
    check({130, 1024, {32, 64, 8}, DType::bf16, kn});
    check({70, 320, {64}, DType::bf16, kn});
    check({100, 576, {64, 128}, DType::f16, kn});
    check({257, 640, {64, 64, 64, 64}, DType::bf16, kn});
    check({40, 640, {64, 60, 64}, DType::f16, kn});
    check({35, 200, {300, 7}, DType::bf16, kn});
  }
  check({9, 72, {1024, 1024, 1, 1024}, DType::bf16, false});
}

TEST_F(LoraShrink, DropsTheSameElementsAsTheCpu) {
  METAL_LORA_NEEDS_GPU();
  for (DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    check({33, 200, {8, 8, 16}, dtype, false, 0.3f});
    check({140, 576, {64, 3}, dtype, false, 0.1f});
    check({31, 129, {100}, dtype, true, 0.5f});
    check({70, 640, {16, 8, 16}, dtype, false, 0.2f});
    check({40, 256, {16, 24}, dtype, true, 0.4f});
  }
  check({20, 64, {8}, DType::bf16, false, 0.999f});
}

TEST_F(LoraShrink, TakesF32AndMixedTypes) {
  METAL_LORA_NEEDS_GPU();
  for (bool kn : {false, true}) {
    check({33, 576, {16, 3}, DType::f32, kn});
    check({130, 31, {100, 8}, DType::f32, kn});
    check({17, 333, {16}, DType::f32, kn, 0.0f, DType::bf16, DType::f32});
    check({33, 576, {16, 3}, DType::bf16, kn, 0.0f, DType::f32, DType::f32});
    check({33, 100, {8}, DType::f16, kn, 0.0f, DType::bf16, DType::bf16});
  }
}

TEST_F(LoraShrink, TakesStridesAndOddAddresses) {
  METAL_LORA_NEEDS_GPU();
  for (DType dtype : {DType::bf16, DType::f32}) {
    check({50, 256, {16}, dtype, false, 0.0f, dtype, dtype, 8, 16});
    check({50, 256, {16}, dtype, false, 0.0f, dtype, dtype, 3, 5});
    check({50, 256, {8, 8}, dtype, true, 0.0f, dtype, dtype, 0, 48, 1});
  }
}

TEST_F(LoraShrink, SumsNothingToZero) {
  METAL_LORA_NEEDS_GPU();
  check({0, 64, {8}});
  check({5, 0, {8, 3}, DType::bf16, false, 0.0f, DType::bf16, DType::bf16, 0, 5});
  check({5, 0, {8}, DType::f32, true});
  check({5, 64, {}, DType::bf16, false, 0.0f, DType::bf16, DType::bf16, 0, 8});
  check({5, 64, {0, 8}});
}

TEST_F(LoraShrink, RefusesAnOutThatIsTooNarrow) {
  METAL_LORA_NEEDS_GPU();
  test::TestDevice device;
  const DeviceBuffer some(4096);
  ShrinkCall call;
  call.m = 2;
  call.k = call.x_stride = 8;
  call.x = call.out = some.get();
  call.parts = 1;
  call.part[0].right = some.get();
  call.part[0].rank = 8;
  call.out_stride = 4;
  EXPECT_THROW(lora_shrink(device.context(), call), std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora::cuda
