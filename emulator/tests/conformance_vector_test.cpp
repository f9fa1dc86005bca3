// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Vectors, packed vectors, matrices, geometric and pack functions, bfloat, limits: expressions with
// the elements they must have.
#include "tests/conformance_support.h"

namespace metal_emulator::conformance {
namespace {

struct Expected {
  const char* expression;
  std::vector<double> elements;
};

/// Runs each expression in one thread; elements come back as float, exact for what is asked here.
/// `setup` may declare names that expressions use.
void check(const std::string& setup, const std::vector<Expected>& table) {
  std::string body;
  size_t total = 0;
  for (const Expected& e : table) {
    const size_t n = e.elements.size();
    const std::string at = std::to_string(total);
    if (n == 1) {
      body += "{ out[" + at + "] = (float)(" + e.expression + "); }\n";
    } else {
      body += "{ auto result = " + std::string(e.expression) + "; for (int i = 0; i < " +
              std::to_string(n) + "; i++) out[" + at + " + i] = (float)result[i]; }\n";
    }
    total += n;
  }
  std::vector<float> out_values(total);
  const Library library = build(
      "kernel void check(device float* out [[buffer(0)]]) {\n" + setup + body + "}\n",
      "check.metal");
  Dispatch d;
  d.kernel = "check";
  d.buffers = {out(0, out_values)};
  const Report report = run(library, d);
  ASSERT_EQ(report.finding_count, 0u) << faults::describe(report);
  size_t at = 0;
  for (const Expected& e : table)
    for (size_t i = 0; i < e.elements.size(); i++, at++)
      EXPECT_EQ(out_values[at], float(e.elements[i])) << e.expression << " [" << i << "]";
}

TEST(VectorConformance, ConstructorsAndConversions) {
  check(
      "float2 f2 = float2(1, 2); float3 f3 = float3(3, 4, 5); int4 i4 = int4(-1, 2, -3, 300);\n",
      {
          {"float4(2.5f)", {2.5, 2.5, 2.5, 2.5}},
          {"float4(f2, f2)", {1, 2, 1, 2}},
          {"float4(f3, 9)", {3, 4, 5, 9}},
          {"float4(9, f3)", {9, 3, 4, 5}},
          {"float4(7, f2, 8)", {7, 1, 2, 8}},
          {"float4(f2, 7, 8)", {1, 2, 7, 8}},
          {"float3(f2, 6)", {1, 2, 6}},
          {"float3(6, f2)", {6, 1, 2}},
          {"float4(i4)", {-1, 2, -3, 300}},
          {"int3(float3(1.9f, -1.9f, 0.5f))", {1, -1, 0}},
          {"uchar4(i4)", {255, 2, 253, 44}},
          {"short2(70000, -5)", {4464, -5}},
          {"half4(f3, 0.1f)", {3, 4, 5, 0.0999755859375}},
          {"bool4(i4 - int4(-1, 0, 0, 300))", {0, 1, 1, 0}},
          {"float2(half2(1.5h, 2.5h))", {1.5, 2.5}},
          {"vec<float, 3>(f3)", {3, 4, 5}},
          {"bfloat2(half2(1.5h, 3.0h))", {1.5, 3}},
          {"half2(bfloat2(1.5f, 3.0f))", {1.5, 3}},
          {"float4(f3.zyx, f2.y)", {5, 4, 3, 2}},
          {"as_type<float2>(as_type<uint2>(f2))", {1, 2}},
          {"as_type<uint>(1.0f) >> 23", {127}},
          {"as_type<ushort>(1.0h)", {0x3c00}},
          {"as_type<ushort4>(as_type<ulong>(ushort4(1, 2, 3, 4)))", {1, 2, 3, 4}},
          {"sizeof(float3)", {16}},
          {"sizeof(packed_float3)", {12}},
          {"sizeof(half3)", {8}},
          {"sizeof(char4)", {4}},
          {"sizeof(bool4)", {4}},
          {"alignof(float4)", {16}},
          {"alignof(packed_half4)", {2}},
          {"sizeof(ulong2)", {16}},
      });
}

TEST(VectorConformance, Swizzles) {
  check(
      "float4 v = float4(1, 2, 3, 4); float3 t = v.xyz; int2 p = int2(5, 6);\n"
      "float4 a = v; a.xz = float2(10, 30); float4 b = v; b.wzyx = v; float4 c = v; c.rg += v.ba;\n"
      "float4 d = v; d.yzw *= 2.0f; float3 e = t; e.z = 9; e.x += 1; float4 f = v; f.xy = f.yx;\n"
      "int4 g = int4(1, 2, 3, 4); g.wx <<= 1; packed_float4 k = v; k.yw = float2(8, 9);\n",
      {
          {"v.wzyx", {4, 3, 2, 1}},
          {"v.xxyy", {1, 1, 2, 2}},
          {"v.rgba", {1, 2, 3, 4}},
          {"v.zw", {3, 4}},
          {"v.bgr", {3, 2, 1}},
          {"t.zx", {3, 1}},
          {"p.yxyx", {6, 5, 6, 5}},
          {"float3(v.xyz).zy", {3, 2}},
          {"a", {10, 2, 30, 4}},
          {"b", {4, 3, 2, 1}},
          {"c", {4, 6, 3, 4}},
          {"d", {1, 4, 6, 8}},
          {"e", {2, 2, 9}},
          {"f", {2, 1, 3, 4}},
          {"g", {2, 2, 3, 8}},
          {"float4(k)", {1, 8, 3, 9}},
          {"v.xy + v.zw", {4, 6}},
          {"v.xyz * 2.0f", {2, 4, 6}},
          {"2.0f * v.yx", {4, 2}},
          {"-v.xy", {-1, -2}},
          {"v.x", {1}},
          {"max(v.xy, v.wx)", {4, 2}},
          {"dot(v.xy, v.zw)", {11}},
          {"v.xy == float2(1, 3)", {1, 0}},
      });
}

TEST(VectorConformance, Operators) {
  check(
      "float4 a = float4(1, -2, 3, 0.5f), b = float4(2, 2, -1, 4); int3 i = int3(7, -8, 9), j = "
      "int3(2, 3, -4); uchar2 u = uchar2(250, 3); bool3 p = bool3(true, false, true);\n"
      "half2 h = half2(1.5h, -2.0h); packed_half2 ph = h; float4 m = a; m += b; m *= 2.0f; int3 n "
      "= i; n "
      "%= j; float3 inc = float3(1, 2, 3); inc++;\n",
      {
          {"a + b", {3, 0, 2, 4.5}},
          {"a - b", {-1, -4, 4, -3.5}},
          {"a * b", {2, -4, -3, 2}},
          {"a / b", {0.5, -1, -3, 0.125}},
          {"a * 2", {2, -4, 6, 1}},
          {"1 - a", {0, 3, -2, 0.5}},
          {"i / j", {3, -2, -2}},
          {"i % j", {1, -2, 1}},
          {"i & j", {7 & 2, -8 & 3, 9 & -4}},
          {"i | j", {7 | 2, -8 | 3, 9 | -4}},
          {"i ^ j", {7 ^ 2, -8 ^ 3, 9 ^ -4}},
          {"~i", {-8, 7, -10}},
          {"i << 2", {28, -32, 36}},
          {"i >> 1", {3, -4, 4}},
          {"u + u", {244, 6}},
          {"!p", {0, 1, 0}},
          {"p && bool3(true, true, false)", {1, 0, 0}},
          {"p || bool3(false, false, true)", {1, 0, 1}},
          {"a < b", {1, 1, 0, 1}},
          {"a >= b", {0, 0, 1, 0}},
          {"a != b", {1, 1, 1, 1}},
          {"i == int3(7, 8, 9)", {1, 0, 1}},
          {"m", {6, 0, 4, 9}},
          {"n", {1, -2, 1}},
          {"h * h", {2.25, 4}},
          {"ph + h", {3, -4}},
          {"inc", {2, 3, 4}},
          {"-a", {-1, 2, -3, -0.5}},
          {"any(a > 2.0f)", {1}},
          {"all(a > -3.0f)", {1}},
          {"select(a, b, a < b)", {2, 2, 3, 4}},
          {"all(a == a)", {1}},
      });
}

TEST(VectorConformance, FunctionsOfVectors) {
  check(
      "float3 a = float3(3, 4, 12), b = float3(1, 0, 2); half3 h = half3(1, 2, 2); int2 i = "
      "int2(-5, 9);\n",
      {
          {"abs(i)", {5, 9}},
          {"min(i, 3)", {-5, 3}},
          {"clamp(a, 3.5f, 5.0f)", {3.5, 4, 5}},
          {"max(a, b)", {3, 4, 12}},
          {"floor(a * 0.3f)", {0, 1, 3}},
          {"mix(a, b, 0.5f)", {2, 2, 7}},
          {"saturate(a - 3.5f)", {0, 0.5, 1}},
          {"fma(a, b, a)", {6, 4, 36}},
          {"sign(float2(-3, 0))", {-1, 0}},
          {"dot(a, b)", {27}},
          {"length(a)", {13}},
          {"length_squared(a)", {169}},
          {"length(h)", {3}},
          {"distance(a, float3(3, 4, 0))", {12}},
          {"distance_squared(a, float3(3, 4, 0))", {144}},
          {"normalize(float2(0, 5))", {0, 1}},
          {"cross(a, b)", {8, 6, -4}},
          {"reflect(float2(1, -1), float2(0, 1))", {1, 1}},
          {"faceforward(float2(1, 2), float2(1, 0), float2(1, 0))", {-1, -2}},
          {"refract(float2(0, -1), float2(0, 1), 0.5f)", {0, -1}},
          {"isnan(float2(NAN, 1))", {1, 0}},
          {"popcount(uint2(7, 256))", {3, 1}},
          {"clz(ushort2(1, 256))", {15, 7}},
          {"absdiff(int2(-5, 3), int2(7, 1))", {12, 2}},
          {"addsat(uchar2(200, 1), uchar2(100, 1))", {255, 2}},
          {"extract_bits(uint2(0xf0, 0x10), 4, 4)", {15, 1}},
          {"insert_bits(uint2(0, 0xff), uint2(3, 0), 4, 2)", {48, 0xcf}},
          {"ldexp(float2(1, 3), int2(3, 1))", {8, 6}},
          {"nextafter(float2(1, 1), float2(1, 1))", {1, 1}},
          {"metal::precise::sqrt(float2(4, 9))", {2, 3}},
      });
}

TEST(VectorConformance, Matrices) {
  check(
      "float2x3 m = float2x3(float3(1, 2, 3), float3(4, 5, 6)); float3x2 t = transpose(m);\n"
      "float2x2 s = float2x2(1, 2, 3, 4); float3x3 d = float3x3(2.0f); half2x2 h = half2x2(s);\n"
      "float2x2 p = t * m; float2x2 e = s; e[1][0] = 9; float4x4 q = float4x4(2.0f); q[3] = "
      "float4(1, 2, 3, 4);\n",
      {
          {"m[1]", {4, 5, 6}},
          {"m.columns[0]", {1, 2, 3}},
          {"t[2]", {3, 6}},
          {"m * float2(1, 10)", {41, 52, 63}},
          {"float3(1, 1, 1) * m", {6, 15}},
          {"p[0]", {14, 32}},
          {"p[1]", {32, 77}},
          {"(s + s)[1]", {6, 8}},
          {"(s * 0.5f)[0]", {0.5, 1}},
          {"(-s)[0]", {-1, -2}},
          {"(s - e)[1]", {-6, 0}},
          {"d[1]", {0, 2, 0}},
          {"determinant(s)", {-2}},
          {"determinant(d)", {8}},
          {"determinant(q)", {32}},
          {"h[1]", {3, 4}},
          {"s == s", {1}},
          {"s != e", {1}},
          {"sizeof(float3x3)", {48}},
      });
}

TEST(VectorConformance, PackAndUnpack) {
  check(
      "",
      {
          {"unpack_unorm4x8_to_float(0xff00ff33u)", {float(0x33) / 255.0f, 1, 0, 1}},
          {"unpack_snorm4x8_to_float(0x7f810080u)", {-1, 0, -1, 1}},
          {"unpack_unorm2x16_to_float(0xffff0000u)", {0, 1}},
          {"unpack_snorm2x16_to_float(0x7fff8001u)", {-1, 1}},
          {"unpack_unorm4x8_to_half(0xff00ff00u)", {0, 1, 0, 1}},
          {"unpack_snorm2x16_to_half(0x80007fffu)", {1, -1}},
          {"pack_float_to_unorm4x8(float4(0, 1, 0.2f, 2)) >> 8", {0xff33ff}},
          {"pack_float_to_unorm4x8(float4(0, 1, 0.2f, 2)) & 255", {0}},
          {"pack_float_to_snorm4x8(float4(-1, 1, 0, -2)) >> 16", {0x8100}},
          {"pack_float_to_snorm4x8(float4(-1, 1, 0, -2)) & 0xffff", {0x7f81}},
          {"pack_float_to_unorm2x16(float2(1, 0))", {0xffff}},
          {"pack_float_to_snorm2x16(float2(-1, 0))", {0x8001}},
          {"pack_half_to_unorm4x8(half4(1, 0, 0, 0))", {255}},
          {"pack_half_to_snorm2x16(half2(1, 0))", {0x7fff}},
      });
}

// Ties go to even; beyond the range to infinity; the arithmetic rounds each operation.
TEST(VectorConformance, BfloatAndHalfRound) {
  check(
      "float one = 1.0f; bfloat big = bfloat(256.0f), b1 = bfloat(1.0f); half h2048 = 2048.0h;\n",
      {
          {"bfloat(one + 0x1p-8f)", {1}},
          {"bfloat(one + 0x1p-8f + 0x1p-20f)", {1.0078125}},
          {"bfloat(one + 0x3p-8f)", {1.015625}},
          {"bfloat(one * 3.4e38f)", {INFINITY}},
          {"big + b1", {256}},
          {"float(big) + float(b1)", {257}},
          {"half(one * 65519.0f)", {65504}},
          {"half(one * 65520.0f)", {INFINITY}},
          {"half(one * 0x1p-25f)", {0}},
          {"half(one * 0x1.8p-24f)", {0x1p-23}},
          {"h2048 + 1.0h", {2048}},
          {"h2048 + 3.0h", {2052}},
          {"bfloat2(256.0f, 1.0f) + bfloat2(1.0f, 1.0f)", {256, 2}},
          {"half2(2048.0h, 1.0h) + half2(1.0h, 1.0h)", {2048, 2}},
      });
}

TEST(VectorConformance, LimitsAndTraits) {
  check(
      "static_assert(is_same_v<conditional_t<true, float, half>, float>, \"\");\n"
      "static_assert(is_same_v<remove_cv_t<const float>, float> && is_floating_point_v<bfloat>, "
      "\"\");\n"
      "static_assert(is_integral_v<uchar> && !is_integral_v<half> && is_arithmetic_v<half>, "
      "\"\");\n"
      "static_assert(is_vector_v<float3> && !is_vector_v<float>, \"\");\n"
      "static_assert(is_same_v<make_scalar_t<half4>, half>, \"\");\n"
      "array<float, 3> values = {1, 2, 3}; values[1] = 5;\n"
      "float sum = 0; for (float x : values) sum += x;\n",
      {
          {"numeric_limits<half>::max()", {65504}},
          {"numeric_limits<half>::epsilon()", {0.0009765625}},
          {"numeric_limits<bfloat>::epsilon()", {0.0078125}},
          {"numeric_limits<float>::infinity()", {INFINITY}},
          {"numeric_limits<int>::min() + 1 == -INT_MAX", {1}},
          {"numeric_limits<uchar>::max()", {255}},
          {"numeric_limits<bfloat>::lowest() < bfloat(-3e38f)", {1}},
          {"INFINITY > FLT_MAX", {1}},
          {"isnan(NAN)", {1}},
          {"M_PI_F > 3.1415925f && M_PI_H == 3.14h", {1}},
          {"sum", {9}},
          {"values.size()", {3}},
          {"MAXFLOAT == numeric_limits<float>::max()", {1}},
      });
}

}  // namespace
}  // namespace metal_emulator::conformance
