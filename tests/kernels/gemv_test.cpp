// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_gemv_forward against an f64 reference for every input type, format, layout, instruction set
// of this machine and odd shapes, and the bitwise promises of gemv.h.
#include "kernels/cpu/gemv.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/gemv_convert.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/lora_quantized.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/nf4.h"

namespace metal_lora::cpu {
namespace {

constexpr double kEps32 = 0x1p-24, kEps16 = 0x1p-11, kEpsBf16 = 0x1p-8;  // half an ulp of 1

double rounding(DType dtype) {
  return dtype == DType::f32 ? kEps32 : dtype == DType::f16 ? kEps16 : kEpsBf16;
}

std::vector<Isa> isas() {
  std::vector<Isa> out;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::neon}) {
    if (isa_supported(isa)) out.push_back(isa);
  }
  return out;
}

/// Values of a dtype, and the same as doubles.
struct Values {
  std::vector<uint8_t> bytes;
  std::vector<double> exact;
};

Values random_values(size_t count, DType dtype, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Values v;
  v.bytes.resize(count * dtype_bytes(dtype) + 64);
  v.exact.resize(count);
  for (size_t i = 0; i < count; ++i) {
    write_float(v.bytes.data(), dtype, i, normal(rng));
    v.exact[i] = read_float(v.bytes.data(), dtype, i);
  }
  return v;
}

/// A random weight of any format and layout, with its rows as doubles.
struct Weight {
  WeightView view;
  std::vector<uint8_t> data, scales, biases, packed;
  std::vector<double> exact;
};

DType dense_dtype(WeightFormat format) {
  return format == WeightFormat::f32   ? DType::f32
         : format == WeightFormat::f16 ? DType::f16
                                       : DType::bf16;
}

Weight random_weight(WeightParams p, std::mt19937& rng) {
  Weight w;
  const size_t count = size_t{p.n} * p.k;
  w.view.params = p;
  if (p.format <= WeightFormat::bf16) {
    Values v = random_values(count, dense_dtype(p.format), rng);
    w.data = std::move(v.bytes);
    w.exact = std::move(v.exact);
    w.view.data = w.data.data();
    return w;
  }
  const bool nf4 = p.format == WeightFormat::nf4;
  const uint32_t bits = p.format == WeightFormat::int8 ? 8 : 4;
  const size_t groups = count / p.group_size;
  w.data.resize(count * bits / 8 + 64);
  for (uint8_t& byte : w.data) byte = static_cast<uint8_t>(rng());
  Values scales = random_values(groups, p.scales_dtype, rng);
  Values biases = random_values(groups, p.scales_dtype, rng);
  w.exact.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const uint8_t byte = w.data[i * bits / 8];
    const int q = bits == 8 ? byte : byte >> (4 * (i & 1)) & 15;
    const double scale = scales.exact[i / p.group_size];
    w.exact[i] = nf4 ? kNf4Levels[q] * scale : q * scale + biases.exact[i / p.group_size];
  }
  w.scales = std::move(scales.bytes);
  w.biases = std::move(biases.bytes);
  w.view.data = w.data.data();
  w.view.scales = w.scales.data();
  w.view.biases = w.biases.data();
  if (p.layout == WeightLayout::cpu_packed) {
    WeightView row_major = w.view;
    row_major.params.layout = WeightLayout::row_major;
    w.packed.resize(packed_weight_bytes(p));
    pack_weight(row_major, w.packed.data());
    w.view.data = w.packed.data();
    w.view.scales = w.view.biases = nullptr;
  }
  return w;
}

struct Branch {
  Weight weight;
  Values a, b, residual;
  std::vector<float> bias, u;
  std::vector<uint8_t> y;
  LoraBranch view;
};

Branch random_branch(
    WeightParams p, uint32_t m, DType dtype, uint32_t rank, DType lora_dtype, std::mt19937& rng) {
  Branch out;
  out.weight = random_weight(p, rng);
  out.a = random_values(size_t{rank} * p.k, lora_dtype, rng);
  out.b = random_values(size_t{rank} * p.n, lora_dtype, rng);
  out.residual = random_values(size_t{m} * p.n, dtype, rng);
  std::normal_distribution<float> normal;
  for (uint32_t i = 0; i < p.n; ++i) out.bias.push_back(normal(rng));
  out.u.resize(size_t{m} * rank);
  out.y.resize(size_t{m} * p.n * dtype_bytes(dtype));
  return out;
}

