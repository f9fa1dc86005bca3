// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A LoRA linear on CUDA, put together from its parts. The adapter never makes a pass of its own
// over y or dx: u (or v) of all branches comes from one read of x, and the product that makes the
// base goes on summing over it, rank more columns.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/lora_pack.h"
#include "kernels/cuda/lora_plan.h"
#include "kernels/cuda/lora_quantized.h"

namespace metal_lora::cuda {
namespace {

constexpr size_t kMaxBranches = 4;
constexpr uint32_t kMaxRank = 1024;

size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

void check_call(uint32_t k, const LoraBranch* branches, size_t count) {
  if (count > kMaxBranches) {
    throw std::invalid_argument(
        "[lora_linear] branches must be at most 4 but are " + std::to_string(count));
  }
  for (size_t i = 0; i < count; ++i) {
    const WeightParams& w = branches[i].weight.params;
    const uint32_t rank = branches[i].lora.params.rank;
    if (w.k != k) {
      throw std::invalid_argument(
          "[lora_linear] W must be (" + std::to_string(w.n) + ", " + std::to_string(k) +
          ") but is (" + std::to_string(w.n) + ", " + std::to_string(w.k) + ")");
    }
    if (rank > kMaxRank) {
      throw std::invalid_argument(
          "[lora_linear] rank must be at most 1024 but is " + std::to_string(rank));
    }
  }
}

/// What the products of one branch read, in x's type.
struct Operands {
  const void* w = nullptr;
  const void* a = nullptr;  ///< [rank, k]
  const void* b = nullptr;  ///< [n, b_columns]
  uint32_t b_columns = 0;
  void* low = nullptr;  ///< u or v, scale included: [m, low_stride]
  size_t low_stride = 0;
  float* plain = nullptr;  ///< backward: dy·B, [m, b_columns] f32
};

/// One call's operands and what makes them.
class Linear {
 public:
  Linear(
      const Context& context,
      uint32_t m,
      uint32_t k,
      DType dtype,
      const void* x,
      const LoraBranch* branches,
      size_t count)
      : context_(context),
        m_(m),
        k_(k),
        dtype_(dtype),
        x_(x),
        branches_(branches),
        count_(static_cast<int>(count)) {}

  void forward() {
    pack_adapters(true);
    copy_weights();
    shrink_x();
    GemmGroup group = new_group(false);
    for (int i = 0; i < count_; ++i) {
      const LoraBranch& branch = branches_[i];
      const Operands& o = operands_[i];
      GemmProblem& problem = group.problem[group.problems++];
      problem.n = branch.weight.params.n;
      problem.pair[problem.pairs++] = {x_, k_, o.w, k_, k_};
      if (rank(i) > 0) {
        problem.pair[problem.pairs++] = {o.low, o.low_stride, o.b, o.b_columns, rank(i)};
      }
      problem.out = branch.y;
      problem.out_stride = problem.n;
      problem.bias = branch.bias;
      problem.residual = branch.residual;
      problem.residual_stride = problem.n;
    }
    gemm(context_, group);
  }

  void backward(void* dx) {
    pack_adapters(dx != nullptr);
    if (dx) copy_weights();
    for (int i = 0; i < count_; ++i) shrink_dy(i, dx != nullptr);
    if (dx) input_gradient(dx);
    adapter_gradients();
  }

 private:
  uint32_t rank(int i) const { return branches_[i].lora.params.rank; }
  void* take(size_t count, DType dtype) const {
    return context_.scratch->take(count * size_of(dtype));
  }

  GemmGroup new_group(bool right_is_kn) const {
    GemmGroup group;
    group.m = m_;
    group.dtype = group.out_dtype = dtype_;
    group.right_is_kn = right_is_kn;
    return group;
  }

