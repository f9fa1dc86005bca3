// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Every rule of the strict lint: a text that it refuses, at the right line, and its accepted twin.
#include <gtest/gtest.h>

#include "metal_emulator/emulator.h"

namespace metal_emulator {
namespace {

struct Rule {
  const char* name;
  const char* refused;  ///< put at line 3 of a file
  const char* message;  ///< part of the message; "%d:" is the line it must name
  const char* accepted;
};

// k: a kernel around statements, with y in device, t in threadgroup and c in constant memory.
#define K(statements)                                                                 \
  "kernel void k(device float* y [[buffer(0)]], device bfloat* b [[buffer(1)]], "     \
  "constant float& c [[buffer(2)]], threadgroup float* t [[threadgroup(0)]], uint i " \
  "[[thread_position_in_grid]]) { " statements " }"

const Rule kRules[] = {
    {"PointerParameterWithoutSpace",
     "float f(float* p) { return *p; }",
     "k.metal:3: error: parameter of f: pointer without an address space",
     "float f(device float* p) { return *p; }"},
    {"ReferenceParameterWithoutSpace",
     "template <typename T> T f(const T& p) { return p; }",
     "k.metal:3: error: parameter of f: reference without an address space",
     "template <typename T> T f(const thread T& p) { return p; }"},
    {"ResultWithoutSpace",
     "float* f(device float* p) { return p; }",
     "k.metal:3: error: result of f",
     "device float* f(device float* p) { return p; }"},
    {"MemberWithoutSpace",
     "struct S { float* p; };",
     "k.metal:3: error: variable p",
     "struct S { device float* p; };"},
    {"LocalPointerWithoutSpace",
     K("float* p = y; p[0] = 1;"),
     "k.metal:3: error: local variable",
     K("device float* p = y; p[0] = 1;")},
    {"LocalReferenceWithoutSpace",
     K("float& p = y[0]; p = 1;"),
     "k.metal:3: error: local variable",
     K("device float& p = y[0]; p = 1;")},
    {"LoopReferenceWithoutSpace",
     K("for (float* p = y; p != y + 2; p++) { *p = 1; }"),
     "k.metal:3: error: local variable",
     K("for (device float* p = y; p != y + 2; p++) { *p = 1; }")},
    {"CCastWithoutSpace",
     K("y[0] = *(float*)(y + 1);"),
     "k.metal:3: error: cast",
     K("y[0] = *(device float*)(y + 1) * (c) * (i);")},
    {"ReinterpretCastWithoutSpace",
     K("y[0] = *reinterpret_cast<float*>(y + 1);"),
     "k.metal:3: error: cast",
     K("y[0] = *reinterpret_cast<device float*>(y + 1);")},
    {"AutoTakesTheSpace",
     K("float* p = &t[0]; *p = 1;"),
     "k.metal:3: error: local variable",
     K("auto p = &t[0]; *p = 1; auto& q = y[0]; q = 1; thread auto& r = i; y[1] = r;")},
    {"ThreadgroupToDevice",
     K("device float* p = t; *p = 1;"),
     "k.metal:3: error: cannot initialize",
     K("threadgroup float* p = t; *p = 1;")},
    {"DeviceToConstant",
     "void f(constant float* p); " K("f(y);"),
     "k.metal:3: error: no matching function",
     "void f(device float* p); " K("f(y);")},
    {"ThreadToDevice",
     "void f(device float* p); " K("float x = 0; f(&x);"),
     "k.metal:3: error: no matching function",
     "void f(thread float* p); " K("float x = 0; f(&x);")},
    {"CastBetweenSpaces",
     K("device float* p = (device float*)t; *p = 1;"),
     "k.metal:3: error:",
     K("threadgroup float2* p = (threadgroup float2*)t; *p = 1;")},
    {"WriteToConstant",
     "void f(constant float& c) { c = 1; }",
     "k.metal:3: error:",
     "void f(device float& c) { c = 1; }"},
    {"WriteThroughConst",
     K("const device float* p = y; p[0] = 1;"),
     "k.metal:3: error:",
     K("device float* p = y; p[0] = 1;")},
    {"MethodOfAnotherSpace",
     "struct S { float x; float get() const thread { return x; } };"
     "float f(constant S& s) { return s.get(); }",
     "k.metal:3: error:",
     "struct S { float x; float get() const constant { return x; } };"
     "float f(constant S& s) { return s.get(); }"},
    {"Double",
     K("double d = c; y[0] = d;"),
     "k.metal:3: error: Metal has no double",
     K("float d = c; y[0] = d;")},
    {"LongDouble",
     K("long double d = c; y[0] = d;"),
     "k.metal:3: error: Metal has no long double",
     K("float d = c * 1.0; y[0] = d;")},
    {"LongLong",
     K("long long d = i; y[0] = d;"),
     "k.metal:3: error: Metal has no long long",
     K("long d = i; y[0] = d;")},
    {"Recursion",
     "int f(int n) { return n > 0 ? f(n - 1) : 0; } " K("y[0] = f(i);"),
     "k.metal:3: error: recursion: f calls itself",
     "int g(int n) { return n; } int f(int n) { return n > 0 ? g(n - 1) : 0; } " K("y[0] = f(i);")},
    {"MutualRecursion",
     "int g(int n); int f(int n) { return g(n); } int g(int n) { return n > 0 ? f(n - 1) : 0; } " K(
         "y[0] = f(i);"),
     "k.metal:3: error: recursion: f calls itself through other functions",
     "int g(int n); int f(int n) { return g(n); } int g(int n) { return n > 0 ? n - 1 : 0; } " K(
         "y[0] = f(i);")},
    {"TemplateRecursion",
     "template <typename T> T f(T n) { return n > 0 ? f<T>(n - 1) : n; } " K("y[0] = f(c);"),
     "recursion",
     // Of another instantiation each time: unrolled by the compiler.
     "template <int N> struct R { static int f(int n) { return R<N - 1>::f(n) + 1; } };\n"
     "template <> struct R<0> { static int f(int n) { return n; } }; " K("y[0] = R<4>::f(i);")},
    {"FunctionPointer",
     "int f(int n) { return n; } " K("int (*p)(int) = f; y[0] = p(1);"),
     "k.metal:3: error: pointers to functions",
     "int f(int n) { return n; } " K("y[0] = f(1);")},
    {"FunctionPointerCall",
     "int f(int n) { return n; } " K("auto p = &f; y[0] = p(1);"),
     "call through a function pointer in k",
     "int f(int n) { return n; } template <int (*g)(int)> int h(int n) { return g(n); } " K(
         "y[0] = h<f>(1);")},
    {"TemporaryForThreadReference",
     "struct A { float v; }; float f(const device A& a) { return a.v; } " K("y[0] = f(A{1});"),
     "k.metal:3: error:",
     "struct A { float v; A(float x) : v(x) {} }; float f(const thread A& a) { return a.v; } " K(
         "y[0] = f(A(1.0f));")},
    {"Virtual",
     "struct S { virtual int f() { return 1; } };",
     "k.metal:3: error: Metal has no virtual",
     "struct S { int f() { return 1; } };"},
    {"Throw",
     "int f(int n) { if (n) throw 1; return n; }",
     "k.metal:3: error: Metal has no exceptions",
     "int f(int n) { if (n) return 1; return n; }"},
    {"TryCatch",
     "int f(int n) { try { return n; } catch (int) { return 0; } }",
     "Metal has no exceptions",
     "int f(int n) { { return n; } }"},
    {"New",
     K("thread int* p = new int; y[0] = *p;"),
     "k.metal:3: error: Metal has no heap",
     K("int x = 0; thread int* p = &x; y[0] = *p;")},
    {"Delete",
     K("delete y;"),
     "Metal has no heap",
     "struct S { S() = default; S(int) = delete; };"},
    {"Typeid",
     "int f(int n) { return typeid(n) == typeid(int); }",
     "run-time type",
     "bool f(int) { return is_same_v<int, int>; }"},
    {"MutableGlobal",
     "int counter;",
     "k.metal:3: error: program-scope variable counter",
     "constant int counter = 1;"},
    {"GlobalWithoutSpace",
     "constexpr int n = 3;",
     "k.metal:3: error: program-scope variable n",
     "constant constexpr int n = 3; static constant constexpr float table[2] = {1, 2};"},
    {"StaticMemberWithoutSpace",
     "struct S { static constexpr int n = 3; };",
     "k.metal:3: error: static member n",
     "struct S { static constexpr constant int n = 3; };"},
    {"StaticLocal",
     K("static int n = 0; y[0] = n;"),
     "k.metal:3: error: static local",
     K("const int n = 0; y[0] = n; constexpr int m = 2; y[1] = m;")},
    {"Std",
     "int f(int n) { return std::abs(n); }",
     "k.metal:3: error: Metal has no std::",
     "int f(int n) { return metal::abs(n); }"},
    {"Goto",
     "int f(int n) { again: if (n) goto again; return n; }",
     "k.metal:3: error: Metal has no goto",
     "int f(int n) { while (n) { n--; } return n; }"},
    {"ThreadLocal", "thread_local int n;", "thread_local", "constant int n = 1;"},
    {"Lambda",
     K("auto f = [&](int n) { return n; }; y[0] = f(1);"),
     "k.metal:3: error: Metal has no lambda",
     K("float f[2] = {1, 2}; y[0] = f[i]; y[1] = (f)[0]; y[int(f[0])] = 1;")},
    {"Asm", K("asm(\"nop\");"), "Metal has no asm", K("y[0] = 1;")},
    {"ThreadgroupVariableOutsideKernel",
     "void f() { threadgroup float x[2]; x[0] = 1; }",
     "k.metal:3: error: threadgroup variable outside a kernel",
     K("threadgroup float x[2]; x[i] = 1; y[0] = x[0];")},
    {"BfloatMath",
     K("y[0] = exp(b[0]);"),
     "k.metal:3: error: 'exp' is unavailable: Metal has no bfloat exp()",
     K("y[0] = exp(float(b[0]));")},
    {"BfloatMax",
     K("b[0] = max(b[0], b[1]);"),
     "k.metal:3: error: no matching function",
     K("b[0] = bfloat(max(float(b[0]), float(b[1])));")},
    {"BfloatSimdSum",
     K("b[0] = simd_sum(b[0]);"),
     "k.metal:3: error: no matching function",
     K("b[0] = bfloat(simd_sum(float(b[0])));")},
    {"BfloatNarrowing",
     K("b[0] = y[0] * 2.0f;"),
     "k.metal:3: error: implicit conversion",
     K("b[0] = bfloat(y[0] * 2.0f); y[1] = b[1]; b[2] = b[0] + b[1];")},
    {"BfloatToHalf",
     K("half h = b[0]; y[0] = h;"),
     "k.metal:3: error: cannot initialize",
     K("half h = half(float(b[0])); y[0] = h;")},
    {"AmbiguousMath",
     K("y[0] = exp(3);"),
     "k.metal:3: error: call to 'exp' is ambiguous",
     K("y[0] = exp(3.0) + exp(3.0h);")},
    {"MixedMax",
     K("y[0] = max(c, i);"),
     "k.metal:3: error: no matching function",
     K("y[0] = max(c, float(i));")},
    {"UnknownFunction",
     K("y[0] = erf(c);"),
     "k.metal:3: error: use of undeclared identifier 'erf'",
     K("y[0] = tanh(c);")},
    {"StructuredBinding",
     "struct P { int a, b; }; int f(P p) { auto [a, b] = p; return a + b; }",
     "k.metal:3: error: decomposition declarations: Metal is C++14",
     "struct P { int a, b; }; int f(P p) { auto a = p.a; return a + p.b; }"},
    {"FoldExpression",
     "template <typename... T> int f(T... t) { return (t + ...); } " K("y[0] = f(1, 2);"),
     "k.metal:3: error: pack fold expression: Metal is C++14",
     "int f() { return 0; } template <typename T, typename... R> int f(T t, R... r) { return t + "
     "f(r...); } " K("y[0] = f(1, 2);")},
    {"InlineVariable",
     "inline constant constexpr int n = 3;",
     "k.metal:3: error: inline variables: Metal is C++14",
     "constant constexpr int n = 3;"},
    {"NestedNamespace",
     "namespace a::b { constant int n = 3; }",
     "k.metal:3: error: nested namespace",
     "namespace a { namespace b { constant int n = 3; } }"},
    {"IfInitializer",
     "int f(int n) { if (int m = n; m) return m; return 0; }",
     "k.metal:3: error:",
     "int f(int n) { if (int m = n) return m; return 0; }"},
    {"AutoTemplateParameter",
     "template <auto N> int f() { return N; }",
     "k.metal:3: error:",
     "template <int N> int f() { if constexpr (N > 1) return N; return 0; }"},
    {"MatrixSize",
     K("simdgroup_matrix<float, 4, 4> m; simdgroup_load(m, y); "),
     "8x8",
     K("simdgroup_matrix<float, 8, 8> m; simdgroup_load(m, y, 8, ulong2(0, 0), true);")},
    {"MatrixOfAnotherType",
     K("simdgroup_matrix<half, 8, 8> m; simdgroup_load(m, y);"),
     "k.metal:3: error: no matching function",
     K("simdgroup_matrix<float, 8, 8> m; simdgroup_load(m, t); simdgroup_store(m, y);")},
};

std::string text_of(const char* body) {
  return std::string("#include <metal_stdlib>\nusing namespace metal;\n") + body + "\n";
}

std::string lint_of(const char* body) {
  CompileOptions options;
  options.file_name = "k.metal";
  std::string all;
  try {
    for (const std::string& message : lint(text_of(body), options)) {
      all += message + "\n";
    }
  } catch (const CompileError& error) {
    all += error.what();
  }
  return all;
}

class LintRule : public testing::TestWithParam<Rule> {};

TEST_P(LintRule, RefusesWithItsLine) {
  const std::string messages = lint_of(GetParam().refused);
  EXPECT_NE(messages.find(GetParam().message), std::string::npos) << messages;
}

TEST_P(LintRule, AcceptsItsTwin) {
  EXPECT_EQ(lint_of(GetParam().accepted), "");
}

INSTANTIATE_TEST_SUITE_P(
    Rules, LintRule, testing::ValuesIn(kRules), [](const testing::TestParamInfo<Rule>& info) {
      return std::string(info.param.name);
    });

// What real kernels are made of, in one text.
TEST(Lint, AcceptsARealKernel) {
  EXPECT_EQ(
      lint_of(R"(
struct Params { uint m, n; float scale; };
constant bool has_bias [[function_constant(0)]];
constant int extra [[function_constant(1)]];
constant int twice = extra * 2;
constant float table[4] = {0.5, 1.0, 1.5h, 1e-3};
template <typename T> struct Tile {
  T x, y;
  METAL_FUNC void load(const device T* p) thread { x = p[0]; y = p[1]; }
  METAL_FUNC T sum() const thread { return x + y; }
};
template <typename T, int N>
[[kernel]] void f(const device T* x [[buffer(0)]], device T* y [[buffer(1)]], constant Params& p [[buffer(2)]],
                  const device float* bias [[buffer(3), function_constant(has_bias)]],
                  device atomic_uint* count [[buffer(4)]], threadgroup T* scratch [[threadgroup(0)]],
                  uint3 g [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup T a[N][8], b;
  threadgroup vec<T, 4> v[4];
  simdgroup_matrix<float, 8, 8> acc = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_matrix<T, 8, 8> m;
  simdgroup_load(m, &a[0][0], 8, ulong2(0, 0), true);
  simdgroup_multiply_accumulate(acc, m, m, acc);
  thread vec<float, 2>& e = acc.thread_elements();
  e *= p.scale;
  Tile<T> tile;
  tile.load(x + g.x * p.n);
  float4 q = float4(1, 2, 3, 4) * 0.5f + float4(v[0]) * table[lane & 3];
  float s = simd_sum(dot(q, q.wzyx)) + simd_shuffle_xor(q.x, 4);
  bool4 less = q < float4(2.0f);
  if (any(less) && is_function_constant_defined(has_bias) && has_bias) { s += bias[0] + float(twice); }
#pragma unroll
  for (int i = 0; i < N; i++) { a[i][lane & 7] = T(s); }
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  if (lane == 0) { b = T(select(s, 0.0f, isnan(s))); scratch[0] = b; }
  atomic_fetch_add_explicit(count, 1, memory_order_relaxed);
  half4 h = half4(q); h = h * 2.0f; h.xy = half2(1.0h);
  uint bits = as_type<uint>(s) ^ (popcount(lane) << 3);
  y[lane] = T(float(tile.sum()) + e.x + float(h.x) + float(bits) + clamp(s, -1.0f, 1.0f) + fast::exp(s));
}
template [[host_name("f_half")]] [[kernel]] decltype(f<half, 4>) f<half, 4>;
template [[host_name("f_bfloat")]] [[kernel]] decltype(f<bfloat, 4>) f<bfloat, 4>;
template [[host_name("f_float")]] [[kernel]] void f<float, 2>(const device float*, device float*, constant Params&,
    const device float*, device atomic_uint*, threadgroup float*, uint3, ushort);
)"),
      "");
}

TEST(Lint, NamesThePlaceInIncludedFiles) {
  CompileOptions options;
  options.file_name = "k.metal";
  const std::vector<std::string> messages =
      lint("# 41 \"inc/tile.h\"\nfloat f(float* p);\n", options);
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].rfind("inc/tile.h:41: error: ", 0), 0u) << messages[0];
}

TEST(Lint, OpenClWordsArePlainNames) {
  EXPECT_EQ(
      lint_of("int f(int local, int global, int generic) { int pipe = local; return pipe + global "
              "+ generic; }"),
      "");
}

TEST(Lint, CompileRefusesUnlessToldNotTo) {
  CompileOptions options;
  options.file_name = "k.metal";
  EXPECT_THROW(compile(text_of("constexpr int n = 3; kernel void k() {}"), options), CompileError);
}

}  // namespace
}  // namespace metal_emulator
