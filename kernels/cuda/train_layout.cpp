// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Memory of a step (bf16, per token and layer, Llama's geometry with 8 KiB of dims): the residual
// stream before each half (2), rotated q, k and v, the attention's output, gate and up: 50 KiB for
// dims 2048 and ffn 8192. Norms' outputs (8 KiB) and SwiGLU's (16 KiB) are kept where there is room
// and made again where not.
#include "kernels/cuda/train_layout.h"

#include <algorithm>
#include <initializer_list>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/lora_kernels.h"

namespace metal_lora::cuda {
namespace {

/// Ranks are padded in the 16-bit copies, so that every row of u, v and B is whole 32-byte sectors:
/// rows of 16 bytes are slow to load (rank 8, 4096 tokens, 1.07 B: 36.83 instead of 36.71 ms).
uint32_t padded(uint32_t rank) {
  return low_stride(rank);
}

/// Gives out offsets.
class Bump {
 public:
  explicit Bump(size_t start = 0) : at_(start) {}
  size_t take(size_t bytes) {
    const size_t offset = at_;
    at_ += aligned_bytes(bytes);
    return offset;
  }
  size_t end() const { return at_; }

 private:
  size_t at_;
};

/// Linears with the same input: the first and how many.
constexpr std::pair<int, int> kGroups[] = {{kQ, 3}, {kO, 1}, {kGate, 2}, {kDown, 1}};

}  // namespace

TrainLayout make_train_layout(const TrainModel& m, uint32_t max_tokens, const Retention& keep) {
  const size_t t = max_tokens;
  const size_t qkv_width = (m.q_heads + 2 * m.kv_heads) * size_t{m.head_dim};
  const size_t q_width = m.q_heads * size_t{m.head_dim};
  TrainLayout l;
  Bump bump;
  size_t packed = 0;
  for (const auto& layer : m.layers) {
    auto& adapters = l.adapters.emplace_back();
    const auto linears = linears_of(layer);
    for (int s = 0; s < kTrainSlots; ++s) {
      const auto& linear = *linears[s];
      auto& p = adapters[s];
      p.rank = linear.rank;
      p.padded_rank = padded(linear.rank);
      p.in = linear.weight.params.k;
      p.out = linear.weight.params.n;
      p.from_a = linear.a;
      p.from_b = linear.b;
      p.to_a = packed;
      packed += aligned_bytes(size_t{p.padded_rank} * p.in * kTrainElement) / kTrainElement;
      p.to_b = packed;
      packed += aligned_bytes(size_t{p.padded_rank} * p.out * kTrainElement) / kTrainElement;
    }
  }
  l.packed = bump.take(packed * kTrainElement);
  l.flags = bump.take(gemm_flag_count(max_tokens) * sizeof(uint32_t));
  l.rope = bump.take(t * m.head_dim * sizeof(float));
  const size_t wide_bytes = t * m.ffn * kTrainElement, dims_bytes = t * m.dims * kTrainElement;
  for (size_t i = 0; i < m.layers.size(); ++i) {
    auto& layer = l.layers.emplace_back();
    const size_t from_last = m.layers.size() - 1 - i;
    layer.keeps_gate_up = from_last < keep.gate_up;
    layer.keeps_norms = from_last < keep.norms;
    layer.keeps_act = from_last < keep.act;
    if (layer.keeps_gate_up) layer.gate_up = bump.take(2 * wide_bytes);
    if (layer.keeps_norms) layer.x1 = bump.take(dims_bytes);
    if (layer.keeps_norms) layer.x2 = bump.take(dims_bytes);
    if (layer.keeps_act) layer.act = bump.take(wide_bytes);
    layer.h = bump.take(t * m.dims * kTrainElement);
    layer.qkv = bump.take(t * qkv_width * kTrainElement);
    layer.attended = bump.take(t * q_width * kTrainElement);
    layer.logsumexp = bump.take(t * m.q_heads * sizeof(float));
    layer.h2 = bump.take(t * m.dims * kTrainElement);
    for (const auto& [first, count] : kGroups) {
      uint32_t width = 0;
      for (int s = first; s < first + count; ++s) width += l.adapters[i][s].padded_rank;
      size_t column = bump.take(t * width * kTrainElement);
      for (int s = first; s < first + count; ++s) {
        layer.u[s] = column;
        layer.u_stride[s] = width;
        column += l.adapters[i][s].padded_rank * kTrainElement;
      }
    }
  }
  l.final_h = bump.take(t * m.dims * kTrainElement);
  l.normed = bump.take(t * m.dims * kTrainElement);
  l.d_normed = bump.take(t * m.dims * kTrainElement);

  Bump loss(bump.end());
  l.loss_scratch = loss.take(kTrainLossScratchBytes);
  // One for all layers that do not keep their own; between the two passes it holds nothing.
  Bump backward(bump.end());
  const auto shared = [&](uint32_t kept, size_t bytes) {
    return kept < m.layers.size() ? backward.take(bytes) : 0;
  };
  const size_t gate_up = shared(keep.gate_up, 2 * wide_bytes);
  const size_t x1 = shared(keep.norms, dims_bytes), x2 = shared(keep.norms, dims_bytes);
  const size_t act = shared(keep.act, wide_bytes);
  for (auto& layer : l.layers) {
    if (!layer.keeps_gate_up) layer.gate_up = gate_up;
    if (!layer.keeps_norms) layer.x1 = x1;
    if (!layer.keeps_norms) layer.x2 = x2;
    if (!layer.keeps_act) layer.act = act;
  }
  // With ffn rounded up also as much as the parts of rank 64.
  const size_t columns = (m.ffn + kGemmActColumns - 1) / kGemmActColumns * kGemmActColumns;
  l.d_act = l.act_parts = backward.take(t * columns * kTrainElement);
  l.d_attended = backward.take(t * q_width * kTrainElement);
  l.d_qkv = backward.take(t * qkv_width * kTrainElement);
  l.d_x = backward.take(t * m.dims * kTrainElement);
  for (auto& d_h : l.d_h) d_h = backward.take(t * m.dims * kTrainElement);
  for (int s = 0; s < kTrainSlots; ++s) {
    uint32_t rank = 0;
    for (const auto& adapters : l.adapters) rank = std::max(rank, adapters[s].padded_rank);
    l.v[s] = backward.take(t * rank * kTrainElement);
  }
  Bump last(std::max(loss.end(), backward.end()));

  for (const auto& layer : m.layers) {
    const auto linears = linears_of(layer);
    const auto dense_bytes = [&](std::initializer_list<TrainSlot> slots) {
      size_t bytes = 0;
      for (TrainSlot s : slots) {
        const auto& w = linears[s]->weight.params;
        if (!is_dense(w, m.dtype)) bytes += aligned_bytes(size_t{w.n} * w.k * kTrainElement);
      }
      return bytes;
    };
    l.dense_bytes = std::max(
        {l.dense_bytes,
         dense_bytes({kQ, kK, kV}),
         dense_bytes({kO}),
         dense_bytes({kGate, kUp}),
         dense_bytes({kDown})});
  }
  l.dense = last.take(l.dense_bytes);
  l.stage = last.take(kTrainStageScratchBytes);
  l.bytes = last.end();
  return l;
}

}  // namespace metal_lora::cuda
