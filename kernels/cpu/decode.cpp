// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A layer is five steps with a meeting point after each:
//   1 norm, q/k/v             2 rope, cache, attention over (kv head, 128 keys)
//   3 combine, o + residual   4 norm, gate/up, SwiGLU           5 down + residual
// Each thread claims tickets of the current step; what a step needs first and is smaller than
// meeting for it (norms, the combination of attention parts, conversions) every thread computes
// for itself, and only once it holds a ticket, so that nobody can be writing its inputs.
//
// Ladder, SmolLM2-135M Q4_1, one token on one Zen 4 core (see gemv.cpp for the terms): 30 layers in
// 4.2 … 6.6 ms, 140 … 220 µs each at 13 … 20 GB/s; with the head's 1.8 … 2.9 ms 76 … 97 % of the read
// bandwidth; 100 keys of context add 0.8 ms. Tried, and not kept: asking for the next step's A
// matrices during this one (no gain: their bytes are what costs). The next 10 %: reading the next
// step's first panels while waiting at a meeting point.
#include "kernels/cpu/decode.h"

#include <algorithm>
#include <memory>

#include "kernels/cpu/gemv_region.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/transformer_inline.h"

namespace metal_lora::cpu {
namespace {

constexpr uint32_t kStepsPerLayer = 5;
constexpr uint32_t kKeysPerTicket = 128;
constexpr uint32_t kMaxStepLinears = 3;

/// Several arrays in one allocation, each on a cache line of its own. Call once without memory to
/// learn the size, once with it to get the arrays.
class Carver {
 public:
  explicit Carver(uint8_t* memory) : memory_(memory) {}
  template <class T>
  T* take(size_t count) {
    T* const at = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* memory_;
  size_t used_ = 0;
};

struct Block {
  std::unique_ptr<uint8_t[]> store;
  uint8_t* aligned = nullptr;
  explicit Block(size_t bytes) : store(new uint8_t[bytes + 64]) {
    aligned = store.get() + (64 - reinterpret_cast<uintptr_t>(store.get()) % 64) % 64;
  }
};

/// One step of one layer: its linears (none in the attention step) and tickets.
struct Step {
  RegionState state;
  const DecodeLayerView* layer = nullptr;
  GemvLinear linears[kMaxStepLinears];
  const float* bias[kMaxStepLinears] = {};
  uint32_t count = 0, u_tickets = 0, tickets = 0;

  void add(const LinearView& view, float* u, int threads, uint32_t together) {
    GemvLinear& l = linears[count];
    l.weight = view.weight;
    l.lora = view.lora;
    l.u = u;
    const size_t panel_bytes = weight_row_bytes(l.weight.params) * kPanelRows * together;
    l.panels_per_ticket = panels_per_ticket(l.panels(), panel_bytes, threads);
    bias[count++] = view.bias;
    u_tickets += l.u_tickets();
  }
};

/// A thread's own copy of what its linears read.
struct Input {
  float* norm = nullptr;     ///< [dims]
  uint8_t* typed = nullptr;  ///< [tokens, k] of dtype
  float* f32 = nullptr;      ///< [tokens, k]
  float* sums = nullptr;     ///< [tokens, k / 32]
  GemvInput in;
};

class Decoder {
 public:
  Decoder(
      const DecodeLayerParams& p,
      const DecodeLayerView* layers,
      size_t count,
      const float* cos_sin,
      float* x,
      void* const* k_caches,
      void* const* v_caches)
      : p_(p),
        layers_(layers),
        cos_sin_(cos_sin),
        x_(x),
        k_caches_(k_caches),
        v_caches_(v_caches),
        kernels_(gemv_kernels()),
        threads_(thread_count()),
        widest_(std::max({p.dims, p.ffn, p.q_heads * p.head_dim})),
        step_count_(count * kStepsPerLayer),
        steps_(new Step[step_count_]),
        shared_(carve_shared(nullptr)) {
    carve_shared(shared_.aligned);
    for (size_t i = 0; i < count; ++i) plan(i);
  }

