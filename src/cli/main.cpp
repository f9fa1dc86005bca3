// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/commands.h"
#include "src/cli/interrupt.h"

int main(int argc, char** argv) {
  metal_lora::cli::install_signal_handlers();
  return metal_lora::cli::run_command_line(argc, argv);
}
