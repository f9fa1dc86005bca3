// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Verification of drafted tokens, one block of 16 warps a sequence: the CPU twin's arithmetic in
// the CPU twin's order (16 spans of a row, 32 lanes in each, halves added to halves), without fused
// multiply-adds, so that both give the same tokens. A row is read twice (its maximum, its sum of
// exponentials), once more for a refusal, and the drawn span again: 6 rows of 49,152 f32 are 1.2
// MB, so that latency is the cost (not measured).
#include <cmath>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/transformer_kernels.h"

namespace metal_lora::cuda {
namespace {

constexpr uint32_t kSpans = 16, kLanes = 32;
constexpr int kNone = 0x7fffffff;

/// cpu::exp_of_negative, operation by operation.
__device__ float exp_of_negative(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;
  const float shifted = __fadd_rn(__fmul_rn(x, kLog2e), kRound);
  const float n = __fsub_rn(shifted, kRound);
  const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, kLn2High)), __fmul_rn(n, kLn2Low));
  float p = 1.0f / 720;
  const auto next = [&](float c) { p = __fadd_rn(__fmul_rn(p, r), c); };
  next(1.0f / 120);
  next(1.0f / 24);
  next(1.0f / 6);
  next(0.5f);
  next(1.0f);
  next(1.0f);
  const uint32_t exponent = __float_as_uint(shifted) << 23;
  const float value = __fmul_rn(p, __uint_as_float(exponent + (127u << 23)));
  return x < -87.0f ? 0.0f : value;
}

__device__ float uniform(DropKey key, uint32_t counter) {
  return static_cast<float>(counter_hash(key, counter) >> 8) * 0x1p-24f;
}

__device__ uint32_t span_length(uint32_t vocab) {
  return (vocab + kSpans * kLanes - 1) / (kSpans * kLanes) * kLanes;
}

enum class Weigh { target, residual, others };

template <typename T>
struct Row {
  const T* logits;
  const float* q;
  uint32_t vocab;
  float inverse_temperature, largest, sum;
  uint32_t refused;

  __device__ float exponential(uint32_t v) const {
    return exp_of_negative(__fmul_rn(__fsub_rn(to_float(logits[v]), largest), inverse_temperature));
  }
  __device__ float weight(Weigh kind, uint32_t v) const {
    if (kind == Weigh::target) return exponential(v);
    if (kind == Weigh::others) return v == refused ? 0.0f : __fdiv_rn(exponential(v), sum);
    const float rest = __fsub_rn(__fdiv_rn(exponential(v), sum), q[v]);
    return 0.0f < rest ? rest : 0.0f;
  }
};

struct Shared {
  float spans[kSpans];
  float values[kSpans];
  int indices[kSpans];
};

/// shared.spans[s] = Σ weight of span s, which warp s adds; their sum, in every thread.
template <typename T>
__device__ float span_sums(const Row<T>& row, Weigh kind, Shared& shared) {
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t span = span_length(row.vocab), end = min(row.vocab, (warp + 1) * span);
  float sum = 0.0f;
  for (uint32_t v = warp * span + lane; v < end; v += kLanes) {
    sum = __fadd_rn(sum, row.weight(kind, v));
  }
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, half));
  }
  __syncthreads();
  if (lane == 0) shared.spans[warp] = sum;
  __syncthreads();
  float total = 0.0f;
  for (float part : shared.spans) total = __fadd_rn(total, part);
  return total;
}

template <typename T>
__device__ float row_maximum(const Row<T>& row, Shared& shared) {
  float best = -INFINITY;
  for (uint32_t v = threadIdx.x; v < row.vocab; v += blockDim.x) {
    const float x = to_float(row.logits[v]);
    best = x > best ? x : best;  // NaN never wins
  }
  best = warp_max(best);
  __syncthreads();
  if (threadIdx.x % kLanes == 0) shared.values[threadIdx.x / kLanes] = best;
  __syncthreads();
  for (float value : shared.values) best = fmaxf(best, value);
  return best;
}

/// The inverse distribution function at u, by one warp: the span that holds u·total, then the token
/// in it, adding in the order of tokens.
template <typename T>
__device__ int draw_in_spans(
    const Row<T>& row, Weigh kind, float u, float total, const Shared& shared) {
  const uint32_t lane = threadIdx.x % kLanes;
  const float target = __fmul_rn(u, total);
  float before = 0.0f, base = 0.0f;
  uint32_t chosen = kSpans;
  for (uint32_t s = 0; s < kSpans; ++s) {
    if (shared.spans[s] > 0.0f) {
      chosen = s;
      base = before;
      if (__fadd_rn(before, shared.spans[s]) > target) break;
    }
    before = __fadd_rn(before, shared.spans[s]);
  }
  if (chosen == kSpans) return -1;
  const uint32_t span = span_length(row.vocab), end = min(row.vocab, (chosen + 1) * span);
  int last = -1;
  for (uint32_t first = chosen * span; first < end; first += kLanes) {
    const uint32_t v = first + lane;
    const float own = v < end ? row.weight(kind, v) : 0.0f;
    const int count = static_cast<int>(min(kLanes, end - first));
    for (int i = 0; i < count; ++i) {
      const float w = __shfl_sync(0xffffffffu, own, i);
      base = __fadd_rn(base, w);
      if (!(w > 0.0f)) continue;
      last = static_cast<int>(first) + i;
      if (base > target) return last;
    }
  }
  return last;
}

