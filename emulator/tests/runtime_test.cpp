// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Dispatches: grids, arguments, counters, refusals, both kinds of fibers, and for each check a
// kernel that is right beside one that is not.
#include <cstring>

#include "src/runtime/fiber.h"
#include "tests/conformance_support.h"

namespace metal_emulator {
namespace {

using conformance::build;
using conformance::in;
using conformance::out;
using faults::describe;

Dispatch one_group(const std::string& kernel, uint32_t threads) {
  Dispatch d;
  d.kernel = kernel;
  d.threads_per_grid = d.threads_per_threadgroup = {threads, 1, 1};
  return d;
}

const char kPositions[] = R"(
kernel void positions(device uint* out [[buffer(0)]], uint3 p [[thread_position_in_grid]],
    uint3 g [[threadgroup_position_in_grid]], uint3 size [[threads_per_threadgroup]],
    uint3 grid [[threads_per_grid]], uint3 groups [[threadgroups_per_grid]],
    ushort index [[thread_index_in_threadgroup]], ushort3 l [[thread_position_in_threadgroup]],
    uint3 nominal [[dispatch_threads_per_threadgroup]], ushort lane [[thread_index_in_simdgroup]],
    ushort sg [[simdgroup_index_in_threadgroup]], ushort sgs [[simdgroups_per_threadgroup]]) {
  device uint* o = out + ((p.z * grid.y + p.y) * grid.x + p.x) * 8;
  o[0] = g.x + 100 * g.y + 10000 * g.z;
  o[1] = size.x + 100 * size.y + 10000 * size.z;
  o[2] = groups.x + 100 * groups.y + 10000 * groups.z;
  o[3] = index;
  o[4] = l.x + 100 * l.y + 10000 * l.z;
  o[5] = nominal.x + 100 * nominal.y + 10000 * nominal.z;
  o[6] = lane + 100 * sg;
  o[7] = sgs;
}
)";

// 70x3x2 threads in groups of 32x2x1: the last groups are 6 wide, 1 high.
void check_positions() {
  std::vector<uint32_t> v(70 * 3 * 2 * 8);
  Dispatch d;
  d.kernel = "positions";
  d.buffers = {out(0, v)};
  d.threads_per_grid = {70, 3, 2};
  d.threads_per_threadgroup = {32, 2, 1};
  const Report report = run(build(kPositions, "positions.metal"), d);
  EXPECT_EQ(report.finding_count, 0u) << describe(report);
  EXPECT_EQ(report.counters.threadgroups, 3u * 2 * 2);
  EXPECT_EQ(report.counters.threads, 70u * 3 * 2);
  for (uint32_t z = 0; z < 2; z++)
    for (uint32_t y = 0; y < 3; y++)
      for (uint32_t x = 0; x < 70; x++) {
        const uint32_t* o = &v[((z * 3 + y) * 70 + x) * 8];
        const uint32_t gx = x / 32, gy = y / 2, w = gx == 2 ? 6 : 32, h = gy == 1 ? 1 : 2;
        const uint32_t index = y % 2 * w + x % 32;
        ASSERT_EQ(o[0], gx + 100 * gy + 10000 * z);
        ASSERT_EQ(o[1], w + 100 * h + 10000);
        ASSERT_EQ(o[2], 3u + 200 + 20000);
        ASSERT_EQ(o[3], index);
        ASSERT_EQ(o[4], x % 32 + 100 * (y % 2));
        ASSERT_EQ(o[5], 32u + 200 + 10000);
        ASSERT_EQ(o[6], index % 32 + 100 * (index / 32));
        ASSERT_EQ(o[7], (w * h + 31) / 32);
      }
}

TEST(Dispatch, RaggedGridsWithFastFibers) {
  Fiber::use_portable(false);
  check_positions();
}

const char kReverse[] = R"(
kernel void reverse(device float* x [[buffer(0)]], threadgroup float* t [[threadgroup(0)]],
    uint i [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
  t[i] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  x[i] = t[n - 1 - i] + simd_max(0.0f);
}
)";
void check_reverse(bool reverse_order) {
  std::vector<float> x(1000);
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i);
  Dispatch d = one_group("reverse", 1000);
  d.buffers = {in(0, x)};
  d.threadgroup_memory_bytes = {4000};
  d.reverse_order = reverse_order;
  const Report report = run(build(kReverse, "reverse.metal"), d);
  EXPECT_EQ(report.finding_count, 0u) << describe(report);
  for (size_t i = 0; i < x.size(); i++) ASSERT_EQ(x[i], float(999 - i));
  EXPECT_EQ(report.counters.threadgroup_barriers, 1u);
  EXPECT_EQ(report.counters.threadgroup_memory_bytes, 4000u);
  EXPECT_EQ(report.counters.threadgroup_read_bytes, 4000u);
  EXPECT_EQ(report.counters.threadgroup_written_bytes, 4000u);
  EXPECT_EQ(report.counters.simd_operations, 32u);
}
TEST(Dispatch, BarriersAndThreadgroupArguments) {
  check_reverse(false);
  check_reverse(true);
}
TEST(Dispatch, PortableFibers) {
  Fiber::use_portable(true);
  ASSERT_TRUE(Fiber::portable());
  check_positions();
  check_reverse(false);
  check_reverse(true);
  Fiber::use_portable(false);
  check_reverse(false);
}

