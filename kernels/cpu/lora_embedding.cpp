// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <memory>

#include "kernels/cpu/gemv_kernels.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

/// Tokens that a thread takes at once: some kB of output each.
constexpr uint32_t kTokens = 16;

/// u[j] = A[j, id], f32.
void gather_column(const LoraView& lora, size_t vocab, int32_t id, float* u) {
  for (uint32_t j = 0; j < lora.params.rank; ++j) {
    u[j] = read_float(lora.a, lora.params.dtype, j * vocab + static_cast<size_t>(id));
  }
}

void embed(
    const GemvKernels& kernels,
    DType dtype,
    int32_t id,
    const WeightView& table,
    const LoraView& lora,
    float* row,
    float* u,
    uint8_t* out) {
  const uint32_t dims = table.params.k;
  kernels.dequantize_rows(table, static_cast<uint32_t>(id), 1, row);
  if (lora.params.rank > 0) {
    gather_column(lora, table.params.n, id, u);
    for (uint32_t d = 0; d < dims; d += kPanelRows) {
      const uint32_t count = std::min(dims - d, kPanelRows);
      float acc[kPanelRows] = {};
      std::copy_n(row + d, count, acc);
      kernels.expand(lora, 1, u, d, count, acc);
      std::copy_n(acc, count, row + d);
    }
  }
  for (uint32_t d = 0; d < dims; ++d) write_float(out, dtype, d, row[d]);
}

}  // namespace

void lora_embedding_forward(
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightView& table,
    const LoraView& lora,
    void* out) {
  const GemvKernels& kernels = gemv_kernels();
  const uint32_t dims = table.params.k;
  const size_t row_bytes = dims * dtype_bytes(dtype);
  parallel_for((tokens + kTokens - 1) / kTokens, [&](size_t chunk) {
    const uint32_t begin = static_cast<uint32_t>(chunk) * kTokens;
    const std::unique_ptr<float[]> scratch(new float[size_t{dims} + lora.params.rank]);
    for (uint32_t t = begin; t < std::min(tokens, begin + kTokens); ++t) {
      embed(
          kernels,
          dtype,
          ids[t],
          table,
          lora,
          scratch.get(),
          scratch.get() + dims,
          static_cast<uint8_t*>(out) + t * row_bytes);
    }
  });
}

// dA[:, id] += scale·Bᵀ·dy_t and dB += scale·dy_t·A[:, id]ᵀ over tokens in order. Each thread owns
// some adapter columns j for every token, so no two threads add to one value and the order of the
// sums is fixed; a rank of 16 leaves enough of them for a few threads.
void lora_embedding_backward(
    uint32_t tokens,
    DType dtype,
    const int32_t* ids,
    const WeightParams& table,
    const LoraView& lora,
    const void* dy,
    float* da,
    float* db) {
  const uint32_t rank = lora.params.rank, dims = table.k;
  const size_t vocab = table.n;
  const float scale = lora.params.scale;
  const GemvKernels& kernels = gemv_kernels();
  const std::unique_ptr<float[]> wide(new float[size_t{tokens} * dims + 1]);
  kernels.widen(size_t{tokens} * dims, dtype, dy, wide.get());
  parallel_for(rank, [&](size_t j) {
    const std::unique_ptr<float[]> columns(new float[2 * size_t{dims}]);
    float *const b = columns.get(), *const sum = b + dims;
    for (uint32_t d = 0; d < dims; ++d) {
      b[d] = read_float(lora.b, lora.params.dtype, size_t{d} * rank + j);
      sum[d] = 0.0f;
    }
    float* const da_row = da + j * vocab;
    std::fill_n(da_row, vocab, 0.0f);
    for (uint32_t t = 0; t < tokens; ++t) {
      const float* const g = wide.get() + size_t{t} * dims;
      const float a =
          read_float(lora.a, lora.params.dtype, j * vocab + static_cast<size_t>(ids[t]));
      float dot = 0.0f;
      for (uint32_t d = 0; d < dims; ++d) {
        dot += b[d] * g[d];
        sum[d] += a * g[d];
      }
      da_row[ids[t]] += scale * dot;
    }
    for (uint32_t d = 0; d < dims; ++d) db[size_t{d} * rank + j] = scale * sum[d];
  });
}

}  // namespace metal_lora::cpu
