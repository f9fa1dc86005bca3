// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// What lies between the linears, on CUDA, against f64: norms, rope, SwiGLU, the fused loss, casts.
#include <cmath>

#include "kernels/cuda/decode_parts.h"
#include "kernels/cuda/pack_adapter.h"
#include "kernels/cuda/transformer_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
constexpr double kU = 0x1p-24;

std::vector<double> values_of(const DeviceBuffer& buffer, DType dtype, size_t count) {
  const auto bytes = buffer.download<unsigned char>();
  std::vector<double> out(count);
  for (size_t i = 0; i < count; ++i) out[i] = stored_value(bytes.data(), dtype, i);
  return out;
}

size_t bytes_of(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

DeviceBuffer upload(const Array& a) {
  return DeviceBuffer(a.bytes.data(), a.bytes.size());
}

void expect_near(
    const std::vector<double>& got,
    const std::vector<double>& want,
    const std::vector<double>& bound,
    const std::string& what) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::fabs(got[i] - want[i]), bound[i])
        << what << " at " << i << ": got " << got[i] << ", want " << want[i];
  }
}

struct Shape {
  uint32_t rows, dims;
};
/// Held in registers by 1, 2, 4 and 8 vectors a thread, too long for that, unaligned, one value.
constexpr Shape kShapes[] = {
    {3, 64}, {300, 576}, {5, 2048}, {4, 4096}, {3, 8192}, {2, 16384}, {2, 40000}, {7, 33}, {2, 1}};

/// y's error: the sum of squares is off by at most (dims/256 + 16)·u of itself (a thread's part,
/// then a tree), 1/sqrt halves that; two products and the rounding to storage.
double norm_error(uint32_t dims) {
  return (dims / 256.0 + 16) * kU + 6 * kU;
}

TEST(CudaNorm, ForwardAndBackwardEqualF64) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(1);
  for (const DType dtype : kDTypes) {
    for (const auto& [rows, dims] : kShapes) {
      for (const bool add : {false, true}) {
        const std::string what = std::to_string(rows) + "x" + std::to_string(dims) +
                                 (add ? " with residual" : "") + " dtype " +
                                 std::to_string(static_cast<int>(dtype));
        const size_t count = size_t{rows} * dims;
        const double u = roundoff(dtype);
        const Array x = random_array(rng, dtype, count), r = random_array(rng, dtype, count),
                    dy = random_array(rng, dtype, count), dh = random_array(rng, dtype, count),
                    w = random_array(rng, DType::f32, dims);
        NormParams p;
        p.rows = rows;
        p.dims = dims;
        p.dtype = dtype;
        const auto dx_in = upload(x), dr = upload(r), dw = upload(w), ddy = upload(dy),
                   ddh = upload(dh);
        DeviceBuffer h(count * bytes_of(dtype)), y(count * bytes_of(dtype)),
            dx(count * bytes_of(dtype)), dweight(dims * 4);
        cuda::add_rms_norm_forward(
            device.context(), p, dx_in.get(), add ? dr.get() : nullptr, dw.get(), h.get(), y.get());
        cuda::add_rms_norm_backward(
            device.context(),
            p,
            h.get(),
            dw.get(),
            ddy.get(),
            add ? ddh.get() : nullptr,
            dx.get(),
            dweight.get<float>());
        device.finish();
        const auto hv = values_of(h, dtype, count);
        std::vector<double> want_y(count), bound_y(count), want_dx(count), bound_dx(count),
            want_dw(dims), bound_dw(dims);
        for (uint32_t i = 0; i < rows; ++i) {
          double squares = 0, dot = 0, dot_abs = 0;
          for (uint32_t j = 0; j < dims; ++j) {
            const size_t at = size_t{i} * dims + j;
            const double sum = x.values[at] + (add ? r.values[at] : 0.0);
            ASSERT_LE(std::fabs(hv[at] - sum), u * std::fabs(sum) + 1e-7) << what;
            squares += hv[at] * hv[at];
            const double term = hv[at] * dy.values[at] * w.values[j];
            dot += term;
            dot_abs += std::fabs(term);
          }
          const double s = 1 / std::sqrt(squares / dims + double{p.eps});
          const double e = norm_error(dims);
          for (uint32_t j = 0; j < dims; ++j) {
            const size_t at = size_t{i} * dims + j;
            want_y[at] = hv[at] * s * w.values[j];
            bound_y[at] = (u + e) * std::fabs(want_y[at]) + 1e-7;
            const double own = s * w.values[j] * dy.values[at];
            const double pull = hv[at] * s * s * s * dot / dims;
            want_dx[at] = own - pull + (add ? dh.values[at] : 0.0);
            bound_dx[at] = u * std::fabs(want_dx[at]) + e * std::fabs(own) +
                           3 * e * std::fabs(hv[at]) * s * s * s * dot_abs / dims +
                           4 * kU * std::fabs(add ? dh.values[at] : 0.0) + 1e-7;
            const double grad = dy.values[at] * hv[at] * s;
            want_dw[j] += grad;
            bound_dw[j] += (e + (rows + 4) * kU) * std::fabs(grad) + 1e-12;
          }
        }
        expect_near(values_of(y, dtype, count), want_y, bound_y, what + " y");
        expect_near(values_of(dx, dtype, count), want_dx, bound_dx, what + " dx");
        expect_near(values_of(dweight, DType::f32, dims), want_dw, bound_dw, what + " dweight");

        // The gradient may overwrite what it is made of.
        DeviceBuffer over(dy.bytes.data(), dy.bytes.size());
        cuda::add_rms_norm_backward(
            device.context(),
            p,
            h.get(),
            dw.get(),
            over.get(),
            add ? ddh.get() : nullptr,
            over.get(),
            nullptr);
        device.finish();
        EXPECT_EQ(over.download<unsigned char>(), dx.download<unsigned char>()) << what;
      }
    }
  }
}

