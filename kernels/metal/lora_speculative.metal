// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Which drafted tokens the target keeps, and the token after them; one threadgroup of 16 simdgroups
// a sequence. Greedy: drafts are kept while each is its row's largest logit. Sampling (Leviathan et
// al., arXiv:2211.17192), P = softmax(row / temperature): draft x is kept iff u·q(x) < P(x); after
// the first refusal the next token is drawn from max(P - q, 0), after all drafts from P of the last
// row: together the target's own distribution. Uniforms come from the dropout generator: 24 bits of
// hash(seed, sequence, 2i) for draft i, of (seed, sequence, 2i + 1) for the draw after i drafts.
//
// A row is cut into 16 parts, one a simdgroup: maximum and sum of exponentials in one pass
// (rescaled where a larger logit appears), the parts' sums stay in threadgroup memory. A draw finds
// its part by them and walks only that part again, 32 tokens a step by a prefix sum. Bytes read,
// logits of b: vocab·b for each row up to the first refusal; that row (and 4·vocab of q) once more
// after a refusal, and 1/16 of it for the draw; 8 bytes an answer. 128 bytes of threadgroup memory.
//
// Counters (2 sequences, 5 drafts, vocab 32,000, f16; emulator; unique: 0.77 MB of logits):
//   greedy, all kept                          logits 1.00x (0.77 MB)
//   sampling, all kept                        logits 1.02x (0.78 MB), q 4 bytes a draft
//   sampling, the first refused               0.26 MB: a row of each sequence, 2.05x
// Two passes a row (maximum, then sum) would read 2.02x where all are kept.

// @region verify_common : dropout
namespace metal_lora {

constant constexpr uint kVerifySimdgroups = 16;
constant constexpr uint kVerifyThreads = 512;
constant constexpr int kNoToken = 0x7fffffff;

// Elements of a row that one simdgroup owns, so that a draw walks one part of 16 a second time.
inline uint verify_span(uint vocab) {
  return (vocab + kVerifyThreads - 1) / kVerifyThreads * 32;
}

inline bool is_finite(float x) {
  return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u;
}

// Uniform in [0, 1), 24 bits.
inline float verify_uniform(DropoutKey key, uint counter) {
  return float(dropout_hash(key, counter) >> 8) * (1.0f / 16777216.0f);
}

}  // namespace metal_lora

