// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/ops/export.h"

#include <system_error>

#include <mlx/export.h>

#include "metal_lora/error.h"
#include "src/launch/backend.h"
#include "src/launch/metal.h"

namespace mx = mlx::core;
namespace fs = std::filesystem;

namespace metal_lora::ops {

void export_for_metal(
    const fs::path& file,
    const std::function<Arrays(const Arrays&)>& function,
    const Arrays& arguments) {
  const fs::path unfinished = file.string() + ".partial";
  try {
    BackendScope scope(Backend::metal);
    mx::export_function(
        unfinished.string(),
        std::function<Arrays(const mx::Args&)>([&](const mx::Args& in) {
          auto outputs = function(in);
          strip_gradient_nodes(outputs);
          return outputs;
        }),
        arguments);
  } catch (const std::exception& why) {
    std::error_code ignored;
    fs::remove(unfinished, ignored);
    if (dynamic_cast<const Error*>(&why) != nullptr) throw;
    throw Error(
        ErrorCode::unsupported, "[export] " + file.string() + " cannot be written: " + why.what());
  }
  std::error_code error;
  fs::rename(unfinished, file, error);
  if (error) {
    throw Error(ErrorCode::io, "[export] " + file.string() + ": " + error.message());
  }
}

}  // namespace metal_lora::ops
