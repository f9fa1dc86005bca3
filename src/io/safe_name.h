// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "src/io/file_descriptor.h"
#include "src/io/mapped_file.h"
#include "src/io/result.h"

namespace metal_lora::io {

/// Whether a name from outside (a request, a manifest) may become one path component:
/// ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$. No separator, no leading dot, ASCII only, no NUL.
bool is_safe_name(std::string_view name);

/// Fails with the name (control characters escaped) when it is not safe. `what` says what it names.
Result<void> check_safe_name(std::string_view name, const std::string& what);

/// Opens the folder `root`/`name` without following a symbolic link in the last component.
/// The result can only be what lies directly in `root`, whatever races with it.
Result<FileDescriptor> open_folder_beneath(const std::string& root, std::string_view name);

/// Opens the regular file `name` directly in an open folder, for reading; refuses symbolic links,
/// FIFOs, devices and folders without blocking on them. `display_path` names the folder in
/// failures.
Result<FileDescriptor> open_file_beneath(
    const FileDescriptor& folder, std::string_view name, const std::string& display_path);

/// open_file_beneath, then mapped.
Result<std::shared_ptr<const MappedFile>> map_file_beneath(
    const FileDescriptor& folder, std::string_view name, const std::string& display_path);

}  // namespace metal_lora::io
