// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

namespace metal_lora::test {
namespace {

struct RestoreThreads {
  int threads = cpu::thread_count();
  ~RestoreThreads() { cpu::set_thread_count(threads); }
};

TEST(ThreadPool, RunsEveryChunkOnce) {
  const RestoreThreads restore;
  for (int threads : {1, 2, 3, 8}) {
    cpu::set_thread_count(threads);
    EXPECT_EQ(cpu::thread_count(), threads);
    for (size_t chunks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(chunks);
      cpu::parallel_for(chunks, [&](size_t i) { runs[i].fetch_add(1); });
      for (const auto& r : runs) ASSERT_EQ(r.load(), 1);
    }
  }
}

TEST(ThreadPool, PlainWritesAreVisibleToTheCaller) {
  const RestoreThreads restore;
  cpu::set_thread_count(4);
  std::vector<size_t> squares(64);
  for (size_t round = 1; round <= 2000; ++round) {
    cpu::parallel_for(squares.size(), [&](size_t i) { squares[i] = i * round; });
    for (size_t i = 0; i < squares.size(); ++i) ASSERT_EQ(squares[i], i * round);
  }
}

TEST(ThreadPool, NestedCallsRunInline) {
  const RestoreThreads restore;
  cpu::set_thread_count(3);
  std::atomic<int> total{0};
  std::atomic<bool> moved{false};
  cpu::parallel_for(8, [&](size_t) {
    const std::thread::id here = std::this_thread::get_id();
    cpu::parallel_for(16, [&](size_t) {
      if (std::this_thread::get_id() != here) moved = true;
      total.fetch_add(1);
    });
  });
  EXPECT_EQ(total.load(), 8 * 16);
  EXPECT_FALSE(moved.load());
}

TEST(ThreadPool, ConcurrentCallersEachGetTheirOwnWork) {
  const RestoreThreads restore;
  cpu::set_thread_count(3);
  std::vector<std::thread> callers;
  std::vector<size_t> sums(4);
  for (size_t c = 0; c < sums.size(); ++c) {
    callers.emplace_back([&, c] {
      for (size_t round = 0; round < 300; ++round) {
        std::vector<size_t> parts(17);
        cpu::parallel_for(parts.size(), [&](size_t i) { parts[i] = i + c; });
        sums[c] += std::accumulate(parts.begin(), parts.end(), size_t{0});
      }
    });
  }
  for (std::thread& t : callers) t.join();
  for (size_t c = 0; c < sums.size(); ++c) EXPECT_EQ(sums[c], 300 * (136 + 17 * c));
}

TEST(ThreadPool, HelpersTakePart) {
  const RestoreThreads restore;
  cpu::set_thread_count(2);
  // Each chunk waits for the other: this ends only if two threads run them.
  std::atomic<int> arrived{0};
  cpu::parallel_for(2, [&](size_t) {
    arrived.fetch_add(1);
    while (arrived.load() < 2) std::this_thread::yield();
  });
  EXPECT_EQ(arrived.load(), 2);
}

TEST(ThreadPool, SleepingHelpersWakeAgain) {
  const RestoreThreads restore;
  cpu::set_thread_count(2);
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // longer than any spinning
    std::atomic<int> arrived{0};
    cpu::parallel_for(2, [&](size_t) {
      arrived.fetch_add(1);
      while (arrived.load() < 2) std::this_thread::yield();
    });
  }
}

TEST(ThreadPool, ThreadCountIsAtLeastOne) {
  const RestoreThreads restore;
  cpu::set_thread_count(0);
  EXPECT_EQ(cpu::thread_count(), 1);
  cpu::set_thread_count(-5);
  EXPECT_EQ(cpu::thread_count(), 1);
}

}  // namespace
}  // namespace metal_lora::test
