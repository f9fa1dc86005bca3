// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <gtest/gtest.h>

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
  WeightLayout layout = WeightLayout::row_major;
  DType scales = DType::f32;
  bool double_quant = false;
};

struct Case {
  uint32_t m, k;
  DType dtype;
  DType adapter_dtype;
  std::vector<BranchSpec> branches;
};

/// Everything one branch reads and writes.
struct Branch {
  BranchSpec spec;
  Weight w;
  Array a, b, bias, residual, dy;
  std::vector<unsigned char> y;
  std::vector<float> bias_f32, u, da, db;
  uint64_t seed = 0;
};

/// The mask as the kernel draws it, seen from outside: with A = identity, u is drop(x) itself.
/// So the mask is never re-implemented here, only observed.
std::vector<double> observed_mask(uint32_t m, uint32_t k, float dropout, uint64_t seed) {
  std::vector<double> ones(size_t{m} * k, 1.0), identity(size_t{k} * k, 0.0);
  for (size_t i = 0; i < k; ++i) identity[i * k + i] = 1.0;
  const Array x = make_array(DType::f32, ones), a = make_array(DType::f32, identity);
  const std::vector<float> w(k), b(k);
  std::vector<float> y(m), u(size_t{m} * k);
  cpu::LoraBranch branch;
  branch.weight = {{1, k, WeightFormat::f32}, w.data(), nullptr, nullptr};
  branch.lora = {{k, 1.0f, DType::f32, dropout, seed}, a.data(), b.data()};
  branch.y = y.data();
  branch.u = u.data();
  cpu::lora_linear_forward(m, k, DType::f32, x.data(), &branch, 1);
  return {u.begin(), u.end()};
}

class Linear {
 public:
  explicit Linear(const Case& c) : c_(c) {
    std::mt19937 rng(c.m * 7919 + c.k);
    x = random_array(rng, c.dtype, size_t{c.m} * c.k);
    const size_t size = c.dtype == DType::f32 ? 4 : 2;
    for (const BranchSpec& s : c.branches) {
      Branch b;
      b.spec = s;
      b.w =
          random_weight(rng, s.format, s.n, c.k, s.group_size, s.scales, s.layout, s.double_quant);
      b.a = random_array(rng, c.adapter_dtype, size_t{s.rank} * c.k, 0.5);
      b.b = random_array(rng, c.adapter_dtype, size_t{s.n} * s.rank, 0.5);
      b.bias = random_array(rng, DType::f32, s.n);
      b.bias_f32.assign(b.bias.values.begin(), b.bias.values.end());
      b.residual = random_array(rng, c.dtype, size_t{c.m} * s.n);
      b.dy = random_array(rng, c.dtype, size_t{c.m} * s.n);
      b.y.resize(size_t{c.m} * s.n * size);
      b.u.resize(size_t{c.m} * s.rank);
      b.da.resize(size_t{s.rank} * c.k, 1e30f);
      b.db.resize(size_t{s.n} * s.rank, 1e30f);
      b.seed = rng();
      branches.push_back(std::move(b));
    }
    dx.resize(size_t{c.m} * c.k * size);
  }

  std::vector<cpu::LoraBranch> views() {
    std::vector<cpu::LoraBranch> out;
    for (Branch& b : branches) {
      cpu::LoraBranch v;
      v.weight = b.w.view();
      v.lora = {
          {b.spec.rank, b.spec.scale, c_.adapter_dtype, b.spec.dropout, b.seed},
          b.a.data(),
          b.b.data()};
      v.bias = b.spec.bias ? b.bias_f32.data() : nullptr;
      v.residual = b.spec.residual ? b.residual.data() : nullptr;
      v.y = b.y.data();
      v.u = b.u.data();
      v.dy = b.dy.data();
      v.u_saved = b.u.data();
      v.da = b.da.data();
      v.db = b.db.data();
      out.push_back(v);
    }
    return out;
  }

