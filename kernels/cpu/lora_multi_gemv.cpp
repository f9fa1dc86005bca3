// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The decode form of lora_linear_multi_forward: gemv's tickets, with the u of each run of
// neighbouring tokens that share an adapter as tickets ahead of the base's. A run reads its adapter
// once; adapters are a few percent of the bytes, so tokens are not reordered for longer runs.
#include <algorithm>
#include <vector>

#include "kernels/cpu/gemv_region.h"
#include "kernels/cpu/lora_multi.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

/// Tokens [first, first + in.m) of the call and their adapter.
struct Run {
  uint32_t first = 0;
  GemvInput in;
  GemvLinear adapter;  ///< weight unset: lora and u only
};

GemvInput tokens_of(const GemvInput& all, uint32_t first, uint32_t count) {
  GemvInput in = all;
  in.m = count;
  in.f32 += size_t{first} * all.k;
  if (in.bf16) in.bf16 += size_t{first} * all.k;
  if (in.sums) in.sums += size_t{first} * (all.k / 32);
  return in;
}

std::vector<Run> runs_of(
    const GemvInput& all, uint32_t n, const LoraBankView& bank, const int32_t* index) {
  std::vector<Run> runs;
  const size_t size = dtype_bytes(bank.params.dtype), max_rank = bank.params.max_rank;
  for (uint32_t first = 0, count; first < all.m; first += count) {
    for (count = 1; first + count < all.m && index[first + count] == index[first];) ++count;
    if (index[first] < 0 || bank.ranks[index[first]] == 0) continue;
    const auto i = static_cast<size_t>(index[first]);
    Run run;
    run.first = first;
    run.in = tokens_of(all, first, count);
    LoraView& lora = run.adapter.lora;
    lora.params.rank = static_cast<uint32_t>(bank.ranks[i]);
    lora.params.scale = bank.scales[i];
    lora.params.dtype = bank.params.dtype;
    lora.a = static_cast<const char*>(bank.a) + i * max_rank * all.k * size;
    lora.b = static_cast<const char*>(bank.b) + i * n * max_rank * size;
    lora.b_stride = bank.params.max_rank;
    runs.push_back(run);
  }
  return runs;
}

struct MultiRegion {
  const GemvKernels& kernels;
  const GemvInput& in;
  DType dtype;
  const LoraBranch& branch;  ///< the base: weight, bias, y
  GemvLinear base;
  std::vector<Run> runs;
  uint32_t u_tickets = 0, tickets = 0;
  RegionState state;

  void run_ticket(uint32_t ticket) {
    if (ticket < u_tickets) {
      size_t r = 0;
      for (; ticket >= runs[r].adapter.u_tickets(); ++r) ticket -= runs[r].adapter.u_tickets();
      run_u_ticket(kernels, runs[r].adapter, runs[r].in, ticket);
      state.u_done.fetch_add(1, std::memory_order_release);
      return;
    }
    const PanelRange range = panels_of(base, ticket - u_tickets);
    alignas(64) float acc[kMaxTicketPanels * kMaxGemvTokens * kPanelRows];
    run_base(kernels, base, in, range, acc);
    wait_until(state.u_done, u_tickets);
    for (uint32_t p = range.begin; p < range.end; ++p) {
      float* sums = acc + size_t{p - range.begin} * in.m * kPanelRows;
      const uint32_t rows = rows_of(base, p);
      for (const Run& r : runs) {
        float* at = sums + size_t{r.first} * kPanelRows;
        kernels.expand(r.adapter.lora, r.in.m, r.adapter.u, p * kPanelRows, rows, at);
      }
      write_rows(branch, dtype, in.m, p * kPanelRows, rows, sums);
    }
  }
};

}  // namespace

void lora_multi_gemv(
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& bank,
    const int32_t* adapter_index,
    const float* bias,
    void* y) {
  const GemvKernels& kernels = gemv_kernels();
  const GemvTokens tokens(kernels, m, weight.params.k, dtype, x);
  LoraBranch branch;
  branch.weight = weight;
  branch.bias = bias;
  branch.y = y;
  MultiRegion region{kernels, tokens.in, dtype, branch, {}, {}, 0, 0, {}};
  region.runs = runs_of(tokens.in, weight.params.n, bank, adapter_index);
  std::vector<float> down(size_t{m} * bank.params.max_rank);  // a run's u: [tokens, its rank]
  for (Run& r : region.runs) {
    r.adapter.u = down.data() + size_t{r.first} * bank.params.max_rank;
    region.u_tickets += r.adapter.u_tickets();
  }
  const size_t row_bytes = weight_row_bytes(weight.params);
  region.base.weight = weight;
  region.base.panels_per_ticket =
      panels_per_ticket(region.base.panels(), row_bytes * kPanelRows, thread_count());
  region.tickets = region.u_tickets + region.base.tickets();
  const size_t helpers = gemv_helpers(row_bytes * weight.params.n, m, region.tickets);
  parallel_for(helpers, [&](size_t) {
    for (;;) {
      const uint32_t ticket = region.state.next.fetch_add(1, std::memory_order_relaxed);
      if (ticket >= region.tickets) return;
      region.run_ticket(ticket);
    }
  });
}

}  // namespace metal_lora::cpu
