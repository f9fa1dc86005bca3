// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/safe_name.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

#include "src/io/text_format.h"

namespace metal_lora::io {
namespace {

// Not <cctype>: those depend on the locale.
bool is_ascii_alphanumeric(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

Failure refused(const std::string& path, std::string expected, int error) {
  // What O_NOFOLLOW answers for a symbolic link: ELOOP, or ENOTDIR together with O_DIRECTORY.
  Failure failure = system_failure(path, std::move(expected), error);
  if (error == ELOOP) {
    failure.code = ErrorCode::invalid_input;
    failure.got = "a symbolic link";
  } else if (error == ENOTDIR) {
    failure.code = ErrorCode::invalid_input;
    failure.got = "not a folder itself";
  }
  return failure;
}

}  // namespace

bool is_safe_name(std::string_view name) {
  return !name.empty() && name.size() <= 128 && is_ascii_alphanumeric(name[0]) &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return is_ascii_alphanumeric(c) || c == '.' || c == '_' || c == '-';
         });
}

Result<void> check_safe_name(std::string_view name, const std::string& what) {
  if (is_safe_name(name)) return {};
  return Failure{
      ErrorCode::invalid_input,
      what,
      {},
      "",
      "1 to 128 of A-Z a-z 0-9 . _ -, starting with a letter or digit",
      quote_text(name),
      ""};
}

Result<FileDescriptor> open_folder_beneath(const std::string& root, std::string_view name) {
  if (auto safe = check_safe_name(name, root); !safe) return std::move(safe).error();
  FileDescriptor parent(::open(root.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!parent.valid()) return system_failure(root, "a readable folder", errno);
  const std::string component(name);
  FileDescriptor folder(
      ::openat(parent.get(), component.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!folder.valid()) return refused(join_path(root, name), "a folder, not a link to one", errno);
  return folder;
}

Result<FileDescriptor> open_file_beneath(
    const FileDescriptor& folder, std::string_view name, const std::string& display_path) {
  if (auto safe = check_safe_name(name, display_path); !safe) return std::move(safe).error();
  const std::string component(name);
  const std::string path = join_path(display_path, name);
  FileDescriptor file(
      ::openat(folder.get(), component.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!file.valid()) return refused(path, "a regular file, not a link to one", errno);
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) return system_failure(path, "a readable file", errno);
  if (!S_ISREG(status.st_mode)) {
    return Failure{
        ErrorCode::invalid_input,
        path,
        {},
        "",
        "a regular file",
        S_ISDIR(status.st_mode) ? "a folder" : "a FIFO or device",
        ""};
  }
  return file;
}

Result<std::shared_ptr<const MappedFile>> map_file_beneath(
    const FileDescriptor& folder, std::string_view name, const std::string& display_path) {
  auto file = open_file_beneath(folder, name, display_path);
  if (!file) return std::move(file).error();
  return MappedFile::from_descriptor(std::move(*file), join_path(display_path, name));
}

}  // namespace metal_lora::io
