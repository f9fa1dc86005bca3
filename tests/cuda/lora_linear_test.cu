// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// LoRA linears on CUDA against the definition in f64, forward and backward. Errors of a value, per
// unit of Σ|products|, with e the roundoff of x's type (0 for f32):
//   an operand in another type than x is rounded to it: e; so are u and v on their way into the
//   product of a 16-bit call: e each;
//   a sum of k terms: (k + 8)·2^-23, since a matrix unit may truncate where FFMA rounds;
//   dA and dB of a 16-bit call split f32 operands in two bf16: 2^-16; in bf16 from 512 tokens on
//   they read u and v rounded to bf16: e.
// The result is rounded once to its own type.
#include <gtest/gtest.h>

#include "kernels/cuda/lora_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

struct BranchSpec {
  uint32_t n;
  WeightFormat format;
  uint32_t rank;
  float scale;
  float dropout = 0.0f;
  bool bias = false;
  bool residual = false;
  uint32_t group_size = 32;
  DType scales = DType::f32;
  bool double_quant = false;
};

struct Case {
  uint32_t m, k;
  DType dtype;
  DType adapter_dtype;
  std::vector<BranchSpec> branches;
  bool keeps_u = true;
  bool keeps_low = false;  ///< instead of u
};

std::string trace(const Case& c) {
  std::string s = "m=" + std::to_string(c.m) + " k=" + std::to_string(c.k) + " " +
                  name_of(c.dtype) + " adapters " + name_of(c.adapter_dtype);
  for (const BranchSpec& b : c.branches) {
    s += " [n " + std::to_string(b.n) + " format " +
         std::to_string(static_cast<uint32_t>(b.format)) + " rank " + std::to_string(b.rank) +
         (b.dropout > 0 ? " dropout]" : "]");
  }
  return s;
}

/// The mask's definition, written again: splitmix64 keys a token, MurmurHash3's finaliser mixes the
/// column.
double mask_at(const BranchSpec& b, uint64_t seed, uint32_t token, uint32_t column) {
  if (b.rank == 0 || b.dropout == 0.0f) return 1.0;
  const auto mix = [](uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  };
  const uint64_t key = mix(mix(seed + 0x9e3779b97f4a7c15ull) + token);
  uint32_t h = column * 0x9e3779b9u + static_cast<uint32_t>(key);
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ static_cast<uint32_t>(key >> 32)) ^ (h >> 13)) * 0xc2b2ae35u;
  h ^= h >> 16;
  return h >= static_cast<uint32_t>(double{b.dropout} * 4294967296.0) ? 1.0f / (1.0f - b.dropout)
                                                                      : 0.0;
}

/// Everything one branch reads and writes, on both sides.
struct Branch {
  BranchSpec spec;
  uint64_t seed = 0;
  Weight w;
  Array a, b, bias, residual, dy;
  std::unique_ptr<DeviceBuffer> data, scales, biases, da_in, db_in, bias_in, residual_in, dy_in;
  std::unique_ptr<DeviceBuffer> y, u, low, da, db;
};

std::unique_ptr<DeviceBuffer> upload(const Array& a) {
  return std::make_unique<DeviceBuffer>(a.bytes);
}

class Linear {
 public:
  explicit Linear(const Case& c) : c_(c) {
    std::mt19937 rng(c.m * 7919 + c.k);
    x_ = random_array(rng, c.dtype, size_t{c.m} * c.k);
    x_in_ = upload(x_);
    const size_t size = c.dtype == DType::f32 ? 4 : 2;
    for (const BranchSpec& s : c.branches) {
      Branch b;
      b.spec = s;
      b.w = random_weight(
          rng, s.format, s.n, c.k, s.group_size, s.scales, WeightLayout::row_major, s.double_quant);
      b.a = random_array(rng, c.adapter_dtype, size_t{s.rank} * c.k, 0.5);
      b.b = random_array(rng, c.adapter_dtype, size_t{s.n} * s.rank, 0.5);
      b.bias = random_array(rng, DType::f32, s.n);
      b.residual = random_array(rng, c.dtype, size_t{c.m} * s.n);
      b.dy = random_array(rng, c.dtype, size_t{c.m} * s.n);
      b.seed = rng();
      b.data = upload(b.w.data);
      b.scales = upload(b.w.scales);
      b.biases = upload(b.w.biases);
      b.da_in = upload(b.a);
      b.db_in = upload(b.b);
      b.bias_in = upload(b.bias);
      b.residual_in = upload(b.residual);
      b.dy_in = upload(b.dy);
      b.y = std::make_unique<DeviceBuffer>(size_t{c.m} * s.n * size);
      b.u = std::make_unique<DeviceBuffer>(size_t{c.m} * s.rank * 4);
      b.low = std::make_unique<DeviceBuffer>(size_t{c.m} * cuda::low_stride(s.rank) * size);
      b.da = std::make_unique<DeviceBuffer>(size_t{s.rank} * c.k * 4);
      b.db = std::make_unique<DeviceBuffer>(size_t{s.n} * s.rank * 4);
      branches_.push_back(std::move(b));
    }
    dx_ = std::make_unique<DeviceBuffer>(size_t{c.m} * c.k * size);
  }

