// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Random operands of a linear with an adapter, its f64 reference, and error bounds derived from the
// formats' roundings: what the forward and dx kernels are compared with.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/cpu/gemm_kernels.h"
#include "kernels/cpu/gemm_skinny.h"
#include "kernels/metal/plans.h"
#include "tests/metal/stored_weight.h"

namespace metal_lora::test {

namespace mx = mlx::core;

inline bool is_packed(WeightFormat format) {
  return format >= WeightFormat::int4;
}

struct Matrix {
  size_t rows = 0, columns = 0;
  std::vector<double> values;
  double at(size_t r, size_t c) const { return values[r * columns + c]; }
};

class LoraCase {
 public:
  explicit LoraCase(const metal::LoraShape& shape, uint64_t seed = 1)
      : shape(shape), random_(seed) {
    make_weight();
    if (shape.rank > 0) {
      a = dense("a", shape.rank, shape.k, shape.lora_dtype, 0.25);
      b = dense("b", shape.n, shape.rank, shape.lora_dtype, 0.25);
    }
    if (shape.has_bias) bias = dense("bias", 0, shape.n, DType::f32, 1.0);
    x = dense("x", shape.m, shape.k, shape.dtype, 1.0);
    dy = dense("dy", shape.m, shape.n, shape.dtype, 1.0);
    make_mask();
  }

  metal::LoraShape shape;
  Matrix w, a, b, bias, x, dy;
  Matrix keep;  ///< [m, k]: 0 or 1 / (1 - p)
  ops::metal_ops::NamedArrays arrays;

  void set(const char* name, Matrix& matrix, std::vector<float> v, DType dtype) {
    const mx::Shape dims =
        matrix.rows == 0
            ? mx::Shape{static_cast<int>(matrix.columns)}
            : mx::Shape{static_cast<int>(matrix.rows), static_cast<int>(matrix.columns)};
    const auto array = stored(v, dims, to_mlx(dtype));
    matrix.values = values(array);
    arrays.insert_or_assign(name, array);
  }

 private:
  Matrix dense(const char* name, size_t rows, size_t columns, DType dtype, double spread) {
    Matrix matrix{rows, columns, {}};
    auto v = random_.normal(std::max<size_t>(rows, 1) * columns, static_cast<float>(spread));
    set(name, matrix, std::move(v), dtype);
    return matrix;
  }

  void make_weight() {
    const auto base = [this] {
      switch (shape.format) {
        case WeightFormat::f32:
          return Base::f32;
        case WeightFormat::f16:
          return Base::f16;
        case WeightFormat::bf16:
          return Base::bf16;
        case WeightFormat::int4:
          return Base::int4;
        case WeightFormat::int8:
          return Base::int8;
        case WeightFormat::nf4:
          break;
      }
      return shape.double_quant ? Base::nf4_nested : Base::nf4;
    }();
    auto stored = stored_weight(
        random_,
        base,
        static_cast<int>(shape.n),
        static_cast<int>(shape.k),
        static_cast<int>(shape.group_size),
        shape.scales_dtype);
    w = {shape.n, shape.k, std::move(stored.value)};
    arrays.merge(stored.arrays);
  }

  /// The CPU kernels' own mask: both backends must draw the same.
  void make_mask() {
    LoraParams lora;
    lora.dropout = shape.dropout;
    lora.dropout_seed = shape.dropout_seed;
    auto drop = cpu::drop_mask(lora);
    drop.keep_scale = 1.0f;
    keep = {shape.m, shape.k, {}};
    for (uint32_t t = 0; t < shape.m; ++t) {
      std::vector<float> row(shape.k, 1.0f);
      if (shape.dropout > 0.0f) {
        cpu::gemm_kernels(cpu::Compute::f32).drop(drop, t, 0, shape.k, row.data());
      }
      for (float kept : row) keep.values.push_back(kept / (1.0 - double{shape.dropout}));
    }
  }

