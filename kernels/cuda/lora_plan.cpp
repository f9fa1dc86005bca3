// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Which form a linear takes.
//
// vector: m ≤ kVectorMaxTokens. Bound by reading W, which lora_gemv reads once, as it is stored.
//
// skinny: up to kSkinnyMaxTokens, where tiles of the product would be too few for all
// multiprocessors to read W (Hopper). lora_skinny splits k and makes u beside the product.
//
// tiled: 16-bit operands in rows of 16 bytes. lora_shrink, then one tensor-core product over {x, W}
// and {u, B}, which on Hopper makes u itself where it has tiles enough to hide that. W of another
// format is copied out first: 2·n·k bytes written and read against 2·m·n·k operations, little at
// the m of prompts and training.
//
// INT4 up to 512 and NF4 up to 256 tokens: the product decodes W's codes on the way to the matrix
// unit (gemm_quant.h), behind lora_shrink.
//
// generic: the same composition for f32 (FFMA), and for rows that are no multiples of 16 bytes.
#include "kernels/cuda/lora_plan.h"

#include "kernels/cuda/gemm_quant.h"
#include "kernels/cuda/gemm_stage.h"
#include "kernels/cuda/lora_gemv.h"
#include "kernels/cuda/lora_skinny.h"

namespace metal_lora::cuda {
namespace {

/// Rows that one copy instruction takes 16 bytes of.
bool has_vector_rows(DType dtype, const LoraBranch& b) {
  const WeightParams& w = b.weight.params;
  return dtype != DType::f32 && w.k % 8 == 0 && w.n % 8 == 0 && is_aligned(b.y) &&
         is_aligned(b.residual) && is_aligned(b.bias) &&
         (needs_dense_copy(dtype, b.weight) || is_aligned(b.weight.data));
}

/// lora_gemv reads W in 32 columns at a time; what it cannot takes it two dispatches.
bool streams(DType dtype, const WeightView& w) {
  const WeightParams& p = w.params;
  if (dtype == DType::f32 || p.k == 0 || p.k % 32 != 0 || !is_aligned(w.data)) return false;
  if (p.format <= WeightFormat::bf16) return p.format == static_cast<WeightFormat>(dtype);
  if (p.format == WeightFormat::nf4) return !p.double_quant || p.k % 256 == 0;
  return p.scales_dtype == DType::f32 || p.k % (2 * p.group_size) == 0;
}

/// The product that lora_kernels.cpp makes of one branch; what it copies first is aligned.
GemmGroup product_of(uint32_t m, DType dtype, const LoraBranch& branch) {
  const void* aligned = reinterpret_cast<const void*>(256);
  const uint32_t k = branch.weight.params.k, rank = branch.lora.params.rank;
  const size_t columns = padded_rank(dtype, rank);  // what is planned does not depend on u's stride
  GemmGroup group;
  group.m = m;
  group.dtype = group.out_dtype = dtype;
  group.problems = 1;
  GemmProblem& problem = group.problem[0];
  problem.n = branch.weight.params.n;
  const bool copied = needs_dense_copy(dtype, branch.weight);
  problem.pair[problem.pairs++] = {aligned, k, copied ? aligned : branch.weight.data, k, k};
  if (rank > 0) {
    const void* b = needs_packed_b(dtype, branch.lora) ? aligned : branch.lora.b;
    problem.pair[problem.pairs++] = {aligned, columns, b, columns, rank};
    if (!drops(branch.lora) && dtype != DType::f32) {
      const void* a = needs_packed_a(dtype, branch.lora, k) ? aligned : branch.lora.a;
      GemmShrink& shrink = group.shrink[group.shrinks++];
      shrink.left = aligned;
      shrink.left_stride = shrink.k = k;
      shrink.parts = 1;
      shrink.part[0] = {a, k, rank, 1.0f, const_cast<void*>(aligned), columns, branch.u};
    }
  }
  problem.out = branch.y;
  problem.out_stride = problem.residual_stride = problem.n;
  problem.bias = branch.bias;
  problem.residual = branch.residual;
  return group;
}

const char* reason(const Context& context, DType dtype, const LinearPlan& plan) {
  using Form = LinearPlan::Form;
  if (plan.form == Form::vector) {
    return "few tokens: bound by reading W, which is read once and in its stored format";
  }
  if (plan.form == Form::skinny) {
    return "some dozen tokens: bound by reading W, which clusters that split k stream at once";
  }
  if (plan.reads_codes) {
    return "W's bytes weigh: its codes become weights on the way to the matrix unit";
  }
  if (plan.form == Form::generic) {
    return dtype == DType::f32
               ? "f32: full-precision products on the FFMA units"
               : "rows are no multiples of 16 bytes: copied first where the product is large";
  }
  if (plan.dequantize_first) {
    return "more tokens: W is copied out to 16 bits once, then one product";
  }
  return context.capability == 90 ? "16-bit and aligned: Hopper's matrix unit and copy engine"
                                  : "16-bit and aligned: mma.sync behind a ring of cp.async";
}

}  // namespace

bool needs_dense_copy(DType dtype, const WeightView& w) {
  return w.params.format != static_cast<WeightFormat>(dtype);
}

bool drops(const LoraView& lora) {
  return lora.params.rank > 0 && lora.params.dropout > 0.0f;
}

bool needs_packed_b(DType dtype, const LoraView& lora) {
  if (lora.params.rank == 0) return false;
  if (lora.params.dtype != dtype) return true;
  return dtype != DType::f32 && (lora.params.rank % 8 != 0 || !is_aligned(lora.b));
}

bool needs_packed_a(DType dtype, const LoraView& lora, uint32_t k) {
  if (lora.params.rank == 0) return false;
  if (lora.params.dtype != dtype) return true;
  return dtype != DType::f32 && k % 8 == 0 && !is_aligned(lora.a);
}

bool reads_codes(
    const Context& context, uint32_t m, DType dtype, const void* x, const LoraBranch& branch) {
  QuantizedProduct product;  // u and B as they will be: packed to 16 bytes where they are not
  product.m = m;
  product.dtype = dtype;
  product.x = x;
  product.w = branch.weight;
  product.rank = branch.lora.params.rank;
  product.y = branch.y;
  return prefers_gemm_quantized(context, product);
}

LinearPlan plan_linear(const Context& context, uint32_t m, DType dtype, const LoraBranch& branch) {
  LinearPlan plan;
  const bool adapted = branch.lora.params.rank > 0;
  if (m <= kVectorMaxTokens) {
    plan.form = LinearPlan::Form::vector;
    plan.fused_shrink =
        adapted && streams(dtype, branch.weight) && gemv::fuses_shrink(m, dtype, branch);
    plan.dispatches = adapted && !plan.fused_shrink ? 2 : 1;
  } else {
    plan.form =
        has_vector_rows(dtype, branch) ? LinearPlan::Form::tiled : LinearPlan::Form::generic;
    plan.reads_codes = reads_codes(context, m, dtype, nullptr, branch);
    plan.dequantize_first = !plan.reads_codes && needs_dense_copy(dtype, branch.weight);
    const bool packs = needs_packed_b(dtype, branch.lora) ||
                       needs_packed_a(dtype, branch.lora, branch.weight.params.k);
    GemmGroup product = product_of(m, dtype, branch);
    const int copies = (packs ? 1 : 0) + (plan.dequantize_first ? 1 : 0);
    if (!plan.reads_codes && prefers_lora_skinny(context, product)) {
      plan.form = LinearPlan::Form::skinny;
      plan.fused_shrink = adapted;
      plan.dispatches = 1 + copies;
      plan.why = reason(context, dtype, plan);
      return plan;
    }
    plan.fused_shrink =
        !plan.reads_codes && product.shrinks > 0 && gemm_hides_shrinks(context, product);
    product.shrinks = 0;
    plan.dispatches = (plan.reads_codes ? 1 : gemm_dispatches(context, product)) +
                      (adapted && !plan.fused_shrink ? 1 : 0) + copies;
  }
  plan.why = reason(context, dtype, plan);
  return plan;
}

}  // namespace metal_lora::cuda
