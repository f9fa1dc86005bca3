// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Weights between their formats. Every thread makes 8 values from one load of codes, so that a warp
// writes whole lines; nothing is kept but the groups' scales, so the limit is the copy bandwidth.
// Bits: roundings are spelled out (__fmaf_rn, __fmul_rn, …), since nvcc would contract them.
//   H100, 4096 x 4096 to and from bf16, beside a copy of as many bytes (2750 GB/s):
//     dequantise nf4 16.3 us (96 %), double-quantised 17.6 (87 %), int4 16.9 (93 %), int8 19.8 (95
//     %) quantise nf4 23.7 (66 %), int4 23.1 (68 %; with a division per value 33.3), int8 24.2 (77
//     %)
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <string>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/lora_quantized.h"
#include "kernels/nf4.h"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kValues = 8;  ///< of a thread and step

/// Where an NF4 value, scaled to [-1, 1], passes from level i to level i + 1: the largest f32 that
/// the comparison `level[i + 1] - v < v - level[i]`, each side rounded, still gives to the lower
/// one. Both sides are monotone in v, so 15 thresholds say exactly what the search says.
constexpr std::array<float, 15> nf4_thresholds() {
  // Floats as integers in their order.
  const auto to_order = [](float v) {
    const auto bits = std::bit_cast<int32_t>(v);
    return bits >= 0 ? int64_t{bits} : -int64_t{bits & 0x7fffffff};
  };
  const auto from_order = [](int64_t order) {
    const auto magnitude = static_cast<uint32_t>(order >= 0 ? order : -order);
    return std::bit_cast<float>(order >= 0 ? magnitude : magnitude | 0x80000000u);
  };
  std::array<float, 15> thresholds{};
  for (int i = 0; i < 15; ++i) {
    int64_t lower = to_order(kNf4Levels[i]), upper = to_order(kNf4Levels[i + 1]);
    while (upper - lower > 1) {
      const int64_t middle = lower + (upper - lower) / 2;
      const float v = from_order(middle);
      (kNf4Levels[i + 1] - v < v - kNf4Levels[i] ? upper : lower) = middle;
    }
    thresholds[i] = from_order(lower);
  }
  return thresholds;
}
__constant__ const std::array<float, 15> kThresholds = nf4_thresholds();
__constant__ const float kLevels[16] = {
    kNf4Levels[0],
    kNf4Levels[1],
    kNf4Levels[2],
    kNf4Levels[3],
    kNf4Levels[4],
    kNf4Levels[5],
    kNf4Levels[6],
    kNf4Levels[7],
    kNf4Levels[8],
    kNf4Levels[9],
    kNf4Levels[10],
    kNf4Levels[11],
    kNf4Levels[12],
    kNf4Levels[13],
    kNf4Levels[14],
    kNf4Levels[15]};

/// An integer below 2²³ as f32 without the slow conversion unit.
__device__ __forceinline__ float small_to_float(uint32_t q) {
  return __fsub_rn(__uint_as_float(q | 0x4b000000u), 8388608.0f);
}

__device__ __forceinline__ float load_scale(const void* data, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::f16) return to_float(static_cast<const f16*>(data)[i]);
  return to_float(static_cast<const bf16*>(data)[i]);
}

__device__ __forceinline__ void store_scale(void* data, DType dtype, size_t i, float v) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = v;
  } else if (dtype == DType::f16) {
    static_cast<f16*>(data)[i] = from_float<f16>(v);
  } else {
    static_cast<bf16*>(data)[i] = from_float<bf16>(v);
  }
}

template <typename T>
__device__ __forceinline__ void load_values(const T* from, float (&v)[kValues]) {
#pragma unroll
  for (uint32_t i = 0; i < kValues; i += Vec16<T>::kCount) {
    const Vec16<T> part = load16(from + i);
#pragma unroll
    for (int j = 0; j < Vec16<T>::kCount; ++j) v[i + j] = to_float(part.v[j]);
  }
}

template <typename T>
__device__ __forceinline__ void store_values(T* to, const float (&v)[kValues]) {
#pragma unroll
  for (uint32_t i = 0; i < kValues; i += Vec16<T>::kCount) {
    Vec16<T> part;
#pragma unroll
    for (int j = 0; j < Vec16<T>::kCount; ++j) part.v[j] = from_float<T>(v[i + j]);
    store16(to + i, part);
  }
}

struct Codes {
  const void* data = nullptr;
  const void* scales = nullptr;
  const void* biases = nullptr;
  size_t steps = 0;  ///< of 8 values
  uint32_t steps_per_group_log2 = 0;
  DType scales_dtype = DType::f32;
  bool double_quant = false;
};

/// The two small tables of NF4, where a lookup costs one shared-memory access: 16 levels in 16
/// banks never conflict.
struct Nf4Tables {
  float levels[16];
  float code[256];
};

