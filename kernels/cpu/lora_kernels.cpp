// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What the adapter costs: time over the base product alone in the same run, one Zen 4 core, medians
// of four runs on a machine with other users (single ones scatter by 8 %):
//   M = 512, K = N = 2048, r = 16: f32 1.01, bf16 1.00;  M = 1024, K = N = 576, r = 16: 1.09
//   and 1.06
// since u is taken from each panel of x while it is being packed, and B is folded into the base
// product as r more columns of W: y is touched once. The remaining price is 2·r·(K + N) products
// per token (5.6 % of the base at K = N = 576) and u's tile, 16 columns wide at least: for r = 8 a
// tile of 8 columns would save half of it.
#include "kernels/cpu/lora_kernels.h"

#include <algorithm>

#include "kernels/cpu/gemm_skinny.h"
#include "kernels/cpu/gemv.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr uint32_t round_up(uint32_t a, uint32_t b) {
  return (a + b - 1) / b * b;
}

/// Adapters whose x·Aᵀ is one product: all those without dropout, or one with its own mask.
struct AdapterGroup {
  std::vector<size_t> branches;
  SkinnyColumns a;
  const DropMask* drop = nullptr;
};

/// The tiled form. Each panel of x is packed once for all branches; while it is hot, u = x·Aᵀ is
/// taken from it, scaled and appended to the panel as `rank` more columns of x, so that the base
/// product goes on over them with B as `rank` more columns of W.
class TiledForward {
 public:
  TiledForward(
      uint32_t m, uint32_t k, DType dtype, const void* x, std::span<const LoraBranch> branches)
      : m_(m),
        k_(k),
        x_{x, dtype, k},
        branches_(branches),
        compute_(compute_for(dtype)),
        kernels_(gemm_kernels(compute_)),
        masks_(branches.size()),
        u_step_(branches.size()) {
    panel_steps_ = steps_of(compute_, k);
    for (size_t b = 0; b < branches.size(); ++b) {
      u_step_[b] = panel_steps_;
      panel_steps_ += steps_of(compute_, branches[b].lora.params.rank);
      masks_[b] = drop_mask(branches[b].lora.params);
    }
  }

  void run() {
    pack_adapters();
    const uint32_t piece = rows_at_a_time(m_, panel_steps_);
    for (uint32_t row0 = 0; row0 < m_; row0 += std::min(piece, m_ - row0)) {
      run_rows(row0, std::min(piece, m_ - row0));
    }
  }

 private:
  void pack_adapters() {
    AdapterGroup shared;
    for (size_t b = 0; b < branches_.size(); ++b) {
      const LoraParams& lora = branches_[b].lora.params;
      if (lora.rank == 0) continue;
      if (lora.dropout > 0.0f) {
        groups_.push_back({{b}, {}, &masks_[b]});
      } else {
        shared.branches.push_back(b);
      }
    }
    if (!shared.branches.empty()) groups_.push_back(shared);
    size_t words = 0, widest = 0;
    for (AdapterGroup& group : groups_) {
      for (size_t b : group.branches) group.a.columns += branches_[b].lora.params.rank;
      words += skinny_words(compute_, group.a.columns, k_);
      widest = std::max<size_t>(widest, group.a.columns);
      max_columns_ = std::max(max_columns_, round_up(group.a.columns, kPanelColumns));
    }
    uint32_t* out = static_cast<uint32_t*>(thread_scratch().extra.bytes(words * 4));
    // The A matrices of a group, one under the other.
    float* stacked = thread_scratch().more.floats(widest * k_);
    for (AdapterGroup& group : groups_) {
      float* row = stacked;
      for (size_t b : group.branches) {
        const LoraView& lora = branches_[b].lora;
        const size_t count = size_t{lora.params.rank} * k_;
        gemm_kernels(Compute::f32).load(lora.params.dtype, lora.a, count, row);
        row += count;
      }
      const Columns columns = {{stacked, DType::f32, k_}, nullptr, 0, true, nullptr};
      group.a = pack_skinny(kernels_, columns, group.a.columns, k_, out);
      out += skinny_words(compute_, group.a.columns, k_);
    }
  }

  void run_rows(uint32_t row0, uint32_t rows) {
    PackedRows packed;
    packed.rows = RowPanels(rows, kernels_.max_rows);
    packed.panel_steps = panel_steps_;
    packed.data = static_cast<uint32_t*>(thread_scratch().panels.bytes(
        size_t{packed.rows.count} * packed.rows.height * std::max(1u, panel_steps_) * 4));
    parallel_for(packed.rows.count, [&](size_t panel) {
      pack_panel(packed, row0, static_cast<uint32_t>(panel));
    });
    std::vector<Product> products;
    for (size_t b = 0; b < branches_.size(); ++b) products.push_back(product_of(b, packed, row0));
    run_products(kernels_, products);
  }

