// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

#include <random>

#include "metal_lora/error.h"
#include "metal_lora/generate.h"

namespace metal_lora {
namespace {

/// All that comes out when `text` comes in pieces of the given sizes.
std::string stream(
    const std::vector<std::string>& stops,
    const std::vector<std::string>& pieces,
    bool* stopped = nullptr) {
  StopStrings filter(stops);
  std::string out;
  for (const std::string& piece : pieces) out += filter.push(piece);
  out += filter.flush();
  if (stopped != nullptr) *stopped = filter.stopped();
  return out;
}

TEST(StopStrings, WithoutStopsEverythingComesAtOnce) {
  StopStrings filter({});
  EXPECT_EQ(filter.push("abc"), "abc");
  EXPECT_EQ(filter.flush(), "");
}

TEST(StopStrings, CutsAtTheStopAcrossPieces) {
  bool stopped = false;
  EXPECT_EQ(stream({"</s>"}, {"hello <", "/", "s", "> more"}, &stopped), "hello ");
  EXPECT_TRUE(stopped);
}

TEST(StopStrings, HoldsBackOnlyWhatMayBecomeAStop) {
  StopStrings filter({"END"});
  EXPECT_EQ(filter.push("the E"), "the ");
  EXPECT_EQ(filter.push("N"), "");
  EXPECT_EQ(filter.push("d"), "ENd");
  EXPECT_EQ(filter.push("EE"), "E");
  EXPECT_EQ(filter.flush(), "E");
}

TEST(StopStrings, TheStopThatIsCompleteFirstCounts) {
  EXPECT_EQ(stream({"world", "lo"}, {"hello world"}), "hel");
  EXPECT_EQ(stream({"b", "abc"}, {"a", "b", "c"}), "a");
  EXPECT_EQ(stream({"b", "abc"}, {"abc"}), "a");
  EXPECT_EQ(stream({"bc", "abc"}, {"abc"}), "");
}

TEST(StopStrings, SelfOverlappingStop) {
  bool stopped = false;
  EXPECT_EQ(stream({"aab"}, {"a", "a", "a", "b"}, &stopped), "a");
  EXPECT_TRUE(stopped);
}

TEST(StopStrings, NothingComesAfterTheStop) {
  StopStrings filter({"x"});
  EXPECT_EQ(filter.push("ax"), "a");
  EXPECT_EQ(filter.push("more"), "");
  EXPECT_EQ(filter.flush(), "");
}

TEST(StopStrings, RefusesAnEmptyStop) {
  EXPECT_THROW(StopStrings({"a", ""}), Error);
}

// Whatever the pieces, the output is the text up to the first stop.
TEST(StopStrings, IndependentOfHowTheTextIsCut) {
  std::mt19937 random(1);
  const std::vector<std::string> stops = {"aba", "bb", "caac"};
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (int i = 0; i < 12; ++i) text += static_cast<char>('a' + random() % 3);
    std::vector<std::string> pieces;
    for (size_t at = 0; at < text.size();) {
      const size_t length = 1 + random() % 4;
      pieces.push_back(text.substr(at, length));
      at += length;
    }
    std::string expected = text;
    for (size_t end = 1; end <= text.size() && expected == text; ++end) {
      const std::string_view head = std::string_view(text).substr(0, end);
      size_t longest = 0;
      for (const std::string& stop : stops) {
        if (head.ends_with(stop)) longest = std::max(longest, stop.size());
      }
      if (longest > 0) expected = text.substr(0, end - longest);
    }
    ASSERT_EQ(stream(stops, pieces), expected) << text;
  }
}

}  // namespace
}  // namespace metal_lora
