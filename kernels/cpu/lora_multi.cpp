// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Many adapters on one base. The base's product does not look at adapters at all; each adapter's
// share is worked out for its own tokens, gathered side by side, and added in f32 before a row is
// rounded. So every adapter is read once, ranks are the true ones, tokens without an adapter cost
// nothing more than the base, and a token's sums run in an order that its neighbours do not touch.
// Up to kGemvMaxTokens tokens: lora_multi_gemv.cpp.
//
// Time over the base alone, bf16, K = N = 2048, rank 16, one thread, least of 15 runs: 128 tokens
// with 1, 8 and 100 adapters 1.07, 1.10 and 1.38 (lora_linear with its one: 1.02); 8 tokens with 1
// and 8 adapters 1.19 and 1.20 (lora_linear: 1.19).
#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/cpu/gemm_jobs.h"
#include "kernels/cpu/gemv_convert.h"
#include "kernels/cpu/lora_multi.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

/// Tokens [first, first + count) of the grouped order use one adapter.
struct AdapterGroup {
  uint32_t adapter = 0, rank = 0, first = 0, count = 0;
};

/// The tokens that have an adapter, by adapter, otherwise in order.
struct Grouping {
  std::vector<uint32_t> tokens;
  std::vector<AdapterGroup> groups;

  Grouping(const LoraBankView& bank, const int32_t* index, uint32_t first, uint32_t count) {
    const auto rank_of = [&](uint32_t t) {
      return index[t] < 0 ? 0u : static_cast<uint32_t>(bank.ranks[index[t]]);
    };
    for (uint32_t t = first; t < first + count; ++t) {
      if (rank_of(t) > 0) tokens.push_back(t);
    }
    std::stable_sort(
        tokens.begin(), tokens.end(), [&](uint32_t a, uint32_t b) { return index[a] < index[b]; });
    for (uint32_t i = 0; i < tokens.size(); ++i) {
      const auto adapter = static_cast<uint32_t>(index[tokens[i]]);
      if (groups.empty() || groups.back().adapter != adapter) {
        groups.push_back({adapter, rank_of(tokens[i]), i, 0});
      }
      ++groups.back().count;
    }
  }
  size_t size() const { return tokens.size(); }
};

/// Rows of `from` [·, width] in the grouped order.
const void* gather(
    const Grouping& grouping, const void* from, DType dtype, uint32_t width, Scratch& scratch) {
  const size_t row_bytes = width * dtype_bytes(dtype);
  char* to = static_cast<char*>(scratch.bytes(grouping.size() * row_bytes + 1));
  constexpr size_t kRows = 16;
  parallel_for((grouping.size() + kRows - 1) / kRows, [&](size_t chunk) {
    for (size_t i = chunk * kRows; i < std::min(grouping.size(), (chunk + 1) * kRows); ++i) {
      const char* row = static_cast<const char*>(from) + grouping.tokens[i] * row_bytes;
      if (row_bytes > 0) std::memcpy(to + i * row_bytes, row, row_bytes);
    }
  });
  return to;
}

/// The adapter matrix that a product runs through: x·Aᵀ and u·Bᵀ forward, dy·B and v·A backward.
enum class Side { a, b };

/// The adapter matrices as right-hand sides.
class Bank {
 public:
  Bank(const LoraBankView& view, uint32_t n, uint32_t k) : view_(view), n_(n), k_(k) {}
  uint32_t max_rank() const { return view_.params.max_rank; }
  /// Elements of the side that is not the rank.
  uint32_t width(Side side) const { return side == Side::a ? k_ : n_; }
  float scale(const AdapterGroup& g) const { return view_.scales[g.adapter]; }
  Columns a(const AdapterGroup& g, bool transposed) const {
    const size_t at = size_t{g.adapter} * max_rank() * k_;
    return {{element(view_.a, at), view_.params.dtype, k_}, nullptr, 0, transposed, nullptr};
  }
  Columns b(const AdapterGroup& g, bool transposed) const {
    const size_t at = size_t{g.adapter} * n_ * max_rank();
    return {
        {element(view_.b, at), view_.params.dtype, max_rank()}, nullptr, 0, transposed, nullptr};
  }

 private:
  const void* element(const void* data, size_t at) const {
    return static_cast<const char*>(data) + at * dtype_bytes(view_.params.dtype);
  }
  const LoraBankView& view_;
  const uint32_t n_, k_;
};

/// out[group rows, n] (row stride ld) = left[group rows, k] · right, k or n being the rank.
GemmJob group_job(
    const AdapterGroup& g,
    const MatrixView& left,
    uint32_t k,
    const Columns& right,
    uint32_t n,
    float* out,
    size_t ld) {
  GemmJob job;
  job.left = left;
  job.left.data =
      static_cast<const char*>(left.data) + size_t{g.first} * left.stride * dtype_bytes(left.dtype);
  job.rows = g.count;
  job.k = k;
  job.product.n = n;
  job.product.segments = {{k, 0, right, nullptr}};
  job.product.out.c = out + g.first * ld;
  job.product.out.row_stride = ld;
  return job;
}

