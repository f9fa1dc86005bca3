// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Ladder (1.07 B geometry, 4 x 1024 tokens, rank 16, bf16, H100; ms a step, of which about 24 are
// products at 690 TFLOP/s; cards differ by 5 %, the last two figures of a line are a second one's):
//   first whole step                                                         43.6
//   norms' and SwiGLU's outputs kept where memory allows, loss in one read   41.3
//   attention's backward by wgmma, rope a token a block                      40.7
//   u and v made inside the products                                         39.9   41.7
//   products that end with the residual, the rotation or SwiGLU both ways; gradients of q and k
//   turned where they are made; norms' loads ahead of their sums; one lane elected to feed the
//   ring; products that begin beside their shrink                                   38.7 (105,700
//   tokens/s, 7.7 % more)
//   on a third card                                                          38.6
//   v and dB of q, k, v, o, gate and up in one read of dy                    37.8
//   the head's product ends with the softmax of its tiles; blocks of 2048 rows   36.7, 37.2, 37.7
//   on three cards (108,700 to 112,000 tokens/s); the last one took 39.1 before this and v with dB
//   one reference a row in the loss, rows of the embedding by 16 bytes: 36.95 where it took 37.16
//   u of down at the end of the product that makes act: 37.26 where it took 37.48 (four of each in
//   turns; of the kernels' own 23 µs a layer, 0.37 ms, the power limit leaves 0.22)
// An NF4 base in 4 GB: 48.4, 44.3 (what layers share lies where the loss works), 42.3 to 43.1: 0.87
// of bf16's speed. By kernels, each for itself at full clock, µs a layer, forward 870 and backward
// 1140: products 757 and 760, attention 54 and 178, shrinks 39 and, with dB, 105, norms 23 and 42,
// dA 53. The loss takes 2.2 ms. In the whole step the card draws its 690 W at 1.58 to 1.65 GHz
// instead of 1.98: 35 ms of kernels take 37. What saves no energy saves little time. Without
// an end of the products (SwiGLU, its gradient or the rotation) the kernels measured one by one add
// up to 0.3 to 0.5 ms more, but the step as a whole takes what it took (± 0.2 ms). Bands of 4 rows
// of tiles instead of 8: nothing; of 16: + 1 %. SwiGLU's gradient without clusters: + 0.7 %. Tried
// and left: warpgroups that take turns at whole tiles, so that one ends its own while the other
// multiplies (gate and up 412 -> 481 µs, SwiGLU's gradient 324 -> 448: the producer took 450 ns to
// feed a stage, before it elected its lane, and read gate and up for the end straight from memory).
// Gate's and up's low-rank steps as one (u side by side, up's B shifted) won nothing either.
// Clusters of four blocks for the 256-wide products, a quarter less from the second-level cache:
// + 7 to 18 % of a step each, since fewer than 32 of them fit at once.
// The next 10 %: dA of down at the end of SwiGLU's gradient, which makes act anyway (67 MB less to
// read, 28 µs a layer; act in a stage of the ring, vᵀ from the low-rank pair's); attention's row
// sums at the end of o's product back (15 µs).
#include <algorithm>
#include <span>

#include "kernels/cuda/train_linears.h"

