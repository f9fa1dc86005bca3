// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// y = x·Wᵀ + bias + scale·(x·Aᵀ)·Bᵀ for a few tokens, limited by reading W. This file checks and
// sorts calls; lora_gemv_tile.cuh is what its forms share, lora_gemv_stream.cuh the one for any
// format, lora_gemv_direct.cuh the one for 4-bit codes in groups of 64, lora_gemv_single.cuh that
// of one token, lora_gemv_formats.cuh the formats.
//   ladder (H100, 4096 x 4096 bf16, m 1, no adapter / rank 16; cuBLAS's base 15.5 µs, reading
//   W 10.8): 5200 instructions, clusters of 8 in two rounds      18.5 / 29.5 µs each part once
//   (1500 instructions)                  18.2 / 26.2 µs three blocks a multiprocessor, one round,
//   the ring filled ahead of the wait                            16.6 / 19.0 µs (65% / 57% of
//   reading) a block's warps share a tile's columns instead of a cluster's blocks; u through L2
//   behind a flag        12.4 / 15.5 µs
//   ... each sum of u with its own word                 12.5 / 14.5 µs (86% / 74%)
//   rank 64: 16.4 µs; 8 tokens 14.1 / 15.2; n = 11008: 32.2 / 33.5 (90% / 86%), rank 64 37.8.
//   int4  24.1 / 30.7 -> 9.5 / 12.9 -> 8.7 / 10.8 (as above) -> 7.4 / 8.8 µs: the direct form,
//   since a warp's 2500 instructions took 5 µs of it; nf4 10.8 / 14.1 -> 9.5 / 11.3 -> 8.4 / 9.9
//   µs.
//   ... blocks small enough that half of the next launch's are resident, eight groups in the tensor
//   cores' eight columns: the form for one token; in one run, no adapter / rank 16 / rank 64:
//     int4  7.8 / 9.1 / (another run) 11.0 -> 6.1 / 7.5 / 8.0 µs; nf4  8.5 / 9.7 / 11.8 -> 6.5 /
//     7.6 / 8.0
//     n = 11008: int4  17.4 / 19.6 / 22.9 -> 13.7 / 16.5 / 17.0; nf4  17.6 / 19.4 / 22.9 -> 14.1 /
//     16.3 / 17.1 (cuBLAS's bf16 base there 35.8; reading W's codes 3.1 and 8.4)
// Tried: 16 warps a block (spills, no room for the next launch's blocks: no gain), one block a
// multiprocessor (14.4 µs for int4), u fetched by one warp (17.5 instead of 16.3 µs at 8 tokens).
// 16 bytes of static shared memory beside the ring cost 5 µs at bf16: rows must begin at multiples
// of 128. For one token of int4: four blocks a multiprocessor (64 registers: 8.1 / 8.2), a ninth
// warp that fetches B and u meanwhile (6.0 / 7.6, rank 64 9.3: perhaps since all blocks then ask
// for u without a pause). The next 10 %: u costs 1.5 µs, x's way through A's blocks and L2 beside
// what W takes.
#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "kernels/cuda/lora_gemv.h"
#include "kernels/nf4.h"

