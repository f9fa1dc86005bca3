// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The product from 4-bit codes (kernel: gemm_quant_sm90.cuh). yᵀ = W·xᵀ, so that W is the operand
// that the matrix unit takes from registers: a code goes from shared memory through registers into
// it, and W crosses memory once, as it is stored, for every 32 to 256 tokens.
//
// NOT RUN ON A CARD YET: compiled for sm_90a without a serialised wgmma and read through, no more;
// no figure below is measured, and lora_linear_forward does not take it. tests/cuda/gemm_quant_test
// and quant_bench are there for the first run, which also has to set estimate_ns's constants.
//   expected of k = n = 4096, 64 tokens, one H100: W's codes and scales 9 MB, 3 us; x from L2 17 MB
//   (four parts of k) 3 us beside that; decoding 5 instructions a weight, 80 a warp and half step,
//   3 us of issue slots; the matrix unit 2.3 us. The 16-bit copy alone takes 16 us.
#include "kernels/cuda/gemm_quant.h"

#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/gemm_quant_args.h"
#include "kernels/cuda/tensor_map.h"

namespace metal_lora::cuda {
namespace quant {
namespace {

constexpr uint32_t kTokens[] = {32, 64, 128, 256};
constexpr uint32_t kMaxSplits = 8;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
}
bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

uint32_t tiles_of(const QuantizedProduct& p, const Form& form) {
  return ceil_div(p.m, form.tokens) * ceil_div(p.w.params.n, kRows * form.sharers);
}

/// Of lora_shrink, which has to run ahead where u is neither given nor made inside (measured).
constexpr float kShrinkNs = 4600.0f;

/// Guesses until the forms have been timed.
float estimate_ns(const Context& context, const QuantizedProduct& p, const Form& form) {
  const uint32_t blocks = form.splits * form.sharers;
  const uint32_t slots =
      context.multiprocessors * blocks_of(form.tokens, inside_columns(form, p.rank)) / blocks;
  const float chunks = static_cast<float>(ceil_div(ceil_div(p.w.params.k, kChunk), form.splits));
  const float waves = static_cast<float>(ceil_div(tiles_of(p, form), slots));
  const float chunk_ns = 300.0f + 8.0f * static_cast<float>(form.tokens);
  const bool ahead = !form.inside && p.rank > 0 && p.u == nullptr;
  const bool exchanges = form.inside || form.splits > 1;
  return waves * (chunks * chunk_ns + 2500.0f + (exchanges ? 1000.0f : 0.0f)) +
         (ahead ? kShrinkNs : 0.0f);
}

TensorMapRequest map_of(
    const void* data, DType dtype, uint32_t rows, uint32_t columns, size_t stride, uint32_t box) {
  TensorMapRequest request;
  request.data = data;
  request.dtype = dtype;
  request.rows = rows;
  request.columns = columns;
  request.stride = stride;
  request.box_rows = box;
  return request;
}

Args make_args(const QuantizedProduct& p, const Form& form) {
  const WeightParams& w = p.w.params;
  Args args;
  args.m = p.m;
  args.n = w.n;
  args.chunks = ceil_div(w.k, kChunk);
  args.tiles_m = ceil_div(p.m, form.tokens);
  args.tiles_n = ceil_div(w.n, kRows * form.sharers);
  args.band = std::min(args.tiles_m, 8u);
  args.splits = form.splits;
  args.sharers = form.sharers;
  args.rank = p.rank;
  args.groups = w.k / w.group_size;
  args.group_log2 = w.group_size / 128;  // 64: 0, 128: 1
  args.scales_dtype = w.scales_dtype;
  args.double_quant = w.double_quant;
  args.scales = p.w.scales;
  args.biases = p.w.biases;
  args.bias = p.bias;
  args.residual = p.residual;
  const uint32_t box = form.tokens / form.sharers;
  // Codes as rows of 16-bit elements: the copy engine only moves them.
  args.codes = make_tensor_map(map_of(p.w.data, p.dtype, w.n, w.k / 4, w.k / 4, kRows));
  args.x = make_tensor_map(map_of(p.x, p.dtype, p.m, w.k, w.k, box));
  const uint32_t out_box = form.splits == 1 && !form.inside ? form.tokens : 8;
  args.out = make_tensor_map(map_of(p.y, p.dtype, p.m, w.n, w.n, out_box));
  if (p.rank > 0) {
    if (form.inside) {
      args.factor = p.factor;
      args.a =
          make_tensor_map(map_of(p.a, p.dtype, p.rank, w.k, w.k, inside_columns(form, p.rank)));
    } else {
      args.u = make_tensor_map(map_of(p.u, p.dtype, p.m, p.rank, p.u_stride, box));
    }
    args.b = make_tensor_map(map_of(p.b, p.dtype, w.n, p.rank, p.b_stride, kRows));
  }
  return args;
}

}  // namespace

bool form_fits(const QuantizedProduct& p, const Form& form) {
  if (form.inside && (form.tokens > 128 || form.sharers > 1 || p.rank == 0 || p.rank > 64 ||
                      p.a == nullptr || p.u != nullptr)) {
    return false;
  }
  return form.splits == 1 ||
         (form.sharers == 1 && form.splits <= std::min(kMaxSplits, ceil_div(p.w.params.k, kChunk)));
}

Form chosen_form(const Context& context, const QuantizedProduct& p) {
  Form best;
  float best_ns = 0.0f;
  for (uint32_t tokens : kTokens) {
    for (uint32_t sharers = 1; sharers <= 2; ++sharers) {
      for (uint32_t splits = 1; splits <= kMaxSplits; ++splits) {
        for (bool inside : {false, true}) {
          const Form form{tokens, splits, sharers, inside};
          if (!form_fits(p, form)) continue;
          const float ns = estimate_ns(context, p, form);
          if (best.tokens == 0 || ns < best_ns) best = form, best_ns = ns;
        }
      }
    }
  }
  return best;
}

void gemm_with_form(const Context& context, const QuantizedProduct& p, const Form& form) {
  if (p.m == 0 || p.w.params.n == 0) return;
  Args args = make_args(p, form);
  args.weights_ready = context.weights_ready;
  const auto launch = p.w.params.format == WeightFormat::int4 ? launch_int4 : launch_nf4;
  launch(context, args, p.dtype, form);
}

}  // namespace quant

