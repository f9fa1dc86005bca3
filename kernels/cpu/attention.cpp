// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Flash attention on the CPU. The ladder, one thread on a Zen 5 core shared with other work, ms of
// thread time forward / backward for 1024 tokens in 4 segments, 9/3 heads of 64; useful (causal)
// FLOP against the peak of the same window, 235 GFLOP/s bf16 and 118 f32:
//   baseline (SSE2) f32      13.1 / 38.6   20 % / 17 %
//   AVX2 f32                  5.4 / 15.4   47 % / 42 %
//   AVX-512 f32               4.4 / 13.6   58 % / 47 %
//   bf16, products in f32     7.0 / 11.2   (AVX2)
//   bf16 dot products         2.7 /  6.8   47 % / 48 %; one segment of 2048: 61 % / 52 %
// What is missing to the peak: causal tiles computed and thrown away (strips of 32 queries: 12 %
// at 256 tokens), the exponentials (15 % of forward), sums that are loaded and stored once per 64
// keys. Backward computes Sᵀ again instead of keeping it: 5 products for forward's 2.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cpu/transformer_inline.h"
#include "kernels/cpu/transformer_kernels.h"

namespace metal_lora::cpu {

extern const AttentionTiles attention_tiles_scalar;
#if defined(__x86_64__)
extern const AttentionTiles attention_tiles_avx2;
extern const AttentionTiles attention_tiles_avx512;
extern const AttentionTiles attention_tiles_avx512_bf16;
#endif

const AttentionTiles& attention_tiles() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512_bf16:
      return attention_tiles_avx512_bf16;
    case Isa::avx512:
      return attention_tiles_avx512;
    case Isa::avx2:
      return attention_tiles_avx2;
    default:
      break;
  }
#endif
  // On AArch64 the baseline has NEON: this set is the NEON one.
  return attention_tiles_scalar;
}

namespace {

// Up to this many queries a key is read for one or two vectors' worth of work: one query at a time.
constexpr uint32_t kFewQueries = 8;
// Keys to a task of the one-query form; fixed, so that sums do not depend on the threads.
constexpr uint32_t kKeysPerPart = 512;
// dk and dv of every query head are summed in f32 before a group's heads are added up.
constexpr size_t kGradientBytes = size_t{64} << 20;

size_t element_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}
const char* offset(const void* p, size_t elements, DType dtype) {
  return static_cast<const char*>(p) + elements * element_bytes(dtype);
}
char* offset(void* p, size_t elements, DType dtype) {
  return static_cast<char*>(p) + elements * element_bytes(dtype);
}

