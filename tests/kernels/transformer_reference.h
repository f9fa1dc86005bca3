// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Shared by the tests of the transformer kernels: typed buffers, every instruction set, f64
// helpers.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/transformer_inline.h"
#include "kernels/params.h"

namespace metal_lora::cpu::transformer_test {

inline constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

/// Half the distance between neighbours, relative: what storing a value costs.
inline double unit_roundoff(DType dtype) {
  return dtype == DType::f32 ? 0x1p-24 : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
}
/// Rounding below the smallest normal number is absolute: half a step of the subnormals. (bf16 dot
/// products and conversions may flush subnormals to 0: a whole normal.)
inline double smallest_step(DType dtype) {
  return dtype == DType::f16 ? 0x1p-25 : 0x1p-126;
}

inline std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (isa_supported(isa)) isas.push_back(isa);
  }
  return isas;
}

/// Runs the test body once per instruction set; restores the default at the end.
class EachIsa : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { ASSERT_TRUE(set_active_isa(GetParam())); }
  void TearDown() override {
    set_active_isa(detected_isa());
    set_thread_count(default_threads_);
  }

 private:
  int default_threads_ = thread_count();
};
inline std::string isa_test_name(const ::testing::TestParamInfo<Isa>& info) {
  return std::string(isa_name(info.param));
}
#define METAL_LORA_EACH_ISA(suite)                                       \
  INSTANTIATE_TEST_SUITE_P(                                              \
      Isa,                                                               \
      suite,                                                             \
      ::testing::ValuesIn(::metal_lora::cpu::transformer_test::supported_isas()), \
      ::metal_lora::cpu::transformer_test::isa_test_name)

/// Elements of a dtype; values() are what is really stored.
class Buffer {
 public:
  Buffer(DType dtype, size_t count)
      : dtype_(dtype), count_(count), bytes_(count * size() + 1, 0xa5) {}
  Buffer(DType dtype, const std::vector<float>& x) : Buffer(dtype, x.size()) {
    convert_range(count_, DType::f32, x.data(), dtype_, data());
  }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  DType dtype() const { return dtype_; }
  std::vector<double> values() const {
    std::vector<float> x(count_);
    convert_range(count_, dtype_, data(), DType::f32, x.data());
    return {x.begin(), x.end()};
  }
  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }
  size_t size() const { return dtype_ == DType::f32 ? 4 : 2; }

 private:
  DType dtype_;
  size_t count_;
  std::vector<uint8_t> bytes_;  // one byte longer: a write past the end shows
};

inline std::vector<float> random_floats(
    size_t count, uint32_t seed, float low = -1, float high = 1) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> x(count);
  for (float& v : x) v = uniform(rng);
  return x;
}

/// |got - want| <= bound, element by element; reports the worst one.
inline void expect_within(
    const std::vector<double>& got,
    const std::vector<double>& want,
    const std::vector<double>& bound,
    const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  size_t worst = 0, wrong = 0;
  double worst_ratio = -1;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(got[i] - want[i]);
    const bool good = error <= bound[i] || got[i] == want[i];
    if (!good) ++wrong;
    const double ratio = std::isnan(error) ? INFINITY : error / (bound[i] + 1e-300);
    if (ratio > worst_ratio) worst_ratio = ratio, worst = i;
  }
  EXPECT_EQ(wrong, 0u) << what << ": of " << got.size() << ", worst at " << worst << ": got "
                       << got[worst] << ", want " << want[worst] << " within " << bound[worst];
}

}  // namespace metal_lora::cpu::transformer_test
