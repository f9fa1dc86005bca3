// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>

#include "kernels/cpu/gemm_jobs.h"
#include "kernels/cpu/gemm_skinny.h"
#include "kernels/cpu/lora_kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr uint32_t round_up(uint32_t a, uint32_t b) {
  return (a + b - 1) / b * b;
}

/// dx runs over the branches' outputs as one long k: [dy_q | v_q | dy_k | v_k | …] times
/// [W_q ; A_q ; W_k ; A_k ; …], v = scale·(dy·B) being taken from each panel of dy as it is packed.
/// dA = vᵀ·drop(x) and (dB)ᵀ = scale·uᵀ·dy are products with `rank` rows over the tokens.
class TiledBackward {
 public:
  TiledBackward(
      uint32_t m,
      uint32_t k,
      DType dtype,
      const void* x,
      std::span<const LoraBranch> branches,
      void* dx)
      : m_(m),
        k_(k),
        dtype_(dtype),
        x_(x),
        branches_(branches),
        dx_(dx),
        compute_(compute_for(dtype)),
        kernels_(gemm_kernels(compute_)),
        masks_(branches.size()),
        places_(branches.size()) {
    for (size_t b = 0; b < branches.size(); ++b) {
      const LoraParams& lora = branches[b].lora.params;
      Place& place = places_[b];
      place.dy_step = panel_steps_;
      panel_steps_ += steps_of(compute_, branches[b].weight.params.n);
      place.v_step = panel_steps_;
      panel_steps_ += steps_of(compute_, lora.rank);
      place.v_column = v_columns_;
      v_columns_ += round_up(lora.rank, kPanelColumns);
      masks_[b] = drop_mask(lora);
    }
  }

  void run() {
    pack_adapters();
    v_ = thread_scratch().extra.floats(size_t{m_} * v_columns_);
    const uint32_t piece = rows_at_a_time(m_, panel_steps_);
    for (uint32_t row0 = 0; row0 < m_; row0 += std::min(piece, m_ - row0)) {
      run_rows(row0, std::min(piece, m_ - row0));
    }
    adapter_gradients();
  }

 private:
  struct Place {
    uint32_t dy_step = 0, v_step = 0, v_column = 0;
    SkinnyColumns b;
  };