  void run() {
    parallel_for(static_cast<size_t>(threads_), [this](size_t) { work(); });
  }

 private:
  size_t carve_shared(uint8_t* memory) {
    const uint32_t end = p_.position + p_.tokens;
    const uint32_t first =
        p_.window == 0 || p_.position + 1 <= p_.window ? 0 : p_.position + 1 - p_.window;
    first_part_ = first / kKeysPerTicket;
    parts_ = (end + kKeysPerTicket - 1) / kKeysPerTicket - first_part_;
    uint32_t rank = 0;
    for (size_t i = 0; i < step_count_ / kStepsPerLayer; ++i) {
      const DecodeLayerView& w = layers_[i];
      for (const LinearView* l : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) {
        rank = std::max(rank, l->lora.params.rank);
      }
    }
    Carver carver(memory);
    const size_t m = p_.tokens, heads = m * p_.q_heads;
    q_ = carver.take<float>(heads * p_.head_dim);
    k_ = carver.take<float>(m * p_.kv_heads * p_.head_dim);
    v_ = carver.take<float>(m * p_.kv_heads * p_.head_dim);
    part_states_ = carver.take<SoftmaxState>(parts_ * heads);
    part_sums_ = carver.take<float>(parts_ * heads * p_.head_dim);
    hidden_ = carver.take<uint8_t>(m * p_.ffn * dtype_bytes(p_.dtype));
    for (float*& u : u_) u = carver.take<float>(m * rank);
    return carver.used();
  }

  void plan(size_t layer) {
    const DecodeLayerView& w = layers_[layer];
    Step* s = &steps_[layer * kStepsPerLayer];
    for (uint32_t i = 0; i < kStepsPerLayer; ++i) s[i].layer = &w;
    s[0].add(w.q, u_[0], threads_, 1);
    s[0].add(w.k, u_[1], threads_, 1);
    s[0].add(w.v, u_[2], threads_, 1);
    s[1].tickets = p_.kv_heads * parts_;
    s[2].add(w.o, u_[0], threads_, 1);
    s[3].add(w.gate, u_[0], threads_, 2);
    s[3].add(w.up, u_[1], threads_, 2);
    s[4].add(w.down, u_[0], threads_, 1);
    for (uint32_t i : {0u, 2u, 4u}) {
      s[i].tickets = s[i].u_tickets;
      for (uint32_t l = 0; l < s[i].count; ++l) s[i].tickets += s[i].linears[l].tickets();
    }
    s[3].linears[1].panels_per_ticket = s[3].linears[0].panels_per_ticket;
    s[3].tickets = s[3].u_tickets + s[3].linears[0].tickets();
  }

  /// What each thread of the pool runs, whenever it arrives: all steps, in order.
  void work() {
    Input input;
    const size_t m = p_.tokens, spans = widest_ / 32;
    const auto carve = [&](uint8_t* memory) {
      Carver carver(memory);
      input.norm = carver.take<float>(p_.dims);
      input.typed = carver.take<uint8_t>(m * widest_ * dtype_bytes(p_.dtype));
      input.f32 = carver.take<float>(m * widest_);
      input.sums = carver.take<float>(m * spans);
      return carver.used();
    };
    const Block own(carve(nullptr));
    carve(own.aligned);
    for (size_t i = 0; i < step_count_; ++i) {
      Step& step = steps_[i];
      bool ready = false;
      for (;;) {
        const uint32_t ticket = step.state.next.fetch_add(1, std::memory_order_relaxed);
        if (ticket >= step.tickets) break;
        if (!ready) prepare(i % kStepsPerLayer, step, input);
        ready = true;
        run_ticket(i, step, ticket, input);
        step.state.done.fetch_add(1, std::memory_order_release);
      }
      wait_until(step.state.done, step.tickets);
    }
  }

