// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The forward kernels, as MLX would hand them to Apple's compiler, on the emulator: every format
// and type against an f64 reference at derived bounds, with all of the emulator's checks on; and
// their traffic, counted.
#include <gmock/gmock.h>

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

/// Types of x, W, A: all equal, and mixtures that the matrix units have no instruction for.
std::vector<LoraShape> dense_types(uint32_t m, uint32_t n, uint32_t k, uint32_t rank) {
  using F = WeightFormat;
  using D = DType;
  struct Types {
    D x;
    F w;
    D a;
  };
  std::vector<LoraShape> out;
  for (const Types t :
       {Types{D::f32, F::f32, D::f32},
        Types{D::f16, F::f16, D::f16},
        Types{D::bf16, F::bf16, D::bf16},
        Types{D::bf16, F::bf16, D::f32},
        Types{D::f16, F::bf16, D::f16},
        Types{D::f32, F::f16, D::bf16},
        Types{D::bf16, F::f32, D::f16}}) {
    LoraShape s = shape_of(m, n, k, rank, t.x);
    s.format = t.w;
    s.lora_dtype = t.a;
    s.has_bias = true;
    s.wants_u = true;
    out.push_back(s);
  }
  return out;
}

std::vector<LoraShape> packed_types(uint32_t m, uint32_t n, uint32_t rank) {
  std::vector<LoraShape> out;
  const auto add = [&](DType dtype, WeightFormat format, uint32_t group, DType scales) {
    LoraShape s = shape_of(m, n, format == WeightFormat::nf4 ? 320 : 3 * group, rank, dtype);
    s.format = format;
    s.group_size = format == WeightFormat::nf4 ? 0 : group;
    s.scales_dtype = scales;
    out.push_back(s);
  };
  add(DType::f16, WeightFormat::int4, 32, DType::f16);
  add(DType::bf16, WeightFormat::int4, 64, DType::bf16);
  add(DType::f16, WeightFormat::int4, 128, DType::f32);
  add(DType::f32, WeightFormat::int4, 32, DType::f16);
  add(DType::f32, WeightFormat::int4, 128, DType::f32);
  add(DType::bf16, WeightFormat::int8, 32, DType::f32);
  add(DType::f16, WeightFormat::int8, 64, DType::f16);
  add(DType::f32, WeightFormat::int8, 128, DType::bf16);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const bool nested : {false, true}) {
      add(dtype, WeightFormat::nf4, 64, DType::f32);
      out.back().double_quant = nested;
    }
  }
  return out;
}

/// One to eight tokens, in one dispatch and in two.
std::vector<LoraShape> token_counts() {
  std::vector<LoraShape> out;
  for (const Form form : {Form::fused, Form::split}) {
    for (uint32_t m = 1; m <= 8; ++m) {
      LoraShape s = shape_of(m, 21 + m, 40 + 9 * m, 4);
      s.form = form;
      out.push_back(s);
    }
  }
  return out;
}

std::vector<LoraShape> ranks(uint32_t m, std::vector<Form> forms) {
  std::vector<LoraShape> out;
  for (const Form form : forms) {
    for (const uint32_t rank : {1u, 3u, 8u, 16u, 64u, 256u}) {
      LoraShape s = shape_of(m, 70, 45, rank, DType::bf16);
      s.form = form;
      s.wants_u = form == Form::fused;
      // The tiled form makes u of at most 64 columns on the way.
      if (form == Form::fused && m > 8 && rank > 64) continue;
      out.push_back(s);
    }
  }
  return out;
}

std::vector<LoraShape> without_adapter(uint32_t m) {
  LoraShape plain = shape_of(m, 45, 50, 0, DType::bf16);
  plain.form = Form::automatic;
  LoraShape packed = plain;
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
  LoraShape packed = shape_of(1, 1, 64, 1);
  packed.format = WeightFormat::int4;
  packed.group_size = 64;
  LoraShape nested = shape_of(1, 2, 64, 1);
  nested.format = WeightFormat::nf4;
  nested.double_quant = true;
  LoraShape tiled = shape_of(9, 3, 2, 2, DType::f32);
  return {one, split, packed, nested, tiled};
}

