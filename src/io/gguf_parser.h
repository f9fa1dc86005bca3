// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/gguf.h"

namespace metal_lora::io {

/// One pass over a GGUF file's header. Every read is checked against the end of the file.
class GgufParser {
 public:
  explicit GgufParser(std::shared_ptr<const MappedFile> file);
  Result<GgufFile> parse();

 private:
  struct Pending {
    TensorInfo tensor;
    uint64_t relative_offset;
    uint64_t entry_offset;  ///< of the entry in the header, for failures
  };

  uint64_t remaining() const { return bytes_.size() - at_; }
  Failure failure(uint64_t offset, std::string field, std::string expected, std::string got) const;

  template <class T>
  bool read(T& value) {
    if (remaining() < sizeof(T)) return false;
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return true;
  }
  Result<void> read_preamble(uint64_t& tensor_count, uint64_t& value_count);
  Result<std::string_view> read_string(const std::string& field, uint64_t max_bytes);
  Result<void> read_value(GgufValue& value);
  Result<void> skip_array(GgufValue& value, int depth);
  Result<void> index_values();
  Result<void> read_tensor_entry(Pending& pending);
  Result<void> read_tensor_type(Pending& pending, const std::string& field);
  Result<void> place_tensors(std::vector<Pending>& pending);

  std::shared_ptr<const MappedFile> file_;
  std::span<const std::byte> bytes_;
  uint64_t at_ = 0;
  GgufFile result_;
};

/// Bytes of a scalar of this type; 0 for strings and arrays.
uint64_t gguf_scalar_bytes(GgufValueType type);

}  // namespace metal_lora::io
