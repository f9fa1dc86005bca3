// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/transformer_kernels.h"
#include "tests/kernels/transformer_reference.h"

namespace metal_lora::cpu::transformer_test {
namespace {

constexpr double kU = 0x1p-24;

class Rope : public EachIsa {};
METAL_LORA_EACH_ISA(Rope);

TEST_P(Rope, TableIsExactToRounding) {
  const std::vector<int32_t> positions = {0, 1, 7, 8191, 131071};
  const uint32_t dim = 66, half = dim / 2;
  std::vector<float> freq(half), table(positions.size() * dim);
  for (uint32_t i = 0; i < half; ++i) freq[i] = std::pow(1e5f, -2.0f * static_cast<float>(i) / dim);
  rope_table(5, dim, positions.data(), freq.data(), 1.25f, table.data());
  for (size_t t = 0; t < positions.size(); ++t) {
    for (uint32_t i = 0; i < half; ++i) {
      const long double angle = static_cast<long double>(positions[t]) * freq[i];
      // The f64 angle is off by 2^-53 of at most 2^17: 2^-36.
      EXPECT_NEAR(table[t * dim + i], 1.25L * std::cos(angle), 1.25 * (kU + 0x1p-36));
      EXPECT_NEAR(table[t * dim + half + i], 1.25L * std::sin(angle), 1.25 * (kU + 0x1p-36));
    }
  }
}

TEST_P(Rope, TurnsAndTurnsBack) {
  for (const uint32_t dim : {2u, 32u, 62u, 64u, 256u}) {
    for (const uint32_t tokens : {0u, 1u, 33u}) {
      for (const DType dtype : kDTypes) {
        const RopeParams p = {.tokens = tokens, .heads = 3, .head_dim = dim, .dtype = dtype};
        const size_t n = size_t{tokens} * 3 * dim;
        const Buffer x(dtype, random_floats(n, dim));
        std::vector<int32_t> positions(tokens);
        for (uint32_t t = 0; t < tokens; ++t) positions[t] = static_cast<int32_t>(3 * t);
        std::vector<float> freq(dim / 2), table(size_t{tokens} * dim);
        for (uint32_t i = 0; i < dim / 2; ++i) freq[i] = 1.0f / static_cast<float>(1 + i);
        rope_table(tokens, dim, positions.data(), freq.data(), 1.0f, table.data());
        Buffer y(dtype, n), back(dtype, n);
        rope(p, x.data(), table.data(), y.data());
        RopeParams inverse = p;
        inverse.inverse = true;
        rope(inverse, y.data(), table.data(), back.data());
        const auto xs = x.values(), ys = y.values();
        std::vector<double> want(n), bound(n), back_bound(n);
        const double u = unit_roundoff(dtype), step = smallest_step(dtype);
        for (size_t i = 0; i < n; ++i) {
          const size_t token = i / (3 * dim), c = i % dim, half = dim / 2, pair = c % half;
          const double angle = double{positions[token] * 1.0} * freq[pair];
          const size_t a = i - c + pair, b = a + half;
          want[i] = c < half ? xs[a] * std::cos(angle) - xs[b] * std::sin(angle)
                             : xs[b] * std::cos(angle) + xs[a] * std::sin(angle);
          // Two products of a rounded table entry, one sum: 3 u of |a| + |b|.
          const double size = std::fabs(xs[a]) + std::fabs(xs[b]);
          bound[i] = 4 * kU * size + u * std::fabs(want[i]) + step;
          // Both halves' stored errors come back, and are stored once more.
          back_bound[i] = 16 * kU * size + 2 * u * (std::fabs(ys[a]) + std::fabs(ys[b])) +
                          u * std::fabs(xs[i]) + 4 * step;
        }
        expect_within(ys, want, bound, "rope " + std::to_string(dim));
        expect_within(back.values(), xs, back_bound, "inverse " + std::to_string(dim));
        Buffer in_place = x;
        rope(p, in_place.data(), table.data(), in_place.data());
        EXPECT_TRUE(in_place == y);
      }
    }
  }
}

}  // namespace
}  // namespace metal_lora::cpu::transformer_test
