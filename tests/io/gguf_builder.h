// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "src/io/gguf.h"

namespace metal_lora::io::testing {

/// Writes GGUF files, right ones and wrong ones: every count and length can be overridden.
class GgufBuilder {
 public:
  uint32_t magic = 0x46554747;
  uint32_t version = 3;
  uint64_t alignment = 32;
  int64_t tensor_count_change = 0;
  int64_t value_count_change = 0;

  template <class T>
  static std::string raw(T value) {
    std::string bytes(sizeof(T), '\0');
    std::memcpy(bytes.data(), &value, sizeof(T));
    return bytes;
  }
  static std::string text(const std::string& value) { return raw(uint64_t{value.size()}) + value; }

  GgufBuilder& value(const std::string& key, uint32_t type, const std::string& payload) {
    values_ += text(key) + raw(type) + payload;
    ++value_count_;
    return *this;
  }
  GgufBuilder& u32(const std::string& key, uint32_t number) { return value(key, 4, raw(number)); }
  GgufBuilder& string(const std::string& key, const std::string& content) {
    return value(key, 8, text(content));
  }
  GgufBuilder& array(
      const std::string& key, uint32_t element_type, uint64_t count, const std::string& elements) {
    return value(key, 9, raw(element_type) + raw(count) + elements);
  }
  /// `dims` innermost first, as in the file.
  GgufBuilder& tensor(
      const std::string& name, const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset) {
    tensors_ += text(name) + raw(static_cast<uint32_t>(dims.size()));
    for (const uint64_t dim : dims) tensors_ += raw(dim);
    tensors_ += raw(type) + raw(offset);
    ++tensor_count_;
    return *this;
  }
  GgufBuilder& data(const std::string& bytes) {
    data_ = bytes;
    return *this;
  }

  std::string build() const {
    std::string file = raw(magic) + raw(version) +
                       raw(tensor_count_ + static_cast<uint64_t>(tensor_count_change)) +
                       raw(value_count_ + static_cast<uint64_t>(value_count_change)) + values_ +
                       tensors_;
    if (tensor_count_ > 0) {
      file.resize((file.size() + alignment - 1) / alignment * alignment, '\0');
      file += data_;
    }
    return file;
  }

 private:
  std::string values_;
  std::string tensors_;
  std::string data_;
  uint64_t value_count_ = 0;
  uint64_t tensor_count_ = 0;
};

}  // namespace metal_lora::io::testing
