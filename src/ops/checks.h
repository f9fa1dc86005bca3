// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <mlx/array.h>

#include "metal_lora/error.h"
#include "metal_lora/weight.h"

namespace metal_lora::ops {

/// "float32": the names that users write. MLX's own function is not exported from its library.
inline const char* dtype_name(mlx::core::Dtype dtype) {
  using namespace mlx::core;
  switch (dtype.val()) {
    case Dtype::Val::bool_:
      return "bool";
    case Dtype::Val::uint8:
      return "uint8";
    case Dtype::Val::uint16:
      return "uint16";
    case Dtype::Val::uint32:
      return "uint32";
    case Dtype::Val::uint64:
      return "uint64";
    case Dtype::Val::int8:
      return "int8";
    case Dtype::Val::int16:
      return "int16";
    case Dtype::Val::int32:
      return "int32";
    case Dtype::Val::int64:
      return "int64";
    case Dtype::Val::float16:
      return "float16";
    case Dtype::Val::float32:
      return "float32";
    case Dtype::Val::float64:
      return "float64";
    case Dtype::Val::bfloat16:
      return "bfloat16";
    case Dtype::Val::complex64:
      return "complex64";
  }
  return "unknown";
}

/// "(2, 3)"
inline std::string shape_text(const mlx::core::array& a) {
  return fmt::format("({})", fmt::join(a.shape().begin(), a.shape().end(), ", "));
}

[[noreturn]] inline void refuse(
    const char* op, const std::string& what, const std::string& expected, const std::string& got) {
  throw Error(
      ErrorCode::invalid_input,
      fmt::format("[{}] {} must be {} but is {}", op, what, expected, got));
}

/// `name` must have exactly this shape; -1 stands for any extent.
inline void check_shape(
    const char* op, const char* name, const mlx::core::array& a, std::initializer_list<int> shape) {
  bool ok = a.ndim() == shape.size();
  int i = 0;
  for (int extent : shape) ok = ok && (extent < 0 || a.shape(i) == extent) && (++i, true);
  if (ok) return;
  std::string expected;
  for (int extent : shape) {
    expected += (expected.empty() ? "" : ", ") + (extent < 0 ? "any" : std::to_string(extent));
  }
  refuse(op, name, "(" + expected + ")", shape_text(a));
}

inline void check_dtype(
    const char* op, const char* name, const mlx::core::array& a, mlx::core::Dtype dtype) {
  if (a.dtype() != dtype) {
    refuse(op, std::string(name) + "'s dtype", dtype_name(dtype), dtype_name(a.dtype()));
  }
}

}  // namespace metal_lora::ops
