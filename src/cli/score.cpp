// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <memory>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/session.h"
#include "src/io/mapped_file.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kScoreFooter = R"(Examples:
  metal-lora score -m MODEL --text "The capital of France is Paris." --json
  metal-lora score -m MODEL -a adapters --file page.txt

Prints the natural logarithm of each token's probability after the tokens before it; the first has
none. No chat template, and no token is added. Figures are comparable with other programs in
float32, the default here.)";

struct ScoreFlags {
  ModelOptions model;
  std::string text, file;
};

std::string read_text(const std::string& path) {
  const auto mapped = io::unwrap(io::MappedFile::open(path));
  const auto bytes = mapped->bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void run_score(Console& console, const ScoreFlags& options, bool has_text) {
  if (has_text == !options.file.empty()) {
    throw Error(ErrorCode::invalid_input, "[score] exactly one of --text and --file must be given");
  }
  const std::string text = has_text ? options.text : read_text(options.file);
  const Session session = Session::load(console, options.model);
  const auto tokens = session.tokenizer.encode(text, /*add_special_tokens=*/false);
  const auto scores = score_tokens(*session.model, session.adapter, tokens);
  auto logprobs = nlohmann::ordered_json::array();
  if (!tokens.empty()) logprobs.push_back(nullptr);
  double sum = 0.0;
  for (const float score : scores) {
    logprobs.push_back(score);
    sum += score;
  }
  console.emit({{"tokens", tokens}, {"logprobs", logprobs}});
  if (console.json) return;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::string piece = nlohmann::json(session.tokenizer.decode({&tokens[i], 1}, false))
                                  .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    console.line(
        i == 0 ? fmt::format("{:>8}  {:>10}  {}", tokens[i], "", piece)
               : fmt::format("{:>8}  {:>10.4f}  {}", tokens[i], scores[i - 1], piece));
  }
  if (!scores.empty()) {
    const double mean = sum / static_cast<double>(scores.size());
    console.line(fmt::format(
        "{} tokens, mean log-probability {:.4f}, perplexity {:.3f}",
        scores.size(),
        mean,
        std::exp(-mean)));
  }
}

}  // namespace

Command add_score(CLI::App& parent) {
  auto options = std::make_shared<ScoreFlags>();
  CLI::App* app = parent.add_subcommand("score", "Log-probability of each token of a text");
  options->model.add_to(*app, "float32");
  CLI::Option* text = app->add_option("--text,-t", options->text, "The text");
  app->add_option("--file,-f", options->file, "A file with the text, taken byte for byte");
  app->footer(kScoreFooter);
  return {
      app, [options, text](Console& console) { run_score(console, *options, text->count() > 0); }};
}

}  // namespace metal_lora::cli
