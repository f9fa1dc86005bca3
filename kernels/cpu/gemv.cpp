// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Ladder, SmolLM2-135M's decode on one Zen 4 core (AVX-512 bf16, x bf16, int4 and int8 in groups
// of 32, medians by thread CPU time on a busy machine; 100 % = a prefetching loop that only adds up
// the same bytes, 13 … 18 GB/s, measured in the same run):
//   v1 int4 panels, two exact bf16 lookups and dot products per dword       89 % (22 GB/s in L2)
//      int8 panels, low and high nibble apart, same loop                    97 … 103 % (30 GB/s in
//      L2) f32 x: eight f32 lookups and FMAs per dword                          78 % (18 GB/s in
//      L2) AVX2, f32 x: shift, mask, convert, FMA                               50 %
//   v2 adapters ride along as tickets of the same region: rank 16 on everything + 24 % of a token
//   v3 B·u by whole registers, one reduction tree per 16 rows of A          + 13 … 22 %; 3.5 … 8 %
//   if
//      the adapter is in cache. The rest is bytes: 9.8 MB of bf16 adapters beside 98 MB of weights.
//   4 tokens cost 1.7x one, 8 tokens about 3.5x: there the dot product unit (one a cycle) limits.
//   v4 nf4 panels, one lookup of bf16 levels as int4's: 0.96 of int4's bytes a second for one
//   token,
//      1.06 … 1.16 for 4 and 8 (it has no biases to add); AVX2 0.83 … 0.90 (two permutations and a
//      blend a lookup), AVX-512 f32 1.02 … 1.14. Two threads of one core, 11008 x 4096.
// The next 10 %: adapters in 8 bits (half the bytes), or kept in the outer cache, which the
// read-once hint on the weights alone did not achieve; for several tokens, int8 panels by one
// exact conversion per q instead of two lookups (half the dot products).
#include "kernels/cpu/gemv.h"

#include <algorithm>
#include <memory>

#include "kernels/cpu/gemv_region.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {

const GemvKernels& gemv_kernels() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return gemv_kernels_avx2();
    case Isa::avx512:
      return gemv_kernels_avx512();
    case Isa::avx512_bf16:
      return gemv_kernels_avx512_bf16();
#elif defined(__aarch64__)
    case Isa::neon:
      return gemv_kernels_neon();
#endif
    default:
      return gemv_kernels_scalar();
  }
}

size_t weight_row_bytes(const WeightParams& p) {
  switch (p.format) {
    case WeightFormat::nf4:
      return p.k / 2 + p.k / kNf4Block * (p.double_quant ? 1 : 4);
    case WeightFormat::f32:
      return size_t{p.k} * 4;
    case WeightFormat::f16:
    case WeightFormat::bf16:
      return size_t{p.k} * 2;
    case WeightFormat::int4:
    case WeightFormat::int8: {
      const size_t data = p.format == WeightFormat::int4 ? p.k / 2 : p.k;
      return data + size_t{2} * (p.k / p.group_size) * (p.scales_dtype == DType::f32 ? 4 : 2);
    }
  }
  return 0;
}

uint32_t panels_per_ticket(uint32_t panels, size_t panel_bytes, int threads) {
  // 8 kB cost half a microsecond at memory speed, ten times what claiming them does.
  constexpr size_t kMinBytes = 8 * 1024;
  constexpr uint32_t kTicketsPerThread = 12;
  const uint32_t fair = panels / (kTicketsPerThread * static_cast<uint32_t>(threads));
  const auto least = static_cast<uint32_t>((kMinBytes + panel_bytes) / (panel_bytes + 1));
  return std::clamp(std::max(fair, least), 1u, kMaxTicketPanels);
}

void run_u_ticket(
    const GemvKernels& kernels, const GemvLinear& l, const GemvInput& in, uint32_t ticket) {
  const uint32_t rank = l.lora.params.rank, row0 = ticket * kPanelRows;
  const uint32_t rows = std::min(rank - row0, kPanelRows);
  WeightView a;
  a.params.n = rank;
  a.params.k = in.k;
  a.params.format = l.lora.params.dtype == DType::f32   ? WeightFormat::f32
                    : l.lora.params.dtype == DType::f16 ? WeightFormat::f16
                                                        : WeightFormat::bf16;
  a.data = l.lora.a;
  float acc[kMaxGemvTokens * kPanelRows];
  kernels.panel(a, in, row0, rows, acc);
  for (uint32_t t = 0; t < in.m; ++t) {
    std::copy_n(acc + t * kPanelRows, rows, l.u + size_t{t} * rank + row0);
  }
}

void write_rows(
    const LoraBranch& b, DType dtype, uint32_t m, uint32_t row0, uint32_t rows, const float* acc) {
  const size_t n = b.weight.params.n;
  for (uint32_t t = 0; t < m; ++t, acc += kPanelRows) {
    const size_t at = t * n + row0;
    for (uint32_t r = 0; r < rows; ++r) {
      float y = acc[r];
      if (b.bias != nullptr) y += b.bias[row0 + r];
      if (b.residual != nullptr) y += read_float(b.residual, dtype, at + r);
      write_float(b.y, dtype, at + r, y);
    }
  }
}