  void pack_adapters(bool wants_a) {
    PackCall call;
    for (int i = 0; i < count_; ++i) {
      if (rank(i) == 0) continue;
      const LoraView& lora = branches_[i].lora;
      const uint32_t n = branches_[i].weight.params.n, columns = padded_rank(dtype_, rank(i));
      Operands& o = operands_[i];
      o.a = lora.a;
      o.b = lora.b;
      o.b_columns = rank(i);
      if (wants_a && needs_packed_a(dtype_, lora, k_)) {
        o.a = pack(call, lora.a, lora.params.dtype, rank(i), k_, k_);
      }
      if (needs_packed_b(dtype_, lora)) {
        o.b = pack(call, lora.b, lora.params.dtype, n, rank(i), columns);
        o.b_columns = columns;
      }
    }
    pack_matrices(context_, call, dtype_);
  }
  const void* pack(
      PackCall& call,
      const void* from,
      DType from_dtype,
      uint32_t rows,
      uint32_t columns,
      uint32_t to_columns) const {
    void* to = take(size_t{rows} * to_columns, dtype_);
    call.job[call.jobs++] = {from, from_dtype, rows, columns, to, to_columns};
    return to;
  }

  void copy_weights() {
    for (int i = 0; i < count_; ++i) {
      const WeightView& w = branches_[i].weight;
      operands_[i].w = w.data;
      if (!needs_dense_copy(dtype_, w) || w.params.n == 0 || k_ == 0) continue;
      void* dense = take(size_t{w.params.n} * k_, dtype_);
      dequantize(context_, w, dtype_, dense);
      operands_[i].w = dense;
    }
  }

  /// The low-rank inputs of all branches side by side, x being read once. Ranks that are no
  /// multiple of 8 would put the next branch's columns at odd places: then one after the other.
  void shrink_x() {
    const auto whole = [&](int i) { return rank(i) == padded_rank(dtype_, rank(i)); };
    bool together = true;
    for (int i = 0; i < count_; ++i) together = together && whole(i);
    int first = 0;
    while (first < count_) {
      const int end = together ? count_ : first + 1;
      shrink_x(first, end);
      first = end;
    }
  }
  void shrink_x(int first, int end) {
    size_t stride = 0;
    for (int i = first; i < end; ++i) stride += padded_rank(dtype_, rank(i));
    if (stride == 0) return;
    ShrinkCall call = new_shrink(false, x_, k_);
    call.out = take(m_ * stride, dtype_);
    call.out_stride = stride;
    size_t column = 0;
    for (int i = first; i < end; ++i) {
      if (rank(i) == 0) continue;
      const LoraParams& lora = branches_[i].lora.params;
      ShrinkPart& part = call.part[call.parts++];
      part.right = operands_[i].a;
      part.rank = rank(i);
      part.factor = lora.scale;
      part.dropout = lora.dropout;
      part.dropout_seed = lora.dropout_seed;
      part.plain = branches_[i].u;
      operands_[i].low = static_cast<char*>(call.out) + column * size_of(dtype_);
      operands_[i].low_stride = stride;
      column += rank(i);
    }
    lora_shrink(context_, call);
  }

  /// v = scale·dy·B for the product, and dy·B in f32 for dA and for a masked share of dx.
  void shrink_dy(int i, bool wants_dx) {
    const LoraBranch& branch = branches_[i];
    Operands& o = operands_[i];
    if (rank(i) == 0) return;
    const bool masked = wants_dx && drops(branch.lora);
    const bool in_product = wants_dx && !masked;
    if (!in_product && !masked && !branch.da) return;
    ShrinkCall call = new_shrink(true, branch.dy, branch.weight.params.n);
    if (in_product) {
      call.out = o.low = take(size_t{m_} * o.b_columns, dtype_);
      call.out_stride = o.low_stride = o.b_columns;
    }
    if (masked || branch.da) {
      o.plain = static_cast<float*>(take(size_t{m_} * o.b_columns, DType::f32));
    }
    ShrinkPart& part = call.part[call.parts++];
    part.right = o.b;
    part.rank = o.b_columns;
    part.factor = branch.lora.params.scale;
    part.plain = o.plain;
    lora_shrink(context_, call);
  }

