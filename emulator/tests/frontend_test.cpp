// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The tokenizer and the rewriter, one Metal construct at a time, without a compiler.
#include <gtest/gtest.h>

#include "metal_emulator/emulator.h"
#include "src/frontend/rewrite.h"
#include "src/frontend/structure.h"
#include "src/frontend/token.h"

namespace metal_emulator::frontend {
namespace {

TokenStream tokens_of(const std::string& text) {
  return tokenize("# 1 \"k.metal\"\n" + text, {{"/shim/"}});
}

// The rewritten text without the library's table, white space collapsed.
std::string rewritten(const std::string& text, const std::vector<std::string>& wanted = {}) {
  const std::string full = rewrite(tokens_of(text), wanted).text;
  std::string out;
  bool space = false, directive = false, line_start = true;
  const std::string body = full.substr(0, full.find("#include <metal_emulator/library.h>"));
  for (char c : body) {
    directive = (directive && c != '\n') || (line_start && c == '#');
    line_start = c == '\n' || (line_start && c == ' ');
    if (directive) {
      continue;
    }
    if (c == ' ' || c == '\n') {
      space = true;
    } else {
      out += space && !out.empty() ? " " : "";
      out += c;
      space = false;
    }
  }
  return out;
}

std::string table(const std::string& text, const std::vector<std::string>& wanted = {}) {
  const std::string full = rewrite(tokens_of(text), wanted).text;
  return full.substr(full.find("#include <metal_emulator/library.h>"));
}

std::string error_of(const std::string& text, const std::vector<std::string>& wanted = {}) {
  try {
    rewrite(tokens_of(text), wanted);
  } catch (const CompileError& error) {
    return error.what();
  }
  return "accepted";
}

testing::AssertionResult has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos ? testing::AssertionSuccess()
                                              : testing::AssertionFailure()
                                                    << "no \"" << part << "\" in:\n"
                                                    << text;
}

TEST(Tokenizer, NumbersAndOperators) {
  const TokenStream s = tokens_of("a>>=1.5e-3f+0x1p-3>>b::c->d<<=0x1F'00;");
  std::vector<std::string> texts;
  for (const Token& t : s.tokens) {
    texts.push_back(t.text);
  }
  const std::vector<std::string> expected = {
      "a",
      ">",
      ">=",
      "1.5e-3f",
      "+",
      "0x1p-3",
      ">",
      ">",
      "b",
      "::",
      "c",
      "->",
      "d",
      "<<=",
      "0x1F'00",
      ";"};
  EXPECT_EQ(texts, expected);
}

TEST(Tokenizer, FollowsLineMarkers) {
  const TokenStream s = tokenize(
      "# 1 \"a.metal\"\nint x;\n# 7 \"inc/b.h\" 1\nint y;\n\nint z;\n# 3 \"a.metal\" 2\nint w;\n",
      {{"/shim/"}});
  EXPECT_EQ(s.where(1), "a.metal:1");
  EXPECT_EQ(s.where(4), "inc/b.h:7");
  EXPECT_EQ(s.where(7), "inc/b.h:9");
  EXPECT_EQ(s.where(10), "a.metal:3");
}

TEST(Tokenizer, DropsTheEmulatorsOwnHeaders) {
  const TokenStream s = tokenize(
      "# 1 \"a.metal\"\nint x;\n# 1 \"/shim/metal_stdlib\" 1\n@@@ int y;\n# 2 \"a.metal\" 2\nint "
      "z;\n",
      {{"/shim/"}});
  EXPECT_EQ(join(s, 0, s.tokens.size()), "int x ; int z ;");
}

TEST(Tokenizer, RefusesWhatItDoesNotKnow) {
  EXPECT_TRUE(has(error_of("int x;\nauto s = R\"(x)\";"), "k.metal:2: error: raw string"));
  EXPECT_TRUE(has(error_of("\n\nint @x;"), "k.metal:3: error: unexpected character '@'"));
  EXPECT_TRUE(has(error_of("auto s = \"abc\n\";"), "k.metal:1: error: unterminated"));
  EXPECT_TRUE(has(error_of("#define X 1\nint x;"), "k.metal:1: error: unexpected directive"));
  EXPECT_THROW(
      tokenize("# 1 \"a.metal\"\n# 1 \"/usr/include/c++/12/vector\" 1\nint x;\n", {{"/shim/"}}),
      CompileError);
}

TEST(Tokenizer, PrintKeepsLinesOfEveryToken) {
  TokenStream s = tokens_of("int a;\n\n\nint b;\n# 40 \"k.metal\"\n#pragma unroll\nfor(;;){}\n");
  const std::string text = print(s);
  // Tokenizing what was printed gives the places back.
  const TokenStream again = tokenize(
      [&] {
        std::string t = text;
        for (size_t at = t.find("#line "); at != std::string::npos; at = t.find("#line ", at)) {
          t.replace(at, 6, "# ");
        }
        return t;
      }(),
      {{"/shim/"}});
  ASSERT_EQ(again.tokens.size(), s.tokens.size());
  for (size_t i = 0; i < s.tokens.size(); i++) {
    EXPECT_EQ(again.where(i), s.where(i)) << s.tokens[i].text;
  }
}

TEST(Structure, FindsDeclarations) {
  const TokenStream s = tokens_of(
      "namespace a { struct S : B<int> { S(int x) : y{x}, z(1) {} int y, z; bool operator<(S o) "
      "const "
      "{ return y < o.y; } }; template <typename T, bool B = (sizeof(T) > 2)> T f(T x) { return x; "
      "} }"
      "constant int table[2] = {1, 2}; enum class E { a, b }; using T = int; a::S s{1};");
  const std::vector<Declaration> d = parse_declarations(s);
  ASSERT_EQ(d.size(), 5u);
  EXPECT_EQ(d[0].kind, Declaration::Kind::name_space);
  ASSERT_EQ(d[0].members.size(), 2u);
  EXPECT_EQ(d[0].members[0].kind, Declaration::Kind::class_type);
  ASSERT_EQ(d[0].members[0].members.size(), 3u);
  EXPECT_EQ(d[0].members[0].members[0].scope, "a::S::");
  EXPECT_EQ(d[0].members[0].members[2].kind, Declaration::Kind::function);
  EXPECT_EQ(d[0].members[1].kind, Declaration::Kind::function);
  EXPECT_TRUE(d[0].members[1].is_template);
  EXPECT_EQ(s.tokens[d[0].members[1].name].text, "f");
  EXPECT_EQ(d[1].kind, Declaration::Kind::variable);
  EXPECT_EQ(s.tokens[d[1].name].text, "table");
  EXPECT_EQ(d[2].kind, Declaration::Kind::enumeration);
  EXPECT_EQ(d[4].kind, Declaration::Kind::variable);
}

TEST(Structure, MatchesTemplateBracketsAroundComparisons) {
  EXPECT_TRUE(has(
      rewritten(
          "template <typename T, enable_if_t<sizeof(T) < 8, bool> = true> T f(T x) { return x; }"),
      "sizeof(T) < 8, bool"));
}

TEST(Rewrite, KernelAttributeAndKeyword) {
  for (const char* spelling : {"[[kernel]] void", "kernel void"}) {
    const std::string text =
        std::string(spelling) +
        " k(device float* y [[buffer(2)]], uint i [[thread_position_in_grid]]) {}";
    EXPECT_TRUE(has(rewritten(text), "static void k( float* y, uint i) {}"));
    EXPECT_TRUE(
        has(table(text),
            "{{ArgKind::buffer, int32_t(2), false, false, nullptr, \"y\"}, "
            "{ArgKind::thread_position_in_grid, int32_t(0), false, true, nullptr, \"i\"}, }"));
    EXPECT_TRUE(has(table(text), "{\"k\", thunk_0, args_0, 2}"));
  }
}

TEST(Rewrite, BufferIndicesAreImplicitWhereNotGiven) {
  const std::string t = table(
      "kernel void k(device int* a, device int* b [[buffer(1)]], device int* c, constant int& d) "
      "{}");
  EXPECT_TRUE(has(t, "int32_t(0), false, false, nullptr, \"a\""));
  EXPECT_TRUE(has(t, "int32_t(1), false, false, nullptr, \"b\""));
  EXPECT_TRUE(has(t, "int32_t(2), false, false, nullptr, \"c\""));
  EXPECT_TRUE(has(t, "int32_t(3), true, true, nullptr, \"d\""));
}

TEST(Rewrite, ReadOnlyIsAConstPointee) {
  const std::string t = table(
      "kernel void k(const device int* a, device const int* b, device int* const c, device V<const "
      "int>* d, constant P& e, int const device* f) {}");
  for (const char* read_only : {"a", "b", "e", "f"}) {
    EXPECT_TRUE(has(t, std::string("true, nullptr, \"") + read_only + "\""));
  }
  for (const char* written : {"c", "d"}) {
    EXPECT_TRUE(has(t, std::string("false, nullptr, \"") + written + "\""));
  }
}

TEST(Rewrite, EveryBuiltInAttribute) {
  for (const char* name :
       {"thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "thread_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "thread_index_in_quadgroup",
        "simdgroup_index_in_threadgroup",
        "quadgroup_index_in_threadgroup",
        "threads_per_threadgroup",
        "threadgroups_per_grid",
        "threads_per_grid",
        "threads_per_simdgroup",
        "thread_execution_width",
        "simdgroups_per_threadgroup",
        "quadgroups_per_threadgroup",
        "dispatch_threads_per_threadgroup",
        "dispatch_simdgroups_per_threadgroup",
        "dispatch_quadgroups_per_threadgroup",
        "grid_origin",
        "grid_size"}) {
    EXPECT_TRUE(
        has(table(std::string("kernel void k(ushort3 p [[") + name + "]]) {}"),
            std::string("ArgKind::") + name));
  }
}

TEST(Rewrite, KernelArgumentsItCannotTake) {
  EXPECT_TRUE(
      has(error_of("\nkernel void k(float* x) {}"),
          "k.metal:2: error: kernel k: parameter x has no address space"));
  EXPECT_TRUE(has(error_of("kernel void k(uint i) {}"), "neither a buffer nor a built-in"));
  EXPECT_TRUE(has(error_of("kernel void k(texture2d<float> t [[texture(0)]]) {}"), "[[texture]]"));
  EXPECT_TRUE(has(error_of("kernel void k(device float* device* p) {}"), "pointers to pointers"));
  EXPECT_TRUE(
      has(error_of("kernel void k(device int* a [[buffer(0)]], device int* b [[buffer(0)]]) {}"),
          "used twice"));
  EXPECT_TRUE(has(error_of("kernel void k(threadgroup int* a) {}"), "lacks [[threadgroup(n)]]"));
  EXPECT_TRUE(has(error_of("kernel int k() { return 1; }"), "must return void"));
  EXPECT_TRUE(
      has(error_of("vertex float4 v() { return 0; }"), "vertex functions are not supported"));
  EXPECT_TRUE(
      has(error_of("kernel void k(uint i [[amplification_id]]) {}"), "[[amplification_id]]"));
  EXPECT_TRUE(has(error_of("kernel void a() {} kernel void a(device int* x) {}"), "two kernels"));
}

TEST(Rewrite, TemplatesWithHostName) {
  const std::string text =
      "template <typename T, int N> [[kernel]] void f(device T* y [[buffer(0)]]) {}\n"
      "template [[host_name(\"f_\" \"half\")]] [[kernel]] decltype(f<half, 4>) f<half, 4>;\n"
      "template [[host_name(\"f_float\")]] [[kernel]] void f<float, (2 > 1)>(device float* y);\n"
      "typedef decltype(f<float, 1>) f_t;\n"
      "template [[host_name(\"f_1\")]] kernel f_t f<float, 1>;\n";
  const std::string r = rewritten(text);
  EXPECT_TRUE(has(r, "metal_emulator_kernel_0 = &f < half , 4 >;"));
  EXPECT_TRUE(has(r, "metal_emulator_kernel_1 = &f < float , ( 2 > 1 ) >;"));
  EXPECT_TRUE(has(r, "metal_emulator_kernel_2 = &f < float , 1 >;"));
  EXPECT_TRUE(
      has(table(text),
          "{\"f_half\", thunk_0, args_0, 1}, {\"f_float\", thunk_1, args_0, 1}, "
          "{\"f_1\", thunk_2, args_0, 1}"));
}

TEST(Rewrite, NamespacesAndUnknownTemplates) {
  const std::string text =
      "namespace a { namespace b { template <typename T> kernel void f(device T* y) {}\n"
      "template [[host_name(\"f\")]] kernel void f<int>(device int*);\n kernel void g() {} } }";
  EXPECT_TRUE(has(table(text), "&::a::b::g"));
  EXPECT_TRUE(has(table(text), "::a::b::metal_emulator_kernel_"));
  EXPECT_TRUE(
      has(error_of("template [[host_name(\"f\")]] kernel void f<int>(device int*);"),
          "no kernel template is named f"));
  EXPECT_TRUE(
      has(error_of("template <typename T> kernel void f() {}\ntemplate kernel void f<int>();"),
          "k.metal:2: error: an instantiated kernel needs"));
}

TEST(Rewrite, ExplicitSpecialisations) {
  const std::string text =
      "template <typename T> kernel void f(device T* y) {}\n"
      "template <> kernel void f<int>(device int* y) { y[0] = 1; }\n"
      "template [[host_name(\"f_int\")]] kernel void f<int>(device int*);";
  EXPECT_TRUE(has(rewritten(text), "template <> void f<int>( int* y) { y[0] = 1; }"));
  EXPECT_FALSE(has(table(text), "{\"f\""));
  EXPECT_TRUE(has(table(text), "{\"f_int\""));
}

TEST(Rewrite, BuildsOnlyTheWantedKernels) {
  const std::string text =
      "kernel void a() {} kernel void b() {} template <int N> kernel void c() {}\n"
      "template [[host_name(\"c1\")]] kernel void c<1>();\ntemplate [[host_name(\"c2\")]] kernel "
      "void "
      "c<2>();";
  const RewriteResult r = rewrite(tokens_of(text), {"b", "c2"});
  EXPECT_EQ(r.kernels, (std::vector<std::string>{"b", "c2"}));
  EXPECT_FALSE(has(r.text, "&c < 1 >"));
  EXPECT_TRUE(has(error_of(text, {"d"}), "no kernel is named d"));
}

TEST(Rewrite, FunctionConstants) {
  const std::string text =
      "constant bool has_bias [[function_constant(3)]];\n"
      "constant int n [[function_constant(4)]];\n"
      "constant int n2 = n * 2;\n"
      "constant bool b = is_function_constant_defined(has_bias) ? has_bias : false;\n"
      "kernel void k(device float* bias [[buffer(0), function_constant(has_bias)]],\n"
      "  device float* x [[buffer(1)]] [[function_constant(b)]]) {}";
  const std::string r = rewritten(text), t = table(text);
  EXPECT_TRUE(has(r, "static bool has_bias; static bool has_bias__defined;"));
  EXPECT_TRUE(has(r, "static int n2; METAL_EMULATOR_RAW static void n2__update() { n2 = n * 2; }"));
  EXPECT_TRUE(has(r, "(has_bias__defined) ? has_bias : false"));
  EXPECT_TRUE(has(t, "false, &::has_bias, \"bias\""));
  EXPECT_TRUE(has(t, "false, &::b, \"x\""));
  EXPECT_TRUE(
      has(t, "{int32_t(3), \"has_bias\", &::has_bias, sizeof(::has_bias), &::has_bias__defined}"));
  EXPECT_TRUE(has(t, "constants_changed() { ::n2__update(); ::b__update(); }"));
  EXPECT_TRUE(
      has(error_of("kernel void k(device int* x [[function_constant(y)]]) {}"),
          "names no function constant"));
  EXPECT_TRUE(
      has(error_of("bool y [[function_constant(0)]];"), "must be an uninitialised constant"));
  EXPECT_TRUE(
      has(error_of("constant int n [[function_constant(0)]]; constant int t[2] = {n, 1};"),
          "only scalars and vectors"));
}

TEST(Rewrite, ConstexprFunctionConstants) {
  EXPECT_TRUE(
      has(rewritten("static constant constexpr const bool f [[function_constant(0)]];"),
          "static bool f; static bool f__defined;"));
}

TEST(Rewrite, ThreadgroupVariables) {
  const std::string r = rewritten(
      "template <typename T, int N> kernel void k() {\n"
      "  threadgroup T a[N][2], b;\n"
      "  threadgroup metal::vec<T, 4> c[4];\n"
      "  alignas(16) threadgroup half d[8];\n"
      "  { threadgroup struct S e; }\n"
      "  float threadgroup f;\n"
      "}");
  EXPECT_TRUE(
      has(r,
          "typedef T a__tg_type[N][2], b__tg_type; static "
          "::metal_emulator::abi::ThreadgroupSlot a__tg_slot; auto& a = "
          "::metal_emulator::glue::tgvar<a__tg_type>(a__tg_slot);"));
  EXPECT_TRUE(has(r, "auto& b = ::metal_emulator::glue::tgvar<b__tg_type>(b__tg_slot);"));
  EXPECT_TRUE(has(r, "typedef metal::vec<T, 4> c__tg_type[4];"));
  EXPECT_TRUE(has(r, "typedef __attribute__((aligned(16))) half d__tg_type[8];"));
  EXPECT_TRUE(has(r, "typedef struct S e__tg_type;"));
  EXPECT_TRUE(has(r, "typedef float f__tg_type;"));
}

TEST(Rewrite, InitialisedThreadgroupVariables) {
  const std::string r = rewritten("kernel void k() { threadgroup float a[2] = {1.0, 2}, b = 0; }");
  EXPECT_TRUE(
      has(r,
          "a__tg_type a__tg_init = { 1.0f , 2 }; "
          "::metal_emulator::glue::tginit(a__tg_slot, a, a__tg_init);"));
  EXPECT_TRUE(has(r, "b__tg_type b__tg_init = 0;"));
}

TEST(Rewrite, ThreadgroupPointersAreNotVariables) {
  const std::string r = rewritten(
      "kernel void k(threadgroup float* t [[threadgroup(0)]]) { threadgroup float* p = t; "
      "threadgroup float& q = *p; threadgroup float* const s = p; *(threadgroup float4*)p = 1; "
      "using tp = threadgroup float*; threadgroup float (*m)[4] = nullptr; f<threadgroup "
      "float*>(p); "
      "threadgroup const vec<half, 4>* v = (const threadgroup vec<half, 4>*)p; }");
  EXPECT_FALSE(has(r, "tgvar"));
  EXPECT_FALSE(has(r, "threadgroup"));
}

TEST(Rewrite, ThreadgroupDeclarationsItDoesNotUnderstand) {
  EXPECT_TRUE(
      has(error_of("threadgroup float x[4];"), "threadgroup variable x outside a function"));
  EXPECT_TRUE(
      has(error_of("kernel void k() {\n threadgroup float x(1); }"),
          "k.metal:2: error: threadgroup declaration that is not understood"));
  EXPECT_TRUE(has(error_of("kernel void k() { threadgroup float x, *p; }"), "not understood"));
  EXPECT_TRUE(has(error_of("struct S { threadgroup float x; };"), "outside a function"));
  EXPECT_EQ(error_of("struct S { threadgroup float* x; };"), "accepted");
  EXPECT_TRUE(
      has(error_of("kernel void k() { if (true) threadgroup float x[2]; }"), "not understood"));
  EXPECT_TRUE(
      has(error_of("kernel void k() {\n using T = threadgroup float; T x[2]; }"),
          "k.metal:2: error: threadgroup declaration in a place"));
  EXPECT_TRUE(has(error_of("typedef threadgroup float T;"), "alias of a threadgroup type"));
  EXPECT_EQ(
      error_of("typedef threadgroup float* T; using U = threadgroup half&; typedef void "
               "(f_t)(threadgroup "
               "int* p [[threadgroup(0)]], uint i);"),
      "accepted");
  EXPECT_EQ(
      error_of("kernel void k() { struct S { int f() threadgroup { return 1; } }; "
               "g<threadgroup float>(sizeof(threadgroup int)); }"),
      "accepted");
}

TEST(Rewrite, AddressSpaces) {
  const std::string r = rewritten(
      "struct S { float x; S(float a) constant : x(a) {} float get() const constant { return x; } "
      "};\n"
      "float f(const device float* a, constant float* b, const constant float& c, thread int& d) { "
      "return *(const device float*)a; }\n"
      "constant float table[2] = {1, 2}; constant constexpr int n = 3;\n"
      "template <typename T> struct L { static const constant T max = T(1); static constexpr "
      "constant T "
      "min = T(0); };");
  EXPECT_TRUE(has(r, "S(float a) : x(a) {} float get() const { return x; }"));
  EXPECT_TRUE(has(r, "float f(const float* a, const float* b, const float& c, int& d)"));
  EXPECT_TRUE(has(r, "const float table[2]"));
  EXPECT_TRUE(has(r, "const constexpr int n = 3;"));
  EXPECT_TRUE(has(r, "inline static const T max = T(1);"));
  EXPECT_TRUE(has(r, "static constexpr const T min"));
  EXPECT_TRUE(has(error_of("void f(threadgroup_imageblock int* x) {}"), "not supported"));
}

TEST(Rewrite, OverloadsThatDifferInAddressSpaces) {
  const std::string r = rewritten(
      "float f(device float* p) { return *p; }\nfloat f(threadgroup float* p) { return *p; }\n"
      "template <typename T> struct E {}; template <typename T> struct E<device T*> { typedef T "
      "type; };\n"
      "template <typename T> struct E<threadgroup T*> { typedef T type; };\n"
      "struct S { S() thread = default; S() threadgroup = default; };");
  EXPECT_EQ(r.find("float f("), r.rfind("float f("));
  EXPECT_EQ(r.find("struct E< T*>"), r.rfind("struct E< T*>"));
  EXPECT_EQ(r.find("S() = default"), r.rfind("S() = default"));
  EXPECT_TRUE(
      has(error_of("int f(device int* p) { return 1; }\nint f(threadgroup int* p) { return 2; }"),
          "k.metal:2: error: functions that differ in address spaces only must have equal bodies"));
}

TEST(Rewrite, ParameterNamesDoNotMakeOverloads) {
  const std::string r = rewritten(
      "template <typename T> T f(const device T* src, int i) { return src[i]; }\n"
      "template <typename T> T f(const threadgroup T* s, int j) { return s[j]; }\n"
      "int g(int) { return 1; } int g(uint) { return 2; } int g(const half) { return 3; }\n"
      "int h(int a) { return a; } int h(uint a) { return a; } int h(long) { return 1; }");
  EXPECT_EQ(r.find("T f("), r.rfind("T f("));
  for (const char* kept :
       {"g(int)", "g(uint)", "g(const half)", "h(int a)", "h(uint a)", "h(long)"}) {
    EXPECT_TRUE(has(r, kept));
  }
  EXPECT_TRUE(has(
      error_of(
          "int f(device int* p, int i) { return p[i]; } int f(thread int* q, int i) { return i; }"),
      "must have equal bodies"));
}

TEST(Rewrite, SameNamesInDifferentScopesStay) {
  const std::string r = rewritten(
      "namespace a { int f(int x) { return x; } } namespace b { int f(int x) { return x; } }\n"
      "struct P { int g() { return 1; } }; struct Q { int g() { return 1; } };");
  EXPECT_NE(r.find("int f(int x)"), r.rfind("int f(int x)"));
  EXPECT_NE(r.find("int g()"), r.rfind("int g()"));
}

TEST(Rewrite, Literals) {
  const std::string r = rewritten(
      "constant float a = 1.0, b = 1.5f, c = 1e-3, d = 0x1p4, e = .5; constant half h = 0.5h; "
      "constant bfloat g = 1.0bf; constant int i = 0x1e3, j = 10u, k = 0xffUL;");
  EXPECT_TRUE(has(r, "a = 1.0f, b = 1.5f, c = 1e-3f, d = 0x1p4f, e = .5f;"));
  EXPECT_TRUE(has(r, "((half)0.5f16)"));
  EXPECT_TRUE(has(r, "((bfloat)1.0f)"));
  EXPECT_TRUE(has(r, "i = 0x1e3, j = 10u, k = 0xffUL;"));
  EXPECT_TRUE(has(error_of("constant float a = 1.0L;"), "no long double"));
}

TEST(Rewrite, Attributes) {
  const std::string r = rewritten(
      "[[max_total_threads_per_threadgroup(256)]] kernel void k() { [[maybe_unused]] int x = "
      "a[b[1]]; }");
  EXPECT_TRUE(has(r, "static void k() { [[maybe_unused]] int x = a[b[1]]; }"));
  EXPECT_TRUE(
      has(error_of("struct S { device float* p [[id(0)]]; };"),
          "k.metal:1: error: attribute [[id]] is not supported"));
}

TEST(Rewrite, PragmasKeepTheirLine) {
  const std::string full =
      rewrite(tokens_of("kernel void k() {\n#pragma clang loop unroll(full)\n  for (;;) {}\n}"), {})
          .text;
  EXPECT_TRUE(has(full, "#pragma clang loop unroll(full)\n"));
}

TEST(Rewrite, PragmasOfMacrosStandOnTheirOwnLine) {
  const std::string full =
      rewrite(
          tokens_of("kernel void k() { int x;\n#pragma unroll\n# 1 \"k.metal\"\nfor (;;) {} }"), {})
          .text;
  EXPECT_TRUE(has(full, "\n#pragma unroll\n"));
}

TEST(Rewrite, UnrollHintsWithMacrosAreDropped) {
  EXPECT_FALSE(has(
      rewrite(tokens_of("kernel void k() {\n#pragma unroll (MIN(4, N))\nfor (;;) {} }"), {}).text,
      "#pragma unroll"));
  EXPECT_TRUE(
      has(rewrite(tokens_of("kernel void k() {\n#pragma unroll(4)\nfor (;;) {} }"), {}).text,
          "#pragma unroll(4)"));
}

TEST(Rewrite, DeducedVariablesHoldVectorsNotSwizzles) {
  const std::string r = rewritten(
      "kernel void k() { const auto v = a.xy; for (auto i = f(1, 2); i < 3; i++) {} auto& q = b; "
      "auto x = 1, y = 2; constexpr auto c = 3; if (auto z = g()) {} }");
  EXPECT_TRUE(has(r, "const auto v = ::metal_emulator_rewrite::value( a.xy);"));
  EXPECT_TRUE(has(r, "auto i = ::metal_emulator_rewrite::value( f(1, 2));"));
  EXPECT_TRUE(has(r, "if (auto z = ::metal_emulator_rewrite::value( g())) {}"));
  for (const char* kept : {"auto& q = b;", "auto x = 1, y = 2;", "constexpr auto c = 3;"}) {
    EXPECT_TRUE(has(r, kept));
  }
}

TEST(Rewrite, UnbalancedText) {
  EXPECT_TRUE(has(error_of("kernel void k() {\n"), "k.metal:1: error: { without its end"));
  EXPECT_TRUE(has(error_of("int f(int a]) {}"), "unexpected ]"));
  EXPECT_TRUE(has(error_of("int x;\n}"), "k.metal:2: error: unexpected }"));
  EXPECT_TRUE(has(error_of("int x"), "without its end"));
}

}  // namespace
}  // namespace metal_emulator::frontend
