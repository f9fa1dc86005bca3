// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/metal/plans_multi.h"

#include <array>
#include <cstring>

#include "kernels/metal/plan_weights.h"

namespace metal_lora::metal {
namespace {

constexpr const char* kName = "lora_multi";
constexpr uint32_t kVectorTokens = 8;
constexpr uint32_t kMaxRank = 256;
constexpr uint32_t kEnoughThreadgroups = 64;
/// Fewer leave cores of even a small GPU without work.
constexpr uint32_t kFewestThreadgroups = 16;

const char* const kBank =
    "metal_lora::lora_bank<LT>(\n"
    "        a, b, ranks, adapter_scales, uint(a_shape[0]), uint(a_shape[1]))";

constexpr const char* kVectorBody = R"(
  typedef metal_lora::MultiGemvTile<T, TOKENS, SIMDGROUPS, RANKS, RUN> Tile;
  threadgroup T xs[Tile::X_SIZE];
  threadgroup float us[Tile::U_SIZE];
STAGE  metal_lora::lora_multi_gemv<Tile>(
      WEIGHT, BANK, BIAS, x, index, y,
      uint(x_shape[0]), p[0], p[1], p[2], xs, us, threadgroup_position_in_grid.x,
      simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)";

constexpr const char* kTiledBody = R"(
  typedef metal_lora::GemmTile<T, PRODUCT, LT, BM, BN, 0, SIMDGROUPS, false> Tile;
  threadgroup float memory[Tile::WORDS];
  threadgroup int adapter[Tile::BM];
  metal_lora::lora_multi_gemm<Tile>(
      WEIGHT, BANK, BIAS, x, index, y,
      uint(x_shape[0]), p[0], p[1], memory, adapter, threadgroup_position_in_grid,
      simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
)";

void replace(std::string& text, const char* name, const std::string& value) {
  const size_t at = text.find(name);
  text.replace(at, std::strlen(name), value);
}

struct Variant {
  bool vector;
  WeightFormat format;
  bool double_quant, bias;
};

Entry make_entry(const Variant& v, const char* name) {
  Entry entry{name, {v.vector ? "lora_multi_gemv" : "lora_multi_gemm"}, {"x"}, {"y"}, ""};
  add_weight(v.format, v.double_quant, entry);
  for (const char* input : {"a", "b", "ranks", "adapter_scales", "index"}) {
    entry.inputs.push_back(input);
  }
  if (v.bias) entry.inputs.push_back("bias");
  entry.inputs.push_back("p");
  entry.body = v.vector ? kVectorBody : kTiledBody;
  if (!v.vector) replace(entry.body, "PRODUCT", is_packed(v.format) ? "T" : "WT");
  const auto head = v.vector ? NestedHead::staged : NestedHead::in_table;
  replace(entry.body, "WEIGHT", weight_policy(v.format, v.double_quant, "T", "p[1]", head));
  if (v.vector) replace(entry.body, "STAGE", stage_text(v.format, v.double_quant));
  replace(entry.body, "BANK", kBank);
  replace(entry.body, "BIAS", v.bias ? "metal_lora::make_bias(bias)" : "metal_lora::NoBias()");
  return entry;
}

/// Kinds of weights whose entries differ: dense, affine, NF4, double-quantised NF4.
const Entry* multi_entry(const Variant& v) {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const char* form : {"lora_multi_gemv", "lora_multi_gemm"}) {
      for (const char* kind : {"", "_affine", "_nf4", "_nf4_nested"}) {
        for (const char* bias : {"", "_bias"}) all.push_back(std::string(form) + kind + bias);
      }
    }
    return all;
  }();
  static const std::vector<Entry> entries = [] {
    constexpr std::array<std::pair<WeightFormat, bool>, 4> kKinds = {
        {{WeightFormat::f32, false},
         {WeightFormat::int4, false},
         {WeightFormat::nf4, false},
         {WeightFormat::nf4, true}}};
    std::vector<Entry> all;
    for (const bool vector : {true, false}) {
      for (const auto& [format, double_quant] : kKinds) {
        for (const bool bias : {false, true}) {
          all.push_back(
              make_entry({vector, format, double_quant, bias}, names[all.size()].c_str()));
        }
      }
    }
    return all;
  }();
  const size_t kind = !is_packed(v.format) ? 0 : is_affine(v.format) ? 1 : v.double_quant ? 3 : 2;
  return &entries[(v.vector ? 0 : 8) + kind * 2 + (v.bias ? 1 : 0)];
}

StoredWeight weight_of(const LoraMultiShape& s) {
  return {s.n, s.k, s.format, s.group_size, s.scales_dtype, s.double_quant};
}

