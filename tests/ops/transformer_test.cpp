// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "metal_lora/error.h"
#include "tests/ops/support.h"

namespace metal_lora::testing {
namespace {

/// Both sides compute in f32 and round to the dtype once; the gradient of a 16-bit op sums rounded
/// cotangents, whose errors grow with the square root of the number of terms.
double tolerance(mx::Dtype dtype, int terms) {
  return (dtype == mx::float32 ? 32.0 : 4.0) * unit_roundoff(dtype) *
         std::sqrt(static_cast<double>(terms));
}

mx::array ints(std::vector<int32_t> values) {
  return mx::array(values.data(), {static_cast<int>(values.size())}, mx::int32);
}

/// What a CPU kernel finds at run time comes out of MLX's eval as a runtime_error with the same
/// text; on Metal the call itself refuses.
void expect_refusal(const std::function<mx::array()>& call, const char* message) {
  try {
    call().eval();
    ADD_FAILURE() << "accepted";
  } catch (const std::exception& e) {
    EXPECT_STREQ(e.what(), message);
  }
}

class TransformerOp : public ::testing::TestWithParam<mx::Dtype> {};

TEST_P(TransformerOp, RmsNorm) {
  const auto dtype = GetParam();
  auto x = normal({5, 577}, 1, dtype), w = normal({577}, 2);
  auto op = [](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::rms_norm(in[0], in[1], 1e-5f)};
  };
  auto plain = [](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::reference::rms_norm(in[0], in[1], 1e-5f)};
  };
  expect_close(op({x, w})[0], plain({x, w})[0], tolerance(dtype, 4), "y");
  expect_same_gradients(op, plain, {x, w}, tolerance(dtype, 16));
}

TEST_P(TransformerOp, AddRmsNorm) {
  const auto dtype = GetParam();
  auto op = [](const std::vector<mx::array>& in) {
    auto [h, y] = ops::add_rms_norm(in[0], in[1], in[2], 1e-5f);
    return std::vector<mx::array>{h, y};
  };
  auto plain = [](const std::vector<mx::array>& in) {
    auto h = mx::add(in[0], in[1]);
    return std::vector<mx::array>{h, ops::reference::rms_norm(h, in[2], 1e-5f)};
  };
  std::vector<mx::array> inputs{
      normal({9, 64}, 1, dtype), normal({9, 64}, 2, dtype), normal({64}, 3)};
  auto a = op(inputs), b = plain(inputs);
  expect_close(a[0], b[0], tolerance(dtype, 1), "h");
  expect_close(a[1], b[1], tolerance(dtype, 4), "y");
  expect_same_gradients(op, plain, inputs, tolerance(dtype, 16));
}

TEST_P(TransformerOp, RopeTurnsAndTurnsBack) {
  const auto dtype = GetParam();
  auto x = normal({11, 3, 64}, 1, dtype);
  std::vector<float> inv_freq(32);
  for (int i = 0; i < 32; ++i) inv_freq[i] = static_cast<float>(std::pow(1e4, -i / 32.0));
  auto table = ops::rope_table(
      ints({0, 1, 2, 3, 4, 5, 0, 1, 2, 8000, 8191}), mx::array(inv_freq.data(), {32}, mx::float32));
  expect_close(ops::rope(x, table), ops::reference::rope(x, table), tolerance(dtype, 2), "y");
  auto op = [&](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::rope(in[0], table)};
  };
  auto plain = [&](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::reference::rope(in[0], table)};
  };
  expect_same_gradients(op, plain, {x}, tolerance(dtype, 4));
}

TEST_P(TransformerOp, SwiGlu) {
  const auto dtype = GetParam();
  std::vector<mx::array> inputs{
      mx::multiply(normal({7, 33}, 1, dtype), mx::array(4.0f, dtype)), normal({7, 33}, 2, dtype)};
  auto op = [](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::swiglu(in[0], in[1])};
  };
  auto plain = [](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::reference::swiglu(in[0], in[1])};
  };
  expect_close(op(inputs)[0], plain(inputs)[0], tolerance(dtype, 4), "y");
  expect_same_gradients(op, plain, inputs, tolerance(dtype, 4));
}