TEST(CudaRope, RotatesAndTurnsBack) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(2);
  for (const DType dtype : kDTypes) {
    for (const uint32_t head_dim : {2u, 6u, 64u, 128u}) {
      constexpr uint32_t kTokens = 37, kQ = 5, kK = 2;
      const uint32_t half = head_dim / 2, stride = (kQ + 2 * kK) * head_dim;
      std::vector<int32_t> positions(kTokens);
      for (uint32_t t = 0; t < kTokens; ++t) positions[t] = static_cast<int32_t>(t * 911 % 5000);
      std::vector<float> inv_freq(half);
      for (uint32_t i = 0; i < half; ++i) {
        inv_freq[i] = static_cast<float>(std::pow(1e4, -static_cast<double>(i) / half));
      }
      const DeviceBuffer dp(positions), df(inv_freq);
      DeviceBuffer table(kTokens * head_dim * 4);
      cuda::rope_table(
          device.context(),
          kTokens,
          head_dim,
          dp.get<int32_t>(),
          df.get<float>(),
          1.25f,
          table.get<float>());
      const Array x = random_array(rng, dtype, size_t{kTokens} * stride);
      DeviceBuffer pair = upload(x);
      cuda::RopePairParams p;
      p.tokens = kTokens;
      p.q_heads = kQ;
      p.kv_heads = kK;
      p.head_dim = head_dim;
      p.q_stride = p.k_stride = stride;
      p.dtype = dtype;
      char* base = pair.get<char>();
      cuda::rope_pair(
          device.context(),
          p,
          base,
          base + size_t{kQ} * head_dim * bytes_of(dtype),
          table.get<float>());
      device.finish();
      const auto got = values_of(pair, dtype, x.values.size());
      const double u = roundoff(dtype);
      for (uint32_t t = 0; t < kTokens; ++t) {
        for (uint32_t h = 0; h < kQ + 2 * kK; ++h) {
          for (uint32_t i = 0; i < half; ++i) {
            const size_t a = size_t{t} * stride + h * head_dim + i, b = a + half;
            double want_a = x.values[a], want_b = x.values[b];
            const double size = 1.25 * (std::fabs(want_a) + std::fabs(want_b));
            if (h < kQ + kK) {
              const double angle = static_cast<double>(positions[t]) * inv_freq[i];
              const double c = 1.25 * std::cos(angle), s = 1.25 * std::sin(angle);
              want_a = x.values[a] * c - x.values[b] * s;
              want_b = x.values[b] * c + x.values[a] * s;
            }
            ASSERT_NEAR(got[a], want_a, (u + 6 * kU) * size) << head_dim << " " << t << " " << h;
            ASSERT_NEAR(got[b], want_b, (u + 6 * kU) * size) << head_dim << " " << t << " " << h;
          }
        }
      }
    }
  }
}