  std::vector<cuda::LoraBranch> views() const {
    std::vector<cuda::LoraBranch> out;
    for (const Branch& b : branches_) {
      cuda::LoraBranch v;
      v.weight = {b.w.params, b.data->get(), b.scales->get(), b.biases->get()};
      v.lora = {
          {b.spec.rank, b.spec.scale, c_.adapter_dtype, b.spec.dropout, b.seed},
          b.da_in->get(),
          b.db_in->get()};
      v.bias = b.spec.bias ? b.bias_in->get<float>() : nullptr;
      v.residual = b.spec.residual ? b.residual_in->get() : nullptr;
      v.y = b.y->get();
      v.dy = b.dy_in->get();
      if (c_.keeps_low) {
        v.low = b.low->get();
      } else {
        v.u = c_.keeps_u ? b.u->get<float>() : nullptr;
        v.u_saved = b.u->get<float>();
      }
      v.da = b.da->get<float>();
      v.db = b.db->get<float>();
      out.push_back(v);
    }
    return out;
  }

  void forward(bool weights_ready = false) {
    const auto v = views();
    cuda::Context context = device_.context();
    context.weights_ready = weights_ready;
    cuda::lora_linear_forward(context, c_.m, c_.k, c_.dtype, x_in_->get(), v.data(), v.size());
    device_.finish();
  }
  void backward() {
    const auto v = views();
    cuda::lora_linear_backward(
        device_.context(), c_.m, c_.k, c_.dtype, x_in_->get(), v.data(), v.size(), dx_->get());
    device_.finish();
  }

  /// All that was written, as bytes; then poisoned.
  std::vector<std::vector<unsigned char>> take_results() {
    std::vector<std::vector<unsigned char>> all;
    const auto take = [&](DeviceBuffer& b) {
      all.push_back(b.download<unsigned char>());
      b.poison();
    };
    take(*dx_);
    for (Branch& b : branches_) {
      for (DeviceBuffer* buffer : {b.y.get(), b.u.get(), b.low.get(), b.da.get(), b.db.get()}) {
        take(*buffer);
      }
    }
    return all;
  }

  void check_forward() const {
    for (const Branch& b : branches_) check_forward(b);
  }
  void check_backward() const {
    check_dx();
    for (const Branch& b : branches_) {
      if (b.spec.rank != 0) check_adapter_gradients(b);
    }
  }

  std::vector<Branch>& branches() { return branches_; }
  DeviceBuffer& dx() { return *dx_; }
  const void* x() const { return x_in_->get(); }
  TestDevice& device() { return device_; }

 private:
  double e() const { return c_.dtype == DType::f32 ? 0.0 : roundoff(c_.dtype); }
  double adapter_e() const {
    return c_.adapter_dtype == c_.dtype ? 0.0 : c_.dtype == DType::f32 ? 0.0 : roundoff(c_.dtype);
  }
  double weight_e(const Branch& b) const {
    return b.spec.format == static_cast<WeightFormat>(c_.dtype) ? 0.0 : e();
  }
  static double sum_e(size_t k) { return (static_cast<double>(k) + 8) * 0x1p-23; }
  /// f16 ends at 2^-24: an absolute error of u and v times the other operand.
  double tiny(const Branch& b) const {
    return c_.dtype == DType::f16 ? (b.spec.rank + 1) * 0x1p-23 : 1e-30;
  }