void connect(Branch& b, uint32_t rank, DType lora_dtype, bool extras) {
  b.view.weight = b.weight.view;
  b.view.lora.params.rank = rank;
  b.view.lora.params.scale = 0.75f;
  b.view.lora.params.dtype = lora_dtype;
  b.view.lora.a = b.a.bytes.data();
  b.view.lora.b = b.b.bytes.data();
  b.view.y = b.y.data();
  b.view.u = rank > 0 && extras ? b.u.data() : nullptr;
  b.view.bias = extras ? b.bias.data() : nullptr;
  b.view.residual = extras ? b.residual.bytes.data() : nullptr;
}

/// |sum| error of a chain of `terms` f32 operations whose terms' magnitudes add up to `size`:
/// gamma_n = n·eps/(1 - n·eps) (Higham, Accuracy and Stability, 3.1); dot products keep ≥ 16
/// lanes or rows apart, but the bound for one chain holds for any order.
double chain_error(double terms, double size) {
  return terms * 2 * kEps32 * size;
}

void expect_matches(
    const Branch& b, uint32_t m, DType dtype, const Values& x, const std::string& what) {
  const WeightParams& p = b.weight.view.params;
  const uint32_t rank = b.view.lora.params.rank;
  const double scale = b.view.lora.params.scale;
  const bool affine = p.format == WeightFormat::int4 || p.format == WeightFormat::int8;
  // Where x is multiplied in bf16, the packed form rounds NF4's levels to it.
  const bool levels_rounded = p.format == WeightFormat::nf4 && dtype == DType::bf16 &&
                              p.layout == WeightLayout::cpu_packed &&
                              active_isa() == Isa::avx512_bf16;
  for (uint32_t t = 0; t < m; ++t) {
    std::vector<double> u(rank), u_size(rank);
    for (uint32_t j = 0; j < rank; ++j) {
      for (uint32_t i = 0; i < p.k; ++i) {
        const double term = x.exact[size_t{t} * p.k + i] * b.a.exact[size_t{j} * p.k + i];
        u[j] += term;
        u_size[j] += std::fabs(term);
      }
      if (b.view.u != nullptr) {
        ASSERT_NEAR(b.view.u[size_t{t} * rank + j], u[j], chain_error(p.k, u_size[j])) << what;
      }
    }
    for (uint32_t r = 0; r < p.n; ++r) {
      double y = 0, size = 0, extra = 0, levels = 0;
      for (uint32_t i = 0; i < p.k; ++i) {
        const double xi = x.exact[size_t{t} * p.k + i];
        const double w = b.weight.exact[size_t{r} * p.k + i];
        y += w * xi;
        // Affine: |q·scale| and |bias| add up apart; both are ≤ 255·|scale| + |bias|, and normal
        // samples stay under 6, so (255 + 1)·6 bounds a term of int8 and (15 + 1)·6 of int4.
        const double most = p.format == WeightFormat::int8 ? 1536.0 : 96.0;
        size += (affine ? most : std::fabs(w)) * std::fabs(xi);
        if (levels_rounded) levels += kEpsBf16 * std::fabs(w * xi);
      }
      for (uint32_t j = 0; j < rank; ++j) {
        const double bj = b.b.exact[size_t{r} * rank + j] * scale;
        y += bj * u[j];
        size += std::fabs(bj) * u_size[j];
      }
      if (b.view.bias != nullptr) {
        y += b.bias[r] + b.residual.exact[size_t{t} * p.n + r];
        extra = std::fabs(b.bias[r]) + std::fabs(b.residual.exact[size_t{t} * p.n + r]);
      }
      const double tolerance = chain_error(p.k + rank + 8.0, size + extra) + levels +
                               rounding(dtype) * (std::fabs(y) + levels) + 0x1p-24;
      ASSERT_NEAR(read_float(b.y.data(), dtype, size_t{t} * p.n + r), y, tolerance)
          << what << " token " << t << " row " << r;
    }
  }
}

