// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// NF4's constants, quantisation and dequantisation against bitsandbytes (tests/golden/make_nf4.py)
// and against the definition.
#include "kernels/nf4.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr uint32_t kRows = 17, kColumns = 1024, kSample = 17;

std::vector<uint32_t> read_line(std::istream& in) {
  std::string line;
  std::getline(in, line);
  std::istringstream words(line);
  std::vector<uint32_t> out;
  for (uint32_t word; words >> std::hex >> word;) out.push_back(word);
  return out;
}

std::vector<float> floats_of(const std::vector<uint32_t>& words) {
  std::vector<float> out;
  for (uint32_t word : words) out.push_back(std::bit_cast<float>(word));
  return out;
}

/// The lines of nf4.txt.
struct Golden {
  std::vector<uint32_t> words;
  std::vector<float> absmax;
  std::vector<uint8_t> codes;
  std::vector<float> nested, plain_values, nested_values, levels;

  Golden() {
    std::ifstream in(METAL_LORA_SOURCE_DIR "/tests/golden/nf4.txt");
    words = read_line(in);
    absmax = floats_of(read_line(in));
    for (uint32_t code : read_line(in)) codes.push_back(static_cast<uint8_t>(code));
    nested = floats_of(read_line(in));
    plain_values = floats_of(read_line(in));
    nested_values = floats_of(read_line(in));
    levels = floats_of(read_line(in));
  }
};

/// The tensor of make_nf4.py.
std::vector<float> golden_tensor() {
  std::vector<float> x(kRows * kColumns);
  uint32_t state = 1;
  for (uint32_t i = 0; i < x.size(); ++i) {
    state = state * 1664525u + 1013904223u;
    const auto value = static_cast<float>(static_cast<int32_t>(state >> 8) - (1 << 23));
    x[i] = std::ldexp(value, static_cast<int>(i / 64 % 5) - 24);
  }
  return x;
}

WeightParams nf4_params(uint32_t n, uint32_t k, bool double_quant) {
  WeightParams p;
  p.n = n;
  p.k = k;
  p.format = WeightFormat::nf4;
  p.group_size = kNf4Block;
  p.double_quant = double_quant;
  return p;
}

/// A quantised weight and its storage.
struct Quantised {
  std::vector<uint32_t> words;
  std::vector<float> absmax, nested;
  std::vector<uint8_t> codes;
  WeightView view;

  Quantised(const WeightParams& p, const std::vector<float>& x) {
    const size_t blocks = x.size() / kNf4Block;
    words.resize(x.size() / 8);
    absmax.resize(p.double_quant ? 0 : blocks);
    codes.resize(p.double_quant ? blocks : 0);
    nested.resize(p.double_quant ? kNf4NestedHead + (blocks + 255) / 256 : 0);
    void* scales = p.double_quant ? static_cast<void*>(codes.data()) : absmax.data();
    void* biases = p.double_quant ? nested.data() : nullptr;
    quantize_nf4(p, x.data(), words.data(), scales, biases);
    view = {p, words.data(), scales, biases};
  }
};

class Nf4 : public testing::Test {
 protected:
  void TearDown() override { set_active_isa(detected_isa()); }
  const Golden golden_;
};

TEST_F(Nf4, ConstantsAreBitsandbytes) {
  ASSERT_EQ(golden_.levels.size(), 16u);
  for (size_t i = 0; i < 16; ++i) EXPECT_EQ(kNf4Levels[i], golden_.levels[i]) << i;
  constexpr auto kMap = dynamic_map();
  ASSERT_GT(golden_.nested.size(), 257u);
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(kMap[i], golden_.nested[1 + i]) << i;
}

TEST_F(Nf4, QuantisesAsBitsandbytesDoes) {
  const Quantised q(nf4_params(kRows, kColumns, false), golden_tensor());
  EXPECT_EQ(q.absmax, golden_.absmax);
  EXPECT_EQ(q.words, golden_.words);
}

TEST_F(Nf4, DoubleQuantisesAsBitsandbytesDoes) {
  const Quantised q(nf4_params(kRows, kColumns, true), golden_tensor());
  EXPECT_EQ(q.words, golden_.words);
  ASSERT_EQ(q.nested.size(), golden_.nested.size());
  // The mean of 272 values is summed in another order there: it may differ by the sum's rounding,
  // log2(272) levels of a pairwise sum and the division, and absmax2 by as much.
  const float allowed = 10 * 0x1p-24f * golden_.nested[0];
  EXPECT_NEAR(q.nested[0], golden_.nested[0], allowed);
  for (size_t i = kNf4NestedHead; i < q.nested.size(); ++i) {
    EXPECT_NEAR(q.nested[i], golden_.nested[i], 2 * allowed);
  }
  EXPECT_EQ(q.codes, golden_.codes);
}

