// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Blocked matrix products over packed panels (after Van Zee & van de Geijn, BLIS, TOMS 2015),
// internal to kernels/cpu. A product is a sum of segments that share one accumulator:
//   out[m, n] = finish(Σ_segments A_s[m, k_s] · B_s[k_s, n]),
// which is how an adapter rides on its base weight: K just grows by the rank.
//
// Order of sums: the segments' k is cut into blocks of at most kBlockSteps steps, by k alone; each
// block is one chain of multiply-adds, blocks are added in order. So an element of the result
// depends neither on m, nor on its neighbours, nor on the number of threads.
//
// Scratch: A panels belong to the caller's thread (at most about kMaxPackedBytes, whatever m);
// each thread keeps at most kBlockSteps·(64 + adapter columns) steps of B and a C block of
// 1024 × 64 f32: under 1 MiB. Both are kept for the next call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_kernels.h"

namespace metal_lora::cpu {

inline constexpr uint32_t kBlockSteps = 768;
inline constexpr size_t kMaxPackedBytes = size_t{32} << 20;
/// Columns of a task, at most: wide tasks read more of each row of W.
inline constexpr uint32_t kTaskColumns = 128;

constexpr uint32_t ceil_div(uint32_t a, uint32_t b) {
  return a / b + (a % b != 0);
}

constexpr size_t bytes_per_element(Compute compute) {
  return compute == Compute::bf16 ? 2 : 4;
}

inline const char* element_at(const MatrixView& m, size_t row, size_t column) {
  return static_cast<const char*>(m.data) +
         (row * m.stride + column) * (m.dtype == DType::f32 ? 4 : 2);
}

/// Grow-only, 64-byte aligned, not initialised.
class Scratch {
 public:
  void* bytes(size_t count);
  float* floats(size_t count) { return static_cast<float*>(bytes(count * sizeof(float))); }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

/// How m rows are cut into equal A panels.
struct RowPanels {
  uint32_t m = 0, height = 1, count = 0;
  RowPanels() = default;
  RowPanels(uint32_t rows, uint32_t max_rows)
      : m(rows),
        height(
            rows == 0 ? 1
                      : (rows + (rows + max_rows - 1) / max_rows - 1) /
                            ((rows + max_rows - 1) / max_rows)),
        count((rows + height - 1) / height) {}
  uint32_t rows_of(uint32_t panel) const {
    return m - panel * height < height ? m - panel * height : height;
  }
};

/// Packed A: panel p starts at data + p · panel_steps · height words of 4 bytes.
struct PackedRows {
  RowPanels rows;
  uint32_t panel_steps = 0;
  uint32_t* data = nullptr;
  uint32_t* at(uint32_t panel, uint32_t step) const {
    return data + (size_t{panel} * panel_steps + step) * rows.height;
  }
};

/// The B side of a segment: a dense matrix or a base weight.
/// along_k: stored rows run along k (stored [n, k]); otherwise stored [k, n].
struct Columns {
  MatrixView dense;
  const WeightView* weight = nullptr;  ///< if set, dense is unused
  uint32_t row0 = 0;                   ///< first stored row that counts
  bool along_k = true;
  const DropMask* drop = nullptr;  ///< dense [k = tokens, n] only: values are dropped as read
};

struct Segment {
  uint32_t k = 0;
  uint32_t a_step = 0;  ///< where its A starts in a packed panel
  Columns b;
  const DropMask* drop = nullptr;  ///< its product is masked element by element before it is added
};

/// What becomes of the sums.
struct Output {
  // Typed rows, contiguous [m, n] …
  void* y = nullptr;
  DType dtype = DType::f32;
  const float* bias = nullptr;
  const void* residual = nullptr;
  /// f32 [n] to add to each row before it is rounded, by row of the output; null entries: nothing.
  const float* const* added = nullptr;
  // … or f32: c[i · row_stride + j · column_stride] = alpha · sum + beta · c.
  float* c = nullptr;
  size_t row_stride = 0, column_stride = 1;
  float alpha = 1.0f, beta = 0.0f;
};

struct Product {
  uint32_t n = 0;
  PackedRows a;
  uint32_t row0 = 0;  ///< of the packed rows in the output (and in masks)
  std::vector<Segment> segments;
  Output out;
};

/// Runs all products as one job of the thread pool.
void run_products(const GemmKernels& kernels, std::span<const Product> products);

/// Packs op(A)'s rows [row0, row0 + a.rows.m) of the whole of k into steps [step0, …) of every
/// panel.
void pack_row_panel(
    const GemmKernels& kernels,
    const MatrixView& a,
    bool transposed,
    uint32_t row0,
    uint32_t k,
    const PackedRows& packed,
    uint32_t step0,
    uint32_t panel);

/// B panels [⌈n/16⌉][steps][16] of op(B), for k in [k0, k1) and columns [n0, n1). k0 % 64 == 0.
void pack_columns(
    const GemmKernels& kernels,
    const Columns& b,
    uint32_t k0,
    uint32_t k1,
    uint32_t n0,
    uint32_t n1,
    uint32_t* panels);

/// The compute type of a product whose left operand has this type.
inline Compute compute_for(DType dtype) {
  return dtype == DType::bf16 && has_bf16_multiply() ? Compute::bf16 : Compute::f32;
}

/// Rows of a call that are packed at a time so that the panels stay below kMaxPackedBytes.
uint32_t rows_at_a_time(uint32_t m, uint32_t panel_steps);

/// This thread's buffers, by purpose: a caller's panels outlive the products that read them.
struct ThreadScratch {
  Scratch panels;  ///< A panels of the call
  Scratch extra;   ///< adapter panels and f32 intermediates of the call
  Scratch more;
  Scratch b_panels, c_block, rows;  ///< of one task
};
ThreadScratch& thread_scratch();

}  // namespace metal_lora::cpu