TEST(Dispatch, CountsBytesIssuedAndUnique) {
  std::vector<float> x(64, 1.0f), y(64);
  Dispatch d = one_group("k", 64);
  d.buffers = {in(0, x), out(1, y)};
  const Library library = build(
      "kernel void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i "
      "[[thread_position_in_grid]]) { y[i] = x[i] + x[0]; }\n",
      "k.metal");
  for (const bool checks : {true, false}) {
    d.checks = checks;
    const Report report = run(library, d);
    const auto& b = report.counters.buffers;
    ASSERT_EQ(b.size(), 2u);
    EXPECT_EQ(b[0].read_bytes, 2u * 64 * 4);
    EXPECT_EQ(b[0].unique_read_bytes, 64u * 4);
    EXPECT_EQ(b[1].written_bytes, 64u * 4);
    EXPECT_EQ(b[1].unique_written_bytes, 64u * 4);
    EXPECT_EQ(b[1].read_bytes, 0u);
  }
}

TEST(Dispatch, FunctionConstantsChooseArguments) {
  const Library library = build(
      "constant bool has_bias [[function_constant(0)]];\nconstant int factor "
      "[[function_constant(1)]];\n"
      "kernel void k(device int* y [[buffer(0)]], const device int* bias [[buffer(1), "
      "function_constant(has_bias)]], uint i [[thread_position_in_grid]]) {\n"
      "y[i] = int(i) * factor + (has_bias ? bias[i] : 0); }\n",
      "k.metal");
  const auto bytes = [](const auto& v) {
    std::vector<std::byte> b(sizeof v);
    std::memcpy(b.data(), &v, sizeof v);
    return b;
  };
  std::vector<int> y(4), bias = {10, 20, 30, 40};
  Dispatch d = one_group("k", 4);
  d.buffers = {out(0, y)};
  d.function_constants = {{0, bytes(false)}, {1, bytes(3)}};
  EXPECT_EQ(run(library, d).finding_count, 0u);
  EXPECT_EQ(y, (std::vector<int>{0, 3, 6, 9}));
  d.function_constants[0].value = bytes(true);
  EXPECT_THROW(run(library, d), DispatchError);  // bias is not bound
  d.buffers.push_back(in(1, bias));
  EXPECT_EQ(run(library, d).finding_count, 0u);
  EXPECT_EQ(y, (std::vector<int>{10, 23, 36, 49}));
  d.function_constants[1].value = bytes(char(3));
  EXPECT_THROW(run(library, d), DispatchError);  // wrong size
}

