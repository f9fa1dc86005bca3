// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/frontend/hash.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

namespace metal_emulator::frontend {

namespace fs = std::filesystem;

void Hash::byte(unsigned char b) {
  state_ ^= b;
  state_ *= kPrime;
}

void Hash::add(std::string_view bytes) {
  add(static_cast<uint64_t>(bytes.size()));  // "ab","c" differs from "a","bc"
  for (char c : bytes) {
    byte(static_cast<unsigned char>(c));
  }
}

void Hash::add(uint64_t number) {
  for (int i = 0; i < 8; i++) {
    byte(static_cast<unsigned char>(number >> (8 * i)));
  }
}

namespace {
std::vector<fs::path> files_of(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code code;
  for (fs::recursive_directory_iterator it(folder, code), end; !code && it != end;
       it.increment(code)) {
    if (it->is_regular_file(code)) {
      files.push_back(it->path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}
}  // namespace

void Hash::add_folder(const fs::path& folder) {
  for (const fs::path& file : files_of(folder)) {
    add(file.string());
    std::ifstream in(file, std::ios::binary);
    add(std::string(std::istreambuf_iterator<char>(in), {}));
  }
}

void Hash::add_folder_state(const fs::path& folder) {
  for (const fs::path& file : files_of(folder)) {
    struct stat info {};
    add(file.string());
    if (stat(file.c_str(), &info) == 0) {
      add(static_cast<uint64_t>(info.st_size));
      add(static_cast<uint64_t>(info.st_mtim.tv_sec));
      add(static_cast<uint64_t>(info.st_mtim.tv_nsec));
    }
  }
}

void Hash::add_program(const std::string& name) {
  const char* path = std::getenv("PATH");
  const std::string folders = name.find('/') == std::string::npos && path ? path : "";
  size_t begin = 0;
  while (begin <= folders.size()) {
    size_t end = folders.find(':', begin);
    end = end == std::string::npos ? folders.size() : end;
    const fs::path candidate =
        folders.empty() ? fs::path(name) : fs::path(folders.substr(begin, end - begin)) / name;
    struct stat info {};
    if (stat(candidate.c_str(), &info) == 0 && S_ISREG(info.st_mode)) {
      add(candidate.string());
      add(static_cast<uint64_t>(info.st_size));
      add(static_cast<uint64_t>(info.st_mtime));
      return;
    }
    begin = end + 1;
  }
}

std::string Hash::hexadecimal() const {
  std::string out;
  for (int shift = 124; shift >= 0; shift -= 4) {
    out += "0123456789abcdef"[static_cast<unsigned>(state_ >> shift) & 15];
  }
  return out;
}

}  // namespace metal_emulator::frontend
