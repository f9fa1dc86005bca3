// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The parts of a run around its steps: starting and resuming, validation, reports, files.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>

#include "src/io/sha256.h"
#include "src/train/evaluate.h"
#include "src/train/trainer.h"

namespace metal_lora {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

namespace {

/// Keys that may change between sittings without changing what is computed.
constexpr std::array<std::string_view, 18> kFreeKeys = {
    "model",
    "train",
    "data",
    "adapter_path",
    "resume",
    "resume_adapter_file",
    "iters",
    "val_batches",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
    "test",
    "test_batches",
    "report_to",
    "project_name",
    "early_stop_patience",
    "max_memory",
    "fine_tune_type"};

nlohmann::ordered_json identity_config(const TrainingConfig& config) {
  nlohmann::ordered_json out = config.to_json();
  for (const auto key : kFreeKeys) out.erase(std::string(key));
  return out;
}

std::string adapter_hash(const AdapterWeights& adapter) {
  io::Sha256 sha;
  for (const auto& module : adapter.modules()) {
    sha.update(fmt::format(
        "{} {} {} {} {}\n",
        module.path,
        module.lora.a.shape(0),
        module.lora.a.shape(1),
        module.lora.b.shape(0),
        module.lora.scale));
  }
  return sha.finish_hex();
}

}  // namespace

train::Identity Trainer::Impl::identity() {
  if (!base_hash_.valid()) {
    // On its own thread: a large base takes longer to hash than a first step.
    base_hash_ = std::async(std::launch::async, [path = model->path()] {
                   return train::hash_model_files(path);
                 }).share();
  }
  if (!data_hash_) data_hash_ = train_set_.hash();
  return {base_hash_.get(), *data_hash_, adapter_hash(initial_), identity_config(config)};
}

void Trainer::Impl::start() {
  if (config.resume) {
    resume();
    return;
  }
  progress_.validation_pending = !valid_set_.empty();
  save_state();
}

void Trainer::Impl::resume() {
  train::State state = train::load_state(folder() / "state", identity(), callbacks.on_warning);
  optimizer_->restore(state.param, state.m, state.v, state.progress.updates);
  progress_ = state.progress;
  log_ = std::move(state.log);
  // A stop before a due validation also came before its save.
  if (!progress_.validation_pending) saved_iteration_ = progress_.iteration;
}

EvalReport Trainer::Impl::evaluate(
    const train::Dataset& dataset, int batches, const std::string& split) {
  const auto start = Clock::now();
  const auto plan = train::plan_evaluation(dataset, config.batch_size, batches);
  const auto sum = train::evaluate_batches(*model, adapter(), dataset, plan, [&](double fraction) {
    if (callbacks.on_progress) callbacks.on_progress(split, fraction);
    poll_stop();
  });
  EvalReport report;
  report.iteration = static_cast<int>(progress_.iteration);
  report.split = split;
  report.loss = sum.loss / static_cast<double>(sum.tokens);
  report.tokens = sum.tokens;
  report.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return report;
}

void Trainer::Impl::validate() {
  EvalReport report = evaluate(valid_set_, config.val_batches, "val");
  auto& p = progress_;
  // NaN is never a gain.
  report.best = std::isfinite(report.loss) && (!p.best_val_loss || report.loss < *p.best_val_loss);
  if (report.best) {
    p.best_val_loss = report.loss;
    p.best_iteration = p.iteration;
    p.evaluations_without_gain = 0;
  } else {
    ++p.evaluations_without_gain;
  }
  if (std::isfinite(report.loss)) {
    if (!p.first_val_loss) p.first_val_loss = report.loss;
    p.last_val_loss = report.loss;
  }
  p.validation_pending = false;
  train::log_eval(log_, report);
  if (report.best && p.iteration > 0) save_best();
  if (callbacks.on_eval) callbacks.on_eval(report);
}

void Trainer::Impl::report() {
  TrainReport r;
  auto& p = progress_;
  r.iteration = static_cast<int>(p.iteration);
  r.iterations = config.iters;
  // Not a number when every step since the last report was skipped.
  r.train_loss = p.loss_tokens > 0 ? p.loss_sum / static_cast<double>(p.loss_tokens)
                                   : std::numeric_limits<double>::quiet_NaN();
  r.learning_rate = schedule_(std::max<int64_t>(0, p.updates - 1));
  r.tokens_per_second =
      window_seconds_ > 0.0 ? static_cast<double>(window_tokens_) / window_seconds_ : 0.0;
  r.trained_tokens = p.trained_tokens;
  r.peak_memory_bytes = peak_memory_bytes();
  r.grad_norm = last_grad_norm_;
  r.skipped_steps = p.skipped;
  if (sitting_steps_ > 0) {
    r.eta_seconds = sitting_seconds_ / static_cast<double>(sitting_steps_) *
                    static_cast<double>(config.iters - p.iteration);
  }
  p.loss_sum = 0.0;
  p.loss_tokens = 0;
  window_seconds_ = 0.0;
  window_tokens_ = 0;
  last_train_loss_ = r.train_loss;
  train::log_step(log_, r);
  if (callbacks.on_report) callbacks.on_report(r);
}

AdapterInfo Trainer::Impl::adapter_info() const {
  AdapterInfo info;
  info.base_model = config.model.empty() ? model->path().string() : config.model;
  info.dropout = static_cast<float>(config.lora_dropout);
  // With modules taken from a file, their names alone say which layers they are in.
  const bool from_file = !config.resume_adapter_file.empty() &&
                         !config.given.contains("num_layers") &&
                         !config.given.contains("lora_parameters.keys");
  info.num_layers =
      from_file || config.num_layers > model->config().num_hidden_layers ? -1 : config.num_layers;
  auto carried = config.to_json();
  carried.erase("lora_parameters");  // the writer states what the modules are
  info.config_json[AdapterFormat::mlx_lm] = carried.dump();
  return info;
}

void Trainer::Impl::write_adapter_file(
    const fs::path& to, const std::string& file_name, bool best) {
  WriteAdapterOptions options;
  options.file_name = file_name;
  options.fold_scale = true;
  const fs::path file =
      write_adapter(to, AdapterFormat::mlx_lm, adapter(), adapter_info(), options);
  if (callbacks.on_checkpoint) {
    callbacks.on_checkpoint({static_cast<int>(progress_.iteration), file, best});
  }
}

void Trainer::Impl::save_best() {
  write_adapter_file(folder() / "best", "", true);
}

void Trainer::Impl::save_state() {
  train::save_state(
      folder() / "state",
      {progress_,
       optimizer_->param(),
       optimizer_->first_moment(),
       optimizer_->second_moment(),
       log_},
      identity());
}

void Trainer::Impl::save(bool numbered) {
  if (numbered) {
    write_adapter_file(
        folder(), fmt::format("{:07}_adapters.safetensors", progress_.iteration), false);
  }
  write_adapter_file(folder(), "", false);
  save_state();
  saved_iteration_ = progress_.iteration;
  write_html();
}

void Trainer::Impl::write_html() {
  if (config.report_to != "html") return;
  auto& facts = log_["facts"];
  facts["iterations"] = progress_.iteration;
  facts["trained_tokens"] = progress_.trained_tokens;
  facts["seconds"] = progress_.seconds;
  facts["skipped_steps"] = progress_.skipped;
  facts["parameters"] = optimizer_->param().size();
  facts["modules"] = initial_.modules().size();
  facts["weight_bytes"] = model->weight_bytes();
  facts["peak_memory_bytes"] = peak_memory_bytes();
  facts["estimated_bytes"] = estimate.total();
  facts["best_iteration"] = progress_.best_iteration;
  facts["samples"] = train_set_.size();
  facts["data_tokens"] = train_set_.token_count();
  facts["architecture"] = model->config().architecture;
  facts["layers"] = model->config().num_hidden_layers;
  train::write_report(folder(), log_);
}

void Trainer::Impl::set_samples(const std::vector<ReportSample>& samples) {
  train::log_samples(log_, samples);
}

TrainResult Trainer::Impl::finish(bool stopped_early) {
  TrainResult result;
  if (config.test) {
    const EvalReport report = evaluate(load_split("test", true), config.test_batches, "test");
    result.test_loss = report.loss;
    if (config.train) train::log_eval(log_, report);
    if (callbacks.on_eval) callbacks.on_eval(report);
  }
  const auto& p = progress_;
  result.iterations = static_cast<int>(p.iteration);
  result.train_loss = last_train_loss_;
  result.first_val_loss = p.first_val_loss;
  result.last_val_loss = p.last_val_loss;
  result.best_val_loss = p.best_val_loss;
  result.best_iteration = static_cast<int>(p.best_iteration);
  result.trained_tokens = p.trained_tokens;
  result.skipped_steps = p.skipped;
  result.seconds = p.seconds;
  result.stopped_early = stopped_early;
  result.adapter_path = folder();
  if (config.train && config.report_to == "html") {
    write_html();
    result.report_path = folder() / "report.html";
  }
  return result;
}

}  // namespace metal_lora