TEST(Dispatch, RefusesWhatMetalRefuses) {
  const Library library = build(
      "kernel void k(device int* y [[buffer(0)]]) { y[0] = 1; }\n"
      "kernel void large(device int* y [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {\n"
      "threadgroup int a[5000], b[4000]; a[i] = int(i); b[i] = a[i]; y[i] = b[i]; }\n",
      "k.metal");
  std::vector<int> y(8);
  Dispatch good = one_group("k", 1);
  good.buffers = {out(0, y)};
  EXPECT_NO_THROW(run(library, good));
  Dispatch d = good;
  d.kernel = "none";
  EXPECT_THROW(run(library, d), DispatchError);
  d = good;
  d.buffers.clear();
  EXPECT_THROW(run(library, d), DispatchError);
  d = good;
  d.buffers[0].index = 31;
  EXPECT_THROW(run(library, d), DispatchError);
  d = good;
  d.threads_per_threadgroup = {1025, 1, 1};
  EXPECT_THROW(run(library, d), DispatchError);
  d = good;
  d.threads_per_grid = {0, 1, 1};
  EXPECT_THROW(run(library, d), DispatchError);
  d = good;
  d.kernel = "large";  // 36,000 bytes of threadgroup memory
  EXPECT_THROW(run(library, d), DispatchError);
  EXPECT_NO_THROW(run(library, good));  // the machine is usable after a refusal
}

// ---- Checks: the same kernel text with `FAULT` on and off.
struct Check {
  const char* name;
  FindingKind kind;
  const char*
      body;  ///< of device int* a (256 ints, written), const device int* b, uint i, 64 threads
};

const Check kChecks[] = {
    {"RaceWithinASimdgroup",
     FindingKind::race_threadgroup,
     "threadgroup int t[64]; t[i] = int(i);\n#ifndef FAULT\n"
     "simdgroup_barrier(mem_flags::mem_threadgroup);\n#endif\na[i] = t[i ^ 1];"},
    {"RaceAcrossSimdgroups",
     FindingKind::race_threadgroup,
     "threadgroup int t[64]; t[i] = int(i);\n#ifdef "
     "FAULT\nsimdgroup_barrier(mem_flags::mem_threadgroup);\n"
     "#else\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n#endif\na[i] = t[63 - i];"},
    {"WriteAfterReadOfTwoSimdgroups",
     FindingKind::race_threadgroup,
     "threadgroup int t[1]; if (i == 0) t[0] = 5; "
     "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
     "a[i] = t[0];\n#ifndef FAULT\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n#endif\n"
     "if (i == 63) t[0] = 6;"},
    {"DeviceMemoryWithinAThreadgroup",
     FindingKind::race_device,
     "a[i] = int(i);\n#ifdef FAULT\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n#else\n"
     "threadgroup_barrier(mem_flags::mem_device);\n#endif\na[64 + i] = a[63 - i];"},
    {"OutOfBoundsRead",
     FindingKind::out_of_bounds,
     "#ifdef FAULT\na[i] = b[i + 1];\n#else\na[i] = b[i];\n#endif"},
    {"OutOfBoundsWriteOfOneByte",
     FindingKind::out_of_bounds,
     "#ifdef FAULT\nif (i == 0) ((device char*)a)[1024] = 1;\n#endif\na[i] = 1;"},
    {"UninitializedThreadgroupMemory",
     FindingKind::uninitialized_read,
     "threadgroup int t[64];\n#ifdef FAULT\nif (i != 9)\n#endif\nt[i] = 1;\n"
     "threadgroup_barrier(mem_flags::mem_threadgroup); a[i] = t[i];"},
    {"UninitializedOutput",
     FindingKind::uninitialized_read,
     "#ifndef FAULT\na[i] = 0;\n#endif\na[i] += 1;"},
    {"UninitializedByte",
     FindingKind::uninitialized_read,
     "device uchar* c = (device uchar*)a; for (int k = 0; k < 4; k++)\n#ifdef FAULT\nif (k != "
     "2)\n#endif\n"
     "c[i * 4 + k] = 1;\na[64 + i] = a[i];"},
    {"BarrierInABranch",
     FindingKind::divergent_barrier,
     "#ifdef FAULT\nif (i < 7)\n#endif\nthreadgroup_barrier(mem_flags::mem_threadgroup); a[i] = "
     "1;"},
    {"TwoBarriersInTwoBranches",
     FindingKind::divergent_barrier,
     "#ifdef FAULT\nif (i < 32) { threadgroup_barrier(mem_flags::mem_device); a[i] = 2; } else {\n"
     "threadgroup_barrier(mem_flags::mem_device); a[i] = 3; }\n#else\n"
     "threadgroup_barrier(mem_flags::mem_device); a[i] = 1;\n#endif"},
    {"SimdgroupBarrierInABranch",
     FindingKind::divergent_barrier,
     "#ifdef FAULT\nif (i % 2)\n#endif\nsimdgroup_barrier(mem_flags::mem_threadgroup); a[i] = 1;"},
    {"MatrixOperationInABranch",
     FindingKind::divergent_matrix_operation,
     "simdgroup_matrix<float, 8, 8> m(1.0f);\n#ifdef FAULT\nif (i % 32 < 20)\n#endif\n"
     "simdgroup_multiply_accumulate(m, m, m, m);\na[i] = int(m.thread_elements()[0]);"},
    {"Misaligned",
     FindingKind::misaligned_access,
     "#ifdef FAULT\nconst device int* p = b + 1;\n#else\nconst device int* p = b;\n#endif\n"
     "if (i < 8) a[i] = (*(const device int4*)(p + 4 * i)).y; else a[i] = 0;"},
    {"WriteToReadOnly",
     FindingKind::write_to_read_only,
     "#ifdef FAULT\n((device int*)b)[i] = 1;\n#endif\na[i] = 1;"},
    {"SpinsForever",
     FindingKind::deadlock,
     "threadgroup atomic_int f; if (i == 0) atomic_store_explicit(&f, 0, memory_order_relaxed);\n"
     "threadgroup_barrier(mem_flags::mem_threadgroup);\n#ifndef FAULT\n"
     "if (i == 63) atomic_store_explicit(&f, 1, memory_order_relaxed);\n#endif\n"
     "while (atomic_load_explicit(&f, memory_order_relaxed) == 0) {}\na[i] = 1;"},
    {"IndexOutsideAFixedArray",
     FindingKind::undefined_behavior,
     "int t[4] = {1, 2, 3, 4}; int k = b[i] & 3;\n#ifdef FAULT\nk += 4;\n#endif\na[i] = t[k];"},
    {"Shift",
     FindingKind::undefined_behavior,
     "int k = b[i] & 7;\n#ifdef FAULT\nk += 32;\n#endif\na[i] = 1 << k;"},
    {"DivisionByZero",
     FindingKind::undefined_behavior,
     "int k = b[i] | 1;\n#ifdef FAULT\nk = b[i] & 0;\n#endif\na[i] = 5 / k;"},
    {"WildPointer",
     FindingKind::out_of_bounds,
     "#ifdef FAULT\na[i] = *(const device int*)(16 + (ulong)i);\n#else\na[i] = 1;\n#endif"},
    {"AtomicsBesidePlainAccess",
     FindingKind::race_threadgroup,
     "threadgroup atomic_int f; if (i == 0) atomic_store_explicit(&f, 0, memory_order_relaxed);\n"
     "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
     "atomic_fetch_add_explicit(&f, 1, memory_order_relaxed);\n#ifndef FAULT\n"
     "threadgroup_barrier(mem_flags::mem_threadgroup);\n#endif\na[i] = *(threadgroup int*)&f;"},
};

