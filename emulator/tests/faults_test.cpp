// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstring>
#include <random>

#include "tests/fault_harness.h"

namespace metal_emulator::faults {
namespace {

const std::string kFolder = std::string(METAL_EMULATOR_SOURCE_FOLDER) + "/tests/kernels/";

Subject subject_of(const std::string& file) {
  Subject subject;
  subject.text = read_text(kFolder + file);
  subject.options.file_name = file;
  return subject;
}

// ---- C = A·B on the matrix units. Integers up to 4: every sum is exact in half and float.
constexpr uint32_t kM = 64, kN = 64, kK = 64;

Outcome run_gemm(const Library& library) {
  std::vector<uint16_t> a(kM * kK), b(kK * kN);
  std::vector<float> c(kM * kN);
  // 0, 1, 2, 4 as half.
  constexpr uint16_t kHalf[] = {0, 0x3c00, 0x4000, 0x4400};
  constexpr float kValue[] = {0, 1, 2, 4};
  std::mt19937 random(7);
  std::vector<int> ia(a.size()), ib(b.size());
  for (size_t i = 0; i < a.size(); i++) a[i] = kHalf[ia[i] = int(random() % 4)];
  for (size_t i = 0; i < b.size(); i++) b[i] = kHalf[ib[i] = int(random() % 4)];
  const uint32_t shape[] = {kM, kN, kK};
  Dispatch d;
  d.kernel = "gemm";
  d.buffers = {
      {0, a.data(), a.size() * 2, true},
      {1, b.data(), b.size() * 2, true},
      {2, c.data(), c.size() * 4, false},
      {3, const_cast<uint32_t*>(shape), sizeof shape, true}};
  d.threads_per_grid = {kN / 32 * 128, kM / 32, 1};
  d.threads_per_threadgroup = {128, 1, 1};
  Outcome outcome{run(library, d), true};
  for (uint32_t i = 0; i < kM; i++)
    for (uint32_t j = 0; j < kN; j++) {
      float sum = 0;
      for (uint32_t k = 0; k < kK; k++) sum += kValue[ia[i * kK + k]] * kValue[ib[k * kN + j]];
      outcome.right &= sum == c[i * kN + j];
    }
  return outcome;
}

Subject gemm() {
  Subject s = subject_of("gemm.metal");
  s.run = run_gemm;
  return s;
}

const Fault kGemmFaults[] = {
    {"no barrier before the tiles are overwritten",
     "threadgroup_barrier(mem_flags::mem_threadgroup);  // before",
     "// before",
     FindingKind::race_threadgroup},
    {"no barrier after the tiles are written",
     "threadgroup_barrier(mem_flags::mem_threadgroup);  // after",
     "// after",
     FindingKind::race_threadgroup},
    {"a simdgroup barrier where a threadgroup barrier belongs",
     "threadgroup_barrier(mem_flags::mem_threadgroup);  // after",
     "simdgroup_barrier(mem_flags::mem_threadgroup);  // after",
     FindingKind::race_threadgroup},
    {"a barrier that does not order threadgroup memory",
     "threadgroup_barrier(mem_flags::mem_threadgroup);  // after",
     "threadgroup_barrier(mem_flags::mem_device);  // after",
     FindingKind::race_threadgroup},
    {"one threadgroup too many rows",
     "const uint row0 = group.y * kTile,",
     "const uint row0 = (group.y + 1) * kTile,",
     FindingKind::out_of_bounds},
    {"reads behind the end of B",
     "(b + (k0 + r) * shape.n + column0 + q)",
     "(b + (k0 + r) * shape.n + column0 + q + 4)",
     FindingKind::out_of_bounds},
    {"misaligned vector load",
     "(a + (row0 + r) * shape.k + k0 + q)",
     "(a + (row0 + r) * shape.k + (k0 + q ^ 1))",
     FindingKind::misaligned_access},
    {"all threadgroups write the same tile",
     "c + (row0 + block_row + 8 * i) * shape.n + column0 +",
     "c + (block_row + 8 * i) * shape.n +",
     FindingKind::race_device},
    {"two simdgroups store one block",
     "c + (row0 + block_row + 8 * i) * shape.n + column0 + block_column + 8 * j",
     "c + (row0 + block_row + 8 * i) * shape.n + column0 + 8 * j",
     FindingKind::race_device},
    {"half of the lanes multiply",
     "          simdgroup_multiply_accumulate(",
     "          if (thread_index % 32 < 16) simdgroup_multiply_accumulate(",
     FindingKind::divergent_matrix_operation},
    {"a barrier for some threads",
     "    for (short kk = 0; kk < kDepth; kk += 8) {",
     "    if (thread_index < 40) threadgroup_barrier(mem_flags::mem_threadgroup);\n"
     "    for (short kk = 0; kk < kDepth; kk += 8) {",
     FindingKind::divergent_barrier},
    {"a quarter of tile A is never loaded",
     "    {\n      const short r = thread_index / 4,",
     "    if (thread_index < 96) {\n      const short r = thread_index / 4,",
     FindingKind::uninitialized_read},
    {"tile A is one row short",
     "threadgroup half tile_a[kTile * kStrideA];",
     "threadgroup half tile_a[(kTile - 1) * kStrideA];",
     FindingKind::out_of_bounds},
    {"writes its input",
     "  for (short i = 0; i < 2; i++)\n    for (short j = 0; j < 2; j++)\n      simdgroup_store(",
     "  *(device half*)(uintptr_t)a = 0;\n"
     "  for (short i = 0; i < 2; i++)\n    for (short j = 0; j < 2; j++)\n      simdgroup_store(",
     FindingKind::write_to_read_only},
    {"multiplies by the transpose",
     "right[j], tile_b + kk * kStrideB + block_column + 8 * j, kStrideB)",
     "right[j], tile_b + kk * kStrideB + block_column + 8 * j, kStrideB, ulong2(0, 0), true)",
     std::nullopt},
    {"the sum starts at one",
     "make_filled_simdgroup_matrix<float, 8, 8>(0.0f)",
     "make_filled_simdgroup_matrix<float, 8, 8>(1.0f)",
     std::nullopt},
    {"the address differs between lanes",
     "simdgroup_load(left[i], tile_a + (block_row",
     "simdgroup_load(left[i], tile_a + thread_index % 2 + (block_row",
     FindingKind::undefined_behavior},
};

// ---- Sums of rows.
Outcome run_row_sum(const Library& library) {
  constexpr uint32_t kRows = 3, kColumns = 300;
  std::vector<float> x(kRows * kColumns), sums(kRows);
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 17);  // exact in any order
  uint32_t columns = kColumns;
  Dispatch d;
  d.kernel = "row_sum";
  d.buffers = {
      {0, x.data(), x.size() * 4, true},
      {1, sums.data(), sums.size() * 4, false},
      {2, &columns, 4, true}};
  d.threads_per_grid = {kRows * 96, 1, 1};
  d.threads_per_threadgroup = {96, 1, 1};
  Outcome outcome{run(library, d), true};
  for (uint32_t r = 0; r < kRows; r++) {
    float sum = 0;
    for (uint32_t c = 0; c < kColumns; c++) sum += x[r * kColumns + c];
    outcome.right &= sum == sums[r];
  }
  return outcome;
}

Subject row_sum() {
  Subject s = subject_of("reduction.metal");
  s.run = run_row_sum;
  return s;
}

const Fault kReductionFaults[] = {
    {"no barrier between partial sums and their sum",
     "  threadgroup_barrier(mem_flags::mem_threadgroup);\n",
     "",
     FindingKind::race_threadgroup},
    {"sums partial sums that no simdgroup wrote",
     "sum = lane < simdgroups ? partial[lane] : 0.0f;",
     "sum = partial[lane];",
     FindingKind::uninitialized_read},
    {"one column too many",
     "for (uint c = thread_index; c < columns;",
     "for (uint c = thread_index; c <= columns + row;",
     FindingKind::out_of_bounds},
    {"all lanes write their partial sum",
     "if (lane == 0) partial[simdgroup_index] = sum;",
     "partial[simdgroup_index] = sum;",
     FindingKind::race_threadgroup},
    {"an index outside the array",
     "if (lane == 0) partial[simdgroup_index] = sum;",
     "if (lane == 0) partial[simdgroup_index + 30] = sum;",
     FindingKind::undefined_behavior},
    {"all threadgroups write one sum",
     "if (lane == 0) sums[row] = sum;",
     "if (lane == 0) sums[0] = sum;",
     FindingKind::race_device},
    {"returns before the barrier",
     "  float sum = 0.0f;",
     "  if (thread_index >= 64) return;\n  float sum = 0.0f;",
     FindingKind::divergent_barrier},
    {"an address far outside",
     "sum += x[row * columns + c];",
     "sum += x[row * columns + c + 0x40000000ul];",
     FindingKind::out_of_bounds},
    {"a negative index",
     "sum += x[row * columns + c];",
     "sum += x[row * columns + c - 1];",
     FindingKind::out_of_bounds},
    {"divides by zero",
     "sum += x[row * columns + c];",
     "sum += x[row * columns + c + c / (columns - 300)];",
     FindingKind::undefined_behavior},
    {"shifts by more than the type holds",
     "sum += x[row * columns + c];",
     "sum += x[row * columns + (c & (1u << (columns - 260)) ? 0 : c)];",
     FindingKind::undefined_behavior},
    {"the product of lanes instead of their sum",
     "  sum = simd_sum(sum);\n  if (lane == 0) partial",
     "  sum = simd_product(sum);\n  if (lane == 0) partial",
     std::nullopt},
    {"a sum that leaves lanes out",
     "  sum = simd_sum(sum);\n  if (lane == 0) partial",
     "  if (lane != 7) sum = simd_sum(sum);\n  if (lane == 0) partial",
     std::nullopt},
};

// ---- Atomics in threadgroup and device memory.
Outcome run_histogram(const Library& library) {
  constexpr uint32_t kSize = 1000;
  std::vector<uint8_t> values(kSize);
  std::vector<uint32_t> counts(64), expected(64);
  for (uint32_t i = 0; i < kSize; i++) {
    values[i] = uint8_t(i * i % 251);
    expected[values[i] % 64]++;
  }
  uint32_t size = kSize;
  Dispatch d;
  d.kernel = "histogram";
  d.buffers = {
      {0, values.data(), values.size(), true},
      {1, counts.data(), counts.size() * 4, true},
      {2, &size, 4, true}};
  d.threads_per_grid = {1024, 1, 1};
  d.threads_per_threadgroup = {256, 1, 1};
  Outcome outcome{run(library, d), true};
  outcome.right = counts == expected;
  return outcome;
}

Subject histogram() {
  Subject s = subject_of("histogram.metal");
  s.run = run_histogram;
  return s;
}

const Fault kHistogramFaults[] = {
    {"counts without atomics in threadgroup memory",
     "atomic_fetch_add_explicit(&group_counts[values[position] % 64], 1u, memory_order_relaxed);",
     "((threadgroup uint*)group_counts)[values[position] % 64] += 1;",
     FindingKind::race_threadgroup},
    {"counts without atomics in device memory",
     "atomic_fetch_add_explicit(&counts[thread_index], count, memory_order_relaxed);",
     "((device uint*)counts)[thread_index] += count;",
     FindingKind::race_device},
    {"no guard against the end of the values",
     "  if (position < size)\n",
     "",
     FindingKind::out_of_bounds},
    {"clears half of the counters",
     "if (thread_index < 64) atomic_store_explicit(",
     "if (thread_index < 32) atomic_store_explicit(",
     FindingKind::uninitialized_read},
    {"clears with a plain store and no barrier",
     "  if (thread_index < 64) atomic_store_explicit(&group_counts[thread_index], 0u, "
     "memory_order_relaxed);\n"
     "  threadgroup_barrier(mem_flags::mem_threadgroup);\n",
     "  if (thread_index < 64) ((threadgroup uint*)group_counts)[thread_index] = 0;\n",
     FindingKind::race_threadgroup},
    {"waits for a later threadgroup",
     "  threadgroup atomic_uint group_counts[64];",
     "  while (position == 0 && atomic_load_explicit(&counts[5], memory_order_relaxed) == 0) {}\n"
     "  threadgroup atomic_uint group_counts[64];",
     FindingKind::deadlock},
};

class GemmFaults : public testing::TestWithParam<Fault> {};
TEST_P(GemmFaults, IsFound) {
  expect_found(gemm(), GetParam());
}
INSTANTIATE_TEST_SUITE_P(, GemmFaults, testing::ValuesIn(kGemmFaults), test_name);
class ReductionFaults : public testing::TestWithParam<Fault> {};
TEST_P(ReductionFaults, IsFound) {
  expect_found(row_sum(), GetParam());
}
INSTANTIATE_TEST_SUITE_P(, ReductionFaults, testing::ValuesIn(kReductionFaults), test_name);
class HistogramFaults : public testing::TestWithParam<Fault> {};
TEST_P(HistogramFaults, IsFound) {
  expect_found(histogram(), GetParam());
}
INSTANTIATE_TEST_SUITE_P(, HistogramFaults, testing::ValuesIn(kHistogramFaults), test_name);

TEST(CleanKernels, HaveNoFindings) {
  expect_clean(gemm());
  expect_clean(row_sum());
  expect_clean(histogram());
}

TEST(Plant, RefusesWhatDoesNotOccurOnce) {
  EXPECT_EQ(plant("a b c", {"", "b", "x", {}}), "a x c");
  EXPECT_THROW(plant("a b c", {"", "d", "x", {}}), std::runtime_error);
  EXPECT_THROW(plant("a b b", {"", "b", "x", {}}), std::runtime_error);
  EXPECT_THROW(plant("a b c", {"", "b", "b", {}}), std::runtime_error);
}

}  // namespace
}  // namespace metal_emulator::faults
