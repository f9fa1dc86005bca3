// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// LoRA training: a configuration (mlx-lm's YAML keys), a Trainer, its reports. Nothing here prints;
// everything a user sees goes through TrainerCallbacks.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "metal_lora/error.h"
#include "metal_lora/model.h"
#include "src/text/chat_template.h"
#include "src/text/tokenizer.h"

namespace metal_lora {

/// A learning-rate schedule by MLX's names: cosine_decay, linear_schedule, exponential_decay,
/// step_decay (with `arguments` as in MLX), or join_schedules (with `schedules`, `boundaries`).
struct ScheduleConfig {
  std::string name;
  std::vector<double> arguments;
  int64_t warmup = 0;  ///< steps from warmup_init to arguments[0]
  double warmup_init = 0.0;
  std::vector<ScheduleConfig> schedules;
  std::vector<int64_t> boundaries;
};

/// MLX's constructor arguments of an optimizer; only those of the chosen one are used.
struct OptimizerConfig {
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
  double weight_decay = 0.0;    ///< AdamW: decoupled, default 0.01; SGD: L2
  bool bias_correction = true;  ///< as Kingma and Ba, and PyTorch; MLX's own default is false
  double momentum = 0.0, dampening = 0.0;
  bool nesterov = false;
};

/// What to train and how. Defaults are mlx-lm's; one iteration is one optimizer step.
struct TrainingConfig {
  std::string model;
  bool train = true;
  std::string fine_tune_type = "lora";
  std::string optimizer = "adam";                           ///< adam, adamw, sgd
  std::map<std::string, OptimizerConfig> optimizer_config;  ///< by optimizer name, as in YAML
  std::optional<double> weight_decay;                       ///< wins over optimizer_config
  std::string data;
  int64_t seed = 0;
  int num_layers = 16;  ///< the last N layers get adapters; −1: all
  int batch_size = 4;   ///< samples in a micro-batch
  int iters = 1000;
  int val_batches = 25;  ///< −1: all
  double learning_rate = 1e-5;
  int steps_per_report = 10;
  int steps_per_eval = 200;
  int grad_accumulation_steps = 1;  ///< micro-batches in a step
  std::string resume_adapter_file;  ///< starts from these weights, with a fresh optimizer
  std::string adapter_path = "adapters";
  int save_every = 100;
  bool test = false;
  int test_batches = 500;     ///< −1: all
  int max_seq_length = 2048;  ///< tokens
  bool grad_checkpoint = false;
  bool mask_prompt = false;
  std::string report_to = "html";  ///< html, none
  std::string project_name;        ///< title of the report

  // lora_parameters
  std::vector<std::string> lora_keys;  ///< self_attn.q_proj or q_proj; empty: all seven linears
  int lora_rank = 8;
  double lora_scale = 20.0;          ///< direct multiplier
  std::optional<double> lora_alpha;  ///< scale = alpha/rank, or alpha/√rank with rslora
  bool lora_rslora = false;
  double lora_dropout = 0.0;

  std::optional<ScheduleConfig> lr_schedule;

  // On top of mlx-lm's keys.
  bool resume = false;             ///< goes on exactly from adapter_path/state
  double grad_clip = 0.0;          ///< limit of the global gradient norm; 0: none
  bool packing = false;            ///< a "sample" is a stream filled up to max_seq_length
  std::string dtype = "bfloat16";  ///< of activations: float32, bfloat16, float16
  Quantization quantize = Quantization::none;  ///< of a dense frozen base: 0 (as stored), 4, 8, nf4
  int quantize_group_size = 64;                ///< of 4 and 8
  bool double_quant = true;                    ///< nf4: its absmax in 8 bits
  int early_stop_patience = 0;  ///< evaluations without improvement; 0: never stop early
  uint64_t max_memory = 0;      ///< bytes; 0: what the machine has available

  std::set<std::string> given;  ///< keys that a file or flag set