void PrintTo(const Check& check, std::ostream* out) {
  *out << check.name;
}

class Checks : public testing::TestWithParam<Check> {};
TEST_P(Checks, FindTheFaultOnly) {
  for (const bool fault : {false, true}) {
    SCOPED_TRACE(fault ? "faulty" : "clean");
    CompileOptions options;
    options.file_name = "check.metal";
    options.lint = false;
    if (fault) options.defines = {"FAULT"};
    const std::string text =
        std::string(
            "#include <metal_stdlib>\nusing namespace metal;\nkernel void "
            "check(device int* a [[buffer(0)]], const device int* b [[buffer(1)]], uint i "
            "[[thread_index_in_threadgroup]]) {\n") +
        GetParam().body + "\n}\n";
    std::vector<int> a(256), b(64);
    for (size_t i = 0; i < b.size(); i++) b[i] = int(i);
    Dispatch d = one_group("check", 64);
    d.buffers = {out(0, a), in(1, b)};
    const Report report = run(compile(text, options), d);
    if (!fault) {
      EXPECT_EQ(report.finding_count, 0u) << describe(report);
      continue;
    }
    // A race may also show as a read of what is not written yet: its own kind must be there.
    const auto found =
        std::find_if(report.findings.begin(), report.findings.end(), [](const Finding& x) {
          return x.kind == GetParam().kind;
        });
    ASSERT_NE(found, report.findings.end()) << describe(report);
    const Finding& f = *found;
    EXPECT_EQ(f.file, "check.metal");
    EXPECT_GE(f.line, 4) << describe(report);
    EXPECT_LE(f.line, std::count(text.begin(), text.end(), '\n'));
    EXPECT_EQ(f.kernel, "check");
  }
}
INSTANTIATE_TEST_SUITE_P(, Checks, testing::ValuesIn(kChecks), [](const auto& info) {
  return std::string(info.param.name);
});

