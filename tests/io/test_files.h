// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/dequantize.h"
#include "src/io/mapped_file.h"
#include "src/io/tensor.h"

namespace metal_lora::io::testing {

/// A folder of its own, removed at the end.
class TempFolder {
 public:
  TempFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "mlora-io-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = pattern;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }
  size_t entry_count() const {
    return static_cast<size_t>(std::distance(
        std::filesystem::directory_iterator(path_), std::filesystem::directory_iterator()));
  }

 private:
  std::string path_;
};

inline void write_text(const std::string& path, std::string_view text) {
  std::ofstream(path, std::ios::binary)
      .write(text.data(), static_cast<std::streamsize>(text.size()));
}

inline std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// `content` as a file in memory, in a heap block of exactly its size: ASan sees a read beyond it.
inline std::shared_ptr<const MappedFile> file_of(std::string_view content) {
  const auto owner = std::make_shared<std::vector<char>>(content.begin(), content.end());
  return MappedFile::from_memory(std::as_bytes(std::span(*owner)), "test.bin", owner);
}

template <class T>
std::string bytes_of(T value) {
  std::string bytes(sizeof(T), '\0');
  std::memcpy(bytes.data(), &value, sizeof(T));
  return bytes;
}

/// Reads every element of every tensor, as a model would. Returns how many there were.
inline uint64_t use_tensors(const std::vector<TensorInfo>& tensors) {
  uint64_t elements = 0;
  for (const TensorInfo& tensor : tensors) {
    // Row by row, so that a shape whose product lies cannot make the test allocate.
    std::vector<float> row(tensor.nbytes == 0 ? 0 : tensor.row_elements());
    const uint64_t rows = row.empty() ? 0 : tensor.row_count();
    for (uint64_t r = 0; r < rows; ++r) {
      EXPECT_TRUE(dequantize_rows(tensor, r, 1, row.data()).ok());
      elements += row.size();
    }
    EXPECT_FALSE(dequantize_rows(tensor, tensor.row_count(), 1, row.data()).ok());
    EXPECT_FALSE(dequantize_rows(tensor, UINT64_MAX, 2, row.data()).ok());
  }
  return elements;
}

}  // namespace metal_lora::io::testing
