// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/console.h"

#include <gtest/gtest.h>

#include <cmath>

#include "src/cli/bench_timing.h"

namespace metal_lora::cli {
namespace {

TEST(Console, ProgressBarFillsFromLeftToRight) {
  EXPECT_EQ(progress_bar(0.0, 4), "[>   ]");
  EXPECT_EQ(progress_bar(0.5, 4), "[##> ]");
  EXPECT_EQ(progress_bar(1.0, 4), "[####]");
  EXPECT_EQ(progress_bar(7.0, 4), "[####]");
  EXPECT_EQ(progress_bar(-1.0, 4), "[>   ]");
  EXPECT_EQ(progress_bar(NAN, 4), "[>   ]");
}

TEST(Console, SparklineSpansTheRangeAndKeepsItsWidth) {
  EXPECT_EQ(sparkline({}, 10), "");
  EXPECT_EQ(sparkline({3, 2, 1}, 10), "█▄▁");
  EXPECT_EQ(sparkline({5, 5}, 10), "▁▁");
  EXPECT_EQ(sparkline({4, 4, 0, 0}, 2), "█▁");
  EXPECT_EQ(sparkline({NAN, NAN}, 10), "██");
}

TEST(Console, Units) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(999), "999 B");
  EXPECT_EQ(format_bytes(1234567), "1.23 MB");
  EXPECT_EQ(format_bytes(98'000'000), "98 MB");
  EXPECT_EQ(format_duration(12.4), "12 s");
  EXPECT_EQ(format_duration(245), "4:05");
  EXPECT_EQ(format_duration(3723), "1:02:03");
  EXPECT_EQ(format_duration(INFINITY), "?");
}

TEST(Bench, MedianAndPercentilesAreNearestRanks) {
  const Timing timing = summarize({5, 1, 4, 2, 3, 6, 7, 8, 9, 10, 11});
  EXPECT_EQ(timing.median_ms, 6);
  EXPECT_EQ(timing.p10_ms, 2);
  EXPECT_EQ(timing.p90_ms, 10);
  EXPECT_EQ(timing.runs, 11);
}

}  // namespace
}  // namespace metal_lora::cli
