// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// That what the emulator runs is what MLX would hand to Apple's compiler, and that a graph written
// for a Mac holds the same text.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include <mlx/export.h>
#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include "kernels/metal/regions.h"
#include "metal_lora/error.h"
#include "metal_lora/ops.h"
#include "tests/metal/harness.h"

namespace metal_lora {
namespace {

namespace mx = mlx::core;

metal::LoraShape small_shape() {
  metal::LoraShape shape;
  shape.m = 2;
  shape.n = 16;
  shape.k = 32;
  shape.format = WeightFormat::bf16;
  shape.rank = 4;
  shape.scale = 2.0f;
  shape.dtype = DType::bf16;
  shape.lora_dtype = DType::bf16;
  return shape;
}

Arrays small_inputs() {
  return {
      mx::ones({2, 32}, mx::bfloat16),
      mx::ones({16, 32}, mx::bfloat16),
      mx::ones({4, 32}, mx::bfloat16),
      mx::ones({16, 4}, mx::bfloat16)};
}

const std::vector<OutputSpec> kSmallOutput = {{{2, 16}, mx::bfloat16}};

metal::Plan small_plan() {
  auto shape = small_shape();
  shape.form = metal::Form::fused;
  return metal::plan_lora_forward(shape)[0];
}

std::string file_text(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

TEST(MetalExecutor, RecordsMlxOwnText) {
  const auto plan = small_plan();
  const auto kernel = record_metal_kernel(plan, small_inputs(), kSmallOutput);
  EXPECT_EQ(kernel.name.find(std::string("custom_kernel_") + plan.entry->name), 0u) << kernel.name;
  // The header is ours, whole; then MLX's signature; then our body.
  const auto header = metal::assemble(plan.entry->regions);
  const auto signature = kernel.text.find("[[kernel]] void " + kernel.name);
  ASSERT_NE(signature, std::string::npos);
  EXPECT_LT(kernel.text.find(header), signature);
  EXPECT_NE(kernel.text.find(plan.entry->body, signature), std::string::npos);
  EXPECT_NE(kernel.text.find("const device bfloat16_t* x [[buffer(0)]]"), std::string::npos);
  EXPECT_EQ(kernel.threads_per_grid, plan.threads_per_grid);
  EXPECT_EQ(kernel.threads_per_threadgroup, plan.threads_per_threadgroup);
}

TEST(MetalExecutor, AnExportedGraphHoldsTheTextThatTheEmulatorRuns) {
  const auto plan = small_plan();
  const auto file = std::filesystem::path(testing::TempDir()) / "step.mlxfn";
  {
    BackendScope scope(Backend::metal);
    mx::export_function(
        file.string(),
        std::function<Arrays(const mx::Args&)>(
            [&](const mx::Args& in) { return metal_dispatch(plan, in, kSmallOutput); }),
        small_inputs());
  }
  const auto kernel = record_metal_kernel(plan, small_inputs(), kSmallOutput);
  EXPECT_NE(file_text(file).find(kernel.text), std::string::npos);
  std::filesystem::remove(file);
}

TEST(MetalExecutor, RunsOnTheEmulator) {
  EmulatorLog log;
  auto in = small_inputs();
  auto out = test::run(
      {small_plan()},
      {{"x", in[0]}, {"w", in[1]}, {"a", in[2]}, {"b", in[3]}},
      {{"y", kSmallOutput[0]}});
  // 32 + 2·(32·4): exact in bf16's 8 bits.
  for (double y : test::values(out.at("y"))) EXPECT_EQ(y, 288.0);
  const auto dispatches = log.take();
  ASSERT_EQ(dispatches.size(), 1u);
  EXPECT_EQ(dispatches[0].report.finding_count, 0u);
  const auto& names = dispatches[0].buffer_names;
  const auto w = static_cast<size_t>(std::find(names.begin(), names.end(), "w") - names.begin());
  ASSERT_LT(w, names.size());
  EXPECT_EQ(dispatches[0].report.counters.buffers[w].unique_read_bytes, 16u * 32 * 2);
}

TEST(MetalExecutor, RefusesADispatchOnAnotherBackend) {
  BackendScope scope(Backend::cpu);
  EXPECT_THROW(metal_dispatch(small_plan(), small_inputs(), kSmallOutput), Error);
}

TEST(MetalExecutor, NamesAMissingArray) {
  BackendScope scope(Backend::emulator);
  ops::metal_ops::NamedArrays arrays{{"x", small_inputs()[0]}};
  try {
    ops::metal_ops::run_plans({small_plan()}, arrays, {{"y", kSmallOutput[0]}});
    FAIL() << "must throw";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("no array named w"), std::string::npos);
  }
}

TEST(MetalExecutor, StripsGradientNodesOnly) {
  auto twice = mx::custom_vjp(
      [](const Arrays& in) { return Arrays{mx::multiply(in[0], mx::array(2.0f))}; },
      [](const Arrays&, const Arrays& cotangents, const Arrays&) { return cotangents; });
  auto x = mx::arange(4.0f);
  Arrays outputs{mx::add(twice({x})[0], mx::array(1.0f)), twice({twice({x})[0]})[0]};
  strip_gradient_nodes(outputs);
  const auto names = [](const mx::array& a) {
    std::string text;
    std::vector<mx::array> open{a};
    while (!open.empty()) {
      auto node = open.back();
      open.pop_back();
      if (node.has_primitive()) text += std::string(node.primitive().name()) + " ";
      for (const auto& in : node.inputs()) open.push_back(in);
    }
    return text;
  };
  EXPECT_EQ(names(outputs[0]).find("CustomTransforms"), std::string::npos);
  EXPECT_EQ(names(outputs[1]).find("CustomTransforms"), std::string::npos);
  EXPECT_EQ(test::values(outputs[0]), (std::vector<double>{1, 3, 5, 7}));
  EXPECT_EQ(test::values(outputs[1]), (std::vector<double>{0, 4, 8, 12}));
}

TEST(Regions, NeedsComeFirstAndOnce) {
  const metal::MetalFile file{
      "x.metal", "intro\n// @region one : two\n1\n// @region two :\n2\n2b\n// @region three\n3\n"};
  const auto regions = metal::parse_regions(file);
  ASSERT_EQ(regions.size(), 3u);
  EXPECT_EQ(regions[0].needs, std::vector<std::string>{"two"});
  EXPECT_EQ(regions[1].text, "2\n2b\n");
  EXPECT_EQ(regions[1].first_line, 5);
  EXPECT_TRUE(regions[2].needs.empty());
  EXPECT_THROW(metal::parse_regions({"y.metal", "// @region one two\n"}), Error);
  EXPECT_THROW(metal::assemble({"no_such_region"}), Error);
}

TEST(Regions, EveryRegionOfTheProjectAssembles) {
  size_t count = 0;
  for (const auto& file : metal::metal_files()) {
    for (const auto& region : metal::parse_regions(file)) {
      const auto text = metal::assemble({region.name, region.name});
      EXPECT_NE(text.find(region.text), std::string::npos) << region.name;
      EXPECT_EQ(text.find(region.text), text.rfind(region.text)) << region.name;
      ++count;
    }
  }
  EXPECT_GE(count, 10u);
}

}  // namespace
}  // namespace metal_lora