__device__ __forceinline__ float nf4_scale(const Codes& w, const Nf4Tables& tables, size_t block) {
  if (!w.double_quant) return static_cast<const float*>(w.scales)[block];
  const auto* nested = static_cast<const float*>(w.biases);
  const float code = tables.code[static_cast<const uint8_t*>(w.scales)[block]];
  const float scaled = __fmul_rn(code, __ldg(nested + kNf4NestedHead + block / kNf4NestedBlock));
  return __fadd_rn(scaled, __ldg(nested));
}

template <WeightFormat kFormat, typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Codes w, T* out) {
  constexpr bool kNf4 = kFormat == WeightFormat::nf4, kBytes = kFormat == WeightFormat::int8;
  // Steps of a thread whose loads are all on their way before the first is used.
  constexpr int kUnroll = 4;
  __shared__ Nf4Tables tables;
  if constexpr (kNf4) {
    if (threadIdx.x < 16) tables.levels[threadIdx.x] = kLevels[threadIdx.x];
  }
  allow_dependents();
  wait_for_previous();
  if constexpr (kNf4) {
    if (w.double_quant)
      tables.code[threadIdx.x] = static_cast<const float*>(w.biases)[1 + threadIdx.x];
    __syncthreads();
  }
  const size_t first = size_t{blockIdx.x} * (kThreads * kUnroll) + threadIdx.x;
  uint32_t words[kUnroll][2];
  float scale[kUnroll], bias[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t step = first + u * kThreads;
    if (step >= w.steps) continue;
    if constexpr (kBytes) {
      const uint2 both = static_cast<const uint2*>(w.data)[step];
      words[u][0] = both.x, words[u][1] = both.y;
    } else {
      words[u][0] = static_cast<const uint32_t*>(w.data)[step];
    }
    const size_t group = step >> w.steps_per_group_log2;
    if constexpr (kNf4) {
      scale[u] = nf4_scale(w, tables, group);
    } else {
      scale[u] = load_scale(w.scales, w.scales_dtype, group);
      bias[u] = load_scale(w.biases, w.scales_dtype, group);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t step = first + u * kThreads;
    if (step >= w.steps) continue;
    float v[kValues];
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) {
      const uint32_t q =
          kBytes ? words[u][i / 4] >> (8 * (i % 4)) & 255u : words[u][0] >> (4 * i) & 15u;
      v[i] = kNf4 ? __fmul_rn(tables.levels[q], scale[u])
                  : __fmaf_rn(small_to_float(q), scale[u], bias[u]);
    }
    store_values(out + step * kValues, v);
  }
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const From* from, To* to, size_t count, bool vectors) {
  const size_t first = (size_t{blockIdx.x} * kThreads + threadIdx.x) * kValues;
  if (vectors && first + kValues <= count) {
    float v[kValues];
    load_values(from + first, v);
    store_values(to + first, v);
    return;
  }
  for (size_t i = first; i < min(first + kValues, count); ++i) {
    to[i] = from_float<To>(to_float(from[i]));
  }
}