/// As draw_in_spans, in every thread.
template <typename T>
__device__ int draw(const Row<T>& row, Weigh kind, float u, Shared& shared) {
  const float total = span_sums(row, kind, shared);
  if (threadIdx.x < kLanes) {
    const int token = draw_in_spans(row, kind, u, total, shared);
    if (threadIdx.x == 0) shared.indices[0] = token;
  }
  __syncthreads();
  const int token = shared.indices[0];
  __syncthreads();
  return token;
}

/// The lowest token of the largest logit; -1 where nothing exceeds -infinity.
template <typename T>
__device__ int argmax(const Row<T>& row, Shared& shared) {
  float best = -INFINITY;
  int index = kNone;
  const auto keep_better = [&](float value, int at) {
    if (value > best || (value == best && at < index)) {
      best = value;
      index = at;
    }
  };
  for (uint32_t v = threadIdx.x; v < row.vocab; v += blockDim.x) {
    const float x = to_float(row.logits[v]);
    if (x > best) {
      best = x;
      index = static_cast<int>(v);
    }
  }
  for (int step = 16; step > 0; step /= 2) {
    const float value = __shfl_xor_sync(0xffffffffu, best, step);
    const int at = __shfl_xor_sync(0xffffffffu, index, step);
    keep_better(value, at);
  }
  __syncthreads();
  if (threadIdx.x % kLanes == 0) {
    shared.values[threadIdx.x / kLanes] = best;
    shared.indices[threadIdx.x / kLanes] = index;
  }
  __syncthreads();
  for (uint32_t s = 0; s < kSpans; ++s) keep_better(shared.values[s], shared.indices[s]);
  __syncthreads();
  return index == kNone ? -1 : index;
}

template <typename T>
struct Verify {
  uint32_t drafts, vocab;
  float inverse_temperature;
  DropMask seed;
  const T* logits;
  const int32_t* draft_tokens;
  const float* draft_probs;
  int32_t* accepted;
  int32_t* next_token;
};

struct Outcome {
  uint32_t accepted;
  int next;
};

template <typename T>
__device__ Outcome greedy(const Verify<T>& a, Row<T> row, const int32_t* drafts, Shared& shared) {
  for (uint32_t i = 0;; ++i, row.logits += a.vocab) {
    const int best = argmax(row, shared);
    if (i == a.drafts || best < 0 || best != drafts[i]) return {i, best};
  }
}

template <typename T>
__device__ Outcome sampled(const Verify<T>& a, Row<T> row, const int32_t* drafts, Shared& shared) {
  const DropKey key = drop_key(a.seed, blockIdx.x);
  for (uint32_t i = 0;; ++i, row.logits += a.vocab) {
    row.largest = row_maximum(row, shared);
    if (!isfinite(row.largest)) return {i, -1};
    row.sum = span_sums(row, Weigh::target, shared);
    if (!isfinite(row.sum) || !(row.sum > 0.0f)) return {i, -1};
    const float u = uniform(key, 2 * i + 1);
    if (i == a.drafts) return {i, draw(row, Weigh::target, u, shared)};
    const auto draft = static_cast<uint32_t>(drafts[i]);
    if (draft < a.vocab) {
      const float probability = __fdiv_rn(row.exponential(draft), row.sum);
      const float proposal = row.q != nullptr ? row.q[draft] : 1.0f;
      if (__fmul_rn(uniform(key, 2 * i), proposal) < probability) {
        if (row.q != nullptr) row.q += a.vocab;
        continue;
      }
    }
    row.refused = draft;
    const int next = draw(row, row.q != nullptr ? Weigh::residual : Weigh::others, u, shared);
    return {i, next >= 0 ? next : draw(row, Weigh::target, u, shared)};
  }
}

template <typename T>
__global__ void __launch_bounds__(kSpans* kLanes) verify_kernel(const Verify<T> a) {
  wait_for_previous();
  __shared__ Shared shared;
  Row<T> row{};
  row.logits = a.logits + size_t{blockIdx.x} * (a.drafts + 1) * a.vocab;
  row.q =
      a.draft_probs == nullptr ? nullptr : a.draft_probs + size_t{blockIdx.x} * a.drafts * a.vocab;
  row.vocab = a.vocab;
  row.inverse_temperature = a.inverse_temperature;
  const int32_t* drafts = a.draft_tokens + size_t{blockIdx.x} * a.drafts;
  const Outcome outcome = a.inverse_temperature == 0.0f ? greedy(a, row, drafts, shared)
                                                        : sampled(a, row, drafts, shared);
  if (threadIdx.x == 0) {
    a.accepted[blockIdx.x] = static_cast<int32_t>(outcome.accepted);
    a.next_token[blockIdx.x] = outcome.next;
  }
}

}  // namespace

void verify_tokens(
    const Context& context,
    const VerifyParams& p,
    const void* logits,
    const int32_t* draft_tokens,
    const float* draft_probs,
    int32_t* accepted,
    int32_t* next_token) {
  if (p.batch == 0) return;
  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const Verify<T> a{
        p.drafts,
        p.vocab,
        p.temperature == 0.0f ? 0.0f : 1.0f / p.temperature,
        DropMask(0.0f, p.seed),
        static_cast<const T*>(logits),
        draft_tokens,
        draft_probs,
        accepted,
        next_token};
    launch_pdl(verify_kernel<T>, dim3(p.batch), dim3(kSpans * kLanes), 0, context.stream, a);
  });
}

}  // namespace metal_lora::cuda
