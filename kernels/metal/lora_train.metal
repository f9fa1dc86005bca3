// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Training. dA [rank, k] = scale·vᵀ·drop(x) and dB [n, rank] = scale·dyᵀ·u in one dispatch (v =
// dy·B and u = drop(x)·Aᵀ, f32, come out of dx and forward); the dropout generator that forward and
// backward share; AdamW over the flat buffer of all adapter tensors.
//
// lora_grad. Tile: RT ranks (8, 16 or 32) x 128 columns of x or dy; 8 simdgroups of 16 columns
// each, 16 tokens at a time through threadgroup memory (10.8 kB at RT = 32: three threadgroups fit
// in 32 kB). Matrices are f32: v and u keep their bits, x and dy are widened on the way. Tokens are
// added in order by the one threadgroup that owns an element: no atomics.
// Bytes, c = ⌈rank / RT⌉, x of b bytes: c·m·(k + n)·b + ⌈k/128⌉·m·rank·4 + ⌈n/128⌉·m·rank·4 read,
// (k + n)·rank·4 written: 4 bytes an output.
//
// Ladder (m = 128, n = k = 512, rank 16, f16; emulator's counters, bytes from device memory;
// unique: 0.28 MB, of which x and dy 0.26):
//   version                          x, dy     v, u      all      matrix operations
//   one thread an output             4.19 MB   8.39 MB   45.2x    0
//   tiles of RT x 128                0.26 MB   0.07 MB   1.18x    4096 (all multiply-adds)
// At rank 64 (two chunks of 32): x and dy 2.00x, v and u 4.00x.
//
// AdamW. One threadgroup of 256 threads takes up to 65,536 elements in one dispatch: gradients are
// read twice (norm, update), 32 bytes an element. More elements need every gradient's square before
// the first update and Metal has no barrier across threadgroups: two dispatches, 4 + 28 bytes an
// element and the partial sums again for each 4096 (at most 0.75 bytes an element). Order of sums:
// a thread's elements, lanes, simdgroups, then the same 256 partial sums in every threadgroup.
//
// Ladder (2^20 elements; bytes read beside param, grad, m and v):
//   factors read from h at each use   18.1 MB
//   factors in registers               2.1 MB (32 bytes a thread)

// @region dropout :
// The mask of an adapter's dropout, drawn from (seed, token, column) alone: forward and backward
// call it instead of storing a mask, in any order. Bit-equal to kernels/cpu: a 64-bit key for each
// token (splitmix64's finaliser, Steele et al., OOPSLA 2014), then a 32-bit mix of the column
// (MurmurHash3's finaliser) under that key.
namespace metal_lora {

inline ulong dropout_mix64(ulong x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
  return x ^ (x >> 31);
}

struct DropoutKey {
  uint add;
  uint flip;
};

// Once per token: two 64-bit mixes.
inline DropoutKey dropout_key(ulong seed, uint token) {
  const ulong key = dropout_mix64(dropout_mix64(seed + 0x9e3779b97f4a7c15ul) + ulong(token));
  DropoutKey out;
  out.add = uint(key);
  out.flip = uint(key >> 32);
  return out;
}

// Uniform in [0, 2³²).
inline uint dropout_hash(DropoutKey key, uint column) {
  uint h = column * 0x9e3779b9u + key.add;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ key.flip) ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// threshold = min(2³² - 1, p · 2³²).
inline bool dropout_keep(DropoutKey key, uint column, uint threshold) {
  return dropout_hash(key, column) >= threshold;
}

// Inverted dropout of one value: keep_scale = 1 / (1 - p), or 0 where p = 1.
inline float dropout_apply(
    DropoutKey key, uint column, uint threshold, float keep_scale, float value) {
  return dropout_keep(key, column, threshold) ? value * keep_scale : 0.0f;
}

}  // namespace metal_lora

