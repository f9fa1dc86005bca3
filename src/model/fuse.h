// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "metal_lora/adapter.h"
#include "src/model/convert.h"

namespace metal_lora {

/// Noise beside the update (KeptUpdate::error of all linears together) from which a merge warns,
/// and from which it is refused: there half the update's norm is rounding noise, and the adapter
/// would silently do less than it was trained to.
inline constexpr double kWarnUpdateError = 0.1;
inline constexpr double kRefuseUpdateError = 0.5;

struct FuseReport {
  std::vector<KeptUpdate> linears;
  KeptUpdate total;         ///< path empty
  double kl_merged = 0.0;   ///< mean KL(base + adapter ‖ merged model) per token, nats
  double kl_adapter = 0.0;  ///< mean KL(base + adapter ‖ base): what the adapter does
  int prompt_tokens = 0;    ///< of the fixed prompt; 0: not measured
};

struct FuseOptions {
  ExportOptions target;     ///< its adapter is overwritten
  bool allow_loss = false;  ///< write even what kRefuseUpdateError refuses
  std::string prompt =
      "The quick brown fox jumps over the lazy dog. SELECT name FROM people WHERE age > 30;";
};

/// W + scale·B·A for every module into a new folder (see export_model), checked by reading it back:
/// the logits of the prompt, in f32, of base + adapter, of the merged model and of the base. When
/// the target's rounding loses the adapter, Error invalid_input, and the folder holds no
/// config.json. Memory: one model at a time.
FuseReport fuse_adapter(
    const std::filesystem::path& model,
    const std::filesystem::path& adapter,
    const std::filesystem::path& folder,
    FuseOptions options);

}  // namespace metal_lora