  void run_ticket(size_t i, Step& step, uint32_t ticket, const Input& input) {
    if (i % kStepsPerLayer == 1) return attend(i / kStepsPerLayer, step, ticket);
    if (ticket >= step.u_tickets) return run_rows(i % kStepsPerLayer, step, ticket, input);
    uint32_t l = 0;
    for (; ticket >= step.linears[l].u_tickets(); ++l) ticket -= step.linears[l].u_tickets();
    run_u_ticket(kernels_, step.linears[l], input.in, ticket);
    step.state.u_done.fetch_add(1, std::memory_order_release);
  }

  void prepare(size_t kind, const Step& step, Input& input) {
    switch (kind) {
      case 0:
        return norm(step.layer->input_norm, input);
      case 2:
        combine(input);
        return set_input(p_.q_heads * p_.head_dim, input.typed, input);
      case 3:
        return norm(step.layer->post_norm, input);
      case 4:
        return set_input(p_.ffn, hidden_, input);
      default:
        return;
    }
  }

  void norm(const void* weight, Input& input) {
    const size_t row_bytes = p_.dims * dtype_bytes(p_.dtype);
    for (uint32_t t = 0; t < p_.tokens; ++t) {
      rms_norm_row(
          p_.dims,
          p_.eps,
          x_ + size_t{t} * p_.dims,
          p_.norm_dtype,
          weight,
          p_.dtype,
          input.typed + t * row_bytes);
    }
    set_input(p_.dims, input.typed, input);
  }

  /// The linear's input from values of dtype.
  void set_input(uint32_t k, const uint8_t* typed, Input& input) {
    GemvInput& in = input.in;
    in.m = p_.tokens;
    in.k = k;
    in.bf16 = p_.dtype == DType::bf16 ? reinterpret_cast<const uint16_t*>(typed) : nullptr;
    if (p_.dtype == DType::f32) {
      in.f32 = reinterpret_cast<const float*>(typed);
    } else {
      kernels_.widen(size_t{in.m} * k, p_.dtype, typed, input.f32);
      in.f32 = input.f32;
    }
    in.sums = nullptr;
    if (k % 32 != 0) return;
    kernels_.sums(in.m, k, in.f32, input.sums);
    in.sums = input.sums;
  }

  void run_rows(size_t kind, Step& step, uint32_t ticket, const Input& input) {
    ticket -= step.u_tickets;
    alignas(64) float acc[2][kMaxTicketPanels * kMaxGemvTokens * kPanelRows];
    const uint32_t m = p_.tokens;
    if (kind == 3) {
      const PanelRange range = panels_of(step.linears[0], ticket);
      for (uint32_t l = 0; l < 2; ++l) run_base(kernels_, step.linears[l], input.in, range, acc[l]);
      if (step.u_tickets > 0) wait_until(step.state.u_done, step.u_tickets);
      for (uint32_t l = 0; l < 2; ++l) run_expand(kernels_, step.linears[l], m, range, acc[l]);
      return write_hidden(step, range, acc[0], acc[1]);
    }
    uint32_t l = 0;
    for (; ticket >= step.linears[l].tickets(); ++l) ticket -= step.linears[l].tickets();
    const PanelRange range = panels_of(step.linears[l], ticket);
    run_base(kernels_, step.linears[l], input.in, range, acc[0]);
    if (step.u_tickets > 0) wait_until(step.state.u_done, step.u_tickets);
    run_expand(kernels_, step.linears[l], m, range, acc[0]);
    float* const outs[] = {q_, k_, v_};
    write_sums(step.linears[l], step.bias[l], range, acc[0], kind == 0 ? outs[l] : x_, kind != 0);
  }

