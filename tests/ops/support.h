// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>
#include <mlx/mlx.h>

#include <cmath>
#include <functional>
#include <limits>

#include "metal_lora/ops.h"
#include "src/launch/backend.h"

namespace metal_lora::testing {

namespace mx = mlx::core;

inline mx::array normal(const mx::Shape& shape, uint64_t seed, mx::Dtype dtype = mx::float32) {
  return mx::astype(mx::random::normal(shape, mx::float32, mx::random::key(seed)), dtype);
}

inline double unit_roundoff(mx::Dtype dtype) {
  if (dtype == mx::bfloat16) return std::ldexp(1.0, -8);
  if (dtype == mx::float16) return std::ldexp(1.0, -11);
  return std::ldexp(1.0, -24);
}

/// max |a - b| ≤ tolerance·max(1, max |b|), and both have one shape and dtype.
inline void expect_close(
    const mx::array& a, const mx::array& b, double tolerance, const char* what) {
  ASSERT_EQ(a.shape(), b.shape()) << what;
  ASSERT_EQ(a.dtype(), b.dtype()) << what;
  if (a.size() == 0) return;
  auto wide_a = mx::astype(a, mx::float32), wide_b = mx::astype(b, mx::float32);
  ASSERT_TRUE(mx::all(mx::isfinite(wide_a)).item<bool>()) << what;
  const double worst = mx::max(mx::abs(mx::subtract(wide_a, wide_b))).item<float>();
  const double size = mx::max(mx::abs(wide_b)).item<float>();
  EXPECT_LE(worst, tolerance * std::max(1.0, size)) << what;
}

using Function = std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

/// The gradients of Σ outputs·weights by the op's own vjp, and by MLX's of the plain version.
inline void expect_same_gradients(
    const Function& op,
    const Function& reference,
    const std::vector<mx::array>& inputs,
    double tolerance) {
  auto outputs = op(inputs);
  std::vector<mx::array> cotangents;
  for (size_t i = 0; i < outputs.size(); ++i) {
    cotangents.push_back(normal(outputs[i].shape(), 1000 + i, outputs[i].dtype()));
  }
  auto ours = mx::vjp(op, inputs, cotangents).second;
  auto plain = mx::vjp(reference, inputs, cotangents).second;
  for (size_t i = 0; i < inputs.size(); ++i) {
    expect_close(ours[i], plain[i], tolerance, ("gradient " + std::to_string(i)).c_str());
  }
}

/// The suite runs a second time with METAL_LORA_BACKEND=emulator.
inline bool on_metal_kernels() {
  return runs_metal_kernels(active_backend());
}

}  // namespace metal_lora::testing
