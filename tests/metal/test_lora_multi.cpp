// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Many adapters in one dispatch: against f64, and bit for bit against other batches.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/metal/plans_multi.h"
#include "tests/metal/stored_weight.h"

namespace metal_lora {
namespace {

namespace mx = mlx::core;
using test::Base;

struct Case {
  int m, n, k;
  Base base;
  DType dtype, lora_dtype;
  int max_rank, adapters;
  bool bias = false;
  int group = 32;
  DType scales_dtype = DType::f32;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "m" << c.m << "_n" << c.n << "_k" << c.k << "_base" << static_cast<int>(c.base)
             << "_t" << static_cast<int>(c.dtype) << static_cast<int>(c.lora_dtype) << "_rank"
             << c.max_rank;
}

/// A base and its adapters; tokens come apart. Beyond the true ranks everything is NaN: none of it
/// may be read.
class Served {
 public:
  Served(const Case& c, uint64_t seed)
      : c_(c),
        random_(seed),
        weight_(test::stored_weight(random_, c.base, c.n, c.k, c.group, c.scales_dtype)) {
    ranks_ = random_.integers(c.adapters, 0, c.max_rank);
    ranks_[0] = c.max_rank;
    if (c.adapters > 1) ranks_[1] = 0;
    auto a = random_.normal(size_t(c.adapters) * c.max_rank * c.k, 0.2f);
    auto b = random_.normal(size_t(c.adapters) * c.n * c.max_rank, 0.2f);
    for (size_t i = 0; i < a.size(); ++i) {
      const size_t row = i / c.k;
      if (int(row % c.max_rank) >= ranks_[row / c.max_rank]) a[i] = kNan;
    }
    for (size_t i = 0; i < b.size(); ++i) {
      if (int(i % c.max_rank) >= ranks_[i / (size_t(c.n) * c.max_rank)]) b[i] = kNan;
    }
    a_ = test::operand(a, {c.adapters, c.max_rank, c.k}, c.lora_dtype);
    b_ = test::operand(b, {c.adapters, c.n, c.max_rank}, c.lora_dtype);
    scales_ = test::operand(random_.normal(c.adapters), {c.adapters}, DType::f32);
    bias_ = test::operand(random_.normal(c.n), {c.n}, DType::f32);
  }

  std::vector<double> run(const std::vector<float>& x, const std::vector<int32_t>& index) const {
    const int m = static_cast<int>(index.size());
    metal::LoraMultiShape shape{
        .m = static_cast<uint32_t>(m),
        .n = static_cast<uint32_t>(c_.n),
        .k = static_cast<uint32_t>(c_.k),
        .format = weight_.format,
        .group_size = weight_.group_size,
        .scales_dtype = weight_.scales_dtype,
        .double_quant = weight_.double_quant,
        .adapters = static_cast<uint32_t>(c_.adapters),
        .max_rank = static_cast<uint32_t>(c_.max_rank),
        .dtype = c_.dtype,
        .lora_dtype = c_.lora_dtype,
        .has_bias = c_.bias};
    test::NamedArrays arrays = weight_.arrays;
    arrays.emplace("x", test::stored(x, {m, c_.k}, to_mlx(c_.dtype)));
    arrays.emplace("a", a_.array);
    arrays.emplace("b", b_.array);
    arrays.emplace("ranks", test::int_array(ranks_, {c_.adapters}));
    arrays.emplace("adapter_scales", scales_.array);
    arrays.emplace("index", test::int_array(index, {m}));
    if (c_.bias) arrays.emplace("bias", bias_.array);
    const auto out =
        test::run({metal::plan_lora_multi(shape)}, arrays, {{"y", {{m, c_.n}, to_mlx(c_.dtype)}}});
    return test::values(out.at("y"));
  }