TEST(CudaSwiglu, ForwardAndBackwardEqualF64) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(3);
  for (const DType dtype : kDTypes) {
    for (const auto& [tokens, ffn] : {std::pair{5u, 1536u}, {3u, 33u}, {1u, 1u}}) {
      const size_t count = size_t{tokens} * ffn;
      const Array both = random_array(rng, dtype, 2 * count, 2.0),
                  dy = random_array(rng, dtype, count);
      DeviceBuffer gate_up = upload(both), d_act = upload(dy), act(count * bytes_of(dtype)),
                   again(count * bytes_of(dtype));
      cuda::swiglu_pair_forward(device.context(), tokens, ffn, dtype, gate_up.get(), act.get());
      cuda::swiglu_pair_backward(
          device.context(), tokens, ffn, dtype, gate_up.get(), d_act.get(), again.get());
      device.finish();
      const auto y = values_of(act, dtype, count), grads = values_of(gate_up, dtype, 2 * count);
      // The fast exponential is good to 2 ulp and a few more of its argument's size.
      const double e = roundoff(dtype) + 32 * kU;
      for (uint32_t t = 0; t < tokens; ++t) {
        for (uint32_t i = 0; i < ffn; ++i) {
          const size_t g_at = size_t{t} * 2 * ffn + i, at = size_t{t} * ffn + i;
          const double g = both.values[g_at], up = both.values[g_at + ffn], d = dy.values[at];
          const double s = 1 / (1 + std::exp(-g)), size = std::fabs(g) + 1;
          ASSERT_NEAR(y[at], g * s * up, e * size * std::fabs(up) + 1e-7);
          ASSERT_NEAR(grads[g_at + ffn], d * g * s, e * size * std::fabs(d) + 1e-7);
          ASSERT_NEAR(
              grads[g_at], d * up * s * (1 + g * (1 - s)), 3 * e * size * std::fabs(d * up) + 1e-7);
        }
      }
      EXPECT_EQ(again.download<unsigned char>(), act.download<unsigned char>());
    }
  }
}

