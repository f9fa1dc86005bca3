// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// decode_layer against an f64 reference that carries, beside every value, the size of the error
// that f32 sums and roundings to the storage type may have made so far: a running error analysis
// that takes rounding errors as independent (Higham & Mary, "A new approach to probabilistic
// rounding error analysis", 2019: sums of n terms are off by λ·√n·eps·Σ|terms|, except with
// probability 2·exp(-λ²/2)). So the tolerances follow from the computation itself; λ = 8.
#include "kernels/cpu/decode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/gemv_convert.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {
namespace {

constexpr double kEps = 0x1p-24;
constexpr double kLambda = 8;

/// A value and the size of its error.
struct Bounded {
  double v = 0, e = 0;
};
using Row = std::vector<Bounded>;

Bounded rounded(Bounded a, DType dtype) {
  const double unit = dtype == DType::f32 ? kEps : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const double smallest = dtype == DType::f16 ? 0x1p-25 : 0.0;
  return {a.v, std::hypot(a.e, unit * std::fabs(a.v) + smallest)};
}

/// Σ a_i·w_i for w known up to weight_rounding·|w|; weight_size: what f32 adds up for each unit of
/// a_i beyond |w_i|.
Bounded dot(const Row& a, const double* w, double weight_size, double weight_rounding = 0) {
  Bounded sum;
  double size = 0, variance = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum.v += a[i].v * w[i];
    variance += a[i].e * a[i].e * w[i] * w[i];
    variance += std::pow(weight_rounding * a[i].v * w[i], 2);
    size += std::fabs(a[i].v) * (std::fabs(w[i]) + weight_size);
  }
  sum.e = std::hypot(std::sqrt(variance), std::sqrt(a.size() + 8.0) * kEps * size);
  return sum;
}

struct Shape {
  uint32_t dims = 64, q_heads = 6, kv_heads = 2, head_dim = 16, ffn = 96;
  bool bias = false, head_norms = false;
  uint32_t window = 0, rank = 0;
  WeightFormat format = WeightFormat::f32;
  WeightLayout layout = WeightLayout::row_major;
  DType lora_dtype = DType::f32;
  double weight_rounding = 0;  ///< of a packed NF4 weight's levels where products are bf16
};

/// A random linear in both worlds.
struct Linear {
  WeightView weight;
  std::vector<uint8_t> data, scales, biases, packed, a, b;
  std::vector<float> bias;
  std::vector<double> exact, a_exact, b_exact;
  double weight_size = 0;  // affine: |q·scale| and |bias| are added apart
  double weight_rounding = 0;
  LoraParams lora;
  uint32_t n = 0, k = 0;

  Linear(uint32_t rows, uint32_t columns, const Shape& s, std::mt19937& rng) : n(rows), k(columns) {
    std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(k)));
    std::vector<float> values(size_t{n} * k);
    for (float& v : values) v = normal(rng);
    make_weight(values, s);
    weight_rounding = s.weight_rounding;
    lora.rank = s.rank;
    lora.scale = 1.5f;
    lora.dtype = s.lora_dtype;
    fill(a, a_exact, size_t{s.rank} * k, s.lora_dtype, normal, rng);
    fill(b, b_exact, size_t{s.rank} * n, s.lora_dtype, normal, rng);
    if (s.bias) {
      for (uint32_t i = 0; i < n; ++i) bias.push_back(normal(rng));
    }
  }

  void make_weight(const std::vector<float>& values, const Shape& s) {
    WeightParams p;
    p.n = n;
    p.k = k;
    p.format = s.format;
    const bool nf4 = s.format == WeightFormat::nf4;
    p.group_size = nf4 ? 64 : 32;
    p.scales_dtype = nf4 ? DType::f32 : DType::f16;
    data.resize(values.size() * 4);
    scales.resize(values.size() / 16);
    biases.resize(values.size() / 16);
    if (s.format <= WeightFormat::bf16) {
      for (size_t i = 0; i < values.size(); ++i) {
        write_float(data.data(), static_cast<DType>(s.format), i, values[i]);
      }
    } else if (nf4) {
      quantize_nf4(p, values.data(), data.data(), scales.data(), nullptr);
    } else {
      quantize_affine(p, values.data(), data.data(), scales.data(), biases.data());
      for (float v : values) weight_size = std::max(weight_size, 3.0 * std::fabs(v));
    }
    weight = {p, data.data(), scales.data(), biases.data()};
    if (s.layout == WeightLayout::cpu_packed) {
      packed.resize(packed_weight_bytes(p));
      pack_weight(weight, packed.data());
      weight = {p, packed.data(), nullptr, nullptr};
      weight.params.layout = s.layout;
    }
    std::vector<float> rows(values.size());
    dequantize_rows(weight, 0, n, rows.data());
    exact.assign(rows.begin(), rows.end());
  }

  static void fill(
      std::vector<uint8_t>& bytes,
      std::vector<double>& values,
      size_t count,
      DType dtype,
      std::normal_distribution<float>& normal,
      std::mt19937& rng) {
    bytes.resize(count * 4 + 4);
    for (size_t i = 0; i < count; ++i) {
      write_float(bytes.data(), dtype, i, normal(rng));
      values.push_back(read_float(bytes.data(), dtype, i));
    }
  }

  LinearView view() const {
    return {weight, {lora, a.data(), b.data()}, bias.empty() ? nullptr : bias.data()};
  }

  Row apply(const Row& x) const {
    Row u, y;
    for (uint32_t j = 0; j < lora.rank; ++j) u.push_back(dot(x, &a_exact[size_t{j} * k], 0));
    for (uint32_t r = 0; r < n; ++r) {
      Bounded sum = dot(x, &exact[size_t{r} * k], weight_size, weight_rounding);
      if (lora.rank > 0) {
        const Bounded extra = dot(u, &b_exact[size_t{r} * lora.rank], 0);
        sum.v += lora.scale * extra.v;
        sum.e = std::hypot(sum.e, lora.scale * extra.e, 2 * kEps * std::fabs(extra.v));
      }
      const double offset = bias.empty() ? 0.0 : bias[r];
      sum.v += offset;
      sum.e = std::hypot(sum.e, 2 * kEps * (std::fabs(sum.v) + std::fabs(offset)));
      y.push_back(sum);
    }
    return y;
  }
};

