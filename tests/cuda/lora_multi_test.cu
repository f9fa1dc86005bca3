// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The multi-adapter linear on CUDA against f64, in all its forms, and what it promises bit for bit.
// The banks hold NaN beyond each adapter's true rank: nothing there may enter a sum. Indices lie
// outside the bank on both sides.
#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <limits>

#include "kernels/cuda/lora_kernels.h"
#include "kernels/cuda/lora_multi.cuh"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

struct Case {
  uint32_t m, n, k;
  DType dtype, adapter_dtype;
  WeightFormat format;
  std::vector<int32_t> ranks;
  uint32_t max_rank;
  bool bias;
};

/// As `values`, with the dtype's NaN where they are NaN.
Array with_nan(DType dtype, const std::vector<double>& values) {
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

class Multi {
 public:
  Multi(TestDevice& device, const Case& c, uint32_t seed) : device_(device), c_(c) {
    std::mt19937 rng(seed);
    const size_t adapters = c.ranks.size();
    w = random_weight(rng, c.format, c.n, c.k, c.format == WeightFormat::nf4 ? 64 : 32);
    x = random_array(rng, c.dtype, size_t{c.m} * c.k);
    dy = random_array(rng, c.dtype, size_t{c.m} * c.n);
    for (double v : random_array(rng, DType::f32, c.n).values) {
      bias.push_back(static_cast<float>(v));
    }
    fill_bank(rng);
    for (uint32_t t = 0; t < c.m; ++t) {
      const int32_t outside[] = {-1, static_cast<int32_t>(adapters), INT_MIN, INT_MAX};
      index.push_back(
          t % 5 == 3 ? outside[rng() % 4]
                     : static_cast<int32_t>(rng() % std::max<size_t>(1, adapters)));
    }
  }

  void forward() {
    const Buffers buffers(*this);
    DeviceBuffer out(size_t{c_.m} * c_.n * size());
    cuda::lora_linear_multi_forward(
        device_.context(),
        c_.m,
        c_.dtype,
        buffers.x.get(),
        buffers.weight(*this),
        buffers.bank(*this),
        buffers.index.get<int32_t>(),
        c_.bias ? buffers.bias.get<float>() : nullptr,
        out.get());
    device_.finish();
    y = out.download<unsigned char>();
  }
  /// The streaming form alone; false: it does not take the case.
  bool stream(uint32_t patience_ns) {
    using cuda::multi::Bank;
    const Buffers buffers(*this);
    DeviceBuffer out(size_t{c_.m} * c_.n * size());
    const cuda::LoraBankView bank = buffers.bank(*this);
    const auto side = [&](const void* right, uint32_t columns) {
      return Bank{right, c_.adapter_dtype, columns, c_.max_rank, bank.ranks, bank.scales};
    };
    cuda::multi::Stream call;
    call.m = c_.m, call.n = c_.n, call.k = c_.k, call.dtype = c_.dtype;
    call.x = buffers.x.get(), call.w = buffers.w.get(), call.y = out.get();
    call.index = buffers.index.get<int32_t>();
    call.a = side(bank.a, c_.k), call.b = side(bank.b, c_.n);
    call.adapters = bank.params.adapters;
    call.bias = c_.bias ? buffers.bias.get<float>() : nullptr;
    call.patience_ns = patience_ns;
    if (weight_roundings() != 0 || !cuda::multi::can_stream(device_.context(), call)) return false;
    cuda::multi::stream(device_.context(), call);
    device_.finish();
    y = out.download<unsigned char>();
    return true;
  }
  void backward(bool want_dx = true, bool want_da = true, bool want_db = true) {
    const Buffers buffers(*this);
    const size_t adapters = c_.ranks.size();
    DeviceBuffer dx_out(size_t{c_.m} * c_.k * size()), da_out(adapters * c_.max_rank * c_.k * 4),
        db_out(adapters * c_.n * c_.max_rank * 4);
    cuda::lora_linear_multi_backward(
        device_.context(),
        c_.m,
        c_.dtype,
        buffers.x.get(),
        buffers.weight(*this),
        buffers.bank(*this),
        buffers.index.get<int32_t>(),
        buffers.dy.get(),
        want_dx ? dx_out.get() : nullptr,
        want_da ? da_out.get<float>() : nullptr,
        want_db ? db_out.get<float>() : nullptr);
    device_.finish();
    dx = dx_out.download<unsigned char>();
    da = da_out.download<float>();
    db = db_out.download<float>();
  }

  uint32_t rank(uint32_t t) const {
    const bool inside = index[t] >= 0 && static_cast<size_t>(index[t]) < c_.ranks.size();
    return inside ? static_cast<uint32_t>(c_.ranks[index[t]]) : 0;
  }
  /// Relative error of a k-long f32 sum whose operands were rounded `operands` times more than the
  /// f64 reference's. Tensor cores may cut what they add: twice the unit of rounding.
  double unit(double operands, size_t k) const {
    return operands * roundoff(c_.dtype) + (static_cast<double>(k) + 16) * 0x1p-23;
  }
  /// W goes through a copy in x's type where it is not stored so.
  double weight_roundings() const {
    return static_cast<uint32_t>(c_.format) == static_cast<uint32_t>(c_.dtype) ? 0 : 1;
  }
  /// In the matrix-vector form an affine weight's q·scale and bias may be added apart.
  double weight_size(double v) const {
    return c_.format == WeightFormat::int4 && c_.m <= cuda::kVectorMaxTokens ? 96.0 : std::fabs(v);
  }

  void check_forward() const;
  void check_backward() const;

  Weight w;
  Array x, dy, a, b;
  std::vector<float> bias, scales, da, db;
  std::vector<int32_t> index;
  std::vector<unsigned char> y, dx;

 private:
  struct Buffers {
    explicit Buffers(const Multi& m)
        : x(m.x.bytes),
          dy(m.dy.bytes),
          w(m.w.data.bytes),
          w_scales(m.w.scales.bytes),
          w_biases(m.w.biases.bytes),
          a(m.a.bytes),
          b(m.b.bytes),
          bias(m.bias),
          scales(m.scales),
          ranks(m.c_.ranks),
          index(m.index) {}
    cuda::WeightView weight(const Multi& m) const {
      return {m.w.params, w.get(), w_scales.get(), w_biases.get()};
    }
    cuda::LoraBankView bank(const Multi& m) const {
      const LoraMultiParams p = {
          static_cast<uint32_t>(m.c_.ranks.size()), m.c_.max_rank, m.c_.adapter_dtype};
      return {p, a.get(), b.get(), ranks.get<int32_t>(), scales.get<float>()};
    }
    DeviceBuffer x, dy, w, w_scales, w_biases, a, b, bias, scales, ranks, index;
  };

  size_t size() const { return c_.dtype == DType::f32 ? 4 : 2; }
  void fill_bank(std::mt19937& rng) {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    std::normal_distribution<double> normal(0.0, 0.5);
    std::vector<double> av, bv;
    for (int32_t rank : c_.ranks) {
      for (uint32_t j = 0; j < c_.max_rank; ++j) {
        for (uint32_t p = 0; p < c_.k; ++p) {
          av.push_back(j < static_cast<uint32_t>(rank) ? normal(rng) : kNan);
        }
      }
      for (uint32_t r = 0; r < c_.n * c_.max_rank; ++r) {
        bv.push_back(r % c_.max_rank < static_cast<uint32_t>(rank) ? normal(rng) : kNan);
      }
      scales.push_back(static_cast<float>(normal(rng) * 3));
    }
    a = with_nan(c_.adapter_dtype, av);
    b = with_nan(c_.adapter_dtype, bv);
  }
  double a_at(uint32_t t, uint32_t j, uint32_t p) const {
    return a.values[(size_t(index[t]) * c_.max_rank + j) * c_.k + p];
  }
  double b_at(uint32_t t, uint32_t row, uint32_t j) const {
    return b.values[(size_t(index[t]) * c_.n + row) * c_.max_rank + j];
  }
  /// A_i·x[t] and the sums of its terms' magnitudes.
  void down(uint32_t t, std::vector<double>* u, std::vector<double>* size) const {
    u->assign(rank(t), 0.0);
    size->assign(rank(t), 0.0);
    for (uint32_t j = 0; j < rank(t); ++j) {
      for (uint32_t p = 0; p < c_.k; ++p) {
        const double term = x.values[size_t{t} * c_.k + p] * a_at(t, j, p);
        (*u)[j] += term;
        (*size)[j] += std::fabs(term);
      }
    }
  }

  TestDevice& device_;
  Case c_;
};

void Multi::check_forward() const {
  for (uint32_t t = 0; t < c_.m; ++t) {
    std::vector<double> us, u_size;
    down(t, &us, &u_size);
    for (uint32_t row = 0; row < c_.n; ++row) {
      double want = c_.bias ? bias[row] : 0, rounded = 0, summed = std::fabs(want), adapter = 0;
      for (uint32_t p = 0; p < c_.k; ++p) {
        const double xp = x.values[size_t{t} * c_.k + p], wp = w.values[size_t{row} * c_.k + p];
        want += xp * wp;
        rounded += std::fabs(xp * wp);
        summed += std::fabs(xp) * weight_size(wp);
      }
      for (uint32_t j = 0; j < rank(t); ++j) {
        const double term = scales[index[t]] * b_at(t, row, j);
        want += term * us[j];
        adapter += std::fabs(term) * u_size[j];
      }
      // The adapter's share stays in f32 until y is rounded: no operand of it is rounded.
      const double bound = rounded * weight_roundings() * roundoff(c_.dtype) +
                           summed * unit(0, c_.k) + adapter * unit(0, c_.k + rank(t));
      ASSERT_NEAR(
          stored_value(y.data(), c_.dtype, size_t{t} * c_.n + row),
          want,
          bound + (std::fabs(want) + bound) * roundoff(c_.dtype) + 0x1p-24)
          << "token " << t << " adapter " << index[t] << " row " << row;
    }
  }
}

void Multi::check_backward() const {
  const size_t r = c_.max_rank;
  std::vector<double> want_da(da.size()), da_size(da.size()), want_db(db.size()),
      db_size(db.size());
  for (uint32_t t = 0; t < c_.m; ++t) {
    std::vector<double> us, u_size, v(rank(t)), v_size(rank(t));
    down(t, &us, &u_size);
    for (uint32_t j = 0; j < rank(t); ++j) {
      for (uint32_t row = 0; row < c_.n; ++row) {
        const double dy_scaled = scales[index[t]] * dy.values[size_t{t} * c_.n + row];
        v[j] += dy_scaled * b_at(t, row, j);
        v_size[j] += std::fabs(dy_scaled * b_at(t, row, j));
        const size_t at = (size_t(index[t]) * c_.n + row) * r + j;
        want_db[at] += dy_scaled * us[j];
        db_size[at] += std::fabs(dy_scaled) * u_size[j];
      }
      for (uint32_t p = 0; p < c_.k; ++p) {
        const size_t at = (size_t(index[t]) * r + j) * c_.k + p;
        want_da[at] += v[j] * x.values[size_t{t} * c_.k + p];
        da_size[at] += v_size[j] * std::fabs(x.values[size_t{t} * c_.k + p]);
      }
    }
    for (uint32_t p = 0; p < c_.k; ++p) {
      double want = 0, base = 0, adapter = 0;
      for (uint32_t row = 0; row < c_.n; ++row) {
        const double term = dy.values[size_t{t} * c_.n + row] * w.values[size_t{row} * c_.k + p];
        want += term;
        base += std::fabs(term);
      }
      for (uint32_t j = 0; j < rank(t); ++j) {
        want += v[j] * a_at(t, j, p);
        adapter += v_size[j] * std::fabs(a_at(t, j, p));
      }
      const double bound =
          base * unit(weight_roundings(), c_.n) + adapter * unit(0, c_.n + rank(t));
      ASSERT_NEAR(
          stored_value(dx.data(), c_.dtype, size_t{t} * c_.k + p),
          want,
          bound + (std::fabs(want) + bound) * roundoff(c_.dtype) + 0x1p-24)
          << "dx token " << t << " column " << p;
    }
  }
  // Sums over tokens of products of f32 sums: exactly 0 where nothing was added.
  for (size_t i = 0; i < da.size(); ++i) {
    ASSERT_NEAR(da[i], want_da[i], da_size[i] * unit(0, c_.m + c_.n)) << "dA " << i;
  }
  for (size_t i = 0; i < db.size(); ++i) {
    ASSERT_NEAR(db[i], want_db[i], db_size[i] * unit(0, c_.m + c_.k)) << "dB " << i;
  }
}

std::vector<Case> cases() {
  using enum WeightFormat;
  using D = DType;
  std::vector<Case> list;
  const std::vector<int32_t> many = {16, 3, 0, 33, 8, 8, 8, 40, 1};
  for (D d : {D::f32, D::f16, D::bf16}) {
    const auto own = static_cast<WeightFormat>(d);
    // Aligned: what 16-bit types stream. One and more tiles of W, of tokens; more than one slice.
    list.push_back({1, 48, 64, d, d, own, {8}, 8, true});
    list.push_back({3, 130, 1096, d, d, own, {16, 5, 16}, 16, false});
    list.push_back({8, 129, 520, d, D::f32, own, {4, 2, 0, 3}, 4, true});
    list.push_back({16, 64, 2056, d, D::f16, own, {16, 7}, 24, true});
    list.push_back({17, 36, 72, d, D::bf16, own, many, 40, true});
    list.push_back({64, 257, 256, d, d, own, std::vector<int32_t>(50, 16), 16, true});
    list.push_back({65, 100, 136, d, d, own, many, 64, false});
    list.push_back({128, 140, 200, d, D::f32, own, many, 40, true});
    list.push_back({128, 8, 1032, d, d, own, {64, 1, 9}, 64, false});
    // Grouped: odd shapes, weights of other types, more tokens, tokens sorted by a kernel.
    list.push_back({1, 33, 47, d, D::f32, f32, {3}, 3, true});
    list.push_back({5, 48, 96, d, D::bf16, int4, {16, 4, 0, 9}, 16, false});
    list.push_back({8, 64, 128, d, D::f16, nf4, {16, 16, 8, 1}, 24, true});
    list.push_back({8, 31, 160, d, d, bf16, {8, 20}, 20, true});
    list.push_back({9, 31, 33, d, D::f32, f16, {5, 2, 7}, 9, true});
    list.push_back({70, 150, 128, d, D::bf16, nf4, many, 40, true});
    list.push_back({33, 80, 64, d, d, int8, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 16, false});
    list.push_back({17, 17, 1701, d, D::f32, bf16, {4, 6}, 8, false});
    list.push_back({200, 65, 96, d, d, own, {100, 16, 2}, 100, true});
    list.push_back({1000, 40, 72, d, d, own, many, 40, true});
    // Streamed again: tiles of W shared by blocks, and one to a block; many tokens
    // of one and of few adapters; more adapters than a block has room for in shared memory.
    list.push_back({20, 1200, 136, d, d, own, {16, 16, 5}, 16, true});
    list.push_back({33, 2601, 72, d, d, own, std::vector<int32_t>(50, 16), 16, true});
    list.push_back({40, 4300, 40, d, d, own, std::vector<int32_t>(40, 12), 64, false});
    list.push_back({100, 200, 136, d, d, own, {16}, 16, true});
    list.push_back({128, 300, 520, d, d, own, std::vector<int32_t>(8, 16), 16, true});
    // Parts of k: of as many blocks as k has steps, of two; one, with 64 rows of W.
    list.push_back({72, 130, 1096, d, d, own, many, 40, true});
    list.push_back({90, 700, 328, d, d, own, std::vector<int32_t>(90, 16), 16, false});
    list.push_back({9, 5700, 136, d, d, own, {16, 5, 0, 16}, 16, true});
    list.push_back({128, 300, 40, d, d, own, std::vector<int32_t>(100, 16), 16, true});
    list.push_back({64, 100, 136, d, d, own, std::vector<int32_t>(60, 48), 64, true});
    list.push_back({128, 140, 520, d, d, own, std::vector<int32_t>(90, 50), 64, false});
  }
  return list;
}

std::string trace(const Case& c) {
  return "m=" + std::to_string(c.m) + " n=" + std::to_string(c.n) + " k=" + std::to_string(c.k) +
         " " + name_of(c.dtype) + " bank " + name_of(c.adapter_dtype) + " format " +
         std::to_string(static_cast<int>(c.format));
}

TEST(CudaLoraMulti, ForwardAndBackwardMatchF64) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (const Case& c : cases()) {
    SCOPED_TRACE(trace(c));
    Multi multi(device, c, c.m * 31 + c.k);
    multi.forward();
    multi.check_forward();
    multi.backward();
    multi.check_backward();
    if (testing::Test::HasFatalFailure()) return;
  }
}

