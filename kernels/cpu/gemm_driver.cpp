// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm_driver.h"

#include <algorithm>
#include <array>
#include <new>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr uint32_t kSmallTaskColumns = 64;  // narrow tasks: enough of them of a small product
constexpr uint32_t kSmallProduct = 1024;    // columns below which tasks are narrow
constexpr uint32_t kTaskRows = 1024;        // a weight block is packed once for so many tokens
constexpr uint32_t kMinTaskRows = 128;      // below, packing it again costs more than an idle core
constexpr uint32_t kCutSteps = 32;  // k cuts fall on multiples of 32 steps (whole words, aligned)

// ---- blocks of k -------------------------------------------------------------------------------

/// A piece of one segment inside a block.
struct Piece {
  uint32_t segment, k0, k1;
};

struct Block {
  std::vector<Piece> pieces;
  uint32_t steps = 0;
  bool masked = false;
};

/// Equal cuts of each segment; short segments (adapters) ride in the block before them.
std::vector<Block> blocks_of(const GemmKernels& kernels, const Product& product) {
  const uint32_t per_step = kernels.compute == Compute::bf16 ? 2 : 1;
  std::vector<Block> blocks;
  for (uint32_t s = 0; s < product.segments.size(); ++s) {
    const Segment& segment = product.segments[s];
    const uint32_t steps = steps_of(kernels.compute, segment.k);
    if (steps == 0) continue;
    const uint32_t cuts = ceil_div(steps, kBlockSteps);
    const uint32_t cut = ceil_div(ceil_div(steps, cuts), kCutSteps) * kCutSteps * per_step;
    for (uint32_t k = 0; k < segment.k; k += std::min(cut, segment.k - k)) {
      const uint32_t end = k + std::min(cut, segment.k - k);
      const uint32_t piece_steps = steps_of(kernels.compute, end - k);
      const bool masked = segment.drop != nullptr;
      const bool joins = !blocks.empty() && !masked && !blocks.back().masked &&
                         blocks.back().steps + piece_steps <= kBlockSteps + 64;
      if (!joins) blocks.push_back({{}, 0, masked});
      blocks.back().pieces.push_back({s, k, end});
      blocks.back().steps += piece_steps;
    }
  }
  return blocks;
}

// ---- a task: some rows of a few panels of columns
// ------------------------------------------------

struct Plan {
  const GemmKernels* kernels;
  const Product* product;
  std::vector<Block> blocks;
  uint32_t columns, column_tasks, row_tasks, panels_per_task;
};

void write_row(
    const GemmKernels& kernels,
    const Output& out,
    size_t row,
    uint32_t n,
    uint32_t n0,
    uint32_t count,
    const float* sums) {
  if (out.y) {
    const size_t size = out.dtype == DType::f32 ? 4 : 2, at = (row * n + n0) * size;
    std::array<float, kTaskColumns> with_added;
    if (out.added && out.added[row]) {
      for (uint32_t j = 0; j < count; ++j) with_added[j] = sums[j] + out.added[row][n0 + j];
      sums = with_added.data();
    }
    kernels.finish_row(
        out.dtype,
        sums,
        count,
        out.bias ? out.bias + n0 : nullptr,
        out.residual ? static_cast<const char*>(out.residual) + at : nullptr,
        static_cast<char*>(out.y) + at);
    return;
  }
  float* c = out.c + row * out.row_stride + n0 * out.column_stride;
  if (out.column_stride == 1 && out.beta == 0.0f) {  // the common case, in whole vectors
    for (uint32_t j = 0; j < count; ++j) c[j] = out.alpha * sums[j];
    return;
  }
  for (uint32_t j = 0; j < count; ++j, c += out.column_stride) {
    *c = out.beta == 0.0f ? out.alpha * sums[j] : out.alpha * sums[j] + out.beta * *c;
  }
}

class Task {
 public:
  Task(const Plan& plan, uint32_t index)
      : plan_(plan), kernels_(*plan.kernels), product_(*plan.product), rows_(product_.a.rows) {
    const uint32_t columns = index / plan.row_tasks, rows = index % plan.row_tasks;
    n0_ = columns * plan.columns;
    n1_ = std::min(product_.n, n0_ + plan.columns);
    panel0_ = rows * plan.panels_per_task;
    panel1_ = std::min(rows_.count, panel0_ + plan.panels_per_task);
  }

  void run() {
    const size_t count = plan_.blocks.size();
    if (count == 0) return write_zeros();
    ThreadScratch& scratch = thread_scratch();
    // One block needs no C block: each tile is finished while it is in the first-level cache.
    const bool one = count == 1 && !plan_.blocks[0].masked;
    ld_ = plan_.columns;
    c_ = one ? nullptr : scratch.c_block.floats(size_t{panel1_ - panel0_} * rows_.height * ld_);
    for (size_t b = 0; b < count; ++b) {
      pack(plan_.blocks[b]);
      for (uint32_t panel = panel0_; panel < panel1_; ++panel) {
        multiply(plan_.blocks[b], panel, b != 0, b + 1 == count);
      }
    }
  }