Row norm_of(const Bounded* x, size_t count, const std::vector<float>& weight, DType dtype) {
  constexpr double kNormEps = 1e-5;
  double mean = kNormEps, variance = 0;
  const auto n = static_cast<double>(count);
  for (size_t i = 0; i < count; ++i) {
    mean += x[i].v * x[i].v / n;
    variance += std::pow(2 * x[i].v * x[i].e / n, 2);
  }
  const double root = std::sqrt(mean);
  // The root's relative error is half its argument's, plus sums, root, division.
  const double relative = std::hypot(std::sqrt(variance) / mean / 2, std::sqrt(n + 8) * kEps);
  Row y;
  for (size_t i = 0; i < count; ++i) {
    const double v = x[i].v / root * weight[i];
    const double e = std::hypot(weight[i] * x[i].e / root, v * relative, 4 * kEps * v);
    y.push_back(rounded({v, e}, dtype));
  }
  return y;
}

struct Model {
  Shape s;
  DType dtype;
  Linear q, k, v, o, gate, up, down;
  std::vector<float> input_norm, post_norm, q_norm, k_norm, cos_sin;

  Model(const Shape& shape, DType type, uint32_t position, uint32_t tokens, std::mt19937& rng)
      : s(shape),
        dtype(type),
        q(s.q_heads * s.head_dim, s.dims, s, rng),
        k(s.kv_heads * s.head_dim, s.dims, s, rng),
        v(s.kv_heads * s.head_dim, s.dims, s, rng),
        o(s.dims, s.q_heads * s.head_dim, s, rng),
        gate(s.ffn, s.dims, s, rng),
        up(s.ffn, s.dims, s, rng),
        down(s.dims, s.ffn, s, rng) {
    std::uniform_real_distribution<float> near_one(0.7f, 1.3f);
    const auto weights = [&](uint32_t count) {
      std::vector<float> w(count);
      for (float& value : w) value = near_one(rng);
      return w;
    };
    input_norm = weights(s.dims);
    post_norm = weights(s.dims);
    q_norm = weights(s.head_dim);
    k_norm = weights(s.head_dim);
    std::vector<int32_t> positions(tokens);
    for (uint32_t t = 0; t < tokens; ++t) positions[t] = static_cast<int32_t>(position + t);
    std::vector<float> inv_freq(s.head_dim / 2);
    for (size_t i = 0; i < inv_freq.size(); ++i) {
      inv_freq[i] = std::pow(100.0f, -2.0f * static_cast<float>(i) / s.head_dim);
    }
    cos_sin.resize(size_t{tokens} * s.head_dim);
    rope_table(tokens, s.head_dim, positions.data(), inv_freq.data(), 1.0f, cos_sin.data());
  }

