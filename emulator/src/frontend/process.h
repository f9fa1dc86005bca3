// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <vector>

namespace metal_emulator::frontend {

struct ProcessResult {
  int status = 0;  ///< exit code; 128 + signal when killed
  std::string out, err;
};

/// Runs arguments[0] (found in PATH) without a shell and without input, and waits. Throws
/// std::system_error when it cannot be started. Thread-safe.
ProcessResult run_process(const std::vector<std::string>& arguments);

}  // namespace metal_emulator::frontend
