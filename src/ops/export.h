// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <filesystem>
#include <functional>

#include "src/launch/launch.h"

namespace metal_lora::ops {

/// Traces `function` with the Metal backend and writes the graph as MLX's .mlxfn: a Mac imports it
/// with mlx.core.import_function and runs the kernels in it. Needs no GPU here. Replaces `file`
/// only when the graph is whole. Error unsupported when the graph holds what MLX cannot write.
void export_for_metal(
    const std::filesystem::path& file,
    const std::function<Arrays(const Arrays&)>& function,
    const Arrays& arguments);

/// One AdamW step as Metal kernels. in: param, grad, m, v, f32 [count]; factors f32 [8] as
/// metal::adamw_factors makes them; out: new param, m, v, grad_norm f32 and skipped int32 scalars.
Arrays adamw_metal(const Arrays& in, const mlx::core::array& factors);

}  // namespace metal_lora::ops