/// out [tokens, max_rank] (its first `rank` columns) = left·Aᵀ (Side::a) or left·B.
void shrink(
    const GemmKernels& kernels,
    const Bank& bank,
    const Grouping& grouping,
    const MatrixView& left,
    Side side,
    float* out) {
  std::vector<GemmJob> jobs;
  for (const AdapterGroup& g : grouping.groups) {
    const Columns right = side == Side::a ? bank.a(g, true) : bank.b(g, false);
    jobs.push_back(group_job(g, left, bank.width(side), right, g.rank, out, bank.max_rank()));
  }
  run_jobs(kernels, jobs);
}

/// out [tokens, n or k] = left·Bᵀ (Side::b) or left·A; left [tokens, max_rank].
void expand(
    const GemmKernels& kernels,
    const Bank& bank,
    const Grouping& grouping,
    const float* left,
    Side side,
    float* out) {
  std::vector<GemmJob> jobs;
  const uint32_t width = bank.width(side);
  for (const AdapterGroup& g : grouping.groups) {
    const Columns right = side == Side::b ? bank.b(g, true) : bank.a(g, false);
    jobs.push_back(
        group_job(g, {left, DType::f32, bank.max_rank()}, g.rank, right, width, out, width));
  }
  run_jobs(kernels, jobs);
}

/// values[group rows, :rank] *= scale of the group.
void scale_rows(const Grouping& grouping, const Bank& bank, float* values) {
  const size_t ld = bank.max_rank();
  for (const AdapterGroup& g : grouping.groups) {
    const float scale = bank.scale(g);
    for (size_t row = g.first; row < size_t{g.first} + g.count; ++row) {
      for (uint32_t j = 0; j < g.rank; ++j) values[row * ld + j] *= scale;
    }
  }
}

/// Tokens of a call whose adapters' f32 share of the output is held at a time.
uint32_t tokens_at_a_time(uint32_t m, uint32_t width, uint32_t steps) {
  constexpr size_t kMaxShareBytes = size_t{16} << 20;
  constexpr size_t kMinTokens = 128;
  const size_t fit = kMaxShareBytes / (std::max<size_t>(1, width) * sizeof(float));
  return std::min(rows_at_a_time(m, steps), static_cast<uint32_t>(std::max(kMinTokens, fit)));
}

/// out [rows, width] = left · base (+ bias) + the adapters' share of its rows.
struct BaseProduct {
  const GemmKernels& kernels;
  MatrixView left;
  uint32_t inner, width;
  Columns base;
  const float* bias;
  void* out;
  DType dtype;

  void run(uint32_t row0, uint32_t rows, const float* const* added) const {
    Product product;
    product.n = width;
    product.row0 = row0;
    product.segments = {{inner, 0, base, nullptr}};
    product.out.y = out;
    product.out.dtype = dtype;
    product.out.bias = bias;
    product.out.added = added;
    product.a.rows = RowPanels(rows, kernels.max_rows);
    product.a.panel_steps = steps_of(kernels.compute, inner);
    const PackedRows& a = product.a;
    product.a.data = static_cast<uint32_t*>(thread_scratch().panels.bytes(
        size_t{a.rows.count} * a.rows.height * std::max(1u, a.panel_steps) * 4));
    parallel_for(a.rows.count, [&](size_t panel) {
      pack_row_panel(kernels, left, false, row0, inner, a, 0, static_cast<uint32_t>(panel));
    });
    run_products(kernels, {&product, 1});
  }
};

/// Where each row of the output finds its adapter's share, which lies in the grouped order.
void point_at(
    const Grouping& grouping,
    const float* share,
    uint32_t width,
    std::vector<const float*>& added) {
  for (size_t i = 0; i < grouping.size(); ++i) added[grouping.tokens[i]] = share + i * width;
}

void tiled_forward(
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& view,
    const int32_t* index,
    const float* bias,
    void* y) {
  const uint32_t n = weight.params.n, k = weight.params.k, rank = view.params.max_rank;
  const Compute compute = compute_for(dtype);
  const GemmKernels& kernels = gemm_kernels(compute);
  const Bank bank(view, n, k);
  const BaseProduct base = {
      kernels, {x, dtype, k}, k, n, {{}, &weight, 0, true, nullptr}, bias, y, dtype};
  const uint32_t piece = tokens_at_a_time(m, n, steps_of(compute, k));
  std::vector<const float*> added(m);
  std::vector<float> down;
  for (uint32_t row0 = 0; row0 < m; row0 += std::min(piece, m - row0)) {
    const uint32_t rows = std::min(piece, m - row0);
    const Grouping grouping(view, index, row0, rows);
    const void* grouped = gather(grouping, x, dtype, k, thread_scratch().extra);
    down.resize(grouping.size() * rank);
    float* share = thread_scratch().more.floats(grouping.size() * n + 1);
    shrink(kernels, bank, grouping, {grouped, dtype, k}, Side::a, down.data());
    scale_rows(grouping, bank, down.data());
    expand(kernels, bank, grouping, down.data(), Side::b, share);
    point_at(grouping, share, n, added);
    base.run(row0, rows, added.data());
  }
}