  /// Reads mlx-lm's YAML. Error invalid_input names file, line and key (with the nearest known
  /// one).
  static TrainingConfig from_yaml(const std::filesystem::path& file);
  static TrainingConfig from_yaml_text(
      const std::string& text, const std::string& where = "config");
  /// Sets a key of training_options() from the text of a flag; lists are comma-separated.
  void set(std::string_view key, std::string_view value);
  /// Checks ranges and combinations; Error invalid_input or unsupported naming the key.
  void validate() const;
  /// The multiplier of the adapter's product: lora_scale, or what alpha, rank and rslora give.
  double effective_scale() const;
  /// Settings of the chosen optimizer.
  OptimizerConfig optimizer_settings() const;
  LoadOptions load_options() const;
  /// Every key with its value, nested as in YAML.
  nlohmann::ordered_json to_json() const;
};

enum class OptionType { boolean, integer, number, text, list, size };

/// One configuration key that a flag can set: the command line builds its options from these.
struct TrainingOption {
  std::string_view key;    ///< "batch_size"; "lora_parameters.rank"
  std::string_view flags;  ///< "--batch-size"; several are comma-separated
  OptionType type;
  std::string default_text;
  std::string_view help;
};
const std::vector<TrainingOption>& training_options();

struct TrainReport {
  int iteration = 0, iterations = 0;
  double train_loss = 0.0;  ///< per trained token, since the last report
  double learning_rate = 0.0;
  double tokens_per_second = 0.0;  ///< tokens of samples, prompts included
  int64_t trained_tokens = 0;      ///< tokens in the loss since the start
  uint64_t peak_memory_bytes = 0;  ///< highest resident set of the process, or use of the GPU's own memory
  double grad_norm = 0.0;          ///< of the last step, before clipping
  double eta_seconds = 0.0;
  int64_t skipped_steps = 0;  ///< by the guard against non-finite values, since the start
};

struct EvalReport {
  int iteration = 0;
  std::string split;  ///< "val" or "test"
  double loss = 0.0;  ///< per token
  int64_t tokens = 0;
  double seconds = 0.0;
  bool best = false;
};

struct CheckpointReport {
  int iteration = 0;
  std::filesystem::path path;  ///< adapter file written
  bool best = false;
};

/// Called on the thread of run(); each may be empty.
struct TrainerCallbacks {
  std::function<void(const TrainReport&)> on_report;
  std::function<void(const EvalReport&)> on_eval;
  std::function<void(const CheckpointReport&)> on_checkpoint;
  std::function<void(const std::string&)> on_warning;
  std::function<void(int iteration, double loss)> on_step;                   ///< after each step
  std::function<void(std::string_view phase, double fraction)> on_progress;  ///< data, evaluation
  /// Polled before each micro-batch; true saves the state and makes run() throw interrupted.
  std::function<bool()> should_stop;
};

/// Bytes that a run needs, by part. `total` is the expected peak resident set of the process.
struct MemoryEstimate {
  uint64_t weights = 0, activations = 0, loss = 0, adapter = 0, data = 0, runtime = 0;
  uint64_t total() const { return weights + activations + loss + adapter + data + runtime; }
  int64_t micro_batch_tokens = 0;
};
/// For a micro-batch of `tokens` tokens. adapter_parameters: elements of all A and B.
MemoryEstimate estimate_memory(
    const Model& model,
    const TrainingConfig& config,
    int64_t tokens,
    int64_t adapter_parameters,
    uint64_t data_bytes = 0);
/// Bytes that this process may still take: the lesser of MemAvailable and what its control group
/// leaves, plus what it already holds. 0 where the system does not say.
uint64_t memory_limit_bytes();
/// The highest resident set of this process so far (VmHWM).
uint64_t peak_memory_bytes();

struct TrainResult {
  int iterations = 0;
  double train_loss = 0.0;
  std::optional<double> first_val_loss, last_val_loss, best_val_loss, test_loss;
  int best_iteration = 0;
  int64_t trained_tokens = 0, skipped_steps = 0;
  double seconds = 0.0;
  bool stopped_early = false;
  std::filesystem::path adapter_path, report_path;
};

/// A prompt answered before and after training, for report.html.
struct ReportSample {
  std::string prompt, expected, before, after;
};
/// Writes adapter_path/report.html again, with these samples, from the run's saved log.
void update_report(const std::filesystem::path& adapter_path, std::vector<ReportSample> samples);

/// Fits one adapter. run() may throw Error: does_not_fit before the first step, interrupted after
/// saving, invalid_input (data, resume), io. One thread at a time.
///
/// A step is grad_accumulation_steps micro-batches; its gradient is Σ token losses / Σ trained
/// tokens over all of them. A step with a non-finite loss or gradient changes nothing; ten in a row
/// stop the run, with the last good state saved.
class Trainer {
 public:
  Trainer(
      std::shared_ptr<const Model> model,
      text::Tokenizer tokenizer,
      std::optional<text::ChatTemplate> chat_template,
      TrainingConfig config,
      TrainerCallbacks callbacks = {});
  ~Trainer();
  Trainer(Trainer&&) noexcept;
  Trainer& operator=(Trainer&&) noexcept;

  TrainResult run();

  /// The adapter as it stands: after construction the initial one.
  AdapterWeights adapter() const;
  MemoryEstimate memory_estimate() const;
  /// Shown in report.html from the next save on.
  void set_samples(std::vector<ReportSample> samples);

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

/// Mean loss per token of the first `batches` micro-batches (−1: all) of DIR/<split>.jsonl.
struct EvalOptions {
  int batch_size = 4;
  int batches = -1;
  int max_seq_length = 2048;
  bool mask_prompt = false;
  std::function<void(double)> progress;
  std::function<void(const std::string&)> on_warning;
  std::function<bool()> should_stop;
};
struct EvalResult {
  double loss = 0.0, perplexity = 0.0;
  int64_t tokens = 0;
};
EvalResult evaluate_file(
    const Model& model,
    const AdapterWeights& adapter,
    const text::Tokenizer& tokenizer,
    const std::optional<text::ChatTemplate>& chat_template,
    const std::filesystem::path& jsonl,
    const EvalOptions& options);

}  // namespace metal_lora
