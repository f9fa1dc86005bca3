// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// f64 references and random operands for the linear kernels' tests. Conversions are written here
// again, from the formats' definitions, so that a kernel is not compared with itself.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/lora_kernels.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/nf4.h"

namespace metal_lora::test {

/// Rounds to `precision` significant bits (nearest, ties to even), smallest exponent
/// `min_exponent`.
inline double round_to(double x, int precision, int min_exponent) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const double unit = std::ldexp(1.0, exponent - precision + 1);
  return std::nearbyint(x / unit) * unit;
}

/// Unit roundoff: half the distance from 1 to the next number.
inline double roundoff(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}

inline uint16_t half_bits(double x, DType dtype) {
  if (dtype == DType::bf16) {
    const float f = static_cast<float>(round_to(x, 8, -126));
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(f) >> 16);
  }
  const double r = round_to(x, 11, -14);
  if (r == 0) return 0;
  const int exponent = std::max(std::ilogb(r), -14);
  const uint32_t mantissa = static_cast<uint32_t>(std::ldexp(std::fabs(r), 10 - exponent));
  const uint32_t biased = mantissa >= 1024 ? static_cast<uint32_t>(exponent + 15) : 0;
  return static_cast<uint16_t>((r < 0 ? 0x8000u : 0u) | biased << 10 | (mantissa & 1023u));
}

inline double half_value(uint16_t h, DType dtype) {
  if (dtype == DType::bf16) return std::bit_cast<float>(uint32_t{h} << 16);
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (h & 0x8000) ? -magnitude : magnitude;
}

/// A stored array and its values.
struct Array {
  DType dtype = DType::f32;
  std::vector<unsigned char> bytes;
  std::vector<double> values;
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
};

inline double stored_value(const void* data, DType dtype, size_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  return half_value(static_cast<const uint16_t*>(data)[i], dtype);
}

inline Array make_array(DType dtype, const std::vector<double>& values) {
  Array a;
  a.dtype = dtype;
  a.bytes.resize(values.size() * (dtype == DType::f32 ? 4 : 2));
  for (size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::f32) {
      const float f = static_cast<float>(values[i]);
      std::memcpy(a.bytes.data() + 4 * i, &f, 4);
    } else {
      const uint16_t h = half_bits(values[i], dtype);
      std::memcpy(a.bytes.data() + 2 * i, &h, 2);
    }
    a.values.push_back(stored_value(a.data(), dtype, i));
  }
  return a;
}

inline Array random_array(std::mt19937& rng, DType dtype, size_t count, double size = 1.0) {
  std::normal_distribution<double> normal(0.0, size);
  std::vector<double> values(count);
  for (double& v : values) v = normal(rng);
  return make_array(dtype, values);
}

/// A base weight in any format and layout, with its exact values.
struct Weight {
  WeightParams params;
  Array data, scales, biases;
  std::vector<unsigned char> packed;
  std::vector<double> values;  ///< [n, k]
  cpu::WeightView view() const {
    if (params.layout == WeightLayout::cpu_packed) return {params, packed.data(), nullptr, nullptr};
    return {params, data.data(), scales.data(), biases.data()};
  }
};

inline void fill_affine(std::mt19937& rng, Weight& w) {
  WeightParams& p = w.params;
  const uint32_t bits = p.format == WeightFormat::int4 ? 4 : 8, per_word = 32 / bits;
  const size_t groups = size_t{p.n} * p.k / p.group_size;
  w.scales = random_array(rng, p.scales_dtype, groups, bits == 4 ? 0.1 : 0.01);
  w.biases = random_array(rng, p.scales_dtype, groups, 0.5);
  std::vector<uint32_t> words(size_t{p.n} * p.k / per_word);
  for (uint32_t& word : words) word = rng();
  w.data.bytes.resize(words.size() * 4);
  std::memcpy(w.data.bytes.data(), words.data(), words.size() * 4);
  for (size_t i = 0; i < size_t{p.n} * p.k; ++i) {
    const uint32_t q = words[i / per_word] >> (bits * (i % per_word)) & ((1u << bits) - 1);
    const float scale = static_cast<float>(w.scales.values[i / p.group_size]);
    const float bias = static_cast<float>(w.biases.values[i / p.group_size]);
    w.values.push_back(std::fma(static_cast<float>(q), scale, bias));
  }
}

/// absmax of an NF4 weight from what is stored: product and sum rounded to f32 one after the other.
inline float nf4_absmax_of(const uint8_t* codes, const float* nested, size_t i) {
  const float scaled =
      static_cast<float>(double{nested[1 + codes[i]]} * double{nested[257 + i / 256]});
  return static_cast<float>(double{scaled} + double{nested[0]});
}