  DecodeLayerView view() const {
    DecodeLayerView w;
    w.input_norm = input_norm.data();
    w.post_norm = post_norm.data();
    if (s.head_norms) w.q_norm = q_norm.data();
    if (s.head_norms) w.k_norm = k_norm.data();
    w.q = q.view();
    w.k = k.view();
    w.v = v.view();
    w.o = o.view();
    w.gate = gate.view();
    w.up = up.view();
    w.down = down.view();
    return w;
  }

  DecodeLayerParams params(uint32_t position, uint32_t tokens, uint32_t capacity) const {
    DecodeLayerParams p;
    p.tokens = tokens;
    p.dims = s.dims;
    p.q_heads = s.q_heads;
    p.kv_heads = s.kv_heads;
    p.head_dim = s.head_dim;
    p.ffn = s.ffn;
    p.position = position;
    p.kv_capacity = capacity;
    p.window = s.window;
    p.attention_scale = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    p.dtype = dtype;
    return p;
  }

  /// Norm (optional) and rotation of every head of one token.
  Row turn(const Row& x, const std::vector<float>& norm, uint32_t token) const {
    Row y;
    const uint32_t dim = s.head_dim, half = dim / 2;
    for (size_t head = 0; head < x.size(); head += dim) {
      Row h(x.begin() + static_cast<long>(head), x.begin() + static_cast<long>(head + dim));
      if (s.head_norms) h = norm_of(h.data(), dim, norm, DType::f32);
      for (uint32_t i = 0; i < dim; ++i) {
        const double c = cos_sin[size_t{token} * dim + i % half];
        const double sine = cos_sin[size_t{token} * dim + half + i % half];
        const Bounded a = h[i], b = h[(i + half) % dim];
        const double sign = i < half ? -1 : 1;
        const double size = std::fabs(a.v * c) + std::fabs(b.v * sine);
        const double e = std::hypot(c * a.e, sine * b.e, 2 * kEps * size);
        y.push_back({a.v * c + sign * b.v * sine, e});
      }
    }
    return y;
  }

  /// One head's attention over rows [from, to) of the cache.
  Row attend(
      const Bounded* query,
      const std::vector<Row>& keys,
      const std::vector<Row>& values,
      size_t from,
      size_t to,
      size_t at) const {
    const double scale = 1.0 / std::sqrt(static_cast<double>(s.head_dim));
    std::vector<double> weight;
    double worst = 0, greatest = -1e300, total = 0;
    for (size_t j = from; j < to; ++j) {
      double sum = 0, variance = 0, size = 0;
      for (uint32_t d = 0; d < s.head_dim; ++d) {
        const Bounded x = query[d], y = keys[j][at + d];
        sum += x.v * y.v;
        variance += x.e * x.e * y.v * y.v + x.v * x.v * y.e * y.e;
        size += std::fabs(x.v * y.v);
      }
      const double own = std::sqrt(s.head_dim + 8.0) * kEps * size;
      worst = std::max(worst, scale * std::hypot(std::sqrt(variance), own));
      weight.push_back(scale * sum);
      greatest = std::max(greatest, scale * sum);
    }
    for (double& w : weight) total += w = std::exp(w - greatest);
    // exp of an argument off by worst and, as it is rounded, by its own magnitude's eps, with 8
    // units of its own; the sums; the same again for the denominator.
    const auto count = static_cast<double>(to - from);
    const double own = (8 + std::fabs(greatest) + 2 * std::sqrt(count)) * kEps;
    const double relative = 2 * std::hypot(worst, own);
    Row out;
    for (uint32_t d = 0; d < s.head_dim; ++d) {
      Bounded y;
      for (size_t j = from; j < to; ++j) {
        const double w = weight[j - from] / total;
        const Bounded value = values[j][at + d];
        y.v += w * value.v;
        y.e = std::hypot(y.e, w * value.e, w * value.v * relative);
      }
      out.push_back(rounded(y, dtype));
    }
    return out;
  }