/// The threads of a group, 8 values each, agree on f of their values.
template <typename F>
__device__ __forceinline__ float over_group(float v, uint32_t lanes, F f) {
  for (uint32_t offset = 1; offset < lanes; offset *= 2) {
    v = f(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  return v;
}

/// The least and greatest of a group to its scale and bias, so that the edge of larger magnitude
/// and zero are both exact: cpu::quantize_affine, operation by operation.
__device__ __forceinline__ void affine_scale(
    float low, float high, float top, float* scale_out, float* bias_out) {
  constexpr float kSmallestScale = 1e-7f;
  const bool low_is_edge = fabsf(low) > fabsf(high);
  float scale = fmaxf(__fdiv_rn(__fsub_rn(high, low), top), kSmallestScale);
  if (!low_is_edge) scale = -scale;
  const float edge = low_is_edge ? low : high;
  const float q0 = rintf(__fdiv_rn(edge, scale));
  float bias = 0.0f;
  if (q0 != 0.0f) {
    scale = __fdiv_rn(edge, q0);
    bias = edge;
  }
  *scale_out = scale;
  *bias_out = bias;
}

/// rint(v / scale), the quotient rounded first, without a division for each value: the product with
/// 1/scale is off by 2 ulp, at most 2⁻¹⁴ here, which only matters beside the middle of two levels.
__device__ __forceinline__ float nearest_level(float v, float scale, float inverse) {
  const float quotient = __fmul_rn(v, inverse), level = rintf(quotient);
  if (fabsf(__fsub_rn(quotient, level)) < 0.4999f) return level;
  return rintf(__fdiv_rn(v, scale));
}

struct Quantized {
  uint32_t* data = nullptr;
  void* scales = nullptr;
  void* biases = nullptr;
  size_t steps = 0;
  uint32_t steps_per_group_log2 = 0;
  DType scales_dtype = DType::f32;
};

template <typename T>
__device__ __forceinline__ void load_step(
    const T* w, size_t step, size_t steps, bool vectors, float (&v)[kValues]) {
  if (step >= steps) {  // lanes past the end go along for the shuffles
    for (float& value : v) value = 0.0f;
  } else if (vectors) {
    load_values(w + step * kValues, v);
  } else {
#pragma unroll
    for (uint32_t i = 0; i < kValues; ++i) v[i] = to_float(w[step * kValues + i]);
  }
}

template <typename T, bool kBytes>
__global__ void __launch_bounds__(kThreads)
    quantize_affine_kernel(const T* w, Quantized out, bool vectors) {
  const size_t step = size_t{blockIdx.x} * kThreads + threadIdx.x;
  const uint32_t lanes = 1u << out.steps_per_group_log2;
  float v[kValues];
  load_step(w, step, out.steps, vectors, v);
  float low = v[0], high = v[0];
#pragma unroll
  for (uint32_t i = 1; i < kValues; ++i) low = fminf(low, v[i]), high = fmaxf(high, v[i]);
  low = over_group(low, lanes, [](float a, float b) { return fminf(a, b); });
  high = over_group(high, lanes, [](float a, float b) { return fmaxf(a, b); });
  constexpr float kTop = kBytes ? 255.0f : 15.0f;
  float scale, bias;
  affine_scale(low, high, kTop, &scale, &bias);
  const float inverse = __frcp_rn(scale);
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (uint32_t i = 0; i < kValues; ++i) {
    const float level = nearest_level(__fsub_rn(v[i], bias), scale, inverse);
    const auto q = static_cast<uint32_t>(fminf(fmaxf(level, 0.0f), kTop));
    kBytes ? words[i / 4] |= q << (8 * (i % 4)) : words[0] |= q << (4 * i);
  }
  if (step >= out.steps) return;
  if constexpr (kBytes) {
    reinterpret_cast<uint2*>(out.data)[step] = make_uint2(words[0], words[1]);
  } else {
    out.data[step] = words[0];
  }
  if ((step & (lanes - 1)) != 0) return;
  store_scale(out.scales, out.scales_dtype, step >> out.steps_per_group_log2, scale);
  store_scale(out.biases, out.scales_dtype, step >> out.steps_per_group_log2, bias);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_nf4_kernel(const T* w, Quantized out, bool vectors) {
  __shared__ float thresholds[16];
  if (threadIdx.x < 15) thresholds[threadIdx.x] = kThresholds[threadIdx.x];
  __syncthreads();
  const size_t step = size_t{blockIdx.x} * kThreads + threadIdx.x;
  float v[kValues];
  load_step(w, step, out.steps, vectors, v);
  float most = 0.0f;
#pragma unroll
  for (float value : v) most = fmaxf(most, fabsf(value));
  most = over_group(most, kNf4Block / kValues, [](float a, float b) { return fmaxf(a, b); });
  const float inverse = most > 0.0f ? __fdiv_rn(1.0f, most) : 0.0f;
  uint32_t word = 0;
#pragma unroll
  for (uint32_t i = 0; i < kValues; ++i) {
    // The number of thresholds below: no clamp, values beyond ±1 end at the outer levels.
    const float scaled = __fmul_rn(v[i], inverse);
    uint32_t q = 0;
#pragma unroll
    for (uint32_t half = 8; half > 0; half /= 2) q += scaled > thresholds[q + half - 1] ? half : 0;
    word |= q << (4 * i);
  }
  if (step >= out.steps) return;
  out.data[step] = word;
  constexpr uint32_t kLanes = kNf4Block / kValues;
  if (step % kLanes == 0) static_cast<float*>(out.scales)[step / kLanes] = most;
}

unsigned blocks_for(size_t steps, size_t per_block) {
  return static_cast<unsigned>((steps + per_block - 1) / per_block);
}

uint32_t log2_of(uint32_t v) {
  return static_cast<uint32_t>(std::countr_zero(v));
}

void check_groups(const char* op, const WeightParams& p) {
  const bool nf4 = p.format == WeightFormat::nf4;
  const bool known = nf4 ? p.group_size == kNf4Block
                         : p.group_size == 32 || p.group_size == 64 || p.group_size == 128;
  if (!known || p.k % p.group_size != 0) {
    throw std::invalid_argument(
        std::string("[") + op + "] group_size must be " + (nf4 ? "64" : "32, 64 or 128") +
        " and divide k = " + std::to_string(p.k) + " but is " + std::to_string(p.group_size));
  }
}

void check_aligned(const char* op, const char* name, const void* p, size_t bytes) {
  if (is_aligned(p, bytes)) return;
  throw std::invalid_argument(
      std::string("[") + op + "] " + name + " must be aligned to " + std::to_string(bytes) +
      " bytes");
}

template <typename From>
void convert(const Context& context, size_t count, const void* from, DType dtype, void* to) {
  const bool vectors = is_aligned(from) && is_aligned(to);
  with_dtype(dtype, [&](auto zero) {
    using To = decltype(zero);
    convert_kernel<<<blocks_for(count, kThreads * kValues), kThreads, 0, context.stream>>>(
        static_cast<const From*>(from), static_cast<To*>(to), count, vectors);
  });
}

template <WeightFormat kFormat>
void dequantize_codes(const Context& context, const WeightView& w, DType dtype, void* out) {
  const WeightParams& p = w.params;
  check_groups("dequantize", p);
  check_aligned("dequantize", "data", w.data, kFormat == WeightFormat::int8 ? 8 : 4);
  check_aligned("dequantize", "out", out, 16);
  Codes codes;
  codes.data = w.data;
  codes.scales = w.scales;
  codes.biases = w.biases;
  codes.steps = size_t{p.n} * p.k / kValues;
  codes.steps_per_group_log2 = log2_of(p.group_size / kValues);
  codes.scales_dtype = p.scales_dtype;
  codes.double_quant = p.double_quant;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_pdl(
        dequantize_kernel<kFormat, T>,
        blocks_for(codes.steps, kThreads * 4),
        kThreads,
        0,
        context.stream,
        codes,
        static_cast<T*>(out));
  });
}

Quantized quantized_of(const WeightParams& p, void* data, void* scales, void* biases) {
  Quantized q;
  q.data = static_cast<uint32_t*>(data);
  q.scales = scales;
  q.biases = biases;
  q.steps = size_t{p.n} * p.k / kValues;
  q.steps_per_group_log2 = log2_of(p.group_size / kValues);
  q.scales_dtype = p.scales_dtype;
  return q;
}

}  // namespace