TEST(CudaLoraMulti, SaysTheSameTwice) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (const Case& c : cases()) {
    SCOPED_TRACE(trace(c));
    Multi multi(device, c, 3);
    multi.forward();
    multi.backward();
    const auto y = multi.y, dx = multi.dx;
    const auto da = multi.da, db = multi.db;
    multi.forward();
    multi.backward();
    EXPECT_EQ(multi.y, y);
    EXPECT_EQ(multi.dx, dx);
    EXPECT_EQ(multi.da, da);
    EXPECT_EQ(multi.db, db);
  }
}

/// The batch in another order, with other neighbours: the same bits.
TEST(CudaLoraMulti, TokensDoNotSeeTheirNeighbours) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (const Case& c : cases()) {
    SCOPED_TRACE(trace(c));
    Multi multi(device, c, 5), moved(device, c, 5);
    const size_t x_bytes = multi.x.bytes.size() / c.m;
    // Every token moves, and its old neighbours now use other adapters or none.
    const uint32_t shift = c.m / 2;
    std::mt19937 rng(8);
    for (uint32_t t = 0; t < c.m; ++t) {
      const uint32_t from = (t + shift) % c.m;
      moved.index[t] =
          t % 3 != 1 ? multi.index[from] : static_cast<int32_t>(rng() % c.ranks.size());
      std::memcpy(
          moved.x.bytes.data() + t * x_bytes, multi.x.bytes.data() + from * x_bytes, x_bytes);
    }
    multi.forward();
    moved.forward();
    const size_t y_bytes = multi.y.size() / c.m;
    for (uint32_t t = 0; t < c.m; ++t) {
      const uint32_t from = (t + shift) % c.m;
      if (moved.index[t] != multi.index[from]) continue;
      ASSERT_EQ(
          std::memcmp(moved.y.data() + t * y_bytes, multi.y.data() + from * y_bytes, y_bytes), 0)
          << "token " << t;
    }
  }
}

