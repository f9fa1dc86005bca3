// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// NF4 weights through the ops: every path that reads a Weight gives what its dequantised values do.
#include "metal_lora/error.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

/// A double-quantised weight and a plain one, each as made and as prepared.
std::vector<Weight> nf4_weights(const mx::array& values) {
  const auto dense = Weight::dense(values);
  const auto plain = dense.quantized_nf4(false), nested = dense.quantized_nf4(true);
  return {plain, nested, plain.prepared(), nested.prepared()};
}

TEST(Nf4, QuantisedValuesAreNear) {
  const auto values = normal({48, 256}, 1);
  const auto blocks = mx::reshape(values, {48, 4, 64});
  const auto absmax = mx::max(mx::abs(blocks), -1, true);
  for (const auto& w : nf4_weights(values)) {
    ASSERT_TRUE(w.is_quantized());
    // Half the widest gap of the levels (0.3038, from -1 to -0.696) and, double-quantised, the
    // error of absmax: half the map's widest step (0.0141) of the largest deviation from the mean,
    // which is below absmax's own size.
    auto worst = mx::max(mx::divide(
        mx::abs(mx::subtract(mx::reshape(w.dequantized(), {48, 4, 64}), blocks)), absmax));
    EXPECT_LE(worst.item<float>(), 0.152 + 0.0071);
  }
}

TEST(Nf4, BytesAWeight) {
  const auto dense = Weight::dense(normal({64, 1024}, 1));
  const size_t count = 64 * 1024;
  EXPECT_EQ(dense.quantized_nf4(false).nbytes(), count / 2 + count / 64 * 4);
  EXPECT_EQ(
      dense.quantized_nf4(true).nbytes(), count / 2 + count / 64 + (257 + count / 64 / 256) * 4);
  const auto prepared = dense.quantized_nf4(true).prepared();
  const bool packed = prepared.params().layout == WeightLayout::cpu_packed;
  EXPECT_EQ(
      prepared.nbytes(), packed ? count / 2 + count / 64 * 4 : dense.quantized_nf4(true).nbytes());
}

TEST(Nf4, LinearEqualsItsDequantisedSelf) {
  for (const auto& w : nf4_weights(normal({48, 256}, 7))) {
    const LoraLinear plain{Weight::dense(w.dequantized()), std::nullopt, std::nullopt};
    for (int tokens : {1, 5, 8, 33}) {
      const auto x = normal({tokens, 256}, 8);
      // f32 sums of 256 terms of size about 1 in another order: 8 standard deviations.
      expect_close(
          ops::lora_linear(x, LoraLinear{w, std::nullopt, std::nullopt}),
          ops::reference::lora_linear(x, plain),
          8 * std::sqrt(256.0) * unit_roundoff(mx::float32),
          "y");
    }
  }
}

TEST(Nf4, GradientsMatchPlainMlx) {
  for (const auto& w : nf4_weights(normal({48, 128}, 7))) {
    const auto with = [&](auto&& apply) {
      return [&, apply](const std::vector<mx::array>& in) {
        return std::vector<mx::array>{
            apply(in[0], LoraLinear{w, Lora{in[1], in[2], 0.5f}, std::nullopt})};
      };
    };
    for (int tokens : {3, 20}) {
      expect_same_gradients(
          with([](const auto& x, const auto& l) { return ops::lora_linear(x, l); }),
          with([](const auto& x, const auto& l) { return ops::reference::lora_linear(x, l); }),
          {normal({tokens, 128}, 1), normal({4, 128}, 2), normal({48, 4}, 3)},
          8 * std::sqrt(128.0 * 5) * unit_roundoff(mx::float32));
    }
  }
}

TEST(Nf4, EmbeddingAndLossReadIt) {
  const int vocab = 64, dims = 128;
  const auto ids = mx::array({0, 5, 63, 5}, mx::int32);
  const auto x = normal({4, dims}, 2);
  const auto weights = mx::ones({4});
  for (const auto& w : nf4_weights(normal({vocab, dims}, 7))) {
    const auto dense = Weight::dense(w.dequantized());
    const LoraLinear table{w, std::nullopt, std::nullopt};
    EXPECT_TRUE(mx::array_equal(
                    ops::lora_embedding(ids, table, mx::float32), mx::take(w.dequantized(), ids, 0))
                    .item<bool>());
    expect_close(
        ops::linear_cross_entropy(x, w, ids, weights),
        ops::reference::linear_cross_entropy(x, dense, ids, weights),
        8 * std::sqrt(1.0 * dims) * unit_roundoff(mx::float32),
        "loss");
  }
}

TEST(Nf4, StoredPartsMakeTheSameWeight) {
  const auto made = Weight::dense(normal({16, 128}, 3)).quantized_nf4(false);
  const auto q = mx::array(static_cast<const uint32_t*>(made.data()), {16, 16}, mx::uint32);
  const auto absmax = mx::array(static_cast<const float*>(made.scales()), {16, 2}, mx::float32);
  EXPECT_TRUE(
      mx::array_equal(Weight::nf4(q, absmax).dequantized(), made.dequantized()).item<bool>());
  const auto nested = Weight::dense(normal({16, 128}, 3)).quantized_nf4(true);
  const auto codes = mx::array(static_cast<const uint8_t*>(nested.scales()), {16, 2}, mx::uint8);
  const auto table = mx::array(static_cast<const float*>(nested.biases()), {258}, mx::float32);
  EXPECT_TRUE(mx::array_equal(Weight::nf4(q, codes, table).dequantized(), nested.dequantized())
                  .item<bool>());
}

TEST(Nf4, WrongPartsAreNamed) {
  const auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::invalid_input);
      return e.what();
    }
    return "accepted";
  };
  const auto q = mx::zeros({4, 16}, mx::uint32);
  EXPECT_EQ(
      message([] {
        Weight::dense(normal({4, 96}, 1)).quantized_nf4(false);
      }),
      "[Weight::quantized_nf4] in must be a multiple of 64 but is 96");
  EXPECT_EQ(
      message([&] {
        Weight::nf4(q, mx::zeros({4, 3}));
      }),
      "[Weight::nf4] absmax must be (4, 2) but is (4, 3)");
  EXPECT_EQ(
      message([&] {
        Weight::nf4(mx::zeros({4, 12}, mx::uint32), mx::zeros({4, 1}));
      }),
      "[Weight::nf4] in must be a multiple of 64 but is 96");
  EXPECT_EQ(
      message([&] {
        Weight::nf4(q, mx::zeros({4, 2}, mx::uint8), mx::zeros({257}));
      }),
      "[Weight::nf4] table must be (258) but is (257)");
  EXPECT_EQ(
      message([&] {
        Weight::nf4(q, mx::zeros({4, 2}, mx::int32), mx::zeros({258}));
      }),
      "[Weight::nf4] codes's dtype must be uint8 but is int32");
}

}  // namespace
}  // namespace metal_lora::testing