namespace metal_lora::cuda {
namespace {

using gemv::Call;

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

uint32_t weight_bits(WeightFormat format) {
  if (format == WeightFormat::int8) return 8;
  return format == WeightFormat::int4 || format == WeightFormat::nf4 ? 4 : 16;
}

/// Sums of u that go from block to block, and how many there is room for among the counters: the
/// upper quarter is lora_multi's.
size_t u_words(const Call& call) {
  return size_t{call.u_parts} * call.m * call.rank_tiles * gemv::kTileRows;
}
constexpr size_t kWords = (METAL_LORA_CUDA_COUNTERS / 4 * 3 - 2) / 2;

/// Whether the streaming form can work out this branch's u itself.
bool can_fuse_shrink(DType dtype, const LoraBranch& b) {
  const LoraParams& lora = b.lora.params;
  return lora.rank == 0 || (lora.dtype == dtype && lora.dropout <= 0.0f && is_aligned(b.lora.a));
}

Call make_call(
    const Context& context,
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
  call.units = call.chunks / call.unit;
  call.y_dtype = y_dtype;
  call.scales_dtype = first.scales_dtype;
  call.double_quant = first.double_quant;
  call.adapter_dtype = dtype;
  call.branches = static_cast<uint32_t>(count);
  call.wide_b = true;
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
    call.adapter_dtype = lora.dtype;
    if (!can_fuse_shrink(dtype, from)) call.u_given = true;
    if (lora.dtype != dtype || !is_aligned(b.b) || b.rank % 8 != 0) call.wide_b = false;
  }
  // A part is over before the tiles of W are: half as many bytes, or a quarter of k's chunks. More
  // than there are places for at once would cost a round.
  const uint32_t most = std::min(gemv::kMaxParts, 32 / weight_bits(first.format));
  const uint32_t resident = m == 1 && weight_bits(first.format) == 4 ? 3 : 2;
  const auto places = resident * static_cast<uint32_t>(context.multiprocessors);
  const uint32_t spare = call.tiles < places ? places - call.tiles : places;
  while (2 * call.u_parts <= most && 2 * call.u_parts * 16 <= call.chunks &&
         2 * call.u_parts * call.rank_tiles <= spare && 2 * u_words(call) <= kWords) {
    call.u_parts *= 2;
  }
  if (u_words(call) > kWords) call.u_given = true;
  if (!call.u_given) call.u_tiles = call.rank_tiles * call.u_parts;
  call.all_tiles = call.u_tiles + call.tiles;
  return call;
}

bool launch(const Context& context, const Call& call, DType dtype, const WeightParams& w) {
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

namespace gemv {

bool can_stream(
    const Context& context, uint32_t k, DType dtype, const void* x, const LoraBranch& branch) {
  const WeightParams& w = branch.weight.params;
  if (context.capability < 80 || dtype == DType::f32) return false;
  if (k == 0 || k % gemv::kChunk != 0 || !is_aligned(x) || !is_aligned(branch.weight.data)) {
    return false;
  }
  if (w.format <= WeightFormat::bf16 && w.format != static_cast<WeightFormat>(dtype)) return false;
  if (!is_aligned(branch.weight.scales, 4) || !is_aligned(branch.weight.biases, 4)) return false;
  return unit_chunks(w) > 0;
}

bool fuses_shrink(uint32_t m, DType dtype, const LoraBranch& branch) {
  const uint32_t rank_tiles = (branch.lora.params.rank + kTileRows - 1) / kTileRows;
  return can_fuse_shrink(dtype, branch) && size_t{m} * rank_tiles * kTileRows <= kWords;
}

bool alike(const LoraBranch& a, const LoraBranch& b) {
  const WeightParams &v = a.weight.params, &w = b.weight.params;
  const bool same_adapter = a.lora.params.rank == 0 || b.lora.params.rank == 0 ||
                            a.lora.params.dtype == b.lora.params.dtype;
  return v.format == w.format && v.group_size == w.group_size && v.scales_dtype == w.scales_dtype &&
         v.double_quant == w.double_quant && same_adapter;
}

bool stream(
    const Context& context,
    uint32_t m,
    uint32_t k,
    DType dtype,
    const void* x,
    const LoraBranch* branches,
    size_t count,
    DType y_dtype,
    Launch launch,
    bool only_ask) {
  LoraBranch with_u[gemv::kMaxBranches];
  std::copy(branches, branches + count, with_u);
  Call call = make_call(context, m, k, dtype, x, with_u, count, y_dtype);
  call.only_ask = only_ask;
  if (call.u_given && m > kVectorMaxTokens) return false;
  if (call.tiles == 0) return call.rank_tiles == 0;
  if (call.u_tiles > 0 && !only_ask) {
    call.left = context.counters;
    const size_t bytes = (2 + 2 * u_words(call)) * sizeof(uint32_t);
    if (call.left == nullptr) {
      call.left = static_cast<uint32_t*>(context.scratch->take(bytes));
      check(cudaMemsetAsync(call.left, 0, bytes, context.stream), "lora_gemv's counters");
    }
    call.u = reinterpret_cast<uint64_t*>(call.left + 2);
  }
  if (call.u_given && !only_ask) {
    for (size_t i = 0; i < count; ++i) {
      const uint32_t rank = with_u[i].lora.params.rank;
      if (rank == 0) continue;
      if (with_u[i].u == nullptr) {
        with_u[i].u = static_cast<float*>(context.scratch->take(size_t{m} * rank * sizeof(float)));
      }
      call.branch[i].u = with_u[i].u;
    }
    gemv::launch_generic_shrink(context, m, k, dtype, x, with_u, count);
  }
  return launch(context, call, dtype, branches[0].weight.params);
}

}  // namespace gemv

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
    const bool streams = gemv::can_stream(context, k, dtype, x, branches[i]);
    while (end < count && gemv::alike(branches[i], branches[end]) &&
           gemv::can_stream(context, k, dtype, x, branches[end]) == streams) {
      ++end;
    }
    bool done = false;
    if (streams) {
      done = gemv::stream(context, m, k, dtype, x, branches + i, end - i, y_dtype, launch);
    }
    if (!done) gemv::launch_generic(context, m, k, dtype, x, branches + i, end - i, y_dtype);
    i = end;
  }
}

}  // namespace metal_lora::cuda
