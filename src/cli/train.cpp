// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "metal_lora/train.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/console.h"
#include "src/cli/interrupt.h"
#include "src/cli/samples.h"

namespace metal_lora::cli {
namespace {

constexpr int kBarWidth = 20;
constexpr int kSparklineWidth = 60;

constexpr const char* kTrainFooter = R"(Examples:
  metal-lora train -m MODEL --data data/ --iters 60 --learning-rate 1e-3 --rank 16 --num-layers -1 --mask-prompt
  metal-lora train --config lora.yaml --batch-size 2
  metal-lora train -m MODEL --data data/ --adapter-path adapters --resume

DIR/train.jsonl and DIR/valid.jsonl hold one sample a line: {"prompt", "completion"},
{"messages": [{"role", "content"}, …]} or {"text"}. --config reads mlx-lm's YAML; flags win over it.
The adapter (mlx-lm's format) and report.html appear in --adapter-path. Ctrl-C saves the exact state;
--resume goes on from there.)";

struct TrainFlags {
  std::string config_file;
  std::string sample_prompts;
  std::map<std::string, std::string> values;  ///< by key, of the flags that were given
};

std::string with_negation(std::string_view flags) {
  const std::string first(flags.substr(0, flags.find(',')));
  return fmt::format("{},!--no-{}", flags, first.substr(2));
}

void add_option(CLI::App& app, const TrainingOption& option, TrainFlags& options) {
  const std::string key(option.key), flags(option.flags), help(option.help);
  const auto store = [&options, key](const std::string& value) { options.values[key] = value; };
  if (option.type == OptionType::boolean) {
    app.add_flag(
        with_negation(flags),
        [store](std::int64_t count) { store(count > 0 ? "true" : "false"); },
        help);
  } else {
    CLI::Option* added = app.add_option_function<std::string>(flags, store, help);
    added->type_name(
        option.type == OptionType::integer  ? "INT"
        : option.type == OptionType::number ? "NUMBER"
        : option.type == OptionType::size   ? "SIZE"
        : option.type == OptionType::list   ? "A,B,…"
                                            : "TEXT");
    if (!option.default_text.empty()) added->default_str(option.default_text);
  }
}

TrainingConfig read_config(const TrainFlags& options) {
  TrainingConfig config = options.config_file.empty()
                              ? TrainingConfig{}
                              : TrainingConfig::from_yaml(options.config_file);
  for (const auto& [key, value] : options.values) config.set(key, value);
  const auto require = [](const std::string& value, const char* what) {
    if (!value.empty()) return;
    throw Error(
        ErrorCode::invalid_input,
        fmt::format("[train] --{} must be given but is not", what),
        "metal-lora train --help has examples");
  };
  require(config.model, "model");
  require(config.data, "data");
  config.validate();
  return config;
}

/// Turns callbacks into a progress line, lines for people and lines of JSON.
class Display {
 public:
  Display(Console& console, const TrainingConfig& config, const Interruptible& interrupt)
      : console_(console), config_(config), interrupt_(interrupt) {}

  TrainerCallbacks callbacks() {
    TrainerCallbacks callbacks;
    callbacks.on_report = [this](const TrainReport& report) { on_report(report); };
    callbacks.on_eval = [this](const EvalReport& report) { on_eval(report); };
    callbacks.on_step = [this](int iteration, double loss) { on_step(iteration, loss); };
    callbacks.on_warning = [this](const std::string& text) { console_.warn(text); };
    callbacks.on_progress = [this](std::string_view phase, double fraction) {
      console_.progress(
          fmt::format("{} {} {:.0f} %", phase, progress_bar(fraction, kBarWidth), 100 * fraction));
    };
    callbacks.on_checkpoint = [this](const CheckpointReport& report) {
      if (!console_.json && report.iteration < config_.iters) {
        console_.note(
            fmt::format("iteration {}: saved {}", report.iteration, report.path.string()));
      }
    };
    callbacks.should_stop = [this] { return interrupt_.requested(); };
    return callbacks;
  }

