// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The formats on the GPU give the CPU's bits: no tolerances here.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <fstream>
#include <sstream>

#include "kernels/cpu/lora_quantized.h"
#include "kernels/cuda/lora_quantized.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::cuda {
namespace {

using test::DeviceBuffer;
constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr size_t kGuard = 64;

size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

/// `values`, which are of f32, rounded to dtype: the bytes that must come out.
std::vector<unsigned char> stored(DType dtype, const std::vector<double>& values) {
  return test::make_array(dtype, values).bytes;
}

std::vector<unsigned char> without_guard(const DeviceBuffer& buffer) {
  auto bytes = buffer.download<unsigned char>();
  for (size_t i = bytes.size() - kGuard; i < bytes.size(); ++i) {
    EXPECT_EQ(bytes[i], 0xff) << "written past the end";
  }
  bytes.resize(bytes.size() - kGuard);
  return bytes;
}

class Quantized : public testing::Test {
 protected:
  void dequantizes(const test::Weight& w);
  void quantizes_affine(const WeightParams& p, const std::vector<float>& values);
  void quantizes_nf4(const WeightParams& p, DType dtype, const std::vector<double>& values);
  std::mt19937 rng_{8};
};

void Quantized::dequantizes(const test::Weight& w) {
  test::TestDevice device;
  const DeviceBuffer data(w.data.bytes), scales(w.scales.bytes), biases(w.biases.bytes);
  for (DType dtype : kDTypes) {
    const DeviceBuffer out(w.values.size() * size_of(dtype) + kGuard);
    const WeightView view{w.params, data.get(), scales.get(), biases.get()};
    dequantize(device.context(), view, dtype, out.get());
    device.finish();
    EXPECT_EQ(without_guard(out), stored(dtype, w.values))
        << "format " << static_cast<int>(w.params.format) << " to " << test::name_of(dtype) << " n "
        << w.params.n << " k " << w.params.k << " group " << w.params.group_size << " scales "
        << test::name_of(w.params.scales_dtype);
  }
}

TEST_F(Quantized, DequantizesEveryFormat) {
  METAL_LORA_NEEDS_GPU();
  for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8}) {
    for (DType scales : kDTypes) {
      for (uint32_t group : {32u, 64u, 128u}) {
        dequantizes(test::random_weight(rng_, format, 33, 3 * group, group, scales));
      }
    }
    dequantizes(test::random_weight(rng_, format, 1, 32));
  }
  for (bool nested : {false, true}) {
    for (uint32_t n : {1u, 31u, 300u}) {
      dequantizes(test::random_weight(
          rng_, WeightFormat::nf4, n, 192, 64, DType::f32, WeightLayout::row_major, nested));
    }
  }
}

TEST_F(Quantized, ConvertsDenseWeights) {
  METAL_LORA_NEEDS_GPU();
  for (WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16}) {
    for (uint32_t k : {1u, 7u, 31u, 64u, 4097u}) {
      dequantizes(test::random_weight(rng_, format, 3, k));
    }
    dequantizes(test::random_weight(rng_, format, 0, 64));
  }
}

TEST_F(Quantized, RefusesWhatItDoesNotRead) {
  METAL_LORA_NEEDS_GPU();
  test::TestDevice device;
  const DeviceBuffer some(4096);
  WeightView w{
      {4, 64, WeightFormat::int4, WeightLayout::row_major, 48}, some.get(), some.get(), some.get()};
  EXPECT_THROW(dequantize(device.context(), w, DType::bf16, some.get()), std::invalid_argument);
  w.params.group_size = 32;
  w.params.layout = WeightLayout::cpu_packed;
  EXPECT_THROW(dequantize(device.context(), w, DType::bf16, some.get()), std::invalid_argument);
}