 private:
  void pack(const Block& block) {
    b_ = static_cast<uint32_t*>(thread_scratch().b_panels.bytes(size_t{block.steps} * ld_ * 4));
    uint32_t* out = b_;
    for (const Piece& piece : block.pieces) {
      const Columns& b = product_.segments[piece.segment].b;
      pack_columns(kernels_, b, piece.k0, piece.k1, n0_, n1_, out);
      out += size_t{steps_of(kernels_.compute, piece.k1 - piece.k0)} * ld_;
    }
  }

  /// One A panel times the block's B panels, two at a time.
  void multiply(const Block& block, uint32_t panel, bool accumulate, bool last) {
    alignas(64) std::array<float, 16 * kTaskColumns> local;
    float* c = c_ ? c_ + size_t{panel - panel0_} * rows_.height * ld_ : local.data();
    float* target = block.masked ? local.data() : c;
    const uint32_t panels = ceil_div(n1_ - n0_, kPanelColumns);
    for (uint32_t p = 0; p < panels; p += kernels_.max_panels) {
      const uint32_t wide = std::min(kernels_.max_panels, panels - p);
      run_tile(block, panel, p, wide, target + p * kPanelColumns, accumulate && !block.masked);
    }
    if (block.masked) add_masked(block, panel, target, c, accumulate);
    if (!last) return;
    for (uint32_t i = 0; i < rows_.rows_of(panel); ++i) {
      const size_t row = size_t{product_.row0} + panel * rows_.height + i;
      write_row(kernels_, product_.out, row, product_.n, n0_, n1_ - n0_, c + i * ld_);
    }
  }

  void run_tile(
      const Block& block, uint32_t panel, uint32_t p, uint32_t wide, float* c, bool accumulate) {
    constexpr uint32_t kRuns = 8;
    std::array<PanelRun, kRuns> runs;
    uint32_t count = 0;
    const uint32_t* b = b_;
    for (const Piece& piece : block.pieces) {
      const uint32_t steps = steps_of(kernels_.compute, piece.k1 - piece.k0);
      const uint32_t a_step =
          product_.segments[piece.segment].a_step + steps_of(kernels_.compute, piece.k0);
      runs[count++] = {
          product_.a.at(panel, a_step), b + size_t{p} * steps * kPanelColumns, steps, steps};
      b += size_t{steps} * ld_;
      if (count == kRuns) {
        kernels_.tile(rows_.height, wide, runs.data(), count, c, ld_, accumulate);
        count = 0;
        accumulate = true;
      }
    }
    if (count) kernels_.tile(rows_.height, wide, runs.data(), count, c, ld_, accumulate);
  }

  /// c (+)= mask ∘ product. A masked block holds one segment.
  void add_masked(const Block& block, uint32_t panel, float* product, float* c, bool accumulate) {
    const DropMask& drop = *product_.segments[block.pieces[0].segment].drop;
    for (uint32_t i = 0; i < rows_.rows_of(panel); ++i) {
      float* from = product + i * ld_;
      float* to = c + i * ld_;
      kernels_.drop(drop, product_.row0 + panel * rows_.height + i, n0_, n1_ - n0_, from);
      for (uint32_t j = 0; j < n1_ - n0_; ++j) to[j] = accumulate ? to[j] + from[j] : from[j];
    }
  }

  void write_zeros() {
    const std::array<float, kTaskColumns> zeros{};
    for (uint32_t i = panel0_ * rows_.height; i < std::min(rows_.m, panel1_ * rows_.height); ++i) {
      write_row(
          kernels_,
          product_.out,
          size_t{product_.row0} + i,
          product_.n,
          n0_,
          n1_ - n0_,
          zeros.data());
    }
  }

  const Plan& plan_;
  const GemmKernels& kernels_;
  const Product& product_;
  const RowPanels& rows_;
  uint32_t n0_, n1_, panel0_, panel1_;
  uint32_t ld_ = 0;  ///< columns of the C block
  uint32_t* b_ = nullptr;
  float* c_ = nullptr;
};

uint32_t task_columns(uint32_t n) {
  return n < kSmallProduct ? kSmallTaskColumns : kTaskColumns;
}

