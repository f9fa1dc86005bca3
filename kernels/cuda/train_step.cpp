// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Memory of a step (bf16, per token and layer, Llama's geometry with 8 KiB of dims): the residual
// stream before each half (2), rotated q, k and v, the attention's output, gate and up: 50 KiB for
// dims 2048 and ffn 8192. Norms' outputs (8 KiB) and SwiGLU's (16 KiB) are kept where there is room
// and made again where not.
#include "kernels/cuda/train_step.h"

#include <algorithm>
#include <array>
#include <span>

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/lora_quantized.h"
#include "kernels/cuda/pack_adapter.h"

namespace metal_lora::cuda {
namespace {

constexpr size_t kElement = 2;  // bytes of a bf16 or f16
constexpr size_t kLossScratchBytes = size_t{320} << 20;
constexpr size_t kStageScratchBytes = size_t{64} << 20;

size_t aligned(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/// Ranks are padded in the 16-bit copies, so that every row starts on 16 bytes.
uint32_t padded(uint32_t rank) {
  return (rank + 7) / 8 * 8;
}

/// Gives out offsets.
class Bump {
 public:
  explicit Bump(size_t start = 0) : at_(start) {}
  size_t take(size_t bytes) {
    const size_t offset = at_;
    at_ += aligned(bytes);
    return offset;
  }
  size_t end() const { return at_; }

 private:
  size_t at_;
};

/// What one kernel call takes, from a fixed region; more than that from the caller's.
class StageScratch final : public Scratch {
 public:
  StageScratch(char* base, size_t bytes, Scratch* beyond)
      : base_(base), bytes_(bytes), beyond_(beyond) {}
  void* take(size_t bytes) override {
    const size_t size = aligned(bytes);
    if (used_ + size > bytes_) return beyond_->take(bytes);
    void* p = base_ + used_;
    used_ += size;
    return p;
  }
  /// Between calls: the stream orders them.
  void reset() { used_ = 0; }

 private:
  char* base_;
  size_t bytes_;
  Scratch* beyond_;
  size_t used_ = 0;
};

std::array<const TrainLinear*, 7> linears_of(const TrainLayer& layer) {
  return {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
}

bool is_dense(const WeightParams& w, DType dtype) {
  return w.format == (dtype == DType::bf16 ? WeightFormat::bf16 : WeightFormat::f16);
}

enum Slot { kQ, kK, kV, kO, kGate, kUp, kDown, kSlots };

/// Linears with the same input: the first and how many.
constexpr std::pair<int, int> kGroups[] = {{kQ, 3}, {kO, 1}, {kGate, 2}, {kDown, 1}};

}  // namespace

/// Offsets into the workspace.
struct TrainStep::Layout {
  struct Layer {
    size_t h = 0, qkv = 0, attended = 0, logsumexp = 0, h2 = 0;
    size_t gate_up = 0, x1 = 0, x2 = 0, act = 0;
    bool keeps_gate_up = false, keeps_norms = false, keeps_act = false;
    std::array<size_t, kSlots> u{};  ///< linears with one input: columns of one matrix
    std::array<uint32_t, kSlots> u_stride{};
  };
  size_t packed = 0, flags = 0, rope = 0, final_h = 0, normed = 0, d_normed = 0;
  std::vector<Layer> layers;
  // One at a time.
  size_t loss_scratch = 0;
  size_t d_act = 0, d_attended = 0, d_qkv = 0, d_x = 0;
  std::array<size_t, 2> d_h{};
  std::array<size_t, kSlots> v{};
  size_t dense = 0, dense_bytes = 0;
  size_t stage = 0;
  size_t bytes = 0;
  // Of the packed adapters, in elements.
  std::vector<std::array<PackedAdapter, kSlots>> adapters;
};

TrainStep::Layout TrainStep::layout() const {
  const auto& m = model_;
  const size_t t = max_tokens_;
  const size_t qkv_width = (m.q_heads + 2 * m.kv_heads) * size_t{m.head_dim};
  const size_t q_width = m.q_heads * size_t{m.head_dim};
  Layout l;
  Bump bump;
  size_t packed = 0;
  for (const auto& layer : m.layers) {
    auto& adapters = l.adapters.emplace_back();
    const auto linears = linears_of(layer);
    for (int s = 0; s < kSlots; ++s) {
      const auto& linear = *linears[s];
      auto& p = adapters[s];
      p.rank = linear.rank;
      p.padded_rank = padded(linear.rank);
      p.in = linear.weight.params.k;
      p.out = linear.weight.params.n;
      p.from_a = linear.a;
      p.from_b = linear.b;
      p.to_a = packed;
      packed += aligned(size_t{p.padded_rank} * p.in * kElement) / kElement;
      p.to_b = packed;
      packed += aligned(size_t{p.padded_rank} * p.out * kElement) / kElement;
    }
  }
  l.packed = bump.take(packed * kElement);
  l.flags = bump.take(gemm_flag_count(max_tokens_) * sizeof(uint32_t));
  l.rope = bump.take(t * m.head_dim * sizeof(float));
  // One for all layers that do not keep their own.
  const auto shared = [&](uint32_t kept, size_t bytes) {
    return kept < m.layers.size() ? bump.take(bytes) : 0;
  };
  const size_t wide_bytes = t * m.ffn * kElement, dims_bytes = t * m.dims * kElement;
  const size_t gate_up = shared(kept_.gate_up, 2 * wide_bytes);
  const size_t x1 = shared(kept_.norms, dims_bytes), x2 = shared(kept_.norms, dims_bytes);
  const size_t act = shared(kept_.act, wide_bytes);
  for (size_t i = 0; i < m.layers.size(); ++i) {
    auto& layer = l.layers.emplace_back();
    const size_t from_last = m.layers.size() - 1 - i;
    layer.keeps_gate_up = from_last < kept_.gate_up;
    layer.keeps_norms = from_last < kept_.norms;
    layer.keeps_act = from_last < kept_.act;
    layer.gate_up = layer.keeps_gate_up ? bump.take(2 * wide_bytes) : gate_up;
    layer.x1 = layer.keeps_norms ? bump.take(dims_bytes) : x1;
    layer.x2 = layer.keeps_norms ? bump.take(dims_bytes) : x2;
    layer.act = layer.keeps_act ? bump.take(wide_bytes) : act;
    layer.h = bump.take(t * m.dims * kElement);
    layer.qkv = bump.take(t * qkv_width * kElement);
    layer.attended = bump.take(t * q_width * kElement);
    layer.logsumexp = bump.take(t * m.q_heads * sizeof(float));
    layer.h2 = bump.take(t * m.dims * kElement);
    for (const auto& [first, count] : kGroups) {
      uint32_t width = 0;
      for (int s = first; s < first + count; ++s) width += l.adapters[i][s].padded_rank;
      size_t column = bump.take(t * width * kElement);
      for (int s = first; s < first + count; ++s) {
        layer.u[s] = column;
        layer.u_stride[s] = width;
        column += l.adapters[i][s].padded_rank * kElement;
      }
    }
  }
  l.final_h = bump.take(t * m.dims * kElement);
  l.normed = bump.take(t * m.dims * kElement);
  l.d_normed = bump.take(t * m.dims * kElement);

  Bump loss(bump.end());
  l.loss_scratch = loss.take(kLossScratchBytes);
  Bump backward(bump.end());
  l.d_act = backward.take(t * m.ffn * kElement);
  l.d_attended = backward.take(t * q_width * kElement);
  l.d_qkv = backward.take(t * qkv_width * kElement);
  l.d_x = backward.take(t * m.dims * kElement);
  for (auto& d_h : l.d_h) d_h = backward.take(t * m.dims * kElement);
  for (int s = 0; s < kSlots; ++s) {
    uint32_t rank = 0;
    for (const auto& adapters : l.adapters) rank = std::max(rank, adapters[s].padded_rank);
    l.v[s] = backward.take(t * rank * kElement);
  }
  Bump last(std::max(loss.end(), backward.end()));

  for (const auto& layer : m.layers) {
    const auto linears = linears_of(layer);
    const auto dense_bytes = [&](std::initializer_list<Slot> slots) {
      size_t bytes = 0;
      for (Slot s : slots) {
        const auto& w = linears[s]->weight.params;
        if (!is_dense(w, m.dtype)) bytes += aligned(size_t{w.n} * w.k * kElement);
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
  l.stage = last.take(kStageScratchBytes);
  l.bytes = last.end();
  return l;
}

TrainStep::TrainStep(const TrainModel& model, uint32_t max_tokens, const Retention& kept)
    : model_(model), max_tokens_(max_tokens), kept_(kept) {
  workspace_bytes_ = layout().bytes;
}

Retention TrainStep::fit(const TrainModel& model, uint32_t max_tokens, size_t budget_bytes) {
  Retention kept;
  for (uint32_t Retention::*part : {&Retention::gate_up, &Retention::norms, &Retention::act}) {
    for (size_t layers = model.layers.size(); layers > 0; --layers) {
      Retention more = kept;
      more.*part = static_cast<uint32_t>(layers);
      if (TrainStep(model, max_tokens, more).workspace_bytes() > budget_bytes) continue;
      kept = more;
      break;
    }
  }
  return kept;
}

/// One run: what is fixed for the step, with addresses.
class TrainStep::Run {
 public:
  Run(const TrainStep& step,
      const Context& context,
      void* workspace,
      const TrainBatch& batch,
      const float* parameters,
      float* grads)
      : model_(step.model_),
        layout_(step.layout()),
        base_(static_cast<char*>(workspace)),
        batch_(batch),
        parameters_(parameters),
        grads_(grads),
        tokens_(batch.tokens),
        stage_(base_ + layout_.stage, kStageScratchBytes, context.scratch),
        context_(context) {
    context_.scratch = &stage_;
  }

  void all(float* loss) {
    prepare();
    for (size_t i = 0; i < model_.layers.size(); ++i) forward_layer(i);
    head(loss);
    if (grads_ == nullptr) return;
    d_h_ = at(layout_.d_h[0]);
    call([&](const Context& c) {
      add_rms_norm_backward(
          c,
          norm(),
          at(layout_.final_h),
          model_.final_norm,
          at(layout_.d_normed),
          nullptr,
          d_h_,
          nullptr);
    });
    for (size_t i = model_.layers.size(); i-- > 0;) backward_layer(i);
  }

 private:
  using Layer = Layout::Layer;
  /// Where one linear's rows go or come from.
  struct Rows {
    void* data = nullptr;
    size_t stride = 0;
  };

  void* at(size_t offset) const { return base_ + offset; }
  const void* packed(size_t element) const { return base_ + layout_.packed + element * kElement; }
  static void* columns(void* data, size_t column) {
    return static_cast<char*>(data) + column * kElement;
  }

  /// A kernel call, whose scratch is free again after it.
  template <typename F>
  void call(F&& f) {
    stage_.reset();
    f(context_);
  }

  NormParams norm() const {
    NormParams p;
    p.rows = tokens_;
    p.dims = model_.dims;
    p.eps = model_.eps;
    p.dtype = model_.dtype;
    p.weight_dtype = DType::f32;
    return p;
  }

  AttentionParams attention(const TrainLayer& layer) const {
    AttentionParams p;
    p.q_tokens = p.kv_tokens = tokens_;
    p.q_heads = model_.q_heads;
    p.kv_heads = model_.kv_heads;
    p.head_dim = model_.head_dim;
    p.window = layer.window;
    p.scale = model_.attention_scale;
    p.dtype = model_.dtype;
    p.q_stride = p.k_stride = p.v_stride = qkv_width();
    p.o_stride = q_width();
    return p;
  }

  size_t q_width() const { return size_t{model_.q_heads} * model_.head_dim; }
  size_t kv_width() const { return size_t{model_.kv_heads} * model_.head_dim; }
  size_t qkv_width() const { return q_width() + 2 * kv_width(); }

  void prepare() {
    check(
        cudaMemsetAsync(
            at(layout_.flags), 0, gemm_flag_count(tokens_) * sizeof(uint32_t), context_.stream),
        "train_step");
    for (size_t i = 0; i < model_.layers.size(); ++i) {
      call([&](const Context& c) {
        pack_adapters(c, layout_.adapters[i], parameters_, model_.dtype, at(layout_.packed));
      });
    }
    call([&](const Context& c) {
      rope_table(
          c,
          tokens_,
          model_.head_dim,
          batch_.positions,
          model_.inv_freq,
          model_.rope_factor,
          static_cast<float*>(at(layout_.rope)));
    });
    call([&](const Context& c) {
      void* first = layout_.layers.empty() ? at(layout_.final_h) : at(layout_.layers[0].h);
      lora_embedding_forward(
          c, tokens_, model_.dtype, batch_.ids, model_.embedding, LoraView{}, first);
    });
  }

  /// 16-bit copies of quantised weights lie in one region, anew for each product.
  const void* dense(const WeightView& w) {
    if (is_dense(w.params, model_.dtype)) return w.data;
    void* to = at(layout_.dense + dense_used_);
    dense_used_ += aligned(size_t{w.params.n} * w.params.k * kElement);
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
  void linears_forward(
      size_t index,
      Slot first,
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
    const GemmShrink inside = inside_forward(index, first, y.size(), x, k);
    if (!shrink_inside(g, std::span(&inside, 1))) {
      shrink_forward(index, first, y.size(), x, k);
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
      size_t index, Slot first, size_t count, const void* x, uint32_t k) const {
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

  /// u_i = scale_i·x·A_iᵀ of linears that share x, which is read once.
  void shrink_forward(size_t index, Slot first, size_t count, const void* x, uint32_t k) {
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
    if (s.parts == 0) return;
    call([&](const Context& c) { lora_shrink(c, s); });
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

  /// v = scale·dy·B
  void shrink_backward(Rows dy, const PackedAdapter& adapter, float scale, void* v) {
    ShrinkCall s = shrink_call(dy, adapter.out, true);
    s.parts = 1;
    s.part[0].right = packed(adapter.to_b);
    s.part[0].rank = adapter.padded_rank;
    s.part[0].factor = scale;
    s.out = v;
    s.out_stride = adapter.padded_rank;
    call([&](const Context& c) { lora_shrink(c, s); });
  }

  /// dx = Σ_i dy_i·W_i + v_i·A_i, v_i = scale_i·dy_i·B_i, which stay in layout_.v. Without dx only
  /// the v.
  void linears_backward(size_t index, Slot first, std::span<const Rows> dy, void* dx) {
    const auto linears = linears_of(model_.layers[index]);
    const auto& adapters = layout_.adapters[index];
    GemmGroup g = group(true);
    g.problems = 1;
    auto& p = g.problem[0];
    p.n = linears[first]->weight.params.k;
    p.out = dx;
    p.out_stride = p.n;
    const auto shrink_before = [&] {
      for (size_t i = 0; i < dy.size(); ++i) {
        const auto& adapter = adapters[first + i];
        if (adapter.rank == 0) continue;
        shrink_backward(dy[i], adapter, linears[first + i]->scale, at(layout_.v[first + i]));
      }
    };
    if (dx == nullptr) return shrink_before();
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
    if (!shrink_inside(g, std::span(inside.data(), dy.size()))) shrink_before();
    call([&](const Context& c) { gemm(c, g); });
  }

  void gate_up_forward(size_t index) {
    const Layer& kept = layout_.layers[index];
    const size_t stride = 2 * size_t{model_.ffn};
    void* gate_up = at(kept.gate_up);
    const Rows y[] = {{gate_up, stride}, {columns(gate_up, model_.ffn), stride}};
    linears_forward(index, kGate, y, at(kept.x2));
  }

  void norm_forward(const void* h, const float* weight, void* y) {
    call(
        [&](const Context& c) { add_rms_norm_forward(c, norm(), h, nullptr, weight, nullptr, y); });
  }

  void rotate(void* qkv, bool inverse) {
    RopePairParams p;
    p.tokens = tokens_;
    p.q_heads = model_.q_heads;
    p.kv_heads = model_.kv_heads;
    p.head_dim = model_.head_dim;
    p.q_stride = p.k_stride = qkv_width();
    p.dtype = model_.dtype;
    p.inverse = inverse;
    call([&](const Context& c) {
      rope_pair(c, p, qkv, columns(qkv, q_width()), static_cast<const float*>(at(layout_.rope)));
    });
  }

  void forward_layer(size_t index) {
    const auto& layer = model_.layers[index];
    const Layer& kept = layout_.layers[index];
    const bool last = index + 1 == model_.layers.size();
    void* qkv = at(kept.qkv);
    norm_forward(at(kept.h), layer.input_norm, at(kept.x1));
    const Rows y[] = {
        {qkv, qkv_width()},
        {columns(qkv, q_width()), qkv_width()},
        {columns(qkv, q_width() + kv_width()), qkv_width()}};
    linears_forward(index, kQ, y, at(kept.x1));
    rotate(qkv, false);
    call([&](const Context& c) {
      attention_forward(
          c,
          attention(layer),
          qkv,
          columns(qkv, q_width()),
          columns(qkv, q_width() + kv_width()),
          batch_.segment_start,
          at(kept.attended),
          static_cast<float*>(at(kept.logsumexp)));
    });
    const Rows h2[] = {{at(kept.h2), model_.dims}};
    linears_forward(index, kO, h2, at(kept.attended), at(kept.h));

    norm_forward(at(kept.h2), layer.post_norm, at(kept.x2));
    gate_up_forward(index);
    call([&](const Context& c) {
      swiglu_pair_forward(c, tokens_, model_.ffn, model_.dtype, at(kept.gate_up), at(kept.act));
    });
    const Rows next[] = {{at(last ? layout_.final_h : layout_.layers[index + 1].h), model_.dims}};
    linears_forward(index, kDown, next, at(kept.act), at(kept.h2));
  }

  void head(float* loss) {
    norm_forward(at(layout_.final_h), model_.final_norm, at(layout_.normed));
    LinearCrossEntropyParams p;
    p.tokens = tokens_;
    p.dims = model_.dims;
    p.vocab = model_.head.params.n;
    p.dtype = model_.dtype;
    StageScratch scratch(base_ + layout_.loss_scratch, kLossScratchBytes, &stage_);
    stage_.reset();
    Context c = context_;
    c.scratch = &scratch;
    linear_cross_entropy(
        c,
        p,
        at(layout_.normed),
        model_.head,
        batch_.targets,
        batch_.weights,
        loss,
        grads_ != nullptr ? at(layout_.d_normed) : nullptr,
        nullptr);
  }

  void norm_backward(const void* h, const float* weight, const void* dy, const void* dh, void* dx) {
    call([&](const Context& c) {
      add_rms_norm_backward(c, norm(), h, weight, dy, dh, dx, nullptr);
    });
  }

  /// From d_h_, the gradient of the layer's output, to that of its input.
  void backward_layer(size_t index) {
    const Layer& kept = layout_.layers[index];
    const auto& layer = model_.layers[index];
    void* d_out = d_h_;
    void* d_h2 = at(layout_.d_h[d_h_ == at(layout_.d_h[0]) ? 1 : 0]);
    mlp_backward(index, d_out, d_h2);
    attention_half_backward(index, d_h2);
    adapter_grads(index, d_out, d_h2);
    d_h_ = d_out;
    if (index > 0) norm_backward(at(kept.h), layer.input_norm, at(layout_.d_x), d_h2, d_h_);
  }

  void mlp_backward(size_t index, void* d_out, void* d_h2) {
    const Layer& kept = layout_.layers[index];
    const auto& layer = model_.layers[index];
    const size_t stride = 2 * size_t{model_.ffn};
    void* gate_up = at(kept.gate_up);
    if (!kept.keeps_norms) norm_forward(at(kept.h2), layer.post_norm, at(kept.x2));
    if (!kept.keeps_gate_up) gate_up_forward(index);
    const Rows d_down[] = {{d_out, model_.dims}};
    linears_backward(index, kDown, d_down, at(layout_.d_act));
    call([&](const Context& c) {
      swiglu_pair_backward(
          c,
          tokens_,
          model_.ffn,
          model_.dtype,
          gate_up,
          at(layout_.d_act),
          kept.keeps_act ? nullptr : at(kept.act));
    });
    const Rows d_gate_up[] = {{gate_up, stride}, {columns(gate_up, model_.ffn), stride}};
    linears_backward(index, kGate, d_gate_up, at(layout_.d_x));
    norm_backward(at(kept.h2), layer.post_norm, at(layout_.d_x), d_out, d_h2);
  }

  void attention_half_backward(size_t index, void* d_h2) {
    const Layer& kept = layout_.layers[index];
    const auto& layer = model_.layers[index];
    void* qkv = at(kept.qkv);
    void* d_qkv = at(layout_.d_qkv);
    const Rows d_o[] = {{d_h2, model_.dims}};
    linears_backward(index, kO, d_o, at(layout_.d_attended));
    call([&](const Context& c) {
      attention_backward(
          c,
          attention(layer),
          qkv,
          columns(qkv, q_width()),
          columns(qkv, q_width() + kv_width()),
          batch_.segment_start,
          at(kept.attended),
          static_cast<const float*>(at(kept.logsumexp)),
          at(layout_.d_attended),
          d_qkv,
          columns(d_qkv, q_width()),
          columns(d_qkv, q_width() + kv_width()));
    });
    rotate(d_qkv, true);
    const Rows dy[] = {
        {d_qkv, qkv_width()},
        {columns(d_qkv, q_width()), qkv_width()},
        {columns(d_qkv, q_width() + kv_width()), qkv_width()}};
    // Nothing below the first layer is trained.
    linears_backward(index, kQ, dy, index > 0 ? at(layout_.d_x) : nullptr);
    if (!kept.keeps_norms) norm_forward(at(kept.h), layer.input_norm, at(kept.x1));
  }

  /// dA = vᵀ·x and dB = dyᵀ·u of the layer's adapters, in one call.
  void adapter_grads(size_t index, void* d_out, void* d_h2) {
    const Layer& kept = layout_.layers[index];
    const auto linears = linears_of(model_.layers[index]);
    const size_t qkv = qkv_width(), gate_up_stride = 2 * size_t{model_.ffn};
    void* d_qkv = at(layout_.d_qkv);
    void* d_gate_up = at(kept.gate_up);
    const std::array<Rows, kSlots> x = {
        Rows{at(kept.x1), model_.dims},
        Rows{at(kept.x1), model_.dims},
        Rows{at(kept.x1), model_.dims},
        Rows{at(kept.attended), q_width()},
        Rows{at(kept.x2), model_.dims},
        Rows{at(kept.x2), model_.dims},
        Rows{at(kept.act), model_.ffn}};
    const std::array<Rows, kSlots> dy = {
        Rows{d_qkv, qkv},
        Rows{columns(d_qkv, q_width()), qkv},
        Rows{columns(d_qkv, q_width() + kv_width()), qkv},
        Rows{d_h2, model_.dims},
        Rows{d_gate_up, gate_up_stride},
        Rows{columns(d_gate_up, model_.ffn), gate_up_stride},
        Rows{d_out, model_.dims}};
    std::vector<AdapterGrad> grads;
    for (int s = 0; s < kSlots; ++s) {
      const auto& adapter = layout_.adapters[index][s];
      if (adapter.rank == 0) continue;
      AdapterGrad a;
      a.small_dtype = model_.dtype;
      a.small_stride = adapter.padded_rank;
      a.rank = adapter.rank;
      AdapterGrad b = a;
      a.small = at(layout_.v[s]);
      a.large = x[s].data;
      a.large_stride = x[s].stride;
      a.columns = adapter.in;
      a.grad = grads_ + linears[s]->a;
      b.small = at(kept.u[s]);
      b.small_stride = kept.u_stride[s];
      b.large = dy[s].data;
      b.large_stride = dy[s].stride;
      b.columns = adapter.out;
      b.grad = grads_ + linears[s]->b;
      b.transposed = true;
      grads.push_back(a);
      grads.push_back(b);
    }
    if (grads.empty()) return;
    call(
        [&](const Context& c) { lora_grad(c, tokens_, model_.dtype, grads.data(), grads.size()); });
  }

  const TrainModel& model_;
  const Layout layout_;
  char* base_;
  TrainBatch batch_;
  const float* parameters_;
  float* grads_;
  uint32_t tokens_;
  StageScratch stage_;
  Context context_;
  void* d_h_ = nullptr;
  size_t dense_used_ = 0;
};

void TrainStep::run(
    const Context& context,
    void* workspace,
    const TrainBatch& batch,
    const float* parameters,
    float* grads,
    float* loss) const {
  if (batch.tokens == 0 || batch.tokens > max_tokens_) {
    throw std::invalid_argument(
        "[train_step] tokens must be 1 … " + std::to_string(max_tokens_) + " but is " +
        std::to_string(batch.tokens));
  }
  Run(*this, context, workspace, batch, parameters, grads).all(loss);
}

}  // namespace metal_lora::cuda
