// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The linears of a training step: products with u or v inside, before or, where a layer's input
// needs no gradient, alone.
#pragma once

#include <array>
#include <span>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/lora_quantized.h"
#include "kernels/cuda/stage_scratch.h"
#include "kernels/cuda/train_layout.h"

namespace metal_lora::cuda {

/// Of one run of a step: what is fixed for it, with addresses.
class TrainLinears {
 protected:
  TrainLinears(
      const TrainModel& model,
      TrainLayout layout,
      const Context& context,
      void* workspace,
      uint32_t tokens,
      float* grads)
      : model_(model),
        layout_(std::move(layout)),
        base_(static_cast<char*>(workspace)),
        tokens_(tokens),
        grads_(grads),
        stage_(base_ + layout_.stage, kTrainStageScratchBytes, context.scratch),
        context_(context) {
    context_.scratch = &stage_;
  }
  TrainLinears(const TrainLinears&) = delete;
  TrainLinears& operator=(const TrainLinears&) = delete;

  using Layer = TrainLayout::Layer;
  /// Where one linear's rows go or come from.
  struct Rows {
    void* data = nullptr;
    size_t stride = 0;
  };

  void* at(size_t offset) const { return base_ + offset; }
  const void* packed(size_t element) const {
    return base_ + layout_.packed + element * kTrainElement;
  }
  static void* columns(void* data, size_t column) {
    return static_cast<char*>(data) + column * kTrainElement;
  }

  /// A kernel call, whose scratch is free again after it.
  template <typename F>
  void call(F&& f) {
    stage_.reset();
    f(context_);
  }
  /// 16-bit copies of quantised weights lie in one region, anew for each product.
  const void* dense(const WeightView& w) {
    if (is_dense(w.params, model_.dtype)) return w.data;
    void* to = at(layout_.dense + dense_used_);
    dense_used_ += aligned_bytes(size_t{w.params.n} * w.params.k * kTrainElement);
    call([&](const Context& c) { dequantize(c, w, model_.dtype, to); });
    return to;
  }

  GemmGroup group(bool right_is_kn) const {
    GemmGroup g;
    g.m = tokens_;
    g.dtype = g.out_dtype = model_.dtype;
    g.right_is_kn = right_is_kn;
    return g;
  }

  /// y_i = x·W_iᵀ + bias + u_i·B_iᵀ (+ residual) of the linears first … first + count - 1.
  GemmGroup forward_group(
      size_t index,
      TrainSlot first,
      std::span<const Rows> y,
      const void* x,
      const void* residual = nullptr) {
    const auto linears = linears_of(model_.layers[index]);
    const auto& adapters = layout_.adapters[index];
    const uint32_t k = linears[first]->weight.params.k;
    dense_used_ = 0;
    GemmGroup g = group(false);
    g.problems = static_cast<int>(y.size());
    for (size_t i = 0; i < y.size(); ++i) {
      const auto& linear = *linears[first + i];
      const auto& adapter = adapters[first + i];
      auto& p = g.problem[i];
      p.n = linear.weight.params.n;
      p.pair[p.pairs++] = {x, k, dense(linear.weight), k, k};
      if (linear.rank > 0) {
        const auto& kept = layout_.layers[index];
        p.pair[p.pairs++] = {
            at(kept.u[first + i]),
            kept.u_stride[first + i],
            packed(adapter.to_b),
            adapter.padded_rank,
            adapter.padded_rank};
      }
      p.out = y[i].data;
      p.out_stride = y[i].stride;
      p.bias = linear.bias;
      p.residual = residual;
      p.residual_stride = y[i].stride;
    }
    return g;
  }

  void run_forward(size_t index, TrainSlot first, GemmGroup& g) {
    const void* x = g.problem[0].pair[0].left;
    const uint32_t k = g.problem[0].pair[0].k;
    const GemmShrink inside = inside_forward(index, first, g.problems, x, k);
    if (!shrink_inside(g, std::span(&inside, 1))) {
      g.pair0_ready = shrink_forward(index, first, g.problems, x, k);
    }
    call([&](const Context& c) { gemm(c, g); });
  }