  std::vector<double> dropped_x(const Branch& b) const {
    std::vector<double> d = x_.values;
    for (uint32_t t = 0; t < c_.m; ++t) {
      for (uint32_t i = 0; i < c_.k; ++i) d[size_t{t} * c_.k + i] *= mask_at(b.spec, b.seed, t, i);
    }
    return d;
  }

  void check_forward(const Branch& b) const {
    const size_t m = c_.m, n = b.spec.n, k = c_.k, r = b.spec.rank;
    const auto d = dropped_x(b);
    const Sums base = multiply(
        m,
        n,
        k,
        [&](size_t i, size_t p) { return x_.values[i * k + p]; },
        [&](size_t p, size_t j) { return b.w.values[j * k + p]; });
    const Sums u = multiply(
        m,
        r,
        k,
        [&](size_t i, size_t p) { return d[i * k + p]; },
        [&](size_t p, size_t j) { return b.a.values[j * k + p]; });
    const Sums adapter = multiply(
        m,
        n,
        r,
        [&](size_t i, size_t p) { return u.value[i * r + p]; },
        [&](size_t p, size_t j) { return b.b.values[j * r + p]; });
    const Sums adapter_size = multiply(
        m,
        n,
        r,
        [&](size_t i, size_t p) { return u.magnitude[i * r + p]; },
        [&](size_t p, size_t j) { return std::fabs(b.b.values[j * r + p]); });
    if (c_.keeps_low) {
      const auto got = b.low->download<unsigned char>();
      for (size_t i = 0; i < m * r; ++i) {
        const double want = b.spec.scale * u.value[i];
        const double error = std::fabs(b.spec.scale) * u.magnitude[i] * (adapter_e() + sum_e(k));
        const double bound = error + (std::fabs(want) + error) * roundoff(c_.dtype) + 1e-30;
        const size_t at = i / r * cuda::low_stride(b.spec.rank) + i % r;
        ASSERT_NEAR(stored_value(got.data(), c_.dtype, at), want, bound) << "low " << i;
      }
    } else if (c_.keeps_u) {
      const auto got = b.u->download<float>();
      for (size_t i = 0; i < m * r; ++i) {
        const double bound = u.magnitude[i] * (adapter_e() + sum_e(k)) + 1e-30;
        ASSERT_NEAR(got[i], u.value[i], bound) << "u " << i;
      }
    }
    const auto y = b.y->download<unsigned char>();
    for (size_t i = 0; i < m * n; ++i) {
      const double extra =
          (b.spec.bias ? b.bias.values[i % n] : 0) + (b.spec.residual ? b.residual.values[i] : 0);
      const double want = base.value[i] + b.spec.scale * adapter.value[i] + extra;
      const double error = base.magnitude[i] * (weight_e(b) + sum_e(k + r)) +
                           std::fabs(b.spec.scale) * adapter_size.magnitude[i] *
                               (2.1 * adapter_e() + 1.1 * e() + sum_e(k + r)) +
                           std::fabs(extra) * 0x1p-22 + tiny(b);
      const double bound = error + (std::fabs(want) + error) * roundoff(c_.dtype) + 0x1p-24;
      ASSERT_NEAR(stored_value(y.data(), c_.dtype, i), want, bound) << "y " << i;
    }
  }

  /// scale·dy·B and the same of absolute values.
  Sums v_of(const Branch& b) const {
    const size_t n = b.spec.n, r = b.spec.rank;
    Sums v = multiply(
        c_.m,
        r,
        n,
        [&](size_t i, size_t p) { return b.dy.values[i * n + p]; },
        [&](size_t p, size_t j) { return b.b.values[p * r + j]; });
    for (double& t : v.value) t *= b.spec.scale;
    for (double& t : v.magnitude) t *= std::fabs(b.spec.scale);
    return v;
  }

  size_t total_k() const {
    size_t total = 0;
    for (const Branch& b : branches_) total += b.spec.n + b.spec.rank;
    return total;
  }

