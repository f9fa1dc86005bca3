// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Quantising and dequantising as ops, on the CPU and, where METAL_LORA_BACKEND=emulator, in Metal.
#include "kernels/cpu/lora_quantized.h"
#include "kernels/nf4.h"
#include "metal_lora/error.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

constexpr mx::Dtype kDtypes[] = {mx::float32, mx::float16, mx::bfloat16};

/// Normal values; the first row zeros in its first 64 and tiny after them, the second all of one
/// sign in each 64.
mx::array awkward(int out, int in, mx::Dtype dtype) {
  auto w = normal({out, in}, 5);
  const auto row = mx::reshape(mx::arange(out), {out, 1});
  const auto column = mx::reshape(mx::arange(in), {1, in});
  const auto tiny = mx::multiply(
      w, mx::where(mx::less(column, mx::array(64)), mx::array(0.0f), mx::array(1e-3f)));
  const auto sign = mx::where(
      mx::less(mx::remainder(column, mx::array(128)), mx::array(64)),
      mx::array(1.0f),
      mx::array(-1.0f));
  const auto signed_row = mx::multiply(sign, mx::add(mx::abs(w), mx::array(1.0f)));
  w = mx::where(mx::equal(row, mx::array(0)), tiny, w);
  w = mx::where(mx::equal(row, mx::array(1)), signed_row, w);
  w = mx::astype(w, dtype);
  w.eval();
  return w;
}

bool same_bits(const mx::array& a, const mx::array& b) {
  return a.shape() == b.shape() && a.dtype() == b.dtype() &&
         mx::array_equal(mx::view(a, mx::uint8), mx::view(b, mx::uint8)).item<bool>();
}

// min, max, two divisions and two roundings in f32, in mx.quantize's order; nothing that a compiler
// may fuse: the difference between the backends, and to MLX, is 0.
TEST(Quantize, AffineIsMlxsToTheBit) {
  struct Case {
    int bits, group, out, in;
  };
  size_t i = 0;
  for (const auto [bits, group, out, in] :
       {Case{4, 64, 17, 192}, {4, 32, 3, 96}, {4, 128, 2, 256}, {8, 32, 5, 32}, {8, 64, 9, 128}}) {
    const auto dtype = kDtypes[i++ % 3];
    const auto w = awkward(out, in, dtype);
    const auto ours = ops::quantize(w, bits, group);
    const auto want = mx::quantize(w, group, bits, "affine", std::nullopt, mx::Device::cpu);
    EXPECT_TRUE(same_bits(ours.q, want[0])) << bits << " bits, groups of " << group;
    EXPECT_TRUE(same_bits(ours.scales, want[1])) << bits << " bits, groups of " << group;
    EXPECT_TRUE(same_bits(ours.biases, want[2])) << bits << " bits, groups of " << group;
  }
}

// A transposed input is not row-contiguous: the kernels read a copy.
TEST(Quantize, TakesAViewOfAnotherArray) {
  const auto w = mx::transpose(normal({64, 6}, 3));
  const auto copy = mx::contiguous(w);
  EXPECT_TRUE(same_bits(ops::quantize(w, 4, 32).q, ops::quantize(copy, 4, 32).q));
  EXPECT_TRUE(same_bits(ops::quantize_nf4(w).absmax, ops::quantize_nf4(copy).absmax));
}

TEST(Quantize, Nf4IsTheCpuKernelsToTheBit) {
  constexpr int kOut = 5, kIn = 192;
  for (const auto dtype : kDtypes) {
    const auto w = awkward(kOut, kIn, dtype);
    const auto ours = ops::quantize_nf4(w);
    WeightParams p;
    p.n = kOut;
    p.k = kIn;
    p.format = WeightFormat::nf4;
    p.group_size = 64;
    auto wide = mx::contiguous(mx::astype(w, mx::float32));
    wide.eval();
    std::vector<uint32_t> words(kOut * kIn / 8);
    std::vector<float> absmax(kOut * kIn / 64);
    cpu::quantize_nf4(p, wide.data<float>(), words.data(), absmax.data(), nullptr);
    EXPECT_TRUE(same_bits(ours.q, mx::array(words.data(), {kOut, kIn / 8}, mx::uint32)));
    EXPECT_TRUE(same_bits(ours.absmax, mx::array(absmax.data(), {kOut, kIn / 64})));
  }
}

// Codes and level against the definition, without our kernels: the nearest level of 16.
TEST(Quantize, Nf4LevelsAreTheNearest) {
  const auto w = normal({3, 128}, 9);
  const auto parts = ops::quantize_nf4(w);
  const auto dense = ops::dequantize(Weight::nf4(parts.q, parts.absmax), mx::float32);
  auto blocks = mx::reshape(w, {6, 64});
  const auto absmax = mx::max(mx::abs(blocks), 1, true);
  EXPECT_TRUE(mx::array_equal(mx::reshape(parts.absmax, {6, 1}), absmax).item<bool>());
  const auto levels = mx::array(kNf4Levels, {1, 1, 16});
  const auto all = mx::multiply(levels, mx::reshape(absmax, {6, 1, 1}));
  const auto nearest =
      mx::min(mx::abs(mx::subtract(mx::reshape(blocks, {6, 64, 1}), all)), 2, false);
  const auto got = mx::abs(mx::subtract(mx::reshape(dense, {6, 64}), blocks));
  // x·(1/absmax) rounds twice, so a weight within 2·2^-24 of a midpoint (of absmax) may go to
  // either side of it, and each distance rounds: 4·2^-24 of absmax in all.
  const auto excess = mx::divide(mx::subtract(got, nearest), absmax);
  EXPECT_LE(mx::max(excess).item<float>(), 4 * unit_roundoff(mx::float32));
}

