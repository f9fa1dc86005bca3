// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// lora_gemv against an f64 reference for every format, storage type, number of tokens and rank,
// shapes that do and do not fit its tiles, and the things around it (bias, residual, u, dropout,
// branches that share x, repeated runs, graph replays).
#include <algorithm>
#include <array>
#include <list>

#include "kernels/cuda/lora_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora {
namespace {

using test::Array;
using test::DeviceBuffer;
using test::random_array;
using test::Weight;

double lost_to_dtype(DType d) {
  return d == DType::f32 ? 0x1p-24 : test::roundoff(d);
}

/// The mask of cpu::counter_hash, from its definition.
bool kept(uint64_t seed, float dropout, uint32_t token, uint32_t column) {
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
  return h >= static_cast<uint32_t>(static_cast<double>(dropout) * 4294967296.0);
}

struct BranchSpec {
  WeightFormat format = WeightFormat::bf16;
  uint32_t n = 64, rank = 16;
  uint32_t group_size = 64;
  DType scales_dtype = DType::f16, adapter_dtype = DType::bf16;
  bool double_quant = false, bias = true, residual = false, u = true;
  float dropout = 0.0f;
};

/// A branch on the host and on the device.
struct Branch {
  Branch(std::mt19937& rng, uint32_t m, uint32_t k, DType y_dtype, const BranchSpec& s)
      : spec(s),
        weight(test::random_weight(
            rng,
            s.format,
            s.n,
            k,
            s.group_size,
            s.format == WeightFormat::nf4 ? DType::f32 : s.scales_dtype,
            WeightLayout::row_major,
            s.double_quant)),
        a(random_array(rng, s.adapter_dtype, size_t{s.rank} * k, 1 / std::sqrt(k + 1.0))),
        b(random_array(rng, s.adapter_dtype, size_t{s.rank} * s.n)),
        bias(random_array(rng, DType::f32, s.n)),
        residual(random_array(rng, y_dtype, size_t{m} * s.n)),
        device_data(weight.data.data(), weight.data.bytes.size()),
        device_scales(weight.scales.data(), weight.scales.bytes.size()),
        device_biases(weight.biases.data(), weight.biases.bytes.size()),
        device_a(a.data(), a.bytes.size()),
        device_b(b.data(), b.bytes.size()),
        device_bias(bias.data(), bias.bytes.size()),
        device_residual(residual.data(), residual.bytes.size()),
        y(residual.bytes.size()),
        u(size_t{m} * s.rank * 4) {}

  cuda::LoraBranch view() const {
    cuda::LoraBranch v;
    v.weight = {weight.params, device_data.get(), device_scales.get(), device_biases.get()};
    v.lora.params.rank = spec.rank;
    v.lora.params.scale = 1.5f;
    v.lora.params.dtype = spec.adapter_dtype;
    v.lora.params.dropout = spec.dropout;
    v.lora.params.dropout_seed = 77;
    v.lora.a = device_a.get();
    v.lora.b = device_b.get();
    if (spec.bias) v.bias = device_bias.get<float>();
    if (spec.residual) v.residual = device_residual.get();
    v.y = y.get();
    if (spec.u && spec.rank > 0) v.u = u.get<float>();
    return v;
  }