/// Loss and gradient of one product; NaN where a token's weight is 0 must not leak.
void check_loss(
    TestDevice& device,
    DType dtype,
    uint32_t tokens,
    uint32_t dims,
    uint32_t vocab,
    double scale = 1.0) {
  const std::string what = std::to_string(tokens) + " tokens, vocabulary " + std::to_string(vocab) +
                           ", dtype " + std::to_string(static_cast<int>(dtype));
  std::mt19937 rng(4);
  Array x = random_array(rng, dtype, size_t{tokens} * dims, scale);
  const Array w = random_array(rng, dtype, size_t{vocab} * dims, 0.5);
  std::vector<int32_t> targets(tokens);
  std::vector<float> weights(tokens);
  for (uint32_t t = 0; t < tokens; ++t) {
    targets[t] = static_cast<int32_t>(rng() % vocab);
    weights[t] = t % 3 == 1 ? 0.0f : 0.5f + static_cast<float>(t % 4);
    if (weights[t] != 0.0f) continue;
    targets[t] = -7;
    std::memset(x.bytes.data() + size_t{t} * dims * bytes_of(dtype), 0xff, dims * bytes_of(dtype));
  }
  const DeviceBuffer dx_in = upload(x), dw = upload(w), dt(targets), dweights(weights);
  DeviceBuffer loss(4), dx(x.bytes.size()), losses(tokens * 4);
  cuda::WeightView head;
  head.params.n = vocab;
  head.params.k = dims;
  head.params.format = dtype == DType::f32   ? WeightFormat::f32
                       : dtype == DType::f16 ? WeightFormat::f16
                                             : WeightFormat::bf16;
  head.data = dw.get();
  LinearCrossEntropyParams p;
  p.tokens = tokens;
  p.dims = dims;
  p.vocab = vocab;
  p.dtype = dtype;
  const auto run = [&](void* gradient) {
    cuda::linear_cross_entropy(
        device.context(),
        p,
        dx_in.get(),
        head,
        dt.get<int32_t>(),
        dweights.get<float>(),
        loss.get<float>(),
        gradient,
        losses.get<float>());
    device.finish();
  };
  run(dx.get());
  const auto first = dx.download<unsigned char>();
  const float with_gradient = loss.download<float>()[0];
  const auto got = values_of(dx, dtype, x.values.size());
  const auto token_losses = losses.download<float>();
  const double u = roundoff(dtype);
  // 16-bit probabilities are scaled from rounded exponentials.
  const double e_error = dtype == DType::f32 ? 0.0 : u;
  double sum = 0, sum_bound = 0;
  for (uint32_t t = 0; t < tokens; ++t) {
    std::vector<double> dlogits(vocab), wanted(dims), bound(dims);
    if (weights[t] == 0.0f) {
      EXPECT_EQ(token_losses[t], 0.0f) << what;
      for (uint32_t c = 0; c < dims; ++c) ASSERT_EQ(got[size_t{t} * dims + c], 0.0) << what;
      continue;
    }
    double top = -INFINITY, error = 0;
    std::vector<double> z(vocab);
    for (uint32_t v = 0; v < vocab; ++v) {
      double size = 0;
      for (uint32_t c = 0; c < dims; ++c) {
        const double term = x.values[size_t{t} * dims + c] * w.values[size_t{v} * dims + c];
        z[v] += term;
        size += std::fabs(term);
      }
      top = std::max(top, z[v]);
      error = std::max(error, (dims + 2) * kU * size);
    }
    double total = 0;
    for (double v : z) total += std::exp(v - top);
    const double lse = top + std::log(total);
    const double loss_error = 2 * error + (vocab / 1024.0 + 40) * kU + 8 * kU * std::fabs(top);
    const double want = lse - z[static_cast<size_t>(targets[t])];
    ASSERT_NEAR(token_losses[t], want, loss_error) << what;
    sum += weights[t] * want;
    sum_bound += weights[t] * loss_error;
    const double relative = std::expm1(error + loss_error) + 16 * kU;
    for (uint32_t v = 0; v < vocab; ++v) {
      const double probability = std::exp(z[v] - lse);
      const double g = weights[t] * (probability - (static_cast<int32_t>(v) == targets[t]));
      const double g_error = weights[t] * ((relative + e_error) * probability + 4 * kU) +
                             (u + (vocab + 2) * kU) * std::fabs(g);
      for (uint32_t c = 0; c < dims; ++c) {
        wanted[c] += g * w.values[size_t{v} * dims + c];
        bound[c] += g_error * std::fabs(w.values[size_t{v} * dims + c]);
      }
    }
    for (uint32_t c = 0; c < dims; ++c) {
      // Exponentials and probabilities below f16's smallest step vanish: half a step each.
      const double vanish = dtype == DType::f16 ? 0x1p-24 * vocab : 0.0;
      ASSERT_NEAR(
          got[size_t{t} * dims + c], wanted[c], bound[c] + u * std::fabs(wanted[c]) + vanish + 1e-7)
          << what;
    }
  }
  EXPECT_NEAR(with_gradient, sum, sum_bound + kU * std::fabs(sum)) << what;
  run(dx.get());
  EXPECT_EQ(dx.download<unsigned char>(), first) << what << ": not repeatable";
  run(nullptr);
  EXPECT_EQ(loss.download<float>()[0], with_gradient) << what;
}

TEST(CudaLoss, EqualsF64) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (const DType dtype : kDTypes) {
    check_loss(device, dtype, 7, 24, 33);
    check_loss(device, dtype, 40, 64, 1024);
    check_loss(device, dtype, 300, 64, 520);
    check_loss(device, dtype, 1, 8, 1);
    // Some targets' logits are hundreds below the largest, others the largest.
    check_loss(device, dtype, 40, 64, 24, 64.0);
  }
}

TEST(CudaLoss, LongRowsEqualF64) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (const DType dtype : kDTypes) {
    check_loss(device, dtype, 5, 8, 20000);  // rows that clusters of four and eight blocks hold
    check_loss(device, dtype, 3, 8, 60000);
    check_loss(device, dtype, 2, 8, 130000);  // rows that none holds
  }
}

TEST(CudaLoss, NoTokensIsZero) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  DeviceBuffer loss(4);
  LinearCrossEntropyParams p;
  p.dims = 8;
  p.vocab = 9;
  cuda::WeightView head;
  head.params = {.n = 9, .k = 8};
  cuda::linear_cross_entropy(
      device.context(), p, nullptr, head, nullptr, nullptr, loss.get<float>(), nullptr, nullptr);
  device.finish();
  EXPECT_EQ(loss.download<float>()[0], 0.0f);
}

TEST(CudaCast, RoundsToNearest) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(5);
  for (const DType from : kDTypes) {
    for (const DType to : kDTypes) {
      const Array x = random_array(rng, from, 4097, 3.0);
      const Array want = make_array(to, x.values);
      const DeviceBuffer dx = upload(x);
      DeviceBuffer y(4097 * bytes_of(to));
      cuda::cast(device.context(), 4097, dx.get(), from, y.get(), to);
      device.finish();
      EXPECT_EQ(y.download<unsigned char>(), want.bytes);
    }
  }
}

TEST(CudaPack, PadsRanks) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(6);
  constexpr uint32_t kRank = 5, kPadded = 8, kIn = 33, kOut = 20;
  const Array flat = random_array(rng, DType::f32, kRank * (kIn + kOut));
  const DeviceBuffer from = upload(flat);
  DeviceBuffer to(kPadded * (kIn + kOut) * 2);
  const cuda::PackedAdapter adapter{kRank, kPadded, kIn, kOut, 0, kRank * kIn, 0, kPadded * kIn};
  cuda::pack_adapters(
      device.context(), std::span(&adapter, 1), from.get<float>(), DType::bf16, to.get());
  device.finish();
  const auto got = values_of(to, DType::bf16, kPadded * (kIn + kOut));
  for (uint32_t r = 0; r < kPadded; ++r) {
    for (uint32_t i = 0; i < kIn; ++i) {
      const double want = r < kRank ? round_to(flat.values[r * kIn + i], 8, -126) : 0.0;
      ASSERT_EQ(got[r * kIn + i], want);
    }
    for (uint32_t o = 0; o < kOut; ++o) {
      const double want =
          r < kRank ? round_to(flat.values[kRank * kIn + o * kRank + r], 8, -126) : 0.0;
      ASSERT_EQ(got[kPadded * kIn + o * kPadded + r], want);
    }
  }
}

TEST(CudaAdamw, FollowsF64AndSkips) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  for (const size_t n : {size_t{1}, size_t{33}, size_t{70001}}) {
    std::mt19937 rng(7);
    AdamWParams p;
    p.count = n;
    p.learning_rate = 1e-2f;
    p.weight_decay = 0.1f;
    p.clip_norm = 0.5f;
    p.grad_scale = 0.25f;
    const Array start = random_array(rng, DType::f32, n);
    DeviceBuffer param = upload(start), m{std::vector<float>(n)}, v{std::vector<float>(n)}, norm(4),
                 skipped(4);
    std::vector<double> want = start.values, wm(n), wv(n);
    const auto run = [&](const Array& g) {
      const DeviceBuffer dg = upload(g);
      cuda::adamw(
          device.context(),
          p,
          param.get<float>(),
          dg.get<float>(),
          m.get<float>(),
          v.get<float>(),
          norm.get<float>(),
          skipped.get<int32_t>());
      device.finish();
    };
    for (uint64_t step = 1; step <= 10; ++step) {
      p.step = step;
      const Array g = random_array(rng, DType::f32, n);
      run(g);
      EXPECT_EQ(skipped.download<int32_t>()[0], 0);
      double squares = 0;
      for (double x : g.values) squares += x * x;
      const double length = 0.25 * std::sqrt(squares);
      EXPECT_NEAR(norm.download<float>()[0], length, 2 * kU * length);
      const double factor = 0.25 * std::min(1.0, 0.5 / (length + 1e-6));
      const double b1 = p.beta1, b2 = p.beta2;
      for (size_t i = 0; i < n; ++i) {
        const double x = g.values[i] * factor;
        wm[i] = b1 * wm[i] + (1 - b1) * x;
        wv[i] = b2 * wv[i] + (1 - b2) * x * x;
        want[i] -= double{p.learning_rate} *
                   (double{p.weight_decay} * want[i] +
                    wm[i] / (1 - std::pow(b1, step)) /
                        (std::sqrt(wv[i] / (1 - std::pow(b2, step))) + double{p.eps}));
      }
    }
    const auto got = param.download<float>();
    // As tests/kernels/adamw_test.cpp derives it: rate·32·60 u + 6 u·|p| a step.
    for (size_t i = 0; i < n; ++i) ASSERT_NEAR(got[i], want[i], 10 * (1e-2 * 32 * 60 + 12) * kU);

    Array bad = random_array(rng, DType::f32, n);
    const float nan = std::nanf("");
    std::memcpy(bad.bytes.data() + (n - 1) * 4, &nan, 4);
    const auto before_m = m.download<float>();
    run(bad);
    EXPECT_EQ(skipped.download<int32_t>()[0], 1);
    EXPECT_EQ(param.download<float>(), got);
    EXPECT_EQ(m.download<float>(), before_m);
  }
}

TEST(CudaDecode, NormEqualsF64) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(9);
  for (const auto& [rows, dims] : kShapes) {
    const Array x = random_array(rng, DType::f32, size_t{rows} * dims),
                weight = random_array(rng, DType::f32, dims);
    const DeviceBuffer dx = upload(x), dweight = upload(weight);
    for (const DType dtype : kDTypes) {
      DeviceBuffer y(size_t{rows} * dims * bytes_of(dtype));
      cuda::decode_norm(
          device.context(),
          rows,
          dims,
          1e-5f,
          dx.get<float>(),
          dweight.get<float>(),
          dtype,
          y.get());
      device.finish();
      std::vector<double> want(x.values.size()), bound(want.size());
      for (uint32_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (uint32_t i = 0; i < dims; ++i) squares += std::pow(x.values[size_t{r} * dims + i], 2);
        const double scale = 1 / std::sqrt(squares / dims + double{1e-5f});
        for (uint32_t i = 0; i < dims; ++i) {
          const size_t at = size_t{r} * dims + i;
          want[at] = x.values[at] * scale * weight.values[i];
          bound[at] = (norm_error(dims) + roundoff(dtype)) * std::fabs(want[at]) + 1e-7;
        }
      }
      expect_near(values_of(y, dtype, want.size()), want, bound, "y of " + std::to_string(dims));
    }
  }
}

TEST(CudaDecode, NormsAndRotatesIntoTheCache) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(8);
  constexpr uint32_t kTokens = 3, kQ = 4, kK = 2, kCapacity = 16;
  for (const uint32_t d : {64u, 128u, 10u}) {
    const size_t q_count = size_t{kTokens} * kQ * d, k_count = size_t{kTokens} * kK * d;
    const Array q = random_array(rng, DType::bf16, q_count),
                k = random_array(rng, DType::bf16, k_count),
                v = random_array(rng, DType::bf16, k_count),
                table = random_array(rng, DType::f32, kTokens * d),
                q_norm = random_array(rng, DType::f32, d),
                k_norm = random_array(rng, DType::f32, d);
    const std::vector<int32_t> positions = {5, 6, 7};
    for (const bool normed : {false, true}) {
      DeviceBuffer dq = upload(q), keys(kCapacity * kK * d * 2), values(kCapacity * kK * d * 2);
      const DeviceBuffer dk = upload(k), dv = upload(v), dt = upload(table), dqn = upload(q_norm),
                         dkn = upload(k_norm), dp(positions);
      cuda::DecodeAttentionParams p;
      p.tokens = kTokens;
      p.q_heads = kQ;
      p.kv_heads = kK;
      p.head_dim = d;
      cuda::decode_rope_cache(
          device.context(),
          p,
          dp.get<int32_t>(),
          dt.get<float>(),
          normed ? dqn.get<float>() : nullptr,
          normed ? dkn.get<float>() : nullptr,
          dq.get(),
          dk.get(),
          dv.get(),
          keys.get(),
          values.get());
      device.finish();
      const auto got_q = values_of(dq, DType::bf16, q_count);
      const auto got_k = values_of(keys, DType::bf16, size_t{kCapacity} * kK * d);
      const auto got_v = values_of(values, DType::bf16, size_t{kCapacity} * kK * d);
      const auto check = [&](const Array& from, const Array& norm, uint32_t heads, const auto& at) {
        for (uint32_t t = 0; t < kTokens; ++t) {
          for (uint32_t h = 0; h < heads; ++h) {
            const double* x = from.values.data() + (size_t{t} * heads + h) * d;
            double squares = 0;
            for (uint32_t i = 0; i < d; ++i) squares += x[i] * x[i];
            const double s = normed ? 1 / std::sqrt(squares / d + 1e-5) : 1.0;
            for (uint32_t i = 0; i < d / 2; ++i) {
              const double a = x[i] * s * (normed ? norm.values[i] : 1.0);
              const double b = x[i + d / 2] * s * (normed ? norm.values[i + d / 2] : 1.0);
              const double c = table.values[t * d + i], n = table.values[t * d + d / 2 + i];
              const double size =
                  std::fabs(a * c) + std::fabs(b * n) + std::fabs(b * c) + std::fabs(a * n);
              ASSERT_NEAR(at(t, h, i), a * c - b * n, (0x1p-8 + 64 * kU) * size);
              ASSERT_NEAR(at(t, h, i + d / 2), b * c + a * n, (0x1p-8 + 64 * kU) * size);
            }
          }
        }
      };
      check(q, q_norm, kQ, [&](uint32_t t, uint32_t h, uint32_t i) {
        return got_q[(size_t{t} * kQ + h) * d + i];
      });
      check(k, k_norm, kK, [&](uint32_t t, uint32_t h, uint32_t i) {
        return got_k[(size_t{5 + t} * kK + h) * d + i];
      });
      for (size_t i = 0; i < k_count; ++i) ASSERT_EQ(got_v[5 * kK * d + i], v.values[i]);
      EXPECT_TRUE(std::isnan(got_k[4 * kK * d])) << "wrote outside its rows";
    }
  }
}

}  // namespace
}  // namespace metal_lora::test
