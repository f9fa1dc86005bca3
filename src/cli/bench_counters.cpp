// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/bench_counters.h"

#include "metal_lora/error.h"

#ifdef METAL_LORA_EMULATOR

#include <algorithm>
#include <map>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/random.h>

#include "kernels/metal/plans_unfused.h"
#include "src/cli/version.h"
#include "src/launch/backend.h"
#include "src/launch/emulated.h"
#include "src/ops/metal_ops.h"

namespace mx = mlx::core;

namespace metal_lora::cli {
namespace {

using ops::metal_ops::NamedArrays;
using ops::metal_ops::NamedOutputs;

struct CounterCase {
  const char* weight;  ///< "bf16", "int4", "nf4"
  uint32_t tokens, in, out;
  int scale_down;  ///< of a 7 B model's shape
};

/// 4096 x 4096 (attention) and 4096 -> 11008 (feed-forward) of a 7 B model, over 8 and over 4: two
/// sizes check the formula that carries to the full one.
std::vector<CounterCase> cases() {
  std::vector<CounterCase> all;
  for (const int scale_down : {8, 4}) {
    const uint32_t d = 4096 / static_cast<uint32_t>(scale_down),
                   ffn = 11008 / static_cast<uint32_t>(scale_down);
    for (const char* weight : {"bf16", "int4", "nf4"}) {
      for (const uint32_t tokens : {1u, 8u}) {
        all.push_back({weight, tokens, d, d, scale_down});
        all.push_back({weight, tokens, d, ffn, scale_down});
      }
    }
    all.push_back({"bf16", 128, d, d, scale_down});
    all.push_back({"int4", 128, d, d, scale_down});
  }
  return all;
}

constexpr uint32_t kCounterRank = 16;
constexpr float kCounterScale = 2.0f;

/// Device bytes. What every thread reads alike from the constant space (`p`, shapes) is not
/// counted: a GPU keeps it in uniform registers.
struct TrafficTotals {
  size_t dispatches = 0;
  uint64_t issued = 0;   ///< device bytes that threads asked for, read and written
  uint64_t touched = 0;  ///< each dispatch's distinct bytes: what a perfect cache would move
  uint64_t matrix_products = 0;
  std::map<std::string, std::pair<uint64_t, uint64_t>> reads;  ///< by buffer: issued, distinct
};

TrafficTotals total(const std::vector<EmulatedDispatch>& dispatches) {
  TrafficTotals sum;
  for (const auto& d : dispatches) {
    ++sum.dispatches;
    // 8 x 8 x 8 for each multiply-accumulate of a simdgroup.
    sum.matrix_products += 512 * d.report.counters.matrix_operations;
    for (const auto& b : d.report.counters.buffers) {
      const auto& name = d.buffer_names[static_cast<size_t>(b.index)];
      if (name == "p" || name.ends_with("_shape")) continue;
      sum.issued += b.read_bytes + b.written_bytes;
      sum.touched += b.unique_read_bytes + b.unique_written_bytes;
      auto& read = sum.reads[name];
      read.first += b.read_bytes;
      read.second += b.unique_read_bytes;
    }
  }
  return sum;
}

metal::LoraShape shape_of(const CounterCase& c, const Weight& weight) {
  metal::LoraShape shape;
  const auto& w = weight.params();
  shape.m = c.tokens;
  shape.n = w.n;
  shape.k = w.k;
  ops::metal_ops::describe_weight(shape, w);
  shape.dtype = shape.lora_dtype = DType::bf16;
  return shape;
}

struct Operands {
  Weight weight;
  mx::array x, a, b;
};

Operands make_operands(const CounterCase& c) {
  const auto normal = [](uint32_t rows, uint32_t columns) {
    return mx::astype(
        mx::random::normal({static_cast<int>(rows), static_cast<int>(columns)}), mx::bfloat16);
  };
  const std::string format = c.weight;
  auto weight = Weight::dense(normal(c.out, c.in));
  if (format == "int4") weight = weight.quantized(4, 64);
  if (format == "nf4") weight = weight.quantized_nf4(true);
  return {weight, normal(c.tokens, c.in), normal(kCounterRank, c.in), normal(c.out, kCounterRank)};
}

TrafficTotals run_counted(const std::function<void()>& run) {
  BackendScope scope(Backend::emulator);
  EmulatorLog log;
  run();
  return total(log.take());
}

mx::Shape rows_of(const mx::array& x, uint32_t columns) {
  return {x.shape(0), static_cast<int>(columns)};
}

metal::LoraShape lora_shape(const CounterCase& c, const Weight& weight) {
  auto shape = shape_of(c, weight);
  shape.rank = kCounterRank;
  shape.scale = kCounterScale;
  return shape;
}

std::vector<metal::Plan> planned_as(metal::LoraShape shape, metal::Form form) {
  shape.form = form;
  return metal::plan_lora_forward(shape);
}

mx::array run_fused(const std::vector<metal::Plan>& plans, const Operands& o) {
  NamedArrays arrays{{"x", o.x}, {"a", o.a}, {"b", o.b}};
  ops::metal_ops::bind_weight(arrays, o.weight);
  ops::metal_ops::run_plans(
      plans,
      arrays,
      {{"y", {rows_of(o.x, o.weight.params().n), mx::bfloat16}},
       {"u", {rows_of(o.x, kCounterRank), mx::float32}}});
  auto y = arrays.at("y");
  y.eval();
  return y;
}

/// y0 = x·Wᵀ, u = x·Aᵀ, z = u·Bᵀ by `linear`, then y = y0 + s·z.
mx::array run_unfused(
    const CounterCase& c,
    const Operands& o,
    const std::function<mx::array(const mx::array&, const Weight&)>& linear) {
  auto y0 = linear(o.x, o.weight);
  auto u = linear(o.x, Weight::dense(o.a));
  auto z = linear(u, Weight::dense(o.b));
  NamedArrays arrays{{"y", y0}, {"z", z}};
  ops::metal_ops::run_plans(
      {metal::plan_add_scaled(c.tokens, c.out, kCounterScale, DType::bf16)},
      arrays,
      {{"sum", {y0.shape(), mx::bfloat16}}});
  auto y = arrays.at("sum");
  y.eval();
  return y;
}

mx::array run_linear(
    const std::vector<metal::Plan>& plans, const mx::array& x, const Weight& weight) {
  NamedArrays arrays{{"x", x}};
  ops::metal_ops::bind_weight(arrays, weight);
  ops::metal_ops::run_plans(plans, arrays, {{"y", {rows_of(x, weight.params().n), mx::bfloat16}}});
  return arrays.at("y");
}

/// The project's kernels without their adapter.
mx::array tiled_linear(const CounterCase& c, const mx::array& x, const Weight& weight) {
  return run_linear(metal::plan_lora_forward(shape_of(c, weight)), x, weight);
}

/// A simdgroup for each output: dense weights only.
mx::array plain_linear(const mx::array& x, const Weight& weight) {
  const auto rows = static_cast<uint32_t>(x.shape(0));
  const auto& w = weight.params();
  return run_linear({metal::plan_plain_linear(rows, w.n, w.k, DType::bf16)}, x, weight);
}

double ratio(uint64_t a, uint64_t b) {
  return b == 0 ? 0.0 : static_cast<double>(a) / static_cast<double>(b);
}

uint64_t weight_reads(const TrafficTotals& t, bool issued) {
  uint64_t sum = 0;
  for (const char* name : {"w", "scales", "biases"}) {
    const auto found = t.reads.find(name);
    if (found != t.reads.end()) sum += issued ? found->second.first : found->second.second;
  }
  return sum;
}

/// Issued bytes beside the base weight's: what the adapter and the activations cost.
uint64_t beside_weight(const TrafficTotals& t) {
  return t.issued - weight_reads(t, true);
}

/// How often each byte of an input is read, from the plan's grid alone; see the heads of
/// kernels/metal/lora_kernels.metal and lora_tiled.metal.
uint64_t times_read(const metal::Plan& plan, const std::string& input, const metal::LoraShape& s) {
  const std::string kernel = plan.entry->name;
  const uint64_t columns = plan.threads_per_grid.x / plan.threads_per_threadgroup.x;
  const uint64_t rows = plan.threads_per_grid.y / plan.threads_per_threadgroup.y;
  if (kernel == "plain_linear") return input == "x" ? s.n : s.m;
  if (kernel == "add_scaled") return 1;
  const bool of_weight = input == "w" || input == "scales" || input == "biases" || input == "b";
  if (kernel.starts_with("lora_gemv")) return of_weight ? 1 : columns;
  if (kernel == "lora_shrink_vector") return input == "a" ? 1 : columns;
  if (kernel == "lora_shrink") return input == "a" ? rows : columns;
  if (of_weight) return rows;                      // lora_gemm
  return input == "a" ? rows * columns : columns;  // x, u
}

uint64_t array_bytes(const std::string& name, const metal::LoraShape& s, uint64_t weight_bytes) {
  const uint64_t m = s.m, n = s.n, k = s.k, r = s.rank;
  if (name == "x") return 2 * m * k;
  if (name == "w") return weight_bytes;  // scales and biases within
  if (name == "a") return 2 * r * k;
  if (name == "b") return 2 * n * r;
  if (name == "u") return 4 * m * r;
  if (name == "y" || name == "z" || name == "sum") return 2 * m * n;
  return 0;
}

/// Device bytes that the dispatches issue, by formula.
uint64_t bytes_by_formula(
    const std::vector<metal::Plan>& plans, const metal::LoraShape& s, uint64_t weight_bytes) {
  uint64_t sum = 0;
  for (const auto& plan : plans) {
    for (const auto& name : plan.entry->inputs) {
      sum += times_read(plan, name, s) * array_bytes(name, s, weight_bytes);
    }
    for (const auto& name : plan.entry->outputs) sum += array_bytes(name, s, weight_bytes);
  }
  return sum;
}

nlohmann::ordered_json traffic_json(const TrafficTotals& t) {
  auto buffers = nlohmann::ordered_json::object();
  for (const auto& [name, read] : t.reads) {
    if (read.first == 0) continue;
    buffers[name] = {{"issued", read.first}, {"distinct", read.second}};
  }
  return {
      {"dispatches", t.dispatches},
      {"issued_bytes", t.issued},
      {"distinct_bytes", t.touched},
      {"matrix_products", t.matrix_products},
      {"reads", buffers}};
}

/// The same kernels at a 7 B model's own shapes, by the formula that the counts bear out.
nlohmann::ordered_json full_size(Console& console) {
  constexpr uint32_t kDims = 4096, kFfn = 11008;
  auto rows = nlohmann::ordered_json::array();
  console.line("");
  console.line(fmt::format(
      "{:<6}{:>4} {:>5} x {:<6} {:>9} {:>8} {:>8} {:>8} {:>12} {:>9}",
      "W0",
      "M",
      "in",
      "out",
      "MB base",
      "+ LoRA",
      "plain",
      "tiled",
      "4-bit/half",
      "form"));
  for (const bool int4 : {false, true}) {
    for (const uint32_t tokens : {1u, 8u, 128u, 512u}) {
      for (const uint32_t out : {kDims, kFfn}) {
        metal::LoraShape s;
        s.m = tokens;
        s.n = out;
        s.k = kDims;
        s.format = int4 ? WeightFormat::int4 : WeightFormat::bf16;
        s.group_size = 128;
        s.scales_dtype = DType::bf16;
        s.dtype = s.lora_dtype = DType::bf16;
        const uint64_t half = uint64_t{2} * out * kDims;
        const uint64_t weight = int4 ? half / 4 + half / 2 / 128 * 4 : half;
        const uint64_t base = bytes_by_formula(metal::plan_lora_forward(s), s, weight);
        auto a_shape = s, b_shape = s;
        a_shape.format = b_shape.format = WeightFormat::bf16;
        a_shape.n = kCounterRank;
        b_shape.k = kCounterRank;
        const auto sum = metal::plan_add_scaled(tokens, out, kCounterScale, DType::bf16);
        const auto product = [](const metal::LoraShape& shape) {
          return uint64_t{2} * shape.n * shape.k;
        };
        const auto tiled =
            base + bytes_by_formula({sum}, s, 0) +
            bytes_by_formula(metal::plan_lora_forward(a_shape), a_shape, product(a_shape)) +
            bytes_by_formula(metal::plan_lora_forward(b_shape), b_shape, product(b_shape));
        uint64_t plain = bytes_by_formula({sum}, s, 0);
        for (const auto& shape : {s, a_shape, b_shape}) {
          plain += bytes_by_formula(
              {metal::plan_plain_linear(shape.m, shape.n, shape.k, DType::bf16)},
              shape,
              shape.k == kDims && shape.n == out ? weight : product(shape));
        }
        s.rank = kCounterRank;
        for (const auto form : {metal::Form::fused, metal::Form::split}) {
          const auto plans = planned_as(s, form);
          const auto lora = bytes_by_formula(plans, s, weight);
          const bool chosen = planned_as(s, metal::Form::automatic).size() == plans.size();
          console.line(fmt::format(
              "{:<6}{:>4} {:>5} x {:<6} {:>9.1f} {:>7.1f}% {:>8} {:>7.2f}x {:>12} {:>9}",
              int4 ? "int4" : "bf16",
              tokens,
              kDims,
              out,
              double(base) / 1e6,
              100.0 * (double(lora) / double(base) - 1.0),
              int4 ? "-" : fmt::format("{:.2f}x", ratio(plain, lora)),
              ratio(tiled, lora),
              int4 ? fmt::format("{:.3f}", ratio(weight, half)) : "-",
              std::string(form == metal::Form::fused ? "fused" : "split") + (chosen ? "*" : "")));
          rows.push_back(
              {{"weight", int4 ? "int4" : "bf16"},
               {"tokens", tokens},
               {"in", kDims},
               {"out", out},
               {"form", form == metal::Form::fused ? "fused" : "split"},
               {"chosen", chosen},
               {"dispatches", plans.size()},
               {"base_bytes", base},
               {"lora_bytes", lora},
               {"unfused_tiled_bytes", tiled},
               {"unfused_plain_bytes", int4 ? 0 : plain},
               {"weight_bytes", weight}});
        }
      }
    }
  }
  console.line(
      "At full size, by formula: bytes of the base product alone, what LoRA adds, and four plain "
      "or "
      "tiled dispatches over these; int4 in groups of 128");
  return rows;
}

}  // namespace

void bench_counters(Console& console) {
  auto rows = nlohmann::ordered_json::array();
  console.line(fmt::format(
      "{:<6}{:>4} {:>5} x {:<6} {:>10} {:>9} {:>9} {:>9} {:>8} {:>7} {:>7} {:>7} {:>8} {:>9}",
      "W0",
      "M",
      "in",
      "out",
      "dispatches",
      "plain",
      "tiled",
      "beside W0",
      "W0 reads",
      "A",
      "B",
      "matrix",
      "formula",
      "form"));
  const auto all = cases();
  for (size_t i = 0; i < all.size(); ++i) {
    const CounterCase& c = all[i];
    console.progress(fmt::format(
        "counters {} {}/{}", progress_bar(double(i) / double(all.size()), 20), i, all.size()));
    const auto operands = make_operands(c);
    const auto unfused = run_counted([&] {
      run_unfused(c, operands, [&](const auto& x, const auto& w) { return tiled_linear(c, x, w); });
    });
    // Its many small threadgroups take the emulator long: the decode shapes only.
    const bool has_plain = !operands.weight.is_quantized() && c.tokens <= 8;
    const auto plain =
        has_plain ? run_counted([&] { run_unfused(c, operands, plain_linear); }) : TrafficTotals{};
    for (const auto form : {metal::Form::fused, metal::Form::split}) {
      const auto shape = lora_shape(c, operands.weight);
      const auto plans = planned_as(shape, form);
      const auto fused = run_counted([&] { run_fused(plans, operands); });
      const double products =
          double(c.tokens) * c.out * c.in + double(c.tokens) * kCounterRank * (c.out + c.in);
      const bool chosen = planned_as(shape, metal::Form::automatic).size() == plans.size();
      const uint64_t by_formula = bytes_by_formula(plans, shape, operands.weight.nbytes());
      const auto read_ratio = [&](const char* name) {
        const auto found = fused.reads.find(name);
        return found == fused.reads.end() ? 0.0 : ratio(found->second.first, found->second.second);
      };
      const double w_ratio = ratio(weight_reads(fused, true), weight_reads(fused, false));
      console.line(fmt::format(
          "{:<6}{:>4} {:>5} x {:<6} {:>7}->{:<2} {:>9} {:>8.2f}x {:>8.2f}x {:>8.3f} {:>7.2f} "
          "{:>7.2f} "
          "{:>7.1f} {:>8.3f} {:>9}",
          c.weight,
          c.tokens,
          c.in,
          c.out,
          unfused.dispatches,
          fused.dispatches,
          has_plain ? fmt::format("{:.2f}x", ratio(plain.issued, fused.issued)) : "-",
          ratio(unfused.issued, fused.issued),
          ratio(beside_weight(unfused), beside_weight(fused)),
          w_ratio,
          read_ratio("a"),
          read_ratio("b"),
          100 * double(fused.matrix_products) / products,
          ratio(by_formula, fused.issued),
          std::string(form == metal::Form::fused ? "fused" : "split") + (chosen ? "*" : "")));
      rows.push_back(
          {{"weight", c.weight},
           {"tokens", c.tokens},
           {"in", c.in},
           {"out", c.out},
           {"rank", kCounterRank},
           {"scale_down", c.scale_down},
           {"form", form == metal::Form::fused ? "fused" : "split"},
           {"chosen", chosen},
           {"why", plans.back().why},
           {"weight_bytes", operands.weight.nbytes()},
           {"issued_bytes_by_formula", by_formula},
           {"products", products},
           {"fused", traffic_json(fused)},
           {"unfused", traffic_json(unfused)}});
      if (has_plain) rows.back()["plain"] = traffic_json(plain);
    }
  }
  console.clear_progress();
  console.line(
      "plain, tiled: device bytes that four dispatches issue (a simdgroup for each output; this "
      "project's kernels without their adapter) over those of these; beside W0: the latter without "
      "W0's; W0, A, B: issued over distinct bytes read; matrix: multiply-adds on the matrix units, "
      "% of those needed; "
      "formula: bytes by formula over bytes counted; *: the form that the table chooses");
  const auto full = full_size(console);
  console.emit(
      {{"bench", "counters"},
       {"machine", build_and_machine()},
       {"results", rows},
       {"full_size_by_formula", full}});
}

}  // namespace metal_lora::cli

#else

namespace metal_lora::cli {

void bench_counters(Console&) {
  throw Error(
      ErrorCode::unsupported,
      "[bench --counters] the emulator that counts is not in this build",
      "it is built on Linux");
}

}  // namespace metal_lora::cli

#endif
