// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "metal_lora/error.h"

namespace metal_lora::io {

/// Why a file could not be read or written: which file, where in it, which field, what was there.
struct Failure {
  ErrorCode code = ErrorCode::invalid_input;
  std::string path;                ///< the file, or whatever names the input
  std::optional<uint64_t> offset;  ///< byte offset in it, where known
  std::string field;               ///< tensor, key or member, where known
  std::string expected;
  std::string got;
  std::string hint;

  /// "[path at byte 8, field] must be <expected> but is <got>", and "hint: …" on a second line.
  std::string message() const;

  /// The same without the hint line: what Error takes.
  std::string summary() const;
};

/// A value or the Failure that prevented it. io/ throws nothing of its own: only upper layers
/// throw, through unwrap().
template <class T>
class [[nodiscard]] Result {
 public:
  using value_type = T;

  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}
  Result(Failure failure) : state_(std::in_place_index<1>, std::move(failure)) {}

  bool ok() const noexcept { return state_.index() == 0; }
  explicit operator bool() const noexcept { return ok(); }

  /// The value; std::bad_variant_access when there is none.
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }

  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

  /// The failure; std::bad_variant_access when there is none.
  const Failure& error() const& { return std::get<1>(state_); }
  Failure&& error() && { return std::get<1>(std::move(state_)); }

 private:
  std::variant<T, Failure> state_;
};

template <>
class [[nodiscard]] Result<void> {
 public:
  Result() = default;
  Result(Failure failure) : failure_(std::move(failure)) {}

  bool ok() const noexcept { return !failure_.has_value(); }
  explicit operator bool() const noexcept { return ok(); }
  const Failure& error() const& { return failure_.value(); }
  Failure&& error() && { return std::move(failure_).value(); }

 private:
  std::optional<Failure> failure_;
};

/// Throws the failure as the exception of the layers above io/.
[[noreturn]] void throw_failure(const Failure& failure);

/// The value, or throws metal_lora::Error with the failure's code, message and hint.
template <class T>
T unwrap(Result<T> result) {
  if (!result) throw_failure(result.error());
  return std::move(result).value();
}

inline void unwrap(const Result<void>& result) {
  if (!result) throw_failure(result.error());
}

}  // namespace metal_lora::io
