// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/cli/bench_counters.h"

#include <algorithm>
#include <map>

#include <fmt/format.h>
#include <mlx/ops.h>
#include <mlx/random.h>

#include "kernels/metal/plans_unfused.h"
#include "src/cli/version.h"
#include "src/launch/backend.h"
#include "src/launch/metal.h"
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
      sum.issued += b.read_bytes + b.written_bytes;
      sum.touched += b.unique_read_bytes + b.unique_written_bytes;
      auto& read = sum.reads[d.buffer_names[static_cast<size_t>(b.index)]];
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
  shape.format = w.format;
  shape.group_size = w.group_size;
  shape.scales_dtype = w.scales_dtype;
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

std::vector<metal::Plan> fused_plans(const CounterCase& c, const Operands& operands, metal::Form form) {
  auto shape = shape_of(c, operands.weight);
  shape.rank = kCounterRank;
  shape.scale = kCounterScale;
  shape.form = form;
  shape.double_quant = operands.weight.params().double_quant;
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

/// y0 = x·Wᵀ, u = x·Aᵀ, z = u·Bᵀ, y = y0 + s·z.
mx::array run_unfused(const CounterCase& c, const Operands& o) {
  const auto linear = [&](const mx::array& x, const Weight& weight) {
    CounterCase part = c;
    auto shape = shape_of(part, weight);
    shape.double_quant = weight.params().double_quant;
    NamedArrays arrays{{"x", x}};
    ops::metal_ops::bind_weight(arrays, weight);
    ops::metal_ops::run_plans(
        metal::plan_lora_forward(shape),
        arrays,
        {{"y", {rows_of(x, weight.params().n), mx::bfloat16}}});
    return arrays.at("y");
  };
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

}  // namespace

void bench_counters(Console& console) {
  auto rows = nlohmann::ordered_json::array();
  console.line(fmt::format(
      "{:<6}{:>4} {:>5} x {:<6} {:>10} {:>9} {:>9} {:>8} {:>7} {:>7} {:>7} {:>9}",
      "W0",
      "M",
      "in",
      "out",
      "dispatches",
      "bytes",
      "beside W0",
      "W0 reads",
      "A",
      "B",
      "matrix",
      "form"));
  const auto all = cases();
  for (size_t i = 0; i < all.size(); ++i) {
    const CounterCase& c = all[i];
    console.progress(fmt::format(
        "counters {} {}/{}", progress_bar(double(i) / double(all.size()), 20), i, all.size()));
    const auto operands = make_operands(c);
    const auto unfused = run_counted([&] { run_unfused(c, operands); });
    for (const auto form : {metal::Form::fused, metal::Form::split}) {
      const auto plans = fused_plans(c, operands, form);
      const auto fused = run_counted([&] { run_fused(plans, operands); });
      const double products =
          double(c.tokens) * c.out * c.in + double(c.tokens) * kCounterRank * (c.out + c.in);
      const bool chosen =
          fused_plans(c, operands, metal::Form::automatic).size() == plans.size();
      const auto read_ratio = [&](const char* name) {
        const auto found = fused.reads.find(name);
        return found == fused.reads.end() ? 0.0 : ratio(found->second.first, found->second.second);
      };
      const double w_ratio = ratio(weight_reads(fused, true), weight_reads(fused, false));
      console.line(fmt::format(
          "{:<6}{:>4} {:>5} x {:<6} {:>7}->{:<2} {:>8.2f}x {:>8.2f}x {:>8.3f} {:>7.2f} {:>7.2f} "
          "{:>7.1f} {:>9}",
          c.weight,
          c.tokens,
          c.in,
          c.out,
          unfused.dispatches,
          fused.dispatches,
          ratio(unfused.issued, fused.issued),
          ratio(beside_weight(unfused), beside_weight(fused)),
          w_ratio,
          read_ratio("a"),
          read_ratio("b"),
          100 * double(fused.matrix_products) / products,
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
           {"products", products},
           {"fused", traffic_json(fused)},
           {"unfused", traffic_json(unfused)}});
    }
  }
  console.clear_progress();
  console.line(
      "bytes, beside W0: issued by the four plain dispatches over issued by these; W0, A, B: issued "
      "over distinct bytes read; matrix: multiply-adds on the matrix units, % of those needed; *: "
      "the form that the table chooses");
  console.emit({{"bench", "counters"}, {"machine", build_and_machine()}, {"results", rows}});
}

}  // namespace metal_lora::cli
