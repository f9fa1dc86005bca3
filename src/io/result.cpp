// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/result.h"

#include <fmt/format.h>

namespace metal_lora::io {

std::string Failure::summary() const {
  std::string where = path;
  if (offset) where += fmt::format("{}at byte {}", where.empty() ? "" : " ", *offset);
  if (!field.empty()) where += fmt::format("{}{}", where.empty() ? "" : ", ", field);
  return fmt::format("[{}] must be {} but is {}", where, expected, got);
}

std::string Failure::message() const {
  return hint.empty() ? summary() : summary() + "\nhint: " + hint;
}

void throw_failure(const Failure& failure) {
  throw Error(failure.code, failure.summary(), failure.hint);
}

}  // namespace metal_lora::io
