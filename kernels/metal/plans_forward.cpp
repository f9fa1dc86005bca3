// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
//
// The table behind plan_lora_forward and plan_lora_dx. Bytes and multiply-adds are counted exactly;
// the two limits below say how much repeated work one dispatch may cost before two are planned.
// They are set by count, not by time: nothing here has run on an Apple GPU yet.
#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>

#include "kernels/metal/plan_weights.h"

namespace metal_lora::metal {
namespace {

/// Matrix-vector form: A is read by every threadgroup. More than this part of W's bytes: split.
constexpr double kMaxRepeatedBytes = 0.25;
/// Tiled form: x·Aᵀ is made by every column of tiles. More than this part of x·W's products: split.
constexpr double kMaxRepeatedProducts = 0.125;
constexpr uint32_t kMaxRank = 256;
constexpr uint32_t kMaxVectorTokens = 8;
constexpr uint32_t kMaxFusedTileRank = 64;
/// Threadgroups that keep a large GPU busy (40 cores, two each, less the tail).
constexpr uint32_t kEnoughThreadgroups = 64;

enum class AdapterUse { none, fused, given };

struct Variant {
  WeightFormat format;
  bool double_quant;
  AdapterUse adapter;
  bool bias, dropout, u, dx;
};

uint32_t dropout_threshold(float dropout) {
  return static_cast<uint32_t>(std::min(4294967295.0, double{dropout} * 4294967296.0));
}

/// Entries are made once for each variant and live as long as the program.
const Entry* interned(Entry entry, std::string name) {
  static std::mutex mutex;
  static std::map<std::string, Entry, std::less<>> entries;
  const std::lock_guard lock(mutex);
  const auto [at, added] = entries.try_emplace(std::move(name), std::move(entry));
  if (added) at->second.name = at->first.c_str();
  return &at->second;
}

std::string suffix(const Variant& v) {
  std::string out = weight_suffix(v.format, v.double_quant);
  if (v.adapter == AdapterUse::none) out += "_base";
  if (v.adapter == AdapterUse::given) out += "_expand";
  if (v.dropout) out += "_dropout";
  if (v.bias) out += "_bias";
  if (v.u) out += "_keep";
  return out;
}

std::string adapter_text(const Variant& v) {
  const std::string last = ", p[2], as_type<float>(p[3]))";
  switch (v.adapter) {
    case AdapterUse::none:
      return "metal_lora::no_adapter()";
    case AdapterUse::fused:
      return "metal_lora::fused_adapter<LT>(a, b" + last;
    case AdapterUse::given:
      return std::string("metal_lora::given_adapter<LT>(") + (v.dx ? "v, a" : "u, b") + last;
  }
  return {};
}

void add_operands(const Variant& v, Entry& entry) {
  entry.inputs.push_back(v.dx ? "dy" : "x");
  add_weight(v.format, v.double_quant, entry);
  if (v.adapter == AdapterUse::fused) {
    entry.inputs.push_back("a");
    entry.inputs.push_back("b");
  } else if (v.adapter == AdapterUse::given) {
    entry.inputs.push_back(v.dx ? "v" : "u");
    entry.inputs.push_back(v.dx ? "a" : "b");
  }
  if (v.bias) entry.inputs.push_back("bias");
  entry.inputs.push_back("p");
  entry.outputs.push_back(v.dx ? "dx" : "y");
  if (v.u) entry.outputs.push_back(v.dx ? "v" : "u");
}

/// The arguments from the bias on that all bodies share: bias, input, outputs.
std::string data_text(const Variant& v) {
  std::string text = v.bias ? "metal_lora::make_bias(bias)" : "metal_lora::NoBias()";
  text += v.dx ? ", dy, dx, " : ", x, y, ";
  text += v.u ? (v.dx ? "v" : "u") : "static_cast<device float*>(nullptr)";
  text += v.dx ? ",\n      uint(dy_shape[0])" : ",\n      uint(x_shape[0])";
  return text + ", p[0], p[1]";
}

const Entry* gemv_entry(const Variant& v) {
  Entry entry;
  entry.regions = {"gemv"};
  add_operands(v, entry);
  entry.body =
      "  typedef metal_lora::GemvTile<T, TOKENS, SIMDGROUPS, RANKS, RUN> Tile;\n"
      "  threadgroup T xs[Tile::X_SIZE];\n"
      "  threadgroup float us[Tile::U_SIZE];\n" +
      std::string(stage_text(v.format, v.double_quant)) + "  metal_lora::lora_gemv<Tile, " +
      (v.u ? "true" : "false") + ">(\n      " +
      weight_policy(v.format, v.double_quant, "T", "p[1]", NestedHead::staged) + ",\n      " +
      adapter_text(v) + ",\n      " + data_text(v) +
      ", p[4], xs, us,\n"
      "      threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup,\n"
      "      thread_index_in_simdgroup);\n";
  return interned(std::move(entry), "lora_gemv" + suffix(v));
}

const Entry* gemm_entry(const Variant& v) {
  Entry entry;
  entry.regions = {"gemm"};
  if (v.dropout) entry.regions.push_back("adapter_mask");
  add_operands(v, entry);
  const std::string mask = "metal_lora::adapter_mask(p[4], p[5], p[6])";
  const std::string none = "metal_lora::NoMask()";
  entry.body = "  typedef metal_lora::GemmTile<T, " +
               std::string(is_packed(v.format) ? "T" : "WT") + ", " +
               (v.adapter == AdapterUse::none ? "float" : "LT") + ", BM, BN, RT, SIMDGROUPS, " +
               (v.dx ? "true" : "false") +
               "> Tile;\n"
               "  threadgroup float memory[Tile::WORDS];\n"
               "  metal_lora::lora_gemm<Tile, " +
               (v.u ? "true" : "false") + ">(\n      " +
               weight_policy(v.format, v.double_quant, "T", "p[1]") + ",\n      " +
               adapter_text(v) + ",\n      " + (v.dropout && !v.dx ? mask : none) + ", " +
               (v.dropout && v.dx ? mask : none) + ",\n      " + data_text(v) +
               ", memory,\n"
               "      threadgroup_position_in_grid, simdgroup_index_in_threadgroup,\n"
               "      thread_index_in_simdgroup);\n";
  return interned(std::move(entry), (v.dx ? "lora_dx" : "lora_gemm") + suffix(v));
}

const Entry* shrink_entry(bool vector, bool dx, bool dropout) {
  Entry entry;
  entry.regions = {"shrink"};
  if (dropout) entry.regions.push_back("adapter_mask");
  entry.inputs =
      dx ? std::vector<std::string>{"dy", "b", "p"} : std::vector<std::string>{"x", "a", "p"};
  entry.outputs = {dx ? "v" : "u"};
  if (vector) {
    entry.body =
        "  threadgroup float partial[SIMDGROUPS * TOKENS];\n"
        "  metal_lora::lora_shrink_vector<TOKENS, SIMDGROUPS, T, LT>(\n"
        "      x, a, u, uint(x_shape[0]), p[0], p[1], partial, threadgroup_position_in_grid.x,\n"
        "      simdgroup_index_in_threadgroup, thread_index_in_simdgroup);\n";
  } else {
    entry.body = "  typedef metal_lora::ShrinkTile<T, LT, BM, RANKS, " +
                 std::string(dx ? "true" : "false") +
                 "> Tile;\n"
                 "  threadgroup float memory[Tile::WORDS];\n"
                 "  metal_lora::lora_shrink_tiled<Tile, T, LT>(\n      " +
                 (dx ? "dy, b, " : "x, a, ") +
                 (dropout ? "metal_lora::adapter_mask(p[2], p[3], p[4])" : "metal_lora::NoMask()") +
                 (dx ? ", v, uint(dy_shape[0])" : ", u, uint(x_shape[0])") +
                 ", p[0], p[1], memory,\n"
                 "      threadgroup_position_in_grid, simdgroup_index_in_threadgroup,\n"
                 "      thread_index_in_simdgroup);\n";
  }
  std::string name = vector ? "lora_shrink_vector" : dx ? "lora_shrink_dx" : "lora_shrink";
  if (dropout) name += "_dropout";
  return interned(std::move(entry), std::move(name));
}

StoredWeight weight_of(const LoraShape& s) {
  return {s.n, s.k, s.format, s.group_size, s.scales_dtype, s.double_quant};
}

void check(const LoraShape& s, const char* kernel, bool needs_adapter) {
  require_size(uint64_t{s.m} * s.k, kernel, "x");
  require_size(uint64_t{s.m} * s.n, kernel, "y");
  require(s.rank <= kMaxRank, kernel, "rank must be at most 256 but is " + std::to_string(s.rank));
  require(s.rank > 0 || !(needs_adapter || s.wants_u), kernel, "rank must be at least 1 but is 0");
  require(s.dropout >= 0.0f && s.dropout < 1.0f, kernel, "dropout must be in [0, 1)");
  check_weight(weight_of(s), kernel);
}

std::string percent(double part) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f %%", 100 * part);
  return text;
}
std::string kilobytes(double bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f KB", bytes / 1000);
  return text;
}

struct GemvChoice {
  int tokens, simdgroups, run;
  uint32_t passes, threadgroups;
  double repeated;  ///< bytes of A beyond the first reading, as a part of W's
};

GemvChoice choose_gemv(const LoraShape& s, bool fused) {
  GemvChoice c;
  c.tokens = s.m <= 2 ? static_cast<int>(s.m) : s.m <= 4 ? 4 : 8;
  // Four rows of eight tokens need about 100 registers: no more than 256 threads then.
  c.simdgroups = c.tokens == 8 ? 8 : 16;
  const auto rows = [&] { return static_cast<uint32_t>(c.simdgroups) * 4; };
  const uint32_t most = most_threadgroups(weight_of(s));
  // Tall: each threadgroup reads x, and A where fused.
  c.passes = std::clamp(s.n / (rows() * kEnoughThreadgroups), 1u, 8u);
  if (!fused) {
    while (c.simdgroups > 2 && s.n / rows() < kEnoughThreadgroups &&
           ceil_div(s.n, rows() / 2) <= most) {
      c.simdgroups /= 2;
    }
  }
  c.passes = std::max(c.passes, ceil_div(ceil_div(s.n, rows()), most));
  c.threadgroups = ceil_div(s.n, uint64_t{rows()} * c.passes);
  c.run = !is_packed(s.format)                                      ? 8
          : s.format == WeightFormat::int8 || s.dtype == DType::f32 ? 16
                                                                    : 32;
  c.repeated = double(c.threadgroups - 1) * s.rank * s.k * bytes_of(s.lora_dtype) /
               weight_bytes(weight_of(s));
  return c;
}

Plan gemv_plan(const LoraShape& s, AdapterUse adapter, const GemvChoice& c) {
  const bool fused = adapter == AdapterUse::fused;
  Plan plan;
  plan.entry =
      gemv_entry({s.format, s.double_quant, adapter, s.has_bias, false, fused && s.wants_u, false});
  auto& args = plan.template_args;
  args = {{"T", s.dtype}};
  add_weight_args(weight_of(s), c.run, 32 * static_cast<uint32_t>(c.run), args);
  if (adapter != AdapterUse::none) args.emplace_back("LT", s.lora_dtype);
  args.emplace_back("TOKENS", c.tokens);
  args.emplace_back("SIMDGROUPS", c.simdgroups);
  args.emplace_back("RANKS", adapter == AdapterUse::none ? 1 : s.rank <= 32 ? 32 : 256);
  if (!is_packed(s.format)) args.emplace_back("RUN", c.run);
  plan.p = {s.n, s.k, s.rank, float_word(s.scale), c.passes};
  const uint32_t threads = static_cast<uint32_t>(c.simdgroups) * 32;
  plan.threads_per_grid = {threads * c.threadgroups, 1, 1};
  plan.threads_per_threadgroup = {threads, 1, 1};
  plan.why = "matrix-vector form, " + std::to_string(c.threadgroups) + " threadgroups of " +
             std::to_string(c.simdgroups * 4 * c.passes) + " rows; W " +
             kilobytes(weight_bytes(weight_of(s))) + " once";
  if (fused) {
    plan.why += "; one dispatch: A read again for " + percent(c.repeated) +
                " of W's bytes (limit " + percent(kMaxRepeatedBytes) + ")";
  }
  return plan;
}

struct GemmChoice {
  int bm, bn, rank_tile, simdgroups;
  double repeated;  ///< products of x·Aᵀ, as a part of x·W's
};

GemmChoice choose_gemm(const LoraShape& s, uint32_t width, bool fused) {
  GemmChoice c{};
  c.bm = s.m <= 32 ? 32 : 64;
  c.rank_tile = s.rank <= 8 ? 8 : s.rank <= 16 ? 16 : s.rank <= 32 ? 32 : 64;
  // 128 columns halve the repeated products; h of 64 ranks would not fit beside them.
  const bool wide = s.m > 32 && width >= 512 && (!fused || c.rank_tile <= 32);
  c.bn = wide ? 128 : 64;
  c.simdgroups = wide ? 8 : 4;
  c.repeated = double(c.rank_tile) / c.bn;
  if (!fused) c.rank_tile = 0;
  return c;
}

Plan gemm_plan(const LoraShape& s, AdapterUse adapter, bool dx, const GemmChoice& c) {
  const bool fused = adapter == AdapterUse::fused;
  const uint32_t width = dx ? s.k : s.n;
  // A split forward has its dropout in the shrink.
  const bool dropout = s.dropout > 0.0f && (fused || (dx && adapter == AdapterUse::given));
  Plan plan;
  plan.entry = gemm_entry(
      {s.format, s.double_quant, adapter, s.has_bias && !dx, dropout, fused && s.wants_u, dx});
  auto& args = plan.template_args;
  args = {{"T", s.dtype}};
  add_weight_args(weight_of(s), is_packed(s.format) ? 16 : 8, 32, args);
  if (adapter != AdapterUse::none) args.emplace_back("LT", s.lora_dtype);
  args.emplace_back("BM", c.bm);
  args.emplace_back("BN", c.bn);
  args.emplace_back("RT", c.rank_tile);
  args.emplace_back("SIMDGROUPS", c.simdgroups);
  plan.p = {s.n, s.k, s.rank, float_word(s.scale)};
  if (dropout) {
    plan.p.push_back(static_cast<uint32_t>(s.dropout_seed));
    plan.p.push_back(static_cast<uint32_t>(s.dropout_seed >> 32));
    plan.p.push_back(dropout_threshold(s.dropout));
  }
  const uint32_t threads = static_cast<uint32_t>(c.simdgroups) * 32;
  plan.threads_per_grid = {threads * ceil_div(width, c.bn), ceil_div(s.m, c.bm), 1};
  plan.threads_per_threadgroup = {threads, 1, 1};
  plan.why = "tiled form, " + std::to_string(c.bm) + " x " + std::to_string(c.bn) +
             " tiles; W read " + std::to_string(ceil_div(s.m, c.bm)) + " times, " +
             (dx ? "dy " : "x ") + std::to_string(ceil_div(width, c.bn)) + " times";
  if (fused) {
    plan.why += std::string("; one dispatch: ") + (dx ? "dy·B" : "x·Aᵀ") + " adds " +
                percent(c.repeated) + " of the base product's multiply-adds (limit " +
                percent(kMaxRepeatedProducts) + ")";
  }
  return plan;
}

Plan shrink_plan(const LoraShape& s, bool dx) {
  const bool dropout = !dx && s.dropout > 0.0f;
  const bool vector = !dx && !dropout && s.m <= kMaxVectorTokens;
  Plan plan;
  plan.entry = shrink_entry(vector, dx, dropout);
  plan.template_args = {{"T", s.dtype}, {"LT", s.lora_dtype}};
  plan.p = {dx ? s.n : s.k, s.rank};
  if (vector) {
    plan.template_args.emplace_back("TOKENS", s.m <= 2 ? static_cast<int>(s.m) : s.m <= 4 ? 4 : 8);
    plan.template_args.emplace_back("SIMDGROUPS", 8);
    plan.threads_per_grid = {256 * s.rank, 1, 1};
    plan.threads_per_threadgroup = {256, 1, 1};
    plan.why = "shrink, one threadgroup for each of " + std::to_string(s.rank) + " ranks; A once";
    return plan;
  }
  const int ranks = s.rank <= 16 ? 16 : 64;
  plan.template_args.emplace_back("BM", 32);
  plan.template_args.emplace_back("RANKS", ranks);
  if (dropout) {
    plan.p.push_back(static_cast<uint32_t>(s.dropout_seed));
    plan.p.push_back(static_cast<uint32_t>(s.dropout_seed >> 32));
    plan.p.push_back(dropout_threshold(s.dropout));
  }
  plan.threads_per_grid = {128 * ceil_div(s.rank, ranks), ceil_div(s.m, 32), 1};
  plan.threads_per_threadgroup = {128, 1, 1};
  plan.why = "shrink, tiles of 32 tokens x " + std::to_string(ranks) + " ranks; " +
             (dx ? "B" : "A") + " read " + std::to_string(ceil_div(s.m, 32)) + " times";
  return plan;
}

/// Whether to split, by what the caller asks or the table says.
bool splits(const LoraShape& s, const char* kernel, double repeated, double limit, bool can_fuse) {
  require(
      can_fuse || s.form != Form::fused,
      kernel,
      "the fused tiled form takes a rank of at most 64 but rank is " + std::to_string(s.rank));
  if (s.form != Form::automatic) return s.form == Form::split;
  return !can_fuse || repeated > limit;
}

/// Two dispatches of the tiled form; `fused` is the choice that was not taken.
std::vector<Plan> split_tiled(const LoraShape& s, bool dx, const GemmChoice& fused) {
  Plan second = gemm_plan(s, AdapterUse::given, dx, choose_gemm(s, dx ? s.k : s.n, false));
  if (s.rank > kMaxFusedTileRank) {
    second.why += "; two dispatches: the rank is above " + std::to_string(kMaxFusedTileRank);
  } else {
    second.why += std::string("; two dispatches: one would add ") + percent(fused.repeated) +
                  " of the base product's multiply-adds for " + (dx ? "dy·B" : "x·Aᵀ") +
                  " (limit " + percent(kMaxRepeatedProducts) + ")";
  }
  return {shrink_plan(s, dx), std::move(second)};
}

}  // namespace