  void pack_panel(const PackedRows& packed, uint32_t row0, uint32_t panel) {
    pack_row_panel(kernels_, x_, false, row0, k_, packed, 0, panel);
    const uint32_t height = packed.rows.height;
    float* u = thread_scratch().rows.floats(size_t{height} * max_columns_);
    for (const AdapterGroup& group : groups_) {
      const uint32_t* a_panel = packed.at(panel, 0);
      if (group.drop) a_panel = dropped_panel(packed, row0, panel, *group.drop);
      skinny_product(kernels_, height, a_panel, group.a, u, max_columns_);
      finish_u(group, packed, row0, panel, u);
    }
  }

  /// Writes u out and appends scale·u to the panel, branch by branch.
  void finish_u(
      const AdapterGroup& group,
      const PackedRows& packed,
      uint32_t row0,
      uint32_t panel,
      float* u) {
    const uint32_t rows = packed.rows.rows_of(panel);
    const size_t first = size_t{row0} + size_t{panel} * packed.rows.height;
    for (size_t b : group.branches) {
      const LoraBranch& branch = branches_[b];
      const uint32_t rank = branch.lora.params.rank;
      for (uint32_t i = 0; branch.u && i < rows; ++i) {
        std::copy_n(u + i * max_columns_, rank, branch.u + (first + i) * rank);
      }
      pack_scaled(
          kernels_,
          branch.lora.params.scale,
          u,
          max_columns_,
          rows,
          packed.rows.height,
          rank,
          packed.at(panel, u_step_[b]));
      u += rank;
    }
  }

  /// drop(x) of one panel, packed beside the plain one.
  const uint32_t* dropped_panel(
      const PackedRows& packed, uint32_t row0, uint32_t panel, const DropMask& mask) {
    const uint32_t rows = packed.rows.rows_of(panel), height = packed.rows.height;
    const uint32_t first = row0 + panel * height;
    float* wide = thread_scratch().c_block.floats(size_t{height} * k_);
    const size_t size = x_.dtype == DType::f32 ? 4 : 2;
    for (uint32_t i = 0; i < rows; ++i) {
      const char* source = static_cast<const char*>(x_.data) + (size_t{first} + i) * k_ * size;
      gemm_kernels(Compute::f32).load(x_.dtype, source, k_, wide + size_t{i} * k_);
      kernels_.drop(mask, first + i, 0, k_, wide + size_t{i} * k_);
    }
    PackedRows one;
    one.rows = RowPanels(rows, height);
    one.rows.height = height;
    one.panel_steps = steps_of(compute_, k_);
    one.data = static_cast<uint32_t*>(
        thread_scratch().b_panels.bytes(size_t{height} * one.panel_steps * 4));
    pack_row_panel(kernels_, {wide, DType::f32, k_}, false, 0, k_, one, 0, 0);
    return one.data;
  }

  Product product_of(size_t b, const PackedRows& packed, uint32_t row0) const {
    const LoraBranch& branch = branches_[b];
    const LoraParams& lora = branch.lora.params;
    Product product;
    product.n = branch.weight.params.n;
    product.a = packed;
    product.row0 = row0;
    product.segments.push_back({k_, 0, {{}, &branch.weight, 0, true, nullptr}, nullptr});
    if (lora.rank != 0) {
      const MatrixView b_matrix = {branch.lora.b, lora.dtype, lora.rank};
      product.segments.push_back(
          {lora.rank, u_step_[b], {b_matrix, nullptr, 0, true, nullptr}, nullptr});
    }
    product.out.y = branch.y;
    product.out.dtype = x_.dtype;
    product.out.bias = branch.bias;
    product.out.residual = branch.residual;
    return product;
  }

  const uint32_t m_, k_;
  const MatrixView x_;
  const std::span<const LoraBranch> branches_;
  const Compute compute_;
  const GemmKernels& kernels_;
  std::vector<DropMask> masks_;
  std::vector<uint32_t> u_step_;
  std::vector<AdapterGroup> groups_;
  uint32_t panel_steps_ = 0;
  uint32_t max_columns_ = 0;
};

}  // namespace

void lora_linear_forward(
    uint32_t m, uint32_t k, DType dtype, const void* x, const LoraBranch* branches, size_t count) {
  if (m == 0 || count == 0) return;
  const auto drops = [](const LoraBranch& b) {
    return b.lora.params.rank != 0 && b.lora.params.dropout > 0.0f;
  };
  if (m <= kGemvMaxTokens && std::none_of(branches, branches + count, drops)) {
    return lora_gemv_forward(m, k, dtype, x, branches, count);
  }
  TiledForward(m, k, dtype, x, {branches, count}).run();
}

}  // namespace metal_lora::cpu
