// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/lora_quantized.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <random>
#include <sstream>
#include <vector>

#include "kernels/cpu/gemv_kernels.h"
#include "kernels/nf4.h"

namespace metal_lora::cpu {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

std::vector<Isa> isas() {
  std::vector<Isa> out;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (isa_supported(isa)) out.push_back(isa);
  }
  return out;
}

struct RowMajor {
  WeightView view;
  std::vector<uint8_t> data, scales, biases;
  std::vector<float> exact;  // fma(q, scale, bias), one rounding
};

RowMajor random_nf4(const WeightParams& p, std::mt19937& rng);

RowMajor random_weight(const WeightParams& p, std::mt19937& rng) {
  if (p.format == WeightFormat::nf4) return random_nf4(p, rng);
  RowMajor w;
  const uint32_t bits = p.format == WeightFormat::int4 ? 4 : 8;
  const size_t count = size_t{p.n} * p.k, groups = count / p.group_size;
  w.data.resize(count * bits / 8);
  for (uint8_t& byte : w.data) byte = static_cast<uint8_t>(rng());
  w.scales.resize(groups * dtype_bytes(p.scales_dtype));
  w.biases.resize(w.scales.size());
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < groups; ++i) {
    write_float(w.scales.data(), p.scales_dtype, i, normal(rng));
    write_float(w.biases.data(), p.scales_dtype, i, normal(rng));
  }
  for (size_t i = 0; i < count; ++i) {
    const uint8_t byte = w.data[i * bits / 8];
    const auto q = static_cast<float>(bits == 8 ? byte : byte >> (4 * (i & 1)) & 15);
    const size_t g = i / p.group_size;
    w.exact.push_back(std::fma(
        q,
        read_float(w.scales.data(), p.scales_dtype, g),
        read_float(w.biases.data(), p.scales_dtype, g)));
  }
  w.view = {p, w.data.data(), w.scales.data(), w.biases.data()};
  return w;
}

/// The same of NF4: level·absmax, one rounding.
RowMajor random_nf4(const WeightParams& p, std::mt19937& rng) {
  RowMajor w;
  const size_t count = size_t{p.n} * p.k, blocks = count / kNf4Block;
  w.data.resize(count / 2);
  for (uint8_t& byte : w.data) byte = static_cast<uint8_t>(rng());
  std::uniform_real_distribution<float> size(0.1f, 3.0f);
  std::vector<float> absmax(blocks);
  if (p.double_quant) {
    w.scales.resize(blocks);
    for (uint8_t& code : w.scales) code = static_cast<uint8_t>(rng());
    std::vector<float> nested(kNf4NestedHead + (blocks + 255) / 256);
    for (float& v : nested) v = size(rng);
    w.biases.resize(nested.size() * 4);
    std::memcpy(w.biases.data(), nested.data(), w.biases.size());
    for (size_t i = 0; i < blocks; ++i) {
      const double product = double{nested[1 + w.scales[i]]} * double{nested[257 + i / 256]};
      absmax[i] = static_cast<float>(double{static_cast<float>(product)} + double{nested[0]});
    }
  } else {
    for (float& v : absmax) v = size(rng);
    w.scales.resize(blocks * 4);
    std::memcpy(w.scales.data(), absmax.data(), w.scales.size());
  }
  for (size_t i = 0; i < count; ++i) {
    const int q = w.data[i / 2] >> (4 * (i & 1)) & 15;
    w.exact.push_back(static_cast<float>(double{kNf4Levels[q]} * double{absmax[i / kNf4Block]}));
  }
  w.view = {p, w.data.data(), w.scales.data(), p.double_quant ? w.biases.data() : nullptr};
  return w;
}

/// Scalar code without a fused multiply-add rounds q·scale first, which matters where the product
/// needs more than 24 bits: f32 scales only.
float allowed(const WeightParams& p, Isa isa, float value, float bias_size) {
  if (isa != Isa::scalar || p.scales_dtype != DType::f32) return 0.0f;
  if (p.format == WeightFormat::nf4) return 0.0f;
  return 0x1p-23f * (std::fabs(value) + 2 * bias_size);
}

std::vector<WeightParams> all_params() {
  std::vector<WeightParams> out;
  for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8}) {
    for (DType scales : kDTypes) {
      for (uint32_t group : {32u, 64u, 128u}) {
        WeightParams p;
        p.n = 48;
        p.k = 3 * group;
        p.format = format;
        p.group_size = group;
        p.scales_dtype = scales;
        out.push_back(p);
      }
    }
  }
  for (uint32_t k : {64u, 320u}) {
    WeightParams p;
    p.n = 48 * 64;  // more than one block of 256 absmax
    p.k = k;
    p.format = WeightFormat::nf4;
    p.group_size = kNf4Block;
    out.push_back(p);
  }
  return out;
}

