// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <iterator>
#include <string_view>

namespace metal_lora::io {

/// Characters for a parser that does not say where it is: remembers the last one it took, so that a
/// callback can give a byte offset (the end of the token it was called for, give or take one).
class TrackedText {
 public:
  explicit TrackedText(std::string_view text) : text_(text), latest_(text.data()) {}
  TrackedText(const TrackedText&) = delete;
  TrackedText& operator=(const TrackedText&) = delete;

  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = char;
    using difference_type = std::ptrdiff_t;
    using pointer = const char*;
    using reference = const char&;

    reference operator*() const { return *at_; }
    Iterator& operator++() {
      *latest_ = at_++;
      return *this;
    }
    Iterator operator++(int) {
      Iterator before = *this;
      ++*this;
      return before;
    }
    bool operator==(const Iterator& other) const { return at_ == other.at_; }
    bool operator!=(const Iterator& other) const { return at_ != other.at_; }

   private:
    friend TrackedText;
    Iterator(const char* at, const char** latest) : at_(at), latest_(latest) {}
    const char* at_;
    const char** latest_;
  };

  Iterator begin() { return {text_.data(), &latest_}; }
  Iterator end() { return {text_.data() + text_.size(), &latest_}; }
  size_t offset() const { return static_cast<size_t>(latest_ - text_.data()); }

 private:
  std::string_view text_;
  const char* latest_;
};

}  // namespace metal_lora::io
