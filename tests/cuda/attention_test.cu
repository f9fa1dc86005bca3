// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// attention_forward and attention_backward against f64, in every form: tensor cores, FFMA, decode.
#include <cuda_runtime.h>

#include <cmath>

#include "kernels/cuda/decode_parts.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/transformer_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/attention_reference.h"

namespace metal_lora::cuda {
namespace {

namespace host = cpu::transformer_test;
using host::AttentionValues;
using host::Shape;
using test::DeviceBuffer;

size_t size_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

std::vector<uint8_t> encode(DType dtype, const std::vector<float>& x) {
  std::vector<uint8_t> bytes(x.size() * size_of(dtype));
  for (size_t i = 0; i < x.size(); ++i) {
    if (dtype == DType::f32) {
      std::memcpy(&bytes[4 * i], &x[i], 4);
    } else if (dtype == DType::bf16) {
      const bf16 y = __float2bfloat16_rn(x[i]);
      std::memcpy(&bytes[2 * i], &y, 2);
    } else {
      const f16 y = __float2half_rn(x[i]);
      std::memcpy(&bytes[2 * i], &y, 2);
    }
  }
  return bytes;
}
std::vector<double> decode(DType dtype, const std::vector<uint8_t>& bytes) {
  std::vector<double> x(bytes.size() / size_of(dtype));
  for (size_t i = 0; i < x.size(); ++i) {
    if (dtype == DType::f32) {
      float y;
      std::memcpy(&y, &bytes[4 * i], 4);
      x[i] = y;
    } else if (dtype == DType::bf16) {
      bf16 y;
      std::memcpy(&y, &bytes[2 * i], 2);
      x[i] = __bfloat162float(y);
    } else {
      f16 y;
      std::memcpy(&y, &bytes[2 * i], 2);
      x[i] = __half2float(y);
    }
  }
  return x;
}

/// The tensor cores' f32 sums cut instead of rounding: 2 u a step; ex2.approx and lg2.approx stay
/// below that too. Probabilities and dS are rounded to the storage type before their products.
host::AttentionRounding rounding_of(DType dtype) {
  if (dtype == DType::f32) return {0, 0, 0x1p-23};
  return {host::unit_roundoff(dtype), host::smallest_step(dtype), 0x1p-23};
}

struct Results {
  std::vector<uint8_t> out, lse, dq, dk, dv;
  bool operator==(const Results&) const = default;
};

struct Problem {
  Problem(const Shape& s, DType dtype, uint32_t seed) : shape(s), p(host::params_of(s, dtype)) {
    q = encode(dtype, host::random_floats(p.q_tokens * p.q_stride, seed));
    k = encode(dtype, host::random_floats(p.kv_tokens * p.k_stride, seed + 1));
    v = encode(dtype, host::random_floats(p.kv_tokens * p.v_stride, seed + 2));
    dout = encode(dtype, host::random_floats(p.q_tokens * p.o_stride, seed + 3));
    // What no query can see may hold anything, as a cache does behind its end.
    const size_t seen = std::min(p.kv_tokens, p.kv_offset + p.q_tokens);
    std::fill(k.begin() + seen * p.k_stride * size_of(dtype), k.end(), 0xff);
    std::fill(v.begin() + seen * p.v_stride * size_of(dtype), v.end(), 0xff);
  }
  AttentionValues values() const {
    return {p, decode(p.dtype, q), decode(p.dtype, k), decode(p.dtype, v), decode(p.dtype, dout)};
  }
  /// offset_on_device: kv_offset by pointer, and a wrong one in p.
  Results run(
      bool backward, bool offset_on_device = false, const std::vector<float>& rope = {}) const {
    test::TestDevice device;
    const DeviceBuffer dev_q(q), dev_k(k), dev_v(v), dev_dout(dout), starts(shape.segments);
    const DeviceBuffer offset(std::vector<int32_t>{static_cast<int32_t>(p.kv_offset)});
    const DeviceBuffer out(dout.size()), lse(size_t{p.q_heads} * p.q_tokens * 4);
    const DeviceBuffer table(rope);
    const DeviceBuffer dq(q.size()), dk(k.size()), dv(v.size());
    AttentionParams params = p;
    if (offset_on_device) params.kv_offset = 77777;
    attention_forward(
        device.context(),
        params,
        dev_q.get(),
        dev_k.get(),
        dev_v.get(),
        starts.get<const int32_t>(),
        out.get(),
        lse.get<float>(),
        offset_on_device ? offset.get<const int32_t>() : nullptr);
    if (backward) {
      attention_backward(
          device.context(),
          p,
          dev_q.get(),
          dev_k.get(),
          dev_v.get(),
          starts.get<const int32_t>(),
          out.get(),
          lse.get<const float>(),
          dev_dout.get(),
          dq.get(),
          dk.get(),
          dv.get(),
          table.get<const float>());
    }
    device.finish();
    return {
        out.download<uint8_t>(),
        lse.download<uint8_t>(),
        dq.download<uint8_t>(),
        dk.download<uint8_t>(),
        dv.download<uint8_t>()};
  }

