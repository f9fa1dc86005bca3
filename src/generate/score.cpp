// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <numeric>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include "metal_lora/error.h"
#include "metal_lora/generate.h"

namespace mx = mlx::core;

namespace metal_lora {

std::vector<float> score_tokens(
    const Model& model, const AdapterWeights& adapter, std::span<const int32_t> tokens) {
  const ModelConfig& config = model.config();
  if (tokens.size() > static_cast<size_t>(config.max_position_embeddings)) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format(
            "[score] the text must have at most {} tokens, the model's context, but has {}",
            config.max_position_embeddings,
            tokens.size()),
        "split it");
  }
  for (const int32_t id : tokens) {
    if (id >= 0 && id < config.vocab_size) continue;
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[score] tokens must be in 0 … {} but one is {}", config.vocab_size - 1, id));
  }
  if (tokens.size() < 2) return {};
  // One token predicts the next: the last is only a target.
  const int count = static_cast<int>(tokens.size()) - 1;
  std::vector<int32_t> positions(static_cast<size_t>(count));
  std::iota(positions.begin(), positions.end(), 0);
  const mx::array inputs(tokens.data(), {count}, mx::int32);
  const mx::array targets(tokens.data() + 1, {count}, mx::int32);
  const ops::Segments segments{
      mx::array(positions.data(), {count}, mx::int32), mx::zeros({count}, mx::int32)};
  const mx::array hidden = model.hidden(inputs, segments, adapter);
  const mx::array losses = ops::token_losses(hidden, model.head(), targets);
  mx::array logprobs = mx::negative(losses);
  logprobs.eval();
  return {logprobs.data<float>(), logprobs.data<float>() + count};
}

}  // namespace metal_lora