  /// The product makes its own u or v where that costs less than a kernel before it.
  bool shrink_inside(GemmGroup& g, std::span<const GemmShrink> shrinks) {
    g.shrinks = 0;
    for (const auto& shrink : shrinks) {
      if (shrink.parts > 0) g.shrink[g.shrinks++] = shrink;
    }
    if (g.shrinks == 0) return true;
    g.flags = static_cast<uint32_t*>(at(layout_.flags));
    if (can_gemm_sm90(context_, g) && gemm_hides_shrinks(context_, g)) return true;
    g.shrinks = 0;
    return false;
  }

  GemmShrink inside_forward(
      size_t index, TrainSlot first, size_t count, const void* x, uint32_t k) const {
    const auto linears = linears_of(model_.layers[index]);
    const auto& kept = layout_.layers[index];
    GemmShrink s;
    s.left = x;
    s.left_stride = s.k = k;
    for (size_t i = first; i < first + count; ++i) {
      const auto& adapter = layout_.adapters[index][i];
      if (adapter.rank == 0) continue;
      s.part[s.parts++] = {
          packed(adapter.to_a),
          k,
          adapter.padded_rank,
          linears[i]->scale,
          at(kept.u[i]),
          kept.u_stride[i],
          nullptr};
    }
    return s;
  }

  GemmShrink inside_backward(Rows dy, const PackedAdapter& adapter, float scale, void* v) const {
    GemmShrink s;
    if (adapter.rank == 0) return s;
    s.left = dy.data;
    s.left_stride = dy.stride;
    s.k = adapter.out;
    s.parts = 1;
    s.part[0] = {
        packed(adapter.to_b),
        adapter.padded_rank,
        adapter.padded_rank,
        scale,
        v,
        adapter.padded_rank,
        nullptr};
    return s;
  }

  /// u_i = scale_i·x·A_iᵀ of linears that share x, which is read once. Whether there are any.
  bool shrink_forward(size_t index, TrainSlot first, size_t count, const void* x, uint32_t k) {
    const auto linears = linears_of(model_.layers[index]);
    const auto& kept = layout_.layers[index];
    ShrinkCall s = shrink_call({const_cast<void*>(x), k}, k, false);
    s.out = at(kept.u[first]);
    s.out_stride = kept.u_stride[first];
    for (size_t i = 0; i < count; ++i) {
      const auto& adapter = layout_.adapters[index][first + i];
      if (adapter.rank == 0) continue;
      auto& part = s.part[s.parts++];
      part.right = packed(adapter.to_a);
      part.rank = adapter.padded_rank;
      part.factor = linears[first + i]->scale;
    }
    if (s.parts == 0) return false;
    call([&](const Context& c) { lora_shrink(c, s); });
    return true;
  }

  ShrinkCall shrink_call(Rows x, uint32_t k, bool right_is_kn) const {
    ShrinkCall s;
    s.m = tokens_;
    s.k = k;
    s.dtype = s.right_dtype = s.out_dtype = model_.dtype;
    s.right_is_kn = right_is_kn;
    s.x = x.data;
    s.x_stride = x.stride;
    return s;
  }

  /// v_i = scale_i·dy_i·B_i, and dB where both can be had from one read of dy. Whether there are
  /// any.
  bool shrink_backward(size_t index, TrainSlot first, std::span<const Rows> dy) {
    const auto linears = linears_of(model_.layers[index]);
    std::array<ShrinkGrad, 3> calls;
    std::array<int, 3> slots;
    size_t count = 0;
    for (size_t i = 0; i < dy.size(); ++i) {
      const int slot = first + static_cast<int>(i);
      const auto& adapter = layout_.adapters[index][slot];
      if (adapter.rank == 0) continue;
      slots[count] = slot;
      calls[count++] = {
          dy[i].data,
          dy[i].stride,
          adapter.out,
          adapter.rank,
          adapter.padded_rank,
          linears[slot]->scale,
          packed(adapter.to_b),
          at(layout_.layers[index].u[slot]),
          layout_.layers[index].u_stride[slot],
          at(layout_.v[slot]),
          grads_ + linears[slot]->b};
    }
    const std::span<const ShrinkGrad> all(calls.data(), count);
    if (can_shrink_grad(context_, tokens_, model_.dtype, all)) {
      call([&](const Context& c) { lora_shrink_grad(c, tokens_, model_.dtype, all); });
      for (size_t i = 0; i < count; ++i) has_grad_b_[slots[i]] = true;
      return true;
    }
    for (const ShrinkGrad& each : all) {
      ShrinkCall s = shrink_call({const_cast<void*>(each.dy), each.dy_stride}, each.n, true);
      s.parts = 1;
      s.part[0].right = each.b;
      s.part[0].rank = each.padded_rank;
      s.part[0].factor = each.factor;
      s.out = each.v;
      s.out_stride = each.padded_rank;
      call([&](const Context& c) { lora_shrink(c, s); });
    }
    return count > 0;
  }

