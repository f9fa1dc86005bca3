// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The multi-adapter linear against f64, in both forms, and what it promises bit for bit. The banks
// hold NaN beyond each adapter's true rank: nothing there may be read.
#include <gtest/gtest.h>

#include <limits>

#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

struct Case {
  uint32_t m, n, k;
  DType dtype, adapter_dtype;
  WeightFormat format;
  WeightLayout layout;
  std::vector<int32_t> ranks;
  uint32_t max_rank;
  bool bias;
};

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class Multi {
 public:
  Multi(const Case& c, uint32_t seed) : c_(c) {
    std::mt19937 rng(seed);
    const size_t adapters = c.ranks.size();
    const bool nf4 = c.format == WeightFormat::nf4;
    w = random_weight(rng, c.format, c.n, c.k, nf4 ? 64 : 32, DType::f32, c.layout);
    x = random_array(rng, c.dtype, size_t{c.m} * c.k);
    dy = random_array(rng, c.dtype, size_t{c.m} * c.n);
    bias = random_array(rng, DType::f32, c.n);
    std::normal_distribution<double> normal(0.0, 0.5);
    std::vector<double> av, bv;
    for (size_t i = 0; i < adapters; ++i) {
      for (uint32_t j = 0; j < c.max_rank; ++j) {
        for (uint32_t p = 0; p < c.k; ++p) {
          av.push_back(j < static_cast<uint32_t>(c.ranks[i]) ? normal(rng) : kNan);
        }
      }
      for (uint32_t r = 0; r < c.n * c.max_rank; ++r) {
        bv.push_back(r % c.max_rank < static_cast<uint32_t>(c.ranks[i]) ? normal(rng) : kNan);
      }
      scales.push_back(static_cast<float>(normal(rng) * 3));
    }
    a = with_nan(c.adapter_dtype, av);
    b = with_nan(c.adapter_dtype, bv);
    for (uint32_t t = 0; t < c.m; ++t) {
      index.push_back(static_cast<int32_t>(rng() % (adapters + 1)) - 1);
    }
    const size_t size = c.dtype == DType::f32 ? 4 : 2;
    y.resize(size_t{c.m} * c.n * size);
    dx.resize(size_t{c.m} * c.k * size);
    da.resize(adapters * c.max_rank * c.k);
    db.resize(adapters * c.n * c.max_rank);
  }

  /// make_array cannot round NaN to 16 bits.
  static Array with_nan(DType dtype, std::vector<double> values) {
    std::vector<double> finite = values;
    for (double& v : finite) v = std::isnan(v) ? 0.0 : v;
    Array out = make_array(dtype, finite);
    const uint16_t nan16 = dtype == DType::bf16 ? 0x7fc0 : 0x7e00;
    const float nan32 = std::numeric_limits<float>::quiet_NaN();
    for (size_t i = 0; i < values.size(); ++i) {
      if (!std::isnan(values[i])) continue;
      if (dtype == DType::f32) {
        std::memcpy(out.bytes.data() + 4 * i, &nan32, 4);
      } else {
        std::memcpy(out.bytes.data() + 2 * i, &nan16, 2);
      }
    }
    return out;
  }

  cpu::LoraBankView bank() const {
    const LoraMultiParams p = {
        static_cast<uint32_t>(c_.ranks.size()), c_.max_rank, c_.adapter_dtype};
    return {p, a.data(), b.data(), c_.ranks.data(), scales.data()};
  }

  void forward() {
    cpu::lora_linear_multi_forward(
        c_.m,
        c_.dtype,
        x.data(),
        w.view(),
        bank(),
        index.data(),
        c_.bias ? bias_values().data() : nullptr,
        y.data());
  }
  void backward() {
    cpu::lora_linear_multi_backward(
        c_.m,
        c_.dtype,
        x.data(),
        w.view(),
        bank(),
        index.data(),
        dy.data(),
        dx.data(),
        da.data(),
        db.data());
  }
  const std::vector<float>& bias_values() {
    bias_f32_.assign(bias.values.begin(), bias.values.end());
    return bias_f32_;
  }

  uint32_t rank(uint32_t t) const {
    return index[t] < 0 ? 0 : static_cast<uint32_t>(c_.ranks[index[t]]);
  }
  double a_at(uint32_t t, uint32_t j, uint32_t p) const {
    return a.values[(size_t(index[t]) * c_.max_rank + j) * c_.k + p];
  }
  double b_at(uint32_t t, uint32_t row, uint32_t j) const {
    return b.values[(size_t(index[t]) * c_.n + row) * c_.max_rank + j];
  }
  double scale(uint32_t t) const { return scales[index[t]]; }

  /// Relative error of a k-long sum whose operands are rounded `operands` times. Weights of a
  /// packed bf16 matrix-vector product have rounded levels (nf4), so bf16 counts at any m.
  double unit(double operands, size_t k) const {
    return operands * compute_roundoff(c_.dtype) + (static_cast<double>(k) + 8) * 0x1p-24;
  }
  /// In the matrix-vector form an affine weight's q·scale and bias are added apart: what is summed
  /// is larger than |w·x| (see gemv_test.cpp: at most (15 + 1)·6 a weight for int4).
  double weight_size(double w) const {
    return c_.format == WeightFormat::int4 && c_.m <= cpu::kGemvMaxTokens ? 96.0 : std::fabs(w);
  }

  void check_forward() const {
    for (uint32_t t = 0; t < c_.m; ++t) {
      std::vector<double> us(rank(t)), u_size(rank(t));
      for (uint32_t j = 0; j < rank(t); ++j) {
        for (uint32_t p = 0; p < c_.k; ++p) {
          const double term = x.values[size_t{t} * c_.k + p] * a_at(t, j, p);
          us[j] += term;
          u_size[j] += std::fabs(term);
        }
      }
      for (uint32_t row = 0; row < c_.n; ++row) {
        double want = c_.bias ? bias.values[row] : 0, rounded = 0, summed = std::fabs(want);
        for (uint32_t p = 0; p < c_.k; ++p) {
          const double xp = x.values[size_t{t} * c_.k + p];
          const double wp = w.values[size_t{row} * c_.k + p];
          want += xp * wp;
          rounded += std::fabs(xp * wp);
          summed += std::fabs(xp) * weight_size(wp);
        }
        double adapter = 0;
        for (uint32_t j = 0; j < rank(t); ++j) {
          const double term = scale(t) * b_at(t, row, j);
          want += term * us[j];
          adapter += std::fabs(term) * u_size[j];
        }
        const double bound = rounded * compute_roundoff(c_.dtype) + summed * unit(0, c_.k) +
                             adapter * unit(4.1, c_.k + rank(t));
        ASSERT_NEAR(
            stored_value(y.data(), c_.dtype, size_t{t} * c_.n + row),
            want,
            bound + (std::fabs(want) + bound) * roundoff(c_.dtype) + 0x1p-24)
            << "token " << t << " adapter " << index[t] << " row " << row;
      }
    }
  }

  void check_backward() const {
    const size_t adapters = c_.ranks.size(), r = c_.max_rank;
    std::vector<double> want_da(da.size()), da_size(da.size()), want_db(db.size()),
        db_size(db.size()), tokens(adapters);
    for (uint32_t t = 0; t < c_.m; ++t) {
      std::vector<double> v(rank(t)), v_size(rank(t));
      for (uint32_t j = 0; j < rank(t); ++j) {
        double down = 0, down_size = 0;
        for (uint32_t p = 0; p < c_.k; ++p) {
          const double term = x.values[size_t{t} * c_.k + p] * a_at(t, j, p);
          down += term;
          down_size += std::fabs(term);
        }
        for (uint32_t row = 0; row < c_.n; ++row) {
          const double term = scale(t) * dy.values[size_t{t} * c_.n + row] * b_at(t, row, j);
          v[j] += term;
          v_size[j] += std::fabs(term);
          const size_t at = (size_t(index[t]) * c_.n + row) * r + j;
          const double dy_scaled = scale(t) * dy.values[size_t{t} * c_.n + row];
          want_db[at] += dy_scaled * down;
          db_size[at] += std::fabs(dy_scaled) * down_size;
        }
        for (uint32_t p = 0; p < c_.k; ++p) {
          const size_t at = (size_t(index[t]) * r + j) * c_.k + p;
          want_da[at] += v[j] * x.values[size_t{t} * c_.k + p];
          da_size[at] += v_size[j] * std::fabs(x.values[size_t{t} * c_.k + p]);
        }
      }
      for (uint32_t p = 0; p < c_.k; ++p) {
        double want = 0, size = 0, adapter = 0;
        for (uint32_t row = 0; row < c_.n; ++row) {
          const double term = dy.values[size_t{t} * c_.n + row] * w.values[size_t{row} * c_.k + p];
          want += term;
          size += std::fabs(term);
        }
        for (uint32_t j = 0; j < rank(t); ++j) {
          want += v[j] * a_at(t, j, p);
          adapter += v_size[j] * std::fabs(a_at(t, j, p));
        }
        const double bound = size * unit(1, c_.n) + adapter * unit(3.1, c_.n + rank(t));
        ASSERT_NEAR(
            stored_value(dx.data(), c_.dtype, size_t{t} * c_.k + p),
            want,
            bound + (std::fabs(want) + bound) * roundoff(c_.dtype) + 0x1p-24)
            << "dx token " << t;
      }
    }
    for (size_t i = 0; i < da.size(); ++i) {
      ASSERT_NEAR(da[i], want_da[i], da_size[i] * unit(3.1, c_.m + c_.n)) << "dA " << i;
    }
    for (size_t i = 0; i < db.size(); ++i) {
      ASSERT_NEAR(db[i], want_db[i], db_size[i] * unit(3.1, c_.m + c_.k)) << "dB " << i;
    }
  }

  Weight w;
  Array x, dy, bias, a, b;
  std::vector<float> scales, da, db;
  std::vector<int32_t> index;
  std::vector<unsigned char> y, dx;

 private:
  Case c_;
  std::vector<float> bias_f32_;
};

