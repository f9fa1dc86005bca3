// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Tables of Metal expressions, run for many inputs at once and compared with scalar C++.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "tests/fault_harness.h"

namespace metal_emulator::conformance {

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(float(fraction), -24)
                                          : std::ldexp(float(fraction + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}
/// Nearest, ties to even: by search among neighbours of a truncated guess.
inline uint16_t float_to_half(double x) {
  if (std::isnan(x)) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double m = std::fabs(x);
  if (m >= 65520) return sign | 0x7c00;
  int exponent = m == 0 ? -14 : std::max(std::ilogb(m), -14);
  const double steps = std::nearbyint(std::ldexp(m, 10 - exponent));
  const auto n = static_cast<uint32_t>(steps);  // up to 2048: may carry into the exponent
  return static_cast<uint16_t>(
      sign | (exponent == -14 && n < 1024 ? n : ((exponent + 14) << 10) + n));
}

/// |got - exact| in units of the last place of `exact` at `bits` of precision.
inline double ulps(double got, double exact, int bits, int min_exponent) {
  if (std::isnan(exact)) return std::isnan(got) ? 0 : INFINITY;
  if (got == exact) return 0;
  if (std::isinf(exact) || std::isnan(got) || std::isinf(got)) return INFINITY;
  const int e = exact == 0 ? min_exponent : std::max(std::ilogb(exact), min_exponent);
  return std::fabs(got - exact) / std::ldexp(1.0, e - bits + 1);
}
inline double float_ulps(float got, double exact) {
  // Beyond float's range the exact result is an infinity.
  if (std::fabs(exact) >= 0x1.ffffffp127) exact = std::copysign(INFINITY, exact);
  return ulps(got, exact, 24, -126);
}
inline double half_ulps(float got, double exact) {
  if (std::fabs(exact) >= 65520) exact = std::copysign(INFINITY, exact);
  return ulps(got, exact, 11, -14);
}

inline Library build(const std::string& text, const std::string& name) {
  CompileOptions options;
  options.file_name = name;
  options.lint = false;  // tests of the library that runs, not of what Apple's compiler refuses
  return compile("#include <metal_stdlib>\nusing namespace metal;\n" + text, options);
}

template <class T>
Buffer in(int index, const std::vector<T>& v) {
  return {index, const_cast<T*>(v.data()), v.size() * sizeof(T), true};
}
template <class T>
Buffer out(int index, std::vector<T>& v) {
  return {index, v.data(), v.size() * sizeof(T), false};
}

/// Evaluates expressions of x, y, z (elements of three inputs of type In) into Out; result [e][i].
template <class In, class Out>
std::vector<std::vector<Out>> evaluate(
    const std::string& in_type,
    const std::string& out_type,
    const std::vector<std::string>& expressions,
    const std::vector<In>& x,
    const std::vector<In>& y,
    const std::vector<In>& z) {
  std::string text =
      "kernel void evaluate(const device " + in_type + "* xs [[buffer(0)]], const device " +
      in_type + "* ys [[buffer(1)]], const device " + in_type + "* zs [[buffer(2)]], device " +
      out_type +
      "* out [[buffer(3)]], uint i [[thread_position_in_grid]], uint n [[threads_per_grid]]) {\n" +
      in_type + " x = xs[i], y = ys[i], z = zs[i];\n";
  for (size_t e = 0; e < expressions.size(); e++)
    text += "{ out[" + std::to_string(e) + " * n + i] = (" + out_type + ")(" + expressions[e] +
            "); }\n";
  text += "}\n";
  const size_t n = x.size();
  std::vector<Out> flat(n * expressions.size());
  Dispatch d;
  d.kernel = "evaluate";
  d.buffers = {in(0, x), in(1, y), in(2, z), out(3, flat)};
  d.threads_per_grid = {uint32_t(n), 1, 1};
  d.threads_per_threadgroup = {uint32_t(std::min<size_t>(n, 256)), 1, 1};
  const Report report = run(build(text, "evaluate.metal"), d);
  EXPECT_EQ(report.finding_count, 0u) << faults::describe(report);
  std::vector<std::vector<Out>> result;
  for (size_t e = 0; e < expressions.size(); e++)
    result.emplace_back(flat.begin() + long(e * n), flat.begin() + long((e + 1) * n));
  return result;
}

}  // namespace metal_emulator::conformance
