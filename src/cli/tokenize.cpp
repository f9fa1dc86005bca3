// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <memory>

#include <fmt/format.h>

#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/io/mapped_file.h"
#include "src/text/tokenizer.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kTokenizeFooter = R"(Examples:
  metal-lora tokenize -m MODEL --text "Hello, world" --json
  metal-lora tokenize -m MODEL --file page.txt --add-special-tokens

Needs the tokenizer alone: a GGUF file, or a folder with tokenizer.json.)";

struct TokenizeFlags {
  std::string model, text, file;
  bool add_special_tokens = false;
};

std::string input_text(const TokenizeFlags& options) {
  if (options.file.empty()) return options.text;
  const auto mapped = io::unwrap(io::MappedFile::open(options.file));
  const auto bytes = mapped->bytes();
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void run_tokenize(Console& console, const TokenizeFlags& options, bool has_text) {
  if (has_text == !options.file.empty()) {
    throw Error(
        ErrorCode::invalid_input, "[tokenize] exactly one of --text and --file must be given");
  }
  const auto tokenizer = text::Tokenizer::from_path(options.model);
  const auto tokens = tokenizer.encode(input_text(options), options.add_special_tokens);
  console.emit({{"tokens", tokens}});
  if (console.json) return;
  for (const int32_t& id : tokens) {
    const std::string piece = nlohmann::json(tokenizer.decode({&id, 1}, false))
                                  .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    console.line(fmt::format("{:>8}  {}", id, piece));
  }
  console.note(fmt::format("{} tokens", tokens.size()));
}

}  // namespace

Command add_tokenize(CLI::App& parent) {
  auto options = std::make_shared<TokenizeFlags>();
  CLI::App* app = parent.add_subcommand("tokenize", "Token ids of a text");
  app->add_option("--model,-m", options->model, "A .gguf file or a Hugging Face folder")
      ->required();
  CLI::Option* text = app->add_option("--text,-t", options->text, "The text");
  app->add_option("--file,-f", options->file, "A file with the text, taken byte for byte");
  app->add_flag(
      "--add-special-tokens", options->add_special_tokens, "Add BOS where the model has one");
  app->footer(kTokenizeFooter);
  return {app, [options, text](Console& console) {
            run_tokenize(console, *options, text->count() > 0);
          }};
}

}  // namespace metal_lora::cli