uint32_t panels_per_task(const GemmKernels& kernels, std::span<const Product> products) {
  // Enough tasks that a late thread finds some left, but no more than pays for packing.
  uint32_t rows = kTaskRows;
  const uint64_t wanted = 4 * static_cast<uint64_t>(thread_count());
  const auto tasks = [&](uint32_t task_rows) {
    uint64_t total = 0;
    for (const Product& p : products) {
      total += uint64_t{ceil_div(p.n, task_columns(p.n))} * ceil_div(p.a.rows.m, task_rows);
    }
    return total;
  };
  while (rows > kMinTaskRows && tasks(rows) < wanted) rows /= 2;
  return std::max(1u, rows / kernels.max_rows);
}

}  // namespace

void Scratch::Free::operator()(void* p) const {
  ::operator delete (p, std::align_val_t{64});
}

void* Scratch::bytes(size_t count) {
  if (count > size_) {
    data_.reset();
    data_.reset(::operator new (count, std::align_val_t{64}));
    size_ = count;
  }
  return data_.get();
}

ThreadScratch& thread_scratch() {
  static thread_local ThreadScratch scratch;
  return scratch;
}

bool has_bf16_multiply() {
  return active_isa() == Isa::avx512_bf16;
}

const GemmKernels& gemm_kernels(Compute compute) {
  const GemmKernels* kernels = nullptr;
  switch (active_isa()) {
    case Isa::avx512_bf16:
      kernels = compute == Compute::bf16 ? gemm_kernels_avx512_bf16() : gemm_kernels_avx512();
      break;
    case Isa::avx512:
      kernels = gemm_kernels_avx512();
      break;
    case Isa::avx2:
      kernels = gemm_kernels_avx2();
      break;
    case Isa::neon:
      kernels = gemm_kernels_neon();
      break;
    case Isa::scalar:
      break;
  }
  return kernels ? *kernels : *gemm_kernels_scalar();
}

uint32_t rows_at_a_time(uint32_t m, uint32_t panel_steps) {
  const size_t row_bytes = std::max<size_t>(1, panel_steps) * 4;
  const size_t rows = std::max<size_t>(kMinTaskRows, kMaxPackedBytes / row_bytes);
  return static_cast<uint32_t>(std::min<size_t>(m, rows));
}

void pack_row_panel(
    const GemmKernels& kernels,
    const MatrixView& a,
    bool transposed,
    uint32_t row0,
    uint32_t k,
    const PackedRows& packed,
    uint32_t step0,
    uint32_t panel) {
  const uint32_t height = packed.rows.height, rows = packed.rows.rows_of(panel);
  const uint32_t first = row0 + panel * height;
  const bool direct = a.dtype == (kernels.compute == Compute::bf16 ? DType::bf16 : DType::f32);
  const size_t size = bytes_per_element(kernels.compute);
  constexpr uint32_t kStrip = 256;
  alignas(64) std::array<char, 16 * kStrip * 4> strip;
  uint32_t* out = packed.at(panel, step0);
  if (direct) {
    if (transposed) {
      kernels.pack_straight(element_at(a, 0, first), a.stride, rows, height, k, out);
    } else {
      kernels.pack_transposed(element_at(a, first, 0), a.stride, rows, height, k, out);
    }
    return;
  }
  for (uint32_t k0 = 0; k0 < k; k0 += kStrip) {
    const uint32_t count = std::min(kStrip, k - k0);
    uint32_t* to = out + size_t{steps_of(kernels.compute, k0)} * height;
    if (transposed) {
      for (uint32_t p = 0; p < count; ++p) {
        kernels.load(a.dtype, element_at(a, k0 + p, first), rows, strip.data() + p * 16 * size);
      }
      kernels.pack_straight(strip.data(), 16, rows, height, count, to);
    } else {
      for (uint32_t i = 0; i < rows; ++i) {
        kernels.load(
            a.dtype, element_at(a, first + i, k0), count, strip.data() + i * kStrip * size);
      }
      kernels.pack_transposed(strip.data(), kStrip, rows, height, count, to);
    }
  }
}

void run_products(const GemmKernels& kernels, std::span<const Product> products) {
  const uint32_t per_task = panels_per_task(kernels, products);
  std::vector<Plan> plans;
  std::vector<size_t> first_task;
  size_t tasks = 0;
  for (const Product& product : products) {
    if (product.n == 0 || product.a.rows.m == 0) continue;
    const uint32_t columns = task_columns(product.n);
    plans.push_back(
        {&kernels,
         &product,
         blocks_of(kernels, product),
         columns,
         ceil_div(product.n, columns),
         ceil_div(product.a.rows.count, per_task),
         per_task});
    first_task.push_back(tasks);
    tasks += size_t{plans.back().column_tasks} * plans.back().row_tasks;
  }
  parallel_for(tasks, [&](size_t i) {
    const size_t which =
        std::upper_bound(first_task.begin(), first_task.end(), i) - first_task.begin() - 1;
    Task(plans[which], static_cast<uint32_t>(i - first_task[which])).run();
  });
}

}  // namespace metal_lora::cpu