void dequantize(const Context& context, const WeightView& w, DType dtype, void* out) {
  const WeightParams& p = w.params;
  if (p.layout != WeightLayout::row_major) {
    throw std::invalid_argument("[dequantize] w must be row_major but is packed for the CPU");
  }
  const size_t count = size_t{p.n} * p.k;
  if (count == 0) return;
  switch (p.format) {
    case WeightFormat::f32:
      convert<float>(context, count, w.data, dtype, out);
      break;
    case WeightFormat::f16:
      convert<f16>(context, count, w.data, dtype, out);
      break;
    case WeightFormat::bf16:
      convert<bf16>(context, count, w.data, dtype, out);
      break;
    case WeightFormat::int4:
      dequantize_codes<WeightFormat::int4>(context, w, dtype, out);
      break;
    case WeightFormat::int8:
      dequantize_codes<WeightFormat::int8>(context, w, dtype, out);
      break;
    case WeightFormat::nf4:
      dequantize_codes<WeightFormat::nf4>(context, w, dtype, out);
      break;
  }
  check_launch("dequantize");
}

void quantize_affine(
    const Context& context,
    const WeightParams& p,
    DType dtype,
    const void* w,
    void* data,
    void* scales,
    void* biases) {
  if (p.format != WeightFormat::int4 && p.format != WeightFormat::int8) {
    throw std::invalid_argument("[quantize_affine] format must be int4 or int8");
  }
  check_groups("quantize_affine", p);
  const bool bytes = p.format == WeightFormat::int8;
  check_aligned("quantize_affine", "data", data, bytes ? 8 : 4);
  const Quantized out = quantized_of(p, data, scales, biases);
  if (out.steps == 0) return;
  const bool vectors = is_aligned(w);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = bytes ? quantize_affine_kernel<T, true> : quantize_affine_kernel<T, false>;
    kernel<<<blocks_for(out.steps, kThreads), kThreads, 0, context.stream>>>(
        static_cast<const T*>(w), out, vectors);
  });
  check_launch("quantize_affine");
}

void quantize_nf4(
    const Context& context,
    const WeightParams& p,
    DType dtype,
    const void* w,
    void* data,
    float* absmax) {
  if (p.format != WeightFormat::nf4 || p.double_quant) {
    throw std::invalid_argument("[quantize_nf4] format must be nf4 with a plain absmax");
  }
  check_groups("quantize_nf4", p);
  const Quantized out = quantized_of(p, data, absmax, nullptr);
  if (out.steps == 0) return;
  const bool vectors = is_aligned(w);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    quantize_nf4_kernel<T><<<blocks_for(out.steps, kThreads), kThreads, 0, context.stream>>>(
        static_cast<const T*>(w), out, vectors);
  });
  check_launch("quantize_nf4");
}

}  // namespace metal_lora::cuda