  /// Checks y[t] against f64. Products of 16-bit values are exact in f32, all others and every sum
  /// round once: k + rank + 8 roundings cover any order. A packed weight is rounded to f32 and to
  /// x's type on its way; y is rounded to its type.
  void check(
      const std::vector<float>& x,
      const std::vector<int32_t>& index,
      const std::vector<double>& y) const {
    const auto xs =
        test::values(test::stored(x, {static_cast<int>(index.size()), c_.k}, to_mlx(c_.dtype)));
    const bool packed = weight_.scales_dtype != DType::f32 || weight_.group_size > 0 ||
                        weight_.format == WeightFormat::nf4;
    const double storage = test::relative_rounding(c_.dtype), step = test::smallest_step(c_.dtype);
    const double per_weight = packed ? storage + 4 * test::kF32 : 0.0;
    for (size_t t = 0; t < index.size(); ++t) {
      const auto u = adapter_input(&xs[t * c_.k], index[t]);
      double sum_x = 0.0;
      for (int i = 0; i < c_.k; ++i) sum_x += std::fabs(xs[t * c_.k + i]);
      for (int column = 0; column < c_.n; ++column) {
        Sum sum = base(&xs[t * c_.k], column);
        double error = per_weight * sum.magnitude + (packed ? step * sum_x : 0.0);
        expand(u, index[t], column, sum);
        if (c_.bias) sum.add(bias_.value[column]);
        error += (c_.k + c_.max_rank + 8) * test::kF32 * sum.magnitude;
        error += storage * (std::fabs(sum.value) + error) + step;
        const double got = y[t * c_.n + column];
        ASSERT_LE(std::fabs(got - sum.value), error)
            << "token " << t << " column " << column << " adapter " << index[t] << ": " << got
            << " for " << sum.value;
      }
    }
  }

  const Case& of() const { return c_; }

 private:
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

  struct Sum {
    double value = 0.0, magnitude = 0.0;
    void add(double term) {
      value += term;
      magnitude += std::fabs(term);
    }
  };

  bool has_adapter(int32_t i) const { return i >= 0 && i < c_.adapters; }

  std::vector<Sum> adapter_input(const double* x, int32_t i) const {
    if (!has_adapter(i)) return {};
    std::vector<Sum> u(ranks_[i]);
    for (size_t r = 0; r < u.size(); ++r) {
      const double* a = &a_.value[(size_t(i) * c_.max_rank + r) * c_.k];
      for (int j = 0; j < c_.k; ++j) u[r].add(a[j] * x[j]);
    }
    return u;
  }

  Sum base(const double* x, int column) const {
    Sum sum;
    for (int j = 0; j < c_.k; ++j) sum.add(weight_.value[size_t(column) * c_.k + j] * x[j]);
    return sum;
  }

  void expand(const std::vector<Sum>& u, int32_t i, int column, Sum& sum) const {
    for (size_t r = 0; r < u.size(); ++r) {
      const double b = scales_.value[i] * b_.value[(size_t(i) * c_.n + column) * c_.max_rank + r];
      sum.value += b * u[r].value;
      sum.magnitude += std::fabs(b) * u[r].magnitude;
    }
  }

