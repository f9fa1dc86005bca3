// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <iostream>
#include <iterator>
#include <memory>

#include <fmt/format.h>
#include <unistd.h>

#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/interrupt.h"
#include "src/cli/session.h"
#include "src/io/jsonl.h"

namespace metal_lora::cli {
namespace {

constexpr const char* kGenerateFooter = R"(Examples:
  metal-lora generate -m MODEL --chat --prompt "Name three rivers." --temp 0.7 --seed 1
  metal-lora generate -m MODEL -a adapters --chat --prompts-file questions.jsonl --json
  echo "Once upon a time" | metal-lora generate -m MODEL --prompt - --max-tokens 40

--prompts-file has one object a line, {"prompt": "…"} or {"messages": [{"role", "content"}, …]}; the
model is loaded once and the answers come in the same order. Without --chat a prompt is continued as
it stands; with --chat it is the user's turn in the model's chat template.)";

struct GenerateFlags {
  ModelOptions model;
  SamplingFlags sampling;
  std::string prompt, prompts_file, system;
  bool chat = false;
};

/// One thing to answer.
struct Request {
  std::string prompt;
  nlohmann::ordered_json messages;  ///< null: the prompt as it stands
};

std::string read_stdin() {
  return {std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>()};
}

Request chat_request(const std::string& prompt, const std::string& system) {
  Request request;
  request.messages = nlohmann::ordered_json::array();
  if (!system.empty()) request.messages.push_back({{"role", "system"}, {"content", system}});
  request.messages.push_back({{"role", "user"}, {"content", prompt}});
  return request;
}

std::vector<Request> read_requests(const GenerateFlags& options) {
  const auto as_request = [&](const std::string& prompt) {
    return options.chat ? chat_request(prompt, options.system) : Request{prompt, nullptr};
  };
  if (options.prompts_file.empty()) {
    return {as_request(options.prompt == "-" ? read_stdin() : options.prompt)};
  }
  const auto file = io::unwrap(io::JsonlFile::open(options.prompts_file));
  std::vector<Request> requests;
  for (uint64_t i = 0; i < file.size(); ++i) {
    const io::Json row = io::unwrap(file.parse(i));
    if (row.is_object() && row.contains("messages") && row["messages"].is_array()) {
      // Parsed again with the order of keys kept: a template may print a message as it is.
      requests.push_back({"", nlohmann::ordered_json::parse(file.row(i).text)["messages"]});
    } else if (row.is_object() && row.contains("prompt") && row["prompt"].is_string()) {
      requests.push_back(as_request(row["prompt"].get<std::string>()));
    } else {
      io::throw_failure(file.failure(
          i, "", "an object with \"prompt\" (text) or \"messages\" (an array)", "something else"));
    }
  }
  return requests;
}

void answer(
    Console& console,
    Generator& generator,
    const Session& session,
    const Request& request,
    const GenerateOptions& options,
    const Interruptible& interrupt) {
  const auto tokens = request.messages.is_null() ? session.encode(request.prompt)
                                                 : session.encode_chat(request.messages);
  // With --json people still see the answer grow, if somebody is looking.
  const bool stream = !console.json || console.stderr_is_terminal();
  const GenerationResult result = generator.generate(
      tokens,
      options,
      [&](std::string_view text) {
        if (stream) console.print(text);
        return true;
      },
      interrupt.flag());
  if (stream) console.print("\n");
  console.emit(to_json(result));
  console.note(fmt::format(
      "prompt: {} tokens, {:.1f} tokens/s; answer: {} tokens, {:.1f} tokens/s ({}); peak memory {}",
      result.prompt_tokens,
      result.prompt_tps,
      result.tokens.size(),
      result.generation_tps,
      finish_reason_name(result.finish_reason),
      format_bytes(static_cast<double>(result.peak_memory_bytes))));
  if (interrupt.requested()) throw Error(ErrorCode::interrupted, "[generate] interrupted");
}

void run_generate(Console& console, const GenerateFlags& options) {
  if (options.prompt.empty() == options.prompts_file.empty()) {
    throw Error(
        ErrorCode::invalid_input,
        "[generate] exactly one of --prompt (with text) and --prompts-file must be given");
  }
  const GenerateOptions generate = options.sampling.resolve();
  const std::vector<Request> requests = read_requests(options);
  Session session = Session::load(console, options.model);
  Generator generator(session.model, session.tokenizer, session.adapter);
  const Interruptible interrupt;
  for (const Request& request : requests) {
    answer(console, generator, session, request, generate, interrupt);
  }
}

}  // namespace

Command add_generate(CLI::App& parent) {
  auto options = std::make_shared<GenerateFlags>();
  CLI::App* app = parent.add_subcommand("generate", "Continue a prompt, or answer it with --chat");
  options->model.add_to(*app, "bfloat16");
  app->add_option("--prompt,-p", options->prompt, "The prompt; - reads it from stdin");
  app->add_option("--prompts-file", options->prompts_file, "JSON lines with many prompts");
  app->add_flag("--chat", options->chat, "Put the prompt into the model's chat template");
  app->add_option("--system", options->system, "The system message, with --chat");
  options->sampling.add_to(*app);
  app->footer(kGenerateFooter);
  return {app, [options](Console& console) { run_generate(console, *options); }};
}

}  // namespace metal_lora::cli