std::vector<LoraShape> long_rows() {
  LoraShape chunks = shape_of(5, 9, 2500, 8);              // several chunks of x
  LoraShape passes = shape_of(1, 64 * 64 * 2 + 3, 40, 4);  // several strips for each threadgroup
  LoraShape passes_of_chunks = shape_of(5, 64 * 32 * 2 + 3, 520, 2, DType::f32);  // both
  LoraShape packed = shape_of(3, 10, 2176, 8, DType::f32);
  packed.format = WeightFormat::int8;
  packed.group_size = 128;
  return {chunks, passes, passes_of_chunks, packed};
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

METAL_LORA_FORWARD(VectorTypes, dense_types(3, 37, 203, 5));
METAL_LORA_FORWARD(VectorPacked, packed_types(2, 13, 4));
METAL_LORA_FORWARD(VectorTokens, token_counts());
METAL_LORA_FORWARD(VectorRanks, ranks(2, {Form::fused, Form::split}));
METAL_LORA_FORWARD(VectorBase, without_adapter(3));
METAL_LORA_FORWARD(Tiny, tiny());
METAL_LORA_FORWARD(LongRows, long_rows());
METAL_LORA_FORWARD(TiledTypes, dense_types(33, 70, 77, 5));
METAL_LORA_FORWARD(TiledPacked, packed_types(9, 67, 12));
METAL_LORA_FORWARD(TiledRanks, ranks(11, {Form::fused, Form::split}));
METAL_LORA_FORWARD(TiledBase, without_adapter(35));

std::vector<LoraShape> wide_tiles() {
  LoraShape half = shape_of(65, 513, 40, 16);
  LoraShape single = shape_of(65, 513, 33, 32, DType::f32);  // the most threadgroup memory
  LoraShape packed = shape_of(33, 520, 96, 8);
  packed.format = WeightFormat::int4;
  packed.group_size = 32;
  packed.form = Form::split;
  return {half, single, packed};
}
METAL_LORA_FORWARD(WideTiles, wide_tiles());

std::vector<LoraShape> with_dropout() {
  std::vector<LoraShape> out;
  for (const uint32_t m : {3u, 40u}) {
    for (const Form form : {Form::fused, Form::split}) {
      LoraShape s = shape_of(m, 30, 100, 12);
      s.lora_dtype = DType::f32;
      s.dropout = 0.3f;
      s.dropout_seed = 0x123456789abcdef0ull;
      s.form = form;
      s.wants_u = form == Form::fused;
      out.push_back(s);
    }
  }
  return out;
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

/// Runs the plans straight on the emulator; the bytes of the last one's first output. `arrays`
/// gains the outputs of the earlier ones.
std::vector<uint8_t> run_in_order(
    const std::vector<metal::Plan>& plans,
    ops::metal_ops::NamedArrays arrays,
    const ops::metal_ops::NamedOutputs& outputs,
    bool reverse) {
  using Kind = RecordedKernel::Buffer::Kind;
  std::vector<uint8_t> result;
  for (const auto& plan : plans) {
    Arrays inputs;
    for (const auto& name : plan.entry->inputs) {
      if (name != "p") inputs.push_back(arrays.at(name));
    }
    std::vector<OutputSpec> specs;
    std::vector<std::vector<uint8_t>> data;
    for (const auto& name : plan.entry->outputs) {
      const auto& spec = outputs.find(name)->second;
      specs.push_back(spec);
      data.emplace_back(size_t(spec.shape[0]) * spec.shape[1] * mx::size_of(spec.dtype));
    }
    const RecordedKernel kernel = record_metal_kernel(plan, inputs, specs);
    const auto library = metal_emulator::compile(std::string(mlx_preamble()) + kernel.text);
    std::vector<std::vector<int>> shapes;
    for (const auto& input : inputs)
      shapes.emplace_back(input.shape().begin(), input.shape().end());
    std::vector<uint32_t> p = plan.p;
    metal_emulator::Dispatch dispatch;
    dispatch.kernel = kernel.name;
    dispatch.reverse_order = reverse;
    const auto& grid = kernel.threads_per_grid;
    const auto& group = kernel.threads_per_threadgroup;
    dispatch.threads_per_grid = {grid.x, grid.y, grid.z};
    dispatch.threads_per_threadgroup = {group.x, group.y, group.z};
    for (const auto& b : kernel.buffers) {
      const int index = static_cast<int>(dispatch.buffers.size());
      if (b.kind == Kind::output) {
        dispatch.buffers.push_back({index, data[b.of].data(), data[b.of].size(), false});
      } else if (b.kind == Kind::shape) {
        dispatch.buffers.push_back({index, shapes[b.of].data(), shapes[b.of].size() * 4});
      } else if (b.of == inputs.size()) {
        dispatch.buffers.push_back({index, p.data(), p.size() * 4});
      } else {
        auto& input = inputs[b.of];
        dispatch.buffers.push_back({index, input.data<uint8_t>(), input.nbytes()});
      }
    }
    const auto report = metal_emulator::run(library, dispatch);
    EXPECT_EQ(report.finding_count, 0u);
    if (&plan != &plans.back()) {  // u, the next one's input
      arrays.insert_or_assign(
          plan.entry->outputs[0],
          mx::array(reinterpret_cast<const float*>(data[0].data()), specs[0].shape));
    }
    result = data[0];
  }
  return result;
}

class ForwardOrder : public testing::TestWithParam<LoraShape> {};

// Threadgroups and simdgroups scheduled first to last or last to first: the same bits.
TEST_P(ForwardOrder, DoesNotChangeABit) {
  const LoraCase c(GetParam());
  const auto plans = plan_lora_forward(GetParam());
  const auto outputs = lora_outputs(GetParam());
  EXPECT_EQ(
      run_in_order(plans, c.arrays, outputs, false), run_in_order(plans, c.arrays, outputs, true));
}

std::vector<LoraShape> orders() {
  LoraShape vector = shape_of(8, 90, 300, 12);
  LoraShape tiled = shape_of(40, 70, 96, 16, DType::f32);
  LoraShape split = shape_of(3, 37, 203, 5, DType::bf16);
  split.form = Form::split;
  return {vector, tiled, split};
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
        PackedDecode{1, false, true},
        PackedDecode{1, true, true},
        PackedDecode{1, true, false},
        PackedDecode{8, true, true}),
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