  BranchSpec spec;
  Weight weight;
  Array a, b, bias, residual;
  DeviceBuffer device_data, device_scales, device_biases, device_a, device_b, device_bias,
      device_residual, y, u;
};

/// Largest error of what `device` holds against `value`, in units of `bound`.
double worst(
    const DeviceBuffer& device,
    DType dtype,
    const std::vector<double>& value,
    const std::vector<double>& bound) {
  const auto bytes = device.download<unsigned char>();
  double most = 0;
  for (size_t i = 0; i < value.size(); ++i) {
    const double got = test::stored_value(bytes.data(), dtype, i);
    const double error = std::fabs(got - value[i]) / bound[i];
    most = std::isfinite(got) ? std::max(most, error) : INFINITY;
  }
  return most;
}

/// Bounds: tensor cores sum exact products in f32 chains; chains of k/256 … k steps lose at most
/// k·2^-23 of Σ|w·x| (2^-23, not 2^-24: alignment of a step's terms truncates). Affine codes are
/// summed apart from their bias: magnitudes of scale·(q + 16) and bias count, each by its own.
/// NF4 levels are rounded to x's type: roundoff(dtype) of Σ|w·x| more. Then one rounding to y.
struct Expectation {
  std::vector<double> y, y_bound, u, u_bound;
};
Expectation expect(
    const Branch& b, uint32_t m, uint32_t k, DType dtype, const Array& x, DType y_dtype) {
  Expectation e;
  const uint32_t n = b.spec.n, rank = b.spec.rank;
  const bool quantised = b.spec.format >= WeightFormat::int4;
  const double steps = (k + 16) * 0x1p-23;
  const double level =
      b.spec.format == WeightFormat::nf4 && dtype != DType::f32 ? test::roundoff(dtype) : 0.0;
  const float keep = b.spec.dropout > 0 ? 1.0f / (1.0f - b.spec.dropout) : 1.0f;
  const auto u_sums = test::multiply(
      m,
      rank,
      k,
      [&](size_t t, size_t p) {
        if (b.spec.dropout > 0 && !kept(77, b.spec.dropout, t, p)) return 0.0;
        return x.values[t * k + p] * keep;
      },
      [&](size_t p, size_t r) { return b.a.values[r * k + p]; });
  e.u = u_sums.value;
  for (double v : u_sums.magnitude) e.u_bound.push_back(v * steps + 1e-30);
  const auto base = test::multiply(
      m,
      n,
      k,
      [&](size_t t, size_t p) { return x.values[t * k + p]; },
      [&](size_t p, size_t j) { return b.weight.values[j * k + p]; });
  for (uint32_t t = 0; t < m; ++t) {
    for (uint32_t j = 0; j < n; ++j) {
      double value = base.value[size_t{t} * n + j];
      double magnitude = base.magnitude[size_t{t} * n + j], parts = 0;
      if (quantised && b.spec.format != WeightFormat::nf4) {
        const uint32_t g = b.spec.group_size,
                       codes = b.spec.format == WeightFormat::int4 ? 47 : 255;
        for (uint32_t p = 0; p < k; ++p) {
          const size_t i = (size_t{j} * k + p) / g;
          parts +=
              std::fabs(x.values[size_t{t} * k + p]) *
              (std::fabs(b.weight.scales.values[i]) * codes + std::fabs(b.weight.biases.values[i]));
        }
      }
      double error = (magnitude + parts) * steps + magnitude * level;
      for (uint32_t r = 0; r < rank; ++r) {
        const double w = 1.5 * b.b.values[size_t{j} * rank + r];
        value += w * e.u[size_t{t} * rank + r];
        error += std::fabs(w) * (e.u_bound[size_t{t} * rank + r] +
                                 std::fabs(e.u[size_t{t} * rank + r]) * (rank + 4) * 0x1p-23);
      }
      if (b.spec.bias) value += b.bias.values[j];
      if (b.spec.residual) value += b.residual.values[size_t{t} * n + j];
      const double largest = std::fabs(value) + magnitude * 0x1p-22;
      e.y.push_back(value);
      e.y_bound.push_back(error + largest * (lost_to_dtype(y_dtype) + 0x1p-22) + 1e-30);
    }
  }
  return e;
}

void check_case(
    uint32_t m,
    uint32_t k,
    DType dtype,
    DType y_dtype,
    const std::vector<BranchSpec>& specs,
    size_t x_offset = 0) {
  std::mt19937 rng(m * 131 + k);
  test::TestDevice device;
  const Array x = random_array(rng, dtype, size_t{m} * k);
  std::vector<unsigned char> shifted(x_offset + x.bytes.size());
  std::copy(x.bytes.begin(), x.bytes.end(), shifted.begin() + x_offset);
  const DeviceBuffer device_x(shifted);
  std::list<Branch> branches;
  std::vector<cuda::LoraBranch> views;
  for (const auto& s : specs) {
    branches.emplace_back(rng, m, k, y_dtype, s);
    views.push_back(branches.back().view());
  }
  const auto run = [&] {
    for (auto& b : branches) {
      b.y.poison();
      b.u.poison();
    }
    cuda::lora_gemv(
        device.context(),
        m,
        k,
        dtype,
        device_x.get<char>() + x_offset,
        views.data(),
        views.size(),
        y_dtype);
    device.finish();
  };
  run();
  std::vector<std::vector<unsigned char>> first;
  for (const auto& b : branches) {
    first.push_back(b.y.download<unsigned char>());
    const Expectation e = expect(b, m, k, dtype, x, y_dtype);
    const std::string where = "m " + std::to_string(m) + " k " + std::to_string(k) + " n " +
                              std::to_string(b.spec.n) + " rank " + std::to_string(b.spec.rank) +
                              " format " + std::to_string(static_cast<int>(b.spec.format)) +
                              " group " + std::to_string(b.spec.group_size) + " x " +
                              test::name_of(dtype) + " y " + test::name_of(y_dtype) +
                              (b.spec.double_quant ? " double" : "");
    EXPECT_LE(worst(b.y, y_dtype, e.y, e.y_bound), 1.0) << where;
    if (b.spec.u && b.spec.rank > 0) {
      EXPECT_LE(worst(b.u, DType::f32, e.u, e.u_bound), 1.0) << "u: " << where;
    }
  }
  run();
  size_t i = 0;
  for (const auto& b : branches) {
    EXPECT_EQ(b.y.download<unsigned char>(), first[i++]) << "runs differ";
  }
}

constexpr WeightFormat dense(DType d) {
  return static_cast<WeightFormat>(d);
}

TEST(CudaLoraGemv, DenseTokens) {
  METAL_LORA_NEEDS_GPU();
  for (DType dtype : {DType::bf16, DType::f16}) {
    for (uint32_t m = 1; m <= 16; ++m) {
      BranchSpec s;
      s.format = dense(dtype);
      s.adapter_dtype = dtype;
      s.n = 50;
      check_case(m, 1056, dtype, m % 2 ? dtype : DType::f32, {s});
    }
  }
}

TEST(CudaLoraGemv, DenseShapesAndRanks) {
  METAL_LORA_NEEDS_GPU();
  const uint32_t ranks[] = {0, 1, 8, 16, 33, 64, 100, 200};
  int i = 0;
  for (uint32_t k : {32u, 64u, 96u, 224u, 256u, 1024u, 4096u, 31u, 33u, 4097u}) {
    for (uint32_t n : {1u, 16u, 33u, 129u}) {
      BranchSpec s;
      s.rank = ranks[i++ % 8];
      s.n = n;
      s.residual = i % 2;
      s.bias = i % 3;
      check_case(i % 16 + 1, k, DType::bf16, i % 4 < 2 ? DType::f32 : DType::bf16, {s});
    }
  }
  BranchSpec s;
  s.n = 4500;  // several passes of a cluster
  s.rank = 16;
  check_case(3, 64, DType::bf16, DType::f32, {s});
  s.n = 70000;
  check_case(9, 32, DType::bf16, DType::bf16, {s});
}

TEST(CudaLoraGemv, Quantised) {
  METAL_LORA_NEEDS_GPU();
  int i = 0;
  for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8, WeightFormat::nf4}) {
    for (uint32_t group : {32u, 64u, 128u}) {
      if (format == WeightFormat::nf4 && group == 32) continue;
      for (DType scales : {DType::f16, DType::bf16, DType::f32}) {
        for (uint32_t k : {128u, 256u, 384u, 1024u, 4096u}) {
          BranchSpec s;
          s.format = format;
          s.group_size = format == WeightFormat::nf4 ? 64 : group;
          s.double_quant = format == WeightFormat::nf4 && group == 128;
          s.scales_dtype = scales;
          s.n = i % 2 ? 70 : 16;
          s.rank = i % 3 * 8;
          s.residual = i % 2;
          const DType dtype = i % 4 < 2 ? DType::bf16 : DType::f16;
          s.adapter_dtype = dtype;
          check_case(i * 5 % 16 + 1, k, dtype, i % 2 ? DType::f32 : dtype, {s});
          ++i;
        }
      }
    }
  }
}

