// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Idioms of kernels in the wild: each is legal Metal that plain C++ or OpenCL would not take.
#include "tests/conformance_support.h"

namespace metal_emulator::conformance {
namespace {

/// Runs kernel `k` in one thread with out [[buffer(0)]] and, at 1, bfloats 1.5, 2, 3.
std::vector<float> run_one(const std::string& text, size_t outputs, bool lint = false) {
  CompileOptions options;
  options.file_name = "idiom.metal";
  options.lint = lint;
  const Library library =
      compile("#include <metal_stdlib>\nusing namespace metal;\n" + text, options);
  std::vector<float> result(outputs);
  const std::vector<uint16_t> bfloats = {0x3fc0, 0x4000, 0x4040};
  Dispatch d;
  d.kernel = "k";
  d.buffers = {out(0, result), in(1, bfloats)};
  const Report report = run(library, d);
  EXPECT_EQ(report.finding_count, 0u) << faults::describe(report);
  return result;
}

const char kArguments[] =
    "kernel void k(device float* out [[buffer(0)]], const device bfloat* b [[buffer(1)]]) {\n";

TEST(Idioms, HalfMeetsBfloatInEveryCast) {
  const std::vector<float> r = run_one(
      "template <typename T, typename U> inline U functional(T x) { return U(x); }\n"
      "template <typename T, typename U> inline U c_style(const device T* x) { return (U)*x; }\n" +
          std::string(kArguments) +
          "half h = half(b[0]); out[0] = h; out[1] = (half)b[1]; out[2] = "
          "static_cast<half>(b[2]);\n"
          "out[3] = functional<bfloat, half>(b[0]); out[4] = c_style<bfloat, half>(b + 1);\n"
          "out[5] = bfloat(h) + b[1]; out[6] = -(half)b[0]; out[7] = 4 - (half)-b[0] * 2;\n"
          "out[8] = (float)(half)b[2]; out[9] = functional<float, int>(2.75f); }\n",
      10);
  EXPECT_EQ(r, (std::vector<float>{1.5f, 2, 3, 1.5f, 2, 3.5f, -1.5f, 7, 3, 2}));
}

TEST(Idioms, SwizzlesOfSwizzles) {
  const std::vector<float> r = run_one(
      std::string(kArguments) +
          "float4 v(1, 2, 3, 4); float2 w = v.wzy.zx; out[0] = w.x; out[1] = w.y;\n"
          "v.xyz.yz = float2(8, 9); out[2] = v.y; out[3] = v.z; out[4] = v.wzyx.xyz.xy.y;\n"
          "out[5] = v.rgb.b; }\n",
      6);
  EXPECT_EQ(r, (std::vector<float>{2, 4, 8, 9, 9, 9}));
  // A member of that name is no swizzle.
  EXPECT_EQ(
      run_one(
          "struct S { float4 xyz; };\n" + std::string(kArguments) +
              "S s = {float4(1, 2, 3, 4)}; out[0] = s.xyz.wz.x; }\n",
          1),
      (std::vector<float>{4}));
  EXPECT_THROW(
      run_one(std::string(kArguments) + "float4 v(1.0f); out[0] = v.xy.z; }\n", 1), CompileError);
}

TEST(Idioms, NamesThatTheLibraryLeavesFree) {
  const std::vector<float> r = run_one(
      "extern \"C\" struct Plain { float x; };\nextern \"C\" { struct Other { float y; }; }\n"
      "namespace detail { inline float twice(float x) { return 2 * x; } }\n"
      "namespace abi { constant int three = 3; }\n"
      "inline float2 swizzle(float2 v) { return v.yx; }\n" +
          std::string(kArguments) +
          "Plain p = {1}; Other o = {2}; assert(p.x == 1); out[0] = detail::twice(p.x) + o.y;\n"
          "out[1] = abi::three; out[2] = swizzle(float2(5, 6)).x; }\n",
      3);
  EXPECT_EQ(r, (std::vector<float>{4, 3, 6}));
}

TEST(Idioms, AppleSpellings) {
  const std::vector<float> r = run_one(
      "struct Pair { float a; };\nnamespace metal { template <> struct _numeric_limits_impl<Pair> "
      "{\n"
      "static constexpr Pair max() { return Pair{7}; } }; }\n" +
          std::string(kArguments) +
          "out[0] = vec_elements<half4>::value; out[1] = vec_elements<float>::value;\n"
          "out[2] = __is_valid_simdgroup_type<float2>::value;\n"
          "out[3] = __is_valid_simdgroup_type<bfloat>::value; out[4] = "
          "numeric_limits<Pair>::max().a;\n"
          "matrix<bfloat, 2, 2> m(bfloat(3.0f)); out[5] = m[1].y; }\n",
      6);
  EXPECT_EQ(r, (std::vector<float>{4, 1, 1, 0, 7, 3}));
}

TEST(Idioms, UnionsOfVectorsAndScalars) {
  EXPECT_EQ(
      run_one(
          "union Bits { uint u; half2 h; };\n" + std::string(kArguments) +
              "Bits b2; b2.h = half2(1, 2); out[0] = as_type<half2>(b2.u).y; }\n",
          1),
      (std::vector<float>{2}));
}

// The strict lint takes them too.
TEST(Idioms, PassTheLint) {
  const std::vector<float> r = run_one(
      "static inline thread short lane_of(thread const int i) { return i % 2; }\n" +
          std::string(kArguments) +
          "float4 a = {1.f}; half4 h = (half4)a; float4 f = (float4)h * 2.0f;\n"
          "half4x4 m = half4x4(float4x4(2.0f)); float4x4 s(1.0f); s += s; s -= float4x4(1.0f);\n"
          "out[0] = f.x + lane_of(3); out[1] = m[1].y; out[2] = s[2].z;\n"
          "int n = 2; long k = (long)n * n; out[3] = static_cast<half>(b[0]) * k; }\n",
      4,
      true);
  EXPECT_EQ(r, (std::vector<float>{3, 2, 1, 6}));
}

// A call inside a branch of a loop is met by the lanes of one iteration.
TEST(Idioms, LanesMeetWithinAnIteration) {
  const Library library = build(
      "kernel void k(device uint* out [[buffer(0)]], const device uint* n [[buffer(1)]],\n"
      "    uint i [[thread_position_in_grid]]) {\n"
      "  uint skipped = 0, branch = 0, once = 0, nested = 0;\n"
      "  _Pragma(\"unroll\") for (uint j = 0; j < n[0]; j++) { if ((i ^ j) & 1) continue; skipped "
      "+= "
      "simd_sum(1u); }\n"
      "  uint j = 0;\n"
      "  while (j < n[0]) { if (((i ^ j) & 3) == 0) { branch += simd_sum(1u); } j++; }\n"
      "  j = 0; do { if (j == i) { once = simd_sum(1u); break; } j++; } while (j < 32);\n"
      "  for (uint a = 0; a < n[0]; a++) { for (uint b = 0; b < n[0]; b++) {\n"
      "    if ((a + b + i) & 1) { nested += simd_sum(1u); } } }\n"
      "  out[i] = skipped; out[32 + i] = branch; out[64 + i] = once; out[96 + i] = nested;\n"
      "  out[128 + i] = simd_sum(1u);\n"
      "}\n",
      "loops.metal");
  std::vector<uint32_t> result(160);
  const std::vector<uint32_t> n = {5};
  Dispatch d;
  d.kernel = "k";
  d.buffers = {out(0, result), in(1, n)};
  d.threads_per_grid = d.threads_per_threadgroup = {32, 1, 1};
  const Report report = run(library, d);
  EXPECT_EQ(report.finding_count, 0u) << faults::describe(report);
  for (uint32_t i = 0; i < 32; i++) {
    EXPECT_EQ(result[i], i % 2 == 0 ? 48u : 32u) << i;         // 3 and 2 of the 5 iterations
    EXPECT_EQ(result[32 + i], i % 4 == 0 ? 16u : 8u) << i;     // iterations 0 and 4, or one
    EXPECT_EQ(result[64 + i], 1u) << i;                        // every lane in its own
    EXPECT_EQ(result[96 + i], i % 2 == 0 ? 192u : 208u) << i;  // 12 and 13 of the 25
    EXPECT_EQ(result[128 + i], 32u) << i;                      // together again
  }
}

}  // namespace
}  // namespace metal_emulator::conformance
