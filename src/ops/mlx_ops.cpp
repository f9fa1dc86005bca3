// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/ops/mlx_ops.h"

#include <algorithm>
#include <limits>

#include <mlx/fast.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

namespace mx = mlx::core;

namespace metal_lora::ops::with_mlx {
namespace {

mx::array f32(const mx::array& a, StreamOrDevice s) {
  return mx::astype(a, mx::float32, s);
}

/// [tokens, heads, head_dim] as MLX's attention wants it: [1, heads, tokens, head_dim].
mx::array heads_first(const mx::array& a, StreamOrDevice s) {
  return mx::expand_dims(mx::transpose(a, {1, 0, 2}, s), 0, s);
}

mx::array tokens_first(const mx::array& a, StreamOrDevice s) {
  return mx::transpose(mx::squeeze(a, 0, s), {1, 0, 2}, s);
}

/// Query i, at key index offset + i, sees keys first(i) … offset + i. offset: int32 scalar.
mx::array visible(
    const mx::array& first,
    int queries,
    int keys,
    const mx::array& offset,
    int window,
    StreamOrDevice s) {
  auto i =
      mx::reshape(mx::add(mx::arange(0, queries, 1, mx::int32, s), offset, s), {queries, 1}, s);
  auto j = mx::reshape(mx::arange(0, keys, 1, mx::int32, s), {1, keys}, s);
  auto begin = first;
  if (window > 0) {
    begin = mx::maximum(begin, mx::subtract(i, mx::array(window - 1), s), s);
  }
  return mx::logical_and(mx::less_equal(j, i, s), mx::greater_equal(j, begin, s), s);
}

mx::array masked_attention(
    const mx::array& q,
    const mx::array& k,
    const mx::array& v,
    const mx::array& mask,
    float scale,
    StreamOrDevice s) {
  auto out = mx::fast::scaled_dot_product_attention(
      heads_first(q, s),
      heads_first(k, s),
      heads_first(v, s),
      scale,
      "array",
      mask,
      std::nullopt,
      false,
      s);
  return tokens_first(out, s);
}

}  // namespace

mx::array attention(const Arrays& in, float scale, int window, StreamOrDevice s) {
  const int tokens = in[0].shape(0);
  auto first = mx::reshape(in[3], {tokens, 1}, s);
  auto mask = visible(first, tokens, in[1].shape(0), mx::array(0), window, s);
  return masked_attention(in[0], in[1], in[2], mask, scale, s);
}

Arrays cached_attention(const Arrays& in, int layer, float scale, int window, StreamOrDevice s) {
  auto cache = in[3];
  const int tokens = in[0].shape(0), capacity = cache.shape(2);
  // MLX writes where `start` says, in the buffer or not: a position outside must not reach it.
  const auto position = mx::clip(in[4], mx::array(0), mx::array(capacity - tokens), s);
  const int heads = cache.shape(3), head_dim = cache.shape(4);
  const auto write = [&](int which, const mx::array& fresh) {
    const auto start = mx::concatenate(
        {mx::array({layer, which}, mx::int32),
         mx::reshape(position, {1}, s),
         mx::array({0, 0}, mx::int32)},
        0,
        s);
    auto update = mx::reshape(fresh, {1, 1, tokens, heads, head_dim}, s);
    cache = mx::slice_update(cache, update, start, {0, 1, 2, 3, 4}, s);
  };
  write(0, in[1]);
  write(1, in[2]);
  const auto entries = [&](int which) {
    auto part = mx::slice(
        cache,
        mx::Shape{layer, which, 0, 0, 0},
        mx::Shape{layer + 1, which + 1, capacity, heads, head_dim},
        s);
    return mx::reshape(part, {capacity, heads, head_dim}, s);
  };
  auto first = mx::zeros({tokens, 1}, mx::int32, s);
  auto mask = visible(first, tokens, capacity, position, window, s);
  return {masked_attention(in[0], entries(0), entries(1), mask, scale, s), cache};
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, StreamOrDevice s) {
  return mx::fast::rms_norm(x, mx::astype(weight, x.dtype(), s), eps, s);
}

mx::array rope_table(
    const mx::array& positions, const mx::array& inv_freq, float factor, StreamOrDevice s) {
  auto angles =
      mx::multiply(mx::expand_dims(f32(positions, s), 1, s), mx::expand_dims(inv_freq, 0, s), s);
  auto table = mx::concatenate({mx::cos(angles, s), mx::sin(angles, s)}, 1, s);
  return factor == 1.0f ? table : mx::multiply(table, mx::array(factor), s);
}

mx::array rope(const mx::array& x, const mx::array& table, StreamOrDevice s) {
  auto cos_sin = mx::split(mx::expand_dims(table, 1, s), 2, -1, s);
  auto halves = mx::split(f32(x, s), 2, -1, s);
  const auto turned = [&](int sign) {
    auto straight = mx::multiply(halves[sign > 0], cos_sin[0], s);
    auto crossed = mx::multiply(halves[sign < 0], cos_sin[1], s);
    return sign > 0 ? mx::add(straight, crossed, s) : mx::subtract(straight, crossed, s);
  };
  return mx::astype(mx::concatenate({turned(-1), turned(1)}, -1, s), x.dtype(), s);
}

mx::array swiglu(const mx::array& gate, const mx::array& up, StreamOrDevice s) {
  auto g = f32(gate, s);
  auto y = mx::multiply(mx::multiply(g, mx::sigmoid(g, s), s), f32(up, s), s);
  return mx::astype(y, gate.dtype(), s);
}

mx::array token_losses(
    const mx::array& x, const Weight& head, const mx::array& targets, StreamOrDevice s) {
  constexpr int64_t kLogitsBytes = 64 << 20;
  const int64_t row_bytes = static_cast<int64_t>(sizeof(float)) * head.out_features();
  const int slice_tokens = static_cast<int>(std::max<int64_t>(1, kLogitsBytes / row_bytes));
  const int tokens = x.shape(0);
  // A GPU cannot refuse a target outside the vocabulary: it must not read there, and its loss is
  // NaN.
  auto valid = mx::logical_and(
      mx::greater_equal(targets, mx::array(0), s),
      mx::less(targets, mx::array(head.out_features()), s),
      s);
  auto safe_targets = mx::where(valid, targets, mx::array(0), s);
  Arrays losses;
  for (int begin = 0; begin < tokens; begin += slice_tokens) {
    const int end = std::min(tokens, begin + slice_tokens);
    auto part = mx::slice(x, {begin, 0}, {end, x.shape(1)}, s);
    auto index = mx::expand_dims(mx::slice(safe_targets, {begin}, {end}, s), 1, s);
    // Made again in the backward pass: one slice's logits live at a time.
    auto slice_losses = mx::checkpoint([head, s](const Arrays& in) {
      auto logits = lora_linear(f32(in[0], s), LoraLinear{head, std::nullopt, std::nullopt});
      auto chosen =
          mx::squeeze(mx::take_along_axis(logits, mx::stop_gradient(in[1], s), -1, s), -1, s);
      return Arrays{mx::subtract(mx::logsumexp(logits, -1, false, s), chosen, s)};
    });
    losses.push_back(slice_losses({part, index})[0]);
  }
  auto all = losses.size() == 1 ? losses[0] : mx::concatenate(losses, 0, s);
  return mx::where(valid, all, mx::array(std::numeric_limits<float>::quiet_NaN()), s);
}

}  // namespace metal_lora::ops::with_mlx