TEST_F(Nf4, DequantisesToBitsandbytesValues) {
  Golden golden = golden_;
  const WeightParams plain = nf4_params(kRows, kColumns, false);
  const WeightParams nested = nf4_params(kRows, kColumns, true);
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (!set_active_isa(isa)) continue;
    std::vector<float> out(kRows * kColumns);
    dequantize_rows(
        {plain, golden.words.data(), golden.absmax.data(), nullptr}, 0, kRows, out.data());
    for (size_t i = 0; i < golden.plain_values.size(); ++i) {
      ASSERT_EQ(out[i * kSample], golden.plain_values[i]) << isa_name(isa) << " " << i;
    }
    dequantize_rows(
        {nested, golden.words.data(), golden.codes.data(), golden.nested.data()},
        0,
        kRows,
        out.data());
    for (size_t i = 0; i < golden.nested_values.size(); ++i) {
      ASSERT_EQ(out[i * kSample], golden.nested_values[i]) << isa_name(isa) << " " << i;
    }
  }
}

/// Each value goes to a level that no other level beats.
TEST_F(Nf4, EveryValueGoesToTheNearestLevel) {
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  std::vector<float> x(64 * 64);
  for (float& v : x) v = normal(rng);
  const Quantised q(nf4_params(16, 256, false), x);
  for (size_t i = 0; i < x.size(); ++i) {
    const double absmax = q.absmax[i / 64];
    const double chosen = kNf4Levels[q.words[i / 8] >> (4 * (i % 8)) & 15] * absmax;
    for (double level : kNf4Levels) {
      // Dividing by absmax rounds twice: 2 ulp of a value of at most absmax.
      ASSERT_LE(std::fabs(x[i] - chosen), std::fabs(x[i] - level * absmax) + 0x1p-22 * absmax);
    }
  }
}

TEST_F(Nf4, ZerosStayZeroAndEdgesExact) {
  std::vector<float> x(128, 0.0f);
  x[64] = -3.5f;
  x[65] = 3.5f;
  for (bool double_quant : {false, true}) {
    const Quantised q(nf4_params(2, 64, double_quant), x);
    std::vector<float> out(128);
    dequantize_rows(q.view, 0, 2, out.data());
    for (size_t i = 0; i < 64; ++i) EXPECT_EQ(out[i], 0.0f);
    if (double_quant) {
      EXPECT_NEAR(out[65], 3.5f, 3.5f * 0x1p-22f);  // the map's ends are exact, its sum rounds
    } else {
      EXPECT_EQ(out[64], -3.5f);
      EXPECT_EQ(out[65], 3.5f);
    }
    EXPECT_EQ(out[66], 0.0f);
  }
}

/// The second level costs at most half the widest step of its map: absmax moves by that share of
/// absmax2.
TEST_F(Nf4, DoubleQuantisationErrorIsBounded) {
  const auto x = golden_tensor();
  const Quantised plain(nf4_params(kRows, kColumns, false), x);
  const Quantised nested(nf4_params(kRows, kColumns, true), x);
  constexpr auto kMap = dynamic_map();
  float widest = 0;
  for (size_t i = 0; i + 1 < 256; ++i) widest = std::max(widest, kMap[i + 1] - kMap[i]);
  std::vector<float> absmax(plain.absmax.size());
  nf4_absmax(nested.view, 0, absmax.size(), absmax.data());
  for (size_t i = 0; i < absmax.size(); ++i) {
    const float limit = nested.nested[kNf4NestedHead + i / 256] * widest / 2;
    EXPECT_NEAR(absmax[i], plain.absmax[i], limit * (1 + 0x1p-20f));
  }
}

/// Packing a double-quantised weight keeps its values and codes.
TEST_F(Nf4, PackingDecodesTheSecondLevel) {
  std::mt19937 rng(4);
  std::normal_distribution<float> normal;
  std::vector<float> x(32 * 192);
  for (float& v : x) v = normal(rng);
  const Quantised q(nf4_params(32, 192, true), x);
  std::vector<float> want(x.size()), got(x.size());
  dequantize_rows(q.view, 0, 32, want.data());
  std::vector<uint8_t> packed(packed_weight_bytes(q.view.params));
  EXPECT_EQ(packed.size(), x.size() / 2 + x.size() / 64 * 4);
  pack_weight(q.view, packed.data());
  WeightView view{q.view.params, packed.data(), nullptr, nullptr};
  view.params.layout = WeightLayout::cpu_packed;
  view.params.double_quant = false;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (!set_active_isa(isa)) continue;
    dequantize_rows(view, 0, 32, got.data());
    ASSERT_EQ(got, want) << isa_name(isa);
  }
  std::vector<uint32_t> words(q.words.size());
  std::vector<float> absmax(x.size() / 64), exact(absmax.size());
  unpack_weight(view, words.data(), absmax.data(), nullptr);
  nf4_absmax(q.view, 0, exact.size(), exact.data());
  EXPECT_EQ(words, q.words);
  EXPECT_EQ(absmax, exact);
}

TEST_F(Nf4, QuantisingDoesNotDependOnThreads) {
  const auto x = golden_tensor();
  const int threads = thread_count();
  for (int n : {1, 3}) {
    set_thread_count(n);
    EXPECT_EQ(Quantised(nf4_params(kRows, kColumns, false), x).words, golden_.words);
  }
  set_thread_count(threads);
}

}  // namespace
}  // namespace metal_lora::cpu