  /// One token through the layer; appends to keys and values.
  Row forward(
      const Row& x, uint32_t token, std::vector<Row>& keys, std::vector<Row>& values) const {
    const Row h = norm_of(x.data(), x.size(), input_norm, dtype);
    const Row queries = turn(q.apply(h), q_norm, token);
    Row key = turn(k.apply(h), k_norm, token), value = v.apply(h);
    for (Bounded& b : key) b = rounded(b, dtype);
    for (Bounded& b : value) b = rounded(b, dtype);
    keys.push_back(key);
    values.push_back(value);
    const size_t to = keys.size(), from = s.window > 0 && to > s.window ? to - s.window : 0;
    Row attended;
    for (uint32_t head = 0; head < s.q_heads; ++head) {
      const size_t at = size_t{head / (s.q_heads / s.kv_heads)} * s.head_dim;
      const Row part = attend(&queries[size_t{head} * s.head_dim], keys, values, from, to, at);
      attended.insert(attended.end(), part.begin(), part.end());
    }
    const Row middle = plus(x, o.apply(attended));
    const Row h2 = norm_of(middle.data(), middle.size(), post_norm, dtype);
    const Row g = gate.apply(h2), u = up.apply(h2);
    Row hidden;
    for (size_t i = 0; i < g.size(); ++i) {
      const double silu = g[i].v / (1 + std::exp(-g[i].v)), y = silu * u[i].v;
      // |d silu| ≤ 1.1; sigmoid and products have 16 units of their own.
      const double e = std::hypot(1.1 * g[i].e * u[i].v, silu * u[i].e, 16 * kEps * y);
      hidden.push_back(rounded({y, e}, dtype));
    }
    return plus(middle, down.apply(hidden));
  }

  static Row plus(const Row& a, const Row& b) {
    Row y;
    for (size_t i = 0; i < a.size(); ++i) {
      y.push_back(rounded({a[i].v + b[i].v, std::hypot(a[i].e, b[i].e)}, DType::f32));
    }
    return y;
  }
};

/// A cache with `filled` random rows, in both worlds.
struct Cache {
  std::vector<uint8_t> k, v;
  std::vector<Row> keys, values;

  Cache(uint32_t capacity, uint32_t filled, const Shape& s, DType dtype, std::mt19937& rng) {
    const size_t row = size_t{s.kv_heads} * s.head_dim;
    std::normal_distribution<float> normal;
    k.assign(capacity * row * dtype_bytes(dtype), 0xff);  // nan: a row read too early shows
    v = k;
    for (uint32_t t = 0; t < filled; ++t) {
      keys.emplace_back();
      values.emplace_back();
      for (size_t i = 0; i < row; ++i) {
        write_float(k.data(), dtype, t * row + i, normal(rng));
        write_float(v.data(), dtype, t * row + i, normal(rng));
        keys[t].push_back({read_float(k.data(), dtype, t * row + i), 0});
        values[t].push_back({read_float(v.data(), dtype, t * row + i), 0});
      }
    }
  }
};

class Decode : public testing::Test {
 protected:
  void TearDown() override { set_active_isa(detected_isa()); }
  std::mt19937 rng_{13};

  std::vector<float> random_x(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> x(count);
    for (float& v : x) v = normal(rng_);
    return x;
  }

  void check(const Shape& s, DType dtype, uint32_t position, uint32_t tokens) {
    const Model model(s, dtype, position, tokens, rng_);
    const uint32_t capacity = position + tokens + 1;
    const Cache start(capacity, position, s, dtype, rng_);
    const std::vector<float> x = random_x(size_t{tokens} * s.dims);
    Cache reference = start;
    std::vector<Row> want;
    for (uint32_t t = 0; t < tokens; ++t) {
      Row row;
      for (uint32_t d = 0; d < s.dims; ++d) row.push_back({x[size_t{t} * s.dims + d], 0});
      want.push_back(model.forward(row, t, reference.keys, reference.values));
    }
    for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
      if (!set_active_isa(isa)) continue;
      Cache cache = start;
      std::vector<float> y = x;
      decode_layer(
          model.params(position, tokens, capacity),
          model.view(),
          model.cos_sin.data(),
          y.data(),
          cache.k.data(),
          cache.v.data());
      double loosest = 0;
      for (uint32_t t = 0; t < tokens; ++t) {
        for (uint32_t d = 0; d < s.dims; ++d) {
          const Bounded w = want[t][d];
          ASSERT_NEAR(y[size_t{t} * s.dims + d], w.v, kLambda * w.e)
              << isa_name(isa) << " token " << t;
          loosest = std::max(loosest, kLambda * w.e);
        }
        const size_t row = size_t{s.kv_heads} * s.head_dim;
        for (size_t i = 0; i < row; ++i) {
          const size_t at = (position + t) * row + i;
          const Bounded key = reference.keys[position + t][i];
          const Bounded value = reference.values[position + t][i];
          ASSERT_NEAR(read_float(cache.k.data(), dtype, at), key.v, kLambda * key.e);
          ASSERT_NEAR(read_float(cache.v.data(), dtype, at), value.v, kLambda * value.e);
        }
      }
      // The tolerance must mean something: values are about 1.
      EXPECT_LT(loosest, dtype == DType::f32 ? 4e-3 : dtype == DType::f16 ? 0.1 : 0.8);
      const size_t untouched = (capacity - 1) * size_t{s.kv_heads} * s.head_dim;
      EXPECT_EQ(cache.k[untouched * dtype_bytes(dtype)], 0xff);
    }
  }
};

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

