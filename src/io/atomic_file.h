// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "src/io/result.h"

namespace metal_lora::io {

/// The system calls that a save makes. Tests replace them to fail the k-th; errno carries why.
class FileCalls {
 public:
  virtual ~FileCalls() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual ssize_t write(int fd, const void* data, size_t bytes);
  virtual int fsync(int fd);
  virtual int close(int fd);
  virtual int rename(const char* from, const char* to);
  virtual int unlink(const char* path);
};
FileCalls& system_file_calls();

/// Writes a file so that at every moment, kill -9 and power loss included, the path holds either
/// the whole previous content or the whole new one: temporary file in the same folder (O_EXCL) →
/// write → fsync → rename → fsync of the folder. Destroying it before commit() removes the
/// temporary file. A process that dies in between leaves its temporary file
/// (".<name>.<pid>-<n>.tmp") behind; remove_stale_temporaries() cleans up. One thread at a time;
/// several writers of one path are safe, the last commit wins. A path that is a symbolic link is
/// replaced by a regular file.
class AtomicFile {
 public:
  static Result<AtomicFile> create(const std::string& path, FileCalls& calls = system_file_calls());

  AtomicFile(AtomicFile&& other) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile();

  /// Appends. Retries interrupted and short writes. After a failure nothing but destruction helps.
  Result<void> write(std::span<const std::byte> bytes);
  Result<void> write(std::string_view text) { return write(std::as_bytes(std::span(text))); }

  /// Makes the content durable under its name. On failure the previous file is untouched, with one
  /// exception that the failure's hint tells: if only the last step failed (fsync of the folder),
  /// the new file is in place, whole, but might not survive a power cut.
  Result<void> commit();

  uint64_t written_bytes() const { return written_bytes_; }

 private:
  AtomicFile() = default;
  void discard() noexcept;
  Failure failed(const char* step, int error) const;

  FileCalls* calls_ = nullptr;
  std::string path_;
  std::string folder_;
  std::string temporary_;  ///< empty once renamed or removed
  int fd_ = -1;
  uint64_t written_bytes_ = 0;
};

/// AtomicFile in one call.
Result<void> write_file_atomic(
    const std::string& path,
    std::span<const std::byte> bytes,
    FileCalls& calls = system_file_calls());
Result<void> write_file_atomic(
    const std::string& path, std::string_view text, FileCalls& calls = system_file_calls());

/// Removes the temporary files that dead writers of `path` left. Call it only when no other process
/// may be writing the path.
Result<void> remove_stale_temporaries(const std::string& path);

}  // namespace metal_lora::io
