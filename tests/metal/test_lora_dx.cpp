// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// dx = dy·W + scale·drop((dy·B)·A) and v = dy·B on the emulator, against an f64 reference at
// derived bounds, with all of the emulator's checks on.
#include "tests/metal/lora_case.h"

namespace metal_lora::test {
namespace {

using metal::Form;
using metal::LoraShape;

LoraShape shape_of(uint32_t m, uint32_t n, uint32_t k, uint32_t rank, DType dtype = DType::f16) {
  LoraShape s;
  s.m = m;
  s.n = n;
  s.k = k;
  s.rank = rank;
  s.scale = 0.75f;
  s.dtype = dtype;
  s.lora_dtype = dtype;
  s.format = dtype == DType::f32   ? WeightFormat::f32
             : dtype == DType::f16 ? WeightFormat::f16
                                   : WeightFormat::bf16;
  s.form = Form::fused;
  return s;
}

/// Types of dy, W, A: all equal, and mixtures that the matrix units have no instruction for.
std::vector<LoraShape> dense_types() {
  using F = WeightFormat;
  using D = DType;
  struct Types {
    D dy;
    F w;
    D a;
  };
  std::vector<LoraShape> out;
  for (const Types t :
       {Types{D::f32, F::f32, D::f16},
        Types{D::bf16, F::bf16, D::f32},
        Types{D::f16, F::f32, D::bf16}}) {
    LoraShape s = shape_of(33, 77, 70, 5, t.dy);
    s.format = t.w;
    s.lora_dtype = t.a;
    s.wants_u = true;
    out.push_back(s);
  }
  return out;
}

std::vector<LoraShape> packed_types() {
  std::vector<LoraShape> out;
  const auto add = [&](DType dtype, WeightFormat format, uint32_t group, bool nested) {
    LoraShape s = shape_of(10, 45, format == WeightFormat::nf4 ? 192 : 3 * group, 12, dtype);
    s.format = format;
    s.group_size = format == WeightFormat::nf4 ? 0 : group;
    s.scales_dtype = dtype;
    s.double_quant = nested;
    s.lora_dtype = DType::f32;
    out.push_back(s);
  };
  add(DType::f16, WeightFormat::int4, 32, false);
  add(DType::bf16, WeightFormat::int8, 64, false);
  add(DType::bf16, WeightFormat::nf4, 64, false);
  add(DType::f16, WeightFormat::nf4, 64, true);
  out.back().n = 100;  // two absmax2
  return out;
}

std::vector<LoraShape> ranks() {
  std::vector<LoraShape> out;
  for (const Form form : {Form::fused, Form::split}) {
    for (const uint32_t rank : {1u, 3u, 8u, 64u, 256u}) {
      if (form == Form::fused && rank > 64) continue;
      LoraShape s = shape_of(33, 45, 70, rank, DType::bf16);
      s.lora_dtype = DType::f32;
      s.form = form;
      s.wants_u = form == Form::fused;
      out.push_back(s);
    }
  }
  return out;
}

std::vector<LoraShape> other() {
  LoraShape base = shape_of(35, 50, 128, 0, DType::bf16);
  base.form = Form::automatic;
  base.format = WeightFormat::int4;
  base.group_size = 64;
  LoraShape one = shape_of(1, 1, 1, 1, DType::f32);
  one.wants_u = true;
  LoraShape most_memory = shape_of(65, 33, 513, 32, DType::f32);  // wide tiles
  return {base, one, most_memory};
}

/// The fused form with dropout is the one that faults are planted in.
std::vector<LoraShape> with_dropout() {
  LoraShape s = shape_of(40, 30, 100, 12, DType::bf16);
  s.lora_dtype = DType::f32;
  s.dropout = 0.3f;
  s.dropout_seed = 0x123456789abcdef0ull;
  s.form = Form::split;
  return {s};
}

class Dx : public testing::TestWithParam<LoraShape> {};

TEST_P(Dx, IsWithinTheRoundingBound) {
  expect_dx(GetParam());
}

std::string name_of(const testing::TestParamInfo<LoraShape>& info) {
  return case_name(info.param);
}
INSTANTIATE_TEST_SUITE_P(Types, Dx, testing::ValuesIn(dense_types()), name_of);
INSTANTIATE_TEST_SUITE_P(Packed, Dx, testing::ValuesIn(packed_types()), name_of);
INSTANTIATE_TEST_SUITE_P(Ranks, Dx, testing::ValuesIn(ranks()), name_of);
INSTANTIATE_TEST_SUITE_P(Other, Dx, testing::ValuesIn(other()), name_of);
INSTANTIATE_TEST_SUITE_P(Dropout, Dx, testing::ValuesIn(with_dropout()), name_of);

// W = 0, dy = 1, B = 1, A = 1 and rank 1: dx is the mask, times n·scale / (1 - p).
TEST(DxDropout, DrawsTheCpusMaskBitForBit) {
  LoraShape s = shape_of(37, 2, 70, 1, DType::f32);
  s.dropout = 0.4f;
  s.dropout_seed = 77;
  LoraCase c(s);
  c.set("w", c.w, std::vector<float>(2 * 70, 0.0f), DType::f32);
  c.set("a", c.a, std::vector<float>(70, 1.0f), DType::f32);
  c.set("b", c.b, std::vector<float>(2, 1.0f), DType::f32);
  c.set("dy", c.dy, std::vector<float>(37 * 2, 1.0f), DType::f32);
  const auto dx = values(run(plan_lora_dx(s), c.arrays, lora_outputs(s)).at("dx"));
  for (size_t i = 0; i < dx.size(); ++i) {
    ASSERT_EQ(dx[i] != 0.0, c.keep.values[i] != 0.0) << "element " << i;
  }
}

TEST(DxPlan, RefusesByName) {
  LoraShape s = shape_of(16, 64, 96, 65);
  EXPECT_THROW(plan_lora_dx(s), std::invalid_argument);
  s.rank = 257;
  s.form = Form::automatic;
  EXPECT_THROW(plan_lora_dx(s), std::invalid_argument);
  s.rank = 8;
  s.dropout = -0.5f;
  EXPECT_THROW(plan_lora_dx(s), std::invalid_argument);
}

}  // namespace
}  // namespace metal_lora::test