  void forward() {
    const auto v = views();
    cpu::lora_linear_forward(c_.m, c_.k, c_.dtype, x.data(), v.data(), v.size());
  }
  void backward() {
    const auto v = views();
    cpu::lora_linear_backward(c_.m, c_.k, c_.dtype, x.data(), v.data(), v.size(), dx.data());
  }

  void check_forward() const {
    for (const Branch& b : branches) check_forward(b);
  }

  void check_backward() const {
    check_dx();
    for (const Branch& b : branches) {
      if (b.spec.rank != 0) check_adapter_gradients(b);
    }
  }

  Array x;
  std::vector<Branch> branches;
  std::vector<unsigned char> dx;

 private:
  std::vector<double> dropped_x(const Branch& b) const {
    std::vector<double> d = x.values;
    if (b.spec.rank == 0 || b.spec.dropout == 0.0f) return d;
    const auto mask = observed_mask(c_.m, c_.k, b.spec.dropout, b.seed);
    for (size_t i = 0; i < d.size(); ++i) d[i] *= mask[i];
    return d;
  }

  /// Roundings of one operand (e each) and of a k-long sum of f32, per unit of Σ|product|.
  double unit(double operands, size_t k) const {
    return operands * compute_roundoff(c_.dtype) + (static_cast<double>(k) + 8) * 0x1p-24;
  }