class Quantized : public testing::Test {
 protected:
  void TearDown() override { set_active_isa(detected_isa()); }
  std::mt19937 rng_{11};
};

TEST_F(Quantized, CanPackOnlyWhatHasAPackedForm) {
  WeightParams p = all_params().front();
  EXPECT_TRUE(can_pack(p));
  for (uint32_t n : {0u, 8u, 17u}) {
    WeightParams q = p;
    q.n = n;
    EXPECT_FALSE(can_pack(q)) << n;
  }
  p.k = 40;
  EXPECT_FALSE(can_pack(p));
  p = all_params().front();
  p.group_size = 16;
  EXPECT_FALSE(can_pack(p));
  p = all_params().front();
  p.format = WeightFormat::f16;
  EXPECT_FALSE(can_pack(p));
  p = all_params().back();
  EXPECT_TRUE(can_pack(p));
  p.k = 96;
  EXPECT_FALSE(can_pack(p));
  p.k = 128;
  p.group_size = 128;
  EXPECT_FALSE(can_pack(p));
}

TEST_F(Quantized, PackingKeepsEveryBitAndNoByteMore) {
  for (WeightParams p : all_params()) {
    const RowMajor w = random_weight(p, rng_);
    const size_t bytes = packed_weight_bytes(p);
    EXPECT_EQ(bytes, w.data.size() + w.scales.size() + w.biases.size());
    std::vector<uint8_t> packed(bytes);
    pack_weight(w.view, packed.data());
    WeightView view{p, packed.data(), nullptr, nullptr};
    view.params.layout = WeightLayout::cpu_packed;
    std::vector<uint8_t> data(w.data.size()), scales(w.scales.size()), biases(w.biases.size());
    unpack_weight(view, data.data(), scales.data(), biases.data());
    EXPECT_EQ(data, w.data);
    EXPECT_EQ(scales, w.scales);
    EXPECT_EQ(biases, w.biases);
  }
}

TEST_F(Quantized, DequantizedRowsAreTheFormula) {
  for (WeightParams p : all_params()) {
    const RowMajor w = random_weight(p, rng_);
    std::vector<uint8_t> packed(packed_weight_bytes(p));
    pack_weight(w.view, packed.data());
    WeightView packed_view{p, packed.data(), nullptr, nullptr};
    packed_view.params.layout = WeightLayout::cpu_packed;
    for (Isa isa : isas()) {
      ASSERT_TRUE(set_active_isa(isa));
      for (const WeightView& view : {w.view, packed_view}) {
        for (const auto& [row0, rows] : {std::pair{0u, 48u}, {7u, 1u}, {15u, 18u}, {3u, 0u}}) {
          std::vector<float> out(size_t{rows} * p.k + 1, 77.0f);
          dequantize_rows(view, row0, rows, out.data());
          for (size_t i = 0; i < size_t{rows} * p.k; ++i) {
            const float want = w.exact[size_t{row0} * p.k + i];
            ASSERT_NEAR(out[i], want, allowed(p, isa, want, 6.0f)) << isa_name(isa);
          }
          ASSERT_EQ(out.back(), 77.0f);
        }
      }
    }
  }
}

TEST_F(Quantized, DenseRowsWiden) {
  std::normal_distribution<float> normal;
  for (WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16}) {
    WeightParams p;
    p.n = 5;
    p.k = 37;
    p.format = format;
    std::vector<uint8_t> data(5 * 37 * 4);
    for (size_t i = 0; i < 5 * 37; ++i) {
      write_float(data.data(), static_cast<DType>(format), i, normal(rng_));
    }
    for (Isa isa : isas()) {
      ASSERT_TRUE(set_active_isa(isa));
      std::vector<float> out(3 * 37);
      dequantize_rows({p, data.data(), nullptr, nullptr}, 2, 3, out.data());
      for (size_t i = 0; i < out.size(); ++i) {
        ASSERT_EQ(out[i], read_float(data.data(), static_cast<DType>(format), 2 * 37 + i));
      }
    }
  }
}

