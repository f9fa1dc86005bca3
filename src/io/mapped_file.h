// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "src/io/file_descriptor.h"
#include "src/io/result.h"

namespace metal_lora::io {

/// A whole regular file mapped read-only. Shared: whoever aliases its bytes (a tensor, an MLX
/// array) keeps the shared_ptr and with it the mapping. Opening costs no reading; pages come on
/// first use. Immutable, hence safe from any thread. Another process that truncates the file while
/// it is mapped makes later reads fault (SIGBUS), as with every mapping; replacing it by rename()
/// does not.
class MappedFile {
 public:
  /// Refuses what is not a regular file (directory, FIFO, device) without blocking on it.
  /// not_found when the path does not exist, io when the system refuses. Empty files map to an
  /// empty span.
  static Result<std::shared_ptr<const MappedFile>> open(const std::string& path);

  /// The same for a file already open, for instance by open_file_beneath(). `display_path` names it
  /// in errors.
  static Result<std::shared_ptr<const MappedFile>> from_descriptor(
      FileDescriptor file, const std::string& display_path);

  /// Bytes in memory in the guise of a file (tests, fuzzing, generated content). Copies nothing:
  /// `owner` keeps them alive.
  static std::shared_ptr<const MappedFile> from_memory(
      std::span<const std::byte> bytes,
      const std::string& display_path,
      std::shared_ptr<const void> owner);

  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return bytes_; }
  uint64_t size() const { return bytes_.size(); }

 private:
  MappedFile() = default;

  std::string path_;
  std::span<const std::byte> bytes_;
  void* mapping_ = nullptr;  ///< null when empty or from memory
  std::shared_ptr<const void> owner_;
};

}  // namespace metal_lora::io