inline void fill_nf4(std::mt19937& rng, Weight& w) {
  WeightParams& p = w.params;
  const size_t count = size_t{p.n} * p.k, blocks = count / 64;
  std::uniform_real_distribution<double> size(0.5, 2.0);
  std::vector<double> absmax(blocks);
  for (double& a : absmax) a = size(rng);
  w.scales = make_array(DType::f32, absmax);
  if (p.double_quant) {
    std::vector<double> nested(257 + (blocks + 255) / 256);
    nested[0] = 1.25;
    for (size_t i = 0; i < 256; ++i) nested[1 + i] = (static_cast<double>(i) - 128) / 128;
    for (size_t i = 257; i < nested.size(); ++i) nested[i] = size(rng) / 3;
    w.biases = make_array(DType::f32, nested);
    w.scales.bytes.resize(blocks);
    const auto* stored = reinterpret_cast<const float*>(w.biases.bytes.data());
    for (size_t i = 0; i < blocks; ++i) {
      w.scales.bytes[i] = static_cast<unsigned char>(rng());
      w.scales.values[i] = nf4_absmax_of(w.scales.bytes.data(), stored, i);
    }
  }
  w.data.bytes.resize(count / 2);
  for (unsigned char& byte : w.data.bytes) byte = static_cast<unsigned char>(rng());
  for (size_t i = 0; i < count; ++i) {
    const uint32_t q = w.data.bytes[i / 2] >> (4 * (i % 2)) & 15u;
    w.values.push_back(static_cast<float>(double{kNf4Levels[q]} * w.scales.values[i / 64]));
  }
}

inline Weight random_weight(
    std::mt19937& rng,
    WeightFormat format,
    uint32_t n,
    uint32_t k,
    uint32_t group_size = 32,
    DType scales_dtype = DType::f32,
    WeightLayout layout = WeightLayout::row_major,
    bool double_quant = false) {
  Weight w;
  w.params = {n, k, format, WeightLayout::row_major, 0, scales_dtype};
  if (format <= WeightFormat::bf16) {
    w.data = random_array(rng, static_cast<DType>(format), size_t{n} * k);
    w.values = w.data.values;
    return w;
  }
  w.params.group_size = group_size;
  w.params.double_quant = double_quant;
  format == WeightFormat::nf4 ? fill_nf4(rng, w) : fill_affine(rng, w);
  if (layout == WeightLayout::cpu_packed) {
    w.packed.resize(cpu::packed_weight_bytes(w.params));
    cpu::pack_weight(w.view(), w.packed.data());
    w.params.layout = layout;
    w.params.double_quant = false;
  }
  return w;
}

/// Sums of products and of their absolute values: what an error bound is made of.
struct Sums {
  std::vector<double> value, magnitude;
};

/// Σ_p a(i, p)·b(p, j).
template <class A, class B>
Sums multiply(size_t m, size_t n, size_t k, A a, B b) {
  Sums s{std::vector<double>(m * n), std::vector<double>(m * n)};
  for (size_t i = 0; i < m; ++i) {
    for (size_t p = 0; p < k; ++p) {
      const double x = a(i, p);
      for (size_t j = 0; j < n; ++j) {
        const double t = x * b(p, j);
        s.value[i * n + j] += t;
        s.magnitude[i * n + j] += std::fabs(t);
      }
    }
  }
  return s;
}

/// Roundoff of the multiplication itself: operands that are not bf16 already are rounded to it.
inline double compute_roundoff(DType dtype) {
  return dtype == DType::bf16 && cpu::active_isa() == cpu::Isa::avx512_bf16 ? 0x1p-8 : 0x1p-24;
}

inline std::vector<cpu::Isa> machine_isas() {
  std::vector<cpu::Isa> isas;
  for (cpu::Isa isa :
       {cpu::Isa::scalar,
        cpu::Isa::avx2,
        cpu::Isa::avx512,
        cpu::Isa::avx512_bf16,
        cpu::Isa::neon}) {
    if (cpu::isa_supported(isa)) isas.push_back(isa);
  }
  return isas;
}

/// Restores the instruction set and thread count at the end of a test.
struct KernelSettings {
  cpu::Isa isa = cpu::active_isa();
  int threads = cpu::thread_count();
  ~KernelSettings() {
    cpu::set_active_isa(isa);
    cpu::set_thread_count(threads);
  }
};

inline std::string name_of(DType d) {
  return d == DType::f32 ? "f32" : d == DType::f16 ? "f16" : "bf16";
}

}  // namespace metal_lora::test