  void check_dx() const {
    const size_t m = c_.m, k = c_.k;
    std::vector<double> want(m * k), error(m * k);
    for (const Branch& b : branches_) {
      const size_t n = b.spec.n, r = b.spec.rank;
      const Sums base = multiply(
          m,
          k,
          n,
          [&](size_t i, size_t p) { return b.dy.values[i * n + p]; },
          [&](size_t p, size_t j) { return b.w.values[p * k + j]; });
      const Sums v = v_of(b);
      const Sums adapter = multiply(
          m,
          k,
          r,
          [&](size_t i, size_t p) { return v.value[i * r + p]; },
          [&](size_t p, size_t j) { return b.a.values[p * k + j]; });
      const Sums size = multiply(
          m,
          k,
          r,
          [&](size_t i, size_t p) { return v.magnitude[i * r + p]; },
          [&](size_t p, size_t j) { return std::fabs(b.a.values[p * k + j]); });
      for (size_t i = 0; i < m * k; ++i) {
        const double mask =
            mask_at(b.spec, b.seed, static_cast<uint32_t>(i / k), static_cast<uint32_t>(i % k));
        want[i] += base.value[i] + mask * adapter.value[i];
        error[i] +=
            base.magnitude[i] * (weight_e(b) + sum_e(total_k())) +
            mask * size.magnitude[i] * (2.1 * adapter_e() + 1.1 * e() + sum_e(n + total_k())) +
            tiny(b);
      }
    }
    const auto dx = dx_->download<unsigned char>();
    for (size_t i = 0; i < m * k; ++i) {
      const double bound =
          error[i] + (std::fabs(want[i]) + error[i]) * roundoff(c_.dtype) + 0x1p-24;
      ASSERT_NEAR(stored_value(dx.data(), c_.dtype, i), want[i], bound) << "dx " << i;
    }
  }

  /// As the forward pass left it.
  std::vector<double> scaled_u(const Branch& b) const {
    std::vector<double> u(size_t{c_.m} * b.spec.rank);
    const auto low = b.low->download<unsigned char>();
    const auto plain = b.u->download<float>();
    for (size_t i = 0; i < u.size(); ++i) {
      const size_t at = i / b.spec.rank * cuda::low_stride(b.spec.rank) + i % b.spec.rank;
      u[i] =
          c_.keeps_low ? stored_value(low.data(), c_.dtype, at) : b.spec.scale * double{plain[i]};
    }
    return u;
  }

  void check_adapter_gradients(const Branch& b) const {
    const size_t m = c_.m, n = b.spec.n, k = c_.k, r = b.spec.rank;
    const bool narrow = c_.dtype == DType::bf16 && c_.m >= cuda::kNarrowTokens;
    const double split = c_.dtype == DType::f32 ? 0.0 : narrow ? 1.1 * e() : 0x1p-16;
    const auto d = dropped_x(b);
    const Sums v = v_of(b);
    const Sums da = multiply(
        r,
        k,
        m,
        [&](size_t j, size_t t) { return v.value[t * r + j]; },
        [&](size_t t, size_t p) { return d[t * k + p]; });
    const Sums da_size = multiply(
        r,
        k,
        m,
        [&](size_t j, size_t t) { return v.magnitude[t * r + j]; },
        [&](size_t t, size_t p) { return std::fabs(d[t * k + p]); });
    const auto got_da = b.da->download<float>();
    for (size_t i = 0; i < r * k; ++i) {
      const double bound = da_size.magnitude[i] * (adapter_e() + split + sum_e(m + n)) + 1e-30;
      ASSERT_NEAR(got_da[i], da.value[i], bound) << "dA " << i;
    }
    // u_saved and low are inputs here: their own error is the forward pass's.
    const std::vector<double> u = scaled_u(b);
    const Sums db = multiply(
        n,
        r,
        m,
        [&](size_t j, size_t t) { return b.dy.values[t * n + j]; },
        [&](size_t t, size_t q) { return u[t * r + q]; });
    const double u_split = c_.keeps_low ? 0.0 : split;
    const auto got_db = b.db->download<float>();
    for (size_t i = 0; i < n * r; ++i) {
      const double bound = db.magnitude[i] * (u_split + sum_e(m)) + 1e-30;
      ASSERT_NEAR(got_db[i], db.value[i], bound) << "dB " << i;
    }
  }