  Shape shape;
  AttentionParams p;
  std::vector<uint8_t> q, k, v, dout;
};

std::string name_of(const Shape& s, DType dtype) {
  return "q " + std::to_string(s.q_tokens) + " kv " + std::to_string(s.kv_tokens) + " heads " +
         std::to_string(s.q_heads) + "/" + std::to_string(s.kv_heads) + " dim " +
         std::to_string(s.head_dim) + " offset " + std::to_string(s.kv_offset) + " window " +
         std::to_string(s.window) + " dtype " + std::to_string(static_cast<int>(dtype));
}

/// Elements between tokens belong to nobody: they must be as they were.
void expect_rows(
    const Problem& r,
    const std::vector<uint8_t>& bytes,
    size_t stride,
    size_t heads,
    std::vector<double> want,
    const std::vector<double>& bound,
    const std::string& what) {
  std::vector<double> got = decode(r.p.dtype, bytes);
  const size_t size = size_of(r.p.dtype);
  for (size_t i = 0; i < got.size(); ++i) {
    if (i % stride < heads * r.p.head_dim) continue;
    for (size_t b = 0; b < size; ++b) {
      ASSERT_EQ(bytes[i * size + b], 0xff) << what << " wrote between the tokens at " << i;
    }
    got[i] = want[i] = 0;
  }
  host::expect_within(got, want, bound, what);
}

void check_case(const Shape& s, DType dtype, uint32_t seed, bool offset_on_device = false) {
  const Problem r(s, dtype, seed);
  const bool backward = !offset_on_device;
  const Results got = r.run(backward, offset_on_device);
  const std::string what = name_of(s, dtype);
  EXPECT_TRUE(got == r.run(backward, offset_on_device)) << what << " differs between two runs";
  const host::Reference want(s, r.values(), rounding_of(dtype));
  expect_rows(r, got.out, r.p.o_stride, s.q_heads, want.out, want.out_bound, what + " out");
  host::expect_within(decode(DType::f32, got.lse), want.lse, want.lse_bound, what + " logsumexp");
  if (!backward) return;
  expect_rows(r, got.dq, r.p.q_stride, s.q_heads, want.dq, want.dq_bound, what + " dq");
  expect_rows(r, got.dk, r.p.k_stride, s.kv_heads, want.dk, want.dk_bound, what + " dk");
  expect_rows(r, got.dv, r.p.v_stride, s.kv_heads, want.dv, want.dv_bound, what + " dv");
}

using host::segment_starts;

/// dq and dk turned back by `rope` against those that the host turns: each is rounded once.
void check_turned(const Shape& s, DType dtype) {
  const Problem r(s, dtype, 5);
  const size_t half = s.head_dim / 2;
  std::vector<float> rope(s.q_tokens * 2 * half);
  for (size_t i = 0; i < rope.size(); ++i) {
    const double angle = 0.37 * (i / (2 * half)) * std::pow(0.7, i % half);
    rope[i] = static_cast<float>(i % (2 * half) < half ? std::cos(angle) : std::sin(angle));
  }
  const Results plain = r.run(true), turned = r.run(true, false, rope);
  EXPECT_TRUE(turned == r.run(true, false, rope));
  EXPECT_TRUE(plain.dv == turned.dv);
  const double unit = dtype == DType::f32 ? 0x1p-22 : host::unit_roundoff(dtype);
  const auto check = [&](const auto& from, const auto& to, size_t stride, size_t heads) {
    const auto x = decode(dtype, from), y = decode(dtype, to);
    for (size_t i = 0; i < x.size(); ++i) {
      if (i % stride >= heads * s.head_dim) continue;
      const size_t c = i % stride % s.head_dim;
      const bool low = c < half;
      const float* row = &rope[i / stride * 2 * half];
      const double other = x[low ? i + half : i - half], cosine = row[c % half],
                   sine = row[half + c % half];
      const double want = x[i] * cosine + (low ? other : -other) * sine;
      const double bound = 3 * unit * (std::abs(x[i]) + std::abs(other)) + 1e-6;
      ASSERT_NEAR(y[i], want, bound) << name_of(s, dtype) << " at " << i;
    }
  };
  check(plain.dq, turned.dq, r.p.q_stride, s.q_heads);
  check(plain.dk, turned.dk, r.p.k_stride, s.kv_heads);
}

TEST(CudaAttention, MatchesF64) {
  METAL_LORA_NEEDS_GPU();
  const std::vector<Shape> shapes = {
      {1, 1, 1, 1, 32, 0, 0, {}},
      {31, 31, 3, 1, 64, 0, 0, {}},
      {33, 33, 2, 2, 33, 0, 0, {}},     // an odd head
      {65, 65, 2, 1, 48, 0, 0, {}, 5},  // strided, odd strides
      {65, 65, 2, 1, 48, 0, 0, {}, 8},
      {130, 130, 4, 1, 64, 0, 0, segment_starts({1, 31, 33, 65})},
      {257, 257, 4, 1, 64, 0, 0, segment_starts({130, 63, 64}), 16},
      {200, 200, 2, 1, 128, 0, 0, segment_starts({65, 135})},
      {257, 257, 1, 1, 128, 0, 100, {}, 8},
      {70, 70, 1, 1, 40, 0, 17, {}, 1},  // window
      {150, 150, 2, 1, 32, 0, 70, segment_starts({149, 1}), 8},
      {40, 107, 4, 2, 64, 67, 0, {}},     // cached prefill
      {129, 300, 3, 1, 64, 150, 64, {}},  // and keys behind the end
      {12, 300, 3, 1, 32, 288, 64, {}},
      {3, 1100, 3, 1, 64, 1097, 0, {}},
      {5, 77, 7, 1, 33, 72, 13, {}, 3},
      {5, 77, 8, 1, 96, 72, 13, {}, 8},
      {20, 20, 1, 1, 256, 0, 0, {}},
      {70, 130, 2, 1, 200, 60, 0, {}},
      {90, 90, 3, 3, 80, 0, 0, segment_starts({45, 45})},
      {90, 90, 8, 1, 16, 0, 0, {}},
      {20, 20, 2, 1, 32, 0, 0, {}, 0, -0.3f},  // any sign of the scale
      {16, 16, 2, 1, 64, 0, 0, {}, 0, -0.3f},
      {24, 24, 2, 1, 64, 0, 0, {}, 0, 3.0f},  // probabilities near 0 and 1
  };
  uint32_t seed = 1;
  for (const Shape& s : shapes) {
    for (const DType dtype : host::kDTypes) check_case(s, dtype, seed += 10);
  }
}

TEST(CudaAttention, TurnsGradientsBackByTheRotation) {
  METAL_LORA_NEEDS_GPU();
  const std::vector<Shape> shapes = {
      {130, 130, 4, 1, 64, 0, 0, segment_starts({31, 99}), 8},
      {200, 200, 3, 1, 128, 0, 0, {}},
      {90, 90, 3, 3, 80, 0, 0, segment_starts({45, 45})},
      {65, 65, 2, 1, 48, 0, 0, {}, 5},
  };
  for (const Shape& s : shapes) {
    for (const DType dtype : host::kDTypes) check_turned(s, dtype);
  }
}

// Small enough for compute-sanitizer's racecheck.
TEST(CudaAttention, TurnsGradientsOfFewTokensBack) {
  METAL_LORA_NEEDS_GPU();
  check_turned({70, 70, 2, 1, 64, 0, 0, segment_starts({31, 39}), 8}, DType::bf16);
  check_turned({66, 66, 1, 1, 128, 0, 0, {}}, DType::f16);
  check_turned({20, 20, 1, 1, 48, 0, 0, {}}, DType::bf16);
}

// A few queries over a cache that is longer than what is in it: the position lies on the device.
TEST(CudaAttention, DecodesFromACache) {
  METAL_LORA_NEEDS_GPU();
  const std::vector<Shape> shapes = {
      {1, 4000, 8, 2, 64, 0, 0, {}},
      {1, 4000, 8, 2, 64, 31, 0, {}},
      {1, 4000, 4, 1, 64, 1999, 0, {}},
      {1, 1500, 8, 8, 128, 1300, 0, {}},
      {1, 1500, 3, 1, 256, 1300, 0, {}},
      {4, 1500, 8, 2, 64, 1496, 0, {}},
      {16, 1500, 8, 1, 64, 700, 0, {}},
      {7, 1500, 6, 2, 80, 900, 333, {}},
      {2, 600, 4, 4, 32, 127, 0, {}, 8},
      {3, 600, 4, 2, 33, 300, 0, {}},
      {100, 900, 4, 2, 64, 300, 0, {}},
      {17, 900, 4, 2, 128, 500, 50, {}},
  };
  uint32_t seed = 1001;
  for (const Shape& s : shapes) {
    for (const DType dtype : host::kDTypes) check_case(s, dtype, seed += 10, true);
  }
}

// A decode step's attention over rows that are not in the cache yet: what decode_rope_cache makes
// of them must lie in the cache bit by bit and be attended to.
TEST(CudaAttention, DecodeStepAppendsAndAttends) {
  METAL_LORA_NEEDS_GPU();
  const std::vector<Shape> shapes = {
      {1, 512, 8, 2, 64, 300, 0, {}},
      {1, 64, 8, 2, 64, 0, 0, {}},
      {1, 600, 4, 1, 64, 512, 0, {}},
      {1, 4000, 8, 2, 64, 1999, 0, {}},
      {1, 4000, 8, 2, 64, 1999, 70, {}},
      {1, 1500, 8, 8, 128, 1300, 0, {}},
      {2, 1500, 3, 1, 256, 1300, 0, {}},
      {1, 2500, 66, 66, 16, 2400, 0, {}},
      {8, 2048, 8, 2, 64, 700, 0, {}},
      {16, 1500, 8, 1, 64, 511, 5, {}},
      {7, 1500, 6, 2, 80, 900, 333, {}},
      {3, 600, 4, 2, 24, 300, 0, {}},
      {3, 600, 4, 2, 34, 300, 0, {}},
  };
  uint32_t seed = 2001;
  for (const Shape& s : shapes) {
    for (const DType dtype : host::kDTypes) {
      for (const bool normed : {false, true}) {
        Problem r(s, dtype, seed += 10);
        const std::string what = name_of(s, dtype) + (normed ? " normed" : "");
        const size_t row = r.p.k_stride * size_of(dtype), begin = s.kv_offset * row;
        const auto new_rows = [&](std::vector<uint8_t>& cache) {
          const auto from = cache.begin() + begin, to = from + s.q_tokens * row;
          const std::vector<uint8_t> rows(from, to);
          std::fill(from, to, 0xff);
          return rows;
        };
        const DeviceBuffer new_k(new_rows(r.k)), new_v(new_rows(r.v));
        std::vector<int32_t> positions;
        for (uint32_t i = 0; i < s.q_tokens; ++i) positions.push_back(s.kv_offset + i);
        const DeviceBuffer at(positions), table(host::random_floats(s.q_tokens * s.head_dim, seed)),
            q_norm(host::random_floats(s.head_dim, seed + 4)),
            k_norm(host::random_floats(s.head_dim, seed + 5));
        DecodeAttentionParams p;
        p.tokens = s.q_tokens;
        p.q_heads = s.q_heads;
        p.kv_heads = s.kv_heads;
        p.head_dim = s.head_dim;
        p.capacity = s.kv_tokens;
        p.window = s.window;
        p.scale = r.p.scale;
        p.dtype = dtype;
        const float* norms[] = {
            normed ? q_norm.get<float>() : nullptr, normed ? k_norm.get<float>() : nullptr};
        test::TestDevice device;
        const auto run = [&](bool counts) {
          const DeviceBuffer q(r.q), k(r.k), v(r.v), out(r.dout.size());
          Context context = device.context();
          if (!counts) context.counters = nullptr;  // partial sums by a kernel of their own
          decode_attention(
              context,
              p,
              at.get<int32_t>(),
              table.get<float>(),
              norms[0],
              norms[1],
              q.get(),
              new_k.get(),
              new_v.get(),
              k.get(),
              v.get(),
              out.get());
          device.finish();
          return Results{
              out.download<uint8_t>(), {}, {}, k.download<uint8_t>(), v.download<uint8_t>()};
        };
        const Results got = run(true);
        EXPECT_TRUE(got == run(true)) << what << " differs between two runs";
        EXPECT_TRUE(got == run(false)) << what << " differs without counters";
        const DeviceBuffer q(r.q), k(r.k), v(r.v);
        decode_rope_cache(
            device.context(),
            p,
            at.get<int32_t>(),
            table.get<float>(),
            norms[0],
            norms[1],
            q.get(),
            new_k.get(),
            new_v.get(),
            k.get(),
            v.get());
        device.finish();
        r.q = q.download<uint8_t>(), r.k = k.download<uint8_t>(), r.v = v.download<uint8_t>();
        EXPECT_TRUE(got.dk == r.k) << what << " keys in the cache";
        EXPECT_TRUE(got.dv == r.v) << what << " values in the cache";
        const host::Reference want(s, r.values(), rounding_of(dtype));
        host::expect_within(decode(dtype, got.out), want.out, want.out_bound, what);
      }
    }
  }
}

TEST(CudaAttention, EmptyInputsAndUnseenKeys) {
  METAL_LORA_NEEDS_GPU();
  for (const DType dtype : host::kDTypes) {
    const Problem none({0, 4, 2, 1, 32, 0, 0, {}}, dtype, 1);
    const Results r = none.run(true);
    for (const double x : decode(dtype, r.dk)) EXPECT_EQ(x, 0);
    for (const double x : decode(dtype, r.dv)) EXPECT_EQ(x, 0);
    // Queries whose segment lies beyond them see no key: zeros out, zeros back.
    for (const uint32_t n : {3u, 20u, 150u, 151u}) {
      const uint32_t head_dim = n % 2 == 0 ? 32 : 64;
      const Problem blind({n, n, 2, 1, head_dim, 0, 0, std::vector<int32_t>(n, 640)}, dtype, 1);
      const Results b = blind.run(true);
      for (const double x : decode(dtype, b.out)) EXPECT_EQ(x, 0);
      for (const double x : decode(DType::f32, b.lse)) EXPECT_EQ(x, -INFINITY);
      for (const auto* g : {&b.dq, &b.dk, &b.dv}) {
        for (const double x : decode(dtype, *g)) EXPECT_EQ(x, 0);
      }
    }
  }
}

TEST(CudaAttention, NotANumberReachesTheResult) {
  METAL_LORA_NEEDS_GPU();
  for (const DType dtype : host::kDTypes) {
    for (const uint32_t n : {4u, 40u, 140u}) {
      Problem r({n, n, 3, 1, n == 40 ? 32u : 64u, 0, 0, {}}, dtype, 2);
      std::fill(r.k.begin() + 2 * size_of(dtype), r.k.begin() + 3 * size_of(dtype), 0xff);
      const Results got = r.run(true);
      EXPECT_TRUE(std::isnan(decode(dtype, got.out).back()));
      EXPECT_TRUE(std::isnan(decode(dtype, got.dq).back()));
    }
  }
}

// One captured graph serves every position, and a position's bits do not depend on what was
// decoded before.
TEST(CudaAttention, OneGraphServesEveryPosition) {
  METAL_LORA_NEEDS_GPU();
  const Shape s = {1, 2048, 8, 2, 64, 2047, 0, {}};
  const Problem r(s, DType::bf16, 5);
  test::TestDevice device;
  const auto stream = device.context().stream;
  const DeviceBuffer q(r.q), k(r.k), v(r.v), out(r.dout.size()), offset(4);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  // Scratch and launches: capture must allow both (scratch before it, by a first call).
  struct Fixed final : Scratch {
    DeviceBuffer region{size_t{64} << 20};
    size_t used = 0;
    void* take(size_t bytes) override {
      void* at = region.get<char>() + used;
      used += (bytes + 255) / 256 * 256;
      return at;
    }
  } scratch;
  Context context = device.context();
  context.scratch = &scratch;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  attention_forward(
      context, r.p, q.get(), k.get(), v.get(), nullptr, out.get(), nullptr, offset.get<int32_t>());
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  const auto replay = [&](int32_t position) {
    check(cudaMemcpyAsync(offset.get(), &position, 4, cudaMemcpyHostToDevice, stream), "copy");
    check(cudaGraphLaunch(executable, stream), "launch");
    device.finish();
    return out.download<uint8_t>();
  };
  for (const int32_t position : {0, 1, 63, 64, 1000, 2047}) {
    const auto first = replay(position);
    replay(2047 - position);
    EXPECT_TRUE(first == replay(position)) << position;
    Shape alone = s;
    alone.kv_offset = position, alone.kv_tokens = position + 1;
    Problem part(alone, DType::bf16, 5);
    part.q = r.q;
    std::copy_n(r.k.begin(), part.k.size(), part.k.begin());
    std::copy_n(r.v.begin(), part.v.size(), part.v.begin());
    const host::Reference want(alone, part.values(), rounding_of(DType::bf16));
    host::expect_within(
        decode(DType::bf16, first), want.out, want.out_bound, std::to_string(position));
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
}

TEST(CudaAttention, RefusesWhatItCannotDo) {
  AttentionParams p;
  p.head_dim = 257, p.q_heads = p.kv_heads = 1, p.q_tokens = 1;
  EXPECT_THROW(
      attention_forward({}, p, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
      std::invalid_argument);
  p.head_dim = 64, p.q_heads = 3, p.kv_heads = 2;
  EXPECT_THROW(
      attention_forward({}, p, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
      std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora::cuda