// @region lora_gradient_tile : dropout tiles
namespace metal_lora {

constant constexpr uint kGradTokens = 16;    // tokens a step
constant constexpr uint kGradColumns = 128;  // 8 simdgroups of 16
constant constexpr uint kGradThreads = 256;

struct DropoutMask {
  ulong seed;
  uint threshold;
  float keep_scale;
};

// left(m, r) of a product over tokens: v or u as stored.
template <typename P>
struct StoredLeft {
  P values;
  uint rank;
  float at(uint m, uint r) const { return values[m * rank + r]; }
};

// The adapter's columns of the tokens' ids: A [rank, vocab]. Ids outside [0, vocab) count nothing.
template <typename P, typename Ids>
struct GatheredLeft {
  P a;
  Ids ids;
  uint vocab;
  float at(uint m, uint r) const {
    const uint id = uint(ids[m]);
    return id < vocab ? float(a[r * vocab + id]) : 0.0f;
  }
};

struct GradientOutput {
  device float* values;
  uint row_stride;     // between ranks
  uint column_stride;  // between columns
};

// out[r, c] = scale · Σ_m left(m, r) · right[m, c] for RT ranks from rank0 and 128 columns from
// column0. Tokens in order, 8 a matrix product; f32 matrices, so that v and u keep their bits.
template <int RT, bool DROP, typename Left, typename Right>
inline void gradient_tile(
    const Left left,
    Right right,
    const uint tokens,
    const uint columns,
    const uint rank,
    const uint rank0,
    const uint column0,
    const float scale,
    const DropoutMask mask,
    const GradientOutput out,
    threadgroup float* left_tile,   // [16][RT + 4]
    threadgroup float* right_tile,  // [16][132]
    const uint simd_id,
    const uint lane) {
  constexpr uint kLeftStride = RT + 4, kRightStride = kGradColumns + 4;
  const uint thread_id = simd_id * 32 + lane;
  simdgroup_matrix<float, 8, 8> acc[RT / 8][2];
  for (uint i = 0; i < RT / 8; ++i) {
    for (uint j = 0; j < 2; ++j) acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  const uint column = thread_id % kGradColumns, first_row = thread_id / kGradColumns;
  for (uint m0 = 0; m0 < tokens; m0 += kGradTokens) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_id; i < kGradTokens * RT; i += kGradThreads) {
      const uint m = i / RT, r = i % RT;
      const bool inside = m0 + m < tokens && rank0 + r < rank;
      left_tile[m * kLeftStride + r] = inside ? left.at(m0 + m, rank0 + r) : 0.0f;
    }
    // A token's key costs two 64-bit mixes: each lane makes one and passes it on.
    DropoutKey own;
    if (DROP) own = dropout_key(mask.seed, m0 + (lane % kGradTokens));
    for (uint m = first_row; m < kGradTokens; m += kGradThreads / kGradColumns) {
      float value = 0.0f;
      if (m0 + m < tokens && column0 + column < columns) {
        value = float(right[(m0 + m) * columns + column0 + column]);
      }
      if (DROP) {
        DropoutKey key;
        key.add = simd_shuffle(own.add, ushort(m));
        key.flip = simd_shuffle(own.flip, ushort(m));
        value = dropout_apply(key, column0 + column, mask.threshold, mask.keep_scale, value);
      }
      right_tile[m * kRightStride + column] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint m = 0; m < kGradTokens; m += 8) {
      simdgroup_matrix<float, 8, 8> a, b[2];
      for (uint j = 0; j < 2; ++j) {
        simdgroup_load(b[j], right_tile + m * kRightStride + simd_id * 16 + j * 8, kRightStride);
      }
      for (uint i = 0; i < RT / 8; ++i) {
        simdgroup_load(a, left_tile + m * kLeftStride + i * 8, kLeftStride, ulong2(0, 0), true);
        for (uint j = 0; j < 2; ++j) simdgroup_multiply_accumulate(acc[i][j], a, b[j], acc[i][j]);
      }
    }
  }
  for (uint i = 0; i < RT / 8; ++i) {
    const uint r = rank0 + i * 8 + fragment_row(lane);
    for (uint j = 0; j < 2; ++j) {
      const uint c = column0 + simd_id * 16 + j * 8 + fragment_column(lane);
      for (uint e = 0; e < 2; ++e) {
        if (r < rank && c + e < columns) {
          out.values[r * out.row_stride + (c + e) * out.column_stride] =
              scale * acc[i][j].thread_elements()[e];
        }
      }
    }
  }
}

}  // namespace metal_lora