  const Case c_;
  TestDevice device_;
  Array x_;
  std::unique_ptr<DeviceBuffer> x_in_, dx_;
  std::vector<Branch> branches_;
};

void add_odd_cases(DType d, std::vector<Case>& list) {
  using enum WeightFormat;
  using D = DType;
  const auto own = static_cast<WeightFormat>(d);
  list.push_back({9, 31, d, D::f32, {{33, f32, 0, 0.0f}}});
  list.push_back({2, 33, d, D::f32, {{31, bf16, 3, 0.5f, 0.25f, true}}});
  list.push_back({33, 64, d, d, {{64, f16, 8, 2.0f, 0, true, true}}});
  list.push_back({31, 1, d, D::f32, {{1, f32, 1, 1.5f}}});
  list.push_back({15, 4097, d, d, {{17, own, 16, 1.0f, 0, true}}});
  list.push_back(
      {130,
       160,
       d,
       D::f32,
       {{33, int4, 8, 0.7f, 0, false, true},
        {31, int8, 17, -1.5f, 0.1f, true, false, 32, D::bf16},
        {16, int4, 0, 0.0f, 0, false, false, 32, D::f16},
        {48, bf16, 5, 1.0f}}});
  list.push_back(
      {21,
       320,
       d,
       D::f32,
       {{64, nf4, 8, 0.7f, 0, true, false, 64},
        {37, nf4, 5, -1.0f, 0, false, true, 64},
        {33, nf4, 0, 0.0f, 0, false, false, 64, D::f32, true}}});
}

/// Shapes in multiples of 8, which the fast forms take.
void add_even_cases(DType d, std::vector<Case>& list) {
  using enum WeightFormat;
  using D = DType;
  const auto own = static_cast<WeightFormat>(d);
  list.push_back(
      {40,
       192,
       d,
       D::bf16,
       {{80, int8, 4, 2.0f, 0.5f, false, true, 64},
        {96, int4, 20, 2.0f, 0, false, false, 64, D::bf16}}});
  for (uint32_t rank : {1u, 8u, 16u, 64u}) {
    list.push_back({72, 128, d, rank == 16 ? D::f32 : d, {{136, own, rank, 2.0f, 0, true}}});
    list.push_back(
        {136,
         256,
         d,
         rank == 8 ? D::f32 : d,
         {{128, own, rank, 0.5f},
          {64, int4, rank, 1.5f, 0, true, false, 64, D::f16},
          {64, nf4, rank, -1.0f, 0, false, true, 64, D::f32, true}}});
  }
  list.push_back({1030, 72, d, d, {{40, own, 8, 1.5f}, {24, own, 3, 0.5f, 0.2f, true}}});
  list.push_back({257, 136, d, d, {{200, own, 16, 1.0f, 0.3f}, {72, own, 8, 1.0f, 0.1f, true}}});
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = [] {
    std::vector<Case> list;
    for (DType d : {DType::f32, DType::f16, DType::bf16}) {
      add_odd_cases(d, list);
      add_even_cases(d, list);
    }
    return list;
  }();
  return all;
}

/// Both ways of a case against f64, and the same bits a second time.
void match_f64_and_repeat(const Case& c) {
  SCOPED_TRACE(trace(c));
  Linear linear(c);
  linear.forward();
  linear.check_forward();
  linear.backward();
  linear.check_backward();
  if (::testing::Test::HasFatalFailure()) return;
  const auto first = linear.take_results();
  linear.forward();
  linear.backward();
  ASSERT_EQ(linear.take_results(), first) << "not the same bits again";
}

TEST(CudaLoraLinear, ForwardAndBackwardMatchF64AndRepeat) {
  METAL_LORA_NEEDS_GPU();
  for (const Case& c : cases()) {
    match_f64_and_repeat(c);
    if (HasFatalFailure()) return;
  }
}