/// f32 values of p.scales_dtype, which is the input's type too, as ops::quantize has it.
void Quantized::quantizes_affine(const WeightParams& p, const std::vector<float>& values) {
  test::TestDevice device;
  const DType dtype = p.scales_dtype;
  const size_t bits = p.format == WeightFormat::int8 ? 8 : 4, count = values.size();
  const auto w = test::make_array(dtype, {values.begin(), values.end()});
  const std::vector<float> widened(w.values.begin(), w.values.end());
  std::vector<unsigned char> data(count * bits / 8), scales(count / p.group_size * size_of(dtype));
  std::vector<unsigned char> biases(scales.size());
  cpu::quantize_affine(p, widened.data(), data.data(), scales.data(), biases.data());
  const DeviceBuffer w_device(w.bytes), data_device(data.size() + kGuard);
  const DeviceBuffer scales_device(scales.size() + kGuard), biases_device(scales.size() + kGuard);
  quantize_affine(
      device.context(),
      p,
      dtype,
      w_device.get(),
      data_device.get(),
      scales_device.get(),
      biases_device.get());
  device.finish();
  const std::string what = "bits " + std::to_string(bits) + " group " +
                           std::to_string(p.group_size) + " " + test::name_of(dtype);
  EXPECT_EQ(without_guard(data_device), data) << what;
  EXPECT_EQ(without_guard(scales_device), scales) << what;
  EXPECT_EQ(without_guard(biases_device), biases) << what;
}

TEST_F(Quantized, QuantizesAsTheCpuDoes) {
  METAL_LORA_NEEDS_GPU();
  std::normal_distribution<float> normal;
  for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8}) {
    for (DType dtype : kDTypes) {
      for (uint32_t group : {32u, 64u, 128u}) {
        WeightParams p{33, 3 * group, format, WeightLayout::row_major, group, dtype};
        std::vector<float> values(size_t{p.n} * p.k);
        // Rows of several sizes, of one sign, constant, zero, and of few distinct values (ties).
        for (size_t i = 0; i < values.size(); ++i) {
          const size_t row = i / p.k;
          const float v = std::ldexp(normal(rng_), static_cast<int>(row % 7) - 3);
          values[i] = row % 5 == 1    ? std::fabs(v) + 1
                      : row % 5 == 2  ? 0.25f
                      : row % 11 == 3 ? 0.0f
                      : row % 5 == 4  ? static_cast<float>(static_cast<int>(i % 31) - 15) / 2
                                      : v;
        }
        quantizes_affine(p, values);
      }
    }
  }
}

template <typename T>
std::vector<T> read_words(std::istream& in) {
  std::string line;
  std::getline(in, line);
  std::istringstream words(line);
  std::vector<T> out;
  for (uint32_t word; words >> std::hex >> word;) out.push_back(std::bit_cast<T>(word));
  return out;
}

/// tests/golden/make_quantize.py: mx.quantize's own.
TEST_F(Quantized, QuantizesAsMlxDoes) {
  METAL_LORA_NEEDS_GPU();
  std::ifstream in(METAL_LORA_SOURCE_DIR "/tests/golden/quantize.txt");
  ASSERT_TRUE(in.good());
  test::TestDevice device;
  int cases = 0;
  for (std::string line; std::getline(in, line); ++cases) {
    std::istringstream head(line);
    uint32_t bits = 0;
    std::string name;
    WeightParams p;
    head >> bits >> p.group_size >> name >> p.n >> p.k;
    p.format = bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
    p.scales_dtype = name == "f32" ? DType::f32 : name == "f16" ? DType::f16 : DType::bf16;
    const auto x = read_words<float>(in);
    const auto words = read_words<uint32_t>(in);
    const auto scales = read_words<float>(in), biases = read_words<float>(in);
    const DType dtype = p.scales_dtype;
    const DeviceBuffer w(stored(dtype, {x.begin(), x.end()})), data(words.size() * 4 + kGuard);
    const DeviceBuffer s(scales.size() * size_of(dtype) + kGuard), b(s.bytes());
    quantize_affine(device.context(), p, dtype, w.get(), data.get(), s.get(), b.get());
    device.finish();
    std::vector<unsigned char> want(words.size() * 4);
    std::memcpy(want.data(), words.data(), want.size());
    EXPECT_EQ(without_guard(data), want) << line;
    EXPECT_EQ(without_guard(s), stored(dtype, {scales.begin(), scales.end()})) << line;
    EXPECT_EQ(without_guard(b), stored(dtype, {biases.begin(), biases.end()})) << line;
  }
  EXPECT_EQ(cases, 19);
}

