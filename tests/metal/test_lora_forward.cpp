// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The forward kernels, as MLX would hand them to Apple's compiler, on the emulator: every format
// and type against an f64 reference at derived bounds, with all of the emulator's checks on; and
// their traffic, counted.
#include <gmock/gmock.h>

#include "tests/metal/direct.h"
#include "tests/metal/lora_case.h"

namespace metal_lora::test {
namespace {

using metal::Form;
using metal::LoraShape;

LoraShape shape_of(uint32_t m, uint32_t n, uint32_t k, uint32_t rank, DType dtype = DType::f16) {
  LoraShape s;
  s.m = m;
  s.n = n;
  s.k = k;
  s.rank = rank;
  s.scale = 1.5f;
  s.dtype = dtype;
  s.lora_dtype = dtype;
  s.format = dtype == DType::f32   ? WeightFormat::f32
             : dtype == DType::f16 ? WeightFormat::f16
                                   : WeightFormat::bf16;
  s.form = Form::fused;
  return s;
}

/// What a row of the tables below varies; k follows from the format.
struct Row {
  DType x;
  WeightFormat w;
  uint32_t group;  ///< affine formats
  DType scales, a;
  bool nested, bias, u;
  uint32_t m, rank;
};

constexpr DType kF = DType::f32, kH = DType::f16, kB = DType::bf16;
using F = WeightFormat;

/// Each format with each form, each type of x with each of A, of scales with x; flags, tokens and
/// ranks in turn. (Every pair, not every product: each row is a text to compile.)
const Row kVectorRows[] = {
    {kF, F::f32, 0, kF, kH, false, true, true, 1, 5},
    {kH, F::f16, 0, kF, kB, false, true, false, 2, 256},
    {kB, F::bf16, 0, kF, kF, false, false, true, 4, 1},
    {kB, F::f16, 0, kF, kB, false, false, false, 8, 16},  // no matrix unit takes the mixture
    {kH, F::int4, 32, kH, kF, false, false, true, 5, 3},
    {kB, F::int4, 128, kB, kH, false, true, false, 1, 64},
    {kF, F::int8, 64, kF, kB, false, false, false, 3, 8},
    {kH, F::nf4, 0, kF, kH, false, true, false, 7, 16},
    {kF, F::nf4, 0, kF, kF, true, false, true, 2, 4},
};
const Row kTiledRows[] = {
    {kF, F::f32, 0, kF, kB, false, true, true, 33, 5},
    {kH, F::f16, 0, kF, kH, false, true, false, 40, 16},
    {kB, F::bf16, 0, kF, kF, false, false, true, 9, 12},
    {kH, F::bf16, 0, kF, kH, false, false, true, 35, 8},
    {kH, F::int4, 64, kF, kH, false, true, false, 34, 16},
    {kB, F::int4, 128, kB, kF, false, false, false, 40, 33},
    {kF, F::int8, 32, kH, kH, false, false, true, 11, 64},
    {kF, F::nf4, 0, kF, kB, false, true, false, 33, 3},
    {kB, F::nf4, 0, kF, kB, true, false, true, 12, 8},
};

LoraShape shape_of(const Row& row, Form form) {
  const uint32_t n = row.nested ? 70 : 37 + row.m;  // nested: two absmax2
  const uint32_t k = row.w == F::nf4 ? 320 : row.group > 0 ? 3 * row.group : 203;
  LoraShape s = shape_of(row.m, n, k, row.rank, row.x);
  s.format = row.w;
  s.group_size = row.group;
  s.scales_dtype = row.scales;
  s.double_quant = row.nested;
  s.lora_dtype = row.a;
  s.has_bias = row.bias;
  s.form = form;
  s.wants_u = row.u && form == Form::fused;
  return s;
}

template <size_t N>
std::vector<LoraShape> fused(const Row (&rows)[N]) {
  std::vector<LoraShape> out;
  for (const Row& row : rows) out.push_back(shape_of(row, Form::fused));
  return out;
}

/// Two dispatches, with ranks that the fused tiled form does not take. Shapes of the traffic tests,
/// whose texts they share, among them.
std::vector<LoraShape> split() {
  LoraShape int4 = shape_of(1, 1024, 384, 8);
  int4.format = F::int4;
  int4.group_size = 128;
  int4.scales_dtype = kH;
  LoraShape nested = shape_of(8, 70, 320, 8);
  nested.format = F::nf4;
  nested.double_quant = true;
  LoraShape rank = shape_of(kTiledRows[2], Form::split);
  rank.rank = 256;
  LoraShape wide = shape_of(kTiledRows[4], Form::split);
  wide.n = 520;
  std::vector<LoraShape> out = {
      shape_of(kVectorRows[1], Form::split),
      int4,
      nested,
      rank,
      wide,
      shape_of(kTiledRows[8], Form::split)};
  for (auto& s : out) s.form = Form::split;
  return out;
}

/// One to eight tokens in the texts of 1, 2, 4 and 8, ranks that share a text.
std::vector<LoraShape> same_texts() {
  std::vector<LoraShape> out;
  for (const uint32_t m : {5u, 6u}) {
    out.push_back(shape_of(kVectorRows[7], Form::fused));
    out.back().m = m;
  }
  for (const auto& [row, rank] : {std::pair{1, 40u}, {1, 33u}, {2, 32u}, {4, 1u}, {0, 8u}}) {
    out.push_back(shape_of(kVectorRows[row], Form::fused));
    out.back().rank = rank;
  }
  for (const auto& [row, rank] : {std::pair{0, 1u}, {0, 8u}, {1, 9u}, {6, 33u}}) {
    out.push_back(shape_of(kTiledRows[row], Form::fused));
    out.back().rank = rank;
  }
  return out;
}

std::vector<LoraShape> without_adapter() {
  LoraShape plain = shape_of(35, 45, 50, 0, DType::bf16);
  plain.form = Form::automatic;
  LoraShape packed = plain;
  packed.m = 3;
  packed.format = WeightFormat::int4;
  packed.group_size = 64;
  packed.k = 128;
  packed.has_bias = true;
  return {plain, packed};
}

/// Arrays of fewer than eight elements arrive in another address space.
std::vector<LoraShape> tiny() {
  LoraShape one = shape_of(1, 1, 1, 1, DType::f32);
  one.has_bias = true;
  LoraShape split = shape_of(2, 3, 2, 2);
  split.form = Form::split;
  LoraShape nested = shape_of(1, 2, 64, 1);
  nested.format = WeightFormat::nf4;
  nested.double_quant = true;
  return {one, split, nested};
}

std::vector<LoraShape> long_rows() {
  LoraShape chunks = shape_of(5, 9, 2500, 8);              // several chunks of x
  LoraShape passes = shape_of(1, 64 * 64 * 2 + 3, 40, 4);  // several strips for each threadgroup
  LoraShape both = shape_of(5, 64 * 32 * 2 + 3, 2100, 2);
  LoraShape packed = shape_of(3, 10, 2176, 8, DType::f32);
  packed.format = WeightFormat::int8;
  packed.group_size = 64;
  packed.lora_dtype = DType::bf16;
  return {chunks, passes, both, packed};
}

class Forward : public testing::TestWithParam<LoraShape> {};

TEST_P(Forward, IsWithinTheRoundingBound) {
  expect_forward(GetParam());
}

std::string name_of(const testing::TestParamInfo<LoraShape>& info) {
  return case_name(info.param);
}

#define METAL_LORA_FORWARD(name, ...) \
  INSTANTIATE_TEST_SUITE_P(name, Forward, testing::ValuesIn(__VA_ARGS__), name_of)

METAL_LORA_FORWARD(Vector, fused(kVectorRows));
METAL_LORA_FORWARD(Tiled, fused(kTiledRows));
METAL_LORA_FORWARD(Split, split());
METAL_LORA_FORWARD(SameTexts, same_texts());
METAL_LORA_FORWARD(Base, without_adapter());
METAL_LORA_FORWARD(Tiny, tiny());
METAL_LORA_FORWARD(LongRows, long_rows());

// The most threadgroup memory.
METAL_LORA_FORWARD(WideTiles, std::vector{shape_of(65, 513, 33, 32, DType::f32)});

std::vector<LoraShape> with_dropout() {
  LoraShape fused = shape_of(40, 30, 100, 40, DType::f32);
  fused.dropout = 0.3f;
  fused.dropout_seed = 0x123456789abcdef0ull;
  fused.wants_u = true;
  LoraShape split = shape_of(3, 30, 100, 12);
  split.lora_dtype = DType::f32;
  split.dropout = 0.3f;
  split.dropout_seed = fused.dropout_seed;
  split.form = Form::split;
  return {fused, split};
}
METAL_LORA_FORWARD(Dropout, with_dropout());

// A = I and x = 1: u is the mask itself, times 1 / (1 - p).
TEST(ForwardDropout, DrawsTheCpusMaskBitForBit) {
  LoraShape s = shape_of(37, 8, 64, 64, DType::f32);
  s.dropout = 0.4f;
  s.dropout_seed = 77;
  s.wants_u = true;
  LoraCase c(s);
  std::vector<float> identity(64 * 64);
  for (int i = 0; i < 64; ++i) identity[i * 65] = 1.0f;
  c.set("a", c.a, identity, DType::f32);
  c.set("x", c.x, std::vector<float>(37 * 64, 1.0f), DType::f32);
  const auto u = values(run(plan_lora_forward(s), c.arrays, lora_outputs(s)).at("u"));
  for (size_t i = 0; i < u.size(); ++i) {
    ASSERT_EQ(u[i] != 0.0, c.keep.values[i] != 0.0) << "element " << i;
  }
}

// ---- order
// ---------------------------------------------------------------------------------------

/// Runs the plans straight on the emulator, each with the earlier ones' outputs.
ops::metal_ops::NamedArrays run_in_order(
    const std::vector<metal::Plan>& plans,
    ops::metal_ops::NamedArrays arrays,
    const ops::metal_ops::NamedOutputs& outputs,
    bool reverse) {
  for (const auto& plan : plans) {
    DirectDispatch direct(plan, arrays, outputs);
    metal_emulator::CompileOptions options;
    options.file_name = std::string(plan.entry->name) + ".metal";  // the launch layer's: one text
    const auto result = direct.run(
        metal_emulator::compile(direct.text(), options),
        [&](metal_emulator::Dispatch& dispatch) { dispatch.reverse_order = reverse; });
    EXPECT_EQ(result.report.finding_count, 0u);
    for (const auto& [name, array] : result.outputs) arrays.insert_or_assign(name, array);
  }
  return arrays;
}

class ForwardOrder : public testing::TestWithParam<LoraShape> {};

// Threadgroups and simdgroups scheduled first to last or last to first: the same bits.
TEST_P(ForwardOrder, DoesNotChangeABit) {
  const LoraCase c(GetParam());
  const auto plans = plan_lora_forward(GetParam());
  const auto outputs = lora_outputs(GetParam());
  const auto forth = run_in_order(plans, c.arrays, outputs, false),
             back = run_in_order(plans, c.arrays, outputs, true);
  EXPECT_EQ(values(forth.at("y")), values(back.at("y")));
}

std::vector<LoraShape> orders() {
  return {
      shape_of(kVectorRows[4], Form::fused),
      shape_of(kTiledRows[0], Form::fused),
      shape_of(kVectorRows[1], Form::split)};
}
INSTANTIATE_TEST_SUITE_P(Forms, ForwardOrder, testing::ValuesIn(orders()), name_of);

// ---- traffic
// -------------------------------------------------------------------------------------

struct Traffic {
  uint64_t issued = 0, unique = 0;
  double ratio() const { return static_cast<double>(issued) / static_cast<double>(unique); }
};

struct Counted {
  std::vector<EmulatedDispatch> dispatches;

