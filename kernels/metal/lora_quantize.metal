// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Dense weights to int4 and int8 (MLX's affine groups) and NF4, and back.
//
// q = clamp(round((w - bias) / scale), 0, 2^bits - 1) with MLX's choice of scale and bias; NF4: the
// nearest of 16 levels to w / absmax. One lane takes 8 weights, a group's lanes (4, 8 or 16; NF4:
// 8) are neighbours and exchange their extremes by shuffles: no threadgroup memory, no barrier.
// Bytes, w of b bytes: quantise b + bits/8 + 2·b/group a weight, dequantise the same; everything
// once (emulator's counters, 64 x 1024 f16 to int4 groups of 64 and back: w, q, scales, biases
// 1.00x). One version: there is nothing to save.

// @region quantize_affine : common
namespace metal_lora {

// One lane takes 8 weights, GROUP / 8 neighbouring lanes a group. As MLX's CPU backend: the edge of
// larger magnitude is exact, codes round half to even.
template <int BITS, int GROUP, typename T, typename P>
inline void quantize_affine(
    P w, const uint count, device uint* q, device T* scales, device T* biases, const uint lane8) {
  enum { LANES = GROUP / 8, WORDS = BITS / 4 };
  const uint first = lane8 * 8;
  const bool inside = first < count;
  const Pack<T, 8> in = load_pack_up_to<T, 8>(w + first, inside ? 8 : 0);
  float low = INFINITY, high = -INFINITY;
  for (int i = 0; i < 8; ++i) {
    low = min(low, float(in.v[i]));
    high = max(high, float(in.v[i]));
  }
  for (ushort step = LANES / 2; step > 0; step /= 2) {
    low = min(low, simd_shuffle_xor(low, step));
    high = max(high, simd_shuffle_xor(high, step));
  }
  const float bins = float((1 << BITS) - 1);
  const bool from_low = fabs(low) > fabs(high);
  float scale = max((high - low) / bins, 1e-7f);
  scale = from_low ? scale : -scale;
  const float edge = from_low ? low : high, steps = rint(edge / scale);
  float bias = 0.0f;
  if (steps != 0.0f) {
    scale = edge / steps;
    bias = edge;
  }
  if (!inside) return;
  for (int word = 0; word < WORDS; ++word) {
    uint packed = 0;
    for (int i = 0; i < 8 / WORDS; ++i) {
      const float value = rint((float(in.v[word * 8 / WORDS + i]) - bias) / scale);
      packed |= uint(clamp(value, 0.0f, bins)) << (i * BITS);
    }
    q[lane8 * WORDS + word] = packed;
  }
  if (lane8 % LANES == 0) {
    scales[first / GROUP] = T(scale);
    biases[first / GROUP] = T(bias);
  }
}

}  // namespace metal_lora

// @region quantize_nf4 : common nf4_table
namespace metal_lora {

// The nearest level; of two equally near the lower one. The first level not below x is found in
// four steps, the one before it is the other candidate.
inline uint nearest_level(float x) {
  uint above = 0;
  for (uint step = 8; step > 0; step /= 2) {
    if (kNf4Levels[above + step - 1] < x) above += step;
  }
  if (above == 0) return 0;
  return kNf4Levels[above] - x < x - kNf4Levels[above - 1] ? above : above - 1;
}

// One lane takes 8 weights, 8 lanes a block of 64.
template <typename T, typename P>
inline void quantize_nf4(
    P w, const uint count, device uint* q, device float* absmax, const uint lane8) {
  const uint first = lane8 * 8;
  const bool inside = first < count;
  const Pack<T, 8> in = load_pack_up_to<T, 8>(w + first, inside ? 8 : 0);
  float most = 0.0f;
  for (int i = 0; i < 8; ++i) most = max(most, fabs(float(in.v[i])));
  for (ushort step = 4; step > 0; step /= 2) most = max(most, simd_shuffle_xor(most, step));
  if (!inside) return;
  const float inverse = most > 0.0f ? 1.0f / most : 0.0f;
  uint packed = 0;
  for (int i = 0; i < 8; ++i) {
    packed |= nearest_level(clamp(float(in.v[i]) * inverse, -1.0f, 1.0f)) << (4 * i);
  }
  q[lane8] = packed;
  if (lane8 % 8 == 0) absmax[first / 64] = most;
}

}  // namespace metal_lora

// @region dequantize : common
namespace metal_lora {

// One lane takes 8 weights of a policy with runs of 8.
template <typename T, typename Weight>
inline void dequantize(
    Weight weight, const uint n, const uint k, device T* out, const uint lane8, const uint lane) {
  const uint row = lane8 / (k / 8), column = lane8 % (k / 8) * 8;
  const int valid = row < n ? 8 : 0;
  const typename Weight::Group group = weight.group(row, column, valid, lane);
  const typename Weight::Run run = weight.run(row, column, valid);
  Pack<T, 8> values;
  weight.unpack(run, group, 0, values);
  if (valid > 0) *reinterpret_cast<device Pack<T, 8>*>(out + row * k + column) = values;
}

}  // namespace metal_lora