void Quantized::quantizes_nf4(
    const WeightParams& p, DType dtype, const std::vector<double>& values) {
  test::TestDevice device;
  const auto w = test::make_array(dtype, values);
  const std::vector<float> widened(w.values.begin(), w.values.end());
  std::vector<unsigned char> data(values.size() / 2), absmax(values.size() / 64 * 4);
  cpu::quantize_nf4(p, widened.data(), data.data(), absmax.data(), nullptr);
  const DeviceBuffer w_device(w.bytes), data_device(data.size() + kGuard);
  const DeviceBuffer absmax_device(absmax.size() + kGuard);
  quantize_nf4(
      device.context(), p, dtype, w_device.get(), data_device.get(), absmax_device.get<float>());
  device.finish();
  EXPECT_EQ(without_guard(data_device), data) << test::name_of(dtype);
  EXPECT_EQ(without_guard(absmax_device), absmax) << test::name_of(dtype);
}

TEST_F(Quantized, QuantizesNf4AsTheCpuDoes) {
  METAL_LORA_NEEDS_GPU();
  for (DType dtype : kDTypes) {
    WeightParams p{37, 320, WeightFormat::nf4, WeightLayout::row_major, 64};
    std::normal_distribution<double> normal;
    std::vector<double> values(size_t{p.n} * p.k);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = i / p.k % 9 == 3 ? 0.0 : normal(rng_) * std::ldexp(1.0, int(i / 64 % 5) - 2);
    }
    quantizes_nf4(p, dtype, values);
  }
  // Values around every middle between two levels, the last bits of which decide.
  WeightParams p{15, 64, WeightFormat::nf4, WeightLayout::row_major, 64};
  std::vector<double> values;
  for (int i = 0; i < 15; ++i) {
    values.push_back(1.0);
    float v = (kNf4Levels[i] + kNf4Levels[i + 1]) / 2;
    for (int j = 0; j < 31; ++j) v = std::nextafter(v, -2.0f);
    for (int j = 0; j < 63; ++j, v = std::nextafter(v, 2.0f)) values.push_back(v);
  }
  quantizes_nf4(p, DType::f32, values);
  // Blocks whose absmax has no finite inverse.
  std::vector<double> subnormal(128, 0x1p-140);
  subnormal[3] = -0x1p-149, subnormal[4] = 0.0, subnormal[70] = 0x1p-128;
  quantizes_nf4({2, 64, WeightFormat::nf4, WeightLayout::row_major, 64}, DType::f32, subnormal);
}

/// tests/golden/make_nf4.py: bitsandbytes' own.
TEST_F(Quantized, QuantizesNf4AsBitsandbytesDoes) {
  METAL_LORA_NEEDS_GPU();
  std::ifstream in(METAL_LORA_SOURCE_DIR "/tests/golden/nf4.txt");
  ASSERT_TRUE(in.good());
  const auto words = read_words<uint32_t>(in), absmax = read_words<uint32_t>(in);
  constexpr uint32_t kRows = 17, kLength = 1024;
  std::vector<float> x(kRows * kLength);
  uint32_t state = 1;
  for (uint32_t i = 0; i < x.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    const auto value = static_cast<float>(static_cast<int32_t>(state >> 8) - (1 << 23));
    x[i] = std::ldexp(value, static_cast<int>(i / 64 % 5) - 24);
  }
  test::TestDevice device;
  const DeviceBuffer w(x), data(words.size() * 4), scales(absmax.size() * 4);
  const WeightParams p{kRows, kLength, WeightFormat::nf4, WeightLayout::row_major, 64};
  quantize_nf4(device.context(), p, DType::f32, w.get(), data.get(), scales.get<float>());
  device.finish();
  EXPECT_EQ(data.download<uint32_t>(), words);
  EXPECT_EQ(scales.download<uint32_t>(), absmax);
}

}  // namespace
}  // namespace metal_lora::cuda
