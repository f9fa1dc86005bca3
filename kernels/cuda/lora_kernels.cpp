// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A LoRA linear on CUDA, put together from its parts. The adapter never makes a pass of its own
// over y or dx: u (or v) of all branches comes from one read of x, and the product that makes the
// base goes on summing over it, rank more columns.
//   ladder (H100, bf16, rank 16, time over cuBLAS's base alone, graphs replayed in turns):
//     k = n = 4096              m 64    m 128   m 256   m 512   m 4096   both ways at 512, 4096
//     lora_shrink, product      1.9     1.47    1.40    1.30    1.08             1.25
//     ... begun beside it       1.27    1.33    1.33    1.32
//     u inside the product      1.40    1.45    1.34    1.10    1.01     1.43    1.12
//     lora_skinny               1.12    1.31
//     a kernel for each end                             1.04    1.00     1.26    1.09
//     u kept as it is read                                               1.19
//     gradients of few tokens                                            1.13 to 1.17
//     k 4096, n 11008           1.05    1.03    1.06    1.07    1.00     1.14    1.06
//   Rank 64: 1.20 at 64 tokens, 1.08 at 512, both ways there 1.12 to 1.16. Both ways at 512 tokens
//   are 26.5 and 27.4 µs of products (cuBLAS 25.1 each) and 4 of gradients; the next 10 % would
//   take the gradients into the end of dx's launch, which saves a start. A u of few tokens inside
//   the product is bound by the one multiprocessor that makes 128 rows of it, k/64 steps of 250 to
//   330 ns; up to 256 tokens those steps in parts, on the multiprocessors without a tile. Of rank 8
//   B's rows of 16 bytes come slowly: v's are copied in one piece (dx 32 -> 30 µs at 512 tokens),
//   those of u·Bᵀ cost 0.5 µs more than rank 16's.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_quant.h"
#include "kernels/cuda/lora_grad_sm90.h"
#include "kernels/cuda/lora_pack.h"
#include "kernels/cuda/lora_plan.h"
#include "kernels/cuda/lora_quantized.h"
#include "kernels/cuda/lora_skinny.h"