  ShrinkCall new_shrink(bool right_is_kn, const void* x, uint32_t k) const {
    ShrinkCall call;
    call.m = m_;
    call.k = k;
    call.dtype = call.right_dtype = call.out_dtype = dtype_;
    call.right_is_kn = right_is_kn;
    call.x = x;
    call.x_stride = k;
    return call;
  }

  void input_gradient(void* dx) {
    GemmGroup group = new_group(true);
    group.problems = 1;
    GemmProblem& problem = group.problem[0];
    problem.n = k_;
    problem.out = dx;
    problem.out_stride = k_;
    MaskedCall masked;
    for (int i = 0; i < count_; ++i) {
      const uint32_t n = branches_[i].weight.params.n;
      problem.pair[problem.pairs++] = {branches_[i].dy, n, operands_[i].w, k_, n};
    }
    for (int i = 0; i < count_; ++i) {
      if (rank(i) == 0) continue;
      const Operands& o = operands_[i];
      const LoraParams& lora = branches_[i].lora.params;
      if (!drops(branches_[i].lora)) {
        problem.pair[problem.pairs++] = {o.low, o.low_stride, o.a, k_, rank(i)};
        continue;
      }
      MaskedShare& share = masked.share[masked.shares++];
      share = {o.plain, o.b_columns, o.a, dtype_, rank(i), lora.scale, {}};
      share.mask = DropMask(lora.dropout, lora.dropout_seed);
    }
    if (masked.shares == 0) return gemm(context_, group);
    // A mask acts on the adapter's share alone: it is added to the sum before the one rounding.
    masked.m = m_;
    masked.columns = k_;
    masked.dtype = dtype_;
    masked.dx = dx;
    if (dtype_ != DType::f32) problem.out = take(size_t{m_} * k_, DType::f32);
    group.out_dtype = DType::f32;
    masked.base = static_cast<const float*>(problem.out);
    gemm(context_, group);
    add_masked(context_, masked);
  }

  /// dA = scale·(dy·B)ᵀ·drop(x), dB = scale·dyᵀ·u: v and u are plain f32, so the scale enters once.
  void adapter_gradients() {
    AdapterGrad grads[2 * kMaxBranches];
    size_t used = 0;
    for (int i = 0; i < count_; ++i) {
      const LoraBranch& branch = branches_[i];
      if (rank(i) == 0) continue;
      AdapterGrad grad;
      grad.rank = rank(i);
      grad.factor = branch.lora.params.scale;
      if (branch.da) {
        grad.small = operands_[i].plain;
        grad.small_stride = operands_[i].b_columns;
        grad.large = x_;
        grad.large_stride = grad.columns = k_;
        grad.dropout = branch.lora.params.dropout;
        grad.dropout_seed = branch.lora.params.dropout_seed;
        grad.grad = branch.da;
        grads[used++] = grad;
      }
      if (branch.db) {
        grad.small = branch.u_saved;
        grad.small_stride = rank(i);
        grad.large = branch.dy;
        grad.large_stride = grad.columns = branch.weight.params.n;
        grad.dropout = 0.0f;
        grad.grad = branch.db;
        grad.transposed = true;
        grads[used++] = grad;
      }
    }
    if (used > 0) lora_grad(context_, m_, dtype_, grads, used);
  }

  const Context& context_;
  const uint32_t m_, k_;
  const DType dtype_;
  const void* const x_;
  const LoraBranch* const branches_;
  const int count_;
  Operands operands_[kMaxBranches];
};

}  // namespace

void lora_linear_forward(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count) {
  check_call(k, branches, count);
  if (m == 0 || count == 0) return;
  if (m <= kVectorMaxTokens) {
    return lora_gemv(context, m, k, dtype, x, branches, count, dtype);
  }
  Linear(context, m, k, dtype, x, branches, count).forward();
}

void lora_linear_backward(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    void* dx) {
  check_call(k, branches, count);
  Linear(context, m, k, dtype, x, branches, count).backward(dx);
}

}  // namespace metal_lora::cuda