TEST_P(TransformerOp, Attention) {
  const auto dtype = GetParam();
  const int tokens = 37;
  std::vector<int32_t> starts(tokens);
  for (int i = 0; i < tokens; ++i) starts[i] = i < 5 ? 0 : i < 30 ? 5 : 30;
  for (int window : {0, 8}) {
    const auto segment_start = ints(starts);
    auto op = [&](const std::vector<mx::array>& in) {
      return std::vector<mx::array>{
          ops::attention(in[0], in[1], in[2], segment_start, 0.125f, window)};
    };
    auto plain = [&](const std::vector<mx::array>& in) {
      return std::vector<mx::array>{
          ops::reference::attention(in[0], in[1], in[2], segment_start, 0.125f, window)};
    };
    std::vector<mx::array> inputs{
        normal({tokens, 6, 64}, 1, dtype),
        normal({tokens, 2, 64}, 2, dtype),
        normal({tokens, 2, 64}, 3, dtype)};
    expect_close(op(inputs)[0], plain(inputs)[0], tolerance(dtype, 4), "out");
    expect_same_gradients(op, plain, inputs, tolerance(dtype, 3 * tokens));
  }
}

TEST_P(TransformerOp, CachedAttentionEqualsUncached) {
  const auto dtype = GetParam();
  const int tokens = 21, first = 13;
  auto q = normal({tokens, 4, 32}, 1, dtype), k = normal({tokens, 2, 32}, 2, dtype),
       v = normal({tokens, 2, 32}, 3, dtype);
  auto whole = ops::attention(q, k, v, ints(std::vector<int32_t>(tokens, 0)), 0.2f);
  auto cache = mx::zeros({3, 2, 40, 2, 32}, dtype);
  auto part = [&](const mx::array& a, int begin, int end) {
    return mx::slice(a, {begin, 0, 0}, {end, a.shape(1), a.shape(2)});
  };
  mx::array chain = cache;
  std::vector<mx::array> outs;
  for (auto [begin, end] : {std::pair{0, first}, std::pair{first, tokens}}) {
    auto [out, next] = ops::cached_attention(
        part(q, begin, end),
        part(k, begin, end),
        part(v, begin, end),
        chain,
        1,
        mx::array(begin),
        0.2f);
    outs.push_back(out);
    chain = next;
  }
  expect_close(mx::concatenate(outs, 0), whole, tolerance(dtype, 4), "out");
  // Layers 0 and 2 are untouched, and so is the caller's own array.
  const auto magnitude = [](const mx::array& a) {
    return mx::sum(mx::abs(mx::astype(a, mx::float32))).item<float>();
  };
  EXPECT_EQ(magnitude(mx::slice(chain, {0, 0, 0, 0, 0}, {1, 2, 40, 2, 32})), 0.0f);
  EXPECT_EQ(magnitude(cache), 0.0f);
}

INSTANTIATE_TEST_SUITE_P(
    Dtypes, TransformerOp, ::testing::Values(mx::float32, mx::bfloat16, mx::float16));

TEST(LinearCrossEntropy, MatchesPlainMlx) {
  const int tokens = 23, dims = 48, vocab = 301;
  auto head = Weight::dense(normal({vocab, dims}, 2));
  std::vector<int32_t> targets(tokens);
  std::vector<float> weights(tokens);
  for (int i = 0; i < tokens; ++i) {
    targets[i] = (i * 37) % vocab;
    weights[i] = i % 3 == 0 ? 0.0f : 0.5f + static_cast<float>(i % 2);
  }
  targets[0] = -1;  // of weight 0: never looked at
  auto t = ints(targets), w = mx::array(weights.data(), {tokens}, mx::float32);
  auto safe = mx::maximum(t, mx::array(0));
  auto op = [&](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::linear_cross_entropy(in[0], head, t, w)};
  };
  auto plain = [&](const std::vector<mx::array>& in) {
    return std::vector<mx::array>{ops::reference::linear_cross_entropy(in[0], head, safe, w)};
  };
  auto x = normal({tokens, dims}, 1);
  expect_close(op({x})[0], plain({x})[0], tolerance(mx::float32, dims), "loss");
  expect_same_gradients(op, plain, {x}, tolerance(mx::float32, vocab));
  auto each = ops::token_losses(x, head, safe);
  expect_close(
      mx::sum(mx::multiply(each, w)), plain({x})[0], tolerance(mx::float32, dims), "token losses");
}

