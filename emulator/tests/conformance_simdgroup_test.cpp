// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// SIMD-group and quad-group functions for full, ragged and divergent groups of lanes, simdgroup
// matrices, atomics: against loops over lanes.
#include <functional>
#include <map>

#include "tests/conformance_support.h"

namespace metal_emulator::conformance {
namespace {

/// A value per lane; absent: the lane does not take part.
using Lanes = std::map<int, int>;
/// The expected value of lane `i`, given those of all active lanes; absent: undefined in Metal.
using Rule = std::function<std::optional<int>(const Lanes&, int)>;

struct GroupFunction {
  std::string expression;  ///< of int v, the lane's value, and ushort lane
  int width;               ///< 32: simdgroup, 4: quadgroup
  Rule rule;
};

Lanes group_of(const Lanes& all, int lane, int width) {
  Lanes group;
  for (const auto& [i, v] : all)
    if (i / width == lane / width) group[i] = v;
  return group;
}
Rule fold(int width, std::function<int(int, int)> f) {
  return [=](const Lanes& all, int lane) -> std::optional<int> {
    const Lanes g = group_of(all, lane, width);
    int r = g.begin()->second;
    for (auto it = std::next(g.begin()); it != g.end(); ++it) r = f(r, it->second);
    return r;
  };
}
Rule scan(int width, bool exclusive, int neutral, std::function<int(int, int)> f) {
  return [=](const Lanes& all, int lane) -> std::optional<int> {
    int r = neutral;
    for (const auto& [i, v] : group_of(all, lane, width)) {
      if (i > lane || (i == lane && exclusive)) break;
      r = f(r, v);
    }
    return r;
  };
}
/// The value of the lane that `source` names within the group; -1: the own one.
Rule from(int width, std::function<int(int)> source) {
  return [=](const Lanes& all, int lane) -> std::optional<int> {
    const int own = lane % width, s = source(own);
    const auto at = all.find(s < 0 ? lane : lane - own + s);
    return at == all.end() ? std::nullopt : std::optional<int>(at->second);
  };
}

std::vector<GroupFunction> group_functions() {
  std::vector<GroupFunction> t;
  for (const int w : {32, 4}) {
    const std::string p = w == 32 ? "simd_" : "quad_";
    const auto add = [&](const std::string& text, Rule rule) { t.push_back({p + text, w, rule}); };
    add("sum(v)", fold(w, [](int a, int b) { return a + b; }));
    add("product(v)", fold(w, [](int a, int b) { return int(unsigned(a) * unsigned(b)); }));
    add("max(v)", fold(w, [](int a, int b) { return std::max(a, b); }));
    add("min(v)", fold(w, [](int a, int b) { return std::min(a, b); }));
    add("and(v)", fold(w, [](int a, int b) { return a & b; }));
    add("or(v)", fold(w, [](int a, int b) { return a | b; }));
    add("xor(v)", fold(w, [](int a, int b) { return a ^ b; }));
    const auto plus = [](int a, int b) { return a + b; };
    const auto times = [](int a, int b) { return int(unsigned(a) * unsigned(b)); };
    add("prefix_inclusive_sum(v)", scan(w, false, 0, plus));
    add("prefix_exclusive_sum(v)", scan(w, true, 0, plus));
    add("prefix_inclusive_product(v)", scan(w, false, 1, times));
    add("prefix_exclusive_product(v)", scan(w, true, 1, times));
    add("shuffle(v, (lane * 5 + 3) % " + std::to_string(w) + ")",
        [w](const Lanes& all, int lane) -> std::optional<int> {
          const auto at = all.find(lane / w * w + (lane * 5 + 3) % w);
          return at == all.end() ? std::nullopt : std::optional<int>(at->second);
        });
    add("broadcast(v, 2)", from(w, [](int) { return 2; }));
    add("broadcast_first(v)", [w](const Lanes& all, int lane) -> std::optional<int> {
      return group_of(all, lane, w).begin()->second;
    });
    add("shuffle_up(v, 1)", from(w, [](int i) { return i - 1; }));
    add("shuffle_down(v, 2)", from(w, [w](int i) { return i + 2 < w ? i + 2 : -1; }));
    add("shuffle_xor(v, 3)", from(w, [](int i) { return i ^ 3; }));
    add("shuffle_rotate_up(v, 1)", from(w, [w](int i) { return (i + w - 1) % w; }));
    add("shuffle_rotate_down(v, 3)", from(w, [w](int i) { return (i + 3) % w; }));
    add("all(v > 0)", [w](const Lanes& all, int lane) -> std::optional<int> {
      for (const auto& [i, v] : group_of(all, lane, w))
        if (v <= 0) return 0;
      return 1;
    });
    add("any(v > 90)", [w](const Lanes& all, int lane) -> std::optional<int> {
      for (const auto& [i, v] : group_of(all, lane, w))
        if (v > 90) return 1;
      return 0;
    });
    add("is_first()", [w](const Lanes& all, int lane) -> std::optional<int> {
      return group_of(all, lane, w).begin()->first == lane;
    });
    const auto mask = [w](const Lanes& all, int lane) -> std::optional<int> {
      unsigned m = 0;
      for (const auto& [i, v] : group_of(all, lane, w)) m |= 1u << i % w;
      return int(m);
    };
    t.push_back({"int((" + p + "vote::vote_t)" + p + "active_threads_mask())", w, mask});
    t.push_back(
        {"int((" + p + "vote::vote_t)" + p + "ballot(v % 2 == 0))",
         w,
         [w](const Lanes& all, int lane) -> std::optional<int> {
           unsigned m = 0;
           for (const auto& [i, v] : group_of(all, lane, w))
             if (v % 2 == 0) m |= 1u << i % w;
           return int(m);
         }});
  }
  return t;
}

int value_of(int lane) {
  return (lane * 37 + 11) % 101 - 3;
}

/// `condition` splits the lanes; both sides evaluate all functions at their own places.
void check_groups(const std::string& condition, int threads, std::function<bool(int)> holds) {
  const auto table = group_functions();
  std::string side[2];
  for (int s = 0; s < 2; s++)
    for (size_t f = 0; f < table.size(); f++)
      side[s] += "out[" + std::to_string(f) + " * 32 + lane] = " + table[f].expression + ";\n";
  const Library library = build(
      "kernel void groups(const device int* in [[buffer(0)]], device int* out [[buffer(1)]], "
      "ushort lane [[thread_index_in_simdgroup]]) {\nint v = in[lane];\nif (" +
          condition + ") {\n" + side[0] + "} else {\n" + side[1] + "}\n}\n",
      "groups.metal");
  std::vector<int> values(32), result(table.size() * 32);
  for (int i = 0; i < 32; i++) values[size_t(i)] = value_of(i);
  Dispatch d;
  d.kernel = "groups";
  d.buffers = {in(0, values), out(1, result)};
  d.threads_per_grid = {uint32_t(threads), 1, 1};
  d.threads_per_threadgroup = {uint32_t(threads), 1, 1};
  const Report report = run(library, d);
  ASSERT_EQ(report.finding_count, 0u) << faults::describe(report);
  Lanes lanes[2];
  for (int i = 0; i < threads; i++) lanes[holds(i) ? 0 : 1][i] = value_of(i);
  int checked = 0;
  for (size_t f = 0; f < table.size(); f++)
    for (int i = 0; i < threads; i++) {
      const std::optional<int> expected = table[f].rule(lanes[holds(i) ? 0 : 1], i);
      if (!expected) continue;
      checked++;
      ASSERT_EQ(result[f * 32 + size_t(i)], *expected) << table[f].expression << " in lane " << i;
    }
  ASSERT_GT(checked, threads * int(table.size()) / 2);
}

TEST(GroupConformance, FullSimdgroup) {
  check_groups("true", 32, [](int) { return true; });
}
TEST(GroupConformance, RaggedSimdgroup) {
  check_groups("true", 23, [](int) { return true; });
}
TEST(GroupConformance, HalvesInTwoBranches) {
  check_groups("lane < 16", 32, [](int i) { return i < 16; });
}
TEST(GroupConformance, ScatteredLanesInTwoBranches) {
  check_groups("(lane * 7) % 5 < 3", 32, [](int i) { return i * 7 % 5 < 3; });
}

struct Program {
  const char* body;  ///< sets out[lane]
  std::function<int(int)> expected;
};

void check_program(const Program& p) {
  SCOPED_TRACE(p.body);
  std::vector<int> result(32);
  Dispatch d;
  d.kernel = "program";
  d.buffers = {out(0, result)};
  d.threads_per_grid = d.threads_per_threadgroup = {32, 1, 1};
  const Report report =
      run(build(
              "__attribute__((noinline)) int total(int v) { return simd_sum(v); }\n"
              "kernel void program(device int* out [[buffer(0)]], ushort lane "
              "[[thread_index_in_simdgroup]]) {\n" +
                  std::string(p.body) + "\n}\n",
              "program.metal"),
          d);
  ASSERT_EQ(report.finding_count, 0u) << faults::describe(report);
  for (int i = 0; i < 32; i++) EXPECT_EQ(result[size_t(i)], p.expected(i)) << "lane " << i;
}

// Control flow that diverges and joins again.
TEST(GroupConformance, DivergentPrograms) {
  // A branch, then all lanes together.
  check_program(
      {"int a = 0; if (lane < 8) a = simd_sum(1); out[lane] = a * 100 + simd_sum(1);",
       [](int i) { return (i < 8 ? 800 : 0) + 32; }});
  // One side returns early.
  check_program({"out[lane] = 7; if (lane % 4 == 1) return; out[lane] = simd_sum(1);", [](int i) {
                   return i % 4 == 1 ? 7 : 24;
                 }});
  // A helper that is called from two places is two places.
  check_program({"if (lane < 5) out[lane] = total(1); else out[lane] = total(1);", [](int i) {
                   return i < 5 ? 5 : 27;
                 }});
  // A loop that lanes leave one after another: lane i makes i + 1 rounds.
  check_program(
      {"int s = 0; for (int k = 0; k <= lane; k++) s += simd_sum(1); out[lane] = s;", [](int i) {
         int s = 0;
         for (int k = 0; k <= i; k++) s += 32 - k;
         return s;
       }});
  // Nested branches.
  check_program(
      {"int a = 1; if (lane < 16) { if (lane % 2) a = simd_sum(1); else a = simd_sum(2); } "
       "out[lane] = a + simd_max(a);",
       [](int i) { return (i < 16 ? (i % 2 ? 8 : 16) : 1) + 16; }});
  // while (true) with break.
  check_program(
      {"int n = 0; while (true) { n++; if (simd_sum(1) < 20 || n > lane) break; } out[lane] = n;",
       [](int i) { return std::min(i + 1, 14); }});
}

TEST(GroupConformance, FillingShufflesAndVectors) {
  std::vector<float> result(32 * 8);
  Dispatch d;
  d.kernel = "k";
  d.buffers = {out(0, result)};
  d.threads_per_grid = d.threads_per_threadgroup = {32, 1, 1};
  const Report report = run(
      build(
          "kernel void k(device float* out [[buffer(0)]], ushort lane "
          "[[thread_index_in_simdgroup]]) {\n"
          "float v = lane, f = 100 + lane; device float* o = out + lane * 8;\n"
          "o[0] = simd_shuffle_and_fill_up(v, f, 3); o[1] = simd_shuffle_and_fill_down(v, f, 5);\n"
          "o[2] = simd_shuffle_and_fill_up(v, f, 1, 8); o[3] = simd_shuffle_and_fill_down(v, f, 2, "
          "8);\n"
          "float2 s = simd_sum(float2(v, 1)); o[4] = s.x; o[5] = s.y;\n"
          "half4 h = simd_shuffle_xor(half4(lane), 1); o[6] = h.z; o[7] = simd_max(half(lane) * "
          "0.5h); }\n",
          "k.metal"),
      d);
  ASSERT_EQ(report.finding_count, 0u) << faults::describe(report);
  for (int i = 0; i < 32; i++) {
    const float* o = &result[size_t(i) * 8];
    EXPECT_EQ(o[0], i < 3 ? 100 + i + 29 : i - 3);
    EXPECT_EQ(o[1], i + 5 > 31 ? 100 + i + 5 - 32 : i + 5);
    EXPECT_EQ(o[2], i % 8 < 1 ? 100 + i + 7 : i - 1);
    EXPECT_EQ(o[3], i % 8 > 5 ? 100 + i - 6 : i + 2);
    EXPECT_EQ(o[4], 496);
    EXPECT_EQ(o[5], 32);
    EXPECT_EQ(o[6], i ^ 1);
    EXPECT_EQ(o[7], 15.5f);
  }
}

// A float sum is the tree i + (i + 16), then 8, 4, 2, 1: bit for bit.
TEST(GroupConformance, FloatSumHasOneOrder) {
  std::vector<float> x(32), result(32);
  for (size_t i = 0; i < 32; i++) x[i] = std::ldexp(1.0f + float(i) / 7.0f, int(i * 5 % 23) - 11);
  std::vector<float> tree = x;
  for (size_t s = 16; s; s /= 2)
    for (size_t i = 0; i < s; i++) tree[i] += tree[i + s];
  Dispatch d;
  d.kernel = "k";
  d.buffers = {in(0, x), out(1, result)};
  d.threads_per_grid = d.threads_per_threadgroup = {32, 1, 1};
  const Library library = build(
      "kernel void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]], uint i "
      "[[thread_position_in_grid]]) { y[i] = simd_sum(x[i]); }\n",
      "k.metal");
  for (const bool reverse : {false, true}) {
    d.reverse_order = reverse;
    run(library, d);
    for (size_t i = 0; i < 32; i++) EXPECT_EQ(result[i], tree[0]);
  }
}

// ---- simdgroup_matrix. Small integers: products and sums are exact in every type.
struct MatrixTypes {
  const char *in, *out;
  double out_limit;  ///< integers up to here are exact in the result's type
};
class MatrixConformance : public testing::TestWithParam<MatrixTypes> {};

TEST_P(MatrixConformance, LoadMultiplyStore) {
  const std::string t = GetParam().in, acc = GetParam().out;
  // Sources are floats; the kernel converts and stages them in threadgroup or device memory.
  const std::string text =
      "kernel void k(const device float* x [[buffer(0)]], device float* out [[buffer(1)]], "
      "device " +
      t +
      "* staged [[buffer(2)]], ushort lane [[thread_index_in_simdgroup]]) {\n"
      "threadgroup " +
      t +
      " shared[12 * 20];\n"
      "for (int i = lane; i < 240; i += 32) { shared[i] = " +
      t + "(x[i]); staged[i] = " + t +
      "(x[i]); }\n"
      "simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);\n"
      "simdgroup_matrix<" +
      t +
      ", 8, 8> a, b, at, ao;\n"
      "simdgroup_load(a, shared, 20); simdgroup_load(b, (const device " +
      t +
      "*)staged + 3, 20);\n"
      "simdgroup_load(at, shared, 20, ulong2(0, 0), true); simdgroup_load(ao, shared, 20, "
      "ulong2(5, 2));\n"
      "simdgroup_matrix<" +
      acc +
      ", 8, 8> c(2), p, q;\n"
      "simdgroup_multiply_accumulate(p, a, b, c); simdgroup_multiply(q, at, ao);\n"
      "ushort r = (lane >> 4 & 1) * 4 + (lane >> 1 & 3), k = (lane >> 3 & 1) * 4 + (lane & 1) * "
      "2;\n"
      "for (int e = 0; e < 2; e++) { out[r * 8 + k + e] = float(p.thread_elements()[e]);\n"
      "out[64 + r * 8 + k + e] = float(q.thread_elements()[e]); }\n"
      "threadgroup " +
      acc +
      " result[8 * 9];\n"
      "simdgroup_store(p, result, 9); simdgroup_barrier(mem_flags::mem_threadgroup);\n"
      "for (int i = lane; i < 64; i += 32) out[128 + i] = float(result[i / 8 * 9 + i % 8]);\n"
      "simdgroup_barrier(mem_flags::mem_threadgroup);\n"
      "simdgroup_store(q, result, 9, ulong2(0, 0), true); "
      "simdgroup_barrier(mem_flags::mem_threadgroup);\n"
      "for (int i = lane; i < 64; i += 32) out[192 + i] = float(result[i / 8 * 9 + i % 8]);\n"
      "simdgroup_matrix<" +
      acc + ", 8, 8> f = make_filled_simdgroup_matrix<" + acc +
      ", 8, 8>(3);\n"
      "out[256 + lane] = float(f.thread_elements()[0] + f.thread_elements()[1]);\n}\n";
  std::vector<float> x(240), result(288);
  std::vector<uint32_t> staged(240);  // room for any element type
  for (size_t i = 0; i < x.size(); i++) x[i] = float(int(i * 7 % 5) - 1);
  Dispatch d;
  d.kernel = "k";
  d.buffers = {in(0, x), out(1, result), out(2, staged)};
  d.threads_per_grid = d.threads_per_threadgroup = {32, 1, 1};
  const Report report = run(build(text, "k.metal"), d);
  ASSERT_EQ(report.finding_count, 0u) << faults::describe(report);
  const auto at = [&](int row, int column) { return double(x[size_t(row * 20 + column)]); };
  for (int r = 0; r < 8; r++)
    for (int c = 0; c < 8; c++) {
      double p = r == c ? 2 : 0, q = 0;
      for (int k = 0; k < 8; k++) {
        p += at(r, k) * at(k, c + 3);
        q += at(k, r) * at(k + 2, c + 5);
      }
      ASSERT_LE(std::fabs(p), GetParam().out_limit);
      EXPECT_EQ(result[size_t(r * 8 + c)], p);
      EXPECT_EQ(result[size_t(64 + r * 8 + c)], q);
      EXPECT_EQ(result[size_t(128 + r * 8 + c)], p);
      EXPECT_EQ(result[size_t(192 + c * 8 + r)], q);
    }
  for (size_t i = 0; i < 32; i++) EXPECT_EQ(result[256 + i], 6);
  EXPECT_EQ(report.counters.matrix_operations, 2u);
  EXPECT_EQ(report.counters.simdgroup_barriers, 4u);
}
INSTANTIATE_TEST_SUITE_P(
    ,
    MatrixConformance,
    testing::Values(
        MatrixTypes{"half", "float", 1 << 24},
        MatrixTypes{"bfloat", "float", 1 << 24},
        MatrixTypes{"float", "float", 1 << 24},
        MatrixTypes{"half", "half", 2048},
        MatrixTypes{"bfloat", "bfloat", 256}),
    [](const auto& info) { return std::string(info.param.in) + "_" + info.param.out; });

// ---- Atomics: each operation's old value and the value it leaves.
TEST(AtomicConformance, OldAndNewValues) {
  struct Case {
    const char *type, *operation;
    double start, old, left;
  };
  const std::vector<Case> table = {
      {"int", "atomic_fetch_add_explicit(&a, -3, memory_order_relaxed)", 5, 5, 2},
      {"uint", "atomic_fetch_sub_explicit(&a, 2u, memory_order_relaxed)", 5, 5, 3},
      {"int", "atomic_fetch_min_explicit(&a, -3, memory_order_relaxed)", 5, 5, -3},
      {"uint", "atomic_fetch_max_explicit(&a, 9u, memory_order_relaxed)", 5, 5, 9},
      {"int", "atomic_fetch_and_explicit(&a, 6, memory_order_relaxed)", 5, 5, 4},
      {"uint", "atomic_fetch_or_explicit(&a, 10u, memory_order_relaxed)", 5, 5, 15},
      {"int", "atomic_fetch_xor_explicit(&a, 1, memory_order_relaxed)", 5, 5, 4},
      {"int", "atomic_exchange_explicit(&a, 8, memory_order_relaxed)", 5, 5, 8},
      {"float", "atomic_fetch_add_explicit(&a, 1.5f, memory_order_relaxed)", 5, 5, 6.5},
      {"float", "atomic_fetch_sub_explicit(&a, 1.5f, memory_order_relaxed)", 5, 5, 3.5},
      {"float", "atomic_exchange_explicit(&a, 1.5f, memory_order_relaxed)", 5, 5, 1.5},
      {"bool", "atomic_exchange_explicit(&a, true, memory_order_relaxed)", 0, 0, 1},
      {"ulong", "(atomic_max_explicit(&a, 7ul, memory_order_relaxed), 0)", 5, 0, 7},
      {"ulong", "(atomic_min_explicit(&a, 3ul, memory_order_relaxed), 0)", 5, 0, 3},
      {"int", "atomic_load_explicit(&a, memory_order_relaxed)", 5, 5, 5},
      {"int", "(atomic_store_explicit(&a, 4, memory_order_relaxed), 0)", 5, 0, 4},
      {"int",
       "(expected = 5, atomic_compare_exchange_weak_explicit(&a, &expected, 6, "
       "memory_order_relaxed, "
       "memory_order_relaxed)) ? 10 + expected : expected",
       5,
       15,
       6},
      {"int",
       "(expected = 4, atomic_compare_exchange_weak_explicit(&a, &expected, 6, "
       "memory_order_relaxed, "
       "memory_order_relaxed)) ? 10 + expected : expected",
       5,
       5,
       5},
  };
  std::string body;
  for (size_t i = 0; i < table.size(); i++) {
    const std::string t = table[i].type;
    body += "{ threadgroup atomic<" + t +
            "> a; int expected = 0; (void)expected; atomic_store_explicit(&a, (" + t + ")" +
            std::to_string(table[i].start) + "f, memory_order_relaxed); out[" +
            std::to_string(2 * i) + "] = (float)(" + table[i].operation + "); out[" +
            std::to_string(2 * i + 1) +
            "] = (float)atomic_load_explicit(&a, memory_order_relaxed); }\n";
  }
  std::vector<float> result(2 * table.size());
  Dispatch d;
  d.kernel = "k";
  d.buffers = {out(0, result)};
  const Report report =
      run(build("kernel void k(device float* out [[buffer(0)]]) {\n" + body + "}\n", "k.metal"), d);
  ASSERT_EQ(report.finding_count, 0u) << faults::describe(report);
  for (size_t i = 0; i < table.size(); i++) {
    EXPECT_EQ(result[2 * i], table[i].old) << table[i].operation;
    EXPECT_EQ(result[2 * i + 1], table[i].left) << table[i].operation;
  }
  EXPECT_EQ(report.counters.atomics, 3 * table.size());
}

}  // namespace
}  // namespace metal_emulator::conformance
