// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdio>
#include <new>
#include <numeric>
#include <string_view>

#include <fmt/format.h>

#include "kernels/cpu/thread_pool.h"
#include "metal_lora/error.h"
#include "src/cli/commands.h"
#include "src/cli/version.h"
#include "src/launch/backend.h"

namespace metal_lora::cli {
namespace {

constexpr int kMaxThreads = 1024;

constexpr const char* kExamples = R"(Examples:
  MODEL=$(scripts/get-model smollm2-135m-instruct)
  metal-lora generate --model $MODEL --chat --prompt "Why is the sky blue?"
  metal-lora train    --model $MODEL --data data/ --iters 60 --learning-rate 1e-3 --mask-prompt
  metal-lora chat     --model $MODEL --adapter-path adapters
  metal-lora eval     --model $MODEL --adapter-path adapters --data data/
  metal-lora fuse     --model $MODEL --adapter-path adapters --output fused-model

`metal-lora COMMAND --help` explains a command. Exit codes: 0 done, 2 bad input, 3 not found,
4 the system refused (disk full …), 5 will not fit in memory, 130 interrupted, 1 a defect.)";

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t changed = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
    }
  }
  return row[b.size()];
}

/// "; did you mean …?" for the nearest of `known`, when it is near.
std::string suggestion(const std::string& word, const std::vector<std::string>& known) {
  const auto nearest =
      std::min_element(known.begin(), known.end(), [&](const auto& x, const auto& y) {
        return edit_distance(word, x) < edit_distance(word, y);
      });
  if (nearest == known.end() ||
      edit_distance(word, *nearest) > std::max<size_t>(2, word.size() / 3)) {
    return {};
  }
  return *nearest;
}

std::vector<std::string> option_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

[[noreturn]] void refuse_word(const CLI::App& root, const CLI::App& app, std::string word) {
  word = word.substr(0, word.find('='));
  std::vector<std::string> known = option_names(app);
  const bool is_flag = word.starts_with("-");
  if (&app == &root && !is_flag) {
    known.clear();
    for (const CLI::App* command : root.get_subcommands([](const CLI::App*) { return true; })) {
      known.push_back(command->get_name());
    }
  }
  const std::string nearest = suggestion(word, known);
  const std::string command = &app == &root ? "metal-lora" : "metal-lora " + app.get_name();
  throw Error(
      ErrorCode::invalid_input,
      fmt::format("[{}] has no {} {}", command, is_flag ? "option" : "argument or command", word),
      nearest.empty() ? command + " --help lists what there is"
                      : fmt::format("did you mean {}?", nearest));
}

/// A parse failure of CLI11 as our Error; an unknown word comes first, since a misspelt --model
/// also looks like a missing one.
[[noreturn]] void refuse_parse(const CLI::App& root, const CLI::ParseError& error) {
  const CLI::App* app = &root;
  while (!app->get_subcommands().empty()) app = app->get_subcommands().front();
  for (const std::string& word : app->remaining()) {
    if (word != "--") refuse_word(root, *app, word);
  }
  const std::string command = app == &root ? "metal-lora" : "metal-lora " + app->get_name();
  throw Error(
      ErrorCode::invalid_input,
      fmt::format("[{}] {}", command, error.what()),
      command + " --help explains it");
}

void report(Console& console, std::string_view code, const std::string& message) {
  console.clear_progress();
  try {
    console.emit({{"error", {{"code", code}, {"message", message}}}});
  } catch (...) {  // stdout is gone: stderr still gets it
  }
  std::fprintf(stderr, "error: %s\n", message.c_str());
}

int parse_and_run(
    CLI::App& root,
    std::vector<Command>& commands,
    Console& console,
    std::vector<std::string> words) {
  try {
    std::reverse(words.begin(), words.end());
    root.parse(words);
  } catch (const CLI::Success& success) {  // --help, --version
    root.exit(success);
    return 0;
  } catch (const CLI::ParseError& error) {
    refuse_parse(root, error);
  }
  for (const Command& command : commands) {
    if (!command.app->parsed()) continue;
    if (const auto words_left = command.app->remaining(); !words_left.empty()) {
      refuse_word(root, *command.app, words_left.front());
    }
    command.run(console);
    return 0;
  }
  if (const auto words_left = root.remaining(); !words_left.empty()) {
    refuse_word(root, root, words_left.front());
  }
  std::fputs(root.help().c_str(), stdout);
  return 0;
}

/// --json, --quiet and --threads belong to every command.
void add_shared_options(CLI::App& app, Console& console) {
  app.add_flag(
      "--json", console.json, "One JSON object a line on stdout; text for people on stderr");
  app.add_flag("--quiet,-q", console.quiet, "No notes on stderr");
  app.add_option_function<int>(
         "--threads",
         [](const int& threads) { cpu::set_thread_count(threads); },
         "Processor cores to use (default: METAL_LORA_THREADS, else all that this process may use)")
      ->check(CLI::Range(1, kMaxThreads));
}

}  // namespace

int run_command_line(int argc, const char* const* argv) {
  Console console;
  const std::vector<std::string> words(argv + 1, argv + argc);
  // Known before parsing, so that a parse error is reported in the right form too.
  console.json = std::find(words.begin(), words.end(), "--json") != words.end();
  const bool json = console.json;
  try {
    set_default_device_for(active_backend());
    CLI::App root{
        "Low-rank adaptation of language models: fine-tune a model on your data, talk to it, "
        "measure it.",
        "metal-lora"};
    root.set_version_flag("--version", version_line());
    root.footer(kExamples);
    root.require_subcommand(0, 1);
    root.allow_extras();
    std::vector<Command> commands = {
        add_train(root),
        add_generate(root),
        add_chat(root),
        add_eval(root),
        add_score(root),
        add_tokenize(root),
        add_inspect(root),
        add_convert(root),
        add_fuse(root),
        add_export(root),
        add_bench(root)};
    for (Command& command : commands) {
      command.app->allow_extras();
      add_shared_options(*command.app, console);
    }
    return parse_and_run(root, commands, console, words);
  } catch (const OutputClosed&) {
    return 0;
  } catch (const Error& error) {
    console.json = json;
    const ErrorTraits& traits = error_traits(error.code());
    report(console, traits.name, error.what());
    return traits.exit_code;
  } catch (const std::bad_alloc&) {
    const ErrorTraits& traits = error_traits(ErrorCode::does_not_fit);
    report(console, traits.name, "[memory] the system has no more memory");
    return traits.exit_code;
  } catch (const std::exception& error) {
    const ErrorTraits& traits = error_traits(ErrorCode::internal);
    report(console, traits.name, std::string("[internal] ") + error.what());
    return traits.exit_code;
  }
}

}  // namespace metal_lora::cli