  Random random_;
};

/// What an output should be, and by how much it may differ.
struct Expected {
  std::vector<double> values, bounds;
};

/// Σ of `terms` products in f32, in any order, is off by at most (terms + 8)·2^-24·Σ|product| (the
/// first-order bound; 8 covers the roundings of the factors: dequantisation, keep, scale; 1 % the
/// higher orders).
inline double sum_error(size_t terms, double magnitude) {
  return 1.01 * static_cast<double>(terms + 8) * 0x1p-24 * magnitude;
}

/// + rounding of the result to its storage; half's smallest numbers are 2^-24 apart.
inline double storage_error(DType dtype, double value) {
  return relative_rounding(dtype) * std::fabs(value) + (dtype == DType::f16 ? 0x1p-25 : 0x1p-140);
}

/// The tiled form rounds packed weights to x's type.
inline double weight_error(const metal::LoraShape& shape) {
  return is_packed(shape.format) ? relative_rounding(shape.dtype) : 0.0;
}

/// u = drop(x)·Aᵀ [m, rank].
inline Expected expected_u(const LoraCase& c) {
  const auto& s = c.shape;
  Expected out;
  for (size_t t = 0; t < s.m; ++t) {
    for (size_t r = 0; r < s.rank; ++r) {
      double sum = 0, magnitude = 0;
      for (size_t i = 0; i < s.k; ++i) {
        const double product = c.keep.at(t, i) * c.x.at(t, i) * c.a.at(r, i);
        sum += product;
        magnitude += std::fabs(product);
      }
      out.values.push_back(sum);
      out.bounds.push_back(sum_error(s.k, magnitude) + 0x1p-140);
    }
  }
  return out;
}

/// v = dy·B [m, rank].
inline Expected expected_v(const LoraCase& c) {
  const auto& s = c.shape;
  Expected out;
  for (size_t t = 0; t < s.m; ++t) {
    for (size_t r = 0; r < s.rank; ++r) {
      double sum = 0, magnitude = 0;
      for (size_t i = 0; i < s.n; ++i) {
        const double product = c.dy.at(t, i) * c.b.at(i, r);
        sum += product;
        magnitude += std::fabs(product);
      }
      out.values.push_back(sum);
      out.bounds.push_back(sum_error(s.n, magnitude) + 0x1p-140);
    }
  }
  return out;
}

inline Expected expected_y(const LoraCase& c) {
  const auto& s = c.shape;
  const Expected u = expected_u(c);
  Expected out;
  for (size_t t = 0; t < s.m; ++t) {
    std::vector<double> magnitude_u(s.rank);
    for (size_t r = 0; r < s.rank; ++r) {
      for (size_t i = 0; i < s.k; ++i) {
        magnitude_u[r] += std::fabs(c.keep.at(t, i) * c.x.at(t, i) * c.a.at(r, i));
      }
    }
    for (size_t o = 0; o < s.n; ++o) {
      double base = 0, magnitude = 0, weights = 0;
      for (size_t i = 0; i < s.k; ++i) {
        const double product = c.x.at(t, i) * c.w.at(o, i);
        base += product;
        weights += std::fabs(product);
      }
      double adapter = 0;
      for (size_t r = 0; r < s.rank; ++r) {
        const double b = double{s.scale} * c.b.at(o, r);
        adapter += b * u.values[t * s.rank + r];
        magnitude += std::fabs(b) * magnitude_u[r];
      }
      const double bias = s.has_bias ? c.bias.values[o] : 0.0;
      const double y = base + adapter + bias;
      out.values.push_back(y);
      out.bounds.push_back(
          sum_error(s.k + s.rank, magnitude + weights + std::fabs(bias)) +
          weight_error(s) * weights + storage_error(s.dtype, y));
    }
  }
  return out;
}

inline Expected expected_dx(const LoraCase& c) {
  const auto& s = c.shape;
  const Expected v = expected_v(c);
  Expected out;
  for (size_t t = 0; t < s.m; ++t) {
    std::vector<double> magnitude_v(s.rank);
    for (size_t r = 0; r < s.rank; ++r) {
      for (size_t o = 0; o < s.n; ++o) magnitude_v[r] += std::fabs(c.dy.at(t, o) * c.b.at(o, r));
    }
    for (size_t i = 0; i < s.k; ++i) {
      double base = 0, weights = 0, magnitude = 0, adapter = 0;
      for (size_t o = 0; o < s.n; ++o) {
        const double product = c.dy.at(t, o) * c.w.at(o, i);
        base += product;
        weights += std::fabs(product);
      }
      for (size_t r = 0; r < s.rank; ++r) {
        const double a = double{s.scale} * c.keep.at(t, i) * c.a.at(r, i);
        adapter += a * v.values[t * s.rank + r];
        magnitude += std::fabs(a) * magnitude_v[r];
      }
      const double dx = base + adapter;
      out.values.push_back(dx);
      out.bounds.push_back(
          sum_error(s.n + s.rank, magnitude + weights) + weight_error(s) * weights +
          storage_error(s.dtype, dx));
    }
  }
  return out;
}

/// Every element within its bound; the first that is not is named.
inline void expect_close(const mx::array& actual, const Expected& expected, const char* what) {
  const auto got = values(actual);
  ASSERT_EQ(got.size(), expected.values.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::fabs(got[i] - expected.values[i]), expected.bounds[i])
        << what << '[' << i << "] is " << got[i] << ", should be " << expected.values[i];
  }
}