  /// dx = Σ_i dy_i·W_i + v_i·A_i, v_i = scale_i·dy_i·B_i, which stay in layout_.v. Without dx only
  /// the v. Some dB are made on the way: has_grad_b_. With swiglu, dx stays where the product takes
  /// its place: true.
  bool linears_backward(
      size_t index,
      TrainSlot first,
      std::span<const Rows> dy,
      void* dx,
      const GemmSwiglu* swiglu = nullptr) {
    const auto linears = linears_of(model_.layers[index]);
    const auto& adapters = layout_.adapters[index];
    GemmGroup g = group(true);
    g.problems = 1;
    auto& p = g.problem[0];
    p.n = linears[first]->weight.params.k;
    p.out = dx;
    p.out_stride = p.n;
    if (dx == nullptr) {
      shrink_backward(index, first, dy);
      return false;
    }
    dense_used_ = 0;
    for (size_t i = 0; i < dy.size(); ++i) {
      const auto& w = linears[first + i]->weight;
      p.pair[p.pairs++] = {dy[i].data, dy[i].stride, dense(w), w.params.k, w.params.n};
    }
    for (size_t i = 0; i < dy.size(); ++i) {
      const auto& adapter = adapters[first + i];
      if (adapter.rank == 0) continue;
      const size_t rank = adapter.padded_rank;
      p.pair[p.pairs++] = {
          at(layout_.v[first + i]), rank, packed(adapter.to_a), adapter.in, adapter.padded_rank};
    }
    std::array<GemmShrink, 3> inside;
    for (size_t i = 0; i < dy.size(); ++i) {
      inside[i] = inside_backward(
          dy[i], adapters[first + i], linears[first + i]->scale, at(layout_.v[first + i]));
    }
    if (swiglu) {
      g.swiglu = *swiglu;
      end_inside(g, GemmEnd::swiglu_backward);
    }
    if (!shrink_inside(g, std::span(inside.data(), dy.size()))) {
      g.pair0_ready = shrink_backward(index, first, dy);
    }
    call([&](const Context& c) { gemm(c, g); });
    return g.end != GemmEnd::plain;
  }

  /// SwiGLU at the end of the product's tiles, where that is possible.
  void end_inside(GemmGroup& g, GemmEnd end) const {
    g.end = end;
    if (!can_gemm_sm90(context_, g)) g.end = GemmEnd::plain;
  }

  /// down's u in parts at the end of the product that makes act, where that is possible.
  void shrink_act(GemmGroup& g, const PackedAdapter& down) const {
    if (g.end != GemmEnd::swiglu || down.rank == 0) return;
    GemmGroup with = g;
    with.swiglu.parts = static_cast<float*>(at(layout_.act_parts));
    with.swiglu.shrink = packed(down.to_a);
    with.swiglu.shrink_stride = down.in;
    with.swiglu.shrink_rank = down.padded_rank;
    if (can_gemm_sm90(context_, with)) g = with;
  }

  const TrainModel& model_;
  const TrainLayout layout_;
  char* base_;
  uint32_t tokens_;
  float* grads_;  ///< f32 [parameters]; null: the loss alone
  StageScratch stage_;
  Context context_;
  std::array<bool, kTrainSlots> has_grad_b_{};  ///< of the layer that is worked on

 private:
  size_t dense_used_ = 0;
};

}  // namespace metal_lora::cuda
