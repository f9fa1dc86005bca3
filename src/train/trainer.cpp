// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/train/trainer.h"

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/transforms.h>

#include <chrono>
#include <cmath>
#include <system_error>

#include "src/ops/train_step.h"
#include "src/train/adapter_init.h"
#include "src/train/rng.h"

namespace metal_lora {

namespace fs = std::filesystem;
namespace mx = mlx::core;

using train::Dataset;
using train::MicroBatch;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int64_t kSkippedInARowLimit = 10;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

mx::array ints(const std::vector<int32_t>& values) {
  return mx::array(values.data(), {static_cast<int>(values.size())}, mx::int32);
}

}  // namespace

namespace train {

ModelInputs to_inputs(const MicroBatch& batch) {
  return {
      ints(batch.tokens),
      ints(batch.targets),
      mx::array(batch.weights.data(), {static_cast<int>(batch.weights.size())}, mx::float32),
      {ints(batch.positions), ints(batch.segment_start)}};
}

}  // namespace train

Trainer::Impl::Impl(
    std::shared_ptr<const Model> model_in,
    text::Tokenizer tokenizer_in,
    std::optional<text::ChatTemplate> chat_template_in,
    TrainingConfig config_in,
    TrainerCallbacks callbacks_in)
    : model(std::move(model_in)),
      tokenizer(std::move(tokenizer_in)),
      chat_template(std::move(chat_template_in)),
      config(std::move(config_in)),
      callbacks(std::move(callbacks_in)) {
  config.validate();
  build_adapter();
  if (!config.train) return;
  schedule_ = train::make_schedule(train::resolve_schedule(config));
  train_set_ = load_split("train", true);
  valid_set_ = load_split("valid", false);
  if (valid_set_.empty()) warn("no valid.jsonl: training goes on without validation");
  batch_options_ = {
      config.batch_size,
      config.grad_accumulation_steps,
      config.packing,
      config.max_seq_length,
      static_cast<uint64_t>(config.seed)};
  log_ = train::new_run_log(config);
  check_memory();
}

void Trainer::Impl::warn(const std::string& text) const {
  if (callbacks.on_warning) callbacks.on_warning(text);
}

Dataset Trainer::Impl::load_split(const std::string& name, bool required) {
  const fs::path path = fs::path(config.data) / (name + ".jsonl");
  std::error_code error;
  if (!fs::exists(path, error)) {
    if (!required) return {};
    throw Error(
        ErrorCode::not_found,
        fmt::format("[data] {} does not exist", path.string()),
        "data must be a folder with train.jsonl, and valid.jsonl and test.jsonl where wanted");
  }
  train::DatasetOptions options;
  options.max_seq_length = config.max_seq_length;
  options.mask_prompt = config.mask_prompt;
  options.vocab_size = model->config().vocab_size;
  options.on_warning = callbacks.on_warning;
  if (callbacks.on_progress) {
    options.progress = [this, phase = "data " + name](double fraction) {
      callbacks.on_progress(phase, fraction);
    };
  }
  return Dataset::load(path, tokenizer, chat_template, options);
}

void Trainer::Impl::build_adapter() {
  if (config.train) {
    initial_ = config.resume_adapter_file.empty()
                   ? train::initial_adapter(model->config(), config)
                   : train::adapter_from_file(model->config(), config);
  } else {
    // Only measuring: with the adapter if there is one, as mlx-lm does.
    std::error_code error;
    if (fs::exists(folder() / "adapter_config.json", error)) {
      initial_ = load_adapter(folder(), model->config()).weights.astype(mx::float32);
    }
    return;
  }
  optimizer_.emplace(
      config.optimizer,
      config.optimizer_settings(),
      config.grad_clip,
      flatten(initial_.parameters()));
}

mx::array Trainer::Impl::flatten(const std::vector<mx::array>& arrays) const {
  std::vector<mx::array> flat;
  for (const auto& array : arrays) flat.push_back(mx::flatten(array));
  return mx::concatenate(std::move(flat));
}