inline ops::metal_ops::NamedOutputs lora_outputs(const metal::LoraShape& s) {
  const auto dim = [](uint32_t d) { return static_cast<int>(d); };
  return {
      {"y", {{dim(s.m), dim(s.n)}, to_mlx(s.dtype)}},
      {"dx", {{dim(s.m), dim(s.k)}, to_mlx(s.dtype)}},
      {"u", {{dim(s.m), dim(s.rank)}, mx::float32}},
      {"v", {{dim(s.m), dim(s.rank)}, mx::float32}}};
}

/// One dispatch where fused or without adapter, two where split; all outputs within bounds.
inline void expect_forward(const metal::LoraShape& shape) {
  const LoraCase c(shape);
  const auto plans = metal::plan_lora_forward(shape);
  if (shape.form != metal::Form::automatic) {
    ASSERT_EQ(plans.size(), shape.form == metal::Form::split ? 2u : 1u);
  }
  const auto arrays = run(plans, c.arrays, lora_outputs(shape));
  expect_close(arrays.at("y"), expected_y(c), "y");
  if (shape.wants_u || plans.size() == 2) expect_close(arrays.at("u"), expected_u(c), "u");
}

inline void expect_dx(const metal::LoraShape& shape) {
  const LoraCase c(shape);
  const auto plans = metal::plan_lora_dx(shape);
  if (shape.form != metal::Form::automatic) {
    ASSERT_EQ(plans.size(), shape.form == metal::Form::split ? 2u : 1u);
  }
  const auto arrays = run(plans, c.arrays, lora_outputs(shape));
  expect_close(arrays.at("dx"), expected_dx(c), "dx");
  if (shape.wants_u || plans.size() == 2) expect_close(arrays.at("v"), expected_v(c), "v");
}

inline std::string dtype_name(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16";
}

inline std::string format_name(const metal::LoraShape& s) {
  switch (s.format) {
    case WeightFormat::f32:
      return "f32";
    case WeightFormat::f16:
      return "f16";
    case WeightFormat::bf16:
      return "bf16";
    case WeightFormat::nf4:
      return s.double_quant ? "nf4_nested" : "nf4";
    default:
      return (s.format == WeightFormat::int4 ? "int4" : "int8") + std::string("_g") +
             std::to_string(s.group_size) + "_" + dtype_name(s.scales_dtype);
  }
}

/// A name for GoogleTest that says all that varies.
inline std::string case_name(const metal::LoraShape& s) {
  std::string name = "m" + std::to_string(s.m) + "_n" + std::to_string(s.n) + "_k" +
                     std::to_string(s.k) + "_r" + std::to_string(s.rank) + "_x_" +
                     dtype_name(s.dtype) + "_w_" + format_name(s) + "_ab_" +
                     dtype_name(s.lora_dtype);
  if (s.form == metal::Form::fused) name += "_fused";
  if (s.form == metal::Form::split) name += "_split";
  if (s.has_bias) name += "_bias";
  if (s.dropout > 0) name += "_dropout";
  if (s.wants_u) name += "_keep";
  return name;
}

}  // namespace metal_lora::test

namespace metal_lora::metal {
inline void PrintTo(const LoraShape& shape, std::ostream* out) {
  *out << test::case_name(shape);
}
}  // namespace metal_lora::metal
