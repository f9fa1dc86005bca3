// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <filesystem>
#include <memory>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "metal_lora/train.h"
#include "src/cli/commands.h"
#include "src/cli/interrupt.h"
#include "src/cli/session.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kEvalFooter = R"(Examples:
  metal-lora eval -m MODEL --data data/ --json
  metal-lora eval -m MODEL -a adapters --data data/ --split valid --mask-prompt

Mean loss per token over DIR/test.jsonl (or another split), and its exponential, the perplexity.)";

struct EvalFlags {
  ModelOptions model;
  std::string data, split = "test";
  EvalOptions eval;
};

std::filesystem::path split_file(const EvalFlags& options) {
  const std::filesystem::path data = options.data;
  if (std::filesystem::is_regular_file(data)) return data;
  const auto file = data / (options.split + ".jsonl");
  if (!std::filesystem::exists(file)) {
    throw Error(
        ErrorCode::not_found,
        fmt::format("[eval] {} does not exist", file.string()),
        "--split train, valid or test picks another file of the folder");
  }
  return file;
}

void run_eval(Console& console, const EvalFlags& options) {
  const auto file = split_file(options);
  const Session session = Session::load(console, options.model);
  const Interruptible interrupt;
  EvalOptions eval = options.eval;
  eval.progress = [&](double fraction) {
    console.progress(fmt::format("eval {} {:.0f} %", progress_bar(fraction, 30), 100 * fraction));
  };
  eval.on_warning = [&](const std::string& text) { console.warn(text); };
  eval.should_stop = [&] { return interrupt.requested(); };
  const EvalResult result = evaluate_file(
      *session.model, session.adapter, session.tokenizer, session.chat_template, file, eval);
  console.clear_progress();
  console.emit(
      {{"loss", result.loss}, {"perplexity", result.perplexity}, {"tokens", result.tokens}});
  if (!console.json) {
    console.line(fmt::format(
        "{}: loss {:.4f}, perplexity {:.3f} over {} tokens",
        file.string(),
        result.loss,
        result.perplexity,
        result.tokens));
  }
}

}  // namespace

Command add_eval(CLI::App& parent) {
  auto options = std::make_shared<EvalFlags>();
  CLI::App* app = parent.add_subcommand("eval", "Loss and perplexity on a data set");
  options->model.add_to(*app, "float32");
  app->add_option("--data", options->data, "Folder with test.jsonl, or one .jsonl file")
      ->required();
  app->add_option("--split", options->split, "train, valid or test")
      ->check(CLI::IsMember({"train", "valid", "test"}))
      ->capture_default_str();
  app->add_option("--batch-size", options->eval.batch_size, "Samples at once")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--batches", options->eval.batches, "Batches at most; -1: all")
      ->capture_default_str();
  app->add_option("--max-seq-length", options->eval.max_seq_length, "Longer samples are cut")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_flag("--mask-prompt", options->eval.mask_prompt, "Count the answers only");
  app->footer(kEvalFooter);
  return {app, [options](Console& console) { run_eval(console, *options); }};
}

}  // namespace metal_lora::cli