std::vector<mx::array> Trainer::Impl::split_parameters(const mx::array& flat) const {
  const auto shapes = initial_.parameters();
  mx::Shape ends;
  int end = 0;
  for (size_t i = 0; i + 1 < shapes.size(); ++i) {
    end += static_cast<int>(shapes[i].size());
    ends.push_back(end);
  }
  auto parts = mx::split(flat, ends, 0);
  for (size_t i = 0; i < parts.size(); ++i) parts[i] = mx::reshape(parts[i], shapes[i].shape());
  return parts;
}

AdapterWeights Trainer::Impl::adapter() const {
  if (!optimizer_) return initial_;
  return initial_.with_parameters(split_parameters(optimizer_->param()));
}

void Trainer::Impl::check_memory() {
  const int64_t tokens = train::largest_micro_batch(train_set_, batch_options_);
  estimate = estimate_memory(
      *model,
      config,
      tokens,
      static_cast<int64_t>(optimizer_->param().size()),
      train_set_.nbytes() + valid_set_.nbytes());
  const uint64_t limit = config.max_memory > 0 ? config.max_memory : memory_limit_bytes();
  if (limit == 0 || estimate.total() <= limit) return;
  choose_step(with_dropout(adapter(), 0));
  const size_t least = train_plan_ ? train_plan_->least_bytes(tokens) : 0;
  if (train_plan_ && least <= activation_budget()) {
    // The fused step keeps what there is room for, and its loss works in the same room.
    estimate.activations = config.grad_checkpoint ? least : activation_budget();
    estimate.loss = 0;
    return;
  }
  throw Error(
      ErrorCode::does_not_fit,
      fmt::format(
          "[memory] training needs about {:.2f} GB (weights {:.2f}, activations of {} tokens "
          "{:.2f}, "
          "loss {:.2f}, adapter and optimizer {:.2f}) but {:.2f} GB {}",
          estimate.total() * 1e-9,
          estimate.weights * 1e-9,
          tokens,
          estimate.activations * 1e-9,
          estimate.loss * 1e-9,
          estimate.adapter * 1e-9,
          limit * 1e-9,
          config.max_memory > 0 ? "are allowed (max_memory)" : "are available"),
      memory_hint(limit));
}

std::string Trainer::Impl::memory_hint(uint64_t limit) const {
  const int64_t tokens = estimate.micro_batch_tokens;
  const auto parameters = static_cast<int64_t>(optimizer_->param().size());
  const uint64_t data = train_set_.nbytes() + valid_set_.nbytes();
  std::vector<std::string> hints;
  const auto offer = [&](const std::string& knob, const TrainingConfig& changed, int64_t count) {
    const uint64_t needs = estimate_memory(*model, changed, count, parameters, data).total();
    if (needs >= estimate.total() - estimate.total() / 50) return;
    hints.push_back(fmt::format(
        "{} needs {:.2f} GB{}", knob, needs * 1e-9, needs <= limit ? "" : " (still too much)"));
  };
  if (!config.grad_checkpoint) {
    TrainingConfig changed = config;
    changed.grad_checkpoint = true;
    offer("grad_checkpoint", changed, tokens);
  }
  if (config.batch_size > 1) {
    train::BatchOptions one = batch_options_;
    one.batch_size = 1;
    offer(
        fmt::format(
            "batch_size 1 with grad_accumulation_steps {}",
            config.batch_size * config.grad_accumulation_steps),
        config,
        train::largest_micro_batch(train_set_, one));
  }
  offer(
      fmt::format("max_seq_length {}", std::max(2, train_set_.longest() / 2)),
      config,
      std::max<int64_t>(1, tokens / 2));
  if (config.quantize == Quantization::none) {
    TrainingConfig changed = config;
    changed.quantize = Quantization::int4;
    offer("quantize 4", changed, tokens);
  }
  return fmt::format("{}", fmt::join(hints, "; "));
}

void Trainer::Impl::poll_stop() {
  if (!callbacks.should_stop || !callbacks.should_stop()) return;
  if (!config.train) throw Error(ErrorCode::interrupted, "[test] stopped");
  save(false);
  throw Error(
      ErrorCode::interrupted,
      fmt::format("[train] stopped after iteration {}; the state is saved", progress_.iteration),
      "the same command with --resume goes on exactly");
}