std::vector<Case> cases() {
  using enum WeightFormat;
  using D = DType;
  constexpr auto kRows = WeightLayout::row_major, kPacked = WeightLayout::cpu_packed;
  std::vector<Case> list;
  for (D d : {D::f32, D::f16, D::bf16}) {
    list.push_back({1, 33, 47, d, D::f32, f32, kRows, {3}, 3, true});
    list.push_back({5, 48, 96, d, D::bf16, int4, kPacked, {16, 4, 0, 9}, 16, false});
    list.push_back({8, 64, 128, d, D::f16, nf4, kPacked, {16, 16, 8, 1}, 24, true});
    list.push_back({8, 31, 160, d, d, bf16, kRows, {8, 20}, 20, true});
    list.push_back({9, 31, 33, d, D::f32, f16, kRows, {5, 2, 7}, 9, true});
    list.push_back({70, 150, 128, d, D::bf16, nf4, kRows, {16, 3, 0, 33, 8, 8, 8}, 40, true});
    list.push_back({33, 80, 64, d, d, int4, kPacked, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 16, false});
    list.push_back({12, 17, 1700, d, D::f32, bf16, kRows, {4, 6}, 8, false});
  }
  return list;
}

std::string trace(const Case& c) {
  return std::string(cpu::isa_name(cpu::active_isa())) + " m=" + std::to_string(c.m) +
         " k=" + std::to_string(c.k) + " " + name_of(c.dtype) + " format " +
         std::to_string(static_cast<int>(c.format));
}

