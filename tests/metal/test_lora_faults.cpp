// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// Faults planted in the fused linear: matrix-vector form, over a double-quantised base, tiled form,
// dx.
#include "tests/metal/faults.h"
#include "tests/metal/lora_case.h"

namespace metal_lora::test {
namespace {

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

/// Held against f64.
FaultyKernel linear(
    const char* file, const metal::LoraShape& shape, bool dx, std::vector<Edit> edits) {
  const LoraCase c(shape);
  const auto plan = dx ? plan_lora_dx(shape).at(0) : plan_lora_forward(shape).at(0);
  const auto expected = dx ? expected_dx(c) : expected_y(c);
  const Oracle is_right = [expected, name = dx ? "dx" : "y"](const auto& outputs) {
    const auto got = values(outputs.at(name));
    for (size_t i = 0; i < got.size(); ++i) {
      if (!(std::fabs(got[i] - expected.values[i]) <= expected.bounds[i])) return false;
    }
    return true;
  };
  return {
      file,
      std::make_shared<DirectDispatch>(plan, c.arrays, lora_outputs(shape)),
      is_right,
      std::move(edits)};
}

#define BARRIER "threadgroup_barrier(mem_flags::mem_threadgroup);"

// ---- matrix-vector form: two chunks of x, rows and columns that fill no tile ----

const std::vector<Fault> kVectorFaults = {
    {"x overwritten while others read it", FindingKind::race_threadgroup},
    {"x read before it is staged", FindingKind::race_threadgroup},
    {"u read before other simdgroups made theirs", FindingKind::race_threadgroup},
    {"all lanes add to u", FindingKind::race_threadgroup},
    {"u added to before it is set", FindingKind::uninitialized_read},
    {"rows past the last are written", FindingKind::out_of_bounds},
    {"rows past the last are read", FindingKind::out_of_bounds},
    {"x read past its end", FindingKind::out_of_bounds},
    {"x staged behind its room", FindingKind::out_of_bounds},
    {"the scale forgotten", std::nullopt},
};

FaultyKernel vector_form() {
  return linear(
      "lora_kernels.metal",
      half_shape(2, 37, 2100, 5),
      false,
      {{"        " BARRIER "\n        gemv_stage_x",
        "        if (planted != 1) " BARRIER "\n        gemv_stage_x"},
       {"(xs, x, m, k, k0, thread_index);\n        " BARRIER,
        "(xs, x, m, k, k0, thread_index);\n        if (planted != 2) " BARRIER},
       {"if (AdapterT::kComputesU && pass == 0) {\n      " BARRIER,
        "if (AdapterT::kComputesU && pass == 0 && planted != 3) {\n      " BARRIER},
       {"if (lane == 0) {\n        us[", "if (lane == 0 || planted == 4) {\n        us["},
       {"k0 == 0 ? sum : us[", "k0 == 0 && planted != 5 ? sum : us["},
       {"lane == 0 && row0 + row < n && uint(t) < m",
        "lane == 0 && (row0 + row < n || planted == 6) && uint(t) < m"},
       {"const int valid = row0 + row < n ? int(k) - int(column) : 0;\n      groups[row]",
        "const int valid = row0 + row < n || planted == 7 ? int(k) - int(column) : 0;\n"
        "      groups[row]"},
       {"const int valid = token < m ? int(k) - int(k0 + e) : 0;",
        "const int valid = token < m ? planted == 8 ? 8 : int(k) - int(k0 + e) : 0;"},
       {"xs + token * Tile::CHUNK + gemv_place<RUN>(e)",
        "xs + token * Tile::CHUNK + gemv_place<RUN>(e) + (planted == 9 ? 8 : 0)"},
       {"const float b = adapter.scale * float(",
        "const float b = (planted == 10 ? 1.0f : adapter.scale) * float("}});
}
METAL_LORA_FAULTS(VectorFault, vector_form, kVectorFaults);

// ---- the same over a double-quantised base: 300 blocks, the second absmax2 begins within a row
// ----

const std::vector<Fault> kNestedFaults = {
    {"the second absmax2 looked for at the wrong lane", std::nullopt},
    {"half of the codes not staged", FindingKind::uninitialized_read},
    {"the offset taken for a code", std::nullopt},
    {"an absmax2 for each block", FindingKind::out_of_bounds},
};

FaultyKernel nested_form() {
  auto shape = half_shape(1, 20, 960, 4);
  shape.format = WeightFormat::nf4;
  shape.double_quant = true;
  shape.wants_u = false;
  return linear(
      "lora_quantized.metal",
      shape,
      false,
      {{"(256 - first % 256) * share", "(256 - first % 256) * (planted == 1 ? 1 : share)"},
       {"i < kNestedHead; i += THREADS", "i < (planted == 2 ? 128 : kNestedHead); i += THREADS"},
       {"head[1 + uint(codes[block])]", "head[(planted == 3 ? 0 : 1) + uint(codes[block])]"},
       {"outer = table[kNestedHead + block / 256];\n    const",
        "outer = table[kNestedHead + block / (planted == 4 ? 1 : 256)];\n    const"}});
}
METAL_LORA_FAULTS(NestedFault, nested_form, kNestedFaults);

// ---- tiled form: two tiles of rows and columns, a rank of two chunks ----

const std::vector<Fault> kTiledFaults = {
    {"tiles overwritten while others read them", FindingKind::race_threadgroup},
    {"tiles read before they are there", FindingKind::race_threadgroup},
    {"h takes the tiles' place too early", FindingKind::race_threadgroup},
    {"B read before it is there", FindingKind::race_threadgroup},
    {"B's next columns written while others read", FindingKind::race_threadgroup},
    {"a barrier for some of the threads", FindingKind::divergent_barrier},
    {"a matrix operation for some of the lanes", FindingKind::divergent_matrix_operation},
    {"u written by every column of tiles", FindingKind::race_device},
    {"columns past the last are written", FindingKind::out_of_bounds},
    {"rows past the last are written", FindingKind::out_of_bounds},
    {"h of half the strips", std::nullopt},
    {"W not transposed", std::nullopt},
};

FaultyKernel tiled_form() {
  return linear(
      "lora_tiled.metal",
      half_shape(70, 70, 77, 40),
      false,
      {{"d0 += Tile::BK) {\n    " BARRIER "\n    load_tile<Tile::BM",
        "d0 += Tile::BK) {\n    if (planted != 1) " BARRIER "\n    load_tile<Tile::BM"},
       {BARRIER "\n    for (int d = 0; d < Tile::BK; d += 8) {",
        "if (planted != 2 && (planted != 6 || at.thread_index < 40)) " BARRIER
        "\n    for (int d = 0; d < Tile::BK; d += 8) {"},
       {"if (AdapterT::kExists) {\n    " BARRIER,
        "if (AdapterT::kExists) {\n    if (planted != 3) " BARRIER},
       {BARRIER "\n    const uint h0", "if (planted != 4) " BARRIER "\n    const uint h0"},
       {"if (r0 > 0) {\n      threadgroup_barrier",
        "if (r0 > 0 && planted != 5) {\n      threadgroup_barrier"},
       {"simdgroup_multiply_accumulate(acc[i][j], left[i], right[j], acc[i][j]);",
        "if (planted != 7 || at.lane < 16)\n"
        "            simdgroup_multiply_accumulate(acc[i][j], left[i], right[j], acc[i][j]);"},
       {"WANTS_U && at.column0 == 0", "WANTS_U && (at.column0 == 0 || planted == 8)"},
       {"row < rows && column + e < columns",
        "(row < rows || planted == 10) && (column + e < columns || planted == 9)"},
       {"(simdgroup_index + SIMDGROUPS * s) * 8 * X_STRIDE + d",
        "(simdgroup_index + (planted == 11 ? 0 : SIMDGROUPS * s)) * 8 * X_STRIDE + d"},
       {"Tile::WS,\n            ulong2(0, 0),\n            !Tile::BACKWARD);",
        "Tile::WS,\n            ulong2(0, 0),\n            !Tile::BACKWARD && planted != 12);"}});
}
METAL_LORA_FAULTS(TiledFault, tiled_form, kTiledFaults);

// ---- dx, with dropout: two steps of depth, two tiles of columns ----

const std::vector<Fault> kDxFaults = {
    {"nothing dropped", std::nullopt},
    {"one token's mask for eight", std::nullopt},
    {"dropout's factor forgotten", std::nullopt},
    {"rows of W past the last are read", FindingKind::out_of_bounds},
    {"tiles read before they are there", FindingKind::race_threadgroup},
    {"dy read past its end", FindingKind::out_of_bounds},
    {"A read transposed", std::nullopt},
};

FaultyKernel dx_form() {
  auto shape = half_shape(40, 45, 70, 12);
  shape.dropout = 0.3f;
  shape.dropout_seed = 77;
  shape.wants_u = false;
  return linear(
      "lora_tiled.metal",
      shape,
      true,
      {{"const bool keep = out_mask.keep(", "const bool keep = planted == 1 || out_mask.keep("},
       {"out_mask.key(at.row0 + row + fragment_row(at.lane))",
        "out_mask.key(at.row0 + row + (planted == 2 ? 0 : fragment_row(at.lane)))"},
       {"adapter.scale * out_mask.keep_scale()",
        "adapter.scale * (planted == 3 ? 1.0f : out_mask.keep_scale())"},
       {"const int valid = row0 + row < rows ? int(columns) - int(column0 + column) : 0;\n"
        "    if (new_groups)",
        "const int valid =\n"
        "        row0 + row < rows || planted == 4 ? int(columns) - int(column0 + column) : 0;\n"
        "    if (new_groups)"},
       {BARRIER "\n    for (int d = 0; d < Tile::BK; d += 8) {",
        "if (planted != 5) " BARRIER "\n    for (int d = 0; d < Tile::BK; d += 8) {"},
       {"const int valid = row0 + row < rows ? int(columns) - int(column0 + column) : 0;\n"
        "    const Pack",
        "const int valid = row0 + row >= rows ? 0 : planted == 6 ? 8\n"
        "        : int(columns) - int(column0 + column);\n"
        "    const Pack"},
       {"Tile::ES,\n              ulong2(0, 0),\n              !Tile::BACKWARD);",
        "Tile::ES,\n              ulong2(0, 0),\n              !Tile::BACKWARD || planted == "
        "7);"}});
}
METAL_LORA_FAULTS(DxFault, dx_form, kDxFaults);

}  // namespace
}  // namespace metal_lora::test
