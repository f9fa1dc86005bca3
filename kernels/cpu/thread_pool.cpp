// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// One pool per process. The job on offer is one 64-bit word, {epoch, chunks left}: a thread claims
// a chunk by decrementing it, and looks at the rest of the job only after a claim succeeded. So
// the caller waits for chunks that somebody runs, never for a worker that has not woken up yet:
// with a neighbour on one of the cores the pool loses its share of that core and no more.
// Idle workers spin for kSpin, then sleep in the kernel.
#include "kernels/cpu/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace metal_lora::cpu {
namespace {

constexpr int kMaxThreads = 1024;
constexpr auto kSpin = std::chrono::microseconds(8);  // about what a futex wake-up costs
thread_local bool inside_chunk = false;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/// Polls `ready` for kSpin; true as soon as it holds.
template <class F>
bool spin_until(F ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

#if defined(__linux__)
/// Cores' worth of time that the control group allows, or no limit (0).
double quota_of(const std::string& folder) {
  std::string quota, period;
  if (std::ifstream v2(folder + "/cpu.max"); v2 >> quota >> period) {
    const double p = std::atof(period.c_str());
    return quota == "max" || p <= 0 ? 0.0 : std::atof(quota.c_str()) / p;
  }
  double q = 0, p = 0;
  std::ifstream v1_quota(folder + "/cpu.cfs_quota_us"), v1_period(folder + "/cpu.cfs_period_us");
  if (v1_quota >> q && v1_period >> p && q > 0 && p > 0) return q / p;
  return 0.0;
}

/// The tightest limit from this process's group up to the root (v2 and v1 mounts).
double cgroup_cores() {
  double cores = std::numeric_limits<double>::infinity();
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t path_at = line.find(':', line.find(':') + 1);
    if (path_at == std::string::npos) continue;
    const bool v2 = line.rfind("0::", 0) == 0;
    if (!v2 && line.find("cpu") == std::string::npos) continue;
    const std::string mount = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (std::string path = line.substr(path_at + 1);;) {
      const double q = quota_of(mount + (path == "/" ? "" : path));
      if (q > 0) cores = std::min(cores, q);
      if (path.empty() || path == "/") break;
      path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
    }
  }
  return cores;
}
#endif

int usable_cores() {
  int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = std::max(1, CPU_COUNT(&set));
  const double quota = cgroup_cores();
  if (quota < cores) cores = std::max(1, static_cast<int>(quota + 0.999));
#endif
  return std::min(cores, kMaxThreads);
}

int default_threads() {
  if (const char* text = std::getenv("METAL_LORA_THREADS")) {
    char* end = nullptr;
    const long wanted = std::strtol(text, &end, 10);
    if (end != text && *end == '\0' && wanted >= 1 && wanted <= kMaxThreads) {
      return static_cast<int>(wanted);
    }
  }
  return usable_cores();
}

class ThreadPool {
 public:
  ThreadPool() : threads_(default_threads()) {}

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  void set_threads(int threads) {
    const std::lock_guard turn(turn_);
    stop_workers();
    threads_.store(std::clamp(threads, 1, kMaxThreads), std::memory_order_relaxed);
  }

  void run(size_t chunks, ChunkFn fn) {
    const std::lock_guard turn(turn_);
    // The claim word holds 32 bits of chunks: longer jobs go in pieces.
    constexpr size_t kMaxChunks = std::numeric_limits<uint32_t>::max();
    for (size_t first = 0; first < chunks; first += kMaxChunks) {
      run_piece(first, static_cast<uint32_t>(std::min(kMaxChunks, chunks - first)), fn);
    }
  }

 private:
  struct Job {
    const ChunkFn* fn = nullptr;
    size_t first = 0;
    uint32_t chunks = 0;
  };