  void summary(const TrainResult& result) {
    console_.clear_progress();
    console_.emit(
        {{"iterations", result.iterations},
         {"adapter_path", result.adapter_path.string()},
         {"report_path", result.report_path.string()},
         {"best_iteration", result.best_iteration},
         {"trained_tokens", result.trained_tokens},
         {"skipped_steps", result.skipped_steps},
         {"seconds", result.seconds}});
    if (console_.quiet) return;
    if (losses_.size() > 1) {
      console_.line(fmt::format(
          "loss {:.3f} {} {:.3f}",
          losses_.front(),
          sparkline(losses_, kSparklineWidth),
          losses_.back()));
    }
    if (result.first_val_loss && result.last_val_loss) {
      console_.line(fmt::format(
          "validation loss {:.4f} -> {:.4f}, best {:.4f} at iteration {}",
          *result.first_val_loss,
          *result.last_val_loss,
          result.best_val_loss.value_or(*result.last_val_loss),
          result.best_iteration));
    }
    if (result.test_loss) console_.line(fmt::format("test loss {:.4f}", *result.test_loss));
    console_.line(fmt::format(
        "{} iterations{}, {} trained tokens in {}; peak memory {}",
        result.iterations,
        result.stopped_early ? " (stopped early)" : "",
        result.trained_tokens,
        format_duration(result.seconds),
        format_bytes(static_cast<double>(peak_memory_bytes()))));
    if (result.skipped_steps > 0) {
      console_.line(fmt::format(
          "{} steps were skipped: their gradient was not finite", result.skipped_steps));
    }
    console_.line("adapter: " + console_.bold(result.adapter_path.string()));
    if (!result.report_path.empty())
      console_.line("report:  " + console_.bold(result.report_path.string()));
  }

 private:
  void on_step(int iteration, double loss) {
    losses_.push_back(loss);
    const double fraction = static_cast<double>(iteration) / std::max(1, config_.iters);
    std::string text = fmt::format(
        "{} {}/{}  loss {:.3f}", progress_bar(fraction, kBarWidth), iteration, config_.iters, loss);
    if (val_loss_) text += fmt::format("  val {:.3f}", *val_loss_);
    if (last_) {
      text += fmt::format(
          "  {:.0f} tokens/s  {}  {} left",
          last_->tokens_per_second,
          format_bytes(static_cast<double>(last_->peak_memory_bytes)),
          format_duration(last_->eta_seconds));
    }
    console_.progress(text);
  }

  void on_report(const TrainReport& report) {
    last_ = report;
    console_.emit(
        {{"iteration", report.iteration},
         {"train_loss", report.train_loss},
         {"learning_rate", report.learning_rate},
         {"tokens_per_second", report.tokens_per_second},
         {"trained_tokens", report.trained_tokens},
         {"peak_memory_bytes", report.peak_memory_bytes}});
    if (console_.quiet) return;
    console_.line(fmt::format(
        "iteration {:>5}/{}  loss {:.4f}  lr {:.2e}  |gradient| {:.3f}  {:.0f} tokens/s  {}  {} "
        "left",
        report.iteration,
        report.iterations,
        report.train_loss,
        report.learning_rate,
        report.grad_norm,
        report.tokens_per_second,
        format_bytes(static_cast<double>(report.peak_memory_bytes)),
        format_duration(report.eta_seconds)));
  }

  void on_eval(const EvalReport& report) {
    console_.clear_progress();
    if (report.split == "val") val_loss_ = report.loss;
    console_.emit({{"iteration", report.iteration}, {report.split + "_loss", report.loss}});
    if (console_.quiet) return;
    console_.line(fmt::format(
        "iteration {:>5}  {} loss {:.4f} ({} tokens, {}){}",
        report.iteration,
        report.split,
        report.loss,
        report.tokens,
        format_duration(report.seconds),
        report.best ? "  best so far" : ""));
  }

