// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace metal_emulator::frontend {

/// FNV-1a over 128 bits, for names in the cache: contents are trusted, collisions must be unlikely.
class Hash {
 public:
  void add(std::string_view bytes);
  void add(uint64_t number);
  /// Names and contents of every file under a folder, sorted; nothing when it does not exist.
  /// Names, sizes and times of a folder's files.
  void add_folder_state(const std::filesystem::path& folder);
  void add_folder(const std::filesystem::path& folder);
  /// Path, size and time of a program found in PATH.
  void add_program(const std::string& name);
  std::string hexadecimal() const;  ///< 32 digits
  uint64_t value() const { return static_cast<uint64_t>(state_); }

 private:
  void byte(unsigned char b);
  __extension__ typedef unsigned __int128 Wide;
  static constexpr Wide kOffset = (Wide{0x6c62272e07bb0142u} << 64) | 0x62b821756295c58du;
  static constexpr Wide kPrime = (Wide{0x0000000001000000u} << 64) | 0x000000000000013bu;
  Wide state_ = kOffset;
};

}  // namespace metal_emulator::frontend