  /// y = acc + bias, or y += acc + bias (the residual).
  void write_sums(
      const GemvLinear& l,
      const float* bias,
      PanelRange range,
      const float* acc,
      float* y,
      bool add_to_y) {
    const uint32_t n = l.weight.params.n;
    for (uint32_t panel = range.begin; panel < range.end; ++panel) {
      const uint32_t row0 = panel * kPanelRows, rows = rows_of(l, panel);
      for (uint32_t t = 0; t < p_.tokens; ++t, acc += kPanelRows) {
        float* const to = y + size_t{t} * n + row0;
        for (uint32_t r = 0; r < rows; ++r) {
          const float sum = bias == nullptr ? acc[r] : acc[r] + bias[row0 + r];
          to[r] = add_to_y ? to[r] + sum : sum;
        }
      }
    }
  }

  /// hidden = SwiGLU(gate + bias, up + bias), rounded to dtype for the down projection.
  void write_hidden(const Step& step, PanelRange range, float* gate, float* up) {
    for (uint32_t panel = range.begin; panel < range.end; ++panel) {
      const uint32_t row0 = panel * kPanelRows, rows = rows_of(step.linears[0], panel);
      for (uint32_t t = 0; t < p_.tokens; ++t, gate += kPanelRows, up += kPanelRows) {
        for (uint32_t r = 0; r < rows; ++r) {
          if (step.bias[0] != nullptr) gate[r] += step.bias[0][row0 + r];
          if (step.bias[1] != nullptr) up[r] += step.bias[1][row0 + r];
        }
        const size_t at = size_t{t} * p_.ffn + row0;
        swiglu_range(rows, DType::f32, gate, up, p_.dtype, hidden_ + at * dtype_bytes(p_.dtype));
      }
    }
  }

  /// Normalises (where the model does) and turns one head in f32.
  void turn_head(const void* norm_weight, uint32_t token, const float* from, float* to) {
    if (norm_weight != nullptr) {
      rms_norm_row(p_.head_dim, p_.eps, from, p_.norm_dtype, norm_weight, DType::f32, to);
      from = to;
    }
    const float* turn = cos_sin_ + size_t{token} * p_.head_dim;
    rope_head(p_.head_dim, turn, false, DType::f32, from, DType::f32, to);
  }

  /// One kv head and one range of keys for all tokens: writes the tokens' keys and values that
  /// fall into the range to the cache, then attends.
  void attend(size_t layer, const Step& step, uint32_t ticket) {
    const uint32_t head = ticket % p_.kv_heads, part = ticket / p_.kv_heads;
    const uint32_t begin = (first_part_ + part) * kKeysPerTicket, end = begin + kKeysPerTicket;
    const uint32_t group = p_.q_heads / p_.kv_heads, dim = p_.head_dim;
    const size_t stride = size_t{p_.kv_heads} * dim, bytes = dtype_bytes(p_.dtype);
    auto* const k_cache = static_cast<uint8_t*>(k_caches_[layer]) + size_t{head} * dim * bytes;
    auto* const v_cache = static_cast<uint8_t*>(v_caches_[layer]) + size_t{head} * dim * bytes;
    alignas(64) float turned[256];
    for (uint32_t t = 0; t < p_.tokens; ++t) {
      const uint32_t at = p_.position + t;
      if (at < begin || at >= end) continue;
      turn_head(step.layer->k_norm, t, k_ + t * stride + head * dim, turned);
      convert_range(dim, DType::f32, turned, p_.dtype, k_cache + at * stride * bytes);
      convert_range(
          dim, DType::f32, v_ + t * stride + head * dim, p_.dtype, v_cache + at * stride * bytes);
    }
    for (uint32_t t = 0; t < p_.tokens; ++t) {
      const uint32_t now = p_.position + t + 1;  // keys this token may see
      const uint32_t oldest = p_.window == 0 || now <= p_.window ? 0 : now - p_.window;
      const uint32_t from = std::max(oldest, begin), to = std::min(now, end);
      const size_t slot = (size_t{part} * p_.tokens + t) * p_.q_heads + size_t{head} * group;
      SoftmaxState* const states = part_states_ + slot;
      float* const sums = part_sums_ + slot * dim;
      std::fill_n(states, group, SoftmaxState{});
      std::fill_n(sums, size_t{group} * dim, 0.0f);
      if (from >= to) continue;
      attend_group(
          step,
          head * group,
          group,
          t,
          k_cache + from * stride * bytes,
          v_cache + from * stride * bytes,
          to - from,
          states,
          sums);
    }
  }