  /// Reads (or, for an output, writes) of the buffers of that name, all dispatches together; each
  /// array is unique once.
  Traffic traffic(const std::string& name) const {
    Traffic out;
    for (const auto& d : dispatches) {
      for (const auto& b : d.report.counters.buffers) {
        if (d.buffer_names.at(b.index) != name) continue;
        out.issued += b.read_bytes + b.written_bytes;
        out.unique = std::max(out.unique, b.unique_read_bytes + b.unique_written_bytes);
      }
    }
    return out;
  }
};

Counted counted(const LoraShape& shape) {
  const LoraCase c(shape);
  EmulatorLog log;
  const auto arrays = run(metal::plan_lora_forward(shape), c.arrays, lora_outputs(shape));
  return {log.take()};
}

class DecodeTraffic : public testing::TestWithParam<uint32_t> {};

// The decode shape: W, A and B cross the bus once. In one dispatch A is read by each threadgroup.
TEST_P(DecodeTraffic, ReadsTheWeightsOnce) {
  LoraShape s = shape_of(GetParam(), 256, 256, 16);
  s.form = Form::split;
  const auto split = counted(s);
  ASSERT_EQ(split.dispatches.size(), 2u);
  EXPECT_LE(split.traffic("w").ratio(), 1.02);
  EXPECT_LE(split.traffic("a").ratio(), 1.1);
  EXPECT_LE(split.traffic("b").ratio(), 1.1);
  EXPECT_EQ(split.traffic("w").unique, 2u * 256 * 256);
  EXPECT_EQ(split.traffic("y").issued, 2u * 256 * GetParam());

  s.form = Form::fused;
  const auto fused = counted(s);
  ASSERT_EQ(fused.dispatches.size(), 1u);
  EXPECT_LE(fused.traffic("w").ratio(), 1.02);
  EXPECT_LE(fused.traffic("b").ratio(), 1.1);
  const auto threadgroups = fused.dispatches[0].report.counters.threadgroups;
  EXPECT_EQ(fused.traffic("a").issued, threadgroups * fused.traffic("a").unique);
  EXPECT_EQ(threadgroups, GetParam() > 4 ? 8u : 4u);
  EXPECT_EQ(fused.traffic("y").issued, 2u * 256 * GetParam());
}
INSTANTIATE_TEST_SUITE_P(Tokens, DecodeTraffic, testing::Values(1, 8));

/// Bytes of a weight's parts, issued and unique.
Traffic weight_traffic(const Counted& all) {
  Traffic sum;
  for (const char* part : {"w", "scales", "biases"}) {
    const Traffic one = all.traffic(part);
    sum.issued += one.issued;
    sum.unique += one.unique;
  }
  return sum;
}

struct PackedDecode {
  uint32_t m;
  bool nf4, split;
};
class PackedTraffic : public testing::TestWithParam<PackedDecode> {};

// 4-bit weights against half's 2 bytes each, as issued: scales of 16 bits in groups of 128, or
// NF4's 8-bit absmax, whose 257 codes each threadgroup copies (at most 3.5 % of the weight, see
// most_threadgroups) and whose absmax2 are read once for the blocks that a simdgroup takes at once
// (4 bytes for 16 blocks of 33: 0.8 %).
TEST_P(PackedTraffic, IsAQuarterOfHalfs) {
  const auto [m, nf4, split] = GetParam();
  LoraShape s = shape_of(m, 1024, 1024, 8);
  s.form = split ? Form::split : Form::fused;
  s.format = nf4 ? WeightFormat::nf4 : WeightFormat::int4;
  s.double_quant = nf4;
  if (!nf4) s.group_size = 128;
  s.scales_dtype = nf4 ? DType::f32 : DType::f16;
  const auto all = counted(s);
  EXPECT_EQ(all.traffic("w").ratio(), 1.0);
  EXPECT_EQ(all.traffic("scales").ratio(), 1.0);
  const Traffic weight = weight_traffic(all);
  EXPECT_LE(weight.ratio(), nf4 ? 1.045 : 1.0);
  EXPECT_LE(static_cast<double>(weight.issued) / (2.0 * 1024 * 1024), 0.27);
}
INSTANTIATE_TEST_SUITE_P(
    Decode,
    PackedTraffic,
    testing::Values(
        PackedDecode{1, false, true}, PackedDecode{1, true, true}, PackedDecode{8, true, true}),
    [](const auto& info) {
      return "m" + std::to_string(info.param.m) + (info.param.nf4 ? "_nf4_nested" : "_int4") +
             (info.param.split ? "_split" : "_fused");
    });

// Products on the matrix units, and the others: scale and bias of each element, and a packed
// weight's own multiply-add each time a row of tiles dequantises it.
TEST(TiledProducts, AreMadeByTheMatrixUnits) {
  for (const bool packed : {false, true}) {
    LoraShape s = shape_of(128, 128, 256, 16);
    s.has_bias = true;
    if (packed) {
      s.format = WeightFormat::int4;
      s.group_size = 64;
    }
    const auto all = counted(s);
    ASSERT_EQ(all.dispatches.size(), 1u);
    const auto& counters = all.dispatches[0].report.counters;
    const double on_units = 512.0 * static_cast<double>(counters.matrix_operations);
    // At least the products that the formula needs; more where tiles repeat x·Aᵀ.
    EXPECT_GE(on_units, 128.0 * (128 * 256 + 16 * 256 + 128 * 16));
    const double others = 128.0 * 128 * 2 + (packed ? 128.0 * 256 * 2 : 0.0);
    EXPECT_GE(on_units / (on_units + others), 0.95);
  }
}

// ---- plans
// ---------------------------------------------------------------------------------------

TEST(ForwardPlan, FusesWhereLittleIsRepeatedAndSplitsElsewhere) {
  LoraShape s = shape_of(1, 4096, 4096, 16);
  s.form = Form::automatic;
  EXPECT_EQ(plan_lora_forward(s).size(), 1u);
  EXPECT_THAT(plan_lora_forward(s)[0].why, testing::HasSubstr("one dispatch"));
  s.rank = 64;
  ASSERT_EQ(plan_lora_forward(s).size(), 2u);
  EXPECT_THAT(plan_lora_forward(s)[1].why, testing::HasSubstr("two dispatches"));
  s.m = 128;
  s.rank = 16;
  EXPECT_EQ(plan_lora_forward(s).size(), 1u);
  s.rank = 32;
  EXPECT_EQ(plan_lora_forward(s).size(), 2u);
}

TEST(ForwardPlan, RefusesByName) {
  const auto expect_refused = [](const LoraShape& s, const char* text) {
    try {
      plan_lora_forward(s);
      FAIL() << "accepted; should name " << text;
    } catch (const std::invalid_argument& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr(text));
    }
  };
  const LoraShape good = shape_of(16, 64, 96, 8);
  LoraShape s = good;
  s.rank = 257;
  expect_refused(s, "rank must be at most 256 but is 257");
  s = good;
  s.rank = 65;
  expect_refused(s, "rank is 65");
  s = good;
  s.rank = 0;
  s.wants_u = true;
  expect_refused(s, "rank must be at least 1");
  s = good;
  s.dropout = 1.0f;
  expect_refused(s, "dropout");
  s = good;
  s.format = WeightFormat::int4;
  s.group_size = 48;
  expect_refused(s, "group size must be 32, 64 or 128 but is 48");
  s.group_size = 64;
  expect_refused(s, "k must be a multiple of 64 but is 96");
  s.group_size = 32;
  s.double_quant = true;
  expect_refused(s, "double-quantised");
  s = good;
  s.format = WeightFormat::nf4;
  expect_refused(s, "k must be a multiple of 64 but is 96");
  s = good;
  s.m = 1u << 31;
  expect_refused(s, "2^32");
  s.m = 0;
  expect_refused(s, "x must have");
}

}  // namespace
}  // namespace metal_lora::test
