// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The product from 4-bit codes (kernel: gemm_quant_sm90.cuh). yᵀ = W·xᵀ, so that W is the operand
// that the matrix unit takes from registers: a code goes from shared memory through registers into
// it, and W crosses memory once, as it is stored, for every 32 to 256 tokens.
//
//   ladder (H100, k = n = 4096, int4, rank 16 by a kernel ahead, 32 / 64 / 128 / 256 / 512 tokens;
//   cuBLAS's bf16 base 14.4 / 14.7 / 14.8 / 17.9 / 24.1 us, a 16-bit copy and the product over it
//   26.4 / 27.1 / 31.3 / 38.0 / 41.1):
//     scales read by who decodes, a chunk ahead: each load was
//     waited for in a branch of its own                        19.2 / 22.1 / 27.9 / 35.0 / 44.6 us
//     three warps put them into shared memory in f32; k in
//     three rather than six; one rotation instead of byte
//     gathers and a shift; L2 asked for the first scales       16.6 / 19.6 / 23.1 / 28.7 / 38.7
//     (rank 64 17.5 / 20.9 / - / - / 39.7; 1024 tokens 63.9, where the copy takes 61.1)
//   n = 11008: 31.4 / 37.3 / 41.9 / 62.6 / 105 (cuBLAS 36.3 / 34.8 / 36.7 / 39.6 / 62.6, the copy
//   77.5 / 77.8 / 79.2 / 85.4 / 112). nf4 takes 10 to 20 % more than int4, so that its copy is
//   faster at 512 tokens (40.2 against 42.4). 9 MB of codes take 3 us:
//   some 8 us are the kernel ahead, the start, the first stage and the sums across the cluster; the
//   rest is decoding, a half step at a time with little beside it to hide its latency. The next 10
//   % is u in the same launch (tried in every block: 21.4 / 27.9 / 25.2, deleted, as was x sent to
//   two blocks at once: nothing) and four warpgroups that share k.
#include "kernels/cuda/gemm_quant.h"

#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/gemm_quant_args.h"
#include "kernels/cuda/tensor_map.h"

namespace metal_lora::cuda {
namespace quant {
namespace {

constexpr uint32_t kMaxSplits = 8;

uint32_t ceil_div(uint32_t a, uint32_t b) {
  return (a + b - 1) / b;
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
  args.tiles_n = ceil_div(w.n, kRows);
  args.band = std::min(args.tiles_m, 8u);
  args.splits = form.splits;
  args.rank = p.rank;
  args.groups = w.k / w.group_size;
  args.group_log2 = w.group_size / 128;  // 64: 0, 128: 1
  args.scales_dtype = w.scales_dtype;
  args.double_quant = w.double_quant;
  args.scales = p.w.scales;
  args.biases = p.w.biases;
  args.bias = p.bias;
  args.residual = p.residual;
  // Codes as rows of 16-bit elements: the copy engine only moves them.
  args.codes = make_tensor_map(map_of(p.w.data, p.dtype, w.n, w.k / 4, w.k / 4, kRows));
  args.x = make_tensor_map(map_of(p.x, p.dtype, p.m, w.k, w.k, form.tokens));
  const uint32_t out_box = form.splits == 1 ? form.tokens : 8;
  args.out = make_tensor_map(map_of(p.y, p.dtype, p.m, w.n, w.n, out_box));
  if (p.rank > 0) {
    args.u = make_tensor_map(map_of(p.u, p.dtype, p.m, p.rank, p.u_stride, form.tokens));
    args.b = make_tensor_map(map_of(p.b, p.dtype, w.n, p.rank, p.b_stride, kRows));
  }
  return args;
}

}  // namespace

bool form_fits(const QuantizedProduct& p, const Form& form) {
  return form.splits <= std::min(kMaxSplits, ceil_div(p.w.params.k, kChunk));
}

/// As measured: no more tokens than there are, but 256 where blocks of 128 fill half of the
/// multiprocessors; then k in as many parts as there is room for, or in two where that saves half a
/// wave. Clusters of more than three with a multiprocessor a block find room for far less than all.
Form chosen_form(const Context& context, const QuantizedProduct& p) {
  const auto room = static_cast<uint32_t>(context.multiprocessors);
  const uint32_t tiles_n = ceil_div(p.w.params.n, kRows);
  Form form;
  form.tokens = p.m <= 32 ? 32 : p.m <= 64 ? 64 : 128;
  if (p.m > 128 && 2 * ceil_div(p.m, 128) * tiles_n > room) form.tokens = 256;
  const uint32_t tiles = ceil_div(p.m, form.tokens) * tiles_n;
  for (uint32_t splits = 2; splits <= kMaxSplits; ++splits) {
    if (tiles * splits > (splits > 3 ? room * 6 / 10 : room)) break;
    if (form_fits(p, {form.tokens, splits})) form.splits = splits;
  }
  const uint32_t places = room * blocks_of(form.tokens);
  if (tiles > places && ceil_div(2 * tiles, places) < 2 * ceil_div(tiles, places) &&
      form_fits(p, {form.tokens, 2})) {
    form.splits = 2;
  }
  return form;
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
         w.n % 8 == 0 && is_aligned(p.w.data) && is_aligned(p.x) && is_aligned(p.y) &&
         (p.rank == 0 ||
          (is_aligned(p.u) && is_aligned(p.b) && p.u_stride % 8 == 0 && p.b_stride % 8 == 0));
}

bool prefers_gemm_quantized(const Context& context, const QuantizedProduct& p) {
  const uint32_t most = p.w.params.format == WeightFormat::int4 ? 512 : 256;
  return can_gemm_quantized(context, p) && p.m <= most;
}

void gemm_quantized(const Context& context, const QuantizedProduct& p) {
  if (!can_gemm_quantized(context, p)) {
    throw std::invalid_argument(
        "[gemm_quantized] w must be int4 in groups of 64 or 128 or nf4, on compute capability 9.0, "
        "with n a multiple of 8 and pointers aligned to 16 bytes, but is not");
  }
  quant::gemm_with_form(context, p, quant::chosen_form(context, p));
}

}  // namespace metal_lora::cuda