bool can_gemm_quantized(const Context& context, const QuantizedProduct& p) {
  const WeightParams& w = p.w.params;
  const bool int4 = w.format == WeightFormat::int4 && (w.group_size == 64 || w.group_size == 128);
  const bool nf4 = w.format == WeightFormat::nf4 && w.group_size == 64;
  return context.capability == 90 && p.dtype != DType::f32 && (int4 || nf4) &&
         w.layout == WeightLayout::row_major && w.k > 0 && w.k % w.group_size == 0 &&
         w.n % 8 == 0 && quant::aligned(p.w.data) && quant::aligned(p.x) && quant::aligned(p.y) &&
         (p.rank == 0 || (quant::aligned(p.u) && quant::aligned(p.a) && quant::aligned(p.b) &&
                          p.u_stride % 8 == 0 && p.b_stride % 8 == 0));
}

bool makes_low_inside(const Context& context, const QuantizedProduct& p) {
  return quant::chosen_form(context, p).inside;
}

bool prefers_gemm_quantized(const Context& context, const QuantizedProduct& p) {
  return can_gemm_quantized(context, p) && p.m <= 1024;
}

void gemm_quantized(const Context& context, const QuantizedProduct& p) {
  if (!can_gemm_quantized(context, p)) {
    throw std::invalid_argument(
        "[gemm_quantized] w must be int4 in groups of 64 or 128 or nf4, on compute capability 9.0, "
        "with n a multiple of 8 and pointers aligned to 16 bytes, but is not");
  }
  const quant::Form form = quant::chosen_form(context, p);
  if (p.rank > 0 && p.u == nullptr && !form.inside) {
    throw std::invalid_argument("[gemm_quantized] u must be given where it is not made inside");
  }
  quant::gemm_with_form(context, p, form);
}

}  // namespace metal_lora::cuda
