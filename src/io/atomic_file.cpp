// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/atomic_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <memory>

#include "src/io/text_format.h"

namespace metal_lora::io {

int FileCalls::open(const char* path, int flags, mode_t mode) {
  return ::open(path, flags, mode);
}
ssize_t FileCalls::write(int fd, const void* data, size_t bytes) {
  return ::write(fd, data, bytes);
}
int FileCalls::fsync(int fd) {
#ifdef F_FULLFSYNC
  // On macOS fsync() leaves the data in the drive's cache; this does not.
  if (::fcntl(fd, F_FULLFSYNC) == 0) return 0;
#endif
  return ::fsync(fd);
}
int FileCalls::close(int fd) {
  return ::close(fd);
}
int FileCalls::rename(const char* from, const char* to) {
  return ::rename(from, to);
}
int FileCalls::unlink(const char* path) {
  return ::unlink(path);
}

FileCalls& system_file_calls() {
  static FileCalls calls;
  return calls;
}

namespace {

// Large writes go out in pieces so that a signal or a full disk is noticed early; Linux caps a
// single write near 2 GiB anyway.
constexpr size_t kMaxWriteBytes = size_t{64} << 20;
constexpr int kMaxNameAttempts = 1000;

std::pair<std::string, std::string> split_path(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return {".", path};
  return {slash == 0 ? "/" : path.substr(0, slash), path.substr(slash + 1)};
}

template <class Call>
auto retry_interrupted(Call&& call) {
  decltype(call()) result;
  do {
    result = call();
  } while (result < 0 && errno == EINTR);
  return result;
}

}  // namespace

Result<AtomicFile> AtomicFile::create(const std::string& path, FileCalls& calls) {
  AtomicFile file;
  file.calls_ = &calls;
  file.path_ = path;
  const auto [folder, name] = split_path(path);
  file.folder_ = folder;
  if (name.empty() || name == "." || name == ".." || path.find('\0') != std::string::npos) {
    return Failure{
        ErrorCode::invalid_input, quote_text(path), {}, "", "the path of a file", "not one", ""};
  }
  static std::atomic<uint32_t> counter{0};
  for (int attempt = 0; attempt < kMaxNameAttempts; ++attempt) {
    const std::string temporary =
        join_path(folder, fmt::format(".{}.{}-{}.tmp", name, ::getpid(), counter++));
    const int fd = retry_interrupted([&] {
      return calls.open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    });
    if (fd >= 0) {
      file.fd_ = fd;
      file.temporary_ = temporary;
      return file;
    }
    if (errno != EEXIST) return file.failed("a temporary file could be created beside it", errno);
  }
  return file.failed("a temporary file could be created beside it", EEXIST);
}

AtomicFile::AtomicFile(AtomicFile&& other) noexcept
    : calls_(other.calls_),
      path_(std::move(other.path_)),
      folder_(std::move(other.folder_)),
      temporary_(std::exchange(other.temporary_, {})),
      fd_(std::exchange(other.fd_, -1)),
      written_bytes_(other.written_bytes_) {}

AtomicFile::~AtomicFile() {
  discard();
}

void AtomicFile::discard() noexcept {
  if (fd_ >= 0) calls_->close(std::exchange(fd_, -1));
  if (!temporary_.empty()) {
    retry_interrupted([&] { return calls_->unlink(temporary_.c_str()); });
    temporary_.clear();
  }
}

Failure AtomicFile::failed(const char* step, int error) const {
  Failure failure = system_failure(path_, fmt::format("saved, so that {}", step), error);
  // A missing folder is the caller's path to mend; the rest is the system's refusal.
  failure.offset = written_bytes_ > 0 ? std::optional(written_bytes_) : std::nullopt;
  if (error == ENOENT) failure.got = "in a folder that does not exist";
  return failure;
}

Result<void> AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = retry_interrupted(
        [&] { return calls_->write(fd_, bytes.data(), std::min(bytes.size(), kMaxWriteBytes)); });
    if (written < 0) return failed("its content could be written", errno);
    // write() may not return 0 for a regular file; treat it as a full disk, not as progress.
    if (written == 0) return failed("its content could be written", ENOSPC);
    bytes = bytes.subspan(static_cast<size_t>(written));
    written_bytes_ += static_cast<uint64_t>(written);
  }
  return {};
}

Result<void> AtomicFile::commit() {
  if (retry_interrupted([&] { return calls_->fsync(fd_); }) != 0) {
    return failed("its content reached the disk", errno);
  }
  // After EINTR the descriptor is closed on Linux; closing again could hit another file.
  if (calls_->close(std::exchange(fd_, -1)) != 0 && errno != EINTR) {
    return failed("its content reached the disk", errno);
  }
  // Opened before the rename, so that failing to open leaves the previous file in place.
  const int folder = retry_interrupted(
      [&] { return calls_->open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0); });
  if (folder < 0) return failed("its folder could be opened", errno);
  if (retry_interrupted([&] { return calls_->rename(temporary_.c_str(), path_.c_str()); }) != 0) {
    Failure failure = failed("it could take its name", errno);
    calls_->close(folder);
    return failure;
  }
  temporary_.clear();
  const int flushed = retry_interrupted([&] { return calls_->fsync(folder); });
  const int error = errno;
  calls_->close(folder);
  // Some network file systems cannot flush a folder and say so with EINVAL.
  if (flushed != 0 && error != EINVAL) {
    Failure failure = failed("its name reached the disk", error);
    failure.hint = "the new file is in place, but might not survive a power cut";
    return failure;
  }
  return {};
}

Result<void> write_file_atomic(
    const std::string& path, std::span<const std::byte> bytes, FileCalls& calls) {
  auto file = AtomicFile::create(path, calls);
  if (!file) return std::move(file).error();
  if (auto written = file->write(bytes); !written) return written;
  return file->commit();
}

Result<void> write_file_atomic(const std::string& path, std::string_view text, FileCalls& calls) {
  return write_file_atomic(path, std::as_bytes(std::span(text)), calls);
}

Result<void> remove_stale_temporaries(const std::string& path) {
  const auto [folder, name] = split_path(path);
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(::opendir(folder.c_str()), &::closedir);
  if (entries == nullptr) return system_failure(folder, "a readable folder", errno);
  const std::string prefix = fmt::format(".{}.", name);
  while (const dirent* entry = ::readdir(entries.get())) {
    const std::string_view candidate = entry->d_name;
    if (candidate.size() <= prefix.size() + 4 || !candidate.starts_with(prefix) ||
        !candidate.ends_with(".tmp")) {
      continue;
    }
    // Exactly <pid>-<n>: another file's name may start alike.
    const auto middle = candidate.substr(prefix.size(), candidate.size() - prefix.size() - 4);
    const size_t dash = middle.find('-');
    if (dash == std::string_view::npos || dash == 0 || dash + 1 == middle.size() ||
        middle.find_first_not_of("0123456789-") != std::string_view::npos ||
        middle.find('-', dash + 1) != std::string_view::npos) {
      continue;
    }
    const std::string stale = join_path(folder, candidate);
    if (::unlink(stale.c_str()) != 0 && errno != ENOENT) {
      return system_failure(stale, "a removable temporary file", errno);
    }
  }
  return {};
}

}  // namespace metal_lora::io
