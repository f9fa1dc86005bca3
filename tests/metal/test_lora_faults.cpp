// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Small faults planted in the fused kernels, each of which the emulator must find: what makes
// "0 findings" of the other tests worth something.
#include "emulator/tests/fault_harness.h"
#include "tests/metal/lora_case.h"

namespace metal_lora::test {
namespace {

using metal_emulator::FindingKind;
using metal_emulator::faults::Fault;
using metal_emulator::faults::Outcome;
using metal_emulator::faults::Subject;

/// The buffers of one recorded dispatch, outputs undefined at first.
struct Bound {
  std::vector<std::vector<uint8_t>> outputs;
  std::vector<std::vector<int>> shapes;
  std::vector<uint32_t> p;
  metal_emulator::Dispatch dispatch;
};

Bound bind_buffers(
    const RecordedKernel& kernel,
    const metal::Plan& plan,
    Arrays& inputs,
    const std::vector<OutputSpec>& specs) {
  using Kind = RecordedKernel::Buffer::Kind;
  Bound out;
  for (const auto& s : specs) {
    out.outputs.emplace_back(size_t(s.shape[0]) * s.shape[1] * mx::size_of(s.dtype));
  }
  for (const auto& input : inputs)
    out.shapes.emplace_back(input.shape().begin(), input.shape().end());
  out.p = plan.p;
  out.dispatch.kernel = kernel.name;
  const auto& grid = kernel.threads_per_grid;
  const auto& group = kernel.threads_per_threadgroup;
  out.dispatch.threads_per_grid = {grid.x, grid.y, grid.z};
  out.dispatch.threads_per_threadgroup = {group.x, group.y, group.z};
  auto& buffers = out.dispatch.buffers;
  for (const auto& b : kernel.buffers) {
    const int index = static_cast<int>(buffers.size());
    if (b.kind == Kind::output) {
      buffers.push_back({index, out.outputs[b.of].data(), out.outputs[b.of].size(), false});
    } else if (b.kind == Kind::shape) {
      buffers.push_back({index, out.shapes[b.of].data(), out.shapes[b.of].size() * 4, true});
    } else if (b.of == inputs.size()) {
      buffers.push_back({index, out.p.data(), out.p.size() * 4, true});
    } else {
      buffers.push_back({index, inputs[b.of].data<uint8_t>(), inputs[b.of].nbytes(), true});
    }
  }
  return out;
}

/// A fused forward of `shape` (y, and u where wanted, of f16 and f32), its text as MLX made it.
Subject subject_of(const metal::LoraShape& shape, const std::string& file) {
  const auto c = std::make_shared<LoraCase>(shape);
  const auto plan = std::make_shared<metal::Plan>(plan_lora_forward(shape).at(0));
  const auto outputs = lora_outputs(shape);
  Arrays inputs;
  for (const auto& name : plan->entry->inputs) {
    if (name != "p") inputs.push_back(c->arrays.at(name));
  }
  std::vector<OutputSpec> specs;
  for (const auto& name : plan->entry->outputs) specs.push_back(outputs.find(name)->second);
  const auto kernel = std::make_shared<RecordedKernel>(record_metal_kernel(*plan, inputs, specs));
  Subject subject;
  // Findings name lines of the file in kernels/metal; it has more of them than this kernel's part.
  subject.text = std::string(mlx_preamble()) + kernel->text + std::string(300, '\n');
  subject.options.file_name = file;
  subject.run = [=](const metal_emulator::Library& library) mutable {
    Bound bound = bind_buffers(*kernel, *plan, inputs, specs);
    bound.dispatch.max_findings = 64;
    Outcome outcome{metal_emulator::run(library, bound.dispatch), true};
    const auto expected = expected_y(*c);
    const mx::array y(
        reinterpret_cast<const mx::float16_t*>(bound.outputs[0].data()), specs[0].shape);
    const auto got = values(y);
    for (size_t i = 0; i < got.size(); ++i) {
      outcome.right &= std::fabs(got[i] - expected.values[i]) <= expected.bounds[i];
    }
    return outcome;
  };
  return subject;
}

metal::LoraShape half_shape(uint32_t m, uint32_t n, uint32_t k, uint32_t rank) {
  metal::LoraShape s;
  s.m = m;
  s.n = n;
  s.k = k;
  s.rank = rank;
  s.scale = 1.5f;
  s.dtype = DType::f16;
  s.lora_dtype = DType::f16;
  s.format = WeightFormat::f16;
  s.wants_u = true;
  s.form = metal::Form::fused;
  return s;
}

// ---- matrix-vector form: two chunks of x, rows and columns that fill no tile
// ---------------------

const Subject& vector_form() {
  static const Subject subject = subject_of(half_shape(2, 37, 2100, 5), "lora_kernels.metal");
  return subject;
}

const Fault kVectorFaults[] = {
    {"x overwritten while others read it",
     "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        gemv_stage_x",
     "        gemv_stage_x",
     FindingKind::race_threadgroup},
    {"x read before it is staged",
     "(xs, x, m, k, k0, thread_index);\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
     "(xs, x, m, k, k0, thread_index);",
     FindingKind::race_threadgroup},
    {"u read before other simdgroups made theirs",
     "if (AdapterT::kComputesU && pass == 0) {\n      "
     "threadgroup_barrier(mem_flags::mem_threadgroup);",
     "if (AdapterT::kComputesU && pass == 0) {\n      "
     "simdgroup_barrier(mem_flags::mem_threadgroup);",
     FindingKind::race_threadgroup},
    {"all lanes add to u",
     "if (lane == 0) {\n        us[",
     "if (lane < 32) {\n        us[",
     FindingKind::race_threadgroup},
    {"u added to before it is set",
     "k0 == 0 ? sum : us[t * rank + r] + sum",
     "us[t * rank + r] + sum",
     FindingKind::uninitialized_read},
    {"rows past the last are written",
     "lane == 0 && row0 + row < n && uint(t) < m",
     "lane == 0 && uint(t) < m",
     FindingKind::out_of_bounds},
    {"rows past the last are read",
     "const int valid = row0 + row < n ? int(k) - int(column) : 0;\n      groups[row]",
     "const int valid = int(k) - int(column);\n      groups[row]",
     FindingKind::out_of_bounds},
    {"x read past its end",
     "const int valid = token < m ? int(k) - int(k0 + e) : 0;",
     "const int valid = token < m ? 8 : 0;",
     FindingKind::out_of_bounds},
    {"a chunk more than there is room for",
     "CHUNK = (FIT < 2048 ? FIT : 2048) / BLOCK * BLOCK,  // of K, staged in threadgroup memory\n"
     "    X_SIZE = TOKENS_ * CHUNK,",
     "CHUNK = (FIT < 2048 ? FIT : 2048) / BLOCK * BLOCK,\n    X_SIZE = TOKENS_ * CHUNK - 8,",
     FindingKind::out_of_bounds},
    {"the scale forgotten",
     "const float b = adapter.scale * float(",
     "const float b = float(",
     std::nullopt},
};

// ---- tiled form: two tiles of rows and columns, a rank of two chunks
// ------------------------------

const Subject& tiled_form() {
  static const Subject subject = subject_of(half_shape(70, 70, 77, 40), "lora_tiled.metal");
  return subject;
}

const Fault kTiledFaults[] = {
    {"tiles overwritten while others read them",
     "d0 += Tile::BK) {\n    threadgroup_barrier(mem_flags::mem_threadgroup);\n    "
     "load_tile<Tile::BM",
     "d0 += Tile::BK) {\n    load_tile<Tile::BM",
     FindingKind::race_threadgroup},
    {"tiles read before they are there",
     "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (int d = 0; d < Tile::BK; d += 8) "
     "{",
     "simdgroup_barrier(mem_flags::mem_threadgroup);\n    for (int d = 0; d < Tile::BK; d += 8) {",
     FindingKind::race_threadgroup},
    {"h takes the tiles' place too early",
     "if (AdapterT::kExists) {\n    threadgroup_barrier(mem_flags::mem_threadgroup);",
     "if (AdapterT::kExists) {",
     FindingKind::race_threadgroup},
    {"B read before it is there",
     "threadgroup_barrier(mem_flags::mem_threadgroup);\n    const uint h0",
     "const uint h0",
     FindingKind::race_threadgroup},
    {"B's next columns written while others read",
     "if (r0 > 0) {\n      threadgroup_barrier",
     "if (r0 > 1000) {\n      threadgroup_barrier",
     FindingKind::race_threadgroup},
    {"a barrier for some of the threads",
     "threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (int d = 0; d < Tile::BK; d += 8) "
     "{",
     "if (at.thread_index < 40) threadgroup_barrier(mem_flags::mem_threadgroup);\n"
     "    for (int d = 0; d < Tile::BK; d += 8) {",
     FindingKind::divergent_barrier},
    {"a matrix operation for some of the lanes",
     "simdgroup_multiply_accumulate(acc[i][j], left[i], right[j], acc[i][j]);",
     "if (at.lane < 16) simdgroup_multiply_accumulate(acc[i][j], left[i], right[j], acc[i][j]);",
     FindingKind::divergent_matrix_operation},
    {"u written by every column of tiles",
     "WANTS_U && at.column0 == 0",
     "WANTS_U",
     FindingKind::race_device},
    {"columns past the last are written",
     "row < rows && column + e < columns",
     "row < rows",
     FindingKind::out_of_bounds},
    {"rows past the last are written",
     "row < rows && column + e < columns",
     "column + e < columns",
     FindingKind::out_of_bounds},
    {"h of half the strips",
     "(simdgroup_index + SIMDGROUPS * s) * 8 * X_STRIDE + d",
     "simdgroup_index * 8 * X_STRIDE + d",
     std::nullopt},
    {"W not transposed",
     "Tile::WS,\n            ulong2(0, 0),\n            !Tile::BACKWARD);",
     "Tile::WS,\n            ulong2(0, 0),\n            false);",
     std::nullopt},
};

class VectorFault : public testing::TestWithParam<Fault> {};
class TiledFault : public testing::TestWithParam<Fault> {};

TEST(LoraFault, NoneInTheKernels) {
  expect_clean(vector_form());
  expect_clean(tiled_form());
}
TEST_P(VectorFault, IsFound) {
  expect_found(vector_form(), GetParam());
}
TEST_P(TiledFault, IsFound) {
  expect_found(tiled_form(), GetParam());
}
INSTANTIATE_TEST_SUITE_P(
    Lora, VectorFault, testing::ValuesIn(kVectorFaults), metal_emulator::faults::test_name);
INSTANTIATE_TEST_SUITE_P(
    Lora, TiledFault, testing::ValuesIn(kTiledFaults), metal_emulator::faults::test_name);

}  // namespace
}  // namespace metal_lora::test