// @region lora_grad : lora_gradient_tile
namespace metal_lora {

// Threadgroups [0, ⌈k/128⌉) of x make dA's columns, the others dB's; y counts chunks of RT ranks.
// p: scale, dropout threshold, keep_scale, seed (low, high).
template <int RT, bool DROP, typename X, typename V, typename G, typename U, typename P>
inline void lora_grad(
    X x,
    V v,
    G dy,
    U u,
    P p,
    const uint tokens,
    const uint k,
    const uint n,
    const uint rank,
    device float* da,
    device float* db,
    threadgroup float* left_tile,
    threadgroup float* right_tile,
    const uint3 group,
    const uint simd_id,
    const uint lane) {
  const float scale = as_type<float>(p[0]);
  const uint tiles = (k + kGradColumns - 1) / kGradColumns, rank0 = group.y * RT;
  DropoutMask mask;
  mask.seed = ulong(p[3]) | (ulong(p[4]) << 32);
  mask.threshold = p[1];
  mask.keep_scale = as_type<float>(p[2]);
  GradientOutput out;
  if (group.x < tiles) {
    StoredLeft<V> left;
    left.values = v;
    left.rank = rank;
    out.values = da;
    out.row_stride = k;
    out.column_stride = 1;
    gradient_tile<RT, DROP>(
        left,
        x,
        tokens,
        k,
        rank,
        rank0,
        group.x * kGradColumns,
        scale,
        mask,
        out,
        left_tile,
        right_tile,
        simd_id,
        lane);
  } else {
    StoredLeft<U> left;
    left.values = u;
    left.rank = rank;
    out.values = db;
    out.row_stride = 1;
    out.column_stride = rank;
    gradient_tile<RT, false>(
        left,
        dy,
        tokens,
        n,
        rank,
        rank0,
        (group.x - tiles) * kGradColumns,
        scale,
        mask,
        out,
        left_tile,
        right_tile,
        simd_id,
        lane);
  }
}

}  // namespace metal_lora