TEST(CudaLoraGemv, QuantisedTokens) {
  METAL_LORA_NEEDS_GPU();
  for (WeightFormat format : {WeightFormat::int4, WeightFormat::int8, WeightFormat::nf4}) {
    for (uint32_t m = 1; m <= 16; ++m) {
      BranchSpec s;
      s.format = format;
      check_case(m, 1024, DType::bf16, DType::f32, {s});
    }
  }
}

TEST(CudaLoraGemv, OneTokenOfFourBits) {
  METAL_LORA_NEEDS_GPU();
  int i = 0;
  for (uint32_t k : {64u, 832u, 4096u, 11008u}) {  // of a warp: no group, two, eight and over
    for (uint32_t rank : {0u, 5u, 8u, 64u, 136u}) {
      BranchSpec s, t;
      s.format = t.format = i % 2 ? WeightFormat::nf4 : WeightFormat::int4;
      s.double_quant = t.double_quant = i % 4 == 1 && k % 256 == 0;
      s.scales_dtype = t.scales_dtype = i % 3 ? DType::f16 : DType::f32;
      s.adapter_dtype = t.adapter_dtype = i % 5 == 1 ? DType::f16 : DType::bf16;
      s.residual = i % 2;
      s.n = 50;
      s.rank = rank;
      t.n = 16;
      t.rank = 16;
      check_case(1, k, s.adapter_dtype, i % 3 ? s.adapter_dtype : DType::f32, {s});
      check_case(1, k, s.adapter_dtype, s.adapter_dtype, {t, s});
      ++i;
    }
  }
}

