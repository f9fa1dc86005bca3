// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// From text to results: compile(), load(), compile_to(), the cache, the CMake step.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "metal_emulator/emulator.h"

namespace metal_emulator {
namespace {

namespace fs = std::filesystem;

constexpr const char* kHead = "#include <metal_stdlib>\nusing namespace metal;\n";

class FrontendCompile : public testing::Test {
 protected:
  void SetUp() override {
    folder_ =
        fs::temp_directory_path() / ("metal-emulator-test-" + std::to_string(getpid()) + "-" +
                                     testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::create_directories(folder_);
    options_.file_name = "k.metal";
  }
  void TearDown() override { fs::remove_all(folder_); }

  Library build(const std::string& body) { return compile(kHead + body, options_); }

  // The floats that kernel k writes to its buffer(0).
  std::vector<float> results(
      const Library& library,
      size_t count,
      std::vector<FunctionConstant> constants = {},
      const std::string& kernel = "k") {
    std::vector<float> y(count, -1.0f);
    Dispatch dispatch;
    dispatch.kernel = kernel;
    dispatch.buffers = {{0, y.data(), y.size() * sizeof(float), false}};
    dispatch.threads_per_grid = {static_cast<uint32_t>(count), 1, 1};
    dispatch.threads_per_threadgroup = {static_cast<uint32_t>(count), 1, 1};
    dispatch.function_constants = std::move(constants);
    const Report report = run(library, dispatch);
    for (const Finding& f : report.findings) {
      ADD_FAILURE() << f.file << ":" << f.line << ": " << f.text;
    }
    return y;
  }

  std::string error_of(const std::string& body) {
    try {
      build(body);
    } catch (const CompileError& error) {
      return error.what();
    }
    return "accepted";
  }

  fs::path folder_;
  CompileOptions options_;
};

template <class T>
FunctionConstant constant(int index, T value) {
  FunctionConstant c;
  c.index = index;
  c.value.resize(sizeof(T));
  std::memcpy(c.value.data(), &value, sizeof(T));
  return c;
}

TEST_F(FrontendCompile, DescribesTheLibrary) {
  const Library library = build(
      "constant int n [[function_constant(7)]];\n"
      "kernel void k(const device float* x [[buffer(3)]], device float* y [[buffer(1)]], "
      "threadgroup "
      "float* t [[threadgroup(2)]], uint i [[thread_position_in_grid]]) { t[i] = x[i] + n; y[i] = "
      "t[i]; "
      "}");
  ASSERT_EQ(library.kernels().size(), 1u);
  const KernelInfo* k = library.find("k");
  ASSERT_NE(k, nullptr);
  EXPECT_EQ(library.find("absent"), nullptr);
  ASSERT_EQ(k->arguments.size(), 4u);
  EXPECT_EQ(k->arguments[0].index, 3);
  EXPECT_TRUE(k->arguments[0].read_only);
  EXPECT_EQ(k->arguments[0].name, "x");
  EXPECT_EQ(k->arguments[1].index, 1);
  EXPECT_FALSE(k->arguments[1].read_only);
  EXPECT_EQ(k->arguments[2].kind, ArgumentInfo::Kind::threadgroup_memory);
  EXPECT_EQ(k->arguments[3].kind, ArgumentInfo::Kind::built_in);
  ASSERT_EQ(library.function_constants().size(), 1u);
  EXPECT_EQ(library.function_constants()[0].index, 7);
  EXPECT_EQ(library.function_constants()[0].bytes, 4u);
}

TEST_F(FrontendCompile, FunctionConstantsChangeFromRunToRun) {
  const Library library = build(
      "constant int n [[function_constant(0)]];\n"
      "constant int twice = is_function_constant_defined(n) ? 2 * n : -5;\n"
      "constant int more = twice + 1;\n"
      "kernel void k(device float* y [[buffer(0)]]) { y[0] = more; }");
  EXPECT_EQ(results(library, 1, {constant<int>(0, 4)})[0], 9.0f);
  EXPECT_EQ(results(library, 1, {constant<int>(0, 5)})[0], 11.0f);
  EXPECT_EQ(results(library, 1)[0], -4.0f);
}

TEST_F(FrontendCompile, DisabledArgumentsNeedNoBuffer) {
  const Library library = build(
      "constant bool has [[function_constant(0)]];\n"
      "kernel void k(device float* y [[buffer(0)]], const device float* x [[buffer(1), "
      "function_constant(has)]]) { y[0] = 1; if (has) { y[0] = x[0]; } }");
  EXPECT_EQ(results(library, 1, {constant<bool>(0, false)})[0], 1.0f);
  EXPECT_THROW(results(library, 1, {constant<bool>(0, true)}), DispatchError);
}

TEST_F(FrontendCompile, ThreadgroupVariablesOfEveryForm) {
  const Library library = build(
      "struct S { float a; int b; };\n"
      "template <typename T, int N> kernel void f(device float* y [[buffer(0)]], uint i "
      "[[thread_index_in_threadgroup]]) {\n"
      "  threadgroup T a[N][2], b;\n"
      "  threadgroup S s[N];\n"
      "  threadgroup float start[4] = {10, 20, 30, 40};\n"
      "  a[i][0] = i; a[i][1] = 2 * i; s[i].a = 100 * i; s[i].b = 1000 * i;\n"
      "  if (i == 0) { b = 7; }\n"
      "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
      "  uint j = (i + 1) % N;\n"
      "  y[i] = a[j][0] + a[j][1] + b + s[j].a + s[j].b + start[j];\n"
      "}\n"
      "template [[host_name(\"k\")]] [[kernel]] decltype(f<float, 4>) f<float, 4>;");
  const std::vector<float> y = results(library, 4);
  for (int i = 0; i < 4; i++) {
    const int j = (i + 1) % 4;
    EXPECT_EQ(y[i], 3 * j + 7 + 1100 * j + 10 * (j + 1)) << i;
  }
}

TEST_F(FrontendCompile, ConstantTablesAndLiterals) {
  const Library library = build(
      "constant float table[4] = {0.1, 0.1h, 1e-3, 0x1p-2};\n"
      "constant float4 v = float4(1, 2, 3, 4);\n"
      "namespace n { constant constexpr int k2 = 3; }\n"
      "kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) { y[i] = "
      "table[i] + v[i] * n::k2 + (sizeof(1.0) == 4 ? 0 : 100) + (sizeof(1.0h) == 2 ? 0 : 100); }");
  const std::vector<float> y = results(library, 4);
  EXPECT_EQ(y[0], 0.1f + 3);
  EXPECT_EQ(y[1], static_cast<float>(0x1.998p-4) + 6);  // 0.1 in half
  EXPECT_EQ(y[2], 1e-3f + 9);
  EXPECT_EQ(y[3], 0.25f + 12);
}

TEST_F(FrontendCompile, EqualKernelNamesInTwoLibraries) {
  const Library one = build("kernel void k(device float* y [[buffer(0)]]) { y[0] = 1; }");
  const Library two = build("kernel void k(device float* y [[buffer(0)]]) { y[0] = 2; }");
  EXPECT_EQ(results(one, 1)[0], 1.0f);
  EXPECT_EQ(results(two, 1)[0], 2.0f);
  EXPECT_EQ(results(one, 1)[0], 1.0f);
}

TEST_F(FrontendCompile, ErrorsNameFileAndLine) {
  EXPECT_EQ(
      error_of("kernel void k(device float* y [[buffer(0)]]) { y[0] = z; }").rfind("k.metal:3", 0),
      0u);
  EXPECT_EQ(error_of("\nkernel void k(float* y) {}").rfind("k.metal:4: error:", 0), 0u);
  EXPECT_EQ(error_of("#include \"absent.h\"\n").rfind("k.metal:3", 0), 0u);
  EXPECT_NE(error_of("#include <vector>\n").find("Metal has no header"), std::string::npos);
  options_.lint = false;
  EXPECT_EQ(
      error_of("\n\nkernel void k(device float* y [[buffer(0)]]) { y[0] = z; }")
          .rfind("k.metal:5", 0),
      0u);
}

TEST_F(FrontendCompile, FindingsNameTheLineOfTheText) {
  const Library library =
      build("\n\nkernel void k(device float* y [[buffer(0)]]) {\n  y[1] = 1;\n}");
  float y = 0;
  Dispatch dispatch;
  dispatch.kernel = "k";
  dispatch.buffers = {{0, &y, sizeof(y), true}};
  const Report report = run(library, dispatch);
  ASSERT_EQ(report.findings.size(), 1u);
  EXPECT_EQ(report.findings[0].kind, FindingKind::out_of_bounds);
  EXPECT_EQ(report.findings[0].line, 6);
  EXPECT_EQ(fs::path(report.findings[0].file).filename(), "k.metal");
}

TEST_F(FrontendCompile, DefinesIncludesAndKernelsAreOptions) {
  std::ofstream(folder_ / "value.h") << "#define VALUE (BASE + 1)\n";
  options_.include_dirs = {folder_};
  options_.defines = {"BASE=41"};
  const std::string text =
      "#include \"value.h\"\nkernel void k(device float* y [[buffer(0)]]) { y[0] = VALUE; }\n"
      "kernel void other(device float* y [[buffer(0)]]) { y[0] = 0; }";
  options_.kernels = {"k"};
  EXPECT_EQ(results(build(text), 1)[0], 42.0f);
  EXPECT_EQ(build(text).find("other"), nullptr);
  std::ofstream(folder_ / "value.h") << "#define VALUE (BASE + 2)\n";  // the cache must notice
  EXPECT_EQ(results(build(text), 1)[0], 43.0f);
  options_.kernels = {"absent"};
  EXPECT_THROW(build(text), CompileError);
}

TEST_F(FrontendCompile, CacheKeepsOneLibraryPerText) {
  options_.cache_dir = folder_ / "cache";
  const std::string text = "kernel void k(device float* y [[buffer(0)]]) { y[0] = 5; }";
  const auto libraries = [&] {
    size_t count = 0;
    for (const auto& entry : fs::directory_iterator(options_.cache_dir)) {
      count += entry.path().extension() == ".so";
    }
    return count;
  };
  EXPECT_EQ(results(build(text), 1)[0], 5.0f);
  EXPECT_EQ(libraries(), 1u);
  EXPECT_EQ(results(build(text), 1)[0], 5.0f);
  EXPECT_EQ(libraries(), 1u);
  EXPECT_EQ(results(build(text + " // other text, equal code"), 1)[0], 5.0f);
  EXPECT_EQ(libraries(), 1u);
  options_.defines = {"X=1"};
  build(text);
  EXPECT_EQ(libraries(), 2u);
}

TEST_F(FrontendCompile, CompilesFromSeveralThreads) {
  options_.cache_dir = folder_ / "cache";
  std::vector<std::thread> threads;
  std::vector<int> kernels(4);
  for (size_t i = 0; i < kernels.size(); i++) {
    threads.emplace_back([&, i] {
      kernels[i] = static_cast<int>(
          compile(
              std::string(kHead) + "kernel void k(device float* y [[buffer(0)]]) { y[0] = " +
                  std::to_string(i % 2) + "; }",
              options_)
              .kernels()
              .size());
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(kernels, std::vector<int>(4, 1));
}

TEST_F(FrontendCompile, LoadsWhatCompileToWrote) {
  const fs::path library = folder_ / "sub" / "k.so";
  compile_to(
      std::string(kHead) + "kernel void k(device float* y [[buffer(0)]]) { y[0] = 3; }",
      library,
      options_);
  EXPECT_EQ(results(load(library), 1)[0], 3.0f);
  EXPECT_THROW(load(folder_ / "absent.so"), CompileError);
  std::ofstream(folder_ / "junk.so") << "not a library";
  EXPECT_THROW(load(folder_ / "junk.so"), CompileError);
}

TEST_F(FrontendCompile, MissingCompilerNamesThePackage) {
  setenv("METAL_EMULATOR_CLANG", "/absent/clang++", 1);
  options_.cache_dir = folder_ / "cache";
  const std::string message = error_of("kernel void k() {}");
  unsetenv("METAL_EMULATOR_CLANG");
  EXPECT_NE(message.find("clang-19"), std::string::npos) << message;
}

TEST_F(FrontendCompile, CMakeStepBuiltItsLibrary) {
  const Library library = load(METAL_EMULATOR_BUILD_STEP_LIBRARY);
  EXPECT_EQ(library.find("unused"), nullptr);  // KERNELS scale
  std::vector<float> x = {1, 2, 3, 4}, y(4);
  Dispatch dispatch;
  dispatch.kernel = "scale";
  dispatch.buffers = {{0, x.data(), 16, true}, {1, y.data(), 16, false}};
  dispatch.threads_per_grid = {4, 1, 1};
  dispatch.threads_per_threadgroup = {4, 1, 1};
  EXPECT_TRUE(run(library, dispatch).findings.empty());
  EXPECT_EQ(y, (std::vector<float>{11, 14, 17, 20}));
}

// Text as MLX's metal_kernel() generates it.
TEST_F(FrontendCompile, RunsGeneratedText) {
  const Library library = build(R"(
namespace metal_lora {
template <typename T> METAL_FUNC void body(const device T* x, device T* y, float scale, uint i) {
  y[i] = T(float(x[i]) * scale);
}
}
template <typename T, int BITS, bool F>
[[kernel]] void custom_kernel_k(
  const device bfloat16_t* x [[buffer(0)]],
  const constant int* x_shape [[buffer(1)]],
  const constant float& scale [[buffer(2)]],
  device bfloat16_t* y [[buffer(3)]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {
  uint i = threadgroup_position_in_grid.x * 32 + thread_index_in_simdgroup;
  if (i < uint(x_shape[0])) { metal_lora::body<T>(x, y, scale, i); }
}
template [[host_name("custom_kernel_k")]] [[kernel]] decltype(custom_kernel_k<bfloat16_t, 4, 1>) custom_kernel_k<bfloat16_t, 4, 1>;
)");
  std::vector<uint16_t> x(40, 0x4000), y(40);  // 2.0
  int shape = 40;
  float scale = 1.5f;
  Dispatch dispatch;
  dispatch.kernel = "custom_kernel_k";
  dispatch.buffers = {
      {0, x.data(), 80, true},
      {1, &shape, 4, true},
      {2, &scale, 4, true},
      {3, y.data(), 80, false}};
  dispatch.threads_per_grid = {64, 1, 1};
  dispatch.threads_per_threadgroup = {32, 1, 1};
  EXPECT_TRUE(run(library, dispatch).findings.empty());
  EXPECT_EQ(y, std::vector<uint16_t>(40, 0x4040));  // 3.0
}

}  // namespace
}  // namespace metal_emulator
