// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Random operands for the tests of Metal kernels, with the exact values that they stand for.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "kernels/nf4.h"
#include "metal_lora/weight.h"
#include "tests/metal/harness.h"

namespace metal_lora::test {

using ops::metal_ops::NamedArrays;
using ops::metal_ops::NamedOutputs;

/// Half a unit in the last place of 1: the relative error of rounding to a type.
inline double relative_rounding(DType dtype) {
  return dtype == DType::f16 ? 0x1p-11 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-24;
}
/// The absolute error where f16 has no normal numbers left; the others reach 2^-126.
inline double smallest_step(DType dtype) {
  return dtype == DType::f16 ? 0x1p-25 : 0.0;
}
constexpr double kF32 = 0x1p-24;

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  std::vector<float> normal(size_t count, float deviation = 1.0f) {
    std::normal_distribution<float> draw(0.0f, deviation);
    std::vector<float> out(count);
    for (float& v : out) v = draw(engine_);
    return out;
  }
  /// Integers in [low, high].
  std::vector<int32_t> integers(size_t count, int32_t low, int32_t high) {
    std::uniform_int_distribution<int32_t> draw(low, high);
    std::vector<int32_t> out(count);
    for (int32_t& v : out) v = draw(engine_);
    return out;
  }
  double uniform() { return std::uniform_real_distribution<double>(0.0, 1.0)(engine_); }

 private:
  std::mt19937_64 engine_;
};

inline mlx::core::array int_array(const std::vector<int32_t>& v, mlx::core::Shape shape) {
  return mlx::core::array(v.data(), std::move(shape), mlx::core::int32);
}

/// A matrix as a kernel reads it, and its exact values.
struct Operand {
  mlx::core::array array;
  std::vector<double> value;
};
inline Operand operand(const std::vector<float>& v, mlx::core::Shape shape, DType dtype) {
  auto array = stored(v, std::move(shape), to_mlx(dtype));
  auto value = values(array);
  return {std::move(array), std::move(value)};
}

/// A weight [n, k] of any format, under the names w, scales, biases, and its exact values.
struct StoredWeight {
  WeightFormat format;
  uint32_t group_size = 0;
  DType scales_dtype = DType::f32;
  bool double_quant = false;
  NamedArrays arrays;
  std::vector<double> value;
};

inline uint32_t code_of(const std::vector<uint32_t>& words, size_t i, uint32_t bits) {
  return words[i * bits / 32] >> (i * bits % 32) & ((1u << bits) - 1);
}

inline StoredWeight dense_weight(Random& random, WeightFormat format, int n, int k) {
  const DType dtype = format == WeightFormat::f16    ? DType::f16
                      : format == WeightFormat::bf16 ? DType::bf16
                                                     : DType::f32;
  auto w = operand(random.normal(size_t(n) * k, 0.2f), {n, k}, dtype);
  StoredWeight out{format, 0, DType::f32, false, {}, std::move(w.value)};
  out.arrays.emplace("w", std::move(w.array));
  return out;
}

inline std::vector<uint32_t> random_words(Random& random, size_t count) {
  const auto drawn = random.integers(count, INT32_MIN, INT32_MAX);
  return {drawn.begin(), drawn.end()};
}

inline StoredWeight affine_weight(
    Random& random, WeightFormat format, int n, int k, int group, DType scales_dtype) {
  const uint32_t bits = format == WeightFormat::int4 ? 4 : 8;
  const size_t count = size_t(n) * k;
  const auto words = random_words(random, count * bits / 32);
  const auto scales = operand(
      random.normal(count / group, bits == 4 ? 0.04f : 0.003f), {n, k / group}, scales_dtype);
  const auto biases = operand(random.normal(count / group, 0.2f), {n, k / group}, scales_dtype);
  StoredWeight out{format, static_cast<uint32_t>(group), scales_dtype, false, {}, {}};
  for (size_t i = 0; i < count; ++i) {
    out.value.push_back(
        code_of(words, i, bits) * scales.value[i / group] + biases.value[i / group]);
  }
  out.arrays.emplace(
      "w", mlx::core::array(words.data(), {n, static_cast<int>(k * bits / 32)}, mlx::core::uint32));
  out.arrays.emplace("scales", scales.array);
  out.arrays.emplace("biases", biases.array);
  return out;
}

inline StoredWeight nf4_weight(Random& random, int n, int k, bool double_quant) {
  const size_t count = size_t(n) * k, blocks = count / kNf4Block;
  const auto words = random_words(random, count / 8);
  StoredWeight out{WeightFormat::nf4, 0, DType::f32, double_quant, {}, {}};
  std::vector<double> absmax(blocks);
  if (double_quant) {
    const auto map = dynamic_map();
    std::vector<float> table = {0.3f};
    table.insert(table.end(), map.begin(), map.end());
    for (size_t b = 0; b < blocks; b += kNf4NestedBlock) {
      table.push_back(0.1f + 0.1f * static_cast<float>(random.uniform()));
    }
    const auto drawn = random.integers(blocks, 0, 255);
    const std::vector<uint8_t> codes(drawn.begin(), drawn.end());
    for (size_t b = 0; b < blocks; ++b) {
      absmax[b] = double{table[1 + codes[b]]} * table[kNf4NestedHead + b / kNf4NestedBlock] +
                  double{table[0]};
    }
    out.arrays.emplace(
        "scales",
        mlx::core::array(codes.data(), {n, static_cast<int>(k / kNf4Block)}, mlx::core::uint8));
    out.arrays.emplace("biases", mlx::core::array(table.data(), {static_cast<int>(table.size())}));
  } else {
    std::vector<float> scales = random.normal(blocks, 0.2f);
    for (float& s : scales) s = std::fabs(s);
    absmax.assign(scales.begin(), scales.end());
    out.arrays.emplace(
        "scales", mlx::core::array(scales.data(), {n, static_cast<int>(k / kNf4Block)}));
  }
  for (size_t i = 0; i < count; ++i) {
    out.value.push_back(double{kNf4Levels[code_of(words, i, 4)]} * absmax[i / kNf4Block]);
  }
  out.arrays.emplace("w", mlx::core::array(words.data(), {n, k / 8}, mlx::core::uint32));
  return out;
}

enum class Base { f32, f16, bf16, int4, int8, nf4, nf4_nested };

/// `group` for int4 and int8.
inline StoredWeight stored_weight(
    Random& random, Base base, int n, int k, int group = 32, DType scales_dtype = DType::f32) {
  switch (base) {
    case Base::f32:
      return dense_weight(random, WeightFormat::f32, n, k);
    case Base::f16:
      return dense_weight(random, WeightFormat::f16, n, k);
    case Base::bf16:
      return dense_weight(random, WeightFormat::bf16, n, k);
    case Base::int4:
      return affine_weight(random, WeightFormat::int4, n, k, group, scales_dtype);
    case Base::int8:
      return affine_weight(random, WeightFormat::int8, n, k, group, scales_dtype);
    case Base::nf4:
      return nf4_weight(random, n, k, false);
    case Base::nf4_nested:
      return nf4_weight(random, n, k, true);
  }
  throw std::invalid_argument("unknown base");
}

}  // namespace metal_lora::test
