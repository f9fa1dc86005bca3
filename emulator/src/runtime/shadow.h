// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The shadows of N neighbouring bytes at once. Nearly every access finds all its bytes in one
// state: then one decision does for all of them, 3 to 6 ns instead of 13 to 42 byte by byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace metal_emulator::shadow {

typedef uint32_t Tags4 __attribute__((vector_size(16)));

inline Tags4 load(const uint32_t* tags) {
  Tags4 four;
  std::memcpy(&four, tags, sizeof four);
  return four;
}

/// Whether tags[0 … N-1] are equal. N: 1, 2 or a multiple of 4.
template <size_t N>
inline bool uniform(const uint32_t* tags) {
  if constexpr (N == 1) {
    return true;
  } else if constexpr (N == 2) {
    return tags[0] == tags[1];
  } else {
    const uint32_t t = tags[0];
    const Tags4 first{t, t, t, t};
    Tags4 difference = load(tags) ^ first;
    for (size_t i = 4; i < N; i += 4) difference |= load(tags + i) ^ first;
    uint64_t halves[2];
    std::memcpy(halves, &difference, sizeof halves);
    return (halves[0] | halves[1]) == 0;
  }
}

template <size_t N>
inline void fill(uint32_t* tags, uint32_t tag) {
  if constexpr (N < 4) {
    for (size_t i = 0; i < N; i++) tags[i] = tag;
  } else {
    const Tags4 four{tag, tag, tag, tag};
    for (size_t i = 0; i < N; i += 4) std::memcpy(tags + i, &four, sizeof four);
  }
}

/// The flags of N bytes in words of up to eight.
template <size_t N>
class Flags {
 public:
  explicit Flags(const uint8_t* flags) { std::memcpy(words_, flags, N); }
  bool all(uint8_t flag) const {
    for (const Word w : words_)
      if ((w & spread(flag)) != spread(flag)) return false;
    return true;
  }
  bool none(uint8_t flag) const {
    for (const Word w : words_)
      if (w & spread(flag)) return false;
    return true;
  }
  /// Sets a flag of all N bytes; memory that has it is left alone.
  void set(uint8_t flag, uint8_t* flags) {
    if (all(flag)) return;
    for (Word& w : words_) w = static_cast<Word>(w | spread(flag));
    std::memcpy(flags, words_, N);
  }

 private:
  using Word = std::conditional_t<
      N == 1,
      uint8_t,
      std::conditional_t<N == 2, uint16_t, std::conditional_t<N == 4, uint32_t, uint64_t>>>;
  static_assert(N % sizeof(Word) == 0, "1, 2, 4 or a multiple of 8");
  static constexpr Word spread(uint8_t flag) {
    return static_cast<Word>(0x0101010101010101ull * flag);
  }
  Word words_[N / sizeof(Word)];
};

}  // namespace metal_emulator::shadow
