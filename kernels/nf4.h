// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The constants of the NF4 format, shared by the kernels of all backends.
#pragma once

#include <array>
#include <cstdint>

namespace metal_lora {

inline constexpr uint32_t kNf4Block = 64;         ///< weights that share an absmax
inline constexpr uint32_t kNf4NestedBlock = 256;  ///< absmax values that share an absmax2
/// f32 values of a double-quantised weight's biases ahead of absmax2: offset and code[256].
inline constexpr uint32_t kNf4NestedHead = 257;

/// The 16 levels of 4-bit NormalFloat (Dettmers et al., QLoRA, arXiv:2305.14314, appendix E):
/// quantiles of the normal distribution, normalised to [-1, 1], with an exact zero.
inline constexpr float kNf4Levels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f};

/// The signed dynamic 8-bit map (Dettmers et al., 8-bit optimizers, arXiv:2110.02861, section 2):
/// for each decade 10^(i-6), i = 0 … 6, the midpoints of 2^i equal steps of [0.1, 1], both signs,
/// then 0 and 1; ascending. The boundaries are fused multiply-adds from the nearer end and each
/// later step rounds to f32, so that every value is bitsandbytes' own.
constexpr std::array<float, 256> dynamic_map() {
  constexpr float kDecades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  std::array<float, 256> map{};
  uint32_t count = 128;  // map[127] is the zero
  for (int i = 0; i < 7; ++i) {
    const int steps = 1 << i;
    const float step = (1.0f - 0.1f) / static_cast<float>(steps);
    const auto boundary = [=](int j) {
      return j < (steps + 1) / 2 ? static_cast<float>(double{step} * j + double{0.1f})
                                 : static_cast<float>(1.0 - double{step} * (steps - j));
    };
    for (int j = 0; j < steps; ++j, ++count) {
      const float midpoint = (boundary(j) + boundary(j + 1)) / 2.0f;
      map[count] = kDecades[i] * midpoint;
      map[254 - count] = -map[count];
    }
  }
  map[255] = 1.0f;
  return map;
}

}  // namespace metal_lora