/// On Hopper a product of many tiles makes u (or v) itself.
TEST(CudaLoraLinear, LargeProductsMatchF64AndRepeat) {
  METAL_LORA_NEEDS_GPU();
  const auto bf16 = WeightFormat::bf16;
  for (const Case& c :
       {Case{2056, 64, DType::bf16, DType::bf16, {{4360, bf16, 8, 1.5f, 0, true}}},
        Case{2056, 4360, DType::bf16, DType::bf16, {{40, bf16, 3, 0.5f}, {24, bf16, 8, 1.5f}}},
        Case{2056, 4360, DType::bf16, DType::bf16, {{128, bf16, 8, -1.5f}}},
        Case{2056, 4360, DType::bf16, DType::bf16, {{384, bf16, 8, 0.5f}, {40, bf16, 8, 1.5f}}},
        Case{1928, 72, DType::bf16, DType::bf16, {{2504, bf16, 5, 0.5f}, {2504, bf16, 8, 1.5f}}}}) {
    match_f64_and_repeat(c);
    if (HasFatalFailure()) return;
  }
}

/// u as the products read it goes from one direction to the other: made inside a product, by a
/// kernel ahead, from a dropped x, behind codes of W.
TEST(CudaLoraLinear, KeepsScaledUBetweenItsDirections) {
  METAL_LORA_NEEDS_GPU();
  const auto bf16 = WeightFormat::bf16, int4 = WeightFormat::int4;
  for (Case c :
       {Case{2056, 64, DType::bf16, DType::bf16, {{4360, bf16, 8, 1.5f, 0, true}}},
        Case{1928, 72, DType::bf16, DType::bf16, {{2504, bf16, 16, 0.5f}, {2504, bf16, 5, 1.5f}}},
        Case{512, 136, DType::bf16, DType::f32, {{72, bf16, 64, -1.5f}, {40, bf16, 0, 0.0f}}},
        Case{520, 72, DType::bf16, DType::bf16, {{40, bf16, 8, 1.5f, 0.3f}, {24, bf16, 16, 0.5f}}},
        Case{1000, 128, DType::bf16, DType::bf16, {{264, bf16, 64, 0.5f}, {72, bf16, 24, 1.5f}}},
        Case{512, 320, DType::bf16, DType::bf16, {{72, int4, 8, 1.5f, 0, 0, 0, 64, DType::f16}}}}) {
    c.keeps_low = true;
    match_f64_and_repeat(c);
    if (HasFatalFailure()) return;
  }
}
/// The gradients' kernel reads ahead of its wait, so what it reads must be there: dy is the y of a
/// product in the same stream, without a wait of the host in between.
TEST(CudaLoraLinear, BackwardFollowsWhatMakesItsInputs) {
  METAL_LORA_NEEDS_GPU();
  const auto bf16 = WeightFormat::bf16;
  for (uint32_t rank : {8u, 16u, 64u}) {
    Case c{512, 2048, DType::bf16, DType::bf16, {{2048, bf16, rank, 0.5f}}};
    c.keeps_low = true;
    Linear linear(c);
    auto v = linear.views();
    v[0].dy = v[0].y;
    const cuda::Context& context = linear.device().context();
    std::vector<std::vector<unsigned char>> want;
    for (int run = 0; run < 6; ++run) {
      cuda::lora_linear_forward(context, c.m, c.k, c.dtype, linear.x(), v.data(), 1);
      if (run == 0) linear.device().finish();
      cuda::lora_linear_backward(
          context, c.m, c.k, c.dtype, linear.x(), v.data(), 1, linear.dx().get());
      linear.device().finish();
      const auto got = linear.take_results();
      if (run == 0) want = got;
      ASSERT_EQ(got, want) << "rank " << rank << " run " << run;
    }
  }
}
TEST(CudaLoraLinear, RefusesScaledUThatItCannotKeep) {
  METAL_LORA_NEEDS_GPU();
  const auto bf16 = WeightFormat::bf16;
  for (Case c :
       {Case{511, 64, DType::bf16, DType::bf16, {{64, bf16, 8, 1.5f}}},
        Case{512, 64, DType::f16, DType::f16, {{64, WeightFormat::f16, 8, 1.5f}}}}) {
    c.keeps_low = true;
    SCOPED_TRACE(trace(c));
    Linear linear(c);
    EXPECT_THROW(linear.forward(), std::invalid_argument);
    EXPECT_THROW(linear.backward(), std::invalid_argument);
  }
}

