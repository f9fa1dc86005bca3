// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What gemm_sm90 does at the end of its tiles against the same product with f32 results (which
// gemm_test.cu checks) and f64 on the host: rotated heads, SwiGLU both ways,
// softmax.
#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/gemm.h"
#include "tests/cuda/gemm_sm90_forms.h"
#include "tests/cuda/support.h"

namespace metal_lora::test {
namespace {

using cuda::bf16;
using cuda::f16;
using cuda::GemmEnd;
using cuda::GemmGroup;
using cuda::GemmPair;

struct Shape {
  uint32_t m, n, k, rank;
  bool bias = false, shrinks = false;
  uint32_t act_rank = 0;
};

template <typename T = bf16>
std::vector<T> normal(std::mt19937& random, size_t count, float scale = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<T> v(count);
  for (T& x : v) x = T(distribution(random));
  return v;
}
template <typename T>
constexpr double kRounding = std::is_same_v<T, bf16> ? 0x1p-8 : 0x1p-11;
/// One rounding to T of a value that f32 arithmetic leaves 2^-20 off at its terms' size.
template <typename T = bf16>
double bound(double value, double terms) {
  return std::abs(value) * kRounding<T> + terms * 0x1p-20 + 1e-6;
}
double sigmoid(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

class GemmEndTest : public testing::Test {
 protected:
  void SetUp() override {
    METAL_LORA_NEEDS_GPU();
    device_ = std::make_unique<TestDevice>();
    if (device_->context().capability != 90) GTEST_SKIP() << "needs compute capability 9.0";
  }

  template <typename T>
  void* keep(const std::vector<T>& host) {
    buffers_.push_back(std::make_unique<DeviceBuffer>(host));
    return buffers_.back()->get();
  }
  void* room(size_t bytes) {
    buffers_.push_back(std::make_unique<DeviceBuffer>(bytes));
    return buffers_.back()->get();
  }
  template <typename T>
  std::vector<T> read(const void* from, size_t count) {
    device_->finish();
    std::vector<T> host(count);
    cuda::check(cudaMemcpy(host.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "read");
    return host;
  }

  /// Problems that share x, each {x, W} and {u, B}.
  template <typename T = bf16>
  GemmGroup group(std::mt19937& random, const Shape& s, int problems, bool right_is_kn) {
    GemmGroup g;
    g.m = s.m;
    g.dtype = g.out_dtype = std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
    g.right_is_kn = right_is_kn;
    g.problems = problems;
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.k));
    const void* x = keep(normal<T>(random, size_t{s.m} * s.k));
    for (int i = 0; i < problems; ++i) {
      auto& p = g.problem[i];
      p.n = s.n;
      const void* w = keep(normal<T>(random, size_t{s.n} * s.k, scale));
      p.pair[p.pairs++] = {x, s.k, w, right_is_kn ? s.n : s.k, s.k};
      if (s.rank > 0) {
        const void* u = keep(normal<T>(random, size_t{s.m} * s.rank, 0.5f));
        const void* b = keep(normal<T>(random, size_t{s.n} * s.rank, 0.5f));
        p.pair[p.pairs++] = {u, s.rank, b, right_is_kn ? s.n : s.rank, s.rank};
      }
      if (s.bias) {
        std::vector<float> bias(s.n);
        for (float& v : bias) v = std::normal_distribution<float>()(random);
        buffers_.push_back(std::make_unique<DeviceBuffer>(bias));
        p.bias = buffers_.back()->get<float>();
      }
    }
    if (s.shrinks) {
      auto& shrink = g.shrink[g.shrinks++];
      shrink.left = x;
      shrink.left_stride = shrink.k = s.k;
      for (int i = 0; i < problems; ++i) {
        const void* a = keep(normal<T>(random, size_t{s.rank} * s.k, scale));
        shrink.part[shrink.parts++] = {
            a, s.k, s.rank, 1.0f, const_cast<void*>(g.problem[i].pair[1].left), s.rank, nullptr};
      }
    }
    return g;
  }

  /// The sums of problem i, unrounded.
  std::vector<float> sums(const GemmGroup& g, int i) {
    GemmGroup plain;
    plain.m = g.m;
    plain.dtype = g.dtype;
    plain.out_dtype = DType::f32;
    plain.right_is_kn = g.right_is_kn;
    plain.problems = 1;
    plain.problem[0] = g.problem[i];
    plain.problem[0].rope = nullptr;
    const uint32_t n = g.problem[i].n;
    plain.problem[0].out = room(size_t{g.m} * n * 4);
    plain.problem[0].out_stride = n;
    cuda::gemm_sm90(device_->context(), plain);
    return read<float>(plain.problem[0].out, size_t{g.m} * n);
  }

  /// For each form that takes the group, twice: the same bits.
  template <typename F>
  void for_each_form(const GemmGroup& g, F&& check) {
    ASSERT_TRUE(cuda::can_gemm_sm90(device_->context(), g));
    int taken = 0;
    for (int form = 0; form < cuda::sm90::form_count(); ++form) {
      if (!cuda::sm90::form_fits(device_->context(), g, form)) continue;
      SCOPED_TRACE(cuda::sm90::form_name(form));
      ++taken;
      check(form);
      if (HasFatalFailure()) return;
    }
    ASSERT_GT(taken, 0);
  }

  /// What the form left of act·aᵀ, added up, of the act that it wrote; and again: the same bits.
  template <typename T>
  void check_parts(
      const GemmGroup& g, int form, const std::vector<T>& act, const std::vector<T>& a) {
    const uint32_t n = g.problem[0].n, rank = g.swiglu.shrink_rank;
    cuda::ActParts p;
    p.parts = g.swiglu.parts;
    p.count = cuda::sm90::act_parts_with_form(device_->context(), g, form);
    p.m = g.m;
    p.rank = rank;
    p.factor = 0.75f;
    p.dtype = g.dtype;
    p.out_stride = rank + 8;
    const size_t count = g.m * p.out_stride;
    p.out = room(count * 2);
    cuda::add_act_parts(device_->context(), p);
    const auto u = read<T>(p.out, count);
    cuda::sm90::gemm_with_form(device_->context(), g, form);
    cuda::add_act_parts(device_->context(), p);
    const auto again = read<T>(p.out, count);
    ASSERT_EQ(std::memcmp(u.data(), again.data(), count * 2), 0);
    const uint32_t step = g.m > 400 ? 37 : 1;
    for (uint32_t r = 0; r < g.m; r += step) {
      for (uint32_t c = 0; c < p.out_stride; ++c) {
        const double got = float(u[r * p.out_stride + c]);
        if (c >= rank) {
          ASSERT_TRUE(std::isnan(got)) << r << " " << c;
          continue;
        }
        double want = 0, terms = 0;
        for (uint32_t k = 0; k < n; ++k) {
          const double term = 0.75 * float(act[size_t{r} * n + k]) * float(a[size_t{c} * n + k]);
          want += term;
          terms += std::abs(term);
        }
        ASSERT_NEAR(got, want, bound<T>(want, terms)) << r << " " << c << " of " << p.count;
      }
    }
  }

  template <typename T = bf16>
  void check_swiglu(const Shape& s, bool writes_both) {
    SCOPED_TRACE(testing::Message() << s.m << " x " << s.n << " x " << s.k << " rank " << s.rank);
    std::mt19937 random(s.m + s.n);
    GemmGroup g = group<T>(random, s, 2, false);
    const size_t stride = 2 * size_t{s.n} + 16, count = s.m * stride;
    auto* both = static_cast<T*>(room(count * 2));
    auto* act = static_cast<T*>(room(size_t{s.m} * s.n * 2));
    g.end = GemmEnd::swiglu;
    g.swiglu = {nullptr, nullptr, stride, act, s.n};
    if (writes_both) g.swiglu.gate = both, g.swiglu.up = both + s.n;
    std::vector<T> a;
    const size_t parts_count = (s.n + 127) / 128 * size_t{s.m} * s.act_rank;
    if (s.act_rank > 0) {
      a = normal<T>(random, size_t{s.act_rank} * s.n, 1.0f / std::sqrt(static_cast<float>(s.n)));
      g.swiglu.parts = static_cast<float*>(room(parts_count * 4));
      g.swiglu.shrink = keep(a);
      g.swiglu.shrink_stride = s.n;
      g.swiglu.shrink_rank = s.act_rank;
    }
    for_each_form(g, [&](int form) {
      cuda::sm90::gemm_with_form(device_->context(), g, form);
      const auto y = read<T>(act, size_t{s.m} * s.n);
      const auto first = read<T>(both, count);
      cuda::sm90::gemm_with_form(device_->context(), g, form);
      const auto again = read<T>(act, size_t{s.m} * s.n);
      ASSERT_EQ(std::memcmp(y.data(), again.data(), y.size() * 2), 0);
      if (s.act_rank > 0) check_parts<T>(g, form, y, a);
      if (HasFatalFailure()) return;
      const auto gate = sums(g, 0), up = sums(g, 1);
      for (uint32_t r = 0; r < s.m; ++r) {
        for (uint32_t c = 0; c < stride; ++c) {
          const bool there = writes_both && c < 2 * s.n;
          const float got = float(first[r * stride + c]);
          if (!there) {
            ASSERT_TRUE(std::isnan(got)) << r << " " << c;
            continue;
          }
          const double want = c < s.n ? gate[r * s.n + c] : up[r * s.n + c - s.n];
          ASSERT_NEAR(got, want, bound<T>(want, 16)) << r << " " << c;
        }
        for (uint32_t c = 0; c < s.n; ++c) {
          const double g = float(T(gate[r * s.n + c])), u = float(T(up[r * s.n + c]));
          const double want = g * sigmoid(g) * u;
          // A sum on the edge between two values of T may round otherwise here.
          const double edge = (std::abs(g) + 1) * (std::abs(u) + 1) * 4 * kRounding<T>;
          ASSERT_NEAR(float(y[r * s.n + c]), want, edge) << r << " " << c;
          if (!writes_both) continue;
          const double kept_g = float(first[r * stride + c]);
          const double kept_u = float(first[r * stride + s.n + c]);
          const double exact = kept_g * sigmoid(kept_g) * kept_u;
          ASSERT_NEAR(float(y[r * s.n + c]), exact, bound<T>(exact, 1)) << r << " " << c;
        }
      }
    });
  }

  void check_backward(const Shape& s, bool writes_act) {
    SCOPED_TRACE(testing::Message() << s.m << " x " << s.n << " x " << s.k << " rank " << s.rank);
    std::mt19937 random(s.m + 3 * s.n);
    GemmGroup g = group(random, s, 1, true);
    const size_t stride = 2 * size_t{s.n} + 8, count = s.m * stride;
    const auto before = normal(random, count);
    auto* both = static_cast<bf16*>(keep(before));
    auto* act = static_cast<bf16*>(room(size_t{s.m} * s.n * 2));
    g.end = GemmEnd::swiglu_backward;
    g.swiglu = {both, both + s.n, stride, writes_act ? act : nullptr, s.n};
    const auto d_act = sums(g, 0);
    std::vector<bf16> bits;
    for_each_form(g, [&](int form) {
      cuda::check(cudaMemcpy(both, before.data(), count * 2, cudaMemcpyHostToDevice), "gate, up");
      cuda::sm90::gemm_with_form(device_->context(), g, form);
      const auto got = read<bf16>(both, count);
      if (bits.empty()) bits = got;
      ASSERT_EQ(std::memcmp(bits.data(), got.data(), count * 2), 0);
      const auto y = read<bf16>(act, size_t{s.m} * s.n);
      for (uint32_t r = 0; r < s.m; ++r) {
        for (uint32_t c = 2 * s.n; c < stride; ++c) {
          ASSERT_EQ(float(got[r * stride + c]), float(before[r * stride + c]));
        }
        for (uint32_t c = 0; c < s.n; ++c) {
          const double x = float(before[r * stride + c]), u = float(before[r * stride + s.n + c]);
          const double d = d_act[r * s.n + c], e = sigmoid(x);
          const double d_gate = d * u * e * (1 + x * (1 - e)), d_up = d * x * e;
          // d_act is rounded on its way.
          ASSERT_NEAR(float(got[r * stride + c]), d_gate, 2 * bound(d_gate, 16)) << r << " " << c;
          ASSERT_NEAR(float(got[r * stride + s.n + c]), d_up, 2 * bound(d_up, 16));
          const double want = x * e * u;
          if (writes_act) ASSERT_NEAR(float(y[r * s.n + c]), want, bound(want, 1)) << r << " " << c;
        }
      }
    });
  }

  void check_rope(const Shape& s, uint32_t head_dim) {
    std::mt19937 random(s.m + 7 * s.n);
    GemmGroup g = group(random, s, 3, false);  // q, k and v, which is not rotated
    const uint32_t half = head_dim / 2;
    std::vector<float> table(size_t{s.m} * head_dim);
    for (uint32_t r = 0; r < s.m; ++r) {
      for (uint32_t i = 0; i < half; ++i) {
        const double angle = r * std::pow(1e4, -2.0 * i / head_dim);
        table[r * head_dim + i] = static_cast<float>(std::cos(angle));
        table[r * head_dim + half + i] = static_cast<float>(std::sin(angle));
      }
    }
    const DeviceBuffer on_device(table);
    const size_t count = size_t{s.m} * s.n;
    for (int i = 0; i < 3; ++i) {
      g.problem[i].out = room(count * 2);
      g.problem[i].out_stride = s.n;
      if (i == 2) continue;
      g.problem[i].rope = on_device.get<float>();
      g.problem[i].head_dim = head_dim;
    }
    for_each_form(g, [&](int form) {
      cuda::sm90::gemm_with_form(device_->context(), g, form);
      for (int i = 0; i < 3; ++i) {
        const auto got = read<bf16>(g.problem[i].out, count);
        const auto plain = sums(g, i);
        for (size_t at = 0; at < count; ++at) {
          const size_t c = at % s.n % head_dim;
          const float* row = &table[at / s.n * head_dim];
          const double other = plain[c < half ? at + half : at - half];
          double want = plain[at];
          if (i < 2) {
            want = c < half ? want * row[c] - other * row[half + c]
                            : want * row[c - half] + other * row[c];
          }
          ASSERT_NEAR(float(got[at]), want, bound(want, 16)) << i << " at " << at;
        }
      }
    });
  }

  void check_softmax(const Shape& s, bool writes) {
    SCOPED_TRACE(testing::Message() << s.m << " x " << s.n << " x " << s.k << " rank " << s.rank);
    std::mt19937 random(s.m + 5 * s.n);
    GemmGroup g = group(random, s, 1, false);
    constexpr uint32_t kColumns = cuda::kGemmSoftmaxColumns;
    const uint32_t tiles = (s.n + kColumns - 1) / kColumns;
    const size_t count = size_t{s.m} * s.n;
    auto* out = static_cast<bf16*>(room(count * 2));
    auto* stats = static_cast<float*>(room(size_t{s.m} * tiles * 8));
    auto* logits = static_cast<float*>(room(s.m * 4));
    std::vector<int32_t> targets(s.m);
    for (auto& t : targets) t = static_cast<int32_t>(random() % s.n);
    targets[s.m / 2] = -1;
    buffers_.push_back(std::make_unique<DeviceBuffer>(targets));
    const auto* of_rows = buffers_.back()->get<int32_t>();
    const auto z = sums(g, 0);
    g.problem[0].out = writes ? out : nullptr;
    g.problem[0].out_stride = s.n;
    g.end = GemmEnd::softmax;
    g.softmax = {stats, of_rows, logits};
    for_each_form(g, [&](int form) {
      cuda::sm90::gemm_with_form(device_->context(), g, form);
      const auto e = read<bf16>(out, count);
      const auto of_tiles = read<float>(stats, size_t{s.m} * tiles * 2);
      const auto of_targets = read<float>(logits, s.m);
      // The forms sum in their own order: 2^-20 of the terms' size, here 16.
      constexpr double kSum = 16 * 0x1p-20;
      for (uint32_t r = 0; r < s.m; ++r) {
        const auto target = static_cast<uint32_t>(targets[r]);
        if (target < s.n) {
          ASSERT_NEAR(of_targets[r], z[r * s.n + target], kSum) << r;
        } else {
          ASSERT_TRUE(std::isnan(of_targets[r])) << r;
        }
        for (uint32_t t = 0; t < tiles; ++t) {
          const uint32_t begin = t * kColumns, end = std::min(s.n, begin + kColumns);
          const float* row = &z[size_t{r} * s.n];
          const double largest = *std::max_element(row + begin, row + end);
          const float* got = &of_tiles[2 * (size_t{r} * tiles + t)];
          ASSERT_NEAR(got[0], largest, kSum) << r << " " << t;
          double sum = 0;
          for (uint32_t c = begin; c < end; ++c) {
            const double want = std::exp(row[c] - largest);
            sum += want;
            const float there = float(e[size_t{r} * s.n + c]);
            if (writes) {
              ASSERT_NEAR(there, want, want * (0x1p-8 + 4 * kSum) + 1e-30) << r << " " << c;
            } else {
              ASSERT_TRUE(std::isnan(there)) << r << " " << c;
            }
          }
          ASSERT_NEAR(got[1], sum, sum * 4 * kSum) << r << " " << t;
        }
      }
    });
  }

  std::unique_ptr<TestDevice> device_;
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;
};

TEST_F(GemmEndTest, MakesActOfGateAndUp) {
  for (const Shape& s :
       {Shape{128, 128, 64, 16},
        Shape{200, 136, 72, 8, true},
        Shape{1, 8, 8, 0},
        Shape{77, 264, 200, 24},
        Shape{384, 512, 256, 64, true}}) {
    for (bool writes_both : {true, false}) {
      check_swiglu(s, writes_both);
      if (HasFatalFailure()) return;
    }
  }
}
TEST_F(GemmEndTest, MakesActAndTheLowRankOperandInOneLaunch) {
  check_swiglu({300, 520, 256, 16, false, true}, true);
  check_swiglu({300, 520, 256, 16, false, true, 16}, true);
}
TEST_F(GemmEndTest, ShrinksTheActItMakes) {
  for (const Shape& s :
       {Shape{128, 128, 64, 16, false, false, 16},
        Shape{201, 136, 72, 8, true, false, 8},
        Shape{1, 8, 8, 0, false, false, 24},
        Shape{333, 264, 200, 24, true, false, 64},
        Shape{77, 520, 64, 16, false, false, 40},
        Shape{1300, 3072, 64, 8, false, false, 16},
        Shape{1301, 3072, 64, 8, false, true, 64}}) {
    for (bool writes_both : {true, false}) {
      check_swiglu(s, writes_both);
      if (HasFatalFailure()) return;
      check_swiglu<f16>(s, writes_both);
      if (HasFatalFailure()) return;
    }
  }
}
TEST_F(GemmEndTest, ShrinksRunsOfTilesIntoFewerParts) {
  std::mt19937 random(2);
  GemmGroup g = group(random, {11 * 128, 24 * 128, 64, 0}, 2, false);
  void* act = room(size_t{g.m} * 24 * 128 * 2);
  g.end = GemmEnd::swiglu;
  g.swiglu = {nullptr, nullptr, 0, act, 24 * 128};
  g.swiglu.parts = static_cast<float*>(act);
  g.swiglu.shrink = act;
  g.swiglu.shrink_stride = 24 * 128;
  g.swiglu.shrink_rank = 16;
  ASSERT_TRUE(cuda::can_gemm_sm90(device_->context(), g));
  const uint32_t parts = cuda::gemm_act_parts(device_->context(), g);
  EXPECT_EQ(24 % parts, 0u);
  if (device_->context().multiprocessors == 132) EXPECT_EQ(parts, 12u);
  g.problem[0].n = g.problem[1].n = 23 * 128;
  EXPECT_EQ(cuda::gemm_act_parts(device_->context(), g), 23u);
}
TEST_F(GemmEndTest, MakesTheSoftmaxOfItsTiles) {
  for (const Shape& s :
       {Shape{128, 256, 64, 0},
        Shape{300, 520, 256, 16},
        Shape{77, 1032, 72, 0},
        Shape{1, 8, 8, 0}}) {
    for (bool writes : {true, false}) {
      check_softmax(s, writes);
      if (HasFatalFailure()) return;
    }
  }
}
TEST_F(GemmEndTest, TurnsGateAndUpIntoTheirGradients) {
  for (const Shape& s :
       {Shape{128, 256, 64, 16},
        Shape{200, 136, 72, 8},
        Shape{1, 8, 8, 0},
        Shape{77, 520, 200, 24},
        Shape{1100, 4096, 64, 16}}) {
    for (bool writes_act : {true, false}) {
      check_backward(s, writes_act);
      if (HasFatalFailure()) return;
    }
  }
}
TEST_F(GemmEndTest, RotatesHeads) {
  check_rope({200, 192, 72, 8}, 64);
  check_rope({129, 384, 136, 16, true}, 128);
}
TEST_F(GemmEndTest, RefusesWhatItsTilesDoNotHold) {
  std::mt19937 random(1);
  GemmGroup g = group(random, {16, 24, 16, 0}, 2, false);
  void* act = room(16 * 24 * 2);
  g.end = GemmEnd::swiglu;
  g.swiglu = {nullptr, nullptr, 0, act, 24};
  EXPECT_TRUE(cuda::can_gemm_sm90(device_->context(), g));
  g.problem[1].n = 16;
  EXPECT_FALSE(cuda::can_gemm_sm90(device_->context(), g));
  g.problem[1].n = 24;
  g.swiglu.parts = static_cast<float*>(act);
  g.swiglu.shrink = act;
  g.swiglu.shrink_stride = 24;
  for (uint32_t rank : {0u, 8u, 12u, 64u, 72u}) {
    g.swiglu.shrink_rank = rank;
    EXPECT_EQ(cuda::can_gemm_sm90(device_->context(), g), rank == 8 || rank == 64) << rank;
  }
  g.swiglu.parts = nullptr;
  g.swiglu.act = nullptr;
  EXPECT_FALSE(cuda::can_gemm_sm90(device_->context(), g));
  g.end = GemmEnd::plain;
  g.problem[0].rope = static_cast<const float*>(act);
  g.problem[0].head_dim = 64;
  EXPECT_FALSE(cuda::can_gemm_sm90(device_->context(), g));
}

}  // namespace
}  // namespace metal_lora::test
