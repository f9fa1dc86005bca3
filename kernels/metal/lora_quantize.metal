// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT

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

// The nearest level; of two equally near the lower one. The first level not below x is found in four
// steps, the one before it is the other candidate.
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

// @region lora_embedding : common
namespace metal_lora {

constant constexpr uint kEmbedTokens = 8;
constant constexpr uint kEmbedThreads = 64;
constant constexpr uint kEmbedDims = 512;  // 64 threads of 8

// y[t] = table[ids[t]] + scale · Σ_r A[r, ids[t]]·B[:, r] for 8 tokens and 512 dims a threadgroup:
// a row of B is read once for its 8 tokens. us: [8][RANKS]. `rank` 0: no adapter.
template <typename T, typename LT, int RANKS, typename Weight, typename PI, typename PA, typename PB>
inline void lora_embedding(
    Weight weight,
    PI ids,
    PA a,
    PB b,
    const uint tokens,
    const uint vocab,
    const uint dims,
    const uint rank,
    const float scale,
    device T* y,
    threadgroup float* us,
    const uint3 group,
    const uint simd_id,
    const uint lane) {
  const uint thread_id = simd_id * 32 + lane, token0 = group.y * kEmbedTokens;
  const uint column = group.x * kEmbedDims + thread_id * 8;
  for (uint e = thread_id; e < kEmbedTokens * rank; e += kEmbedThreads) {
    const uint t = token0 + e / rank, r = e % rank;
    const uint id = t < tokens ? uint(ids[t]) : vocab;
    us[e / rank * RANKS + r] = id < vocab ? scale * float(a[r * vocab + id]) : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Pack<float, 8> rows[kEmbedTokens];
  for (uint t = 0; t < kEmbedTokens; ++t) {
    const uint id = token0 + t < tokens ? uint(ids[token0 + t]) : vocab;
    const int valid = id < vocab ? int(dims) - int(column) : 0;
    const typename Weight::Group shared = weight.group(id, column, valid, lane);
    const typename Weight::Run run = weight.run(id, column, valid);
    weight.unpack(run, shared, 0, rows[t]);
  }
  for (uint i = 0; i < 8 && column + i < dims; ++i) {
    for (uint r = 0; r < rank; r += 8) {
      const int valid = int(rank) - int(r);
      const Pack<LT, 8> values = load_pack_up_to<LT, 8>(b + (column + i) * rank + r, valid);
      for (int j = 0; j < 8 && j < valid; ++j) {
        for (uint t = 0; t < kEmbedTokens; ++t) {
          rows[t].v[i] += float(values.v[j]) * us[t * RANKS + r + j];
        }
      }
    }
    for (uint t = 0; t < kEmbedTokens; ++t) {
      if (token0 + t < tokens) y[(token0 + t) * dims + column + i] = T(rows[t].v[i]);
    }
  }
}

}  // namespace metal_lora