  Console& console_;
  const TrainingConfig& config_;
  const Interruptible& interrupt_;
  std::vector<double> losses_;
  std::optional<double> val_loss_;
  std::optional<TrainReport> last_;
};

void describe(
    Console& console, const Model& model, const Trainer& trainer, const TrainingConfig& config) {
  if (console.quiet) return;
  int64_t parameters = 0;
  const AdapterWeights adapter = trainer.adapter();
  for (const auto& array : adapter.parameters()) parameters += static_cast<int64_t>(array.size());
  const MemoryEstimate estimate = trainer.memory_estimate();
  console.line(fmt::format(
      "{}: {} layers, {} weights; adapter of rank {} on {} linears, {} parameters",
      config.model,
      model.config().num_hidden_layers,
      format_bytes(static_cast<double>(model.weight_bytes())),
      config.lora_rank,
      adapter.modules().size(),
      parameters));
  const auto bytes = [](uint64_t n) { return format_bytes(static_cast<double>(n)); };
  console.line(fmt::format(
      "expected memory {}: weights {}, activations {}, loss {}, adapter {}, data {}, program {}",
      bytes(estimate.total()),
      bytes(estimate.weights),
      bytes(estimate.activations),
      bytes(estimate.loss),
      bytes(estimate.adapter),
      bytes(estimate.data),
      bytes(estimate.runtime)));
}

void run_train(Console& console, const TrainFlags& options) {
  const TrainingConfig config = read_config(options);
  std::vector<ReportSample> samples;
  if (!options.sample_prompts.empty()) samples = read_samples(options.sample_prompts);
  LoadOptions load = config.load_options();
  load.progress = [&](double fraction) {
    console.progress(fmt::format("loading {} {:.0f} %", config.model, 100 * fraction));
  };
  const auto model = Model::load(config.model, load);
  console.clear_progress();
  const Interruptible interrupt;
  Display display(console, config, interrupt);
  const auto tokenizer = text::Tokenizer::from_path(config.model);
  const auto chat_template = text::ChatTemplate::from_path(config.model);
  Trainer trainer(model, tokenizer, chat_template, config, display.callbacks());
  describe(console, *model, trainer, config);
  const auto answer = [&](const AdapterWeights& adapter, std::string ReportSample::*member) {
    const Session session{model, tokenizer, chat_template, adapter, {}};
    answer_samples(console, session, interrupt, member, samples);
  };
  answer({}, &ReportSample::before);
  const TrainResult result = trainer.run();
  if (!samples.empty() && !result.report_path.empty()) {
    answer(trainer.adapter(), &ReportSample::after);
    update_report(config.adapter_path, samples);
  }
  display.summary(result);
}

}  // namespace

Command add_train(CLI::App& parent) {
  auto options = std::make_shared<TrainFlags>();
  CLI::App* app = parent.add_subcommand("train", "Fine-tune a LoRA adapter on your data");
  app->add_option(
      "--config,-c", options->config_file, "YAML with mlx-lm's keys; flags win over it");
  app->add_option(
         "--sample-prompts",
         options->sample_prompts,
         "JSONL of {\"prompt\", \"completion\"}: report.html shows the first six answered before "
         "and "
         "after training")
      ->type_name("FILE");
  bool has_train_flag = false;
  for (const TrainingOption& option : training_options()) {
    if (option.flags.empty()) continue;
    has_train_flag = has_train_flag || option.key == "train";
    add_option(*app, option, *options);
  }
  if (!has_train_flag) {
    app->add_flag(
        "--train,!--no-train",
        [raw = options.get()](std::int64_t count) {
          raw->values["train"] = count > 0 ? "true" : "false";
        },
        "Train (the default); --no-train only tests");
  }
  app->footer(kTrainFooter);
  return {app, [options](Console& console) { run_train(console, *options); }};
}

}  // namespace metal_lora::cli