// @region verify_greedy : verify_common
namespace metal_lora {

inline void keep_better(thread float& best, thread int& index, float value, int at) {
  if (value > best || (value == best && at < index)) {
    best = value;
    index = at;
  }
}

// argmax of a row, the lowest index on ties, -1 where no value exceeds -infinity. The same in every
// thread.
template <typename Row>
inline int row_argmax(
    Row logits,
    const ulong row,
    const uint vocab,
    threadgroup float* values,  // [16]
    threadgroup int* indices,   // [16]
    const uint simd_id,
    const uint lane) {
  float best = -INFINITY;
  int index = kNoToken;
  for (uint v = simd_id * 32 + lane; v < vocab; v += kVerifyThreads) {
    const float value = float(logits[row + v]);
    if (value > best) {
      best = value;
      index = int(v);
    }
  }
  for (ushort step = 16; step > 0; step /= 2) {
    const float other = simd_shuffle_xor(best, step);
    const int other_index = simd_shuffle_xor(index, step);
    keep_better(best, index, other, other_index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    values[simd_id] = best;
    indices[simd_id] = index;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  best = values[0];
  index = indices[0];
  for (uint s = 1; s < kVerifySimdgroups; ++s) keep_better(best, index, values[s], indices[s]);
  return index == kNoToken ? -1 : index;
}

template <typename L, typename D>
inline void verify_greedy(
    L logits,
    D drafts,
    const uint count,
    const uint vocab,
    device int* accepted,
    device int* next_token,
    threadgroup float* values,
    threadgroup int* indices,
    const uint sequence,
    const uint simd_id,
    const uint lane) {
  uint i = 0;
  int token = -1;
  for (; i <= count; ++i) {
    const ulong row = (ulong(sequence) * (count + 1) + i) * vocab;
    token = row_argmax(logits, row, vocab, values, indices, simd_id, lane);
    if (i == count || token < 0 || token != drafts[sequence * count + i]) break;
  }
  if (simd_id == 0 && lane == 0) {
    accepted[sequence] = int(i);
    next_token[sequence] = token;
  }
}

}  // namespace metal_lora

// @region verify_sampled : verify_common
namespace metal_lora {

struct RowStatistics {
  float largest;  // M
  float sum;      // Z = Σ exp((l - M) / temperature)
};

// M and Z of a row in one pass; spans[s] becomes simdgroup s's part of Z.
template <typename Row>
inline RowStatistics row_statistics(
    Row logits,
    const ulong row,
    const uint vocab,
    const float inv_t,
    threadgroup float* spans,   // [16]
    threadgroup float* maxima,  // [16]
    const uint simd_id,
    const uint lane) {
  const uint span = verify_span(vocab), end = min(vocab, (simd_id + 1) * span);
  float largest = -INFINITY, sum = 0.0f;
  for (uint v = simd_id * span + lane; v < end; v += 32) {
    const float value = float(logits[row + v]);
    if (value > largest) {
      sum = sum * precise::exp((largest - value) * inv_t) + 1.0f;
      largest = value;
    } else if (value != -INFINITY) {
      sum += precise::exp((value - largest) * inv_t);  // NaN stays in the sum
    }
  }
  const float top = simd_max(largest);
  // Equal covers -infinity on both sides, whose difference is not a number.
  sum = simd_sum(largest == top ? sum : sum * precise::exp((largest - top) * inv_t));
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) {
    spans[simd_id] = sum;
    maxima[simd_id] = top;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  RowStatistics out;
  out.largest = maxima[0];
  for (uint s = 1; s < kVerifySimdgroups; ++s) out.largest = max(out.largest, maxima[s]);
  out.sum = 0.0f;
  if (lane == 0 && top != out.largest)
    spans[simd_id] = sum * precise::exp((top - out.largest) * inv_t);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint s = 0; s < kVerifySimdgroups; ++s) out.sum += spans[s];
  return out;
}

// What a token weighs in a draw: p up to its sum; max(p - q, 0); or p without one token.
enum WeightKind { kTargetWeight, kResidualWeight, kOtherWeight };

template <typename L, typename Q>
struct TokenWeights {
  L logits;
  Q q;
  ulong row;
  ulong q_row;
  float largest;
  float sum;
  float inv_t;
  int excluded;
  WeightKind kind;
  float at(uint v) const {
    const float e = precise::exp((float(logits[row + v]) - largest) * inv_t);
    if (kind == kTargetWeight) return e;
    if (kind == kResidualWeight) return max(e / sum - float(q[q_row + v]), 0.0f);
    return int(v) == excluded ? 0.0f : e / sum;
  }
};

// spans[s] = Σ weights of simdgroup s's part. Returns their sum, the same in every thread.
template <typename W>
inline float span_sums(
    const W weights,
    const uint vocab,
    threadgroup float* spans,
    const uint simd_id,
    const uint lane) {
  const uint span = verify_span(vocab), end = min(vocab, (simd_id + 1) * span);
  float sum = 0.0f;
  for (uint v = simd_id * span + lane; v < end; v += 32) sum += weights.at(v);
  sum = simd_sum(sum);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) spans[simd_id] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0.0f;
  for (uint s = 0; s < kVerifySimdgroups; ++s) total += spans[s];
  return total;
}

// Inverse distribution function in the order of tokens: the part that holds u · total, then the
// token in it. Where rounding leaves none, the last one with a weight. For one simdgroup.
template <typename W>
inline int draw_token(
    const W weights,
    const uint vocab,
    const float u,
    const threadgroup float* spans,
    const uint lane) {
  float total = 0.0f;
  for (uint s = 0; s < kVerifySimdgroups; ++s) total += spans[s];
  const float target = u * total;
  float base = 0.0f, last_base = 0.0f, before = 0.0f;
  uint part = kVerifySimdgroups, last_part = 0;
  for (uint s = 0; s < kVerifySimdgroups; ++s) {
    if (spans[s] > 0.0f) {
      last_part = s;
      last_base = before;
    }
    if (part == kVerifySimdgroups && before + spans[s] > target) {
      part = s;
      base = before;
    }
    before += spans[s];
  }
  if (part == kVerifySimdgroups) {
    part = last_part;
    base = last_base;
  }
  const uint span = verify_span(vocab), end = min(vocab, (part + 1) * span);
  int last = -1;
  for (uint first = part * span; first < end; first += 32) {
    const uint v = first + lane;
    const float weight = v < end ? weights.at(v) : 0.0f;
    const float through = base + simd_prefix_inclusive_sum(weight);
    const int found = simd_min(weight > 0.0f && through > target ? int(v) : kNoToken);
    if (found != kNoToken) return found;
    last = max(last, simd_max(weight > 0.0f ? int(v) : -1));
    base += simd_sum(weight);
  }
  return last;
}

// p: drafts, vocab, 1/temperature, seed (low, high).
template <bool HAS_Q, typename L, typename D, typename Q, typename P>
inline void verify_sampled(
    L logits,
    D drafts,
    Q q,
    P p,
    device int* accepted,
    device int* next_token,
    threadgroup float* spans,
    threadgroup float* maxima,
    const uint sequence,
    const uint simd_id,
    const uint lane) {
  const uint count = p[0], vocab = p[1];
  const DropoutKey key = dropout_key(ulong(p[3]) | (ulong(p[4]) << 32), sequence);
  TokenWeights<L, Q> weights;
  weights.logits = logits;
  weights.q = q;
  weights.inv_t = as_type<float>(p[2]);
  weights.excluded = -1;
  weights.kind = kTargetWeight;
  weights.row = ulong(sequence) * (count + 1) * vocab;
  weights.q_row = ulong(sequence) * count * vocab;
  uint i = 0;
  bool usable = true;
  for (; i <= count; ++i, weights.row += vocab, weights.q_row += vocab) {
    const RowStatistics row =
        row_statistics(logits, weights.row, vocab, weights.inv_t, spans, maxima, simd_id, lane);
    weights.largest = row.largest;
    weights.sum = row.sum;
    usable = is_finite(row.largest) && is_finite(row.sum) && row.sum > 0.0f;
    if (!usable || i == count) break;
    const int draft = drafts[sequence * count + i];
    float target = 0.0f, proposal = 1.0f;
    if (draft >= 0 && uint(draft) < vocab) {
      target = weights.at(uint(draft)) / row.sum;
      if (HAS_Q) proposal = float(q[weights.q_row + uint(draft)]);
    }
    if (verify_uniform(key, 2 * i) * proposal < target) continue;
    weights.kind = HAS_Q ? kResidualWeight : kOtherWeight;
    weights.excluded = draft;
    if (!(span_sums(weights, vocab, spans, simd_id, lane) > 0.0f)) {
      weights.kind = kTargetWeight;  // p = q to the last bit
      span_sums(weights, vocab, spans, simd_id, lane);
    }
    break;
  }
  if (simd_id != 0) return;
  const int token =
      usable ? draw_token(weights, vocab, verify_uniform(key, 2 * i + 1), spans, lane) : -1;
  if (lane == 0) {
    accepted[sequence] = int(i);
    next_token[sequence] = token;
  }
}

}  // namespace metal_lora
