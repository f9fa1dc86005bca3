// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "src/io/affine.h"
#include "src/io/dequantize.h"
#include "src/io/float16.h"
#include "tests/io/test_files.h"

namespace metal_lora::io {
namespace {

using testing::read_text;

constexpr TensorType kBlockTypes[] = {
    TensorType::q4_0,
    TensorType::q4_1,
    TensorType::q5_0,
    TensorType::q5_1,
    TensorType::q8_0,
    TensorType::q4_k,
    TensorType::q5_k,
    TensorType::q6_k};

std::string golden(TensorType type, const std::string& extension) {
  std::string name(tensor_type_name(type));
  for (char& c : name) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  return read_text(std::string(METAL_LORA_SOURCE_DIR) + "/tests/golden/quants/" + name + extension);
}

std::vector<float> dequantized(TensorType type, const std::string& blocks, uint64_t elements) {
  std::vector<float> out(elements);
  dequantize_blocks(type, std::as_bytes(std::span(blocks)).data(), elements, out.data());
  return out;
}

TEST(Float16, EveryHalfConvertsThereAndBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = f16_to_f32(half);
    const int exponent = (half >> 10) & 31;
    const int mantissa = half & 1023;
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_EQ(f32_to_f16(value) & 0x7fff, 0x7e00);
      continue;
    }
    const double magnitude = exponent == 31  ? HUGE_VAL
                             : exponent == 0 ? std::ldexp(mantissa, -24)
                                             : std::ldexp(1024 + mantissa, exponent - 25);
    EXPECT_EQ(value, static_cast<float>((half >> 15) != 0 ? -magnitude : magnitude));
    EXPECT_EQ(f32_to_f16(value), half);
  }
}

TEST(Float16, RoundsToNearestEven) {
  // Midpoints between neighbouring halves go to the even one, a hair beside them to the nearer.
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const double low = f16_to_f32(static_cast<uint16_t>(bits));
    const double high = f16_to_f32(static_cast<uint16_t>(bits + 1));
    const auto middle = static_cast<float>((low + high) / 2);
    EXPECT_EQ(f32_to_f16(middle), bits + (bits & 1));
    EXPECT_EQ(f32_to_f16(std::nextafter(middle, 0.0f)), bits);
    EXPECT_EQ(f32_to_f16(std::nextafter(middle, 1e9f)), bits + 1);
  }
  EXPECT_EQ(f32_to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(-1e30f), 0xfc00);
}

class Blocks : public ::testing::TestWithParam<TensorType> {};

TEST_P(Blocks, DequantizeToTheGoldenBits) {
  const std::string blocks = golden(GetParam(), ".blocks");
  const std::string expected = golden(GetParam(), ".f32");
  ASSERT_EQ(expected.size(), 4096u);
  const auto values = dequantized(GetParam(), blocks, 1024);
  EXPECT_EQ(std::memcmp(values.data(), expected.data(), expected.size()), 0);
}

TEST_P(Blocks, DequantizeAnyRowRange) {
  const std::string blocks = golden(GetParam(), ".blocks");
  const auto bytes = std::as_bytes(std::span(blocks));
  const TensorInfo tensor{"w", GetParam(), {2, 2, 256}, bytes.data(), bytes.size(), nullptr};
  const auto all = dequantized(GetParam(), blocks, 1024);
  for (uint64_t first = 0; first < 4; ++first) {
    for (uint64_t rows = 0; first + rows <= 4; ++rows) {
      std::vector<float> out(rows * 256 + 1, 7.0f);
      ASSERT_TRUE(dequantize_rows(tensor, first, rows, out.data()).ok());
      if (rows > 0) {
        EXPECT_EQ(std::memcmp(out.data(), all.data() + first * 256, rows * 1024), 0);
      }
      EXPECT_EQ(out.back(), 7.0f);
    }
  }
}