TEST(DeviceRaces, BetweenThreadgroups) {
  const Library library = build(
      "kernel void k(device int* a [[buffer(0)]], device atomic_int* n [[buffer(1)]], constant "
      "int& mode "
      "[[buffer(2)]], uint g [[threadgroup_position_in_grid]]) {\n"
      "atomic_fetch_add_explicit(n, 1, memory_order_relaxed);\n"
      "if (mode == 0) a[g] = 1;\n"                                        // disjoint
      "if (mode == 1) a[0] = 1;\n"                                        // write, write
      "if (mode == 2) { if (g == 0) a[1] = 1; else a[2 + g] = a[1]; }\n"  // write, then read
      "if (mode == 3) { if (g == 3) a[1] = 1; else a[2 + g] = a[1]; }\n"  // read, then write
      "}\n",
      "k.metal");
  for (const bool reverse : {false, true})
    for (int mode = 0; mode < 4; mode++) {
      SCOPED_TRACE(mode);
      std::vector<int> a(16), n(1);
      const std::vector<int> m = {mode};
      Dispatch d;
      d.kernel = "k";
      d.buffers = {in(0, a), in(1, n), in(2, m)};
      d.threads_per_grid = {4, 1, 1};
      d.reverse_order = reverse;
      const Report report = run(library, d);
      EXPECT_EQ(n[0], 4);
      if (mode == 0) {
        EXPECT_EQ(report.finding_count, 0u) << describe(report);
      } else {
        ASSERT_EQ(report.findings.size(), 1u) << describe(report);
        EXPECT_EQ(report.findings[0].kind, FindingKind::race_device);
      }
    }
}

// Per threadgroup far more barriers than clocks hold: they start again, and races are still found.
TEST(Clocks, StartAgain) {
  const Library library = build(
      "kernel void k(device int* a [[buffer(0)]], constant int& rounds [[buffer(1)]], uint i "
      "[[thread_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {\n"
      "threadgroup int t[2]; t[i] = 0; a[g * 2 + i] = 0;\n"
      "for (int r = 0; r < rounds; r++) { threadgroup_barrier(mem_flags::mem_threadgroup | "
      "mem_flags::mem_device); t[i] = t[1 - i]; }\n"
      "}\n",
      "k.metal");
  std::vector<int> a(4);
  // Reading the other's element while it writes: a race in every round but found at once; so read
  // only what barriers order.
  const Library ordered = build(
      "kernel void k(device int* a [[buffer(0)]], constant int& rounds [[buffer(1)]], uint i "
      "[[thread_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {\n"
      "threadgroup int t[2]; t[i] = 0; int s = 0;\n"
      "for (int r = 0; r < rounds; r++) { threadgroup_barrier(mem_flags::mem_threadgroup | "
      "mem_flags::mem_device); if (int(i) == (r & 1)) { t[0] += 1; a[g] = t[0]; } else s++; }\n"
      "}\n",
      "k.metal");
  const std::vector<int> rounds = {600000};
  Dispatch d = one_group("k", 2);
  d.threads_per_grid = {4, 1, 1};
  d.buffers = {out(0, a), in(1, rounds)};
  const Report report = run(ordered, d);
  EXPECT_EQ(report.finding_count, 0u) << describe(report);
  EXPECT_EQ(a[0], 600000);
  EXPECT_EQ(a[1], 600000);
  EXPECT_GT(run(library, d).finding_count, 0u);
}