std::string name_of(Isa isa, WeightParams p, DType dtype, uint32_t m, uint32_t rank) {
  return std::string(isa_name(isa)) + " format " + std::to_string(uint32_t(p.format)) + " layout " +
         std::to_string(uint32_t(p.layout)) + " group " + std::to_string(p.group_size) +
         " scales " + std::to_string(uint32_t(p.scales_dtype)) + " n " + std::to_string(p.n) +
         " k " + std::to_string(p.k) + " x " + std::to_string(uint32_t(dtype)) + " m " +
         std::to_string(m) + " rank " + std::to_string(rank);
}

class Gemv : public testing::Test {
 protected:
  void TearDown() override { set_active_isa(detected_isa()); }
  std::mt19937 rng_{7};

  void check(WeightParams p, uint32_t m, DType dtype, uint32_t rank, DType lora_dtype) {
    const Values x = random_values(size_t{m} * p.k, dtype, rng_);
    Branch b = random_branch(p, m, dtype, rank, lora_dtype, rng_);
    for (Isa isa : isas()) {
      ASSERT_TRUE(set_active_isa(isa));
      for (bool extras : {false, true}) {
        connect(b, rank, lora_dtype, extras);
        std::fill(b.y.begin(), b.y.end(), uint8_t{0xff});
        lora_gemv_forward(m, p.k, dtype, x.bytes.data(), &b.view, 1);
        expect_matches(b, m, dtype, x, name_of(isa, p, dtype, m, rank));
        if (HasFatalFailure()) return;
      }
    }
  }
};

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