TEST(LoraMulti, ForwardAndBackwardMatchF64) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (const Case& c : cases()) {
      SCOPED_TRACE(trace(c));
      Multi multi(c, c.m * 31 + c.k);
      multi.forward();
      multi.check_forward();
      multi.backward();
      multi.check_backward();
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

/// The batch in another order, with other neighbours, with any number of threads: the same bits.
TEST(LoraMulti, TokensDoNotSeeTheirNeighbours) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (const Case& c : cases()) {
      SCOPED_TRACE(trace(c));
      cpu::set_thread_count(1);
      Multi multi(c, 5);
      multi.forward();
      const auto alone = multi.y;
      const size_t x_bytes = multi.x.bytes.size() / c.m, y_bytes = multi.y.size() / c.m;
      // Every token moves, and its old neighbours now use other adapters or none.
      const uint32_t shift = c.m / 2;
      Multi moved(c, 5);
      std::mt19937 rng(8);
      for (uint32_t t = 0; t < c.m; ++t) {
        const uint32_t from = (t + shift) % c.m;
        const bool keep = t % 3 != 1;
        moved.index[t] = keep ? multi.index[from] : static_cast<int32_t>(rng() % c.ranks.size());
        std::memcpy(
            moved.x.bytes.data() + t * x_bytes, multi.x.bytes.data() + from * x_bytes, x_bytes);
      }
      for (int threads : {1, 2, 3}) {
        cpu::set_thread_count(threads);
        moved.forward();
        for (uint32_t t = 0; t < c.m; ++t) {
          const uint32_t from = (t + shift) % c.m;
          if (moved.index[t] != multi.index[from]) continue;
          ASSERT_EQ(
              std::memcmp(moved.y.data() + t * y_bytes, alone.data() + from * y_bytes, y_bytes), 0)
              << "token " << t << " threads " << threads;
        }
      }
    }
  }
}

