// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string_view>

namespace metal_lora {

enum class Backend { cpu, metal, cuda, emulator };

/// METAL_LORA_BACKEND=cpu|metal|cuda|emulator, else the best that this build has kernels for.
/// Error unsupported when the one asked for is not in this build. Read once.
Backend active_backend();
std::string_view backend_name(Backend backend);

}  // namespace metal_lora