TEST_F(Quantized, PanelsAsBf16PairsRoundTheSameValues) {
  for (WeightParams p : all_params()) {
    const RowMajor w = random_weight(p, rng_);
    std::vector<uint8_t> packed(packed_weight_bytes(p));
    pack_weight(w.view, packed.data());
    WeightView view{p, packed.data(), nullptr, nullptr};
    view.params.layout = WeightLayout::cpu_packed;
    for (Isa isa : isas()) {
      ASSERT_TRUE(set_active_isa(isa));
      std::vector<float> rows(size_t{p.n} * p.k);
      dequantize_rows(view, 0, p.n, rows.data());
      for (const auto& [k0, k1] : {std::pair{0u, p.k}, {8u, p.k - 8}, {24u, 40u}}) {
        std::vector<uint16_t> out(size_t{k1 - k0} * kPanelRows);
        gemv_kernels().panel_bf16(view, 2, k0, k1, out.data());
        for (uint32_t k = k0; k < k1; ++k) {
          for (uint32_t r = 0; r < kPanelRows; ++r) {
            const float value = rows[(2 * kPanelRows + r) * size_t{p.k} + k];
            ASSERT_EQ(
                out[(size_t{(k - k0) / 2} * kPanelRows + r) * 2 + (k & 1)], bf16_of_float(value))
                << isa_name(isa) << " " << value;
          }
        }
      }
    }
  }
}

TEST_F(Quantized, ScalarConversionsRoundToNearestEven) {
  for (uint32_t h = 0; h < 0x10000; ++h) {  // every 16-bit value comes back
    const auto bits = static_cast<uint16_t>(h);
    const float half = float_of_half(bits), brain = float_of_bf16(bits);
    if (!std::isnan(half)) {
      ASSERT_EQ(half_of_float(half), bits);
    }
    if (!std::isnan(brain)) {
      ASSERT_EQ(bf16_of_float(brain), bits);
    }
  }
  EXPECT_EQ(half_of_float(1.0f + 0x1p-11f), 0x3c00);             // tie to even, down
  EXPECT_EQ(half_of_float(1.0f + 0x1p-10f + 0x1p-11f), 0x3c02);  // tie to even, up
  EXPECT_EQ(half_of_float(0x1p-25f), 0x0000);                    // half of the smallest: to even
  EXPECT_EQ(half_of_float(0x1.8p-24f), 0x0002);
  EXPECT_EQ(half_of_float(65519.0f), 0x7bff);
  EXPECT_EQ(half_of_float(65520.0f), 0x7c00);
  EXPECT_EQ(bf16_of_float(1.0f + 0x1p-8f), 0x3f80);
  EXPECT_EQ(bf16_of_float(1.0f + 0x1p-7f + 0x1p-8f), 0x3f82);
}

template <class T>
std::vector<T> read_words(std::istream& in) {
  std::string line;
  std::getline(in, line);
  std::istringstream words(line);
  std::vector<T> out;
  for (uint32_t word; words >> std::hex >> word;) {
    if constexpr (std::is_same_v<T, float>) {
      out.push_back(float_of_bits(word));
    } else {
      out.push_back(word);
    }
  }
  return out;
}

TEST_F(Quantized, QuantizesAsMlxDoes) {
  std::ifstream in(METAL_LORA_SOURCE_DIR "/tests/golden/quantize.txt");
  ASSERT_TRUE(in.good());
  int cases = 0;
  for (std::string line; std::getline(in, line); ++cases) {
    std::istringstream head(line);
    uint32_t bits = 0;
    std::string dtype;
    WeightParams p;
    head >> bits >> p.group_size >> dtype >> p.n >> p.k;
    p.format = bits == 4 ? WeightFormat::int4 : WeightFormat::int8;
    p.scales_dtype = dtype == "f32" ? DType::f32 : dtype == "f16" ? DType::f16 : DType::bf16;
    const auto x = read_words<float>(in);
    const auto words = read_words<uint32_t>(in);
    const auto scales = read_words<float>(in), biases = read_words<float>(in);
    ASSERT_EQ(x.size(), size_t{p.n} * p.k);
    std::vector<uint32_t> got(words.size());
    std::vector<uint8_t> got_scales(scales.size() * 4), got_biases(biases.size() * 4);
    quantize_affine(p, x.data(), got.data(), got_scales.data(), got_biases.data());
    EXPECT_EQ(got, words) << line;
    for (size_t i = 0; i < scales.size(); ++i) {
      EXPECT_EQ(read_float(got_scales.data(), p.scales_dtype, i), scales[i]) << line;
      EXPECT_EQ(read_float(got_biases.data(), p.scales_dtype, i), biases[i]) << line;
    }
  }
  EXPECT_EQ(cases, 19);
}

}  // namespace
}  // namespace metal_lora::cpu