  void check_forward(const Branch& b) const {
    const size_t m = c_.m, n = b.spec.n, k = c_.k, r = b.spec.rank;
    const auto d = dropped_x(b);
    const Sums base = multiply(
        m,
        n,
        k,
        [&](size_t i, size_t p) { return x.values[i * k + p]; },
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
    // Dropped values are rounded once more than plain ones.
    for (size_t i = 0; i < m * r; ++i) {
      ASSERT_NEAR(b.u[i], u.value[i], u.magnitude[i] * unit(2, k) + 1e-30) << "u " << i;
    }
    for (size_t i = 0; i < m * n; ++i) {
      const double extra =
          (b.spec.bias ? b.bias.values[i % n] : 0) + (b.spec.residual ? b.residual.values[i] : 0);
      const double want = base.value[i] + b.spec.scale * adapter.value[i] + extra;
      const double size = base.magnitude[i] * unit(1, k) + std::fabs(extra) * 0x1p-22 +
                          std::fabs(b.spec.scale) * adapter_size.magnitude[i] * unit(4.1, k + r);
      const double bound = size + (std::fabs(want) + size) * roundoff(c_.dtype) + 0x1p-24;
      ASSERT_NEAR(stored_value(b.y.data(), c_.dtype, i), want, bound) << "y " << i;
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

  void check_dx() const {
    const size_t m = c_.m, k = c_.k;
    std::vector<double> want(m * k), bound(m * k);
    for (const Branch& b : branches) {
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
      const bool drops = r != 0 && b.spec.dropout > 0;
      const auto mask = drops ? observed_mask(c_.m, c_.k, b.spec.dropout, b.seed)
                              : std::vector<double>(m * k, 1.0);
      // The sum runs over all branches; each branch's share is bounded with the total length.
      for (size_t i = 0; i < m * k; ++i) {
        want[i] += base.value[i] + mask[i] * adapter.value[i];
        bound[i] += base.magnitude[i] * unit(1, total_k()) +
                    mask[i] * size.magnitude[i] * unit(3.1, n + total_k());
      }
    }
    for (size_t i = 0; i < m * k; ++i) {
      const double limit =
          bound[i] + (std::fabs(want[i]) + bound[i]) * roundoff(c_.dtype) + 0x1p-24;
      ASSERT_NEAR(stored_value(dx.data(), c_.dtype, i), want[i], limit) << "dx " << i;
    }
  }

  size_t total_k() const {
    size_t total = 0;
    for (const Branch& b : branches) total += b.spec.n + b.spec.rank;
    return total;
  }

  void check_adapter_gradients(const Branch& b) const {
    const size_t m = c_.m, n = b.spec.n, k = c_.k, r = b.spec.rank;
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
    for (size_t i = 0; i < r * k; ++i) {
      ASSERT_NEAR(b.da[i], da.value[i], da_size.magnitude[i] * unit(3.1, m + n) + 1e-30)
          << "dA " << i;
    }
    // u_saved is an input here: its own error is the forward pass's.
    const Sums db = multiply(
        n,
        r,
        m,
        [&](size_t j, size_t t) { return b.dy.values[t * n + j]; },
        [&](size_t t, size_t q) { return double{b.u[t * r + q]}; });
    for (size_t i = 0; i < n * r; ++i) {
      const double limit = std::fabs(b.spec.scale) * db.magnitude[i] * unit(1.1, m) + 1e-30;
      ASSERT_NEAR(b.db[i], b.spec.scale * db.value[i], limit) << "dB " << i;
    }
  }

  Case c_;
};

const std::vector<Case>& cases() {
  using enum WeightFormat;
  using D = DType;
  static const std::vector<Case> all = [] {
    std::vector<Case> list;
    for (D d : {D::f32, D::f16, D::bf16}) {
      list.push_back({9, 31, d, D::f32, {{33, f32, 0, 0.0f}}});
      list.push_back({2, 33, d, D::f32, {{31, bf16, 3, 0.5f, 0.25f, true}}});
      list.push_back({33, 64, d, d, {{64, f16, 8, 2.0f, 0, true, true}}});
      list.push_back({31, 1, d, D::f32, {{1, f32, 1, 1.5f}}});
      list.push_back(
          {130,
           160,
           d,
           D::f32,
           {{33, int4, 8, 0.7f, 0, false, true},
            {31, int8, 17, -1.5f, 0.1f, true, false, 32, WeightLayout::row_major, D::bf16},
            {16, int4, 0, 0.0f, 0, false, false, 32, WeightLayout::cpu_packed, D::f16},
            {48, bf16, 5, 1.0f}}});
      list.push_back({15, 4097, d, d, {{17, static_cast<WeightFormat>(d), 16, 1.0f, 0, true}}});
      list.push_back(
          {40,
           192,
           d,
           D::bf16,
           {{80, int8, 4, 2.0f, 0.5f, false, true, 64, WeightLayout::cpu_packed},
            {96, int4, 20, 2.0f, 0, false, false, 64, WeightLayout::cpu_packed, D::bf16}}});
      list.push_back(
          {21,
           320,
           d,
           D::f32,
           {{64, nf4, 8, 0.7f, 0, true, false, 64, WeightLayout::cpu_packed},
            {37, nf4, 5, -1.0f, 0, false, true, 64},
            {33, nf4, 0, 0.0f, 0, false, false, 64, WeightLayout::row_major, D::f32, true}}});
    }
    return list;
  }();
  return all;
}

std::string trace(const Case& c) {
  return std::string(cpu::isa_name(cpu::active_isa())) + " m=" + std::to_string(c.m) +
         " k=" + std::to_string(c.k) + " " + name_of(c.dtype);
}

TEST(LoraLinear, ForwardAndBackwardMatchF64) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (const Case& c : cases()) {
      SCOPED_TRACE(trace(c));
      Linear linear(c);
      linear.forward();
      linear.check_forward();
      linear.backward();
      linear.check_backward();
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(LoraLinear, BitwiseIndependentOfThreads) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (const Case& c : cases()) {
      SCOPED_TRACE(trace(c));
      cpu::set_thread_count(1);
      Linear one(c);
      one.forward();
      one.backward();
      for (int threads : {2, 3}) {
        cpu::set_thread_count(threads);
        Linear many(c);
        many.forward();
        many.backward();
        EXPECT_EQ(many.dx, one.dx);
        for (size_t b = 0; b < one.branches.size(); ++b) {
          EXPECT_EQ(many.branches[b].y, one.branches[b].y);
          EXPECT_EQ(many.branches[b].u, one.branches[b].u);
          EXPECT_EQ(many.branches[b].da, one.branches[b].da);
          EXPECT_EQ(many.branches[b].db, one.branches[b].db);
        }
      }
    }
  }
}

TEST(LoraLinear, ATokensResultDoesNotDependOnItsNeighbours) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (Case c : cases()) {
      if (c.m < 130) continue;
      SCOPED_TRACE(trace(c));
      Linear all(c);
      all.forward();
      all.backward();
      for (uint32_t m : {9u, 33u, 64u}) {  // all in the tiled form
        Linear some(c);
        auto views = some.views();
        cpu::lora_linear_forward(m, c.k, c.dtype, all.x.data(), views.data(), views.size());
        cpu::lora_linear_backward(
            m, c.k, c.dtype, all.x.data(), views.data(), views.size(), some.dx.data());
        const size_t size = c.dtype == DType::f32 ? 4 : 2;
        EXPECT_TRUE(std::equal(all.dx.begin(), all.dx.begin() + m * c.k * size, some.dx.begin()));
        for (size_t b = 0; b < views.size(); ++b) {
          const auto& want = all.branches[b].y;
          const size_t bytes = m * all.branches[b].spec.n * size;
          EXPECT_TRUE(std::equal(want.begin(), want.begin() + bytes, some.branches[b].y.begin()));
        }
      }
    }
  }
}