/// On Hopper, one launch that streams W past all of them.
TEST(CudaLoraLinear, SomeDozenTokensMatchF64AndRepeat) {
  METAL_LORA_NEEDS_GPU();
  for (DType d : {DType::bf16, DType::f16}) {
    const auto own = static_cast<WeightFormat>(d);
    for (uint32_t m : {17u, 32u, 40u, 64u, 97u, 128u}) {
      for (const Case& c :
           {Case{m, 1096, d, d, {{264, own, 16, 1.5f, 0, true, true}}},
            Case{m, 8192, d, d, {{264, own, 16, 1.5f}}},  // more steps than stages
            Case{m, 520, d, DType::f32, {{136, own, 64, 0.5f}}},
            Case{m, 2048, d, d, {{72, own, 8, 1.5f}, {128, own, 0, 0.0f}, {200, own, 3, -1.0f}}}}) {
        SCOPED_TRACE(trace(c));
        Linear linear(c);
        linear.forward();
        linear.check_forward();
        if (HasFatalFailure()) return;
        const auto first = linear.take_results();
        linear.forward(true);
        ASSERT_EQ(linear.take_results(), first) << "not the same bits again, with W promised";
      }
    }
  }
}

/// Products that decode W's codes themselves, alone and beside others, and past the limit.
std::vector<Case> code_cases() {
  using enum WeightFormat;
  using D = DType;
  return {
      {17, 320, D::bf16, D::bf16, {{136, int4, 20, 1.5f, 0, true, false, 64, D::bf16}}},
      {300, 384, D::bf16, D::bf16, {{264, int4, 16, 0.5f, 0, false, true, 128, D::f16}}},
      {513, 320, D::f16, D::f16, {{72, int4, 8, 1.5f, 0, false, false, 64, D::f16}}},
      {200, 576, D::bf16, D::bf16, {{136, nf4, 16, -1.0f, 0, false, true, 64, D::f32, true}}},
      {300, 320, D::bf16, D::bf16, {{136, nf4, 8, 1.0f, 0, false, false, 64}}},
      {40,
       320,
       D::bf16,
       D::f32,
       {{136, int4, 16, 1.5f, 0, false, false, 64, D::f16},
        {72, nf4, 5, 0.5f, 0, false, false, 64}}},
      {40,
       320,
       D::bf16,
       D::bf16,
       {{136, int4, 16, 1.5f, 0, false, false, 64, D::f16}, {72, bf16, 8, 0.5f}}},
  };
}
TEST(CudaLoraLinear, FourBitCodesMatchF64AndRepeat) {
  METAL_LORA_NEEDS_GPU();
  for (const Case& c : code_cases()) {
    match_f64_and_repeat(c);
    if (HasFatalFailure()) return;
  }
}