TEST(CudaLoraGemv, Branches) {
  METAL_LORA_NEEDS_GPU();
  for (WeightFormat format :
       {WeightFormat::bf16, WeightFormat::int4, WeightFormat::nf4, WeightFormat::int8}) {
    BranchSpec q, k, v, o;
    q.format = k.format = v.format = o.format = format;
    q.double_quant = k.double_quant = v.double_quant = o.double_quant = format == WeightFormat::nf4;
    q.n = 260, q.rank = 16;
    k.n = 33, k.rank = 64;
    v.n = 64, v.rank = 0;
    o.n = 16, o.rank = 9;
    check_case(2, 512, DType::bf16, DType::bf16, {q, k});
    check_case(5, 512, DType::bf16, DType::bf16, {q, k, v});
    check_case(16, 1024, DType::bf16, DType::f32, {q, k, v, o});
  }
  BranchSpec a, b, c;  // no two alike
  a.format = WeightFormat::bf16;
  b.format = WeightFormat::int4;
  c.format = WeightFormat::f32;
  check_case(4, 256, DType::bf16, DType::bf16, {a, b, c});
}

TEST(CudaLoraGemv, OtherTypes) {
  METAL_LORA_NEEDS_GPU();
  for (WeightFormat format :
       {WeightFormat::f32,
        WeightFormat::f16,
        WeightFormat::bf16,
        WeightFormat::int4,
        WeightFormat::int8,
        WeightFormat::nf4}) {
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (uint32_t m : {1u, 7u, 16u}) {
        BranchSpec s;
        s.format = format;
        s.adapter_dtype = m == 7 ? DType::f32 : DType::f16;
        s.n = 37;
        s.rank = 12;
        check_case(m, 192, dtype, DType::f32, {s});
      }
    }
  }
  BranchSpec s;
  check_case(3, 256, DType::bf16, DType::bf16, {s}, 2);  // x unaligned
}

TEST(CudaLoraGemv, Dropout) {
  METAL_LORA_NEEDS_GPU();
  for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int4, WeightFormat::f32}) {
    BranchSpec s, plain;
    s.format = plain.format = format;
    s.dropout = 0.25f;
    s.rank = 20;
    check_case(6, 320, DType::bf16, DType::f32, {s, plain});
  }
}

TEST(CudaLoraGemv, EmptySums) {
  METAL_LORA_NEEDS_GPU();
  BranchSpec s;
  s.rank = 0;
  check_case(2, 0, DType::bf16, DType::f32, {s});
}