TEST(LinearCrossEntropy, RefusesTargetsOutsideTheVocabulary) {
  auto head = Weight::dense(normal({10, 8}, 2));
  const auto x = normal({2, 8}, 1);
  const auto targets = ints({3, 10});
  expect_refusal(
      [&] {
        return ops::linear_cross_entropy(x, head, targets, mx::array({1.0f, 1.0f}));
      },
      "[linear_cross_entropy] targets[1] must be in [0, 10) but is 10");
  // Weights that are still to be computed cannot be asked: the loss says it on Metal.
  if (on_metal_kernels()) {
    auto late = ops::linear_cross_entropy(x, head, targets, mx::ones({2}));
    EXPECT_TRUE(std::isnan(late.item<float>()));
  }
}

TEST(LoraEmbedding, MatchesPlainMlxWithGradients) {
  auto table = Weight::dense(normal({50, 24}, 1));
  auto ids = ints({0, 49, 7, 7, 3});
  auto with = [&](auto&& apply) {
    return [&, apply](const std::vector<mx::array>& in) {
      return std::vector<mx::array>{
          apply(ids, LoraLinear{table, Lora{in[0], in[1], 0.5f}, std::nullopt}, mx::float32)};
    };
  };
  auto op = with([](const auto& i, const auto& t, auto d) { return ops::lora_embedding(i, t, d); });
  auto plain = with(
      [](const auto& i, const auto& t, auto d) { return ops::reference::lora_embedding(i, t, d); });
  std::vector<mx::array> inputs{normal({3, 50}, 2), normal({24, 3}, 3)};
  expect_close(op(inputs)[0], plain(inputs)[0], tolerance(mx::float32, 4), "rows");
  expect_same_gradients(op, plain, inputs, tolerance(mx::float32, 24));
}

TEST(LoraEmbedding, RefusesIdsOutsideTheTable) {
  LoraLinear table{Weight::dense(normal({50, 24}, 1)), std::nullopt, std::nullopt};
  expect_refusal(
      [&] { return ops::lora_embedding(ints({50}), table, mx::float32); },
      "[lora_embedding] ids[0] must be in [0, 50) but is 50");
  expect_refusal(
      [&] { return ops::lora_embedding(ints({-1}), table, mx::float32); },
      "[lora_embedding] ids[0] must be in [0, 50) but is -1");
}

TEST(AdamW, FollowsPlainMlxForFiftySteps) {
  const int count = 1001;
  auto p = normal({count}, 1), m = mx::zeros({count}), v = mx::zeros({count});
  auto rp = p, rm = m, rv = v;
  AdamWParams params;
  params.learning_rate = 1e-2f;
  params.clip_norm = 1.0f;
  params.grad_scale = 0.5f;
  for (uint64_t step = 1; step <= 50; ++step) {
    params.step = step;
    auto g = normal({count}, 100 + step);
    auto ours = ops::adamw(p, g, m, v, params);
    auto plain = ops::reference::adamw(rp, g, rm, rv, params);
    p = ours.param, m = ours.m, v = ours.v;
    rp = plain.param, rm = plain.m, rv = plain.v;
    mx::eval(p, m, v, rp, rm, rv);
    expect_close(ours.grad_norm, plain.grad_norm, tolerance(mx::float32, 4), "norm");
  }
  // Each step adds a few roundings of values near 1; they do not cancel.
  expect_close(p, rp, 50.0 * 8.0 * unit_roundoff(mx::float32), "param");
}

TEST(AdamW, ANonFiniteGradientChangesNothing) {
  auto p = normal({8}, 1), m = normal({8}, 2), v = mx::abs(normal({8}, 3));
  auto g = mx::array(
      {0.0f, 1.0f, std::numeric_limits<float>::quiet_NaN(), 0.0f, 0.0f, 0.0f, 0.0f, 0.0f});
  auto out = ops::adamw(p, g, m, v, AdamWParams{});
  EXPECT_EQ(out.skipped.item<int32_t>(), 1);
  EXPECT_TRUE(mx::array_equal(out.param, p).item<bool>());
  EXPECT_TRUE(mx::array_equal(out.m, m).item<bool>());
  EXPECT_TRUE(mx::array_equal(out.v, v).item<bool>());
}

}  // namespace
}  // namespace metal_lora::testing
