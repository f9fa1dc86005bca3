// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <mlx/array.h>
#include <mlx/dtype_utils.h>

#include "metal_lora/error.h"
#include "metal_lora/weight.h"

namespace metal_lora::ops {

/// "(2, 3)"
inline std::string shape_text(const mlx::core::array& a) {
  return fmt::format("({})", fmt::join(a.shape().begin(), a.shape().end(), ", "));
}

[[noreturn]] inline void refuse(
    const char* op, const std::string& what, const std::string& expected, const std::string& got) {
  throw Error(
      ErrorCode::invalid_input, fmt::format("[{}] {} must be {} but is {}", op, what, expected, got));
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
    refuse(op, std::string(name) + "'s dtype", mlx::core::dtype_to_string(dtype), mlx::core::dtype_to_string(a.dtype()));
  }
}

}  // namespace metal_lora::ops