// @region adamw_norm :
// ‖g‖₂ in f32 without overflow or underflow (Blue, ACM TOMS 4, 1978): squares of large, middling
// and small values are summed apart, scaled by 2^∓70. Not finite exactly where a gradient is not
// finite or the norm itself exceeds f32.
namespace metal_lora {

constant constexpr uint kAdamThreads = 256;
constant constexpr float kTwo40 = 1.099511627776e12f;
constant constexpr float kTwo70 = 1.180591620717411303424e21f;
constant constexpr float kTwoMinus40 = 1.0f / kTwo40;
constant constexpr float kTwoMinus70 = 1.0f / kTwo70;

struct SquareSums {
  float large, middle, small;
};

template <typename G>
inline SquareSums sum_squares(G grad, const uint begin, const uint end, const uint thread_id) {
  SquareSums sums;
  sums.large = 0.0f;
  sums.middle = 0.0f;
  sums.small = 0.0f;
  for (uint i = begin + thread_id; i < end; i += kAdamThreads) {
    const float g = grad[i], size = fabs(g);
    if (size > kTwo40) {
      sums.large += (g * kTwoMinus70) * (g * kTwoMinus70);
    } else if (size < kTwoMinus40) {
      sums.small += (g * kTwo70) * (g * kTwo70);
    } else {
      sums.middle += g * g;  // NaN too
    }
  }
  return sums;
}

// The same sums in every thread: lanes, then simdgroups in order.
inline SquareSums reduce_squares(
    SquareSums sums, threadgroup float* scratch /* [24] */, const uint simd_id, const uint lane) {
  sums.large = simd_sum(sums.large);
  sums.middle = simd_sum(sums.middle);
  sums.small = simd_sum(sums.small);
  if (lane == 0) {
    scratch[simd_id * 3] = sums.large;
    scratch[simd_id * 3 + 1] = sums.middle;
    scratch[simd_id * 3 + 2] = sums.small;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sums.large = scratch[0];
  sums.middle = scratch[1];
  sums.small = scratch[2];
  for (uint s = 1; s < kAdamThreads / 32; ++s) {
    sums.large += scratch[s * 3];
    sums.middle += scratch[s * 3 + 1];
    sums.small += scratch[s * 3 + 2];
  }
  return sums;
}

inline float norm_of(SquareSums sums) {
  // != is true of NaN: it must not be lost.
  if (sums.large != 0.0f)
    return precise::sqrt(sums.large + sums.middle * kTwoMinus70 * kTwoMinus70) * kTwo70;
  if (sums.middle != 0.0f)
    return precise::sqrt(sums.middle + sums.small * kTwoMinus70 * kTwoMinus70);
  return precise::sqrt(sums.small) * kTwoMinus70;
}

// partial [threadgroups, 3]: each threadgroup's chunk of the gradients. p: count, chunk.
template <typename G, typename P>
inline void adamw_norm(
    G grad,
    P p,
    device float* partial,
    threadgroup float* scratch,
    const uint group,
    const uint simd_id,
    const uint lane) {
  const uint begin = group * p[1], end = min(p[0], begin + p[1]);
  const SquareSums sums =
      reduce_squares(sum_squares(grad, begin, end, simd_id * 32 + lane), scratch, simd_id, lane);
  if (simd_id == 0 && lane == 0) {
    partial[group * 3] = sums.large;
    partial[group * 3 + 1] = sums.middle;
    partial[group * 3 + 2] = sums.small;
  }
}

}  // namespace metal_lora

// @region adamw : adamw_norm
namespace metal_lora {

// h: grad_scale, clip_norm, beta1, beta2, keep, step_size, 1/√bias2, eps.
template <typename W, typename G, typename M, typename V, typename H>
inline void adamw_apply(
    W param,
    G grad,
    M m,
    V v,
    H h,
    const SquareSums sums,
    const uint begin,
    const uint end,
    device float* new_param,
    device float* new_m,
    device float* new_v,
    device float* grad_norm,
    device int* skipped,
    const uint group,
    const uint thread_id) {
  // Read once: the compiler must assume that the stores below change what h points to.
  const float grad_scale = h[0], clip_norm = h[1], beta1 = h[2], beta2 = h[3];
  const float keep = h[4], step_size = h[5], inv_sqrt_bias2 = h[6], eps = h[7];
  const float norm = norm_of(sums) * fabs(grad_scale);
  const bool finite = (as_type<uint>(norm) & 0x7f800000u) != 0x7f800000u;
  if (group == 0 && thread_id == 0) {
    grad_norm[0] = norm;
    skipped[0] = finite ? 0 : 1;
  }
  if (!finite) {
    for (uint i = begin + thread_id; i < end; i += kAdamThreads) {
      new_param[i] = param[i];
      new_m[i] = m[i];
      new_v[i] = v[i];
    }
    return;
  }
  const float clip = clip_norm > 0.0f ? min(1.0f, clip_norm / (norm + 1e-6f)) : 1.0f;
  const float factor = grad_scale * clip;
  const float rest1 = 1.0f - beta1, rest2 = 1.0f - beta2;
  for (uint i = begin + thread_id; i < end; i += kAdamThreads) {
    const float g = grad[i] * factor;
    const float mi = fma(beta1, m[i], rest1 * g);
    const float vi = fma(beta2, v[i], rest2 * g * g);
    const float direction = mi / fma(precise::sqrt(vi), inv_sqrt_bias2, eps);
    new_m[i] = mi;
    new_v[i] = vi;
    new_param[i] = fma(-step_size, direction, keep * param[i]);
  }
}

// One threadgroup: the norm, then the update. p: count.
template <typename W, typename G, typename M, typename V, typename H, typename P>
inline void adamw_single(
    W param,
    G grad,
    M m,
    V v,
    H h,
    P p,
    device float* new_param,
    device float* new_m,
    device float* new_v,
    device float* grad_norm,
    device int* skipped,
    threadgroup float* scratch,
    const uint simd_id,
    const uint lane) {
  const uint thread_id = simd_id * 32 + lane;
  const SquareSums sums =
      reduce_squares(sum_squares(grad, 0, p[0], thread_id), scratch, simd_id, lane);
  adamw_apply(
      param,
      grad,
      m,
      v,
      h,
      sums,
      0,
      p[0],
      new_param,
      new_m,
      new_v,
      grad_norm,
      skipped,
      0,
      thread_id);
}

// The update after adamw_norm: every threadgroup sums the same partials in the same order.
// p: count, chunk of a threadgroup, number of partials (at most 256).
template <typename W, typename G, typename M, typename V, typename S, typename H, typename P>
inline void adamw_update(
    W param,
    G grad,
    M m,
    V v,
    S partial,
    H h,
    P p,
    device float* new_param,
    device float* new_m,
    device float* new_v,
    device float* grad_norm,
    device int* skipped,
    threadgroup float* scratch,
    const uint group,
    const uint simd_id,
    const uint lane) {
  const uint thread_id = simd_id * 32 + lane;
  SquareSums sums;
  sums.large = thread_id < p[2] ? partial[thread_id * 3] : 0.0f;
  sums.middle = thread_id < p[2] ? partial[thread_id * 3 + 1] : 0.0f;
  sums.small = thread_id < p[2] ? partial[thread_id * 3 + 2] : 0.0f;
  sums = reduce_squares(sums, scratch, simd_id, lane);
  const uint begin = group * p[1];
  adamw_apply(
      param,
      grad,
      m,
      v,
      h,
      sums,
      begin,
      min(p[0], begin + p[1]),
      new_param,
      new_m,
      new_v,
      grad_norm,
      skipped,
      group,
      thread_id);
}

}  // namespace metal_lora