TEST(CudaLoraLinear, FewTokensTakeTheVectorForm) {
  METAL_LORA_NEEDS_GPU();
  using enum WeightFormat;
  for (DType d : {DType::bf16, DType::f16, DType::f32}) {
    for (uint32_t m : {1u, 5u, cuda::kVectorMaxTokens}) {
      const Case c = {
          m,
          256,
          d,
          d,
          {{72, static_cast<WeightFormat>(d), 16, 2.0f, 0, true, true},
           {40, int4, 8, 0.5f, 0, false, false, 64, DType::f16},
           {64, nf4, 0, 0.0f, 0, false, false, 64}},
          false};
      SCOPED_TRACE(trace(c));
      Linear linear(c);
      linear.forward();
      linear.check_forward();
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CudaLoraLinear, EmptyDimensions) {
  METAL_LORA_NEEDS_GPU();
  using D = DType;
  for (Case c :
       {Case{0, 8, D::f32, D::f32, {{4, WeightFormat::f32, 2, 1.0f}}},
        Case{12, 0, D::bf16, D::f32, {{4, WeightFormat::f32, 2, 1.0f, 0, true}}},
        Case{12, 8, D::f32, D::f32, {{0, WeightFormat::f32, 2, 1.0f}}},
        Case{32, 8, D::bf16, D::bf16, {{0, WeightFormat::bf16, 2, 1.0f}}},
        Case{3, 0, D::f32, D::f32, {{4, WeightFormat::f32, 2, 1.0f, 0, true}}},
        Case{12, 8, D::f32, D::f32, {}}}) {
    SCOPED_TRACE(trace(c));
    Linear linear(c);
    linear.forward();
    linear.check_forward();
    linear.backward();
    linear.check_backward();
  }
}

TEST(CudaLoraLinear, BackwardWritesOnlyWhatIsAsked) {
  METAL_LORA_NEEDS_GPU();
  using D = DType;
  for (D d : {D::f32, D::bf16}) {
    const Case c = {20, 32, d, d, {{16, static_cast<WeightFormat>(d), 4, 1.0f}}};
    Linear all(c), some(c);
    all.forward();
    all.backward();
    some.forward();
    auto views = some.views();
    const auto run = [&](const void* x, void* dx) {
      cuda::lora_linear_backward(some.device().context(), c.m, c.k, d, x, views.data(), 1, dx);
      some.device().finish();
    };
    views[0].db = nullptr;
    run(some.x(), nullptr);
    const auto bytes = [](DeviceBuffer& b) { return b.download<unsigned char>(); };
    EXPECT_EQ(bytes(*some.branches()[0].da), bytes(*all.branches()[0].da));
    EXPECT_TRUE(std::isnan(some.branches()[0].db->download<float>()[0]));
    views[0].da = nullptr;
    run(nullptr, nullptr);
    run(some.x(), some.dx().get());
    EXPECT_EQ(bytes(some.dx()), bytes(all.dx()));
    views[0].db = some.branches()[0].db->get<float>();
    run(nullptr, nullptr);
    EXPECT_EQ(bytes(*some.branches()[0].db), bytes(*all.branches()[0].db));
  }
}

/// One region, so that calls can be captured.
class RegionScratch final : public cuda::Scratch {
 public:
  void* take(size_t bytes) override {
    void* p = region_.get<char>() + used_;
    used_ += (bytes + 255) / 256 * 256;
    EXPECT_LE(used_, region_.bytes());
    return p;
  }

 private:
  DeviceBuffer region_{size_t{16} << 20};
  size_t used_ = 0;
};

size_t count_kernels(cudaGraph_t graph) {
  size_t count = 0;
  cuda::check(cudaGraphGetNodes(graph, nullptr, &count), "cudaGraphGetNodes");
  std::vector<cudaGraphNode_t> nodes(count);
  cuda::check(cudaGraphGetNodes(graph, nodes.data(), &count), "cudaGraphGetNodes");
  size_t kernels = 0;
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type;
    cuda::check(cudaGraphNodeGetType(node, &type), "cudaGraphNodeGetType");
    kernels += type == cudaGraphNodeTypeKernel;
  }
  return kernels;
}

TEST(CudaLoraLinear, APlanSaysHowManyKernelsACallIs) {
  METAL_LORA_NEEDS_GPU();
  auto all = cases();
  for (Case& c : code_cases()) all.push_back(std::move(c));
  for (const Case& c : all) {
    if (c.branches.size() != 1) continue;
    SCOPED_TRACE(trace(c));
    Linear linear(c);
    const auto views = linear.views();
    RegionScratch scratch;
    cuda::Context context = linear.device().context();
    context.scratch = &scratch;
    const cuda::LinearPlan plan = cuda::plan_linear(context, c.m, c.dtype, views[0]);
    cudaGraph_t graph;
    cuda::check(
        cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeThreadLocal), "capture");
    cuda::lora_linear_forward(context, c.m, c.k, c.dtype, linear.x(), views.data(), 1);
    cuda::check(cudaStreamEndCapture(context.stream, &graph), "capture");
    EXPECT_EQ(count_kernels(graph), static_cast<size_t>(plan.dispatches)) << plan.why;
    cudaGraphDestroy(graph);
  }
}

TEST(CudaLoraLinear, RefusesWhatDoesNotFit) {
  METAL_LORA_NEEDS_GPU();
  const Case c = {4, 8, DType::f32, DType::f32, {{4, WeightFormat::f32, 2, 1.0f}}};
  Linear linear(c);
  auto views = linear.views();
  const auto run = [&](uint32_t k) {
    cuda::lora_linear_forward(
        linear.device().context(), c.m, k, c.dtype, linear.x(), views.data(), views.size());
  };
  EXPECT_THROW(run(9), std::invalid_argument);
  views[0].lora.params.rank = 1025;
  EXPECT_THROW(run(8), std::invalid_argument);
  views.resize(5, views[0]);
  EXPECT_THROW(run(8), std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora::test