/// The formula in f64 from the stored parts; |result - this| <= the f32 roundings named below and
/// one rounding to the storage type.
void expect_formula(
    const mx::array& got, const std::vector<double>& want, double f32_roundings, double slack) {
  auto wide = mx::contiguous(mx::astype(got, mx::float32));
  wide.eval();
  const double storage = got.dtype() == mx::float32 ? 0.0 : unit_roundoff(got.dtype());
  const double least = got.dtype() == mx::float16 ? std::ldexp(1.0, -25) : std::ldexp(1.0, -140);
  ASSERT_EQ(wide.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    const double f32 = f32_roundings * unit_roundoff(mx::float32) * (std::fabs(want[i]) + slack);
    const double error = f32 + storage * (std::fabs(want[i]) + f32) + least;
    ASSERT_LE(std::fabs(wide.data<float>()[i] - want[i]), error) << i;
  }
}

std::vector<double> doubles(const mx::array& a) {
  auto wide = mx::contiguous(mx::astype(a, mx::float32));
  wide.eval();
  return {wide.data<float>(), wide.data<float>() + wide.size()};
}

TEST(Dequantize, AffineIsTheFormula) {
  size_t i = 0;
  for (const int bits : {4, 8}) {
    for (const int group : {32, 128}) {
      const auto stored = kDtypes[i++ % 3], dtype = kDtypes[i % 3];
      const auto parts = ops::quantize(awkward(7, 256, stored), bits, group);
      auto q = parts.q;
      q.eval();
      const auto scales = doubles(parts.scales), biases = doubles(parts.biases);
      std::vector<double> want;
      for (size_t e = 0; e < 7 * 256; ++e) {
        const uint32_t word = q.data<uint32_t>()[e * bits / 32];
        const double code = word >> (e * bits % 32) & ((1u << bits) - 1);
        want.push_back(code * scales[e / group] + biases[e / group]);
      }
      // A fused multiply-add rounds once; a CPU without one rounds the product too, which is at
      // most the result and the bias together: bias is an edge of the group, below 8 here.
      const auto weight = Weight::affine(q, parts.scales, parts.biases, group, bits);
      expect_formula(ops::dequantize(weight, dtype), want, 2.0, 8.0);
    }
  }
}

TEST(Dequantize, Nf4IsTheFormula) {
  const auto made = Weight::dense(normal({9, 192}, 4));
  for (const bool nested : {false, true}) {
    const auto weight = made.quantized_nf4(nested);
    const auto want = doubles(weight.dequantized());
    for (const auto dtype : kDtypes) {
      // One product; an 8-bit absmax has a product and a sum before it, of values up to the largest
      // absmax, below 8. The reference here rounds as often.
      expect_formula(ops::dequantize(weight, dtype), want, nested ? 6.0 : 2.0, nested ? 8.0 : 0.0);
    }
  }
}

TEST(Dequantize, DenseWeightsAreConverted) {
  const auto w = normal({5, 33}, 8, mx::float16);
  for (const auto dtype : kDtypes) {
    EXPECT_TRUE(same_bits(ops::dequantize(Weight::dense(w), dtype), mx::astype(w, dtype)));
  }
}

TEST(Dequantize, ReadsWhatTheBackendPrepares) {
  const auto made = Weight::dense(normal({32, 128}, 6)).quantized(4, 64);
  EXPECT_TRUE(
      same_bits(ops::dequantize(made.prepared(), mx::float32), ops::dequantize(made, mx::float32)));
}

TEST(Quantize, RefusesByName) {
  const auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::invalid_input);
      return e.what();
    }
    return "accepted";
  };
  const auto w = mx::zeros({4, 96});
  EXPECT_EQ(message([&] { ops::quantize(w, 3, 32); }), "[quantize] bits must be 4 or 8 but is 3");
  EXPECT_EQ(
      message([&] { ops::quantize(w, 4, 48); }),
      "[quantize] group_size must be 32, 64 or 128 but is 48");
  EXPECT_EQ(
      message([&] { ops::quantize(w, 4, 64); }),
      "[quantize] in must be a multiple of 64 but is 96");
  EXPECT_EQ(
      message([&] { ops::quantize_nf4(w); }),
      "[quantize_nf4] in must be a multiple of 64 but is 96");
  EXPECT_EQ(
      message([&] { ops::quantize_nf4(mx::zeros({64})); }),
      "[quantize_nf4] w must be (any, any) but is (64)");
  EXPECT_EQ(
      message([&] {
        ops::quantize(mx::zeros({2, 64}, mx::int32), 4, 64);
      }),
      "[dtype] must be float32, float16 or bfloat16 but is int32");
  EXPECT_EQ(
      message([&] { ops::dequantize(Weight(), mx::float32); }),
      "[dequantize] the weight must be one with bytes but is empty");
}

}  // namespace
}  // namespace metal_lora::testing