/// Tokens without an adapter are the plain linear's, bit for bit, whatever shares their batch.
TEST(LoraMulti, NoAdapterIsThePlainLinear) {
  const KernelSettings restore;
  for (cpu::Isa isa : machine_isas()) {
    cpu::set_active_isa(isa);
    for (const Case& c : cases()) {
      SCOPED_TRACE(trace(c));
      Multi multi(c, 6);
      multi.index[0] = -1;
      multi.forward();
      std::vector<unsigned char> y(multi.y.size());
      cpu::LoraBranch base;
      base.weight = multi.w.view();
      base.bias = c.bias ? multi.bias_values().data() : nullptr;
      base.y = y.data();
      cpu::lora_linear_forward(c.m, c.k, c.dtype, multi.x.data(), &base, 1);
      const size_t y_bytes = y.size() / c.m;
      for (uint32_t t = 0; t < c.m; ++t) {
        if (multi.rank(t) != 0) continue;
        ASSERT_EQ(std::memcmp(y.data() + t * y_bytes, multi.y.data() + t * y_bytes, y_bytes), 0);
      }
    }
  }
}

TEST(LoraMulti, GradientsDoNotDependOnThreads) {
  const KernelSettings restore;
  for (const Case& c : cases()) {
    SCOPED_TRACE(trace(c));
    Multi multi(c, 7);
    multi.forward();
    cpu::set_thread_count(1);
    multi.backward();
    const auto dx = multi.dx;
    const auto da = multi.da, db = multi.db;
    for (int threads : {2, 3}) {
      cpu::set_thread_count(threads);
      multi.backward();
      EXPECT_EQ(multi.dx, dx);
      EXPECT_EQ(multi.da, da);
      EXPECT_EQ(multi.db, db);
    }
  }
}

TEST(LoraMulti, WritesOnlyWhatIsAskedFor) {
  const KernelSettings restore;
  Case c = cases().back();
  Multi multi(c, 9), parts(c, 9);
  multi.forward();
  multi.backward();
  const auto backward = [&](void* dx, float* da, float* db) {
    cpu::lora_linear_multi_backward(
        c.m,
        c.dtype,
        parts.x.data(),
        parts.w.view(),
        parts.bank(),
        parts.index.data(),
        parts.dy.data(),
        dx,
        da,
        db);
  };
  backward(parts.dx.data(), nullptr, nullptr);
  EXPECT_EQ(parts.dx, multi.dx);
  backward(nullptr, parts.da.data(), nullptr);
  EXPECT_EQ(parts.da, multi.da);
  backward(nullptr, nullptr, parts.db.data());
  EXPECT_EQ(parts.db, multi.db);
}

TEST(LoraMulti, NoTokensOrNoAdapters) {
  const KernelSettings restore;
  Case c = cases().front();
  c.m = 0;
  Multi none(c, 1);
  none.da.assign(none.da.size(), 7.0f);
  none.forward();
  none.backward();
  for (float v : none.da) EXPECT_EQ(v, 0.0f);
  c.m = 12;
  Multi base_only(c, 1);
  base_only.index.assign(12, -1);
  base_only.forward();
  base_only.check_forward();
  base_only.backward();
  base_only.check_backward();
}

}  // namespace
}  // namespace metal_lora::test