// Bytes of one access in different states: decided one by one, as equal ones are at once.
TEST(Findings, OneByteOfAVectorInAnotherState) {
  const Library library = build(
      "kernel void race(device uchar* a [[buffer(0)]], uint i [[thread_position_in_grid]]) {\n"
      "if (i == 1) a[13] = 7;\nif (i == 0) *(device uint4*)a = uint4(1); }\n"
      "kernel void hole(device uchar* a [[buffer(0)]], device uint* o [[buffer(1)]]) {\n"
      "for (int k = 0; k < 16; k++) { if (k != 9) a[k] = 1; }\n"
      "uint4 v = *(device uint4*)a; o[0] = v.x + v.y + v.z + v.w; o[1] = *(device ushort*)(a + "
      "10); }\n"
      "kernel void read(device uchar* a [[buffer(0)]], device uint* o [[buffer(1)]], uint i "
      "[[thread_position_in_grid]]) {\n"
      "if (i == 2) o[0] = a[5];\nif (i == 33) *(device uint2*)a = uint2(1); }\n",
      "bytes.metal");
  std::vector<uint8_t> a(16);
  std::vector<uint32_t> o(4);
  Dispatch d = one_group("race", 2);
  d.buffers = {in(0, a)};
  for (const bool reverse : {false, true}) {
    d.reverse_order = reverse;
    const Report report = run(library, d);
    ASSERT_EQ(report.findings.size(), 1u) << describe(report);
    EXPECT_EQ(report.findings[0].kind, FindingKind::race_device);
  }
  d = one_group("hole", 1);
  d.buffers = {out(0, a), out(1, o)};
  Report report = run(library, d);
  ASSERT_EQ(report.findings.size(), 1u) << describe(report);
  EXPECT_EQ(report.findings[0].kind, FindingKind::uninitialized_read);
  EXPECT_EQ(report.counters.buffers[0].unique_read_bytes, 16u);
  EXPECT_EQ(report.counters.buffers[0].unique_written_bytes, 15u);
  d = one_group("read", 64);
  d.buffers = {in(0, a), out(1, o)};
  report = run(library, d);
  ASSERT_EQ(report.findings.size(), 1u) << describe(report);
  EXPECT_EQ(report.findings[0].kind, FindingKind::race_device);
}

TEST(Findings, ABarrierThatNamesOtherMemoryIsNamed) {
  const auto text_with = [](const char* flags) {
    return "kernel void k(device float* x [[buffer(0)]], threadgroup float* t [[threadgroup(0)]], "
           "uint i [[thread_index_in_threadgroup]]) {\nt[i] = x[i];\nthreadgroup_barrier(" +
           std::string(flags) + ");\nx[i] = t[i ^ 1]; }\n";
  };
  std::vector<float> x(64, 1.0f);
  Dispatch d = one_group("k", 64);
  d.buffers = {in(0, x)};
  d.threadgroup_memory_bytes = {256};
  const Report none = run(build(text_with("mem_flags::mem_none"), "k.metal"), d);
  ASSERT_EQ(none.findings.size(), 1u) << describe(none);
  EXPECT_EQ(none.findings[0].kind, FindingKind::race_threadgroup);
  EXPECT_NE(none.findings[0].text.find("names this memory"), std::string::npos);
  EXPECT_EQ(run(build(text_with("mem_flags::mem_threadgroup"), "k.metal"), d).finding_count, 0u);
}

TEST(Findings, AMisalignedVectorIsOneFinding) {
  const Library library = build(
      "kernel void k(device float* x [[buffer(0)]]) { *(device float4*)(x + 1) = "
      "*(device float4*)(x + 8); }\n",
      "k.metal");
  std::vector<float> x(16, 1.0f);
  Dispatch d = one_group("k", 1);
  d.buffers = {in(0, x)};
  const Report report = run(library, d);
  ASSERT_EQ(report.findings.size(), 1u) << describe(report);
  EXPECT_EQ(report.findings[0].kind, FindingKind::misaligned_access);
}

TEST(Refusals, AnUnknownKernelComesWithTheNamesThereAre) {
  const Library library = build("kernel void scale(device float* x [[buffer(0)]]) {}\n", "k.metal");
  try {
    run(library, one_group("scael", 1));
    FAIL();
  } catch (const DispatchError& error) {
    EXPECT_NE(std::string(error.what()).find("the library has scale"), std::string::npos);
  }
}

}  // namespace
}  // namespace metal_emulator
