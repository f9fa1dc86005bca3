// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/evaluate.h"

#include <fmt/format.h>

#include <cmath>

#include "src/train/trainer.h"

namespace metal_lora {
namespace train {

LossSum evaluate_batches(
    const Model& model,
    const AdapterWeights& adapter,
    const Dataset& dataset,
    const StepSamples& plan,
    const std::function<void(double)>& after_batch) {
  LossSum sum;
  for (size_t i = 0; i < plan.size(); ++i) {
    const MicroBatch batch = make_micro_batch(dataset, plan[i]);
    const ModelInputs in = to_inputs(batch);
    mlx::core::array loss =
        model.loss(in.tokens, in.segments, in.targets, in.weights, adapter, false);
    sum.loss += static_cast<double>(loss.item<float>());
    sum.tokens += batch.trained_tokens;
    if (after_batch) after_batch(static_cast<double>(i + 1) / static_cast<double>(plan.size()));
  }
  return sum;
}

}  // namespace train

EvalResult evaluate_file(
    const Model& model,
    const AdapterWeights& adapter,
    const text::Tokenizer& tokenizer,
    const std::optional<text::ChatTemplate>& chat_template,
    const std::filesystem::path& jsonl,
    const EvalOptions& options) {
  if (options.batch_size < 1) {
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[batch_size] must be >= 1 but is {}", options.batch_size));
  }
  train::DatasetOptions reading;
  reading.max_seq_length = options.max_seq_length;
  reading.mask_prompt = options.mask_prompt;
  reading.vocab_size = model.config().vocab_size;
  reading.on_warning = options.on_warning;
  const auto dataset = train::Dataset::load(jsonl, tokenizer, chat_template, reading);
  const auto plan = train::plan_evaluation(dataset, options.batch_size, options.batches);
  const auto sum = train::evaluate_batches(model, adapter, dataset, plan, [&](double fraction) {
    if (options.progress) options.progress(fraction);
    if (options.should_stop && options.should_stop()) {
      throw Error(ErrorCode::interrupted, "[eval] stopped");
    }
  });
  const double loss = sum.loss / static_cast<double>(sum.tokens);
  return {loss, std::exp(loss), sum.tokens};
}

}  // namespace metal_lora
