// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>

namespace metal_lora {

/// What went wrong, for programs. error_table() maps each code to what a user meets.
enum class ErrorCode {
  invalid_input,  ///< a file, flag or tensor is malformed or does not match
  not_found,      ///< a path, model, adapter or tensor does not exist
  unsupported,    ///< well-formed, but asks for what this program does not do
  io,             ///< the system refused: disk full, permission, short write
  does_not_fit,   ///< the estimate exceeds the memory at hand
  interrupted,    ///< Ctrl-C, after state was saved
  internal,       ///< a defect of this program
};

/// The one exception type above io/. `what()` is "[where] expected …, got …" and, when there is a
/// hint, a second line "hint: …".
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message, const std::string& hint = {})
      : std::runtime_error(hint.empty() ? message : message + "\nhint: " + hint), code_(code) {}

  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

struct ErrorTraits {
  ErrorCode code;
  std::string_view name;              ///< in JSON: {"error": {"code": name, …}}
  int exit_code;                      ///< of the command line
  int http_status;                    ///< of the server
  std::string_view python_exception;  ///< raised by the bindings
};

inline constexpr ErrorTraits kErrorTable[] = {
    {ErrorCode::invalid_input, "invalid_input", 2, 400, "ValueError"},
    {ErrorCode::not_found, "not_found", 3, 404, "FileNotFoundError"},
    {ErrorCode::unsupported, "unsupported", 2, 400, "NotImplementedError"},
    {ErrorCode::io, "io", 4, 500, "OSError"},
    {ErrorCode::does_not_fit, "does_not_fit", 5, 507, "MemoryError"},
    {ErrorCode::interrupted, "interrupted", 130, 499, "KeyboardInterrupt"},
    {ErrorCode::internal, "internal", 1, 500, "RuntimeError"},
};

constexpr const ErrorTraits& error_traits(ErrorCode code) {
  for (const auto& row : kErrorTable) {
    if (row.code == code) return row;
  }
  return kErrorTable[std::size(kErrorTable) - 1];
}

}  // namespace metal_lora
