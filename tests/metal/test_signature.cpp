// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// A kernel's name is the key that MLX keeps its compiled text under: two texts must never share
// one. MLX itself puts the types of inputs and outputs and the address spaces of inputs into it, so
// that plans need not.
#include <gtest/gtest.h>

#include "kernels/metal/plans_quantize.h"
#include "kernels/metal/plans_train.h"
#include "tests/metal/direct.h"

namespace metal_lora::test {
namespace {

namespace mx = mlx::core;

RecordedKernel recorded_grad(int m, int n, int k, int rank) {
  const metal::LoraGradShape shape{
      .m = uint32_t(m), .n = uint32_t(n), .k = uint32_t(k), .rank = uint32_t(rank), .scale = 1.0f};
  return record_metal_kernel(
      metal::plan_lora_grad(shape),
      {mx::zeros({m, k}), mx::zeros({m, rank}), mx::zeros({m, n}), mx::zeros({m, rank})},
      {{{rank, k}, mx::float32}, {{n, rank}, mx::float32}});
}

TEST(Signature, SmallInputsHaveAnotherTextAndAnotherName) {
  const auto large = recorded_grad(20, 30, 40, 4), larger = recorded_grad(50, 60, 70, 8);
  EXPECT_EQ(large.name, larger.name);
  EXPECT_EQ(large.text, larger.text);
  const auto small_v = recorded_grad(2, 30, 40, 3), small_x = recorded_grad(1, 30, 4, 8);
  EXPECT_NE(small_v.text, large.text);
  EXPECT_NE(small_v.name, large.name);
  EXPECT_NE(small_x.text, small_v.text);
  EXPECT_NE(small_x.name, small_v.name);
}

TEST(Signature, TypesThatNoTemplateArgumentNamesAreInTheName) {
  const auto recorded = [](DType scales) {
    const metal::QuantizeShape shape{
        .n = 4, .k = 128, .format = WeightFormat::int4, .group_size = 32, .scales_dtype = scales};
    const auto groups = mx::zeros({4, 4}, to_mlx(scales));
    return record_metal_kernel(
        metal::plan_dequantize(shape),
        {mx::zeros({4, 16}, mx::uint32), groups, groups},
        {{{4, 128}, mx::float32}});
  };
  EXPECT_NE(recorded(DType::f16).text, recorded(DType::f32).text);
  EXPECT_NE(recorded(DType::f16).name, recorded(DType::f32).name);
}

}  // namespace
}  // namespace metal_lora::test
