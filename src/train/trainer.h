// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <mlx/array.h>

#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "metal_lora/adapter.h"
#include "metal_lora/train.h"
#include "src/train/batches.h"
#include "src/train/checkpoint.h"
#include "src/train/dataset.h"
#include "src/train/optimizer.h"
#include "src/train/report.h"
#include "src/train/schedule.h"

namespace metal_lora::train {

/// The packed stream as the model takes it.
struct ModelInputs {
  mlx::core::array tokens, targets, weights;
  ops::Segments segments;
};
ModelInputs to_inputs(const MicroBatch& batch);

/// Faults for tests: what a run does when a device or a batch goes wrong.
struct Hooks {
  /// May replace loss or gradient of a micro-batch. Iterations count from 1.
  std::function<void(int64_t iteration, double& loss, mlx::core::array& grad)> after_backward;
  /// true: the step's batch is passed over as if it were not in the data.
  std::function<bool(int64_t iteration)> drop_step;
};

}  // namespace metal_lora::train

namespace metal_lora {

struct Trainer::Impl {
  Impl(
      std::shared_ptr<const Model> model,
      text::Tokenizer tokenizer,
      std::optional<text::ChatTemplate> chat_template,
      TrainingConfig config,
      TrainerCallbacks callbacks);

  TrainResult run();
  AdapterWeights adapter() const;
  void set_samples(const std::vector<ReportSample>& samples);

  std::shared_ptr<const Model> model;
  text::Tokenizer tokenizer;
  std::optional<text::ChatTemplate> chat_template;
  TrainingConfig config;
  TrainerCallbacks callbacks;
  train::Hooks hooks;
  MemoryEstimate estimate;

 private:
  struct StepOutcome {
    double loss_sum = 0.0;
    int64_t trained_tokens = 0, sample_tokens = 0;
    bool skipped = false;
  };

  train::Dataset load_split(const std::string& name, bool required);
  void build_adapter();
  void check_memory();
  std::string memory_hint(uint64_t limit) const;
  train::Identity identity();
  void resume();
  void start();

  StepOutcome take_step(const train::StepSamples& samples);
  AdapterWeights with_dropout(const AdapterWeights& weights, size_t micro) const;
  /// Loss sum of a micro-batch; adds its gradient to `grad`.
  double backward(
      const train::MicroBatch& batch,
      const AdapterWeights& adapter,
      std::optional<mlx::core::array>& grad);
  /// Evaluates a micro-batch's loss sum and gradient; `grad` becomes their sum so far.
  double add_gradient(
      const mlx::core::array& value, mlx::core::array flat, std::optional<mlx::core::array>& grad);
  /// Takes the next step of the data plan.
  void advance();
  void account(const StepOutcome& outcome, double seconds);
  void report();
  EvalReport evaluate(const train::Dataset& dataset, int batches, const std::string& split);
  void validate();
  AdapterInfo adapter_info() const;
  void write_adapter_file(const std::filesystem::path& to, const std::string& file_name, bool best);
  void save_state();
  void save(bool numbered);
  void save_best();
  void write_html();
  void poll_stop();
  [[noreturn]] void stop_diverged();
  TrainResult finish(bool stopped_early);
  void warn(const std::string& text) const;
  std::vector<mlx::core::array> split_parameters(const mlx::core::array& flat) const;
  mlx::core::array flatten(const std::vector<mlx::core::array>& arrays) const;
  std::filesystem::path folder() const { return config.adapter_path; }

  /// Decides at the first step of a run how its steps are worked out, and says so once.
  void choose_step(const AdapterWeights& adapter);
  /// Bytes that a step's activations may take.
  size_t activation_budget() const;

  AdapterWeights initial_;
  std::shared_ptr<ops::TrainPlan> train_plan_;  ///< null: by single operations
  bool step_chosen_ = false;
  std::optional<train::Optimizer> optimizer_;
  train::Schedule schedule_;
  train::Dataset train_set_, valid_set_;
  train::BatchOptions batch_options_;
  std::vector<train::StepSamples> plan_;
  uint64_t planned_epoch_ = ~uint64_t{0};
  train::Progress progress_;
  train::RunLog log_;
  std::shared_future<std::string> base_hash_;
  std::optional<std::string> data_hash_;
  int64_t saved_iteration_ = -1;
  double last_grad_norm_ = 0.0, last_train_loss_ = 0.0;
  // Since the last report, of this sitting.
  double window_seconds_ = 0.0;
  int64_t window_tokens_ = 0;
  int64_t sitting_steps_ = 0;
  double sitting_seconds_ = 0.0;
};

}  // namespace metal_lora
