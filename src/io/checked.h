// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <optional>

namespace metal_lora::io {

/// An unsigned 64-bit size that remembers whether any step of its computation left the range
/// 0 … 2^64−1. Every sum, difference and product of numbers that a file states goes through it, so
/// no check can be passed by a number that wrapped. It has no conversion to an integer: the result
/// is read with get() or compared with the operators below, which are false once it overflowed.
class CheckedSize {
 public:
  constexpr CheckedSize() = default;
  template <std::unsigned_integral T>
  constexpr CheckedSize(T value) : value_(value) {}
  template <std::signed_integral T>
  constexpr CheckedSize(T value) : value_(static_cast<uint64_t>(value)), valid_(value >= 0) {}

  constexpr bool valid() const { return valid_; }
  constexpr std::optional<uint64_t> get() const {
    return valid_ ? std::optional<uint64_t>(value_) : std::nullopt;
  }

  /// True when the size is known and at most `limit`.
  constexpr bool at_most(uint64_t limit) const { return valid_ && value_ <= limit; }
  /// True when the size is known and equals `other`.
  constexpr bool equals(uint64_t other) const { return valid_ && value_ == other; }

  friend constexpr CheckedSize operator+(CheckedSize a, CheckedSize b) {
    uint64_t sum = 0;
    const bool wrapped = __builtin_add_overflow(a.value_, b.value_, &sum);
    return CheckedSize(sum, a.valid_ && b.valid_ && !wrapped);
  }
  friend constexpr CheckedSize operator-(CheckedSize a, CheckedSize b) {
    uint64_t difference = 0;
    const bool wrapped = __builtin_sub_overflow(a.value_, b.value_, &difference);
    return CheckedSize(difference, a.valid_ && b.valid_ && !wrapped);
  }
  friend constexpr CheckedSize operator*(CheckedSize a, CheckedSize b) {
    uint64_t product = 0;
    const bool wrapped = __builtin_mul_overflow(a.value_, b.value_, &product);
    return CheckedSize(product, a.valid_ && b.valid_ && !wrapped);
  }
  /// Exact division only: invalid when `divisor` is 0 or leaves a remainder.
  constexpr CheckedSize divided_exactly_by(uint64_t divisor) const {
    if (divisor == 0 || value_ % divisor != 0) return CheckedSize(0, false);
    return CheckedSize(value_ / divisor, valid_);
  }
  /// The next multiple of `alignment`, which must not be 0.
  constexpr CheckedSize rounded_up_to(uint64_t alignment) const {
    if (alignment == 0) return CheckedSize(0, false);
    const uint64_t remainder = value_ % alignment;
    return remainder == 0 ? *this : *this + CheckedSize(alignment - remainder);
  }

  CheckedSize& operator+=(CheckedSize other) { return *this = *this + other; }
  CheckedSize& operator*=(CheckedSize other) { return *this = *this * other; }

 private:
  constexpr CheckedSize(uint64_t value, bool valid) : value_(value), valid_(valid) {}

  uint64_t value_ = 0;
  bool valid_ = true;
};

}  // namespace metal_lora::io
