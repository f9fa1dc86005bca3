// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The op's checks and its plain cases; tests/kernels/speculative_test.cpp has the distribution.
#include "metal_lora/error.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

mx::array ints(const std::vector<int>& values, const mx::Shape& shape) {
  return mx::array(values.data(), shape, mx::int32);
}

TEST(VerifyTokens, GreedyIsTheLongestCommonPrefix) {
  const int batch = 6, drafts = 4, vocab = 50;
  for (auto dtype : {mx::float32, mx::float16, mx::bfloat16}) {
    const auto logits = normal({batch, drafts + 1, vocab}, 1, dtype);
    const auto best = mx::astype(mx::argmax(logits, 2), mx::int32);  // [batch, drafts + 1]
    std::vector<int> tokens, kept;
    for (int b = 0; b < batch; ++b) {
      kept.push_back(b % (drafts + 1));
      for (int i = 0; i < drafts; ++i) {
        const int right = mx::take(mx::take(best, b, 0), i, 0).item<int>();
        tokens.push_back(i < kept.back() ? right : (right + 1) % vocab);
      }
    }
    const auto out =
        ops::verify_tokens(logits, ints(tokens, {batch, drafts}), std::nullopt, 0.0f, 1);
    ASSERT_EQ(out.accepted.shape(), mx::Shape{batch});
    for (int b = 0; b < batch; ++b) {
      EXPECT_EQ(mx::take(out.accepted, b, 0).item<int>(), kept[b]);
      EXPECT_EQ(
          mx::take(out.next_token, b, 0).item<int>(),
          mx::take(mx::take(best, b, 0), kept[b], 0).item<int>());
    }
  }
}

TEST(VerifyTokens, ADrafterThatIsTheTargetIsAlwaysKept) {
  const int batch = 5, drafts = 3, vocab = 40;
  const auto logits = normal({batch, drafts + 1, vocab}, 1);
  // A shade below the target's probabilities: u·q < p whatever rounding makes of either.
  const auto q = mx::multiply(
      mx::softmax(mx::slice(logits, {0, 0, 0}, {batch, drafts, vocab}), -1), mx::array(0.999f));
  const auto tokens = mx::astype(mx::argmax(q, -1), mx::int32);
  for (uint64_t seed : {1, 2, 3}) {
    const auto out = ops::verify_tokens(logits, tokens, q, 1.0f, seed);
    EXPECT_TRUE(mx::all(mx::equal(out.accepted, mx::array(drafts))).item<bool>());
  }
}

TEST(VerifyTokens, TheSeedDecides) {
  const int batch = 64, drafts = 2, vocab = 30;
  const auto logits = normal({batch, drafts + 1, vocab}, 1);
  const auto tokens = ints(std::vector<int>(batch * drafts, 3), {batch, drafts});
  const auto run = [&](uint64_t seed) {
    return ops::verify_tokens(logits, tokens, std::nullopt, 1.0f, seed).next_token;
  };
  EXPECT_TRUE(mx::array_equal(run(7), run(7)).item<bool>());
  EXPECT_FALSE(mx::array_equal(run(7), run(8)).item<bool>());
  EXPECT_FALSE(mx::array_equal(run(7), run(7 + (uint64_t{1} << 32))).item<bool>());
}

TEST(VerifyTokens, NoDraftsSampleOneToken) {
  const auto logits = normal({3, 1, 20}, 1);
  const auto out = ops::verify_tokens(logits, mx::zeros({3, 0}, mx::int32), std::nullopt, 0.0f, 1);
  EXPECT_TRUE(
      mx::array_equal(out.next_token, mx::astype(mx::squeeze(mx::argmax(logits, 2), 1), mx::int32))
          .item<bool>());
  EXPECT_TRUE(mx::all(mx::equal(out.accepted, mx::array(0))).item<bool>());
}

TEST(VerifyTokens, WrongArgumentsAreNamed) {
  const auto logits = normal({2, 4, 10}, 1);
  const auto tokens = mx::zeros({2, 3}, mx::int32);
  const auto message = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::invalid_input);
      return e.what();
    }
    return "accepted";
  };
  const auto verify = [](const mx::array& l,
                         const mx::array& t,
                         const std::optional<mx::array>& q,
                         float temperature) {
    return [=] { ops::verify_tokens(l, t, q, temperature, 1); };
  };
  EXPECT_EQ(message(verify(logits, tokens, std::nullopt, 0.0f)), "accepted");
  EXPECT_EQ(
      message(verify(logits, mx::zeros({2, 4}, mx::int32), std::nullopt, 0.0f)),
      "[verify_tokens] target_logits must be (2, 5, any) but is (2, 4, 10)");
  EXPECT_EQ(
      message(verify(logits, tokens, normal({2, 3, 9}, 1), 1.0f)),
      "[verify_tokens] draft_probs must be (2, 3, 10) but is (2, 3, 9)");
  EXPECT_EQ(
      message(verify(logits, tokens, std::nullopt, -1.0f)),
      "[verify_tokens] temperature must be finite and at least 0 but is -1");
  EXPECT_EQ(
      message(verify(logits, tokens, std::nullopt, std::numeric_limits<float>::quiet_NaN())),
      "[verify_tokens] temperature must be finite and at least 0 but is nan");
  EXPECT_EQ(
      message(verify(normal({2, 4, 0}, 1), tokens, std::nullopt, 1.0f)),
      "[verify_tokens] the vocabulary must be at least 1 token but is 0");
}

}  // namespace
}  // namespace metal_lora::testing