/// L = Σ dy·y in f64 from the definition; its slope must be what the backward pass returns.
TEST(LoraLinear, GradientsMatchCentralDifferences) {
  const Case c = {
      10,
      7,
      DType::f32,
      DType::f32,
      {{5, WeightFormat::f32, 3, 0.8f, 0.3f}, {4, WeightFormat::f32, 2, 1.2f}}};
  Linear linear(c);
  linear.forward();
  linear.backward();
  const auto loss = [&](const std::vector<double>& x,
                        size_t which,
                        const std::vector<double>& a,
                        const std::vector<double>& b) {
    double total = 0;
    for (size_t s = 0; s < linear.branches.size(); ++s) {
      const Branch& br = linear.branches[s];
      const auto mask = br.spec.dropout > 0 ? observed_mask(c.m, c.k, br.spec.dropout, br.seed)
                                            : std::vector<double>(c.m * c.k, 1.0);
      const auto& am = s == which ? a : br.a.values;
      const auto& bm = s == which ? b : br.b.values;
      for (size_t t = 0; t < c.m; ++t) {
        for (size_t j = 0; j < br.spec.n; ++j) {
          double y = 0;
          for (size_t p = 0; p < c.k; ++p) {
            y += x[t * c.k + p] * br.w.values[j * c.k + p];
            for (size_t q = 0; q < br.spec.rank; ++q) {
              y += br.spec.scale * mask[t * c.k + p] * x[t * c.k + p] * am[q * c.k + p] *
                   bm[j * br.spec.rank + q];
            }
          }
          total += br.dy.values[t * br.spec.n + j] * y;
        }
      }
    }
    return total;
  };
  // L is linear in each single value, so a central difference of step h has no truncation error;
  // what remains is f32 arithmetic: 60 or so terms of size ≤ 30.
  const double h = 0.5, tolerance = 60 * 30 * 0x1p-22;
  const auto slope = [&](std::vector<double> v, size_t i, auto f) {
    const double at = v[i];
    v[i] = at + h;
    const double up = f(v);
    v[i] = at - h;
    return (up - f(v)) / (2 * h);
  };
  for (size_t s = 0; s < linear.branches.size(); ++s) {
    const Branch& b = linear.branches[s];
    for (size_t i = 0; i < b.da.size(); ++i) {
      const double want = slope(
          b.a.values, i, [&](const auto& v) { return loss(linear.x.values, s, v, b.b.values); });
      EXPECT_NEAR(b.da[i], want, tolerance);
    }
    for (size_t i = 0; i < b.db.size(); ++i) {
      const double want = slope(
          b.b.values, i, [&](const auto& v) { return loss(linear.x.values, s, b.a.values, v); });
      EXPECT_NEAR(b.db[i], want, tolerance);
    }
  }
  for (size_t i = 0; i < linear.x.values.size(); ++i) {
    const Branch& b = linear.branches[0];
    const double want = slope(
        linear.x.values, i, [&](const auto& v) { return loss(v, 0, b.a.values, b.b.values); });
    EXPECT_NEAR(stored_value(linear.dx.data(), DType::f32, i), want, tolerance);
  }
}

