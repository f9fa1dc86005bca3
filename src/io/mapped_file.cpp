// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <limits>

#include "src/io/text_format.h"

namespace metal_lora::io {

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

MappedFile::~MappedFile() {
  if (mapping_ != nullptr) ::munmap(mapping_, bytes_.size());
}

Result<std::shared_ptr<const MappedFile>> MappedFile::open(const std::string& path) {
  if (path.find('\0') != std::string::npos) {
    return Failure{
        ErrorCode::invalid_input,
        quote_text(path),
        {},
        "path",
        "without NUL bytes",
        "one with",
        ""};
  }
  // O_NONBLOCK: a FIFO without a writer would otherwise block here.
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.valid()) return system_failure(path, "a readable file", errno);
  return from_descriptor(std::move(file), path);
}

Result<std::shared_ptr<const MappedFile>> MappedFile::from_descriptor(
    FileDescriptor file, const std::string& display_path) {
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) {
    return system_failure(display_path, "a readable file", errno);
  }
  if (!S_ISREG(status.st_mode)) {
    const char* kind = S_ISDIR(status.st_mode)    ? "a folder"
                       : S_ISFIFO(status.st_mode) ? "a FIFO"
                       : S_ISSOCK(status.st_mode) ? "a socket"
                                                  : "a device";
    return Failure{ErrorCode::invalid_input, display_path, {}, "", "a regular file", kind, ""};
  }
  std::shared_ptr<MappedFile> mapped(new MappedFile());
  mapped->path_ = display_path;
  if (status.st_size == 0) return std::shared_ptr<const MappedFile>(std::move(mapped));
  const auto bytes = static_cast<uint64_t>(status.st_size);
  if (bytes > std::numeric_limits<size_t>::max()) {
    return system_failure(display_path, "a file that fits the address space", EFBIG);
  }
  void* mapping = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (mapping == MAP_FAILED)
    return system_failure(display_path, "a file that can be mapped", errno);
  mapped->mapping_ = mapping;
  mapped->bytes_ = {static_cast<const std::byte*>(mapping), bytes};
  return std::shared_ptr<const MappedFile>(std::move(mapped));
}

std::shared_ptr<const MappedFile> MappedFile::from_memory(
    std::span<const std::byte> bytes,
    const std::string& display_path,
    std::shared_ptr<const void> owner) {
  std::shared_ptr<MappedFile> mapped(new MappedFile());
  mapped->path_ = display_path;
  mapped->bytes_ = bytes;
  mapped->owner_ = std::move(owner);
  return mapped;
}

}  // namespace metal_lora::io