  Case c_;
  mutable test::Random random_;
  test::StoredWeight weight_;
  std::vector<int32_t> ranks_;
  test::Operand a_{mx::array(0.0f), {}}, b_{mx::array(0.0f), {}}, scales_{mx::array(0.0f), {}},
      bias_{mx::array(0.0f), {}};
};

/// A batch of c.m tokens: base, adapters, and one index that no adapter has.
struct Batch {
  std::vector<float> x;
  std::vector<int32_t> index;
};
Batch make_batch(const Case& c, uint64_t seed) {
  test::Random random(seed);
  Batch batch{random.normal(size_t(c.m) * c.k), random.integers(c.m, -1, c.adapters - 1)};
  batch.index[0] = 0;
  if (c.m > 2) batch.index[1] = -1;
  if (c.m > 3) batch.index[2] = c.adapters + 3;
  return batch;
}

class LoraMulti : public testing::TestWithParam<Case> {};

TEST_P(LoraMulti, IsTheFormula) {
  const Served served(GetParam(), 1);
  const Batch batch = make_batch(GetParam(), 2);
  served.check(batch.x, batch.index, served.run(batch.x, batch.index));
}

TEST_P(LoraMulti, ATokenDoesNotFeelItsNeighbours) {
  const Case c = GetParam();
  const Served served(c, 3);
  const Batch batch = make_batch(c, 4);
  const auto y = served.run(batch.x, batch.index);
  const auto row = [&](const std::vector<double>& from, int t) {
    return std::vector<double>(from.begin() + size_t(t) * c.n, from.begin() + size_t(t + 1) * c.n);
  };
  // The same tokens in another order.
  std::vector<int> order(c.m);
  std::iota(order.begin(), order.end(), 0);
  std::rotate(order.begin(), order.begin() + c.m / 3, order.end());
  std::swap(order.front(), order.back());
  Batch moved;
  for (const int t : order) {
    moved.x.insert(
        moved.x.end(), batch.x.begin() + size_t(t) * c.k, batch.x.begin() + size_t(t + 1) * c.k);
    moved.index.push_back(batch.index[t]);
  }
  const auto z = served.run(moved.x, moved.index);
  for (int t = 0; t < c.m; ++t) EXPECT_EQ(row(z, t), row(y, order[t])) << "token " << order[t];
  // The first token among strangers, some of them without a finite value.
  Batch strange = make_batch(c, 5);
  std::copy_n(batch.x.begin(), c.k, strange.x.begin());
  for (int i = 0; i < c.k && c.m > 1; ++i) {
    strange.x[size_t(c.m - 1) * c.k + i] = std::numeric_limits<float>::quiet_NaN();
  }
  strange.index[0] = batch.index[0];
  EXPECT_EQ(row(served.run(strange.x, strange.index), 0), row(y, 0));
  // Fewer or more of them, in the same form.
  const int m = c.m == 3 ? 1 : c.m == 9 ? 40 : c.m - 1;
  Batch other;
  for (int t = 0; t < m; ++t) {
    const int from = t % c.m;
    other.x.insert(
        other.x.end(),
        batch.x.begin() + size_t(from) * c.k,
        batch.x.begin() + size_t(from + 1) * c.k);
    other.index.push_back(batch.index[from]);
  }
  const auto less = served.run(other.x, other.index);
  for (int t = 0; t < m; ++t) EXPECT_EQ(row(less, t), row(y, t % c.m)) << "of " << m;
}

constexpr DType kF = DType::f32, kH = DType::f16, kB = DType::bf16;
const Case kCases[] = {
    {3, 37, 50, Base::f16, kH, kH, 8, 3},
    {7, 40, 72, Base::bf16, kB, kF, 3, 4, true},
    {6, 36, 300, Base::f32, kF, kF, 9, 2, true},
    {7, 70, 64, Base::int4, kH, kF, 20, 4, true, 32, kH},
    {4, 40, 128, Base::int8, kB, kB, 64, 8, false, 64, kF},
    {4, 33, 128, Base::nf4, kB, kB, 5, 2},
    {4, 300, 64, Base::nf4_nested, kF, kH, 3, 2},
    {9, 37, 50, Base::f16, kH, kH, 8, 3},
    {34, 130, 70, Base::f32, kF, kF, 9, 12, true},
    {40, 66, 64, Base::int4, kH, kF, 40, 4, true, 32, kH},
    {18, 65, 128, Base::int8, kB, kB, 1, 2, false, 128, kB},
    {66, 516, 64, Base::nf4, kB, kB, 5, 2},
    {12, 72, 64, Base::nf4_nested, kF, kH, 256, 3},
};
INSTANTIATE_TEST_SUITE_P(Shapes, LoraMulti, testing::ValuesIn(kCases), [](const auto& info) {
  std::ostringstream name;
  name << info.param;
  return name.str();
});

metal::LoraMultiShape valid_shape() {
  return {
      .m = 4,
      .n = 16,
      .k = 64,
      .format = WeightFormat::int4,
      .group_size = 32,
      .adapters = 2,
      .max_rank = 8};
}

TEST(LoraMultiPlan, RefusesByName) {
  const auto refusal = [](auto change) {
    auto shape = valid_shape();
    change(shape);
    try {
      metal::plan_lora_multi(shape);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("no refusal");
  };
  using Shape = metal::LoraMultiShape;
  EXPECT_EQ(
      refusal([](Shape& s) { s.max_rank = 257; }),
      "[lora_multi] max_rank must be in [1, 256] but is 257");
  EXPECT_EQ(
      refusal([](Shape& s) { s.adapters = 0; }),
      "[lora_multi] adapters must be at least 1 but is 0");
  EXPECT_EQ(
      refusal([](Shape& s) { s.group_size = 48; }),
      "[lora_multi] group size must be 32, 64 or 128 but is 48");
  EXPECT_EQ(
      refusal([](Shape& s) { s.k = 80; }), "[lora_multi] k must be a multiple of 32 but is 80");
  EXPECT_NE(refusal([](Shape& s) { s.m = 0; }).find("x must have 1 to"), std::string::npos);
}

/// Bytes read of each input, and times that each of its bytes was.
struct Traffic {
  double bytes = 0.0, times = 0.0;
};
Traffic traffic(const EmulatedDispatch& d, const std::string& input) {
  for (const auto& counters : d.report.counters.buffers) {
    if (d.buffer_names[counters.index] != input) continue;
    const auto bytes = static_cast<double>(counters.read_bytes);
    return {bytes, bytes / static_cast<double>(counters.unique_read_bytes)};
  }
  ADD_FAILURE() << "no input named " << input;
  return {};
}

TEST(LoraMultiTraffic, DecodeReadsTheBaseAndEachAdaptersBOnce) {
  const Case c{8, 256, 512, Base::f16, kH, kH, 16, 4};
  const Served served(c, 8);
  EmulatorLog log;
  served.run(make_batch(c, 9).x, {0, 0, 2, -1, 3, 2, 0, 3});
  const auto dispatches = log.take();
  ASSERT_EQ(dispatches.size(), 1u);
  EXPECT_LE(traffic(dispatches[0], "w").times, 1.02);
  EXPECT_LE(traffic(dispatches[0], "b").times, 1.1);
}

TEST(LoraMultiTraffic, PrefillMultipliesOnTheMatrixUnits) {
  const Case c{64, 128, 256, Base::f16, kH, kH, 16, 2};
  const Served served(c, 10);
  std::vector<int32_t> index(64, 0);
  std::fill(index.begin() + 32, index.end(), -1);  // full ranks or none: every product is wanted
  EmulatorLog log;
  served.run(make_batch(c, 11).x, index);
  const auto dispatches = log.take();
  ASSERT_EQ(dispatches.size(), 1u);
  const double wanted =
      64.0 * 128 * 256 + 32.0 * 16 * 256 * 2 /* columns of tiles */ + 32.0 * 16 * 128;
  const double elsewhere = 32.0 * 128;  // scale, once an output with an adapter
  const double on_matrix_units =
      512.0 * static_cast<double>(dispatches[0].report.counters.matrix_operations);
  EXPECT_EQ(on_matrix_units, wanted);
  EXPECT_GE(on_matrix_units / (on_matrix_units + elsewhere), 0.95);
  EXPECT_LE(traffic(dispatches[0], "w").times, 1.02);
}

TEST(LoraMultiPlan, TokensWithoutAnAdapterReadNone) {
  const Case c{8, 32, 64, Base::f16, kH, kH, 8, 2};
  const Served served(c, 6);
  EmulatorLog log;
  const Batch batch = make_batch(c, 7);
  served.run(batch.x, std::vector<int32_t>(8, -1));
  const auto dispatches = log.take();
  ASSERT_EQ(dispatches.size(), 1u);
  const auto& d = dispatches[0];
  for (const auto& counters : d.report.counters.buffers) {
    const auto& name = d.buffer_names[counters.index];
    if (name == "a" || name == "b" || name == "ranks" || name == "adapter_scales") {
      EXPECT_EQ(counters.read_bytes, 0u) << name;
    }
    if (name == "w") {
      EXPECT_EQ(counters.read_bytes, counters.unique_read_bytes);
    }
  }
}

}  // namespace
}  // namespace metal_lora
