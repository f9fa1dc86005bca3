// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The metal-emulate program: what it prints and returns.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "src/frontend/process.h"

namespace metal_emulator {
namespace {

namespace fs = std::filesystem;
using frontend::ProcessResult;
using frontend::run_process;

class FrontendTool : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("metal-emulate-test-" + std::to_string(getpid()) + "-" +
                                     testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    write(
        "axpy.metal",
        "#include <metal_stdlib>\nusing namespace metal;\n"
        "constant float a [[function_constant(0)]];\n"
        "kernel void axpy(const device float* x [[buffer(0)]],\n"
        "                 device float* y [[buffer(1)]],\n"
        "                 uint i [[thread_position_in_grid]]) {\n"
        "  y[i] = a * x[i];\n}\n");
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ / name) << text;
  }
  ProcessResult tool(std::vector<std::string> arguments) const {
    arguments.insert(arguments.begin(), METAL_EMULATE_TOOL);
    return run_process(arguments);
  }

  fs::path folder_;
};

testing::AssertionResult has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos ? testing::AssertionSuccess()
                                              : testing::AssertionFailure()
                                                    << "no \"" << part << "\" in:\n"
                                                    << text;
}

TEST_F(FrontendTool, CompilesListsAndRuns) {
  ASSERT_EQ(tool({"compile", path("axpy.metal"), "-o", path("axpy.so")}).status, 0);
  const ProcessResult list = tool({"list", path("axpy.so")});
  EXPECT_EQ(list.status, 0);
  EXPECT_EQ(
      list.out,
      "axpy\n  buffer(0) x (read only)\n  buffer(1) y\nfunction_constant(0) a, 4 bytes\n");
  const ProcessResult run = tool(
      {"run",
       path("axpy.so"),
       "axpy",
       "--buffer",
       "0=float:1,2,3,4",
       "--buffer",
       "1=undefined:16",
       "--constant",
       "0=float:2.5",
       "--grid",
       "4",
       "--threadgroup",
       "4",
       "--save",
       "1=" + path("y.bin")});
  EXPECT_EQ(run.status, 0) << run.err;
  EXPECT_TRUE(has(run.out, "0 findings"));
  EXPECT_TRUE(has(run.out, "buffer 1  read 0 bytes (0 unique), wrote 16 bytes (16 unique)"));
  std::ifstream in(path("y.bin"), std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(in), {});
  ASSERT_EQ(bytes.size(), 16u);
  std::vector<float> y(4);
  std::memcpy(y.data(), bytes.data(), 16);
  EXPECT_EQ(y, (std::vector<float>{2.5f, 5.0f, 7.5f, 10.0f}));
}

TEST_F(FrontendTool, FindingsMakeItFail) {
  const ProcessResult run = tool(
      {"run",
       path("axpy.metal"),
       "axpy",
       "--buffer",
       "0=float:1,2,3,4",
       "--buffer",
       "1=zeros:12",
       "--constant",
       "0=float:1",
       "--grid",
       "4",
       "--threadgroup",
       "4",
       "--json"});
  EXPECT_EQ(run.status, 1);
  EXPECT_TRUE(has(run.out, "\"finding_count\": 1"));
  EXPECT_TRUE(has(run.out, "\"kind\": \"out_of_bounds\""));
  EXPECT_TRUE(has(run.out, "\"line\": 7"));
}

TEST_F(FrontendTool, LintsAndRewrites) {
  EXPECT_EQ(tool({"lint", path("axpy.metal")}).status, 0);
  write("bad.metal", "#include <metal_stdlib>\nfloat f(float* p);\n");
  const ProcessResult bad = tool({"lint", path("bad.metal")});
  EXPECT_EQ(bad.status, 1);
  EXPECT_TRUE(has(bad.out, "bad.metal:2: error:"));
  EXPECT_EQ(tool({"compile", path("bad.metal"), "-o", path("bad.so")}).status, 1);
  EXPECT_EQ(tool({"compile", path("bad.metal"), "-o", path("bad.so"), "--no-lint"}).status, 0);
  EXPECT_TRUE(has(tool({"rewrite", path("axpy.metal")}).out, "metal_emulator_library"));
}

TEST_F(FrontendTool, DepfileNamesWhatWasRead) {
  write("tile.h", "#define TILE 4\n");
  write(
      "t.metal",
      "#include <metal_stdlib>\n#include \"tile.h\"\nkernel void k(device int* y [[buffer(0)]]) { "
      "y[0] = TILE; }\n");
  ASSERT_EQ(
      tool({"compile", path("t.metal"), "-o", path("t.so"), "--depfile", path("t.d")}).status, 0);
  std::ifstream in(path("t.d"));
  const std::string rule(std::istreambuf_iterator<char>(in), {});
  EXPECT_EQ(rule.rfind(path("t.so") + ":", 0), 0u);
  EXPECT_TRUE(has(rule, path("t.metal")));
  EXPECT_TRUE(has(rule, path("tile.h")));
}

TEST_F(FrontendTool, WrongUsage) {
  EXPECT_EQ(tool({}).status, 2);
  EXPECT_EQ(tool({"fly"}).status, 2);
  EXPECT_EQ(tool({"run", path("axpy.metal")}).status, 2);
  EXPECT_EQ(tool({"run", path("axpy.metal"), "axpy", "--grid", "x"}).status, 2);
  EXPECT_EQ(tool({"compile", path("axpy.metal")}).status, 2);
  EXPECT_EQ(tool({"lint", path("absent.metal")}).status, 2);
  EXPECT_EQ(tool({"list", path("axpy.metal"), "--what"}).status, 2);
  const ProcessResult unbound = tool({"run", path("axpy.metal"), "axpy"});
  EXPECT_EQ(unbound.status, 1);
  EXPECT_FALSE(unbound.err.empty());
  const ProcessResult help = tool({"--help"});
  EXPECT_EQ(help.status, 0);
  for (const char* word : {"compile", "lint", "rewrite", "list", "run", "--buffer", "Exit code"}) {
    EXPECT_TRUE(has(help.out, word));
  }
}

}  // namespace
}  // namespace metal_emulator