struct FreeAligned {
  void operator()(void* p) const { ::operator delete (p, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<void, FreeAligned>;
Scratch allocate(size_t bytes) {
  return Scratch(::operator new (bytes, std::align_val_t{64}));
}

uint32_t segment_of(const int32_t* segment_start, uint32_t query) {
  return segment_start == nullptr ? 0 : static_cast<uint32_t>(std::max(segment_start[query], 0));
}

// The first key and one past the last that a query sees; empty where first >= end.
struct KeyRange {
  uint32_t first, end;
};

KeyRange visible_keys(const AttentionParams& p, const int32_t* segment_start, uint32_t query) {
  const uint32_t position = p.kv_offset + query;
  uint32_t first = segment_of(segment_start, query);
  if (p.window != 0 && position >= p.window) first = std::max(first, position - p.window + 1);
  return {first, std::min(position + 1, p.kv_tokens)};
}

std::vector<QueryBlock> cut_queries(const AttentionParams& p, const int32_t* segment_start) {
  std::vector<QueryBlock> blocks;
  for (uint32_t begin = 0; begin < p.q_tokens;) {
    QueryBlock b = {.begin = begin, .segment = segment_of(segment_start, begin)};
    while (begin < p.q_tokens && begin - b.begin < kAttentionBlock &&
           segment_of(segment_start, begin) == b.segment) {
      ++begin;
    }
    b.count = begin - b.begin;
    b.key_end = visible_keys(p, segment_start, begin - 1).end;
    const uint32_t first = visible_keys(p, segment_start, b.begin).first;
    b.key_begin = b.segment + (first - b.segment) / kAttentionBlock * kAttentionBlock;
    blocks.push_back(b);
  }
  return blocks;
}

AttentionHead head_of(
    const AttentionParams& p, uint32_t head, const void* q, const void* k, const void* v) {
  const size_t kv = head / (p.q_heads / p.kv_heads);
  return {
      .params = &p,
      .q = offset(q, size_t{head} * p.head_dim, p.dtype),
      .k = offset(k, kv * p.head_dim, p.dtype),
      .v = offset(v, kv * p.head_dim, p.dtype)};
}

// ---- Few queries: the row form ----

struct FewQueries {
  const AttentionParams& p;
  const void *q, *k, *v;
  const int32_t* segment_start;
  uint32_t parts;
  std::vector<SoftmaxState> states;  // [query, head, part]
  std::vector<float> accs;           // [query, head, part, head_dim]
};

void attend_part(FewQueries& f, uint32_t query, uint32_t kv_head, uint32_t part) {
  const AttentionParams& p = f.p;
  const KeyRange all = visible_keys(p, f.segment_start, query);
  const uint64_t begin = uint64_t{all.first} + uint64_t{part} * kKeysPerPart;
  if (begin >= all.end) return;
  const uint32_t keys = std::min<uint32_t>(kKeysPerPart, all.end - static_cast<uint32_t>(begin));
  const uint32_t group = p.q_heads / p.kv_heads, dim = p.head_dim;
  const size_t k_at = begin * p.k_stride + size_t{kv_head} * dim;
  const size_t v_at = begin * p.v_stride + size_t{kv_head} * dim;
  std::vector<float> q(size_t{group} * dim), acc(size_t{group} * dim);
  std::vector<SoftmaxState> state(group);
  const size_t q_at = query * p.q_stride + size_t{kv_head} * group * dim;
  convert_range(q.size(), p.dtype, offset(f.q, q_at, p.dtype), DType::f32, q.data());
  attend_keys(
      group,
      dim,
      p.scale,
      q.data(),
      p.dtype,
      offset(f.k, k_at, p.dtype),
      p.k_stride,
      offset(f.v, v_at, p.dtype),
      p.v_stride,
      keys,
      state.data(),
      acc.data());
  for (uint32_t h = 0; h < group; ++h) {
    const size_t at = (size_t{query} * p.q_heads + kv_head * group + h) * f.parts + part;
    f.states[at] = state[h];
    std::copy_n(acc.data() + size_t{h} * dim, dim, f.accs.data() + at * dim);
  }
}

void forward_few(
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    void* out,
    float* logsumexp) {
  const uint32_t parts = std::max(1u, (p.kv_tokens + kKeysPerPart - 1) / kKeysPerPart);
  const size_t rows = size_t{p.q_tokens} * p.q_heads;
  FewQueries f = {p, q, k, v, segment_start, parts, {}, {}};
  f.states.resize(rows * parts);
  f.accs.resize(rows * parts * p.head_dim);
  parallel_for(size_t{p.q_tokens} * p.kv_heads * parts, [&](size_t task) {
    const size_t part = task % parts, rest = task / parts;
    attend_part(
        f,
        static_cast<uint32_t>(rest / p.kv_heads),
        static_cast<uint32_t>(rest % p.kv_heads),
        static_cast<uint32_t>(part));
  });
  for (size_t row = 0; row < rows; ++row) {
    const size_t query = row / p.q_heads, head = row % p.q_heads;
    const float lse = combine_attention(
        p.head_dim,
        parts,
        f.states.data() + row * parts,
        1,
        f.accs.data() + row * parts * p.head_dim,
        p.head_dim,
        p.dtype,
        offset(out, query * p.o_stride + head * p.head_dim, p.dtype));
    if (logsumexp != nullptr) logsumexp[head * p.q_tokens + query] = lse;
  }
}

// ---- Backward: units that share no key ----

// Consecutive query blocks [begin, end) whose keys [first, last) no other unit touches.
struct Unit {
  size_t begin, end;
  uint32_t first, last;
};

std::vector<Unit> independent_units(const std::vector<QueryBlock>& blocks) {
  std::vector<Unit> units;
  for (size_t i = 0; i < blocks.size(); ++i) {
    Unit unit = {i, i + 1, blocks[i].key_begin, blocks[i].key_end};
    if (unit.first >= unit.last) unit.first = unit.last = units.empty() ? 0 : units.back().last;
    while (!units.empty() && unit.first < units.back().last) {
      unit.begin = units.back().begin;
      unit.first = std::min(unit.first, units.back().first);
      unit.last = std::max(unit.last, units.back().last);
      units.pop_back();
    }
    units.push_back(unit);
  }
  return units;
}

struct Backward {
  const AttentionParams& p;
  const AttentionTiles& tiles;
  const void *q, *k, *v, *out;
  const float* logsumexp;
  const void* dout;
  void *dq, *dk, *dv;
  std::vector<QueryBlock> blocks;
  std::vector<Unit> units;
  std::vector<bool> covered;                // keys that some unit writes
  size_t head_floats;                       // of dk (and of dv) of one query head
  std::unique_ptr<float[]> dk_sum, dv_sum;  // [query head of the round, kv_tokens, padded]
};

void run_unit(Backward& b, const Unit& unit, uint32_t head, uint32_t slot) {
  const AttentionParams& p = b.p;
  const size_t padded = b.tiles.padded_dim(p.head_dim), dim_at = size_t{head} * p.head_dim;
  const AttentionHeadGradient gradient = {
      .out = offset(b.out, dim_at, p.dtype),
      .dout = offset(b.dout, dim_at, p.dtype),
      .logsumexp = b.logsumexp + size_t{head} * p.q_tokens,
      .dq = offset(b.dq, dim_at, p.dtype),
      .dk = b.dk_sum.get() + slot * b.head_floats,
      .dv = b.dv_sum.get() + slot * b.head_floats};
  const size_t first = unit.first * padded, count = (unit.last - unit.first) * padded;
  std::fill_n(gradient.dk + first, count, 0.0f);
  std::fill_n(gradient.dv + first, count, 0.0f);
  const Scratch scratch = allocate(b.tiles.scratch_bytes(p));
  const AttentionHead h = head_of(p, head, b.q, b.k, b.v);
  for (size_t i = unit.begin; i < unit.end; ++i) {
    b.tiles.backward(h, gradient, b.blocks[i], scratch.get());
  }
}

// dk and dv of one key: the sums of the kv head's query heads, in order.
void write_key(const Backward& b, uint32_t kv_head, uint32_t first_slot, uint32_t key) {
  const AttentionParams& p = b.p;
  const uint32_t group = p.q_heads / p.kv_heads;
  const size_t at = first_slot * b.head_floats + size_t{key} * b.tiles.padded_dim(p.head_dim);
  char* dk = offset(b.dk, key * p.k_stride + size_t{kv_head} * p.head_dim, p.dtype);
  char* dv = offset(b.dv, key * p.v_stride + size_t{kv_head} * p.head_dim, p.dtype);
  if (!b.covered[key]) {
    std::fill_n(dk, p.head_dim * element_bytes(p.dtype), char{0});
    std::fill_n(dv, p.head_dim * element_bytes(p.dtype), char{0});
    return;
  }
  const float *dk_sum = b.dk_sum.get() + at, *dv_sum = b.dv_sum.get() + at;
  b.tiles.sum_heads(group, p.head_dim, dk_sum, b.head_floats, p.scale, p.dtype, dk);
  b.tiles.sum_heads(group, p.head_dim, dv_sum, b.head_floats, 1.0f, p.dtype, dv);
}

// All query heads of kv heads [begin, end).
void run_round(Backward& b, uint32_t begin, uint32_t end) {
  const uint32_t group = b.p.q_heads / b.p.kv_heads, heads = (end - begin) * group;
  parallel_for(size_t{heads} * b.units.size(), [&](size_t task) {
    const uint32_t slot = static_cast<uint32_t>(task % heads);
    // The last units first: with one segment or equal ones the order is free, else late is long.
    run_unit(b, b.units[b.units.size() - 1 - task / heads], begin * group + slot, slot);
  });
  const size_t key_blocks = (b.p.kv_tokens + kAttentionBlock - 1) / kAttentionBlock;
  parallel_for(key_blocks * (end - begin), [&](size_t task) {
    const uint32_t kv = static_cast<uint32_t>(task % (end - begin));
    const uint32_t first = static_cast<uint32_t>(task / (end - begin)) * kAttentionBlock;
    const uint32_t last = std::min(b.p.kv_tokens, first + kAttentionBlock);
    for (uint32_t key = first; key < last; ++key) write_key(b, begin + kv, kv * group, key);
  });
}

}  // namespace

void attention_forward(
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    void* out,
    float* logsumexp) {
  if (p.q_tokens == 0 || p.q_heads == 0) return;
  if (p.q_tokens <= kFewQueries) return forward_few(p, q, k, v, segment_start, out, logsumexp);
  const AttentionTiles& tiles = attention_tiles();
  const std::vector<QueryBlock> blocks = cut_queries(p, segment_start);
  parallel_for(blocks.size() * p.q_heads, [&](size_t task) {
    const uint32_t head = static_cast<uint32_t>(task % p.q_heads);
    // Late queries see the most keys: the longest tasks start first.
    const QueryBlock& block = blocks[blocks.size() - 1 - task / p.q_heads];
    const Scratch scratch = allocate(tiles.scratch_bytes(p));
    tiles.forward(
        head_of(p, head, q, k, v),
        block,
        offset(out, size_t{head} * p.head_dim, p.dtype),
        logsumexp == nullptr ? nullptr : logsumexp + size_t{head} * p.q_tokens,
        scratch.get());
  });
}

void attention_backward(
    const AttentionParams& p,
    const void* q,
    const void* k,
    const void* v,
    const int32_t* segment_start,
    const void* out,
    const float* logsumexp,
    const void* dout,
    void* dq,
    void* dk,
    void* dv) {
  if (p.q_heads == 0 || p.kv_heads == 0) return;
  const AttentionTiles& tiles = attention_tiles();
  Backward b = {p, tiles, q, k, v, out, logsumexp, dout, dq, dk, dv, {}, {}, {}, 0, {}, {}};
  b.blocks = cut_queries(p, segment_start);
  b.units = independent_units(b.blocks);
  b.covered.resize(p.kv_tokens);
  for (const Unit& unit : b.units) {
    std::fill(b.covered.begin() + unit.first, b.covered.begin() + unit.last, true);
  }
  b.head_floats = size_t{p.kv_tokens} * tiles.padded_dim(p.head_dim);
  const uint32_t group = p.q_heads / p.kv_heads;
  const size_t kv_head_bytes = std::max<size_t>(1, 2 * b.head_floats * group * sizeof(float));
  const uint32_t kv_heads_a_round =
      static_cast<uint32_t>(std::clamp<size_t>(kGradientBytes / kv_head_bytes, 1, p.kv_heads));
  b.dk_sum = std::make_unique_for_overwrite<float[]>(kv_heads_a_round * group * b.head_floats);
  b.dv_sum = std::make_unique_for_overwrite<float[]>(kv_heads_a_round * group * b.head_floats);
  for (uint32_t kv = 0; kv < p.kv_heads; kv += kv_heads_a_round) {
    run_round(b, kv, std::min(p.kv_heads, kv + kv_heads_a_round));
  }
}

}  // namespace metal_lora::cpu
