// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "metal_lora/error.h"
#include "src/cli/bench_ops.h"
#include "src/cli/session.h"

namespace metal_lora::cli {
namespace {

using testing::AllOf;
using testing::HasSubstr;

LoadOptions parsed(const std::string& words) {
  CLI::App app;
  ModelOptions options;
  options.add_to(app, "bfloat16");
  app.parse("--model m " + words);
  return options.load_options();
}

TEST(QuantizeFlags, NameTheFormAndTurnDoubleQuantisationOff) {
  EXPECT_EQ(parsed("").quantize, Quantization::none);
  EXPECT_EQ(parsed("--quantize 4").quantize, Quantization::int4);
  EXPECT_EQ(parsed("--quantize 8 --quantize-group-size 32").quantize_group, 32);
  const LoadOptions nf4 = parsed("--quantize nf4");
  EXPECT_EQ(nf4.quantize, Quantization::nf4);
  EXPECT_TRUE(nf4.double_quant);
  EXPECT_NO_THROW(nf4.validate());
  EXPECT_FALSE(parsed("--quantize nf4 --no-double-quant").double_quant);
  EXPECT_TRUE(parsed("--quantize nf4 --double-quant").double_quant);
  EXPECT_THROW(parsed("--quantize fp4"), CLI::ValidationError);
  EXPECT_THROW(parsed("--quantize 16"), CLI::ValidationError);
}

TEST(QuantizeFlags, ATargetHoldsAffineBitsOnly) {
  const auto bits = [](const std::string& words) {
    CLI::App app;
    TargetQuantization target;
    target.add_to(app, "help", "--quantize-group-size");
    app.parse(words);
    return target.bits();
  };
  EXPECT_EQ(bits(""), 0);
  EXPECT_EQ(bits("--quantize 4"), 4);
  EXPECT_EQ(bits("--quantize 8"), 8);
  try {
    bits("--quantize nf4");
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_THAT(
        error.what(), AllOf(HasSubstr("nf4 cannot be written"), HasSubstr("where it is loaded")));
  }
  EXPECT_THROW(bits("--quantize 5"), Error);
}

TEST(QuantizeFlags, BenchKnowsTheFormOfNf4) {
  EXPECT_THAT(kernel_form(1, "nf4", 2048, 2048), HasSubstr("gemv nf4 packed"));
  EXPECT_THAT(kernel_form(512, "nf4", 2048, 2048), HasSubstr("gemm nf4 packed"));
  EXPECT_THAT(kernel_form(1, "nf4", 259, 64), HasSubstr("row-major"));  // no whole panels of rows
}

}  // namespace
}  // namespace metal_lora::cli