GemvTokens::GemvTokens(
    const GemvKernels& kernels, uint32_t m, uint32_t k, DType dtype, const void* x) {
  in.m = m;
  in.k = k;
  const size_t spans = k % 32 == 0 ? k / 32 : 0, values = dtype == DType::f32 ? 0 : k;
  scratch.reset(new float[m * (spans + values) + 1]);
  if (dtype == DType::f32) {
    in.f32 = static_cast<const float*>(x);
  } else {
    kernels.widen(size_t{m} * k, dtype, x, scratch.get());
    in.f32 = scratch.get();
  }
  if (dtype == DType::bf16) in.bf16 = static_cast<const uint16_t*>(x);
  if (spans > 0) {
    float* sums = scratch.get() + m * values;
    kernels.sums(m, k, in.f32, sums);
    in.sums = sums;
  }
}

size_t gemv_helpers(size_t weight_bytes, uint32_t m, uint32_t tickets) {
  // Below this a second thread's wake-up costs more than it saves.
  constexpr size_t kWorthSharingBytes = 64 * 1024;
  return weight_bytes * m < kWorthSharingBytes
             ? 1
             : std::min<size_t>(static_cast<size_t>(thread_count()), tickets);
}

namespace {

constexpr size_t kMaxBranches = 8;

/// The branches of one region and their tickets.
struct Region {
  const GemvKernels& kernels;
  GemvInput in;
  DType dtype;
  const LoraBranch* branches;
  size_t count;
  GemvLinear linears[kMaxBranches];
  uint32_t u_tickets = 0, tickets = 0;
  RegionState state;

  void run(uint32_t ticket) {
    if (ticket < u_tickets) {
      size_t b = 0;
      for (; ticket >= linears[b].u_tickets(); ++b) ticket -= linears[b].u_tickets();
      run_u_ticket(kernels, linears[b], in, ticket);
      state.u_done.fetch_add(1, std::memory_order_release);
      return;
    }
    ticket -= u_tickets;
    size_t b = 0;
    for (; ticket >= linears[b].tickets(); ++b) ticket -= linears[b].tickets();
    const GemvLinear& l = linears[b];
    const PanelRange range = panels_of(l, ticket);
    alignas(64) float acc[kMaxTicketPanels * kMaxGemvTokens * kPanelRows];
    run_base(kernels, l, in, range, acc);
    if (l.lora.params.rank > 0) wait_until(state.u_done, u_tickets);
    run_expand(kernels, l, in.m, range, acc);
    for (uint32_t p = range.begin; p < range.end; ++p) {
      write_rows(
          branches[b],
          dtype,
          in.m,
          p * kPanelRows,
          rows_of(l, p),
          acc + size_t{p - range.begin} * in.m * kPanelRows);
    }
  }
};

/// One region: at most kMaxBranches branches.
void forward_region(const GemvInput& in, DType dtype, const LoraBranch* branches, size_t count) {
  Region region{gemv_kernels(), in, dtype, branches, count, {}, 0, 0, {}};
  size_t u_values = 0, bytes = 0;
  for (size_t b = 0; b < count; ++b) {
    if (branches[b].u == nullptr) u_values += size_t{in.m} * branches[b].lora.params.rank;
  }
  const std::unique_ptr<float[]> u_store(u_values > 0 ? new float[u_values] : nullptr);
  float* u = u_store.get();
  const int threads = thread_count();
  for (size_t b = 0; b < count; ++b) {
    GemvLinear& l = region.linears[b];
    l.weight = branches[b].weight;
    l.lora = branches[b].lora;
    l.u = branches[b].u;
    const size_t row_bytes = weight_row_bytes(l.weight.params);
    l.panels_per_ticket = panels_per_ticket(l.panels(), row_bytes * kPanelRows, threads);
    if (l.lora.params.rank > 0 && l.u == nullptr) {
      l.u = u;
      u += size_t{in.m} * l.lora.params.rank;
    }
    region.u_tickets += l.u_tickets();
    region.tickets += l.tickets();
    bytes += row_bytes * l.weight.params.n;
  }
  region.tickets += region.u_tickets;
  parallel_for(gemv_helpers(bytes, in.m, region.tickets), [&](size_t) {
    for (;;) {
      const uint32_t ticket = region.state.next.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= region.tickets) return;
      region.run(ticket);
    }
  });
}

}  // namespace

void lora_gemv_forward(
    uint32_t m, uint32_t k, DType dtype, const void* x, const LoraBranch* branches, size_t count) {
  if (m == 0) return;
  const GemvTokens tokens(gemv_kernels(), m, k, dtype, x);
  for (size_t first = 0; first < count; first += kMaxBranches) {
    forward_region(tokens.in, dtype, branches + first, std::min(kMaxBranches, count - first));
  }
}

}  // namespace metal_lora::cpu
