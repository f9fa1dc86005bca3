// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// How the threads share one linear (or several on one input): tickets, claimed in order. The first
// tickets compute u = x·Aᵀ of the adapters, the others 16·n rows of the bases; a ticket that needs
// u waits for tickets claimed before its own, which running threads hold. So an adapter costs no
// barrier of its own, and one thread alone gets through all tickets.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "kernels/cpu/gemv_kernels.h"

namespace metal_lora::cpu {

inline constexpr uint32_t kMaxGemvTokens = kGemvMaxTokens;
/// Panels that one ticket holds at most: their sums wait on the stack for u.
inline constexpr uint32_t kMaxTicketPanels = 16;

inline void spin_pause(uint32_t round) {
  constexpr uint32_t kPolite = 2000;  // tens of µs: then another process may need the core
  if (round > kPolite) return std::this_thread::yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

inline void wait_until(const std::atomic<uint32_t>& counter, uint32_t target) {
  for (uint32_t i = 0; counter.load(std::memory_order_acquire) < target; ++i) spin_pause(i);
}

/// What the threads of a region share; on cache lines of their own.
struct alignas(64) RegionState {
  std::atomic<uint32_t> next{0};
  alignas(64) std::atomic<uint32_t> done{0};
  std::atomic<uint32_t> u_done{0};
  void reset() {
    next.store(0, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    u_done.store(0, std::memory_order_relaxed);
  }
};

/// One linear of a region.
struct GemvLinear {
  WeightView weight;
  LoraView lora;
  float* u = nullptr;  ///< [m, rank], set where lora.params.rank > 0
  uint32_t panels_per_ticket = 1;

  uint32_t panels() const { return (weight.params.n + kPanelRows - 1) / kPanelRows; }
  uint32_t tickets() const { return (panels() + panels_per_ticket - 1) / panels_per_ticket; }
  uint32_t u_tickets() const { return (lora.params.rank + kPanelRows - 1) / kPanelRows; }
};

/// Tokens in the forms that the kernels read; owns what had to be converted.
struct GemvTokens {
  GemvTokens(const GemvKernels& kernels, uint32_t m, uint32_t k, DType dtype, const void* x);
  GemvInput in;
  std::unique_ptr<float[]> scratch;
};

/// acc -> y = acc + bias + residual, in y's dtype, for rows [row0, row0 + rows) of W.
void write_rows(
    const LoraBranch& b, DType dtype, uint32_t m, uint32_t row0, uint32_t rows, const float* acc);

/// Threads worth waking for so many bytes of weights read for m tokens.
size_t gemv_helpers(size_t weight_bytes, uint32_t m, uint32_t tickets);

/// Bytes of W per row, scales and biases included.
size_t weight_row_bytes(const WeightParams& p);

/// Splits n rows so that every thread gets several tickets and a ticket is worth claiming.
uint32_t panels_per_ticket(uint32_t panels, size_t panel_bytes, int threads);

/// u rows [16·ticket, …) of one adapter.
void run_u_ticket(
    const GemvKernels& kernels, const GemvLinear& l, const GemvInput& in, uint32_t ticket);

/// The range of panels of a ticket.
struct PanelRange {
  uint32_t begin, end;
};
inline PanelRange panels_of(const GemvLinear& l, uint32_t ticket) {
  const uint32_t begin = ticket * l.panels_per_ticket, last = l.panels();
  const uint32_t end = begin + l.panels_per_ticket;
  return {begin, end < last ? end : last};
}
inline uint32_t rows_of(const GemvLinear& l, uint32_t panel) {
  const uint32_t left = l.weight.params.n - panel * kPanelRows;
  return left < kPanelRows ? left : kPanelRows;
}

/// Asks for the rows of B that a range of panels will need once its base sums are done.
inline void prefetch_expand(const GemvLinear& l, PanelRange range) {
  const size_t row_bytes = l.lora.params.rank * dtype_bytes(l.lora.params.dtype);
  const auto* const b = static_cast<const char*>(l.lora.b) + range.begin * kPanelRows * row_bytes;
  const size_t bytes = (range.end - range.begin) * kPanelRows * row_bytes;
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(b + at, 0, 3);
}

/// acc[(panel - begin)·m·16 …] = the base's sums of a range of panels.
inline void run_base(
    const GemvKernels& kernels,
    const GemvLinear& l,
    const GemvInput& in,
    PanelRange range,
    float* acc) {
  if (l.lora.params.rank > 0) prefetch_expand(l, range);
  for (uint32_t p = range.begin; p < range.end; ++p, acc += in.m * kPanelRows) {
    kernels.panel(l.weight, in, p * kPanelRows, rows_of(l, p), acc);
  }
}

/// Adds scale·B·u to the sums; all of u must be there.
inline void run_expand(
    const GemvKernels& kernels, const GemvLinear& l, uint32_t m, PanelRange range, float* acc) {
  if (l.lora.params.rank == 0) return;
  for (uint32_t p = range.begin; p < range.end; ++p, acc += m * kPanelRows) {
    kernels.expand(l.lora, m, l.u, p * kPanelRows, rows_of(l, p), acc);
  }
}

}  // namespace metal_lora::cpu
