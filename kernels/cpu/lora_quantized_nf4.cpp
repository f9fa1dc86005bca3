// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// NF4 with bitsandbytes' roundings: this file is compiled without fused multiply-adds.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kernels/cpu/gemv_kernels.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr std::array<float, 256> kDynamicMap = dynamic_map();

/// The entry of an ascending table nearest to value; of two equally near the lower one.
uint32_t nearest(const float* table, uint32_t count, float value) {
  const float* above = std::lower_bound(table, table + count, value);
  if (above == table) return 0;
  const auto i = static_cast<uint32_t>(above - table);
  if (i == count) return count - 1;
  return table[i] - value < value - table[i - 1] ? i : i - 1;
}

float largest_magnitude(const float* x, size_t count) {
  float most = 0.0f;
  for (size_t i = 0; i < count; ++i) most = std::max(most, std::fabs(x[i]));
  return most;
}

/// One block of 64: its absmax, and its codes in 8 words. A block of zeros gets the exact zero.
float quantize_block(const float* x, uint32_t* words) {
  const float absmax = largest_magnitude(x, kNf4Block);
  const float inverse = absmax > 0.0f ? 1.0f / absmax : 0.0f;
  for (uint32_t i = 0; i < kNf4Block; i += 8) {
    uint32_t word = 0;
    for (uint32_t j = 0; j < 8; ++j) {
      const float scaled = std::clamp(x[i + j] * inverse, -1.0f, 1.0f);
      word |= nearest(kNf4Levels, 16, scaled) << (4 * j);
    }
    words[i / 8] = word;
  }
  return absmax;
}

/// The second level: absmax - mean in blocks of 256 over the whole tensor.
void quantize_absmax(const std::vector<float>& absmax, uint8_t* codes, float* nested) {
  double sum = 0.0;
  for (float a : absmax) sum += a;
  const float offset =
      absmax.empty() ? 0.0f : static_cast<float>(sum / static_cast<double>(absmax.size()));
  nested[0] = offset;
  std::copy(kDynamicMap.begin(), kDynamicMap.end(), nested + 1);
  std::array<float, kNf4NestedBlock> centred;
  for (size_t first = 0; first < absmax.size(); first += kNf4NestedBlock) {
    const size_t count = std::min<size_t>(kNf4NestedBlock, absmax.size() - first);
    for (size_t i = 0; i < count; ++i) centred[i] = absmax[first + i] - offset;
    const float most = largest_magnitude(centred.data(), count);
    const float inverse = most > 0.0f ? 1.0f / most : 0.0f;
    nested[kNf4NestedHead + first / kNf4NestedBlock] = most;
    for (size_t i = 0; i < count; ++i) {
      const float scaled = std::clamp(centred[i] * inverse, -1.0f, 1.0f);
      codes[first + i] = static_cast<uint8_t>(nearest(kDynamicMap.data(), 256, scaled));
    }
  }
}

}  // namespace

float nested_nf4_absmax(const WeightView& w, size_t i) {
  const auto* nested = static_cast<const float*>(w.biases);
  const float scaled = nested[1 + static_cast<const uint8_t*>(w.scales)[i]] *
                       nested[kNf4NestedHead + i / kNf4NestedBlock];
  return scaled + nested[0];
}

void nf4_absmax(const WeightView& w, size_t first, size_t count, float* out) {
  for (size_t i = 0; i < count; ++i) out[i] = nf4_absmax(w, first + i);
}

void quantize_nf4(const WeightParams& p, const float* x, void* data, void* scales, void* biases) {
  constexpr size_t kBlocks = 64;  // a chunk: 16 kB of f32
  const size_t blocks = size_t{p.n} * p.k / kNf4Block;
  std::vector<float> nested(p.double_quant ? blocks : 0);
  float* absmax = p.double_quant ? nested.data() : static_cast<float*>(scales);
  parallel_for((blocks + kBlocks - 1) / kBlocks, [&](size_t chunk) {
    for (size_t b = chunk * kBlocks; b < std::min(blocks, (chunk + 1) * kBlocks); ++b) {
      absmax[b] =
          quantize_block(x + b * kNf4Block, static_cast<uint32_t*>(data) + b * (kNf4Block / 8));
    }
  });
  if (!p.double_quant) return;
  quantize_absmax(nested, static_cast<uint8_t*>(scales), static_cast<float*>(biases));
}

}  // namespace metal_lora::cpu