TEST_F(Gemv, DenseFormatsMatchTheReference) {
  const uint32_t ns[] = {1, 16, 31, 33, 64}, ks[] = {1, 15, 32, 47, 160};
  uint32_t i = 0;
  for (WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16}) {
    for (DType dtype : kDTypes) {
      for (uint32_t m = 1; m <= 8; ++m, ++i) {
        WeightParams p;
        p.n = ns[i % 5];
        p.k = ks[(i / 2) % 5];
        p.format = format;
        check(p, m, dtype, 0, DType::f32);
        check(p, m, dtype, 1 + i % 19, kDTypes[i % 3]);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(Gemv, AffineFormatsMatchTheReference) {
  const uint32_t ns[] = {1, 16, 31, 33, 64};
  uint32_t i = 0;
  for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8}) {
    for (WeightLayout layout : {WeightLayout::row_major, WeightLayout::cpu_packed}) {
      for (DType scales : kDTypes) {
        for (DType dtype : kDTypes) {
          for (uint32_t m = 1; m <= 8; ++m, ++i) {
            WeightParams p;
            p.format = format;
            p.layout = layout;
            p.group_size = 32u << (i % 3);
            p.k = p.group_size * (1 + i % 4);
            p.n = layout == WeightLayout::cpu_packed ? 16 * (1 + i % 5) : ns[i % 5];
            p.scales_dtype = scales;
            check(p, m, dtype, i % 2 == 0 ? 0 : 16, kDTypes[i / 2 % 3]);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_F(Gemv, Nf4MatchesTheReference) {
  const uint32_t ns[] = {1, 16, 31, 33, 64};
  uint32_t i = 0;
  for (WeightLayout layout : {WeightLayout::row_major, WeightLayout::cpu_packed}) {
    for (DType dtype : kDTypes) {
      for (uint32_t m = 1; m <= 8; ++m, ++i) {
        WeightParams p;
        p.format = WeightFormat::nf4;
        p.layout = layout;
        p.group_size = 64;
        p.k = 64 * (1 + i % 4);
        p.n = layout == WeightLayout::cpu_packed ? 16 * (1 + i % 5) : ns[i % 5];
        check(p, m, dtype, i % 2 == 0 ? 0 : 16, kDTypes[i / 2 % 3]);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(Gemv, ManyRowsAndThreads) {
  WeightParams p;
  p.n = 4097;
  p.k = 64;
  p.format = WeightFormat::bf16;
  check(p, 1, DType::bf16, 8, DType::bf16);
  p.n = 4096;
  p.format = WeightFormat::int4;
  p.layout = WeightLayout::cpu_packed;
  p.group_size = 32;
  p.scales_dtype = DType::f16;
  check(p, 3, DType::bf16, 24, DType::f32);
}

TEST_F(Gemv, NoInputsGiveBiasAndResidual) {
  WeightParams p;
  p.n = 17;
  p.k = 0;
  check(p, 2, DType::f32, 4, DType::f32);
}

/// A token's bits must not change with m, its place, its neighbours or the threads.
TEST_F(Gemv, TokensAreIndependentBitForBit) {
  const int threads = thread_count();
  for (Isa isa : isas()) {
    ASSERT_TRUE(set_active_isa(isa));
    for (DType dtype : kDTypes) {
      for (uint32_t f = 0; f < 9; ++f) {
        WeightParams p;
        p.format = static_cast<WeightFormat>(f < 6 ? f : f - 3);
        p.layout = f >= 6 ? WeightLayout::cpu_packed : WeightLayout::row_major;
        const bool nf4 = p.format == WeightFormat::nf4;
        p.group_size = nf4 ? 64 : 32;
        p.scales_dtype = nf4 ? DType::f32 : DType::f16;
        p.n = 16 * 40;
        p.k = nf4 ? 64 * 3 : 32 * 7;
        Values x = random_values(size_t{8} * p.k, dtype, rng_);
        Branch b = random_branch(p, 8, dtype, 16, DType::bf16, rng_);
        connect(b, 16, DType::bf16, true);
        const size_t x_bytes = p.k * dtype_bytes(dtype), y_bytes = p.n * dtype_bytes(dtype);
        set_thread_count(1);
        std::vector<uint8_t> alone(8 * y_bytes);
        for (uint32_t t = 0; t < 8; ++t) {
          LoraBranch one = b.view;
          one.y = alone.data() + t * y_bytes;
          one.residual = b.residual.bytes.data() + t * y_bytes;
          lora_gemv_forward(1, p.k, dtype, x.bytes.data() + t * x_bytes, &one, 1);
        }
        for (int n : {1, 2, 3, 5}) {
          set_thread_count(n);
          for (uint32_t m = 1; m <= 8; ++m) {
            std::fill(b.y.begin(), b.y.end(), uint8_t{0xff});
            lora_gemv_forward(m, p.k, dtype, x.bytes.data(), &b.view, 1);
            ASSERT_EQ(std::memcmp(b.y.data(), alone.data(), m * y_bytes), 0)
                << name_of(isa, p, dtype, m, 16) << " threads " << n;
          }
        }
      }
    }
  }
  set_thread_count(threads);
}

TEST_F(Gemv, BranchesShareOneCall) {
  WeightParams p;
  p.k = 96;
  p.group_size = 32;
  const uint32_t ns[] = {64, 48, 33, 16, 1, 80, 16, 7, 5, 9};
  for (DType dtype : kDTypes) {
    const Values x = random_values(size_t{3} * p.k, dtype, rng_);
    std::vector<Branch> branches;
    for (uint32_t i = 0; i < 10; ++i) {
      p.n = ns[i];
      p.format = static_cast<WeightFormat>(i % 5);
      branches.push_back(random_branch(p, 3, dtype, 5 * (i % 4), DType::f16, rng_));
    }
    std::vector<LoraBranch> views;
    for (uint32_t i = 0; i < 10; ++i) {
      connect(branches[i], 5 * (i % 4), DType::f16, i % 3 == 0);
      views.push_back(branches[i].view);
    }
    for (Isa isa : isas()) {
      ASSERT_TRUE(set_active_isa(isa));
      lora_gemv_forward(3, p.k, dtype, x.bytes.data(), views.data(), views.size());
      for (const Branch& b : branches) {
        expect_matches(b, 3, dtype, x, name_of(isa, b.weight.view.params, dtype, 3, 0));
        if (HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace metal_lora::cpu