double Trainer::Impl::backward(
    const MicroBatch& batch, const AdapterWeights& adapter, std::optional<mx::array>& grad) {
  const train::ModelInputs in = train::to_inputs(batch);
  if (!step_chosen_) choose_step(adapter);
  if (train_plan_) {
    auto [value, flat] = ops::train_step(
        train_plan_, optimizer_->param(), in.tokens, in.segments, in.targets, in.weights);
    return add_gradient(value, flat, grad);
  }
  const auto parameters = adapter.parameters();
  std::vector<int> all(parameters.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
  const auto loss = [&](const std::vector<mx::array>& values) {
    return model->loss(
        in.tokens,
        in.segments,
        in.targets,
        in.weights,
        adapter.with_parameters(values),
        true,
        config.grad_checkpoint);
  };
  auto [value, grads] = mx::value_and_grad(loss, all)(parameters);
  for (auto& g : grads) g = mx::astype(g, mx::float32);
  mx::array flat = flatten(grads);
  grads.clear();
  return add_gradient(value, flat, grad);
}

double Trainer::Impl::add_gradient(
    const mx::array& value, mx::array flat, std::optional<mx::array>& grad) {
  if (grad) flat = mx::add(*grad, flat);
  mx::eval(value, flat);
  double sum = static_cast<double>(mx::array(value).item<float>());
  if (hooks.after_backward) hooks.after_backward(progress_.iteration + 1, sum, flat);
  grad = flat;
  return sum;
}

void Trainer::Impl::choose_step(const AdapterWeights& adapter) {
  step_chosen_ = true;
  if (!ops::has_train_step()) return;
  const std::string why_not = model->train_step_refusal(adapter);
  if (!why_not.empty()) {
    warn("the step runs by single operations, slower than the fused one: " + why_not);
    return;
  }
  train_plan_ = model->make_train_plan(adapter, config.grad_checkpoint ? 0 : activation_budget());
}

size_t Trainer::Impl::activation_budget() const {
  const uint64_t limit = config.max_memory > 0 ? config.max_memory : memory_limit_bytes();
  const uint64_t taken = estimate.weights + estimate.adapter;
  return limit > taken ? static_cast<size_t>(limit - taken) : 0;
}

AdapterWeights Trainer::Impl::with_dropout(const AdapterWeights& weights, size_t micro) const {
  if (config.lora_dropout == 0.0) return weights;
  // Keyed by updates, so that a skipped step leaves no trace in what follows.
  const uint64_t key = train::random_key(
      static_cast<uint64_t>(config.seed), "dropout", static_cast<uint64_t>(progress_.updates));
  return weights.with_dropout(
      static_cast<float>(config.lora_dropout), train::random_bits(key, micro));
}

Trainer::Impl::StepOutcome Trainer::Impl::take_step(const train::StepSamples& samples) {
  StepOutcome outcome;
  std::optional<mx::array> grad;
  AdapterWeights current = adapter();
  for (size_t i = 0; i < samples.size(); ++i) {
    poll_stop();
    const MicroBatch batch = train::make_micro_batch(train_set_, samples[i]);
    outcome.loss_sum += backward(batch, with_dropout(current, i), grad);
    outcome.trained_tokens += batch.trained_tokens;
    outcome.sample_tokens += batch.sample_tokens;
  }
  current = AdapterWeights();  // its views would keep the optimizer from working in place
  if (!std::isfinite(outcome.loss_sum)) {
    outcome.skipped = true;
    return outcome;
  }
  const auto result = optimizer_->step(
      std::move(*grad),
      1.0 / static_cast<double>(outcome.trained_tokens),
      schedule_(progress_.updates));
  outcome.skipped = result.skipped;
  last_grad_norm_ = result.grad_norm;
  return outcome;
}

void Trainer::Impl::advance() {
  if (planned_epoch_ != progress_.epoch) {
    plan_ = train::plan_epoch(train_set_, batch_options_, progress_.epoch);
    planned_epoch_ = progress_.epoch;
  }
  const auto& samples = plan_[progress_.cursor];
  if (!hooks.drop_step || !hooks.drop_step(progress_.iteration + 1)) {
    const auto start = Clock::now();
    const StepOutcome outcome = take_step(samples);
    account(outcome, seconds_since(start));
  }
  ++progress_.iteration;
  if (++progress_.cursor == plan_.size()) {
    progress_.cursor = 0;
    ++progress_.epoch;
  }
}

void Trainer::Impl::account(const StepOutcome& outcome, double seconds) {
  window_seconds_ += seconds;
  window_tokens_ += outcome.sample_tokens;
  sitting_seconds_ += seconds;
  ++sitting_steps_;
  progress_.seconds += seconds;
  if (outcome.skipped) {
    ++progress_.skipped;
    ++progress_.skipped_in_a_row;
    warn(fmt::format(
        "iteration {}: loss or gradient is not finite; the step is skipped ({} in a row)",
        progress_.iteration + 1,
        progress_.skipped_in_a_row));
    return;
  }
  progress_.updates = optimizer_->updates();
  progress_.skipped_in_a_row = 0;
  progress_.loss_sum += outcome.loss_sum;
  progress_.loss_tokens += outcome.trained_tokens;
  progress_.trained_tokens += outcome.trained_tokens;
  if (callbacks.on_step) {
    callbacks.on_step(
        static_cast<int>(progress_.iteration + 1),
        outcome.loss_sum / static_cast<double>(outcome.trained_tokens));
  }
}

void Trainer::Impl::stop_diverged() {
  save(false);
  throw Error(
      ErrorCode::invalid_input,
      fmt::format(
          "[train] {} steps in a row had a loss or gradient that is not finite; stopped after "
          "iteration {} with the last good weights saved",
          progress_.skipped_in_a_row,
          progress_.iteration),
      "lower learning_rate, set grad_clip 1, or use dtype float32");
}

TrainResult Trainer::Impl::run() {
  if (!config.train) return finish(false);
  start();
  bool stopped_early = false;
  for (;;) {
    const int64_t it = progress_.iteration;
    if (progress_.validation_pending) validate();
    stopped_early = config.early_stop_patience > 0 &&
                    progress_.evaluations_without_gain >= config.early_stop_patience;
    if (it >= config.iters || stopped_early) break;
    if (it > 0 && it % config.save_every == 0 && saved_iteration_ != it) save(true);
    poll_stop();
    advance();
    const bool last = progress_.iteration == config.iters;
    if (progress_.skipped_in_a_row >= kSkippedInARowLimit) stop_diverged();
    if (progress_.iteration % config.steps_per_report == 0 || last) report();
    progress_.validation_pending =
        !valid_set_.empty() && (progress_.iteration % config.steps_per_eval == 0 || last);
  }
  if (saved_iteration_ != progress_.iteration) save(progress_.iteration % config.save_every == 0);
  return finish(stopped_early);
}

// ---- public face ----

Trainer::Trainer(
    std::shared_ptr<const Model> model,
    text::Tokenizer tokenizer,
    std::optional<text::ChatTemplate> chat_template,
    TrainingConfig config,
    TrainerCallbacks callbacks)
    : impl_(std::make_unique<Impl>(
          std::move(model),
          std::move(tokenizer),
          std::move(chat_template),
          std::move(config),
          std::move(callbacks))) {}
Trainer::~Trainer() = default;
Trainer::Trainer(Trainer&&) noexcept = default;
Trainer& Trainer::operator=(Trainer&&) noexcept = default;

TrainResult Trainer::run() {
  return impl_->run();
}
AdapterWeights Trainer::adapter() const {
  return impl_->adapter();
}
MemoryEstimate Trainer::memory_estimate() const {
  return impl_->estimate;
}
void Trainer::set_samples(std::vector<ReportSample> samples) {
  impl_->set_samples(samples);
}

}  // namespace metal_lora
