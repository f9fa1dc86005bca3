// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "metal_emulator/emulator.h"

namespace metal_emulator::linting {

/// What Apple's compiler would refuse, as "file:line: error: message"; empty: nothing found.
/// Throws CompileError for text that cannot be preprocessed or followed.
std::vector<std::string> check(std::string_view text, const CompileOptions& options);

}  // namespace metal_emulator::linting