TEST(LoraLinear, DropoutKeepsTheRightShareAndScale) {
  const KernelSettings restore;
  const uint32_t m = 400, k = 64;
  for (float p : {0.05f, 0.5f}) {
    std::vector<double> first;
    for (cpu::Isa isa : machine_isas()) {
      cpu::set_active_isa(isa);
      const auto mask = observed_mask(m, k, p, 42);
      if (first.empty()) first = mask;
      EXPECT_EQ(mask, first) << "the mask must not depend on the instruction set";
    }
    size_t kept = 0;
    for (double v : first) {
      ASSERT_TRUE(v == 0.0 || v == double{1.0f / (1.0f - p)});
      kept += v != 0.0;
    }
    // Binomial: six standard deviations.
    const double total = m * k, sigma = std::sqrt(total * p * (1 - p));
    EXPECT_NEAR(static_cast<double>(kept), total * (1 - p), 6 * sigma);
    // Rows and columns are drawn alike, and neighbours independently.
    size_t both = 0;
    for (size_t i = 0; i + 1 < first.size(); ++i) both += first[i] != 0 && first[i + 1] != 0;
    const double q = (1 - p) * (1 - p);
    EXPECT_NEAR(static_cast<double>(both), total * q, 8 * std::sqrt(total * q * (1 - q)));
    const auto other = observed_mask(m, k, p, 43);
    EXPECT_NE(other, first);
  }
}

TEST(LoraLinear, EmptyDimensions) {
  for (Case c :
       {Case{0, 8, DType::f32, DType::f32, {{4, WeightFormat::f32, 2, 1.0f}}},
        Case{12, 0, DType::bf16, DType::f32, {{4, WeightFormat::f32, 2, 1.0f, 0, true}}},
        Case{12, 8, DType::f32, DType::f32, {{0, WeightFormat::f32, 2, 1.0f}}},
        Case{3, 0, DType::f32, DType::f32, {{4, WeightFormat::f32, 2, 1.0f, 0, true}}},
        Case{12, 8, DType::f32, DType::f32, {}}}) {
    SCOPED_TRACE(trace(c));
    Linear linear(c);
    linear.forward();
    linear.check_forward();
    linear.backward();
    linear.check_backward();
  }
}

TEST(LoraLinear, BackwardWritesOnlyWhatIsAsked) {
  const Case c = {20, 32, DType::f32, DType::f32, {{16, WeightFormat::f32, 4, 1.0f}}};
  Linear all(c), some(c);
  all.forward();
  all.backward();
  some.forward();
  auto views = some.views();
  views[0].db = nullptr;
  cpu::lora_linear_backward(c.m, c.k, c.dtype, some.x.data(), views.data(), 1, nullptr);
  EXPECT_EQ(some.branches[0].da, all.branches[0].da);
  EXPECT_EQ(some.branches[0].db[0], 1e30f);
  views[0].da = nullptr;
  cpu::lora_linear_backward(c.m, c.k, c.dtype, nullptr, views.data(), 1, nullptr);
  cpu::lora_linear_backward(c.m, c.k, c.dtype, some.x.data(), views.data(), 1, some.dx.data());
  EXPECT_EQ(some.dx, all.dx);
}

}  // namespace
}  // namespace metal_lora::test