/// What the streaming form takes; what it does not, the grouped form works out.
TEST(CudaLoraMulti, StreamsWholeVectorsOfOneType) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  const DType bf16 = DType::bf16;
  const Case whole = {20, 101, 136, bf16, bf16, WeightFormat::bf16, {16, 5, 40}, 40, true};
  std::vector<std::pair<Case, bool>> list = {{whole, true}};
  const auto with = [&](bool streams, const auto& change) {
    Case c = whole;
    change(c);
    list.push_back({c, streams});
  };
  with(true, [](Case& c) { c.m = 128; });
  with(true, [](Case& c) { c.ranks = {64, 1, 9}, c.max_rank = 64; });
  with(true, [](Case& c) { c.ranks = {8, 8}, c.max_rank = 8; });
  with(false, [](Case& c) { c.m = 129; });
  with(false, [](Case& c) { c.k = 137; });
  with(false, [](Case& c) { c.max_rank = 41; });
  with(false, [](Case& c) { c.ranks = {72}, c.max_rank = 72; });
  with(false, [](Case& c) { c.adapter_dtype = DType::f32; });
  with(false, [](Case& c) { c.adapter_dtype = DType::f16; });
  for (const auto& [c, streams] : list) {
    SCOPED_TRACE(trace(c) + " rank " + std::to_string(c.max_rank));
    Multi multi(device, c, 6);
    multi.forward();
    multi.check_forward();
    EXPECT_EQ(multi.stream(200'000), streams && device.context().capability == 90);
    multi.check_forward();
  }
}

/// Blocks that do not wait for what others make of u make it themselves, and leave the flags clear.
TEST(CudaLoraMulti, ImpatientBlocksSayTheSame) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (const Case& c : cases()) {
    SCOPED_TRACE(trace(c));
    Multi multi(device, c, 4);
    multi.forward();
    const auto y = multi.y;
    if (!multi.stream(0)) continue;
    EXPECT_EQ(multi.y, y);
    multi.forward();
    EXPECT_EQ(multi.y, y);
  }
}

