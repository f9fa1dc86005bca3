// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/checked.h"

#include <gtest/gtest.h>

namespace metal_lora::io {
namespace {

constexpr uint64_t kMax = UINT64_MAX;

TEST(CheckedSize, KeepsEveryValueInRange) {
  for (const int shift : {31, 32, 63}) {
    const uint64_t power = uint64_t{1} << shift;
    for (const uint64_t value : {power - 1, power, power + 1}) {
      EXPECT_TRUE(CheckedSize(value).equals(value));
      EXPECT_TRUE((CheckedSize(value) + 0u).equals(value));
      EXPECT_TRUE((CheckedSize(value) * 1u).equals(value));
      EXPECT_TRUE((CheckedSize(value) - 1u).equals(value - 1));
    }
  }
  EXPECT_TRUE(CheckedSize(kMax).equals(kMax));
}

TEST(CheckedSize, RemembersOverflow) {
  EXPECT_FALSE((CheckedSize(kMax) + 1u).valid());
  EXPECT_FALSE((CheckedSize(0u) - 1u).valid());
  EXPECT_FALSE((CheckedSize(uint64_t{1} << 32) * (uint64_t{1} << 32)).valid());
  EXPECT_FALSE((CheckedSize((uint64_t{1} << 63) + 1) * 2u).valid());
  EXPECT_FALSE((CheckedSize(uint64_t{1} << 63) + (uint64_t{1} << 63)).valid());
  EXPECT_TRUE((CheckedSize((uint64_t{1} << 63) - 1) * 2u).equals(kMax - 1));
  EXPECT_FALSE(CheckedSize(-1).valid());
  // A product that is back in range stays invalid, also times zero.
  EXPECT_FALSE((CheckedSize(kMax) * 2u * 0u).valid());
  EXPECT_FALSE((CheckedSize(kMax) + 1u).at_most(kMax));
  EXPECT_FALSE((CheckedSize(kMax) + 1u).equals(0));
  EXPECT_FALSE((CheckedSize(kMax) + 1u).get().has_value());
}

TEST(CheckedSize, RoundsUpAndDividesExactly) {
  EXPECT_TRUE(CheckedSize(0u).rounded_up_to(32).equals(0));
  EXPECT_TRUE(CheckedSize(1u).rounded_up_to(32).equals(32));
  EXPECT_TRUE(CheckedSize(32u).rounded_up_to(32).equals(32));
  EXPECT_FALSE(CheckedSize(kMax).rounded_up_to(32).valid());
  EXPECT_FALSE(CheckedSize(8u).rounded_up_to(0).valid());
  EXPECT_TRUE(CheckedSize(64u).divided_exactly_by(32).equals(2));
  EXPECT_FALSE(CheckedSize(63u).divided_exactly_by(32).valid());
  EXPECT_FALSE(CheckedSize(64u).divided_exactly_by(0).valid());
  EXPECT_FALSE((CheckedSize(kMax) + 1u).divided_exactly_by(1).valid());
}

}  // namespace
}  // namespace metal_lora::io