  void run_piece(size_t first, uint32_t chunks, const ChunkFn& fn) {
    start_workers();
    job_ = {&fn, first, chunks};
    unfinished_.store(chunks, std::memory_order_relaxed);
    const uint64_t epoch = (offer_.load(std::memory_order_relaxed) >> 32) + 1;
    offer_.store(epoch << 32 | chunks, std::memory_order_seq_cst);
    wake(chunks - 1);
    inside_chunk = true;
    while (run_one()) {
    }
    inside_chunk = false;
    if (spin_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; })) return;
    for (uint32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) {
      unfinished_.wait(left, std::memory_order_acquire);
    }
  }

  /// A process that may start no more threads computes with those it has.
  void start_workers() {
    const size_t wanted = static_cast<size_t>(threads()) - 1;
    try {
      while (workers_.size() < wanted) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
      threads_.store(static_cast<int>(workers_.size()) + 1, std::memory_order_relaxed);
    }
  }

  /// Claims and runs one chunk; false when none is on offer.
  bool run_one() {
    uint64_t offer = offer_.load(std::memory_order_acquire);
    do {
      if (static_cast<uint32_t>(offer) == 0) return false;
    } while (!offer_.compare_exchange_weak(
        offer, offer - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    const Job job = job_;  // stays until unfinished_ is 0, which needs the chunk just claimed
    (*job.fn)(job.first + (job.chunks - static_cast<uint32_t>(offer)));
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    return true;
  }

  bool work_on_offer() const {
    return static_cast<uint32_t>(offer_.load(std::memory_order_acquire)) != 0;
  }

  void wake(uint32_t helpers) {
    // Pairs with the fetch_add in work(): either that worker sees the offer, or it is seen here.
    uint32_t asleep = asleep_.load(std::memory_order_seq_cst);
    if (asleep == 0 || helpers == 0) return;
    bell_.fetch_add(1, std::memory_order_release);
    for (asleep = std::min(asleep, helpers); asleep != 0; --asleep) bell_.notify_one();
  }

  void work() {
    inside_chunk = true;
    while (!stop_.load(std::memory_order_acquire)) {
      if (run_one()) continue;
      const auto wanted = [&] { return work_on_offer() || stop_.load(std::memory_order_acquire); };
      if (spin_until(wanted)) continue;
      const uint32_t bell = bell_.load(std::memory_order_acquire);
      asleep_.fetch_add(1, std::memory_order_seq_cst);
      if (static_cast<uint32_t>(offer_.load(std::memory_order_seq_cst)) == 0 &&
          !stop_.load(std::memory_order_seq_cst)) {
        bell_.wait(bell, std::memory_order_acquire);
      }
      asleep_.fetch_sub(1, std::memory_order_relaxed);
    }
  }

  void stop_workers() {
    stop_.store(true, std::memory_order_seq_cst);
    bell_.fetch_add(1, std::memory_order_release);
    bell_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_.store(false, std::memory_order_relaxed);
  }

  std::mutex turn_;  // one job at a time; also guards workers_
  std::vector<std::thread> workers_;
  std::atomic<int> threads_;
  Job job_;  // written before offer_, read only by whoever holds a claim
  alignas(64) std::atomic<uint64_t> offer_{0};
  alignas(64) std::atomic<uint32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> asleep_{0};
  std::atomic<uint32_t> bell_{0};
  std::atomic<bool> stop_{false};
};

/// Never destroyed: other static objects may still compute while the process exits.
ThreadPool& pool() {
  static ThreadPool* const instance = new ThreadPool;
  return *instance;
}

}  // namespace

void parallel_for(size_t chunks, ChunkFn fn) {
  if (chunks == 0) return;
  if (chunks == 1 || inside_chunk || pool().threads() == 1) {
    for (size_t i = 0; i < chunks; ++i) fn(i);
    return;
  }
  pool().run(chunks, fn);
}

int thread_count() {
  return pool().threads();
}

void set_thread_count(int threads) {
  pool().set_threads(threads);
}

}  // namespace metal_lora::cpu
