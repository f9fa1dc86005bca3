// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/text_format.h"

#include <fmt/format.h>

#include <cerrno>
#include <system_error>

namespace metal_lora::io {

std::string quote_text(std::string_view text, size_t limit) {
  std::string out = "\"";
  for (const char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  out += text.size() > limit ? "…\"" : "\"";
  return out;
}

Failure system_failure(const std::string& path, std::string expected, int error) {
  Failure failure;
  failure.code = error == ENOENT || error == ENOTDIR ? ErrorCode::not_found : ErrorCode::io;
  failure.path = path;
  failure.expected = std::move(expected);
  failure.got = error == ENOENT ? "missing" : std::generic_category().message(error);
  if (error == ENOSPC || error == EDQUOT) failure.hint = "free some disk space and run it again";
  if (error == EACCES || error == EPERM) failure.hint = "check the permissions of the path";
  return failure;
}

std::string join_path(std::string_view folder, std::string_view name) {
  std::string path(folder);
  if (!path.empty() && path.back() != '/') path += '/';
  path += name;
  return path;
}

}  // namespace metal_lora::io
