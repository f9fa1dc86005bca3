// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <string>
#include <string_view>

#include "src/io/result.h"

namespace metal_lora::io {

/// Text from a file or a request, fit for a message: quoted, control and non-ASCII bytes as \xNN,
/// cut after `limit` bytes.
std::string quote_text(std::string_view text, size_t limit = 80);

/// A refused system call: not_found for ENOENT and ENOTDIR, else io; `expected` says what the call
/// was for ("a readable file").
Failure system_failure(const std::string& path, std::string expected, int error);

/// "<folder>/<name>", without a doubled slash.
std::string join_path(std::string_view folder, std::string_view name);

}  // namespace metal_lora::io
