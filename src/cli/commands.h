// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

#include "src/cli/console.h"

namespace metal_lora::cli {

/// A subcommand and what runs when it is chosen; the options it reads live in the closure.
struct Command {
  CLI::App* app = nullptr;
  std::function<void(Console&)> run;
};

Command add_train(CLI::App& parent);
Command add_generate(CLI::App& parent);
Command add_chat(CLI::App& parent);
Command add_eval(CLI::App& parent);
Command add_score(CLI::App& parent);
Command add_tokenize(CLI::App& parent);
Command add_inspect(CLI::App& parent);
Command add_convert(CLI::App& parent);
Command add_fuse(CLI::App& parent);
Command add_export(CLI::App& parent);
Command add_bench(CLI::App& parent);

/// The whole program; the exit code is that of error_traits.
int run_command_line(int argc, const char* const* argv);

}  // namespace metal_lora::cli
