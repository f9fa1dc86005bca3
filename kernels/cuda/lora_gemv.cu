// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// y = x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ for a few tokens, limited by reading W. This file checks and
// sorts calls; lora_gemv_stream.cuh is the dispatch, lora_gemv_formats.cuh the formats.
//   ladder (H100, 4096 x 4096, m 1, rank 16): not measured
#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "kernels/cuda/lora_gemv.h"
#include "kernels/nf4.h"

namespace metal_lora::cuda {
namespace {

using gemv::Call;

bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

void check_call(
    uint32_t m, uint32_t k, DType dtype, const LoraBranch* branches, size_t count, DType y_dtype) {
  const auto fail = [](const std::string& what) {
    throw std::invalid_argument("[lora_gemv] " + what);
  };
  if (m > kVectorMaxTokens) {
    fail("m must be at most " + std::to_string(kVectorMaxTokens) + " but is " + std::to_string(m));
  }
  if (count > gemv::kMaxBranches) {
    fail("count must be at most 4 but is " + std::to_string(count));
  }
  if (y_dtype != dtype && y_dtype != DType::f32) fail("y_dtype must be x's dtype or f32");
  for (size_t i = 0; i < count; ++i) {
    const WeightParams& w = branches[i].weight.params;
    if (w.k != k) {
      fail("W must be (n, " + std::to_string(k) + ") but is (n, " + std::to_string(w.k) + ")");
    }
    if (w.layout != WeightLayout::row_major) fail("W must be row_major but is cpu_packed");
  }
}

/// Chunks that one block must keep together so that no scale's group is cut and every run of
/// scales begins at a multiple of 4 bytes; 0: the streaming form cannot.
uint32_t unit_chunks(const WeightParams& w) {
  switch (w.format) {
    case WeightFormat::f32:
    case WeightFormat::f16:
    case WeightFormat::bf16:
      return 1;
    case WeightFormat::nf4:
      if (!w.double_quant) return 2;
      return w.k % (4 * kNf4Block) == 0 ? 8 : 0;
    case WeightFormat::int4:
    case WeightFormat::int8:
      break;
  }
  if (w.group_size != 32 && w.group_size != 64 && w.group_size != 128) return 0;
  const uint32_t groups = w.scales_dtype == DType::f32 ? 1 : 2;
  return w.k % (groups * w.group_size) == 0 ? groups * w.group_size / gemv::kChunk : 0;
}

bool can_stream(
    const Context& context, uint32_t k, DType dtype, const void* x, const LoraBranch& b) {
  const WeightParams& w = b.weight.params;
  if (context.capability < 80 || dtype == DType::f32) return false;
  if (k == 0 || k % gemv::kChunk != 0 || !aligned(x, 16) || !aligned(b.weight.data, 16)) {
    return false;
  }
  if (w.format <= WeightFormat::bf16 && w.format != static_cast<WeightFormat>(dtype)) return false;
  if (!aligned(b.weight.scales, 4) || !aligned(b.weight.biases, 4)) return false;
  return unit_chunks(w) > 0;
}

/// Whether two branches may share a dispatch of the streaming form.
bool alike(const LoraBranch& a, const LoraBranch& b) {
  const WeightParams &v = a.weight.params, &w = b.weight.params;
  const bool same_adapter = a.lora.params.rank == 0 || b.lora.params.rank == 0 ||
                            a.lora.params.dtype == b.lora.params.dtype;
  return v.format == w.format && v.group_size == w.group_size &&
         v.scales_dtype == w.scales_dtype && v.double_quant == w.double_quant && same_adapter;
}

Call make_call(
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype) {
  Call call;
  const WeightParams& first = branches[0].weight.params;
  call.x = x;
  call.m = m;
  call.k = k;
  call.chunks = k / gemv::kChunk;
  call.unit = unit_chunks(first);
  call.y_dtype = y_dtype;
  call.scales_dtype = first.scales_dtype;
  call.double_quant = first.double_quant;
  call.adapter_dtype = dtype;
  call.branches = static_cast<uint32_t>(count);
  for (size_t i = 0; i < count; ++i) {
    const LoraBranch& from = branches[i];
    const LoraParams& lora = from.lora.params;
    gemv::Branch& b = call.branch[i];
    b.w = static_cast<const char*>(from.weight.data);
    b.scales = static_cast<const char*>(from.weight.scales);
    b.biases = static_cast<const char*>(from.weight.biases);
    b.a = static_cast<const char*>(from.lora.a);
    b.b = static_cast<const char*>(from.lora.b);
    b.bias = from.bias;
    b.residual = from.residual;
    b.y = from.y;
    b.n = from.weight.params.n;
    b.rank = lora.rank;
    b.tile0 = call.tiles;
    b.rank_tile0 = call.rank_tiles;
    call.tiles += (b.n + gemv::kTileRows - 1) / gemv::kTileRows;
    call.rank_tiles += (b.rank + gemv::kTileRows - 1) / gemv::kTileRows;
    if (b.rank == 0) continue;
    b.u = from.u;
    b.scale = lora.scale;
    b.mask = DropMask(lora.dropout, lora.dropout_seed);
    call.adapter_dtype = lora.dtype;
    if (lora.dropout > 0.0f || lora.dtype != dtype || !aligned(b.a, 16)) call.shrink_by_fma = true;
  }
  call.passes = (call.tiles + 7) / 8;
  if (call.rank_tiles > 0) call.rank_splits = std::max(1u, std::bit_floor(8 / call.rank_tiles));
  return call;
}

bool stream(const Context& context, const Call& call, DType dtype, const WeightParams& w) {
  switch (w.format) {
    case WeightFormat::f32:
      return false;
    case WeightFormat::f16:
    case WeightFormat::bf16:
      return gemv::launch_dense(context, call, dtype);
    case WeightFormat::int4:
      return gemv::launch_int4(context, call, dtype, w.group_size);
    case WeightFormat::int8:
      return gemv::launch_int8(context, call, dtype, w.group_size);
    case WeightFormat::nf4:
      return gemv::launch_nf4(context, call, dtype);
  }
  return false;
}

}  // namespace

void lora_gemv(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype) {
  check_call(m, k, dtype, branches, count, y_dtype);
  if (m == 0) return;
  for (size_t i = 0; i < count;) {
    size_t end = i + 1;
    const bool streams = can_stream(context, k, dtype, x, branches[i]);
    while (end < count && alike(branches[i], branches[end]) &&
           can_stream(context, k, dtype, x, branches[end]) == streams) {
      ++end;
    }
    bool done = false;
    if (streams) {
      const Call call = make_call(m, k, dtype, x, branches + i, end - i, y_dtype);
      const bool empty = call.tiles == 0 && call.rank_tiles == 0;
      done = empty || (call.tiles > 0 &&
                       stream(context, call, dtype, branches[i].weight.params));
    }
    if (!done) gemv::launch_generic(context, m, k, dtype, x, branches + i, end - i, y_dtype);
    i = end;
  }
}

}  // namespace metal_lora::cuda