std::vector<Plan> plan_lora_forward(const LoraShape& s) {
  constexpr const char* kKernel = "lora_forward";
  check(s, kKernel, false);
  const bool vector = s.m <= kMaxVectorTokens && !(s.rank > 0 && s.dropout > 0.0f);
  if (s.rank == 0) {
    return {
        vector ? gemv_plan(s, AdapterUse::none, choose_gemv(s, false))
               : gemm_plan(s, AdapterUse::none, false, choose_gemm(s, s.n, false))};
  }
  if (vector) {
    const GemvChoice c = choose_gemv(s, true);
    if (!splits(s, kKernel, c.repeated, kMaxRepeatedBytes, true)) {
      return {gemv_plan(s, AdapterUse::fused, c)};
    }
    Plan second = gemv_plan(s, AdapterUse::given, choose_gemv(s, false));
    second.why += "; two dispatches: one would read A again for " + percent(c.repeated) +
                  " of W's bytes (limit " + percent(kMaxRepeatedBytes) + ")";
    return {shrink_plan(s, false), std::move(second)};
  }
  const GemmChoice c = choose_gemm(s, s.n, s.rank <= kMaxFusedTileRank);
  if (!splits(s, kKernel, c.repeated, kMaxRepeatedProducts, s.rank <= kMaxFusedTileRank)) {
    return {gemm_plan(s, AdapterUse::fused, false, c)};
  }
  return split_tiled(s, false, c);
}

std::vector<Plan> plan_lora_dx(const LoraShape& s) {
  constexpr const char* kKernel = "lora_dx";
  check(s, kKernel, false);
  if (s.rank == 0) {
    return {gemm_plan(s, AdapterUse::none, true, choose_gemm(s, s.k, false))};
  }
  const GemmChoice c = choose_gemm(s, s.k, s.rank <= kMaxFusedTileRank);
  if (!splits(s, kKernel, c.repeated, kMaxRepeatedProducts, s.rank <= kMaxFusedTileRank)) {
    return {gemm_plan(s, AdapterUse::fused, true, c)};
  }
  return split_tiled(s, true, c);
}

Plan plan_lora_shrink(const LoraShape& s) {
  check(s, "lora_shrink", true);
  return shrink_plan(s, false);
}

Plan plan_lora_shrink_dx(const LoraShape& s) {
  check(s, "lora_shrink_dx", true);
  return shrink_plan(s, true);
}

}  // namespace metal_lora::metal