TEST_F(Decode, MatchesTheReference) {
  for (DType dtype : kDTypes) {
    for (uint32_t tokens : {1u, 2u, 5u, 8u}) {
      check(Shape{}, dtype, 3 * tokens, tokens);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(Decode, FirstTokenOfAll) {
  check(Shape{}, DType::f32, 0, 1);
}

TEST_F(Decode, AdaptersBiasesHeadNorms) {
  for (DType dtype : kDTypes) {
    for (uint32_t rank : {4u, 16u, 19u}) {
      Shape s;
      s.rank = rank;
      s.lora_dtype = kDTypes[rank % 3];
      s.bias = s.head_norms = true;
      check(s, dtype, 7, 3);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(Decode, QuantisedWeights) {
  for (DType dtype : kDTypes) {
    for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8}) {
      for (WeightLayout layout : {WeightLayout::row_major, WeightLayout::cpu_packed}) {
        Shape s;
        s.format = format;
        s.layout = layout;
        s.rank = 8;
        check(s, dtype, 4, 2);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(Decode, Nf4Weights) {
  for (DType dtype : kDTypes) {
    for (WeightLayout layout : {WeightLayout::row_major, WeightLayout::cpu_packed}) {
      Shape s;
      s.format = WeightFormat::nf4;
      s.layout = layout;
      s.q_heads = 8;
      s.ffn = 128;
      s.rank = 8;
      if (dtype == DType::bf16) s.weight_rounding = 0x1p-9;
      check(s, dtype, 4, 2);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(Decode, ManyKeysAcrossPartsAndWindows) {
  for (uint32_t window : {0u, 1u, 50u, 128u, 200u}) {
    Shape s;
    s.window = window;
    check(s, DType::f32, 125, 7);
    check(s, DType::bf16, 300, 2);
    if (HasFatalFailure()) return;
  }
}

TEST_F(Decode, OneHeadAndManyHeads) {
  Shape s;
  s.q_heads = s.kv_heads = 1;
  check(s, DType::f32, 5, 2);
  s.q_heads = 20;
  s.head_dim = 8;
  check(s, DType::f32, 5, 2);
}

/// Tokens one by one, all at once, with any number of threads, layer by layer or all layers in one
/// call: the same bits.
TEST_F(Decode, SameBitsHoweverItIsCalled) {
  const int threads = thread_count();
  Shape s;
  s.rank = 16;
  s.format = WeightFormat::int4;
  s.layout = WeightLayout::cpu_packed;
  const uint32_t position = 124, tokens = 8, capacity = 140;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (!set_active_isa(isa)) continue;
    for (DType dtype : kDTypes) {
      const Model first(s, dtype, position, tokens, rng_);
      const Model second(s, dtype, position, tokens, rng_);
      const DecodeLayerView layers[] = {first.view(), second.view()};
      const Cache start(capacity, position, s, dtype, rng_);
      const std::vector<float> x = random_x(size_t{tokens} * s.dims);
      std::vector<float> alone = x;
      Cache a = start, b = start;
      set_thread_count(1);
      for (uint32_t t = 0; t < tokens; ++t) {
        const DecodeLayerParams p = first.params(position + t, 1, capacity);
        const float* turn = first.cos_sin.data() + size_t{t} * s.head_dim;
        float* row = alone.data() + size_t{t} * s.dims;
        decode_layer(p, layers[0], turn, row, a.k.data(), a.v.data());
        decode_layer(p, layers[1], turn, row, b.k.data(), b.v.data());
      }
      for (int n : {1, 2, 4}) {
        set_thread_count(n);
        Cache c = start, d = start;
        std::vector<float> y = x;
        void* const keys[] = {c.k.data(), d.k.data()};
        void* const values[] = {c.v.data(), d.v.data()};
        decode_layers(
            first.params(position, tokens, capacity),
            layers,
            2,
            first.cos_sin.data(),
            y.data(),
            keys,
            values);
        ASSERT_EQ(std::memcmp(y.data(), alone.data(), y.size() * sizeof(float)), 0)
            << isa_name(isa) << " threads " << n;
        ASSERT_EQ(c.k, a.k);
        ASSERT_EQ(d.v, b.v);
      }
    }
  }
  set_thread_count(threads);
}

}  // namespace
}  // namespace metal_lora::cpu