TEST(CudaLoraMulti, WritesOnlyWhatIsAskedFor) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  const Case c = cases()[5];
  Multi multi(device, c, 9), parts(device, c, 9);
  multi.backward();
  parts.backward(true, false, false);
  EXPECT_EQ(parts.dx, multi.dx);
  parts.backward(false, true, false);
  EXPECT_EQ(parts.da, multi.da);
  parts.backward(false, false, true);
  EXPECT_EQ(parts.db, multi.db);
}

TEST(CudaLoraMulti, NoTokensOrNoAdapters) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (size_t which : {0u, 5u, 18u}) {
    Case c = cases()[which];
    c.m = 0;
    Multi none(device, c, 1);
    none.forward();
    none.backward();
    for (float v : none.da) EXPECT_EQ(v, 0.0f);
    for (float v : none.db) EXPECT_EQ(v, 0.0f);
    for (uint32_t m : {12u, 40u}) {
      c.m = m;
      Multi unused(device, c, 1);
      unused.index.assign(m, -1);
      unused.forward();
      unused.check_forward();
      unused.backward();
      unused.check_backward();
      Case empty = c;
      empty.ranks.clear();
      empty.max_rank = 0;
      Multi base(device, empty, 1);
      base.index.assign(m, -1);
      base.forward();
      base.check_forward();
    }
  }
}

}  // namespace
}  // namespace metal_lora::test