namespace metal_lora::cuda {

TrainStep::TrainStep(const TrainModel& model, uint32_t max_tokens, const Retention& kept)
    : model_(model), max_tokens_(max_tokens), kept_(kept) {
  workspace_bytes_ = make_train_layout(model_, max_tokens_, kept_).bytes;
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
class TrainStep::Run : private TrainLinears {
 public:
  Run(const TrainStep& step,
      const Context& context,
      void* workspace,
      const TrainBatch& batch,
      const float* parameters,
      float* grads)
      : TrainLinears(
            step.model_,
            make_train_layout(step.model_, step.max_tokens_, step.kept_),
            context,
            workspace,
            batch.tokens,
            grads),
        batch_(batch),
        parameters_(parameters) {}

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
    std::vector<PackedAdapter> adapters;
    for (const auto& of_layer : layout_.adapters) {
      adapters.insert(adapters.end(), of_layer.begin(), of_layer.end());
    }
    call([&](const Context& c) {
      pack_adapters(c, adapters, parameters_, model_.dtype, at(layout_.packed));
    });
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

  /// The parts of u that down's product wants: 0 where it is to be made otherwise, or not at all.
  uint32_t gate_up_forward(
      size_t index, bool writes_gate_up, bool writes_act, bool shrinks_act = false) {
    const Layer& kept = layout_.layers[index];
    const size_t stride = 2 * size_t{model_.ffn};
    void* gate = at(kept.gate_up);
    void* up = columns(gate, model_.ffn);
    const Rows y[] = {{gate, stride}, {up, stride}};
    GemmGroup g = forward_group(index, kGate, y, at(kept.x2));
    if (writes_act) {
      g.swiglu = {nullptr, nullptr, stride, at(kept.act), model_.ffn};
      if (writes_gate_up) g.swiglu.gate = gate, g.swiglu.up = up;
      end_inside(g, GemmEnd::swiglu);
      if (shrinks_act) shrink_act(g, layout_.adapters[index][kDown]);
    }
    run_forward(index, kGate, g);
    if (g.swiglu.parts) return gemm_act_parts(context_, g);
    if (!writes_act || g.end != GemmEnd::plain) return 0;
    call([&](const Context& c) {
      swiglu_pair_forward(c, tokens_, model_.ffn, model_.dtype, gate, at(kept.act));
    });
    return 0;
  }

  /// q and k rotated.
  void qkv_forward(size_t index) {
    const Layer& kept = layout_.layers[index];
    void* qkv = at(kept.qkv);
    const size_t stride = qkv_width();
    const Rows y[] = {
        {qkv, stride},
        {columns(qkv, q_width()), stride},
        {columns(qkv, q_width() + kv_width()), stride}};
    GemmGroup g = forward_group(index, kQ, y, at(kept.x1));
    for (int i : {0, 1}) {
      g.problem[i].rope = static_cast<const float*>(at(layout_.rope));
      g.problem[i].head_dim = model_.head_dim;
    }
    const bool rotates = can_gemm_sm90(context_, g);
    if (!rotates) g.problem[0].rope = g.problem[1].rope = nullptr;
    run_forward(index, kQ, g);
    if (!rotates) rotate(qkv);
  }

  void norm_forward(const void* h, const float* weight, void* y) {
    call(
        [&](const Context& c) { add_rms_norm_forward(c, norm(), h, nullptr, weight, nullptr, y); });
  }

  void rotate(void* qkv) {
    RopePairParams p;
    p.tokens = tokens_;
    p.q_heads = model_.q_heads;
    p.kv_heads = model_.kv_heads;
    p.head_dim = model_.head_dim;
    p.q_stride = p.k_stride = qkv_width();
    p.dtype = model_.dtype;
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
    qkv_forward(index);
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
    GemmGroup o = forward_group(index, kO, h2, at(kept.attended), at(kept.h));
    run_forward(index, kO, o);

    norm_forward(at(kept.h2), layer.post_norm, at(kept.x2));
    const uint32_t parts = gate_up_forward(index, kept.keeps_gate_up, true, true);
    const Rows next[] = {{at(last ? layout_.final_h : layout_.layers[index + 1].h), model_.dims}};
    GemmGroup down = forward_group(index, kDown, next, at(kept.act), at(kept.h2));
    if (parts == 0) return run_forward(index, kDown, down);
    add_parts(index, parts);
    down.pair0_ready = true;
    call([&](const Context& c) { gemm(c, down); });
  }

  /// u of down, of what the product that made act left of it.
  void add_parts(size_t index, uint32_t count) {
    const Layer& kept = layout_.layers[index];
    ActParts p;
    p.parts = static_cast<const float*>(at(layout_.act_parts));
    p.count = count;
    p.m = tokens_;
    p.rank = layout_.adapters[index][kDown].padded_rank;
    p.factor = model_.layers[index].down.scale;
    p.dtype = model_.dtype;
    p.out = at(kept.u[kDown]);
    p.out_stride = kept.u_stride[kDown];
    call([&](const Context& c) { add_act_parts(c, p); });
  }

  void head(float* loss) {
    norm_forward(at(layout_.final_h), model_.final_norm, at(layout_.normed));
    LinearCrossEntropyParams p;
    p.tokens = tokens_;
    p.dims = model_.dims;
    p.vocab = model_.head.params.n;
    p.dtype = model_.dtype;
    StageScratch scratch(base_ + layout_.loss_scratch, kTrainLossScratchBytes, &stage_);
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
    if (!kept.keeps_gate_up) gate_up_forward(index, true, !kept.keeps_act);
    void* act = kept.keeps_act || !kept.keeps_gate_up ? nullptr : at(kept.act);
    const Rows d_down[] = {{d_out, model_.dims}};
    const GemmSwiglu swiglu = {
        gate_up, columns(gate_up, model_.ffn), stride, act, act ? model_.ffn : 0};
    if (!linears_backward(index, kDown, d_down, at(layout_.d_act), &swiglu)) {
      call([&](const Context& c) {
        swiglu_pair_backward(c, tokens_, model_.ffn, model_.dtype, gate_up, at(layout_.d_act), act);
      });
    }
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
          columns(d_qkv, q_width() + kv_width()),
          static_cast<const float*>(at(layout_.rope)));
    });
    const Rows dy[] = {
        {d_qkv, qkv_width()},
        {columns(d_qkv, q_width()), qkv_width()},
        {columns(d_qkv, q_width() + kv_width()), qkv_width()}};
    // Nothing below the first layer is trained.
    linears_backward(index, kQ, dy, index > 0 ? at(layout_.d_x) : nullptr);
    if (!kept.keeps_norms) norm_forward(at(kept.h), layer.input_norm, at(kept.x1));
  }

  /// dA = vᵀ·x and the dB = dyᵀ·u that are not there yet of the layer's adapters, in one call.
  void adapter_grads(size_t index, void* d_out, void* d_h2) {
    const Layer& kept = layout_.layers[index];
    const auto linears = linears_of(model_.layers[index]);
    const size_t qkv = qkv_width(), gate_up_stride = 2 * size_t{model_.ffn};
    void* d_qkv = at(layout_.d_qkv);
    void* d_gate_up = at(kept.gate_up);
    const std::array<Rows, kTrainSlots> x = {
        Rows{at(kept.x1), model_.dims},
        Rows{at(kept.x1), model_.dims},
        Rows{at(kept.x1), model_.dims},
        Rows{at(kept.attended), q_width()},
        Rows{at(kept.x2), model_.dims},
        Rows{at(kept.x2), model_.dims},
        Rows{at(kept.act), model_.ffn}};
    const std::array<Rows, kTrainSlots> dy = {
        Rows{d_qkv, qkv},
        Rows{columns(d_qkv, q_width()), qkv},
        Rows{columns(d_qkv, q_width() + kv_width()), qkv},
        Rows{d_h2, model_.dims},
        Rows{d_gate_up, gate_up_stride},
        Rows{columns(d_gate_up, model_.ffn), gate_up_stride},
        Rows{d_out, model_.dims}};
    std::vector<AdapterGrad> grads;
    for (int s = 0; s < kTrainSlots; ++s) {
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
      if (!has_grad_b_[s]) grads.push_back(b);
    }
    has_grad_b_ = {};
    if (grads.empty()) return;
    call(
        [&](const Context& c) { lora_grad(c, tokens_, model_.dtype, grads.data(), grads.size()); });
  }

  TrainBatch batch_;
  const float* parameters_;
  void* d_h_ = nullptr;
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