  void pack_adapters() {
    size_t words = 0;
    for (const LoraBranch& branch : branches_) {
      words += skinny_words(compute_, branch.lora.params.rank, branch.weight.params.n);
    }
    uint32_t* out = static_cast<uint32_t*>(thread_scratch().more.bytes(words * 4));
    for (size_t b = 0; b < branches_.size(); ++b) {
      const LoraParams& lora = branches_[b].lora.params;
      if (lora.rank == 0) continue;
      const uint32_t n = branches_[b].weight.params.n;
      const Columns columns = {
          {branches_[b].lora.b, lora.dtype, lora.rank}, nullptr, 0, false, nullptr};
      places_[b].b = pack_skinny(kernels_, columns, lora.rank, n, out);
      out += skinny_words(compute_, lora.rank, n);
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
    if (!dx_) return;
    const Product product = dx_product(packed, row0);
    run_products(kernels_, {&product, 1});
  }

  void pack_panel(const PackedRows& packed, uint32_t row0, uint32_t panel) {
    const uint32_t height = packed.rows.height, rows = packed.rows.rows_of(panel);
    const size_t first = size_t{row0} + size_t{panel} * height;
    for (size_t b = 0; b < branches_.size(); ++b) {
      const LoraBranch& branch = branches_[b];
      const LoraParams& lora = branch.lora.params;
      const Place& place = places_[b];
      const uint32_t n = branch.weight.params.n;
      pack_row_panel(
          kernels_, {branch.dy, dtype_, n}, false, row0, n, packed, place.dy_step, panel);
      if (lora.rank == 0) continue;
      const uint32_t width = round_up(lora.rank, kPanelColumns);
      float* v = thread_scratch().rows.floats(size_t{height} * width);
      skinny_product(kernels_, height, packed.at(panel, place.dy_step), place.b, v, width);
      pack_scaled(
          kernels_, lora.scale, v, width, rows, height, lora.rank, packed.at(panel, place.v_step));
      for (uint32_t i = 0; i < rows; ++i) {
        std::copy_n(v + i * width, lora.rank, v_ + (first + i) * v_columns_ + place.v_column);
      }
    }
  }

  Product dx_product(const PackedRows& packed, uint32_t row0) const {
    Product product;
    product.n = k_;
    product.a = packed;
    product.row0 = row0;
    for (size_t b = 0; b < branches_.size(); ++b) {
      const LoraBranch& branch = branches_[b];
      const LoraParams& lora = branch.lora.params;
      product.segments.push_back(
          {branch.weight.params.n,
           places_[b].dy_step,
           {{}, &branch.weight, 0, false, nullptr},
           nullptr});
      if (lora.rank == 0) continue;
      product.segments.push_back(
          {lora.rank,
           places_[b].v_step,
           {{branch.lora.a, lora.dtype, k_}, nullptr, 0, false, nullptr},
           lora.dropout > 0.0f ? &masks_[b] : nullptr});
    }
    product.out.y = dx_;
    product.out.dtype = dtype_;
    return product;
  }

  void adapter_gradients() {
    std::vector<GemmJob> jobs;
    for (size_t b = 0; b < branches_.size(); ++b) {
      const LoraBranch& branch = branches_[b];
      const LoraParams& lora = branch.lora.params;
      if (lora.rank == 0) continue;
      const uint32_t n = branch.weight.params.n;
      if (branch.da) {
        const DropMask* drop = lora.dropout > 0.0f ? &masks_[b] : nullptr;
        GemmJob job = gradient_job(
            lora.rank,
            k_,
            {v_ + places_[b].v_column, DType::f32, v_columns_},
            {{x_, dtype_, k_}, nullptr, 0, false, drop});
        job.product.out.c = branch.da;
        job.product.out.row_stride = k_;
        jobs.push_back(job);
      }
      if (branch.db) {
        GemmJob job = gradient_job(
            lora.rank,
            n,
            {branch.u_saved, DType::f32, lora.rank},
            {{branch.dy, dtype_, n}, nullptr, 0, false, nullptr});
        job.product.out.c = branch.db;
        job.product.out.row_stride = 1;
        job.product.out.column_stride = lora.rank;
        job.product.out.alpha = lora.scale;
        jobs.push_back(job);
      }
    }
    run_jobs(kernels_, jobs);
  }

  /// One product with rank rows over the tokens: its left side is [m, rank] f32, read transposed.
  GemmJob gradient_job(
      uint32_t rank, uint32_t n, const MatrixView& left, const Columns& right) const {
    GemmJob job;
    job.left = left;
    job.transposed = true;
    job.rows = rank;
    job.k = m_;
    job.product.n = n;
    job.product.segments = {{m_, 0, right, nullptr}};
    return job;
  }

  const uint32_t m_, k_;
  const DType dtype_;
  const void* const x_;
  const std::span<const LoraBranch> branches_;
  void* const dx_;
  const Compute compute_;
  const GemmKernels& kernels_;
  std::vector<DropMask> masks_;
  std::vector<Place> places_;
  uint32_t panel_steps_ = 0;
  uint32_t v_columns_ = 0;
  float* v_ = nullptr;
};

}  // namespace

void lora_linear_backward(
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    void* dx) {
  const auto wanted = [](const LoraBranch& b) { return b.lora.params.rank != 0 && (b.da || b.db); };
  if (!dx && std::none_of(branches, branches + count, wanted)) return;
  TiledBackward(m, k, dtype, x, {branches, count}, dx).run();
}

}  // namespace metal_lora::cpu