TEST(CudaLoraGemv, TokensDoNotDependOnTheirNeighbours) {
  METAL_LORA_NEEDS_GPU();
  std::mt19937 rng(5);
  const uint32_t k = 1024;
  test::TestDevice device;
  const Array x = random_array(rng, DType::bf16, 16 * k);
  const DeviceBuffer device_x(x.bytes);
  for (WeightFormat format : {WeightFormat::bf16, WeightFormat::int4, WeightFormat::nf4}) {
    BranchSpec s;
    s.format = format;
    s.n = 300;
    Branch all(rng, 16, k, DType::f32, s);
    const auto run = [&](uint32_t first, uint32_t m) {
      auto view = all.view();
      all.y.poison();
      cuda::lora_gemv(
          device.context(),
          m,
          k,
          DType::bf16,
          device_x.get<char>() + size_t{first} * k * 2,
          &view,
          1,
          DType::f32);
      device.finish();
      return all.y.download<float>();
    };
    const auto together = run(0, 16);
    for (uint32_t t = 0; t < 16; t += 5) {
      const auto alone = run(t, 1);
      EXPECT_EQ(std::memcmp(alone.data(), together.data() + t * s.n, s.n * 4), 0) << t;
    }
  }
}

/// Format, weights_ready, tokens.
class CudaLoraGemvChain
    : public testing::TestWithParam<std::tuple<WeightFormat, bool, uint32_t>> {};

TEST_P(CudaLoraGemvChain, InAGraph) {
  METAL_LORA_NEEDS_GPU();
  // Each linear reads what the one before wrote, as programmatic dependents: the replayed chain
  // must give the bits of the calls one by one.
  const auto [format, ready, m] = GetParam();
  std::mt19937 rng(9);
  const uint32_t k = 512;
  test::TestDevice device;
  const Array x = random_array(rng, DType::bf16, m * k, 0.1);
  BranchSpec s;
  s.n = k;
  s.format = format;
  auto context = device.context();
  context.weights_ready = ready;
  Branch b(rng, m, k, DType::bf16, s);
  auto view = b.view();
  constexpr int kLinears = 8;
  const uint32_t tokens = m;
  std::vector<DeviceBuffer> values;
  for (int i = 0; i <= kLinears; ++i) values.emplace_back(x.bytes);
  const auto one = [&](int i) {
    view.y = values[i + 1].get();
    cuda::lora_gemv(context, tokens, k, DType::bf16, values[i].get(), &view, 1, DType::bf16);
  };
  for (int i = 0; i < kLinears; ++i) {
    one(i);
    device.finish();
  }
  const auto wanted = values[kLinears].download<uint16_t>();
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  const auto stream = device.context().stream;
  cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kLinears; ++i) one(i);
  cuda::check(cudaStreamEndCapture(stream, &graph), "capture");
  cuda::check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  for (int replay = 0; replay < 20; ++replay) {
    for (int i = 1; i <= kLinears; ++i) values[i].poison();
    cuda::check(cudaGraphLaunch(executable, stream), "launch");
    device.finish();
    ASSERT_EQ(values[kLinears].download<uint16_t>(), wanted) << replay;
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

INSTANTIATE_TEST_SUITE_P(
    Formats,
    CudaLoraGemvChain,
    testing::Values(
        std::tuple{WeightFormat::bf16, false, 2u},
        std::tuple{WeightFormat::bf16, true, 2u},
        std::tuple{WeightFormat::int4, false, 1u},
        std::tuple{WeightFormat::int4, true, 1u},
        std::tuple{WeightFormat::int4, true, 2u},
        std::tuple{WeightFormat::nf4, true, 1u},
        std::tuple{WeightFormat::nf4, true, 2u},
        std::tuple{WeightFormat::int8, true, 2u}));

TEST(CudaLoraGemv, NamesWhatIsWrong) {
  cuda::Context context;
  cuda::LoraBranch b;
  b.weight.params = {8, 16, WeightFormat::bf16};
  EXPECT_THROW(
      cuda::lora_gemv(context, 17, 16, DType::bf16, nullptr, &b, 1, DType::bf16),
      std::invalid_argument);
  EXPECT_THROW(
      cuda::lora_gemv(context, 1, 15, DType::bf16, nullptr, &b, 1, DType::bf16),
      std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora
