// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Verification of drafted tokens on CUDA gives the CPU's very tokens (which
// tests/kernels/speculative_test.cpp holds against f64), for every storage type.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/lora_speculative.h"
#include "kernels/cuda/transformer_kernels.h"
#include "tests/cuda/support.h"
#include "tests/kernels/linear_reference.h"

namespace metal_lora::test {
namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

struct Inputs {
  VerifyParams p;
  Array logits;
  std::vector<int32_t> drafts;
  std::vector<float> q;  ///< empty: drafts count as certain
};

struct Outputs {
  std::vector<int32_t> accepted, next;
  bool operator==(const Outputs&) const = default;
};

Outputs on_cpu(const Inputs& in) {
  Outputs out{std::vector<int32_t>(in.p.batch, -7), std::vector<int32_t>(in.p.batch, -7)};
  cpu::verify_tokens(
      in.p,
      in.logits.bytes.data(),
      in.drafts.data(),
      in.q.empty() ? nullptr : in.q.data(),
      out.accepted.data(),
      out.next.data());
  return out;
}

Outputs on_device(TestDevice& device, const Inputs& in) {
  const DeviceBuffer logits(in.logits.bytes.data(), in.logits.bytes.size()), drafts(in.drafts),
      q(in.q);
  DeviceBuffer accepted(in.p.batch * 4), next(in.p.batch * 4);
  cuda::verify_tokens(
      device.context(),
      in.p,
      logits.get(),
      drafts.get<int32_t>(),
      in.q.empty() ? nullptr : q.get<float>(),
      accepted.get<int32_t>(),
      next.get<int32_t>());
  device.finish();
  return {accepted.download<int32_t>(), next.download<int32_t>()};
}

void set_logit(Inputs& in, size_t at, float value) {
  if (in.p.dtype == DType::f32) {
    std::memcpy(in.logits.bytes.data() + at * 4, &value, 4);
    return;
  }
  // Only NaN and infinities: the same leading bits in f16 and bf16 but for the exponent's width.
  const uint16_t infinity = in.p.dtype == DType::f16 ? 0x7c00 : 0x7f80;
  auto bits = static_cast<uint16_t>(std::isnan(value) ? infinity | 0x40 : infinity);
  if (std::signbit(value) && !std::isnan(value)) bits |= 0x8000;
  std::memcpy(in.logits.bytes.data() + at * 2, &bits, 2);
}

/// Three of four drafts are their row's largest logit, so that sequences go on; one lies outside.
Inputs random_inputs(std::mt19937& rng, const VerifyParams& p, double spread, bool has_q) {
  Inputs in;
  in.p = p;
  const size_t rows = size_t{p.batch} * (p.drafts + 1);
  in.logits = random_array(rng, p.dtype, rows * p.vocab, spread);
  in.drafts.resize(size_t{p.batch} * p.drafts);
  if (has_q) in.q.assign(in.drafts.size() * p.vocab, 0.0f);
  for (size_t b = 0; b < p.batch; ++b) {
    for (size_t i = 0; i < p.drafts; ++i) {
      const double* row = in.logits.values.data() + (b * (p.drafts + 1) + i) * p.vocab;
      const size_t at = b * p.drafts + i;
      in.drafts[at] = rng() % 4 != 0
                          ? static_cast<int32_t>(std::max_element(row, row + p.vocab) - row)
                          : static_cast<int32_t>(rng() % p.vocab);
      if (!has_q) continue;
      float* q = in.q.data() + at * p.vocab;
      float sum = 0.0f;
      for (uint32_t v = 0; v < p.vocab; ++v) {
        q[v] = static_cast<float>(std::exp(row[v] / std::max(p.temperature, 0.5f))) *
               (0.5f + static_cast<float>(rng() % 1024) / 1024.0f);
        sum += q[v];
      }
      for (uint32_t v = 0; v < p.vocab; ++v) q[v] /= sum;
    }
  }
  if (!in.drafts.empty() && rng() % 4 == 0) in.drafts.back() = static_cast<int32_t>(p.vocab);
  if (!in.drafts.empty() && rng() % 4 == 0) in.drafts.front() = -1;
  return in;
}

std::string name_of(const VerifyParams& p, bool has_q) {
  return "dtype " + std::to_string(static_cast<int>(p.dtype)) + ", vocabulary " +
         std::to_string(p.vocab) + ", " + std::to_string(p.drafts) + " drafts, temperature " +
         std::to_string(p.temperature) + (has_q ? ", with probabilities" : "");
}

/// How many drafts were kept.
uint64_t check_against_cpu(
    TestDevice& device, std::mt19937& rng, const VerifyParams& p, bool has_q) {
  const Inputs in = random_inputs(rng, p, 3.0, has_q);
  const Outputs want = on_cpu(in), got = on_device(device, in);
  EXPECT_EQ(got.accepted, want.accepted) << name_of(p, has_q);
  EXPECT_EQ(got.next, want.next) << name_of(p, has_q);
  EXPECT_EQ(on_device(device, in), got) << name_of(p, has_q);
  uint64_t kept = 0;
  for (const int32_t a : want.accepted) kept += static_cast<uint64_t>(a);
  return kept;
}

/// Small enough for compute-sanitizer's racecheck.
TEST(CudaVerify, EqualsTheCpuOnFewTokens) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(4);
  for (const bool has_q : {false, true}) {
    VerifyParams p;
    p.batch = 2;
    p.drafts = 2;
    p.vocab = 700;
    p.dtype = DType::bf16;
    p.temperature = has_q ? 0.7f : 0.0f;
    p.seed = 11;
    check_against_cpu(device, rng, p, has_q);
  }
}

TEST(CudaVerify, EqualsTheCpu) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(1);
  uint64_t kept = 0;
  for (const DType dtype : kDTypes) {
    for (const uint32_t vocab : {1u, 2u, 33u, 513u, 4097u, 32003u}) {
      for (const uint32_t drafts : {0u, 1u, 5u}) {
        for (const float temperature : {0.0f, 0.7f, 1.0f}) {
          for (const bool has_q : {false, true}) {
            VerifyParams p;
            p.batch = vocab > 5000 ? 3 : 16;
            p.drafts = drafts;
            p.vocab = vocab;
            p.dtype = dtype;
            p.temperature = temperature;
            p.seed = rng();
            kept += check_against_cpu(device, rng, p, has_q);
          }
        }
      }
    }
  }
  EXPECT_GT(kept, 100u) << "hardly any draft was kept: the later rows went untested";
}

TEST(CudaVerify, RowsWithoutDistributionEndTheirSequence) {
  METAL_LORA_NEEDS_GPU();
  TestDevice device;
  std::mt19937 rng(2);
  for (const DType dtype : kDTypes) {
    for (const float temperature : {0.0f, 1.0f}) {
      VerifyParams p;
      p.batch = 4;
      p.drafts = 2;
      p.vocab = 100;
      p.dtype = dtype;
      p.temperature = temperature;
      p.seed = 5;
      Inputs in = random_inputs(rng, p, 1.0, false);
      const size_t sequence = size_t{p.drafts + 1} * p.vocab;
      set_logit(in, 7, std::nanf(""));
      set_logit(in, sequence + 11, INFINITY);
      for (size_t v = 0; v < sequence; ++v) set_logit(in, 2 * sequence + v, -INFINITY);
      for (size_t v = 1; v < p.vocab; ++v) set_logit(in, 3 * sequence + v, -INFINITY);
      const Outputs want = on_cpu(in);
      EXPECT_EQ(on_device(device, in), want) << name_of(p, false);
      EXPECT_EQ(want.next[2], -1);
    }
  }
}

}  // namespace
}  // namespace metal_lora::test
