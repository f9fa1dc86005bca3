// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <nlohmann/json.hpp>
#include <string>

namespace metal_lora::cli {

/// "metal-lora 0.1.0 (commit, MLX 0.32.4)"
std::string version_line();
/// Machine, commit, compiler, build type, MLX, instruction set, threads: what a figure depends on.
nlohmann::ordered_json build_and_machine();

}  // namespace metal_lora::cli