  /// The query heads of one kv head over `keys` keys, 8 heads at a time.
  void attend_group(
      const Step& step,
      uint32_t first_head,
      uint32_t group,
      uint32_t token,
      const uint8_t* k,
      const uint8_t* v,
      uint32_t keys,
      SoftmaxState* states,
      float* sums) {
    constexpr uint32_t kHeads = 8;
    const uint32_t dim = p_.head_dim;
    const size_t stride = size_t{p_.kv_heads} * dim;
    alignas(64) float q[kHeads * 256];
    for (uint32_t h = 0; h < group; h += kHeads) {
      const uint32_t count = std::min(kHeads, group - h);
      for (uint32_t i = 0; i < count; ++i) {
        const size_t at = (size_t{token} * p_.q_heads + first_head + h + i) * dim;
        turn_head(step.layer->q_norm, token, q_ + at, q + i * dim);
      }
      attend_keys(
          count,
          dim,
          p_.attention_scale,
          q,
          p_.dtype,
          k,
          stride,
          v,
          stride,
          keys,
          states + h,
          sums + size_t{h} * dim);
    }
  }

  /// Attention's parts -> the input of o.
  void combine(Input& input) {
    const uint32_t dim = p_.head_dim;
    const size_t heads = size_t{p_.tokens} * p_.q_heads;
    for (size_t h = 0; h < heads; ++h) {
      combine_attention(
          dim,
          parts_,
          part_states_ + h,
          heads,
          part_sums_ + h * dim,
          heads * dim,
          p_.dtype,
          input.typed + h * dim * dtype_bytes(p_.dtype));
    }
  }

  const DecodeLayerParams p_;
  const DecodeLayerView* const layers_;
  const float* const cos_sin_;
  float* const x_;
  void* const* const k_caches_;
  void* const* const v_caches_;
  const GemvKernels& kernels_;
  const int threads_;
  const uint32_t widest_;
  const size_t step_count_;
  const std::unique_ptr<Step[]> steps_;
  uint32_t first_part_ = 0, parts_ = 0;
  float *q_ = nullptr, *k_ = nullptr, *v_ = nullptr;  ///< [tokens, heads, head_dim]
  SoftmaxState* part_states_ = nullptr;               ///< [parts, tokens, q_heads]
  float* part_sums_ = nullptr;                        ///< [parts, tokens, q_heads, head_dim]
  uint8_t* hidden_ = nullptr;                         ///< [tokens, ffn] of dtype
  float* u_[kMaxStepLinears] = {};                    ///< [tokens, rank]
  Block shared_;  // last: its size comes from carve_shared, which sets the members above
};

}  // namespace

void decode_layer(
    const DecodeLayerParams& p,
    const DecodeLayerView& w,
    const float* cos_sin,
    float* x,
    void* k_cache,
    void* v_cache) {
  decode_layers(p, &w, 1, cos_sin, x, &k_cache, &v_cache);
}

void decode_layers(
    const DecodeLayerParams& p,
    const DecodeLayerView* layers,
    size_t count,
    const float* cos_sin,
    float* x,
    void* const* k_caches,
    void* const* v_caches) {
  if (p.tokens == 0 || count == 0) return;
  Decoder(p, layers, count, cos_sin, x, k_caches, v_caches).run();
}

}  // namespace metal_lora::cpu