/// dA_i = v_iᵀ·x_i and dB_iᵀ = scale·u_iᵀ·dy_i, products with `rank` rows over a group's tokens.
struct BankGradients {
  const GemmKernels& kernels;
  const Bank& bank;
  const Grouping& grouping;
  DType dtype;
  uint32_t n, k;

  void da(const float* v, const void* grouped_x, float* out) const {
    run(v, grouped_x, k, [&](const AdapterGroup& g, Output& to) {
      to.c = out + size_t{g.adapter} * bank.max_rank() * k;
      to.row_stride = k;
    });
  }
  void db(const float* u, const void* grouped_dy, float* out) const {
    run(u, grouped_dy, n, [&](const AdapterGroup& g, Output& to) {
      to.c = out + size_t{g.adapter} * n * bank.max_rank();
      to.row_stride = 1;
      to.column_stride = bank.max_rank();
      to.alpha = bank.scale(g);
    });
  }

 private:
  template <class Place>
  void run(const float* left, const void* right, uint32_t width, Place place) const {
    std::vector<GemmJob> jobs;
    const size_t ld = bank.max_rank();
    for (const AdapterGroup& g : grouping.groups) {
      const auto* rows =
          static_cast<const char*>(right) + size_t{g.first} * width * dtype_bytes(dtype);
      GemmJob job;
      job.left = {left + g.first * ld, DType::f32, ld};
      job.transposed = true;
      job.rows = g.rank;
      job.k = g.count;
      job.product.n = width;
      job.product.segments = {
          {g.count, 0, {{rows, dtype, width}, nullptr, 0, false, nullptr}, nullptr}};
      place(g, job.product.out);
      jobs.push_back(job);
    }
    run_jobs(kernels, jobs);
  }
};

}  // namespace

void lora_linear_multi_forward(
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& bank,
    const int32_t* adapter_index,
    const float* bias,
    void* y) {
  if (m == 0) return;
  const auto form = m <= kGemvMaxTokens ? &lora_multi_gemv : &tiled_forward;
  form(m, dtype, x, weight, bank, adapter_index, bias, y);
}

void lora_linear_multi_backward(
    uint32_t m,
    DType dtype,
    const void* x,
    const WeightView& weight,
    const LoraBankView& view,
    const int32_t* adapter_index,
    const void* dy,
    void* dx,
    float* da,
    float* db) {
  const uint32_t n = weight.params.n, k = weight.params.k, rank = view.params.max_rank;
  const size_t adapters = view.params.adapters;
  if (da) std::fill_n(da, adapters * rank * k, 0.0f);
  if (db) std::fill_n(db, adapters * n * rank, 0.0f);
  const Compute compute = compute_for(dtype);
  const GemmKernels& kernels = gemm_kernels(compute);
  const Bank bank(view, n, k);
  const Grouping grouping(view, adapter_index, 0, m);
  const BankGradients gradients = {kernels, bank, grouping, dtype, n, k};
  const MatrixView grouped_dy = {gather(grouping, dy, dtype, n, thread_scratch().extra), dtype, n};
  std::vector<float> down(grouping.size() * rank);
  Scratch grouped_x_memory;
  MatrixView grouped_x;
  if (da || db) grouped_x = {gather(grouping, x, dtype, k, grouped_x_memory), dtype, k};
  if (db) {
    shrink(kernels, bank, grouping, grouped_x, Side::a, down.data());
    gradients.db(down.data(), grouped_dy.data, db);
  }
  if (!dx && !da) return;
  shrink(kernels, bank, grouping, grouped_dy, Side::b, down.data());
  scale_rows(grouping, bank, down.data());
  if (da) gradients.da(down.data(), grouped_x.data, da);
  if (!dx) return;
  float* share = thread_scratch().more.floats(grouping.size() * k + 1);
  expand(kernels, bank, grouping, down.data(), Side::a, share);
  std::vector<const float*> added(m);
  point_at(grouping, share, k, added);
  const BaseProduct base = {
      kernels, {dy, dtype, n}, n, k, {{}, &weight, 0, false, nullptr}, nullptr, dx, dtype};
  const uint32_t piece = rows_at_a_time(m, steps_of(compute, n));
  for (uint32_t row0 = 0; row0 < m; row0 += std::min(piece, m - row0)) {
    base.run(row0, std::min(piece, m - row0), added.data());
  }
}

}  // namespace metal_lora::cpu