TEST_P(Blocks, AffineFormGivesTheSameNumbers) {
  const auto spec = affine_spec(GetParam());
  if (GetParam() == TensorType::q6_k) {
    EXPECT_FALSE(spec.has_value());
    EXPECT_FALSE(to_affine(GetParam(), nullptr, 0, 256, nullptr, nullptr, nullptr).ok());
    return;
  }
  ASSERT_TRUE(spec.has_value());
  constexpr uint64_t kRows = 2;
  constexpr uint64_t kK = 512;
  const std::string blocks = golden(GetParam(), ".blocks");
  std::vector<uint32_t> q(kRows * spec->packed_words_per_row(kK));
  const uint64_t groups = kRows * spec->groups_per_row(kK);
  std::vector<std::byte> scales(groups * spec->scale_bytes());
  std::vector<std::byte> biases(groups * spec->scale_bytes());
  ASSERT_TRUE(to_affine(
                  GetParam(),
                  std::as_bytes(std::span(blocks)).data(),
                  kRows,
                  kK,
                  q.data(),
                  scales.data(),
                  biases.data())
                  .ok());
  const auto constant = [&](const std::vector<std::byte>& from, uint64_t group) {
    float wide = 0;
    uint16_t half = 0;
    if (spec->f32_scales) {
      std::memcpy(&wide, from.data() + 4 * group, 4);
      return wide;
    }
    std::memcpy(&half, from.data() + 2 * group, 2);
    return f16_to_f32(half);
  };
  const auto expected = dequantized(GetParam(), blocks, kRows * kK);
  const auto bits = static_cast<uint64_t>(spec->bits);
  for (uint64_t i = 0; i < expected.size(); ++i) {
    const uint64_t row = i / kK;
    const uint64_t column = i % kK;
    const uint32_t word = q[row * spec->packed_words_per_row(kK) + column * bits / 32];
    const uint32_t level = (word >> (column * bits % 32)) & ((1u << bits) - 1);
    const uint64_t group = i / 32;
    // Equal as numbers: bit for bit, but for the sign of a zero.
    ASSERT_EQ(
        static_cast<float>(level) * constant(scales, group) + constant(biases, group), expected[i])
        << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Blocks, ::testing::ValuesIn(kBlockTypes), [](const auto& info) {
  return std::string(tensor_type_name(info.param));
});

TEST(Affine, RefusesAnOffsetThatF16CannotHold) {
  struct Case {
    TensorType type;
    uint16_t fits;
    size_t bytes;
  };
  // The largest scales: 65504/8, /16, /128 rounded down to a half.
  for (const auto& [type, fits, bytes] :
       {Case{TensorType::q4_0, f32_to_f16(8188), 18},
        Case{TensorType::q5_0, f32_to_f16(4094), 22},
        Case{TensorType::q8_0, f32_to_f16(511.75f), 34}}) {
    std::vector<uint32_t> q(8);
    uint16_t scale = 0;
    uint16_t bias = 0;
    std::vector<std::byte> block(bytes);
    for (const uint16_t sign : {0, 0x8000}) {
      uint16_t half = fits | sign;
      std::memcpy(block.data(), &half, 2);
      EXPECT_TRUE(to_affine(type, block.data(), 1, 32, q.data(), &scale, &bias).ok());
      half = static_cast<uint16_t>(half + 1);
      std::memcpy(block.data(), &half, 2);
      const auto refused = to_affine(type, block.data(), 1, 32, q.data(), &scale, &bias);
      ASSERT_FALSE(refused.ok());
      EXPECT_EQ(refused.error().code, ErrorCode::unsupported);
    }
  }
  EXPECT_FALSE(to_affine(TensorType::q4_0, nullptr, 1, 33, nullptr, nullptr, nullptr).ok());
  EXPECT_FALSE(to_affine(TensorType::q4_k, nullptr, 1, 32, nullptr, nullptr, nullptr).ok());
  EXPECT_FALSE(to_affine(TensorType::f32, nullptr, 1, 32, nullptr, nullptr, nullptr).ok());
}

TEST(Dequantize, ConvertsPlainTypes) {
  const auto check = [](TensorType type, auto value, float expected) {
    std::byte bytes[1 + sizeof(value)];
    std::memcpy(bytes + 1, &value, sizeof(value));
    float out = 0;
    dequantize_blocks(type, bytes + 1, 1, &out);
    EXPECT_EQ(out, expected) << tensor_type_name(type);
  };
  check(TensorType::f64, 0.1, 0.1f);
  check(TensorType::f32, -0.25f, -0.25f);
  check(TensorType::f16, uint16_t{0xc000}, -2.0f);
  check(TensorType::bf16, uint16_t{0xc000}, -2.0f);
  check(TensorType::i8, int8_t{-128}, -128.0f);
  check(TensorType::i16, int16_t{-300}, -300.0f);
  check(TensorType::i32, int32_t{-70000}, -70000.0f);
  check(TensorType::i64, INT64_MIN, -0x1p63f);
  check(TensorType::u8, uint8_t{255}, 255.0f);
  check(TensorType::u16, uint16_t{65535}, 65535.0f);
  check(TensorType::u32, UINT32_MAX, 0x1p32f);
  check(TensorType::u64, UINT64_MAX, 0x1p64f);
  check(TensorType::boolean, uint8_t{1}, 1.0f);
}

// As convert_hf_to_gguf does it: reshape(heads, 2, d/2, …).swapaxes(1, 2).
TEST(UnpermuteRows, UndoesTheConversionOfLlama) {
  for (const uint64_t row_bytes : {1u, 3u, 18u, 64u}) {
    constexpr uint64_t kHeads = 3;
    constexpr uint64_t kHeadDim = 8;
    constexpr uint64_t kRows = kHeads * kHeadDim;
    std::vector<std::byte> original(kRows * row_bytes);
    for (size_t i = 0; i < original.size(); ++i) original[i] = static_cast<std::byte>(i * 31 + 7);
    std::vector<std::byte> permuted(original.size());
    for (uint64_t head = 0; head < kHeads; ++head) {
      for (uint64_t side = 0; side < 2; ++side) {
        for (uint64_t i = 0; i < kHeadDim / 2; ++i) {
          const uint64_t from = head * kHeadDim + side * (kHeadDim / 2) + i;
          const uint64_t to = head * kHeadDim + 2 * i + side;
          std::memcpy(
              permuted.data() + to * row_bytes, original.data() + from * row_bytes, row_bytes);
        }
      }
    }
    std::vector<std::byte> out(original.size());
    ASSERT_TRUE(unpermute_rows(permuted.data(), kRows, row_bytes, kHeads, out.data()).ok());
    EXPECT_EQ(out, original);
  }
  std::byte one{};
  EXPECT_FALSE(unpermute_rows(&one, 9, 1, 3, &one).ok());
  EXPECT_FALSE(unpermute_rows(&one, 8, 1, 3, &one).ok());
  EXPECT_FALSE(unpermute_rows(&one, 8, 1, 0, &one).ok());
}

}  // namespace
}  // namespace metal_lora::io