void check(const LoraMultiShape& s) {
  check_weight(weight_of(s), kName);
  require_size(uint64_t{s.m} * s.k, kName, "x");
  require_size(uint64_t{s.m} * s.n, kName, "y");
  require(s.adapters > 0, kName, "adapters must be at least 1 but is 0");
  require(
      s.max_rank >= 1 && s.max_rank <= kMaxRank,
      kName,
      "max_rank must be in [1, 256] but is " + std::to_string(s.max_rank));
  const uint64_t ranks = uint64_t{s.adapters} * s.max_rank;
  require_size(ranks * s.k, kName, "A");
  require_size(ranks * s.n, kName, "B");
}

/// Every threadgroup reads the A of all adapters that the tokens name: taller tiles where that
/// could exceed half of W's bytes.
uint32_t choose_passes(const LoraMultiShape& s, uint32_t rows) {
  const double a_bytes =
      double(std::min(s.m, s.adapters)) * s.max_rank * s.k * bytes_of(s.lora_dtype);
  const double affordable = std::clamp(
      0.5 * weight_bytes(weight_of(s)) / a_bytes,
      double{kFewestThreadgroups},
      double{kEnoughThreadgroups});
  const auto passes = static_cast<uint32_t>(s.n / (rows * affordable));
  const uint32_t fewer = ceil_div(ceil_div(s.n, rows), most_threadgroups(weight_of(s)));
  return std::max(fewer, std::clamp(passes, uint32_t{1}, uint32_t{16}));
}

void plan_vector(const LoraMultiShape& s, Plan& plan) {
  const int tokens = s.m <= 2 ? static_cast<int>(s.m) : s.m <= 4 ? 4 : 8;
  // As the single adapter's form: eight tokens' sums need the registers of half the threads.
  const uint32_t simdgroups = tokens == 8 ? 8 : 16;
  const uint32_t rows = simdgroups * 4, passes = choose_passes(s, rows);
  const int run = !is_packed(s.format)                                      ? 8
                  : s.format == WeightFormat::int8 || s.dtype == DType::f32 ? 16
                                                                            : 32;
  add_weight_args(weight_of(s), run, 32 * static_cast<uint32_t>(run), plan.template_args);
  plan.template_args.emplace_back("TOKENS", tokens);
  plan.template_args.emplace_back("SIMDGROUPS", static_cast<int>(simdgroups));
  plan.template_args.emplace_back("RANKS", s.max_rank <= 32 ? 32 : 256);
  if (!is_packed(s.format)) plan.template_args.emplace_back("RUN", run);
  plan.p = {s.n, s.k, passes};
  const uint32_t groups = ceil_div(s.n, uint64_t{rows} * passes);
  plan.threads_per_grid = {simdgroups * 32 * groups, 1, 1};
  plan.threads_per_threadgroup = {simdgroups * 32, 1, 1};
  plan.why = "matrix-vector form, " + std::to_string(groups) +
             " threadgroups: W and each named adapter's B once, its A once for each threadgroup";
}

void plan_tiled(const LoraMultiShape& s, Plan& plan) {
  const bool wide = s.m > 32 && s.n >= 512;
  const uint32_t bm = s.m <= 32 ? 32 : 64, bn = wide ? 128 : 64, simdgroups = wide ? 8 : 4;
  const int run = is_packed(s.format) ? 16 : 8;
  add_weight_args(weight_of(s), run, 32, plan.template_args);
  plan.template_args.emplace_back("BM", static_cast<int>(bm));
  plan.template_args.emplace_back("BN", static_cast<int>(bn));
  plan.template_args.emplace_back("SIMDGROUPS", static_cast<int>(simdgroups));
  plan.p = {s.n, s.k};
  plan.threads_per_grid = {simdgroups * 32 * ceil_div(s.n, bn), ceil_div(s.m, bm), 1};
  plan.threads_per_threadgroup = {simdgroups * 32, 1, 1};
  plan.why = "tiled form, " + std::to_string(bm) + " x " + std::to_string(bn) +
             " tiles: W and x once for each, then each of the tile's adapters: A, B and its "
             "tokens' x once for each 32 ranks";
}

}  // namespace

Plan plan_lora_multi(const LoraMultiShape& s) {
  check(s);
  const bool vector = s.m <= kVectorTokens;
  Plan plan;
  plan.entry = multi_entry({vector, s.format, s.double_quant, s.has_bias});
  plan.template_args = {{"T", s.dtype}, {"LT", s.lora_dtype}};
  if (vector) {
    plan_vector(s, plan);
  } else {
    plan_tiled(s, plan);
  }
  return plan;
}

}  // namespace metal_lora::metal