namespace metal_lora::cuda {
namespace {

constexpr size_t kMaxBranches = 4;
constexpr uint32_t kMaxRank = 1024;

size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

void check_call(uint32_t m, uint32_t k, DType dtype, const LoraBranch* branches, size_t count) {
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
    if (branches[i].low && (!keeps_low(m, dtype, rank) || !is_aligned(branches[i].low))) {
      throw std::invalid_argument(
          "[lora_linear] low must be null but is given for m " + std::to_string(m) + ", rank " +
          std::to_string(rank) + ": it takes bf16, at least 512 tokens and 16-byte alignment");
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
  float* plain = nullptr;   ///< backward: dy·B, [m, b_columns] f32
  const void* u = nullptr;  ///< backward: u_saved in bf16, [m, padded rank], or null
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
    PackCall packs;
    pack_adapters(packs, true);
    pack_matrices(context_, packs, dtype_);
    if (forward_from_codes()) return;
    copy_weights();
    if (forward(true)) return;
    shrink_x();
    forward(false);
  }

  void backward(void* dx) {
    PackCall packs;
    pack_adapters(packs, dx != nullptr);
    if (narrow()) pack_u(packs);
    pack_matrices(context_, packs, dtype_);
    if (dx) copy_weights();
    if (!dx || !input_gradient(dx, true)) {
      for (int i = 0; i < count_; ++i) shrink_dy(i, dx != nullptr);
      if (dx) input_gradient(dx, false);
    }
    adapter_gradients();
  }

 private:
  uint32_t rank(int i) const { return branches_[i].lora.params.rank; }
  void* take(size_t count, DType dtype) const {
    return context_.scratch->take(count * size_of(dtype));
  }

  /// The product of all branches. inside: it makes u itself; false where it cannot, or where a
  /// kernel before it costs less, and nothing was launched.
  bool forward(bool inside) {
    if (inside && !may_shrink_inside()) return false;
    GemmGroup group = new_group(false);
    GemmShrink shrink;
    shrink.left = x_;
    shrink.left_stride = shrink.k = k_;
    for (int i = 0; i < count_; ++i) {
      const LoraBranch& branch = branches_[i];
      Operands& o = operands_[i];
      GemmProblem& problem = group.problem[group.problems++];
      problem.n = branch.weight.params.n;
      problem.pair[problem.pairs++] = {x_, k_, o.w, k_, k_};
      if (rank(i) > 0) {
        if (inside) {
          place_u(i);
          shrink.part[shrink.parts++] = {
              o.a, k_, rank(i), branch.lora.params.scale, o.low, o.low_stride, branch.u};
        }
        problem.pair[problem.pairs++] = {o.low, o.low_stride, o.b, o.b_columns, rank(i)};
      }
      problem.out = branch.y;
      problem.out_stride = problem.n;
      problem.bias = branch.bias;
      problem.residual = branch.residual;
      problem.residual_stride = problem.n;
    }
    if (inside && shrink.parts > 0) group.shrink[group.shrinks++] = shrink;
    if (inside && prefers_lora_skinny(context_, group)) {
      lora_skinny(context_, group);
      return true;
    }
    if (inside && !takes_shrinks(group)) return false;
    group.pair0_ready = shrunk_;
    gemm(context_, group);
    return true;
  }

  /// u, then a product a branch that reads W's codes; false where a 16-bit copy costs less.
  bool forward_from_codes() {
    for (int i = 0; i < count_; ++i) {
      if (!reads_codes(context_, m_, dtype_, x_, branches_[i])) return false;
    }
    shrink_x();
    for (int i = 0; i < count_; ++i) {
      const LoraBranch& branch = branches_[i];
      const Operands& o = operands_[i];
      QuantizedProduct product;
      product.m = m_;
      product.dtype = dtype_;
      product.x = x_;
      product.w = branch.weight;
      product.rank = rank(i);
      product.u = o.low;
      product.u_stride = o.low_stride;
      product.b = o.b;
      product.b_stride = o.b_columns;
      product.bias = branch.bias;
      product.residual = branch.residual;
      product.y = branch.y;
      gemm_quantized(context_, product);
    }
    return true;
  }

  bool may_shrink_inside() const {
    bool may = context_.capability == 90 && dtype_ != DType::f32;
    for (int i = 0; i < count_; ++i) may = may && !drops(branches_[i].lora);
    return may;
  }
  bool takes_shrinks(const GemmGroup& group) const {
    return group.shrinks > 0 && gemm_hides_shrinks(context_, group);
  }
  /// u of one branch: where it is kept, or in scratch.
  void place_u(int i) {
    Operands& o = operands_[i];
    o.low = branches_[i].low;
    o.low_stride = low_stride(rank(i));
    if (!o.low) take_low(o, rank(i));
  }
  void take_low(Operands& o, uint32_t rank) const {
    o.low_stride = dtype_ == DType::f32 ? rank : low_stride(rank);
    o.low = take(m_ * o.low_stride, dtype_);
  }

  GemmGroup new_group(bool right_is_kn) const {
    GemmGroup group;
    group.m = m_;
    group.dtype = group.out_dtype = dtype_;
    group.right_is_kn = right_is_kn;
    group.right0_ready = context_.weights_ready;
    for (int i = 0; i < count_; ++i) {
      group.right0_ready = group.right0_ready && !needs_dense_copy(dtype_, branches_[i].weight);
    }
    if (gemm_flag_count(m_) <= METAL_LORA_CUDA_COUNTERS) group.flags = context_.counters;
    return group;
  }

  bool narrow() const { return dtype_ == DType::bf16 && m_ >= kNarrowTokens; }

  void pack_u(PackCall& call) {
    for (int i = 0; i < count_; ++i) {
      if (rank(i) == 0 || !branches_[i].db || branches_[i].low) continue;
      const uint32_t columns = padded_rank(dtype_, rank(i));
      operands_[i].u = pack(call, branches_[i].u_saved, DType::f32, m_, rank(i), columns);
    }
  }
  void pack_adapters(PackCall& call, bool wants_a) {
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
    const auto whole = [&](int i) {
      return rank(i) == padded_rank(dtype_, rank(i)) && !branches_[i].low;
    };
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
    if (end == first + 1 && dtype_ != DType::f32) stride = low_stride(rank(first));
    ShrinkCall call = new_shrink(false, x_, k_);
    call.out = branches_[first].low ? branches_[first].low : take(m_ * stride, dtype_);
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
    shrink(call);
  }

  /// v = scale·dy·B for the product, and dy·B in f32 for dA and for a masked share of dx.
  void shrink_dy(int i, bool wants_dx) {
    const LoraBranch& branch = branches_[i];
    Operands& o = operands_[i];
    if (rank(i) == 0) return;
    o.plain = nullptr;
    const bool masked = wants_dx && drops(branch.lora);
    const bool in_product = wants_dx && !masked;
    if (!in_product && !masked && !branch.da) return;
    ShrinkCall call = new_shrink(true, branch.dy, branch.weight.params.n);
    if (in_product) {
      take_low(o, o.b_columns);
      call.out = o.low;
      call.out_stride = o.low_stride;
    }
    if (masked || (branch.da && !(in_product && narrow()))) {
      o.plain = static_cast<float*>(take(size_t{m_} * o.b_columns, DType::f32));
    }
    ShrinkPart& part = call.part[call.parts++];
    part.right = o.b;
    part.rank = o.b_columns;
    part.factor = branch.lora.params.scale;
    part.plain = o.plain;
    shrink(call);
  }
  void shrink(const ShrinkCall& call) {
    lora_shrink(context_, call);
    shrunk_ = true;
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

  /// dx. inside: the product makes v itself; false where it does not, and nothing was launched.
  bool input_gradient(void* dx, bool inside) {
    if (inside && !may_shrink_inside()) return false;
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
      const LoraParams& lora = branches_[i].lora.params;
      if (inside) group.shrink[group.shrinks++] = inside_shrink(i);
      const Operands& o = operands_[i];
      if (!drops(branches_[i].lora)) {
        problem.pair[problem.pairs++] = {o.low, o.low_stride, o.a, k_, rank(i)};
        continue;
      }
      MaskedShare& share = masked.share[masked.shares++];
      share = {o.plain, o.b_columns, o.a, dtype_, rank(i), lora.scale, {}};
      share.mask = DropMask(lora.dropout, lora.dropout_seed);
    }
    if (inside && !takes_shrinks(group)) return false;
    group.pair0_ready = shrunk_;
    if (masked.shares == 0) {
      late_ = group.late_dependents =
          k_ > 0 && makes_few_gradients() && can_gemm_sm90(context_, group);
      gemm(context_, group);
      return true;
    }
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
    return true;
  }

  /// Whether lora_grad_sm90, which reads ahead behind a late product, may come next.
  bool makes_few_gradients() const {
    if (!narrow() || m_ > kFewGradTokens) return false;
    return std::any_of(branches_, branches_ + count_, [](const LoraBranch& b) {
      return b.lora.params.rank > 0 && (b.da || b.db);
    });
  }

  GemmShrink inside_shrink(int i) {
    const LoraBranch& branch = branches_[i];
    Operands& o = operands_[i];
    take_low(o, o.b_columns);
    o.plain = nullptr;
    if (branch.da && !narrow()) {
      o.plain = static_cast<float*>(take(size_t{m_} * o.b_columns, DType::f32));
    }
    GemmShrink shrink;
    shrink.left = branch.dy;
    shrink.left_stride = shrink.k = branch.weight.params.n;
    shrink.parts = 1;
    shrink.part[0] = {
        o.b, o.b_columns, o.b_columns, branch.lora.params.scale, o.low, o.low_stride, o.plain};
    return shrink;
  }

  /// dA = scale·(dy·B)ᵀ·drop(x), dB = scale·dyᵀ·u: plain u and v lack the scale, those of the
  /// products have it.
  void adapter_gradients() {
    AdapterGrad grads[2 * kMaxBranches];
    size_t used = 0;
    for (int i = 0; i < count_; ++i) {
      if (rank(i) == 0) continue;
      if (branches_[i].da) grads[used++] = gradient_of_a(i);
      if (branches_[i].db) grads[used++] = gradient_of_b(i);
    }
    if (used > 0) lora_grad(context_, m_, dtype_, grads, used, late_);
  }
  AdapterGrad gradient_of_a(int i) const {
    const LoraParams& lora = branches_[i].lora.params;
    const Operands& o = operands_[i];
    AdapterGrad grad;
    grad.rank = rank(i);
    grad.factor = o.plain ? lora.scale : 1.0f;
    grad.small = o.plain ? o.plain : o.low;
    grad.small_dtype = o.plain ? DType::f32 : dtype_;
    grad.small_stride = o.plain ? o.b_columns : o.low_stride;
    grad.large = x_;
    grad.large_stride = grad.columns = k_;
    grad.dropout = lora.dropout;
    grad.dropout_seed = lora.dropout_seed;
    grad.grad = branches_[i].da;
    grad.small_is_new = true;
    return grad;
  }
  AdapterGrad gradient_of_b(int i) const {
    const LoraBranch& branch = branches_[i];
    const Operands& o = operands_[i];
    AdapterGrad grad;
    grad.rank = rank(i);
    if (branch.low) {
      grad.small = branch.low;
      grad.small_dtype = dtype_;
      grad.small_stride = low_stride(rank(i));
    } else {
      grad.factor = branch.lora.params.scale;
      grad.small = o.u ? o.u : branch.u_saved;
      grad.small_dtype = o.u ? dtype_ : DType::f32;
      grad.small_stride = o.u ? padded_rank(dtype_, rank(i)) : rank(i);
    }
    grad.large = branch.dy;
    grad.large_stride = grad.columns = branch.weight.params.n;
    grad.grad = branch.db;
    grad.transposed = true;
    return grad;
  }

  const Context& context_;
  const uint32_t m_, k_;
  const DType dtype_;
  const void* const x_;
  const LoraBranch* const branches_;
  const int count_;
  Operands operands_[kMaxBranches];
  /// The kernel launched last is a shrink: x, dy and W were written before it.
  bool shrunk_ = false;
  /// dx's product, launched last, lets its dependents start when the kernels ahead of it are over.
  bool late_ = false;
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
  check_call(m, k, dtype, branches, count);
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
  check_call(m, k, dtype, branches, count);
  Linear(context, m, k, dtype, x, branches, count).backward(dx);
}

}  // namespace metal_lora::cuda
